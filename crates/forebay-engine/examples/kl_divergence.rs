//! Compares the CPU executor with llama.cpp on a whole text: mean KL divergence and top-1 agreement.
//!
//! ```text
//! llama-perplexity -m MODEL.gguf -f text.txt -c 512 -b 512 -t 1 --chunks 8 --kl-divergence-base logits.kld
//! cargo run --release -p forebay-engine --example kl_divergence -- MODEL.gguf logits.kld
//! ```
//!
//! The format of `logits.kld` is described in `tests/reference/llamacpp_logits.py`.
#![allow(clippy::print_stdout, reason = "a command-line program")]

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use forebay_engine::exec::{CpuExecutor, CpuOptions, Executor};
use forebay_engine::model::ModelFile;
use forebay_kernels::Isa;
use forebay_schedule::{SeqId, StepPlan};

const BLOCK_SIZE: usize = 16;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, base] = &arguments[..] else { anyhow::bail!("usage: kl_divergence MODEL.gguf logits.kld") };
    let mut base = BufReader::new(File::open(base)?);
    let mut magic = [0; 8];
    base.read_exact(&mut magic)?;
    ensure!(&magic == b"_logits_", "not a file of llama-perplexity");
    let [context, vocab, chunks] = [(); 3].map(|()| u32_from(&mut base));
    let (context, vocab, chunks) = (context? as usize, vocab? as usize, chunks? as usize);
    let tokens: Vec<u32> = (0..context * chunks).map(|_| u32_from(&mut base)).collect::<Result<_, _>>()?;

    let model = Arc::new(ModelFile::open(Path::new(model))?);
    let blocks = context.div_ceil(BLOCK_SIZE);
    let options =
        CpuOptions { isa: Isa::detect(), threads: 2, block_size: BLOCK_SIZE, blocks, positions_max: context };
    let mut executor = CpuExecutor::new(&model, &options)?;
    ensure!(executor.vocab_size() == vocab, "another vocabulary");

    let mut row = vec![0u8; 8 + 2 * vocab.next_multiple_of(2)];
    let mut total = Totals::default();
    for (nth, tokens) in tokens.chunks(context).enumerate() {
        let wanted = context / 2..context - 1;
        let plan = StepPlan {
            seqs: vec![SeqId(nth as u64)],
            token_ids: tokens.to_vec(),
            positions: (0..context as u32).collect(),
            row_starts: vec![0, context as u32],
            block_tables: (0..blocks as u32).collect(),
            table_starts: vec![0, blocks as u32],
            logit_tokens: wanted.clone().map(|at| at as u32).collect(),
        };
        let logits = executor.execute(&plan)?;
        for (logits, at) in logits.chunks(vocab).zip(wanted) {
            base.read_exact(&mut row).context("the reference ends early")?;
            total.add(&row, vocab, logits, tokens[at + 1] as usize);
        }
        println!("chunk {}: {total}", nth + 1);
    }
    Ok(())
}

fn u32_from(from: &mut impl Read) -> std::io::Result<u32> {
    let mut bytes = [0; 4];
    from.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

#[derive(Default)]
struct Totals {
    positions: usize,
    kl: f64,
    kl_max: f64,
    agree: usize,
    /// Disagreements where the reference's first two are less than 0.1 apart.
    ties: usize,
    log_p_theirs: f64,
    log_p_ours: f64,
}

impl Totals {
    fn add(&mut self, row: &[u8], vocab: usize, logits: &[f32], next: usize) {
        let (head, quants) = row.split_at(8);
        let float = |at: usize| f32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (scale, low) = (f64::from(float(0)), f64::from(float(4)));
        let quants = quants.as_chunks::<2>().0.iter().take(vocab);
        let theirs: Vec<f64> = quants.map(|q| low + scale * f64::from(u16::from_le_bytes(*q))).collect();

        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
        let log_sum = f64::from(max) + sum.ln();
        let ours = |id: usize| f64::from(logits[id]) - log_sum;

        // Tokens at the floor are "at most this likely": together they are one event.
        let (mut kl, mut p_rest, mut q_rest) = (0.0, 1.0, 1.0);
        for id in (0..vocab).filter(|&id| theirs[id] > low) {
            let p = theirs[id].exp();
            kl += p * (theirs[id] - ours(id));
            p_rest -= p;
            q_rest -= ours(id).exp();
        }
        if p_rest > 1e-6 && q_rest > 1e-6 {
            kl += p_rest * (p_rest / q_rest).ln();
        }
        let best_ours = (0..vocab).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0);
        let best = (0..vocab).max_by(|&a, &b| theirs[a].total_cmp(&theirs[b])).unwrap_or(0);
        self.positions += 1;
        self.kl += kl;
        self.kl_max = self.kl_max.max(kl);
        if best == best_ours {
            self.agree += 1;
        } else if theirs[best] - theirs[best_ours] < 0.1 {
            self.ties += 1;
        }
        self.log_p_theirs += theirs[next];
        self.log_p_ours += ours(next);
    }
}

impl std::fmt::Display for Totals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let n = self.positions as f64;
        write!(
            f,
            "{} positions, mean KL {:.2e} (max {:.2e}), same top-1 {:.2} % (near ties besides: {:.2} %), \
             perplexity {:.3} (llama.cpp {:.3})",
            self.positions,
            self.kl / n,
            self.kl_max,
            100.0 * self.agree as f64 / n,
            100.0 * self.ties as f64 / n,
            (-self.log_p_ours / n).exp(),
            (-self.log_p_theirs / n).exp(),
        )
    }
}
