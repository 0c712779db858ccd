//! What is rendered, against what an installed vLLM renders: `tests/fixtures/vllm-metrics.json`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::*;

/// Metrics that vLLM exports and this engine does not.
const NOT_HERE: &[(&str, &str)] = &[
    ("vllm:external_prefix_cache_queries_total", "there is no cache but the engine's"),
    ("vllm:external_prefix_cache_hits_total", "there is no cache but the engine's"),
    ("vllm:mm_cache_queries_total", "models read text only"),
    ("vllm:mm_cache_hits_total", "models read text only"),
    ("vllm:estimated_flops_per_gpu_total", "nothing is estimated, and there is no GPU"),
    ("vllm:estimated_read_bytes_per_gpu_total", "nothing is estimated, and there is no GPU"),
    ("vllm:estimated_write_bytes_per_gpu_total", "nothing is estimated, and there is no GPU"),
];

/// Labels of vLLM's `cache_config_info` that would say nothing here.
const NOT_LABELS: &[(&str, &[&str])] = &[
    (
        "there are no layers of this kind",
        &[
            "enable_mamba_shared_prefix_checkpoint",
            "mamba_block_size",
            "mamba_cache_dtype",
            "mamba_cache_mode",
            "mamba_page_size_padded",
            "mamba_ssm_cache_dtype",
            "replayssm_buffer_len",
            "use_kda_recoverssm",
            "use_replayssm",
        ],
    ),
    (
        "the cache is one array of 16-bit floats",
        &["kv_cache_dtype_skip_layers", "kv_cache_layout", "skip_page_size_padded"],
    ),
    (
        "every layer keeps every token, and computes it",
        &[
            "kv_sharing_fast_prefill",
            "prefix_cache_retention_interval",
            "sliding_window",
            "swa_bounded_replay",
        ],
    ),
    (
        "there is one size of blocks, which the configuration always has",
        &["_block_size_resolved", "prefix_match_unit", "user_specified_block_size"],
    ),
    ("memory is given in bytes", &["gpu_memory_utilization"]),
    ("nothing is offloaded", &["kv_offloading_backend"]),
];

/// One family as it is rendered.
#[derive(Debug, Default, PartialEq, Eq)]
struct Rendered {
    kind: String,
    labels: BTreeSet<String>,
    /// Of each label but the model's name.
    values: BTreeMap<String, BTreeSet<String>>,
    /// Bounds of buckets, in their order.
    bounds: Vec<String>,
}

impl Rendered {
    fn on_labels<'a>(&mut self, labels: impl Iterator<Item = (&'a str, &'a str)>) {
        for (name, value) in labels {
            if name == "le" {
                if !self.bounds.iter().any(|bound| bound == value) {
                    self.bounds.push(value.to_owned());
                }
                continue;
            }
            self.labels.insert(name.to_owned());
            if name != "model_name" {
                self.values.entry(name.to_owned()).or_default().insert(value.to_owned());
            }
        }
    }
}

/// Reads the text format, as far as it is used here: no label has a quote or a comma in its value.
fn families(text: &str) -> BTreeMap<String, Rendered> {
    let mut found: BTreeMap<String, Rendered> = BTreeMap::new();
    for line in text.lines() {
        if let Some(typed) = line.strip_prefix("# TYPE ") {
            let (name, kind) = typed.split_once(' ').expect("a name and a type");
            found.entry(name.to_owned()).or_default().kind = kind.to_owned();
        } else if !line.starts_with('#') {
            let (name, rest) = line.split_once('{').expect("every series here has labels");
            let (labels, _) = rest.rsplit_once('}').expect("labels end");
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|part| name.strip_suffix(part));
            let name = base.filter(|base| found.contains_key(*base)).unwrap_or(name);
            let labels = labels.split(',').map(|pair| {
                let (name, value) = pair.split_once('=').expect("a label");
                (name, value.trim_matches('"'))
            });
            found.get_mut(name).expect("its type comes first").on_labels(labels);
        }
    }
    found
}

fn strings<T: FromIterator<String>>(of: &Value) -> T {
    let texts = of.as_array().into_iter().flatten();
    texts.map(|text| text.as_str().expect("a text").to_owned()).collect()
}

/// What vLLM renders for a model of this context length.
fn of_vllm(model_len: u32) -> BTreeMap<String, Rendered> {
    let fixture: Value = serde_json::from_str(include_str!("../../tests/fixtures/vllm-metrics.json"))
        .expect("the fixture is JSON");
    let families = fixture["metrics"].as_object().expect("an object").iter();
    let rendered = |family: &Value| {
        let bounds = &family["le"];
        let values = family["values"].as_object().expect("an object").iter();
        Rendered {
            kind: family["type"].as_str().expect("a type").to_owned(),
            labels: strings(&family["labels"]),
            values: values.map(|(label, values)| (label.clone(), strings(values))).collect(),
            bounds: strings(if bounds.is_object() { &bounds[model_len.to_string()] } else { bounds }),
        }
    };
    families.map(|(name, family)| (name.clone(), rendered(family))).collect()
}

fn kv(model_len: u32) -> KvInfo {
    KvInfo {
        block_size: 16,
        blocks: 9,
        blocks_override: None,
        bytes: 1 << 20,
        prefix_caching: true,
        model_len,
    }
}

#[test]
fn everything_is_rendered_as_vllm_renders_it() {
    for model_len in [4096, 2_097_152] {
        let registry = Registry::new();
        let metrics = EngineMetrics::register(&registry).expect("registers once");
        let _model = metrics.for_model("m", &kv(model_len));
        let mut ours = families(&registry.render());
        ours.retain(|name, _| name.starts_with("vllm:"));
        let mut theirs = of_vllm(model_len);
        for (name, why) in NOT_HERE {
            assert!(theirs.remove(*name).is_some(), "{name} is not vLLM's: it need not stand here");
            assert!(!ours.contains_key(*name), "{name} is there: {why}?");
        }
        // Its labels say how the cache is configured, which is compared by itself.
        theirs.remove("vllm:cache_config_info").expect("it is vLLM's");
        ours.remove("vllm:cache_config_info").expect("it is ours too");
        for (name, expect) in &theirs {
            assert_eq!(ours.get(name), Some(expect), "{name}");
        }
        let more: Vec<&String> = ours.keys().filter(|name| !theirs.contains_key(*name)).collect();
        assert_eq!(more, Vec::<&String>::new(), "not vLLM's");
    }
}

#[test]
fn the_labels_of_the_cache_are_vllms() {
    let registry = Registry::new();
    let metrics = EngineMetrics::register(&registry).expect("registers once");
    let _model = metrics.for_model("m", &kv(100));
    let ours = families(&registry.render()).remove("vllm:cache_config_info").expect("it is rendered");
    let theirs = of_vllm(4096).remove("vllm:cache_config_info").expect("it is vLLM's");
    let left_out: BTreeSet<String> =
        NOT_LABELS.iter().flat_map(|(_, labels)| *labels).map(|&label| label.to_owned()).collect();
    assert!(left_out.is_subset(&theirs.labels), "exceptions that are not needed");
    assert_eq!(ours.labels, theirs.labels.difference(&left_out).cloned().collect());
    let value = |label: &str| ours.values[label].iter().next().expect("one value").as_str();
    for (label, expect) in [
        ("num_gpu_blocks", "9"),
        ("num_cpu_blocks", "None"),
        ("enable_prefix_caching", "True"),
        ("kv_cache_size_tokens", "144"),
        ("kv_cache_memory_bytes", "1048576"),
        // Seven blocks for the longest sequence.
        ("kv_cache_max_concurrency", "1.2857142857142858"),
    ] {
        assert_eq!(value(label), expect, "{label}");
    }
}

/// The values of all series whose line begins so.
fn value(registry: &Registry, series: &str) -> Option<String> {
    let text = registry.render();
    text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ').map(str::to_owned))
}

#[test]
fn an_engine_that_is_gone_leaves_counts_and_no_load() {
    let registry = Registry::new();
    let metrics = EngineMetrics::register(&registry).expect("registers once");
    let model = metrics.for_model("m", &kv(100));
    model.on_step(&StepRecord {
        running: 3,
        waiting: 2,
        kv_usage: 0.5,
        preemptions: 4,
        ..StepRecord::default()
    });
    let labels = "{engine=\"0\",model_name=\"m\"}";
    let check = |expect: [&str; 5]| {
        let names = [
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "vllm:kv_cache_usage_perc",
            "vllm:num_preemptions_total",
            "forebay_engine_alive",
        ];
        let values = names.map(|name| value(&registry, &format!("{name}{labels}")));
        assert_eq!(values.each_ref().map(|value| value.as_deref().expect("it is there")), expect);
    };
    check(["3", "2", "0.5", "4", "1"]);
    drop(model);
    check(["0", "0", "0", "4", "0"]);
    assert!(!registry.render().contains("vllm:cache_config_info{"), "there is no cache any more");
}

#[test]
fn the_most_that_a_choice_wrote_is_the_requests() {
    let registry = Registry::new();
    let metrics = EngineMetrics::register(&registry).expect("registers once");
    let model = metrics.for_model("m", &kv(100));
    model.on_prompt_finished(2, 7);
    model.on_prompt_finished(1, 30);
    let series = |name: &str| value(&registry, &format!("{name}{{engine=\"0\",model_name=\"m\"}}"));
    assert_eq!(series("vllm:request_max_num_generation_tokens_sum").as_deref(), Some("37"));
    assert_eq!(series("vllm:request_params_n_sum").as_deref(), Some("3"));
    assert_eq!(series("vllm:request_params_n_count").as_deref(), Some("2"));
}

#[test]
fn former_names_have_the_same_values_where_they_are_asked_for() {
    let registry = Registry::new();
    let metrics = EngineMetrics::register(&registry).expect("registers once");
    let model = metrics.for_model("m", &kv(100));
    model.on_step(&StepRecord { kv_usage: 0.25, prefix_hits: 6, ..StepRecord::default() });
    let labels = "{engine=\"0\",model_name=\"m\"}";
    let former = [
        ("vllm:gpu_cache_usage_perc", "0.25"),
        ("vllm:gpu_prefix_cache_queries_total", "0"),
        ("vllm:gpu_prefix_cache_hits_total", "6"),
        ("vllm:time_per_output_token_seconds_count", "0"),
    ];
    for (name, _) in former {
        assert_eq!(value(&registry, &format!("{name}{labels}")), None, "{name}");
    }
    EngineMetrics::show_former_names(&registry);
    for (name, expect) in former {
        assert_eq!(value(&registry, &format!("{name}{labels}")).as_deref(), Some(expect), "{name}");
    }
}
