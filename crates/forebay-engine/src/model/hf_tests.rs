//! Directories as Hugging Face's libraries write them: `config.json`, and weights that don't fit to it.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use forebay_kernels::{Isa, Pool};
use proptest::prelude::*;
use serde_json::{Value as Json, json};

use super::*;
use crate::safetensors::{Directory, Dtype, write};

/// A small model of an architecture, with changes; null takes a key away, and `{"null": true}` stands for null.
fn config(architecture: &str, changes: &Json) -> HfConfig {
    let mut all = json!({
        "architectures": [architecture], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 32,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    });
    for (key, value) in changes.as_object().unwrap() {
        match value {
            Json::Null => all.as_object_mut().unwrap().remove(key),
            value if value == &json!({"null": true}) => {
                all.as_object_mut().unwrap().insert(key.clone(), Json::Null)
            }
            value => all.as_object_mut().unwrap().insert(key.clone(), value.clone()),
        };
    }
    HfConfig::parse(all.to_string().as_bytes()).unwrap()
}

fn spec(architecture: &str, changes: Json) -> Result<ModelSpec, SpecError> {
    hf_spec::read(&config(architecture, &changes))
}

#[test]
fn the_spec_of_a_small_model() {
    let spec = spec("LlamaForCausalLM", json!({})).unwrap();
    assert_eq!((spec.family.name, spec.family.rope), ("llama", RopeLayout::HalfSplit));
    assert_eq!((spec.layers, spec.dim, spec.ffn_dim, spec.vocab_size), (2, 64, 96, 32));
    assert_eq!((spec.q_heads, spec.kv_heads, spec.head_dim), (4, 2, 16));
    assert_eq!((spec.context_len, spec.rms_eps, spec.attention_scale), (512, 1e-5, 0.25));
    assert!(!spec.tied_embeddings);
    let gemma =
        self::spec("Gemma3ForCausalLM", json!({"head_dim": null, "query_pre_attn_scalar": 64})).unwrap();
    assert_eq!((gemma.head_dim, gemma.attention_scale, gemma.tied_embeddings), (256, 0.125, true));
    let ties = json!({"tie_word_embeddings": false, "hidden_activation": "gelu_pytorch_tanh"});
    assert!(!self::spec("Gemma3ForCausalLM", ties).unwrap().tied_embeddings);
}

#[test]
fn what_is_wrong_is_named() {
    let check = |changes: Json, expect: &str| {
        assert_eq!(spec("LlamaForCausalLM", changes).unwrap_err().to_string(), expect);
    };
    check(json!({"architectures": null}), "the model file has no `architectures`");
    check(json!({"architectures": []}), "`architectures` is empty; the name of an architecture expected");
    check(
        json!({"architectures": ["MambaForCausalLM"]}),
        "architecture `MambaForCausalLM` is not supported; supported: LlamaForCausalLM, MistralForCausalLM, \
         Qwen2ForCausalLM, Qwen3ForCausalLM, Gemma3ForCausalLM",
    );
    check(json!({"hidden_size": null}), "the model file has no `hidden_size`");
    check(json!({"hidden_size": "64"}), "`hidden_size` is a string; a count expected");
    check(json!({"hidden_size": -64}), "`hidden_size` is an integer; a count expected");
    check(json!({"hidden_size": [64]}), "`hidden_size` is an array; a count expected");
    check(json!({"vocab_size": 0}), "`vocab_size` is 0; 1 to 16777216 expected");
    check(json!({"num_hidden_layers": 5000}), "`num_hidden_layers` is 5000; at most 1024 expected");
    check(json!({"rms_norm_eps": 0}), "`rms_norm_eps` is 0; a number above zero expected");
    check(
        json!({"num_key_value_heads": 3}),
        "the model's sizes contradict each other: 4 query heads do not divide into 3 KV heads",
    );
    check(
        json!({"num_attention_heads": 6, "head_dim": null}),
        "the model's sizes contradict each other: an embedding length of 64 does not divide into 6 heads",
    );
    check(json!({"head_dim": 1024}), "a head of 1024 elements is not supported");
    check(json!({"hidden_act": "relu"}), "the activation `relu` in this architecture is not supported");
    check(
        json!({"quantization_config": {"quant_method": "gptq"}}),
        "a quantisation by `gptq` is not supported",
    );
    check(json!({"use_bidirectional_attention": true}), "attention in both directions is not supported");
    check(
        json!({"attn_logit_softcapping": 50.0}),
        "a soft cap on scores (`attn_logit_softcapping`) is not supported",
    );
    check(
        json!({"rope_scaling": {"type": "yarn", "factor": 4.0}}),
        "rope scaling of type `yarn` is not supported",
    );
    check(
        json!({"rope_scaling": {"type": "linear", "factor": 0.5}}),
        "`rope_scaling.factor` is 0.5; 1 or more expected",
    );
    check(json!({"rope_scaling": {"type": "linear"}}), "the model file has no `rope_scaling.factor`");
    check(json!({"tie_word_embeddings": "no"}), "`tie_word_embeddings` is a string; a boolean expected");
    check(
        json!({"partial_rotary_factor": 0.45}),
        "the model's sizes contradict each other: 7 rotary dimensions in heads of 16",
    );
}

/// Base, linear factor and context.
#[test]
fn rotation_is_read_in_its_older_and_newer_form() {
    let check = |changes: Json, expect: (f32, f32, usize)| {
        let spec = spec("Qwen2ForCausalLM", changes.clone()).unwrap();
        assert_eq!((spec.rope.base, spec.rope.linear_factor, spec.context_len), expect, "{changes}");
        assert_eq!(spec.rope_factors, None);
    };
    check(json!({}), (1e4, 1.0, 512));
    check(json!({"rope_theta": 5e5, "rope_scaling": {"null": true}}), (5e5, 1.0, 512));
    check(json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}), (5e5, 4.0, 2048));
    check(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}), (1e6, 1.0, 512));
    check(
        json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}, "rope_theta": 7.0}),
        (1e6, 2.0, 1024),
    );
    check(json!({"rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0}), (7.0, 1.0, 512));
}

/// Golden: `_compute_llama3_parameters` of transformers 5.19 with Llama 3.2's values, base / scaled frequency.
#[test]
fn llama_3_stretches_long_waves() {
    let changes = json!({
        "head_dim": 64, "max_position_embeddings": 131_072, "rope_theta": 500_000.0,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    });
    let spec = spec("LlamaForCausalLM", changes).unwrap();
    assert_eq!(spec.context_len, 131_072);
    let factors = spec.rope_factors.unwrap();
    let expect = [
        1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.65133, 3.29226, 9.66673,
        32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0,
    ];
    assert_eq!(factors.len(), expect.len());
    for (ours, theirs) in factors.iter().zip(expect) {
        assert!((ours / theirs - 1.0).abs() < 1e-5, "{ours} for {theirs}");
    }
}

/// Each layer as `window@rope base`, `-` for none.
#[test]
fn windows_are_in_the_layers_that_architecture_and_file_say() {
    let check = |architecture: &str, changes: Json, expect: &str| {
        let layers = spec(architecture, changes.clone()).map(|spec| {
            let layer = |layer: &LayerAttention| {
                let window = layer.window.map_or("-".to_owned(), |window| window.to_string());
                format!("{window}@{}", layer.rope.base * layer.rope.linear_factor)
            };
            spec.attention.iter().map(layer).collect::<Vec<_>>().join(" ")
        });
        assert_eq!(layers.unwrap_or_else(|error| error.to_string()), expect, "{architecture} {changes}");
    };
    let none = "-@10000 -@10000";
    check("LlamaForCausalLM", json!({"sliding_window": 9}), none);
    check("MistralForCausalLM", json!({"sliding_window": 9}), "9@10000 9@10000");
    check("MistralForCausalLM", json!({"sliding_window": {"null": true}}), none);
    check("MistralForCausalLM", json!({}), "4096@10000 4096@10000");
    check("Qwen2ForCausalLM", json!({"sliding_window": 9, "use_sliding_window": false}), none);
    check(
        "Qwen2ForCausalLM",
        json!({"sliding_window": 9, "use_sliding_window": true, "max_window_layers": 1}),
        "-@10000 9@10000",
    );
    check(
        "Qwen3ForCausalLM",
        json!({"sliding_window": 9, "use_sliding_window": true, "layer_types": ["sliding_attention", "full_attention"]}),
        "9@10000 -@10000",
    );
    let gemma = |changes| check("Gemma3ForCausalLM", changes, "9@10000 -@1000000");
    gemma(json!({"sliding_window": 9, "sliding_window_pattern": 2}));
    gemma(json!({"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}));
    // Scaling is for the layers that see everything.
    check(
        "Gemma3ForCausalLM",
        json!({"sliding_window": 9, "sliding_window_pattern": 2, "rope_local_base_freq": 7.0,
               "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        "9@7 -@8000000",
    );
    check(
        "Gemma3ForCausalLM",
        json!({"sliding_window": 9, "_sliding_window_pattern": 2, "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 5.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 6.0},
        }}),
        "9@5 -@12",
    );
    check(
        "Gemma3ForCausalLM",
        json!({"layer_types": ["full_attention"]}),
        "the model's sizes contradict each other: `layer_types` has 1 entries for 2 layers",
    );
    check(
        "Gemma3ForCausalLM",
        json!({"layer_types": 1}),
        "`layer_types` is an unsigned integer; a list of names expected",
    );
    check(
        "Gemma3ForCausalLM",
        json!({"layer_types": ["full_attention", "chunked_attention"]}),
        "a layer of type `chunked_attention` is not supported",
    );
}

fn f64() -> Dtype {
    Dtype::from_name("F64").unwrap()
}

/// A value of any kind, with the numbers at which things overflow.
fn any_value() -> impl Strategy<Value = Json> {
    prop_oneof![
        Just(json!({"null": true})),
        any::<bool>().prop_map(Json::from),
        any::<u64>().prop_map(Json::from),
        (0u64..70).prop_map(Json::from),
        any::<i32>().prop_map(Json::from),
        prop::num::f64::NORMAL.prop_map(Json::from),
        prop::sample::select(vec!["silu", "llama3", "linear", "default", "gelu_pytorch_tanh", ""]).prop_map(Json::from),
        prop::sample::select(vec![FULL, SLIDING]).prop_map(|kind| json!([kind, kind])),
        (0.0..1e30f64, 0.0..8.0f64).prop_map(|(factor, low)| {
            let scaling = json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": 4.0,
                                 "original_max_position_embeddings": 64, "rope_theta": factor});
            json!({"rope_type": "linear", "factor": factor, "full_attention": scaling, "sliding_attention": scaling})
        }),
    ]
}

const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";
const KEYS: &[&str] = &[
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "sliding_window",
    "sliding_window_pattern",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "query_pre_attn_scalar",
    "hidden_act",
    "hidden_activation",
    "tie_word_embeddings",
    "rope_local_base_freq",
    "final_logit_softcapping",
    "quantization_config",
    "architectures",
];

proptest! {
    /// Whatever is read has sizes that fit together.
    #[test]
    fn any_config_gives_a_model_or_an_error(
        architecture in prop::sample::select(vec![
            "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM",
        ]),
        changes in prop::collection::vec((prop::sample::select(KEYS), any_value()), 0..4),
    ) {
        let changes: serde_json::Map<String, Json> =
            changes.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        if let Ok(spec) = spec(architecture, Json::Object(changes)) {
            prop_assert_eq!(spec.attention.len(), spec.layers);
            prop_assert!(spec.q_heads % spec.kv_heads == 0 && spec.head_dim <= HEAD_DIM_MAX);
            prop_assert!(spec.rope.dims <= spec.head_dim && spec.rope.dims % 2 == 0);
            prop_assert!((1..=1 << 24).contains(&spec.context_len));
            prop_assert!(spec.attention_scale.is_finite() && spec.attention_scale > 0.0);
            if let Some(factors) = spec.rope_factors {
                prop_assert_eq!(factors.len(), spec.rope.dims / 2);
                prop_assert!(factors.iter().all(|factor| factor.is_finite() && *factor > 0.0));
            }
        }
    }
}

type Tensor = (String, Dtype, Vec<usize>);

/// The tensors of the small model with one layer.
fn tensors() -> Vec<Tensor> {
    let layer =
        |part: &str, shape: &[usize]| (format!("model.layers.0.{part}.weight"), Dtype::BF16, shape.to_vec());
    vec![
        ("model.embed_tokens.weight".to_owned(), Dtype::BF16, vec![32, 64]),
        ("model.norm.weight".to_owned(), Dtype::BF16, vec![64]),
        ("lm_head.weight".to_owned(), Dtype::BF16, vec![32, 64]),
        ("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), f64(), vec![8]),
        layer("input_layernorm", &[64]),
        layer("post_attention_layernorm", &[64]),
        layer("self_attn.q_proj", &[64, 64]),
        layer("self_attn.k_proj", &[32, 64]),
        layer("self_attn.v_proj", &[32, 64]),
        layer("self_attn.o_proj", &[64, 64]),
        layer("mlp.gate_proj", &[96, 64]),
        layer("mlp.up_proj", &[96, 64]),
        layer("mlp.down_proj", &[64, 96]),
    ]
}

fn load(tensors: &[Tensor], changes: &Json) -> Result<Weights, Box<dyn Error>> {
    let mut changes = changes.clone();
    changes["num_hidden_layers"] = json!(1);
    let spec = hf_spec::read(&config("LlamaForCausalLM", &changes))?;
    let data = vec![1; 1 << 16];
    let pending: Vec<write::Pending<'_>> = tensors
        .iter()
        .map(|(name, dtype, shape)| {
            let bytes = shape.iter().product::<usize>() * dtype.bytes();
            (name.as_str(), *dtype, &shape[..], &data[..bytes])
        })
        .collect();
    let weights = Directory::from_bytes(write::file(&pending))?;
    let file = Arc::new(ModelFile::from_hf(Path::new("."), weights, spec)?);
    let spec = file.spec()?;
    Ok(Weights::load(&file, &spec, &Shard::whole(&spec), Isa::detect(), &Pool::new(1))?)
}

#[test]
fn a_tensor_that_is_wrong_or_unknown_is_named_as_in_the_file() {
    let check = |change: &dyn Fn(&mut Vec<Tensor>), expect: &str| {
        let mut tensors = tensors();
        change(&mut tensors);
        assert_eq!(load(&tensors, &json!({})).err().unwrap().to_string(), expect);
    };
    let weights = load(&tensors(), &json!({})).unwrap();
    // 0x0101 as bf16.
    assert!(weights.output_norm.iter().all(|value| *value == f32::from_bits(0x0101_0000)));
    let tied = json!({"tie_word_embeddings": true});
    assert!(load(&tensors(), &tied).is_ok(), "a copy of the embedding matrix is left alone");

    check(&|all| all.retain(|t| t.0 != "lm_head.weight"), "the model file has no tensor `lm_head.weight`");
    check(
        &|all| all.retain(|t| !t.0.contains("k_proj")),
        "the model file has no tensor `model.layers.0.self_attn.k_proj.weight`",
    );
    check(
        &|all| all[4].2 = vec![65],
        "tensor `model.layers.0.input_layernorm.weight` has the shape [65]; [64] expected",
    );
    check(
        &|all| all[7].2 = vec![64, 32],
        "tensor `model.layers.0.self_attn.k_proj.weight` has the shape [32, 64]; [64, 32] expected",
    );
    check(
        &|all| all[6].1 = f64(),
        "tensor `model.layers.0.self_attn.q_proj.weight` is stored as F64, which is not supported; F32, F16 and BF16 are",
    );
    check(&|all| all[1].2 = vec![], "tensor `model.norm.weight` is a single number, which no model has");
    check(
        &|all| all.push(("model.layers.0.self_attn.o_proj.bias".to_owned(), Dtype::F32, vec![64])),
        "tensor `model.layers.0.self_attn.o_proj.bias` has no place in this architecture as it is supported here",
    );
    check(
        &|all| all.push(("model.layers.1.mlp.up_proj.weight".to_owned(), Dtype::F32, vec![96, 64])),
        "tensor `model.layers.1.mlp.up_proj.weight` has no place in this architecture as it is supported here",
    );
    check(
        &|all| all.push(("vision_tower.weight".to_owned(), Dtype::F32, vec![4])),
        "tensor `vision_tower.weight` has no place in this architecture as it is supported here",
    );
}
