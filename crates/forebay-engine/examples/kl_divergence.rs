//! Compares the CPU executor with llama.cpp on a whole text: KL divergence and top-1 agreement, whole vocabulary.
//!
//! ```text
//! llama-perplexity -m MODEL.gguf -f text.txt -c 512 -b 512 -t 1 --chunks 8 --kl-divergence-base logits.kld
//! cargo run --release -p forebay-engine --example kl_divergence -- MODEL.gguf logits.kld
//! cargo run --release -p forebay-engine --example kl_divergence -- other.kld logits.kld
//! ```
//!
//! With a `.kld` file in the model's place, two files are compared (llama.cpp with itself, say): what of the first
//! figure is noise. The format is described in `tests/reference/llamacpp_logits.py`; `docs/numerics.md` has results.
#![allow(clippy::print_stdout, reason = "a command-line program")]

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use forebay_engine::exec::{CpuExecutor, CpuOptions, Executor};
use forebay_engine::gguf::Value;
use forebay_engine::model::ModelFile;
use forebay_kernels::Isa;
use forebay_schedule::{SeqId, StepPlan};

const BLOCK_SIZE: usize = 16;
/// Below this distance of the reference's first two (in log p), either token is right.
const NEAR_TIE: f64 = 0.1;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [tested, base] = &arguments[..] else {
        anyhow::bail!("usage: kl_divergence MODEL.gguf|OTHER.kld BASE.kld")
    };
    let mut base = Base::open(Path::new(base))?;
    let tested = Path::new(tested);
    let mut tested = if tested.extension().is_some_and(|ext| ext == "kld") {
        let other = Base::open(tested)?;
        ensure!(other.vocab == base.vocab && other.tokens == base.tokens, "not the same text");
        Tested::Saved(other)
    } else {
        let (executor, bos) = executor(tested, &base)?;
        Tested::Ours(Box::new(executor), bos)
    };
    let mut total = Totals::default();
    for nth in 0..base.chunks() {
        let tokens = base.tokens[nth * base.context..(nth + 1) * base.context].to_vec();
        let tested = tested.log_p(nth, &tokens, base.scored())?;
        for (tested, at) in tested.iter().zip(base.scored()) {
            let row = base.next_row()?;
            total.add(&row, tested, tokens[at + 1] as usize);
        }
    }
    println!("{total}");
    Ok(())
}

/// A file of llama-perplexity's, read from front to back.
struct Base {
    file: BufReader<File>,
    context: usize,
    vocab: usize,
    tokens: Vec<u32>,
}

/// Natural-log probabilities of one position. Those at `low` are "at most this".
struct Row {
    low: f64,
    log_p: Vec<f64>,
}

impl Base {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let mut file = BufReader::new(File::open(path).with_context(|| path.display().to_string())?);
        let mut magic = [0; 8];
        file.read_exact(&mut magic)?;
        ensure!(&magic == b"_logits_", "not a file of llama-perplexity");
        let (context, vocab, chunks) = (u32_from(&mut file)?, u32_from(&mut file)?, u32_from(&mut file)?);
        let tokens = (0..context * chunks).map(|_| u32_from(&mut file)).collect::<Result<_, _>>()?;
        Ok(Self { file, context: context as usize, vocab: vocab as usize, tokens })
    }

    fn chunks(&self) -> usize {
        self.tokens.len() / self.context
    }

    /// The positions of a chunk whose successor is predicted.
    fn scored(&self) -> std::ops::Range<usize> {
        self.context / 2..self.context - 1
    }

    fn next_row(&mut self) -> anyhow::Result<Row> {
        let mut bytes = vec![0u8; 8 + 2 * self.vocab.next_multiple_of(2)];
        self.file.read_exact(&mut bytes).context("the file ends early")?;
        let (head, quants) = bytes.split_at(8);
        let float = |at: usize| f32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (scale, low) = (f64::from(float(0)), f64::from(float(4)));
        let quants = quants.as_chunks::<2>().0.iter().take(self.vocab);
        let log_p = quants.map(|q| low + scale * f64::from(u16::from_le_bytes(*q))).collect();
        Ok(Row { low, log_p })
    }
}

/// What is held against the reference.
enum Tested {
    /// With the token that begins a text, if the model wants one: it takes the place of each chunk's first, as in
    /// llama-perplexity.
    Ours(Box<CpuExecutor>, Option<u32>),
    Saved(Base),
}

impl Tested {
    /// Per scored position of the `nth` chunk, the log probabilities of all tokens.
    fn log_p(
        &mut self,
        nth: usize,
        tokens: &[u32],
        scored: std::ops::Range<usize>,
    ) -> anyhow::Result<Vec<Vec<f64>>> {
        match self {
            Self::Saved(base) => scored.map(|_| Ok(base.next_row()?.log_p)).collect(),
            Self::Ours(executor, bos) => {
                let mut token_ids = tokens.to_vec();
                token_ids[0] = bos.unwrap_or(token_ids[0]);
                let blocks = tokens.len().div_ceil(BLOCK_SIZE) as u32;
                let plan = StepPlan {
                    seqs: vec![SeqId(nth as u64)],
                    token_ids,
                    positions: (0..tokens.len() as u32).collect(),
                    row_starts: vec![0, tokens.len() as u32],
                    block_tables: (0..blocks).collect(),
                    table_starts: vec![0, blocks],
                    logit_tokens: scored.map(|at| at as u32).collect(),
                };
                let vocab = executor.vocab_size();
                Ok(executor.execute(&plan)?.chunks(vocab).map(log_softmax).collect())
            }
        }
    }
}

fn executor(model: &Path, base: &Base) -> anyhow::Result<(CpuExecutor, Option<u32>)> {
    let model = Arc::new(ModelFile::open(model)?);
    let options = CpuOptions {
        isa: Isa::detect(),
        threads: 2,
        block_size: BLOCK_SIZE,
        blocks: base.context.div_ceil(BLOCK_SIZE),
        positions_max: base.context,
    };
    let executor = CpuExecutor::new(&model, &options)?;
    ensure!(executor.vocab_size() == base.vocab, "another vocabulary");
    let key = |key: &str| model.gguf()?.get(&format!("tokenizer.ggml.{key}"));
    let adds_bos = key("add_bos_token").and_then(Value::as_bool) == Some(true);
    let bos = key("bos_token_id").and_then(Value::as_u64).filter(|_| adds_bos);
    Ok((executor, bos.map(u32::try_from).transpose()?))
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
    let log_sum = f64::from(max) + sum.ln();
    logits.iter().map(|l| f64::from(*l) - log_sum).collect()
}

fn u32_from(from: &mut impl Read) -> std::io::Result<u32> {
    let mut bytes = [0; 4];
    from.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

#[derive(Default)]
struct Totals {
    /// Per position.
    kl: Vec<f64>,
    agree: usize,
    /// Disagreements at a near tie of the reference.
    ties: usize,
    log_p_reference: f64,
    log_p_tested: f64,
}

impl Totals {
    fn add(&mut self, reference: &Row, tested: &[f64], next: usize) {
        let theirs = &reference.log_p;
        // Tokens at the floor are "at most this likely": together they are one event.
        let (mut kl, mut p_rest, mut q_rest) = (0.0, 1.0, 1.0);
        for (&log_p, &log_q) in theirs.iter().zip(tested).filter(|(log_p, _)| **log_p > reference.low) {
            let p = log_p.exp();
            kl += p * (log_p - log_q);
            p_rest -= p;
            q_rest -= log_q.exp();
        }
        if p_rest > 1e-6 && q_rest > 1e-6 {
            kl += p_rest * (p_rest / q_rest).ln();
        }
        self.kl.push(kl);
        let best_tested = most_likely(tested);
        let best = most_likely(theirs);
        if best == best_tested {
            self.agree += 1;
        } else if theirs[best] - theirs[best_tested] < NEAR_TIE {
            self.ties += 1;
        }
        self.log_p_reference += theirs[next];
        self.log_p_tested += tested[next];
    }
}

/// The first of equals.
fn most_likely(log_p: &[f64]) -> usize {
    (0..log_p.len()).reduce(|best, id| if log_p[id] > log_p[best] { id } else { best }).unwrap_or(0)
}

impl std::fmt::Display for Totals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut kl = self.kl.clone();
        kl.sort_by(f64::total_cmp);
        let n = kl.len() as f64;
        write!(
            f,
            "{} positions, KL mean {:.2e} median {:.2e} max {:.2e}, same top-1 {:.2} % (near ties counted {:.2} %), \
             perplexity {:.3} (reference {:.3})",
            kl.len(),
            kl.iter().sum::<f64>() / n,
            kl.get(kl.len() / 2).copied().unwrap_or(f64::NAN),
            kl.last().copied().unwrap_or(f64::NAN),
            100.0 * self.agree as f64 / n,
            100.0 * (self.agree + self.ties) as f64 / n,
            (-self.log_p_tested / n).exp(),
            (-self.log_p_reference / n).exp(),
        )
    }
}
