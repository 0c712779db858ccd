//! The engine's metrics under vLLM's names, labels and buckets, so that dashboards and routers made for vLLM read them.
//!
//! Source: vLLM 0.33 `vllm/v1/metrics/loggers.py`.

use std::time::Duration;

use forebay_observe::metrics::{HistogramVec, IntCounterVec};
use forebay_observe::{MetricError, Registry};
use forebay_types::FinishReason;

use crate::kv_events::KvEventFamilies;

const LABELS: &[&str] = &["model_name", "engine"];

const TTFT_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const ITL_BUCKETS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const REQUEST_BUCKETS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
const ITERATION_BUCKETS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
const N_BUCKETS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];

/// Families shared by all engines of the process; [`EngineMetrics::for_model`] gives one engine its series.
#[derive(Clone)]
pub struct EngineMetrics {
    gauges: forebay_observe::metrics::GaugeVec,
    running: forebay_observe::metrics::IntGaugeVec,
    waiting: forebay_observe::metrics::IntGaugeVec,
    cache_info: forebay_observe::metrics::IntGaugeVec,
    counters: Counters<IntCounterVec>,
    finished: IntCounterVec,
    rejections: IntCounterVec,
    waiting_by_reason: forebay_observe::metrics::IntGaugeVec,
    by_source: IntCounterVec,
    sleep_state: forebay_observe::metrics::IntGaugeVec,
    stuck: IntCounterVec,
    histograms: Histograms<HistogramVec>,
    pub(crate) kv_events: KvEventFamilies,
}

#[derive(Clone)]
struct Counters<T> {
    prefix_queries: T,
    prefix_hits: T,
    preemptions: T,
    prompt_tokens: T,
    prompt_tokens_cached: T,
    generation_tokens: T,
}

#[derive(Clone)]
struct Histograms<T> {
    ttft: T,
    itl: T,
    tpot: T,
    e2e: T,
    queue: T,
    inference: T,
    prefill: T,
    decode: T,
    prompt: T,
    generation: T,
    max_tokens: T,
    n: T,
    iteration: T,
    prefill_computed: T,
}

impl EngineMetrics {
    pub fn register(registry: &Registry, model_len_max: u32) -> Result<Self, MetricError> {
        let counter = |name: &str, help: &str| registry.counters(name, help, LABELS);
        let histogram =
            |name: &str, help: &str, buckets: &[f64]| registry.histograms(name, help, buckets, LABELS);
        let tokens = one_two_five(model_len_max);
        Ok(Self {
            kv_events: KvEventFamilies::register(registry)?,
            gauges: registry.add(forebay_observe::metrics::GaugeVec::new(
                forebay_observe::metrics::Opts::new(
                    "vllm:kv_cache_usage_perc",
                    "KV-cache usage. 1 means 100 percent usage.",
                ),
                LABELS,
            ))?,
            running: registry.gauges(
                "vllm:num_requests_running",
                "Number of requests in model execution batches.",
                LABELS,
            )?,
            waiting: registry.gauges(
                "vllm:num_requests_waiting",
                "Number of requests waiting to be processed.",
                LABELS,
            )?,
            cache_info: registry.gauges(
                "vllm:cache_config_info",
                "Information of the KV cache configuration.",
                &["block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype", "engine"],
            )?,
            counters: Counters {
                prefix_queries: counter(
                    "vllm:prefix_cache_queries_total",
                    "Prefix cache queries, in terms of number of queried tokens.",
                )?,
                prefix_hits: counter(
                    "vllm:prefix_cache_hits_total",
                    "Prefix cache hits, in terms of number of cached tokens.",
                )?,
                preemptions: counter(
                    "vllm:num_preemptions_total",
                    "Cumulative number of preemptions from the engine.",
                )?,
                prompt_tokens: counter("vllm:prompt_tokens_total", "Number of prefill tokens processed.")?,
                prompt_tokens_cached: counter(
                    "vllm:prompt_tokens_cached_total",
                    "Number of prompt tokens taken from the prefix cache.",
                )?,
                generation_tokens: counter(
                    "vllm:generation_tokens_total",
                    "Number of generation tokens processed.",
                )?,
            },
            finished: registry.counters(
                "vllm:request_success_total",
                "Count of successfully processed requests.",
                &["model_name", "engine", "finished_reason"],
            )?,
            waiting_by_reason: registry.gauges(
                "vllm:num_requests_waiting_by_reason",
                "Number of waiting requests by reason: capacity, or deferred while the engine is paused.",
                &["model_name", "engine", "reason"],
            )?,
            by_source: registry.counters(
                "vllm:prompt_tokens_by_source_total",
                "Number of prompt tokens by where their keys and values came from.",
                &["model_name", "engine", "source"],
            )?,
            sleep_state: registry.gauges(
                "vllm:engine_sleep_state",
                "Whether the engine is awake: it always is.",
                &["model_name", "engine", "sleep_state"],
            )?,
            stuck: registry.counters(
                "forebay_engine_stuck_steps_total",
                "Steps that took longer than engine.watchdog.",
                LABELS,
            )?,
            rejections: registry.counters(
                "vllm:admission_rejections_total",
                "Requests refused because a queue limit was reached.",
                &["model_name", "engine", "reason"],
            )?,
            histograms: Histograms {
                ttft: histogram(
                    "vllm:time_to_first_token_seconds",
                    "Histogram of time to first token in seconds.",
                    TTFT_BUCKETS,
                )?,
                itl: histogram(
                    "vllm:inter_token_latency_seconds",
                    "Histogram of inter-token latency in seconds.",
                    ITL_BUCKETS,
                )?,
                tpot: histogram(
                    "vllm:request_time_per_output_token_seconds",
                    "Histogram of time_per_output_token_seconds per request.",
                    ITL_BUCKETS,
                )?,
                e2e: histogram(
                    "vllm:e2e_request_latency_seconds",
                    "Histogram of e2e request latency in seconds.",
                    REQUEST_BUCKETS,
                )?,
                queue: histogram(
                    "vllm:request_queue_time_seconds",
                    "Histogram of time spent in WAITING phase for request.",
                    REQUEST_BUCKETS,
                )?,
                inference: histogram(
                    "vllm:request_inference_time_seconds",
                    "Histogram of time spent in RUNNING phase for request.",
                    REQUEST_BUCKETS,
                )?,
                prefill: histogram(
                    "vllm:request_prefill_time_seconds",
                    "Histogram of time spent in PREFILL phase for request.",
                    REQUEST_BUCKETS,
                )?,
                decode: histogram(
                    "vllm:request_decode_time_seconds",
                    "Histogram of time spent in DECODE phase for request.",
                    REQUEST_BUCKETS,
                )?,
                prompt: histogram(
                    "vllm:request_prompt_tokens",
                    "Number of prefill tokens processed.",
                    &tokens,
                )?,
                generation: histogram(
                    "vllm:request_generation_tokens",
                    "Number of generation tokens processed.",
                    &tokens,
                )?,
                max_tokens: histogram(
                    "vllm:request_params_max_tokens",
                    "Histogram of the max_tokens request parameter.",
                    &tokens,
                )?,
                prefill_computed: histogram(
                    "vllm:request_prefill_kv_computed_tokens",
                    "Histogram of new KV tokens computed during prefill, without cached tokens.",
                    &tokens,
                )?,
                n: histogram("vllm:request_params_n", "Histogram of the n request parameter.", N_BUCKETS)?,
                iteration: histogram(
                    "vllm:iteration_tokens_total",
                    "Histogram of number of tokens per engine_step.",
                    ITERATION_BUCKETS,
                )?,
            },
        })
    }

    /// The series of one engine. `kv` says how its cache is laid out.
    pub fn for_model(&self, model: &str, kv: &KvInfo) -> ModelMetrics {
        let caching = if kv.prefix_caching { "True" } else { "False" };
        self.cache_info
            .with_label_values(&[
                &kv.block_size.to_string(),
                &kv.blocks.to_string(),
                &caching.to_owned(),
                &"float16".to_owned(),
                &"0".to_owned(),
            ])
            .set(1);
        self.for_encoder(model)
    }

    /// The series of one engine that has no KV cache.
    pub fn for_encoder(&self, model: &str) -> ModelMetrics {
        let labels = [model, "0"];
        let metrics = ModelMetrics {
            model: model.to_owned(),
            usage: self.gauges.with_label_values(&labels),
            running: self.running.with_label_values(&labels),
            waiting: self.waiting.with_label_values(&labels),
            waiting_for_room: self.waiting_by_reason.with_label_values(&[model, "0", "capacity"]),
            waiting_for_resume: self.waiting_by_reason.with_label_values(&[model, "0", "deferred"]),
            computed: self.by_source.with_label_values(&[model, "0", "local_compute"]),
            cache_hit: self.by_source.with_label_values(&[model, "0", "local_cache_hit"]),
            stuck: self.stuck.with_label_values(&labels),
            counters: self.counters.map(|c| c.with_label_values(&labels)),
            histograms: self.histograms.map(|h| h.with_label_values(&labels)),
            families: self.clone(),
        };
        // KV blocks never come from elsewhere, and there is nothing to sleep for; dashboards ask all the same.
        self.by_source.with_label_values(&[model, "0", "external_kv_transfer"]);
        for (state, is_so) in [("awake", 1), ("weights_offloaded", 0), ("discard_all", 0)] {
            self.sleep_state.with_label_values(&[model, "0", state]).set(is_so);
        }
        // Series that dashboards rate() must exist before their first event.
        for reason in [FinishReason::Stop, FinishReason::Length, FinishReason::Abort, FinishReason::Error] {
            self.finished.with_label_values(&[model, "0", reason.as_str()]);
        }
        for reason in [Rejection::Requests, Rejection::Tokens] {
            self.rejections.with_label_values(&[model, "0", reason.as_str()]);
        }
        metrics
    }
}

/// How an engine's KV cache is laid out, for `vllm:cache_config_info`.
#[derive(Debug, Clone, Copy)]
pub struct KvInfo {
    pub block_size: u32,
    pub blocks: u32,
    pub prefix_caching: bool,
}

/// The queue limit that a request hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejection {
    Requests,
    Tokens,
}

impl Rejection {
    fn as_str(self) -> &'static str {
        match self {
            Self::Requests => "max_num_queued_reqs",
            Self::Tokens => "max_num_queued_tokens",
        }
    }
}

/// The series of one engine.
pub struct ModelMetrics {
    model: String,
    usage: forebay_observe::metrics::Gauge,
    running: forebay_observe::metrics::IntGauge,
    waiting: forebay_observe::metrics::IntGauge,
    waiting_for_room: forebay_observe::metrics::IntGauge,
    waiting_for_resume: forebay_observe::metrics::IntGauge,
    computed: forebay_observe::metrics::IntCounter,
    cache_hit: forebay_observe::metrics::IntCounter,
    stuck: forebay_observe::metrics::IntCounter,
    counters: Counters<forebay_observe::metrics::IntCounter>,
    histograms: Histograms<forebay_observe::metrics::Histogram>,
    families: EngineMetrics,
}

/// How much an engine has to do, as routers ask for it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EngineLoad {
    pub running: u64,
    pub waiting: u64,
    /// From 0 to 1.
    pub kv_usage: f64,
}

/// The gauges that [`EngineLoad`] is read from.
pub(crate) struct LoadGauges {
    usage: forebay_observe::metrics::Gauge,
    running: forebay_observe::metrics::IntGauge,
    waiting: forebay_observe::metrics::IntGauge,
}

impl LoadGauges {
    pub(crate) fn read(&self) -> EngineLoad {
        let count = |gauge: &forebay_observe::metrics::IntGauge| u64::try_from(gauge.get()).unwrap_or(0);
        EngineLoad {
            running: count(&self.running),
            waiting: count(&self.waiting),
            kv_usage: self.usage.get(),
        }
    }
}

/// What the engine knows after a step.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepRecord {
    pub running: usize,
    pub waiting: usize,
    /// Waiting for the end of a pause.
    pub parked: usize,
    pub kv_usage: f64,
    /// Tokens of this step; 0 for an idle update.
    pub tokens: usize,
    pub sampled_tokens: usize,
    /// Since the last record.
    pub preemptions: u64,
    pub prefix_queries: u64,
    pub prefix_hits: u64,
}

/// Times of one finished sequence, as durations between its milestones; `None` where it did not get that far.
#[derive(Debug, Clone, Copy)]
pub struct RequestRecord {
    pub e2e: Duration,
    pub queue: Option<Duration>,
    pub prefill: Option<Duration>,
    pub decode: Option<Duration>,
    pub prompt_tokens: u32,
    /// Of the prompt; `None` where its first token was not reached.
    pub cached_tokens: Option<u32>,
    pub generation_tokens: u32,
    pub max_tokens: u32,
    /// Choices per prompt: `Some` for one choice of each prompt, so that a request counts once.
    pub n: Option<u32>,
    pub reason: FinishReason,
}

impl ModelMetrics {
    pub(crate) fn stuck_steps(&self) -> forebay_observe::metrics::IntCounter {
        self.stuck.clone()
    }

    pub(crate) fn load_gauges(&self) -> LoadGauges {
        LoadGauges { usage: self.usage.clone(), running: self.running.clone(), waiting: self.waiting.clone() }
    }

    pub fn on_step(&self, step: &StepRecord) {
        self.running.set(step.running as i64);
        self.waiting.set((step.waiting + step.parked) as i64);
        self.waiting_for_room.set(step.waiting as i64);
        self.waiting_for_resume.set(step.parked as i64);
        self.usage.set(step.kv_usage);
        self.counters.preemptions.inc_by(step.preemptions);
        self.counters.prefix_queries.inc_by(step.prefix_queries);
        self.counters.prefix_hits.inc_by(step.prefix_hits);
        self.counters.prompt_tokens_cached.inc_by(step.prefix_hits);
        if step.tokens > 0 {
            self.histograms.iteration.observe(step.tokens as f64);
            self.counters.generation_tokens.inc_by(step.sampled_tokens as u64);
        }
    }

    /// A prompt counts whole, cached or not, when its prefill is done: what vLLM counts, so that cached ÷ all is the
    /// hit rate.
    pub fn on_first_token(&self, since_arrival: Duration, prompt_tokens: u32, cached_tokens: u32) {
        self.cache_hit.inc_by(u64::from(cached_tokens));
        self.computed.inc_by(u64::from(prompt_tokens.saturating_sub(cached_tokens)));
        self.histograms.ttft.observe(since_arrival.as_secs_f64());
        self.counters.prompt_tokens.inc_by(u64::from(prompt_tokens));
    }

    pub fn on_next_token(&self, since_last: Duration) {
        self.histograms.itl.observe(since_last.as_secs_f64());
    }

    pub fn on_rejected(&self, reason: Rejection) {
        self.families.rejections.with_label_values(&[self.model.as_str(), "0", reason.as_str()]).inc();
    }

    pub fn on_finished(&self, request: &RequestRecord) {
        let h = &self.histograms;
        h.e2e.observe(request.e2e.as_secs_f64());
        if let Some(queue) = request.queue {
            h.queue.observe(queue.as_secs_f64());
        }
        // An aborted sequence without a token has no prefill time; a zero would pull the percentiles down.
        if let (Some(prefill), Some(decode)) = (request.prefill, request.decode) {
            h.prefill.observe(prefill.as_secs_f64());
            h.decode.observe(decode.as_secs_f64());
            h.inference.observe((prefill + decode).as_secs_f64());
            if request.generation_tokens > 1 {
                h.tpot.observe(decode.as_secs_f64() / f64::from(request.generation_tokens - 1));
            }
        }
        h.prompt.observe(f64::from(request.prompt_tokens));
        if let Some(cached) = request.cached_tokens {
            h.prefill_computed.observe(f64::from(request.prompt_tokens.saturating_sub(cached)));
        }
        h.generation.observe(f64::from(request.generation_tokens));
        h.max_tokens.observe(f64::from(request.max_tokens));
        if let Some(n) = request.n {
            h.n.observe(f64::from(n));
        }
        // vLLM's engine stops there, and knows nothing of tools.
        let reason = match request.reason {
            FinishReason::ToolCalls => FinishReason::Stop.as_str(),
            other => other.as_str(),
        };
        self.families.finished.with_label_values(&[self.model.as_str(), "0", reason]).inc();
    }
}

impl<T> Counters<T> {
    fn map<U>(&self, f: impl Fn(&T) -> U) -> Counters<U> {
        Counters {
            prefix_queries: f(&self.prefix_queries),
            prefix_hits: f(&self.prefix_hits),
            preemptions: f(&self.preemptions),
            prompt_tokens: f(&self.prompt_tokens),
            prompt_tokens_cached: f(&self.prompt_tokens_cached),
            generation_tokens: f(&self.generation_tokens),
        }
    }
}

impl<T> Histograms<T> {
    fn map<U>(&self, f: impl Fn(&T) -> U) -> Histograms<U> {
        Histograms {
            ttft: f(&self.ttft),
            itl: f(&self.itl),
            tpot: f(&self.tpot),
            e2e: f(&self.e2e),
            queue: f(&self.queue),
            inference: f(&self.inference),
            prefill: f(&self.prefill),
            decode: f(&self.decode),
            prompt: f(&self.prompt),
            generation: f(&self.generation),
            max_tokens: f(&self.max_tokens),
            n: f(&self.n),
            iteration: f(&self.iteration),
            prefill_computed: f(&self.prefill_computed),
        }
    }
}

/// 1, 2, 5, 10, 20, … up to `max`: vLLM's buckets for token counts.
fn one_two_five(max: u32) -> Vec<f64> {
    let max = f64::from(max);
    let mut buckets = Vec::new();
    let mut decade = 1.0;
    loop {
        for step in [1.0, 2.0, 5.0] {
            if step * decade > max {
                return buckets;
            }
            buckets.push(step * decade);
        }
        decade *= 10.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_vllms() {
        assert_eq!(one_two_five(120), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
    }

    /// vLLM 0.33's own list, `LABELS` left out. What is not here is named with the reason.
    const OF_VLLM: &[(&str, &str, &[&str])] = &[
        ("vllm:num_requests_running", "gauge", &[]),
        ("vllm:num_requests_waiting", "gauge", &[]),
        ("vllm:num_requests_waiting_by_reason", "gauge", &["reason"]),
        ("vllm:kv_cache_usage_perc", "gauge", &[]),
        ("vllm:engine_sleep_state", "gauge", &["sleep_state"]),
        ("vllm:prefix_cache_queries_total", "counter", &[]),
        ("vllm:prefix_cache_hits_total", "counter", &[]),
        ("vllm:num_preemptions_total", "counter", &[]),
        ("vllm:prompt_tokens_total", "counter", &[]),
        ("vllm:prompt_tokens_by_source_total", "counter", &["source"]),
        ("vllm:prompt_tokens_cached_total", "counter", &[]),
        ("vllm:generation_tokens_total", "counter", &[]),
        ("vllm:request_success_total", "counter", &["finished_reason"]),
        ("vllm:admission_rejections_total", "counter", &["reason"]),
        ("vllm:time_to_first_token_seconds", "histogram", &[]),
        ("vllm:inter_token_latency_seconds", "histogram", &[]),
        ("vllm:request_time_per_output_token_seconds", "histogram", &[]),
        ("vllm:e2e_request_latency_seconds", "histogram", &[]),
        ("vllm:request_queue_time_seconds", "histogram", &[]),
        ("vllm:request_inference_time_seconds", "histogram", &[]),
        ("vllm:request_prefill_time_seconds", "histogram", &[]),
        ("vllm:request_decode_time_seconds", "histogram", &[]),
        ("vllm:request_prompt_tokens", "histogram", &[]),
        ("vllm:request_generation_tokens", "histogram", &[]),
        ("vllm:request_params_max_tokens", "histogram", &[]),
        ("vllm:request_prefill_kv_computed_tokens", "histogram", &[]),
        ("vllm:iteration_tokens_total", "histogram", &[]),
        ("vllm:request_params_n", "histogram", &[]),
    ];

    /// Names of vLLM's that mean nothing here, or are not counted yet.
    const NOT_HERE: &[(&str, &str)] = &[
        ("vllm:num_requests_kv_fetch_by_stage", "KV blocks are not fetched"),
        ("vllm:lora_requests_info", "there are no adapters"),
        ("vllm:external_prefix_cache_queries_total", "there is no other cache"),
        ("vllm:external_prefix_cache_hits_total", "there is no other cache"),
        ("vllm:mm_cache_queries_total", "models read text only"),
        ("vllm:mm_cache_hits_total", "models read text only"),
        ("vllm:spec_decode_num_drafts_total", "there is no speculative decoding"),
        ("vllm:prompt_tokens_cached_by_source_total", "the one source is the cache of the process"),
        ("vllm:request_max_num_generation_tokens", "not counted yet"),
        ("vllm:request_num_preemptions", "not counted yet"),
        ("vllm:corrupted_requests_total", "optional in vLLM"),
    ];

    #[test]
    fn names_kinds_and_labels_are_vllms() {
        let registry = Registry::new();
        EngineMetrics::register(&registry, 4096).expect("registers once");
        let families = registry.families();
        let ours = |name: &str| families.iter().find(|family| family.name == name);
        for (name, kind, extra) in OF_VLLM {
            let family = ours(name).unwrap_or_else(|| panic!("{name} is missing"));
            assert_eq!(family.kind.to_string(), *kind, "{name}");
            let mut labels: Vec<String> = family.labels.iter().map(ToString::to_string).collect();
            let mut expect: Vec<String> = LABELS.iter().chain(*extra).map(ToString::to_string).collect();
            labels.sort();
            expect.sort();
            assert_eq!(labels, expect, "{name}");
        }
        for (name, why) in NOT_HERE {
            assert!(ours(name).is_none(), "{name} is there: {why}?");
        }
        let unknown = families.iter().filter(|family| family.name.starts_with("vllm:"));
        for family in unknown {
            let known = OF_VLLM.iter().any(|(name, ..)| *name == family.name);
            assert!(known || family.name == "vllm:cache_config_info", "{} is not vLLM's", family.name);
        }
    }

    #[test]
    fn series_exist_before_the_first_request() {
        let registry = Registry::new();
        let metrics = EngineMetrics::register(&registry, 4096).expect("registers once");
        let model = metrics.for_model("m", &KvInfo { block_size: 16, blocks: 9, prefix_caching: true });
        let text = registry.render();
        for line in [
            "vllm:num_requests_running{engine=\"0\",model_name=\"m\"} 0",
            "vllm:request_success_total{engine=\"0\",finished_reason=\"abort\",model_name=\"m\"} 0",
            "vllm:generation_tokens_total{engine=\"0\",model_name=\"m\"} 0",
            "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"m\"} 0",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
        assert!(text.contains("num_gpu_blocks=\"9\""), "{text}");
        model.on_rejected(Rejection::Tokens);
        assert!(registry.render().contains("reason=\"max_num_queued_tokens\"} 1"));
    }
}
