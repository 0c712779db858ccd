//! A real model: Gemma 3 270M, Q4_K_M. Skipped unless `FOREBAY_TEST_GEMMA` is the path of its GGUF file.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr, reason = "a test")]

use std::path::Path;
use std::sync::Arc;

use driver::Driver;
use forebay_engine::model::{ModelFile, ModelSpec};
use forebay_kernels::Isa;

mod driver;

fn model() -> Option<Arc<ModelFile>> {
    let Some(path) = std::env::var_os("FOREBAY_TEST_GEMMA") else {
        eprintln!("skipped: FOREBAY_TEST_GEMMA is not set");
        return None;
    };
    Some(Arc::new(ModelFile::open(Path::new(&path)).unwrap()))
}

#[test]
fn the_metadata_says_what_the_model_is() {
    let Some(model) = model() else { return };
    let spec = ModelSpec::from_gguf(model.gguf()).unwrap();
    assert_eq!((spec.layers, spec.dim, spec.ffn_dim, spec.vocab_size), (18, 640, 2048, 262_144));
    assert_eq!((spec.q_heads, spec.kv_heads, spec.head_dim), (4, 1, 256));
    assert_eq!(spec.attention_scale, 1.0 / 16.0);
    for (nth, layer) in spec.attention.iter().enumerate() {
        let expect = if [5, 11, 17].contains(&nth) { (None, 1e6) } else { (Some(512), 1e4) };
        assert_eq!((layer.window, layer.rope.base), expect, "layer {nth}");
    }
}

/// The base model would rather say that the capital of France is "the capital of ..."; so does llama.cpp.
#[test]
fn greedy_continuations_are_those_of_llama_cpp() {
    let Some(model) = model() else { return };
    let mut driver = Driver::new(&model, Isa::detect(), 2, 16, (0..12).collect());
    let mut check = |prompt: &[u32], expect: &[u32]| {
        let (tokens, _) = driver.generate(prompt, expect.len());
        assert_eq!(tokens, expect);
    };
    let capital = [2, 818, 5279, 529, 7001, 563];
    check(&capital, &[506, 5279, 529]);
    // "... the city of" -> " Paris."
    check(&[&capital[..], &[506, 3207, 529]].concat(), &[9079, 236761]);
    // "Monday, Tuesday, Wednesday," -> " Thursday, Friday, Saturday"
    check(&[2, 49381, 236764, 9863, 236764, 10119, 236764], &[9853, 236764, 7672, 236764, 8224]);
}
