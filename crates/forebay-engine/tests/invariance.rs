//! The same tokens give the same bits: alone or in a batch, in one chunk or many, in any blocks, on any number of
//! threads. Prefix caching, preemption and batching are only invisible to clients if this holds.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;

use driver::together::{Expected, bits, check_together, expected, prompt};
use driver::{Driver, supported_isas};
use forebay_engine::gguf::ElementType;
use forebay_engine::model::ModelFile;
use forebay_engine::model::tiny::TinyLlama;
use forebay_kernels::Isa;
use proptest::prelude::*;

use crate::driver::together::BLOCKS;

mod driver;

/// An f32 model, quantised ones (as SmolLM2's file is mixed: Q4_1 layers, a Q8_0 embedding and head), one with a sliding
/// window in every second layer, and between them every type of element that is read.
fn models() -> Vec<Arc<ModelFile>> {
    let quantised = TinyLlama { head_dim: 32, ffn_dim: 192, seed: 2, ..TinyLlama::default() };
    let tiny = [
        TinyLlama::default(),
        TinyLlama { weights: ElementType::Q4_1, embeddings: ElementType::Q8_0, ..quantised.clone() },
        TinyLlama {
            weights: ElementType::Q4_0,
            embeddings: ElementType::Q4_0,
            kv_heads: 4,
            ..quantised.clone()
        },
        TinyLlama {
            weights: ElementType::Q8_0,
            layers: 3,
            kv_heads: 1,
            window: Some(50),
            ..quantised.clone()
        },
        TinyLlama { weights: ElementType::Q5_1, embeddings: ElementType::Q5_0, ..quantised.clone() },
        TinyLlama { weights: ElementType::BF16, embeddings: ElementType::F16, ..TinyLlama::default() },
        TinyLlama {
            weights: ElementType::Q4_K,
            embeddings: ElementType::Q6_K,
            ..in_blocks_of_256(&quantised)
        },
        TinyLlama {
            weights: ElementType::Q5_K,
            embeddings: ElementType::Q6_K,
            ..in_blocks_of_256(&quantised)
        },
    ];
    tiny.iter().map(|t| Arc::new(ModelFile::from_bytes(t.to_gguf()).unwrap())).collect()
}

/// Every row is made of whole blocks of a K-quant.
fn in_blocks_of_256(tiny: &TinyLlama) -> TinyLlama {
    TinyLlama { q_heads: 8, ffn_dim: 256, layers: 1, ..tiny.clone() }
}

#[test]
fn a_batch_gives_every_sequence_what_it_gets_alone() {
    for model in models() {
        for isa in supported_isas() {
            let all: Vec<Expected> = [1, 5, 33, 64, 17, 2, 100]
                .into_iter()
                .enumerate()
                .map(|(nth, len)| expected(&model, isa, prompt(len, nth as u32), 4))
                .collect();
            for threads in [1, 2] {
                // Every other block, from the end: nothing stands where the reference had it.
                let order = (0..BLOCKS).map(|b| b * 37 % BLOCKS).collect();
                let mut driver = Driver::new(&model, isa, threads, 16, order);
                check_together(&mut driver, &all, &[usize::MAX], &[0; 7], &[]);
            }
        }
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    for model in models() {
        let all = supported_isas().map(|isa| expected(&model, isa, prompt(300, 9), 2)).collect::<Vec<_>>();
        for other in &all[1..] {
            assert_eq!(other.tokens, all[0].tokens);
            assert!(other.logits.iter().zip(&all[0].logits).all(|(a, b)| bits(a) == bits(b)));
        }
    }
}

/// Beyond 256 tokens attention works in several segments.
#[test]
fn a_long_prompt_gives_the_same_in_any_chunks_and_block_sizes() {
    for model in models() {
        for isa in supported_isas() {
            let all = [expected(&model, isa, prompt(700, 3), 3)];
            for (threads, block_size, chunk) in [(2, 16, 700), (1, 16, 256), (2, 32, 100), (1, 48, 33)] {
                let blocks = 704 / block_size as u32 + 1;
                let mut driver = Driver::new(&model, isa, threads, block_size, (0..blocks).collect());
                check_together(&mut driver, &all, &[chunk], &[0], &[]);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn random_arrivals_chunks_and_blocks(
        which in 0usize..4,
        lens in prop::collection::vec(1usize..90, 1..7),
        chunks in prop::collection::vec(1usize..50, 1..6),
        arrivals in prop::collection::vec(0usize..6, 7),
        preempted in prop::collection::vec((0usize..12, 0usize..7), 0..3),
        order in Just((0..BLOCKS).collect::<Vec<u32>>()).prop_shuffle(),
        threads in 1usize..3,
    ) {
        let model = &models()[which];
        let isa = Isa::detect();
        let all: Vec<Expected> =
            lens.iter().enumerate().map(|(nth, &len)| expected(model, isa, prompt(len, nth as u32), 3)).collect();
        let mut driver = Driver::new(model, isa, threads, 16, order);
        check_together(&mut driver, &all, &chunks, &arrivals[..all.len()], &preempted);
    }
}
