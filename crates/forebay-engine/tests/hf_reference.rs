//! The forward pass against Hugging Face transformers, on tiny random models (`fixtures/make_tiny_models.py`), each as
//! a GGUF file and as a directory of safetensors.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::Path;
use std::sync::Arc;

use driver::{Driver, supported_isas};
use forebay_engine::model::ModelFile;

mod driver;

#[derive(serde::Deserialize)]
struct Prompt {
    tokens: Vec<u32>,
    at: Vec<u32>,
    /// `[at, vocab]`, everything in f32.
    logits: Vec<Vec<f32>>,
    /// `[at, vocab]`, with K and V rounded to f16, as our blocks hold them.
    logits_f16_kv: Vec<Vec<f32>>,
}

fn largest_difference(ours: &[Vec<f32>], theirs: &[Vec<f32>]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let pairs = ours.iter().flatten().zip(theirs.iter().flatten());
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// How far logits may be from the reference with f16 K and V, and from the one in f32.
struct Within {
    f16_kv: f32,
    f32: f32,
}

/// One element of K or V that rounds to its other neighbour makes up to 2.4e-4. The reference's own two runs differ by up
/// to 0.006.
const FLOAT: Within = Within { f16_kv: 3e-4, f32: 0.01 };
/// An activation that rounds to its other neighbour in bf16 makes eight times as much, and one follows from the other: the
/// reference's own two runs differ by up to 0.04. Ours is 0.0074 away; without rounding them it would be 0.022.
const BF16: Within = Within { f16_kv: 0.012, f32: 0.06 };

fn check_gguf(model: &[u8], prompts: &str) {
    check(ModelFile::from_bytes(model.to_vec()).unwrap(), prompts, FLOAT);
}

fn check_directory(name: &str, prompts: &str, within: Within) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    check(ModelFile::open(&path).unwrap(), prompts, within);
}

fn check(model: ModelFile, prompts: &str, within: Within) {
    let model = Arc::new(model);
    let prompts: Vec<Prompt> = serde_json::from_str(prompts).unwrap();
    for isa in supported_isas() {
        let mut driver = Driver::new(&model, isa, 1, 16, (0..4).collect());
        for prompt in &prompts {
            let ours = driver.logits_at(&prompt.tokens, &prompt.at);
            let error = largest_difference(&ours, &prompt.logits_f16_kv);
            assert!(error < within.f16_kv, "{isa}: {error} from the reference with f16 K and V");
            let error = largest_difference(&ours, &prompt.logits);
            assert!(error < within.f32, "{isa}: {error} from the reference in f32");
        }
    }
}

#[test]
fn llama() {
    let prompts = include_str!("fixtures/tiny-llama.json");
    check_gguf(include_bytes!("fixtures/tiny-llama.gguf.bin"), prompts);
    check_directory("tiny-llama", prompts, FLOAT);
}

/// Biases on q, k and v, rotation of the halves, a head that is not the embedding matrix.
#[test]
fn qwen2() {
    let prompts = include_str!("fixtures/tiny-qwen2.json");
    check_gguf(include_bytes!("fixtures/tiny-qwen2.gguf.bin"), prompts);
    check_directory("tiny-qwen2", prompts, FLOAT);
}

/// Norms of q and k heads, which together are wider than the residual stream.
#[test]
fn qwen3() {
    let prompts = include_str!("fixtures/tiny-qwen3.json");
    check_gguf(include_bytes!("fixtures/tiny-qwen3.gguf.bin"), prompts);
    check_directory("tiny-qwen3", prompts, FLOAT);
}

/// Layers that see nine tokens with a rotation of their own and one that sees all, norms after attention and MLP, scaled
/// embeddings, GELU.
#[test]
fn gemma3() {
    let prompts = include_str!("fixtures/tiny-gemma3.json");
    check_gguf(include_bytes!("fixtures/tiny-gemma3.gguf.bin"), prompts);
    check_directory("tiny-gemma3", prompts, FLOAT);
}

/// A window in every layer, weights in bf16, keys of its own in `config.json`.
#[test]
fn mistral() {
    check_directory("tiny-mistral", include_str!("fixtures/tiny-mistral.json"), BF16);
}
