use std::sync::Arc;

use forebay_kernels::{Isa, Pool};

use super::tiny::TinyLlama;
use super::*;
use crate::gguf::write::Writer;
use crate::gguf::{ElementType, Gguf, List, Value};

fn spec(file: &Writer) -> Result<ModelSpec, SpecError> {
    ModelSpec::from_gguf(&Gguf::parse(&file.finish()).unwrap())
}

#[test]
fn the_spec_of_a_tiny_model() {
    let spec = spec(&TinyLlama::default().writer()).unwrap();
    assert_eq!(spec.family.name, "llama");
    assert_eq!((spec.layers, spec.dim, spec.ffn_dim, spec.vocab_size), (2, 64, 160, 256));
    assert_eq!((spec.q_heads, spec.kv_heads, spec.head_dim, spec.qkv_dim()), (4, 2, 16, 128));
    assert_eq!(spec.rope, Rope { layout: RopeLayout::Interleaved, dims: 16, base: 1e4, linear_factor: 1.0 });
    assert!(spec.tied_embeddings);
    assert_eq!(spec.context_len, 1024);
}

#[test]
fn kv_memory_is_counted_in_whole_blocks() {
    let spec = spec(&TinyLlama::default().writer()).unwrap();
    // K and V, 2 layers, 2 heads of 16, 2 bytes each.
    assert_eq!(spec.kv_bytes_per_token(), 256);
    assert_eq!(spec.blocks_for_memory(256 * 16 * 10, 16), 10);
    assert_eq!(spec.blocks_for_memory(256 * 16 * 10 - 1, 16), 9);
    assert_eq!(spec.blocks_for_memory(0, 16), 0);
    assert_eq!(spec.memory_for_blocks(10, 16), 256 * 16 * 10);
}

/// The metadata of a model: `llama.` keys and values, and a `token_embd.weight` of 8 rows.
fn check(entries: &[(&str, Value)], expect: &str) {
    let uint = |v| Value::Uint(v);
    let mut all = vec![
        ("general.architecture", Value::Text("llama".into())),
        ("llama.block_count", uint(1)),
        ("llama.context_length", uint(64)),
        ("llama.embedding_length", uint(64)),
        ("llama.feed_forward_length", uint(64)),
        ("llama.attention.head_count", uint(4)),
        ("llama.attention.layer_norm_rms_epsilon", Value::Float(1e-5)),
    ];
    for (key, value) in entries {
        all.retain(|(there, _)| there != key);
        // An empty list stands for "take it away".
        if *value != Value::List(List::Uints(vec![])) {
            all.push((key, value.clone()));
        }
    }
    let mut file = Writer::new();
    all.iter().for_each(|(key, value)| {
        file.put(key, value);
    });
    file.tensor_f32("token_embd.weight", &[64, 8], &[0.0; 512]);
    match spec(&file) {
        Ok(spec) => assert_eq!(format!("{:?}", (spec.kv_heads, spec.head_dim, &spec.rope)), expect),
        Err(error) => assert_eq!(error.to_string(), expect),
    }
}

#[test]
fn metadata_is_checked_and_what_is_wrong_is_named() {
    let none = || Value::List(List::Uints(vec![]));
    let text = |v: &str| Value::Text(v.into());
    check(&[], "(4, 16, Rope { layout: Interleaved, dims: 16, base: 10000.0, linear_factor: 1.0 })");
    check(
        &[
            ("llama.attention.head_count_kv", Value::Uint(2)),
            ("llama.attention.key_length", Value::Int(32)),
            ("llama.rope.scaling.type", text("linear")),
            ("llama.rope.scaling.factor", Value::Float(4.0)),
        ],
        "(2, 32, Rope { layout: Interleaved, dims: 32, base: 10000.0, linear_factor: 4.0 })",
    );
    check(&[("general.architecture", none())], "the model file has no `general.architecture`");
    check(&[("llama.block_count", Value::Uint(1025))], "`llama.block_count` is 1025; at most 1024 expected");
    check(
        &[("general.architecture", text("mamba"))],
        "architecture `mamba` is not supported; supported: llama, qwen2, qwen3, gemma3",
    );
    check(&[("llama.block_count", none())], "the model file has no `llama.block_count`");
    check(&[("llama.block_count", text("2"))], "`llama.block_count` is a string; a count expected");
    check(&[("llama.block_count", Value::Uint(0))], "`llama.block_count` is 0; 1 to 16777216 expected");
    check(
        &[("llama.embedding_length", Value::Uint(1 << 40))],
        "`llama.embedding_length` is 1099511627776; 1 to 16777216 expected",
    );
    check(
        &[("llama.attention.layer_norm_rms_epsilon", Value::Float(-1.0))],
        "`llama.attention.layer_norm_rms_epsilon` is -1; a number above zero expected",
    );
    check(
        &[("llama.attention.head_count", Value::Uint(3))],
        "the model's sizes contradict each other: an embedding length of 64 does not divide into 3 heads",
    );
    check(
        &[("llama.attention.head_count_kv", Value::Uint(3))],
        "the model's sizes contradict each other: 4 query heads do not divide into 3 KV heads",
    );
    check(
        &[("llama.rope.dimension_count", Value::Uint(18))],
        "the model's sizes contradict each other: 18 rotary dimensions in heads of 16",
    );
    check(&[("llama.rope.scaling.type", text("yarn"))], "rope scaling of type `yarn` is not supported");
    check(&[("llama.expert_count", Value::Uint(8))], "a mixture of 8 experts is not supported");
    check(
        &[("llama.attention.value_length", Value::Uint(8))],
        "a value length (8) other than the key length (16) is not supported",
    );
}

/// Each layer of a model of `family` as `window@rope base`, `-` for none.
fn check_layers(family: &str, layers: u64, entries: &[(&str, Value)], expect: Result<&str, &str>) {
    let mut file = Writer::new();
    file.put("general.architecture", &Value::Text(family.to_owned()));
    let mut put = |key: &str, value: &Value| {
        file.put(&format!("{family}.{key}"), value);
    };
    put("block_count", &Value::Uint(layers));
    for key in ["context_length", "embedding_length", "feed_forward_length"] {
        put(key, &Value::Uint(64));
    }
    put("attention.head_count", &Value::Uint(4));
    put("attention.layer_norm_rms_epsilon", &Value::Float(1e-5));
    put("rope.freq_base", &Value::Float(1e6));
    entries.iter().for_each(|(key, value)| put(key, value));
    file.tensor_f32("token_embd.weight", &[64, 8], &[0.0; 512]);
    let layers = spec(&file).map(|spec| {
        let layer = |layer: &LayerAttention| {
            let window = layer.window.map_or("-".to_owned(), |window| window.to_string());
            format!("{window}@{}", layer.rope.base * layer.rope.linear_factor)
        };
        spec.attention.iter().map(layer).collect::<Vec<_>>().join(" ")
    });
    let expect = expect.map(str::to_owned).map_err(str::to_owned);
    assert_eq!(layers.map_err(|error| error.to_string()), expect, "{family} {entries:?}");
}

#[test]
fn windows_are_in_the_layers_that_family_and_file_say() {
    let window = || ("attention.sliding_window", Value::Int(5));
    let pattern = |list| ("attention.sliding_window_pattern", Value::List(list));
    let all = Ok("-@1000000 -@1000000");
    check_layers("llama", 2, &[], all);
    check_layers("llama", 2, &[("attention.sliding_window", Value::Uint(0))], all);
    check_layers("llama", 2, &[window()], Ok("5@1000000 5@1000000"));
    check_layers("qwen2", 2, &[window()], all);
    check_layers("gemma3", 2, &[], all);
    let seven = "5@10000 5@10000 5@10000 5@10000 5@10000 -@1000000 5@10000";
    check_layers("gemma3", 7, &[window()], Ok(seven));
    check_layers(
        "gemma3",
        3,
        &[
            window(),
            ("attention.sliding_window_pattern", Value::Uint(2)),
            ("rope.freq_base_swa", Value::Float(7.0)),
        ],
        Ok("5@7 -@1000000 5@7"),
    );
    check_layers("gemma3", 2, &[window(), pattern(List::Bools(vec![false, true]))], Ok("-@1000000 5@10000"));
    check_layers("gemma3", 2, &[window(), pattern(List::Ints(vec![1, 0]))], Ok("5@10000 -@1000000"));
    // Scaling is for the layers that see everything.
    check_layers("gemma3", 6, &[window(), ("rope.scaling.factor", Value::Float(8.0))], {
        Ok("5@10000 5@10000 5@10000 5@10000 5@10000 -@8000000")
    });
    check_layers(
        "gemma3",
        2,
        &[window(), pattern(List::Bools(vec![true]))],
        Err(
            "the model's sizes contradict each other: `gemma3.attention.sliding_window_pattern` has 1 entries for 2 layers",
        ),
    );
    check_layers(
        "gemma3",
        2,
        &[("final_logit_softcapping", Value::Float(30.0))],
        Err("a soft cap on logits (`gemma3.final_logit_softcapping`) is not supported"),
    );
}

fn load(file: &Writer) -> Result<Weights, WeightsError> {
    let file = Arc::new(ModelFile::from_bytes(file.finish()).unwrap());
    let spec = file.spec().unwrap();
    Weights::load(&file, &spec, &Shard::whole(&spec), Isa::detect(), &Pool::new(1))
}

#[test]
fn weights_are_packed_and_looked_up() {
    let tiny = TinyLlama { embeddings: ElementType::Q8_0, ..TinyLlama::default() };
    let weights = load(&tiny.writer()).unwrap();
    assert_eq!(weights.layers.len(), 2);
    assert_eq!((weights.layers[0].qkv.rows(), weights.layers[0].qkv.cols()), (128, 64));
    assert_eq!((weights.layers[1].gate_up.rows(), weights.layers[1].down.cols()), (320, 160));
    let head = weights.head.as_ref().unwrap();
    assert_eq!((head.rows(), head.cols()), (256, 64));
    let mut row = vec![0.0; 64];
    weights.embeddings.lookup(255, &mut row);
    assert!(row.iter().all(|v| v.is_finite() && v.abs() < 1.0) && row.iter().any(|v| *v != 0.0));
}

#[test]
fn shards_have_all_weights_together_and_look_at_every_tensor() {
    let tiny = TinyLlama { weights: ElementType::Q8_0, head_dim: 32, ffn_dim: 192, ..TinyLlama::default() };
    let check = |file: &Writer, ranks: Ranks| {
        let file = Arc::new(ModelFile::from_bytes(file.finish()).unwrap());
        let spec = file.spec().unwrap();
        let load = |stage, nth| {
            Weights::load(&file, &spec, &ranks.shard(&spec, stage, nth), Isa::detect(), &Pool::new(1))
        };
        let all: Result<Vec<_>, _> = (0..ranks.pipeline)
            .flat_map(|s| (0..ranks.tensor).map(move |t| (s, t)))
            .map(|(s, t)| load(s, t))
            .collect();
        all.map(|all| all.iter().map(Weights::bytes).sum::<usize>())
    };
    let whole = check(&tiny.writer(), Ranks::ONE).unwrap();
    for (tensor, pipeline) in [(1, 2), (2, 1), (2, 2)] {
        let ranks = Ranks { tensor, pipeline };
        // Tiles of 32 rows divide these widths.
        assert_eq!(check(&tiny.writer(), ranks).unwrap(), whole, "{ranks:?}");
        for layer in 0..3 {
            let mut file = tiny.writer();
            file.tensor_f32(&format!("blk.{layer}.attn_output.bias"), &[128], &[0.0; 128]);
            let error = check(&file, ranks).unwrap_err();
            assert!(matches!(error, WeightsError::Unexpected { .. }), "{error}");
        }
    }
}

#[test]
fn a_tensor_that_is_wrong_or_unknown_is_named() {
    fn check(change: impl FnOnce(&mut Writer), expect: &str) {
        let mut file = TinyLlama { layers: 1, ..TinyLlama::default() }.writer();
        change(&mut file);
        assert_eq!(load(&file).err().unwrap().to_string(), expect);
    }
    check(
        |file| {
            file.tensor_f32("blk.0.attn_output.bias", &[64], &[0.0; 64]);
        },
        "tensor `blk.0.attn_output.bias` has no place in this architecture as it is supported here",
    );
    check(
        |file| {
            file.tensor_f32("blk.0.attn_q.bias", &[64], &[0.0; 64]);
        },
        "the model file has no tensor `blk.0.attn_k.bias`",
    );
    check(
        |file| {
            file.tensor_f32("output.weight", &[64, 255], &[0.0; 64 * 255]);
        },
        "tensor `output.weight` has the shape [64, 255]; [64, 256] expected",
    );
    check(
        |file| {
            file.tensor(
                "output.weight",
                &[64, 256],
                ElementType::from_ggml(28).unwrap(),
                vec![0; 64 * 256 * 8],
            );
        },
        "tensor `output.weight` is stored as F64, which is not supported",
    );
    check(
        |file| {
            file.tensor("blk.0.attn_q.bias", &[64], ElementType::Q8_0, vec![0; 68]);
        },
        "tensor `blk.0.attn_q.bias` is stored as Q8_0, which is not supported there; F32, F16 or BF16 expected",
    );
    let gemma = TinyLlama { layers: 1, window: Some(4), ..TinyLlama::default() }.writer();
    assert!(load(&gemma).unwrap().layers[0].post_norms.is_some());
    check(
        |file| {
            file.tensor_f32("blk.0.post_ffw_norm.weight", &[64], &[1.0; 64]);
        },
        "tensor `blk.0.post_ffw_norm.weight` has no place in this architecture as it is supported here",
    );
    let mut without_layer = TinyLlama { layers: 1, ..TinyLlama::default() }.writer();
    without_layer.put_u32("other.key", 1);
    assert!(load(&without_layer).is_ok(), "unknown metadata is no fault");
}
