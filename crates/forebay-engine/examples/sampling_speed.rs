//! Time that choosing one token takes, by size of the vocabulary and parameters.
//!
//! ```text
//! cargo run --release -p forebay-engine --example sampling_speed
//! ```
#![allow(clippy::print_stdout, reason = "a command-line program")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use forebay_engine::sample::Sampler;
use forebay_wire::Sampling;

/// SmolLM2's, and Gemma 3's.
const VOCABULARIES: [usize; 2] = [49_152, 262_144];
/// Rows of logits, as different sequences have them: more than stay in the cache.
const ROWS: usize = 16;
const TURNS: usize = 8;

fn main() {
    let plain = Sampling::default();
    let ways = [
        ("greedy", Sampling { temperature: 0.0, ..plain.clone() }),
        ("temperature 1", plain.clone()),
        ("top_p 0.9", Sampling { top_p: 0.9, ..plain.clone() }),
        ("top_k 40", Sampling { top_k: 40, ..plain.clone() }),
        ("min_p 0.05", Sampling { min_p: 0.05, ..plain.clone() }),
        ("frequency_penalty 0.5", Sampling { frequency_penalty: 0.5, ..plain }),
    ];
    println!("{:>10}  {:<24}{:>12}", "vocabulary", "parameters", "µs per row");
    for vocabulary in VOCABULARIES {
        let rows: Vec<Vec<f32>> = (0..ROWS).map(|row| logits(vocabulary, row as u64 + 1)).collect();
        for (name, params) in &ways {
            let mut samplers: Vec<Sampler> =
                (0..ROWS).map(|row| Sampler::new(params.clone(), row as u64, &[])).collect();
            let mut turn = || -> Duration {
                let begin = Instant::now();
                for (row, sampler) in rows.iter().zip(&mut samplers) {
                    black_box(sampler.choose(row, &[], None, None));
                }
                begin.elapsed()
            };
            turn();
            let best = (0..TURNS).map(|_| turn()).min().unwrap_or_default();
            let per_row = best.as_secs_f64() * 1e6 / ROWS as f64;
            println!("{vocabulary:>10}  {name:<24}{per_row:>12.1}");
        }
    }
}

/// A bell, and some tokens that stand out of it by up to 16: a few hundred share nine tenths of the probability.
fn logits(vocabulary: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let mut logits: Vec<f32> =
        (0..vocabulary).map(|_| 4.0 * (next() + next() + next() + next() - 2.0)).collect();
    for _ in 0..200 {
        let token = (next() * vocabulary as f32) as usize % vocabulary;
        logits[token] += 16.0 * next();
    }
    logits
}
