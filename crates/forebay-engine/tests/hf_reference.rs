//! The forward pass against Hugging Face transformers, on a tiny random Llama (`fixtures/make_tiny_llama.py`).

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

#[test]
fn logits_are_those_of_transformers() {
    let model = include_bytes!("fixtures/tiny-llama.gguf.bin");
    let model = Arc::new(ModelFile::from_bytes(model.to_vec()).unwrap());
    let prompts: Vec<Prompt> = serde_json::from_str(include_str!("fixtures/tiny-llama.json")).unwrap();
    for isa in supported_isas() {
        let mut driver = Driver::new(&model, isa, 1, 16, (0..4).collect());
        for prompt in &prompts {
            let ours = driver.logits_at(&prompt.tokens, &prompt.at);
            let error = largest_difference(&ours, &prompt.logits_f16_kv);
            assert!(error < 1e-4, "{isa}: {error} from the reference with f16 K and V");
            // The reference's own two runs differ by 0.018.
            let error = largest_difference(&ours, &prompt.logits);
            assert!(error < 0.03, "{isa}: {error} from the reference in f32");
        }
    }
}
