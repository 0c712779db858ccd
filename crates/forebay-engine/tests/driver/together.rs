//! Several sequences in one executor, each held to what it gives alone.

use std::sync::Arc;

use forebay_engine::model::ModelFile;
use forebay_kernels::Isa;

use super::{Driver, Sequence, greedy};

pub(crate) const BLOCKS: u32 = 200;

pub(crate) fn prompt(len: usize, seed: u32) -> Vec<u32> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)) >> 7 & 0xff).collect()
}

/// What a sequence gives alone, in one prefill and then token by token, on one thread, in blocks 0, 1, 2, ...
pub(crate) struct Expected {
    pub(crate) prompt: Vec<u32>,
    pub(crate) tokens: Vec<u32>,
    pub(crate) logits: Vec<Vec<f32>>,
}

pub(crate) fn expected(model: &Arc<ModelFile>, isa: Isa, prompt: Vec<u32>, count: usize) -> Expected {
    let mut driver = Driver::new(model, isa, 1, 16, (0..BLOCKS).rev().collect());
    let (tokens, logits) = driver.generate(&prompt, count);
    Expected { prompt, tokens, logits }
}

pub(crate) fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|l| l.to_bits()).collect()
}

/// Runs all sequences together. Each pass gives every sequence its next chunk (sizes from `chunks`, round robin);
/// a sequence joins at the pass that `arrivals` says. Before a pass of `preempted` that sequence, if there is one, loses its
/// blocks and begins anew. Asserts that each gives what is expected of it.
pub(crate) fn check_together(
    driver: &mut Driver,
    all: &[Expected],
    chunks: &[usize],
    arrivals: &[usize],
    preempted: &[(usize, usize)],
) {
    let mut sequences: Vec<Sequence> = all.iter().map(|e| driver.sequence(&e.prompt)).collect();
    let mut produced = vec![0; all.len()];
    let mut chunk = chunks.iter().cycle();
    for pass in 0.. {
        let mut rows = Vec::new();
        let mut which = Vec::new();
        for (nth, sequence) in sequences.iter_mut().enumerate() {
            if preempted.contains(&(pass, nth)) {
                driver.free(sequence);
            }
            if produced[nth] < all[nth].tokens.len() && arrivals[nth] <= pass {
                let missing = sequence.tokens.len() - sequence.computed;
                rows.push((sequence, missing.min(*chunk.next().unwrap())));
                which.push(nth);
            }
        }
        if rows.is_empty() && arrivals.iter().all(|&at| at <= pass) {
            break;
        }
        if rows.is_empty() {
            continue;
        }
        let logits = driver.step(&mut rows);
        for (nth, logits) in which.into_iter().zip(logits) {
            if sequences[nth].computed < sequences[nth].tokens.len() {
                continue;
            }
            let at = produced[nth];
            assert_eq!(bits(&logits), bits(&all[nth].logits[at]), "sequence {nth}, token {at}, pass {pass}");
            assert_eq!(greedy(&logits), all[nth].tokens[at]);
            sequences[nth].tokens.push(all[nth].tokens[at]);
            produced[nth] += 1;
        }
    }
    assert!(produced.iter().zip(all).all(|(done, e)| *done == e.tokens.len()));
}
