//! Drives an executor by hand: builds plans for a few sequences, as a scheduler would.
#![allow(dead_code, clippy::unwrap_used, reason = "for tests; each uses a part of it")]

pub(crate) mod together;

use std::sync::Arc;

use forebay_engine::exec::{self, CpuOptions, Executor};
use forebay_engine::gguf::ElementType;
use forebay_engine::gguf::write::Writer;
use forebay_engine::model::{ModelFile, Ranks};
use forebay_kernels::{Isa, Pool, TensorType, dequantize_row};
use forebay_schedule::{SeqId, StepPlan};
use half::bf16;

/// Tokens of one sequence and where its KV stands.
#[derive(Debug, Clone)]
pub(crate) struct Sequence {
    pub(crate) tokens: Vec<u32>,
    /// How many tokens have their KV in the blocks.
    pub(crate) computed: usize,
    pub(crate) table: Vec<u32>,
}

/// An executor with a free list of blocks.
pub(crate) struct Driver {
    pub(crate) executor: Box<dyn Executor>,
    free: Vec<u32>,
}

pub(crate) fn supported_isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.supported())
}

impl Driver {
    /// `block_order`: the free list, last one taken first; its length is the number of blocks.
    pub(crate) fn new(
        model: &Arc<ModelFile>,
        isa: Isa,
        threads: usize,
        block_size: usize,
        block_order: Vec<u32>,
    ) -> Self {
        Self::ranked(model, Ranks::ONE, isa, threads, block_size, block_order)
    }

    /// As [`Self::new`], in several ranks.
    pub(crate) fn ranked(
        model: &Arc<ModelFile>,
        ranks: Ranks,
        isa: Isa,
        threads: usize,
        block_size: usize,
        block_order: Vec<u32>,
    ) -> Self {
        let options = CpuOptions { isa, threads, block_size, blocks: block_order.len(), positions_max: 1024 };
        let pool = Arc::new(Pool::new(exec::threads_per_rank(threads, ranks)));
        Self { executor: exec::start(model, ranks, &options, pool).unwrap(), free: block_order }
    }

    /// Takes a sequence's blocks: it has to be computed anew.
    pub(crate) fn free(&mut self, sequence: &mut Sequence) {
        self.free.append(&mut sequence.table);
        sequence.computed = 0;
    }

    pub(crate) fn sequence(&self, tokens: &[u32]) -> Sequence {
        Sequence { tokens: tokens.to_vec(), computed: 0, table: Vec::new() }
    }

    /// Computes the next `count` tokens of each sequence in one pass; gives the logits of each one's last.
    pub(crate) fn step(&mut self, rows: &mut [(&mut Sequence, usize)]) -> Vec<Vec<f32>> {
        let size = self.executor.block_size();
        let mut plan = StepPlan { row_starts: vec![0], table_starts: vec![0], ..StepPlan::default() };
        for (nth, (sequence, count)) in rows.iter_mut().enumerate() {
            let end = sequence.computed + *count;
            while sequence.table.len() < end.div_ceil(size) {
                sequence.table.push(self.free.pop().expect("the test has enough blocks"));
            }
            plan.seqs.push(SeqId(nth as u64));
            plan.token_ids.extend(&sequence.tokens[sequence.computed..end]);
            plan.positions.extend(sequence.computed as u32..end as u32);
            plan.row_starts.push(plan.token_ids.len() as u32);
            plan.block_tables.extend(&sequence.table);
            plan.table_starts.push(plan.block_tables.len() as u32);
            plan.logit_tokens.push(plan.token_ids.len() as u32 - 1);
            sequence.computed = end;
        }
        let vocab = self.executor.vocab_size();
        self.executor.execute(&plan).unwrap().chunks(vocab).map(<[f32]>::to_vec).collect()
    }

    /// One pass over a whole new sequence: the logits after each token that `at` names.
    pub(crate) fn logits_at(&mut self, tokens: &[u32], at: &[u32]) -> Vec<Vec<f32>> {
        let table: Vec<u32> = (0..tokens.len().div_ceil(self.executor.block_size()) as u32).collect();
        let plan = StepPlan {
            seqs: vec![SeqId(0)],
            token_ids: tokens.to_vec(),
            positions: (0..tokens.len() as u32).collect(),
            row_starts: vec![0, tokens.len() as u32],
            table_starts: vec![0, table.len() as u32],
            block_tables: table,
            logit_tokens: at.to_vec(),
        };
        let vocab = self.executor.vocab_size();
        self.executor.execute(&plan).unwrap().chunks(vocab).map(<[f32]>::to_vec).collect()
    }

    /// Prefills `prompt` in one pass and continues it greedily; gives the tokens and each step's logits.
    pub(crate) fn generate(&mut self, prompt: &[u32], count: usize) -> (Vec<u32>, Vec<Vec<f32>>) {
        let mut sequence = self.sequence(prompt);
        let mut all_logits = Vec::new();
        for _ in 0..count {
            let missing = sequence.tokens.len() - sequence.computed;
            let logits = self.step(&mut [(&mut sequence, missing)]).remove(0);
            sequence.tokens.push(greedy(&logits));
            all_logits.push(logits);
        }
        (sequence.tokens[prompt.len()..].to_vec(), all_logits)
    }
}

/// The largest logit's token; the first of equals.
pub(crate) fn greedy(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).reduce(|best, id| if logits[id] > logits[best] { id } else { best });
    best.expect("there are logits") as u32
}

/// Natural-log probabilities.
pub(crate) fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
    logits.iter().map(|l| f64::from(l - max) - sum.ln()).collect()
}

/// KL divergence of ours from a reference's most likely tokens (id, log p), the rest of the vocabulary taken as one: a
/// lower bound of the whole.
pub(crate) fn kl_divergence(reference: impl Iterator<Item = (u32, f32)>, ours: &[f64]) -> f64 {
    let (mut kl, mut p_rest, mut q_rest) = (0.0, 1.0, 1.0);
    for (id, log_p) in reference {
        let (log_p, log_q) = (f64::from(log_p), ours[id as usize]);
        kl += log_p.exp() * (log_p - log_q);
        p_rest -= log_p.exp();
        q_rest -= log_q.exp();
    }
    if p_rest > 1e-6 && q_rest > 1e-6 { kl + p_rest * (p_rest / q_rest).ln() } else { kl }
}

/// The same model with every tensor in F32, without its tokenizer.
pub(crate) fn dequantised(model: &ModelFile) -> Vec<u8> {
    rewritten(model, |file, name, shape, values| {
        file.tensor_f32(name, shape, values);
    })
}

/// The same with matrices rounded to BF16, as models are published.
pub(crate) fn in_bf16(model: &ModelFile) -> Vec<u8> {
    rewritten(model, |file, name, shape, values| {
        if shape.len() == 1 {
            file.tensor_f32(name, shape, values);
        } else {
            let bytes = values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
            file.tensor(name, shape, ElementType::BF16, bytes);
        }
    })
}

fn rewritten(model: &ModelFile, mut add: impl FnMut(&mut Writer, &str, &[usize], &[f32])) -> Vec<u8> {
    let mut file = Writer::new();
    for (key, value) in model.gguf().unwrap().metadata().filter(|(key, _)| !key.starts_with("tokenizer.")) {
        file.put(key, value);
    }
    for tensor in model.tensors() {
        let element = TensorType::from_ggml(tensor.element.ggml()).unwrap();
        let mut values = vec![0.0; tensor.shape.iter().product()];
        dequantize_row(element, model.data(tensor), &mut values).unwrap();
        add(&mut file, &tensor.name, &tensor.shape, &values);
    }
    file.finish()
}
