//! A model that is divided among ranks gives the same bits as in one: along its matrices and heads (tensor parallelism),
//! along its layers (pipeline parallelism), and both.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test")]

use std::path::Path;
use std::sync::Arc;

use driver::Driver;
use driver::together::{BLOCKS, Expected, bits, check_together, expected, prompt};
use forebay_engine::gguf::ElementType;
use forebay_engine::model::tiny::TinyLlama;
use forebay_engine::model::{ModelFile, Ranks};
use forebay_kernels::Isa;
use proptest::prelude::*;

mod driver;

/// Llama, Qwen 2 (biases, a head of its own) and 3 (head norms, heads wider than the residual stream), Gemma 3 (windows,
/// post norms): 4 query heads and 2 KV heads each, the MLPs' widths no multiple of 32. Then quantised ones, one of
/// which has widths that do not divide into equal parts.
fn models() -> Vec<Arc<ModelFile>> {
    let fixtures: [&[u8]; 4] = [
        include_bytes!("fixtures/tiny-llama.gguf.bin"),
        include_bytes!("fixtures/tiny-qwen2.gguf.bin"),
        include_bytes!("fixtures/tiny-qwen3.gguf.bin"),
        include_bytes!("fixtures/tiny-gemma3.gguf.bin"),
    ];
    let quantised = TinyLlama { head_dim: 32, ffn_dim: 192, seed: 2, ..TinyLlama::default() };
    let tiny = [
        TinyLlama {
            weights: ElementType::Q4_1,
            embeddings: ElementType::Q8_0,
            layers: 5,
            ..quantised.clone()
        },
        TinyLlama {
            weights: ElementType::Q8_0,
            layers: 3,
            q_heads: 6,
            kv_heads: 3,
            vocab_size: 97,
            window: Some(50),
            ..quantised
        },
        TinyLlama { ffn_dim: 163, vocab_size: 101, q_heads: 3, kv_heads: 3, ..TinyLlama::default() },
    ];
    let tiny = tiny.iter().map(TinyLlama::to_gguf);
    fixtures
        .into_iter()
        .map(<[u8]>::to_vec)
        .chain(tiny)
        .map(|bytes| Arc::new(ModelFile::from_bytes(bytes).unwrap()))
        .collect()
}

/// Divisions that the model allows.
fn divisions(model: &ModelFile) -> Vec<Ranks> {
    let spec = model.spec().unwrap();
    let all = (1..=4).flat_map(|tensor| (1..=3).map(move |pipeline| Ranks { tensor, pipeline }));
    all.filter(|ranks| *ranks != Ranks::ONE && ranks.check(&spec).is_ok()).collect()
}

/// What sequences of these lengths give in one rank.
fn alone(model: &Arc<ModelFile>, lens: &[usize]) -> Vec<Expected> {
    let vocab = model.spec().unwrap().vocab_size as u32;
    let prompt = |nth, len| prompt(len, nth).into_iter().map(|id| id % vocab).collect();
    let lens = lens.iter().zip(0..);
    lens.map(|(&len, nth)| expected(model, Isa::detect(), prompt(nth, len), 3)).collect()
}

#[test]
fn every_division_gives_the_bits_of_one_rank() {
    let mut tried = Vec::new();
    for model in models() {
        let all = alone(&model, &[1, 5, 33, 64, 17, 300]);
        for ranks in divisions(&model) {
            let order = (0..BLOCKS).map(|b| b * 37 % BLOCKS).collect();
            let mut driver = Driver::ranked(&model, ranks, Isa::detect(), 2, 16, order);
            check_together(&mut driver, &all, &[40, 7, 200], &[0, 0, 1, 2, 3, 3], &[(4, 5), (6, 2)]);
            tried.push((ranks.tensor, ranks.pipeline));
        }
    }
    tried.sort_unstable();
    tried.dedup();
    let expect = [(1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3), (4, 1), (4, 2), (4, 3)];
    assert_eq!(tried, expect);
}

#[test]
fn a_pass_without_logits_and_one_with_all_of_them() {
    for model in models() {
        let tokens: Vec<u32> = (0..40).map(|i| i * 7 % 90).collect();
        let every: Vec<u32> = (0..40).collect();
        let logits = |ranks| {
            let mut driver = Driver::ranked(&model, ranks, Isa::detect(), 1, 16, (0..8).collect());
            assert!(driver.logits_at(&tokens, &[]).is_empty());
            driver.logits_at(&tokens, &every)
        };
        let one = logits(Ranks::ONE);
        for ranks in divisions(&model) {
            let found = logits(ranks);
            assert_eq!(found.len(), 40);
            assert!(found.iter().zip(&one).all(|(a, b)| bits(a) == bits(b)), "{ranks:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]
    #[test]
    fn random_divisions_arrivals_chunks_and_preemptions(
        model in 0usize..7,
        division in any::<prop::sample::Index>(),
        lens in prop::collection::vec(1usize..90, 1..6),
        chunks in prop::collection::vec(1usize..50, 1..6),
        arrivals in prop::collection::vec(0usize..6, 6),
        preempted in prop::collection::vec((0usize..12, 0usize..6), 0..4),
        order in Just((0..BLOCKS).collect::<Vec<u32>>()).prop_shuffle(),
        threads in 1usize..4,
    ) {
        let model = &models()[model];
        let all = alone(model, &lens);
        let ranks = *division.get(&divisions(model));
        let mut driver = Driver::ranked(model, ranks, Isa::detect(), threads, 16, order);
        check_together(&mut driver, &all, &chunks, &arrivals[..all.len()], &preempted);
    }
}

/// SmolLM2-135M-Instruct: 9 query heads, 3 KV heads, 30 layers. Skipped unless `FOREBAY_TEST_MODEL` is its path.
#[test]
fn a_real_model_gives_the_bits_of_one_rank() {
    let Some(path) = std::env::var_os("FOREBAY_TEST_MODEL") else {
        eprintln!("skipped: FOREBAY_TEST_MODEL is not set");
        return;
    };
    let model = Arc::new(ModelFile::open(Path::new(&path)).unwrap());
    // "The capital of France is", by llama-tokenize.
    let all = [expected(&model, Isa::detect(), vec![504, 3575, 282, 4649, 314], 4)];
    assert_eq!(all[0].tokens[..2], [7042, 30], "` Paris` and `.`");
    for (tensor, pipeline) in [(3, 1), (1, 2), (3, 2), (9, 1)] {
        let ranks = Ranks { tensor, pipeline };
        let mut driver = Driver::ranked(&model, ranks, Isa::detect(), 2, 16, (0..BLOCKS).collect());
        check_together(&mut driver, &all, &[4], &[0], &[]);
    }
}
