//! An executor without a model, for tests of everything above it.
//!
//! Its "KV cache" holds the token ids themselves, in real blocks, and its logits are a hash of all tokens that it
//! finds by walking the row's block table. So whatever would spoil a real model's output spoils this one's: a wrong
//! block table, a block freed too early, a token computed twice at different positions, a prefix-cache hit on the
//! wrong block. It computes nothing, so a test may run thousands of steps a second.

use forebay_schedule::StepPlan;

use super::check::{Bounds, check_plan};
use super::{CollectiveError, ExecError, Executor};

/// What to say after which tokens.
#[derive(Debug, Clone)]
struct Script {
    after: Vec<u32>,
    answer: Vec<u32>,
}

/// See the module. Deterministic: same sequence content, same logits, in any process.
#[derive(Debug)]
pub struct FakeExecutor {
    bounds: Bounds,
    /// `[blocks, block_size]`: the token id in each slot.
    slots: Vec<u32>,
    logits: Vec<f32>,
    /// Tokens of the sequence at hand; kept for its memory.
    seen: Vec<u32>,
    scripts: Vec<Script>,
    steps: u64,
    fail_at: Option<u64>,
    /// Every step from this one on.
    lost_at: Option<u64>,
}

/// What a slot holds before anything was written to it: no token, so reading it gives other logits.
const NEVER_WRITTEN: u32 = u32::MAX;

/// Logits are below this, except a scripted token's, which has exactly this: greedy sampling must pick it.
const SCRIPTED_LOGIT: f32 = 30.0;

impl FakeExecutor {
    pub fn new(vocab_size: usize, block_size: usize, blocks: usize) -> Self {
        assert!(vocab_size > 0 && block_size > 0, "a fake model has a vocabulary and its blocks have room");
        let bounds = Bounds { vocab: vocab_size, block_size, blocks, positions_max: blocks * block_size };
        Self {
            bounds,
            slots: vec![NEVER_WRITTEN; blocks * block_size],
            logits: Vec::new(),
            seen: Vec::new(),
            scripts: Vec::new(),
            steps: 0,
            fail_at: None,
            lost_at: None,
        }
    }

    /// Makes `answer` the greedy continuation of any sequence that ends with `after` (or with `after` and a part of
    /// the answer). It depends on the sequence's content alone, so it survives chunking, preemption and batching.
    /// With an empty `after`, every sequence is answered so. The longest match wins, then the first script.
    pub fn script(mut self, after: &[u32], answer: &[u32]) -> Self {
        assert!(
            answer.iter().all(|&t| (t as usize) < self.bounds.vocab),
            "a scripted token is in the vocabulary"
        );
        self.scripts.push(Script { after: after.to_vec(), answer: answer.to_vec() });
        self
    }

    /// Makes the `nth` step from now (0 is the next one) fail; those after it work again.
    pub fn fail_at_step(mut self, nth: u64) -> Self {
        self.fail_at = Some(self.steps + nth);
        self
    }

    /// Makes the `nth` step from now and all later ones fail, as where a rank has ended.
    pub fn lose_at_step(mut self, nth: u64) -> Self {
        self.lost_at = Some(self.steps + nth);
        self
    }

    /// Steps executed so far, failed ones included.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The greedy choice after `tokens`, computed without any blocks: what a test compares the engine's output to.
    pub fn next_after(&self, tokens: &[u32]) -> u32 {
        if let Some(token) = scripted(&self.scripts, tokens) {
            return token;
        }
        let seed = hash(tokens);
        (0..self.bounds.vocab as u32)
            .max_by(|&a, &b| logit(seed, a).total_cmp(&logit(seed, b)).then(b.cmp(&a)))
            .expect("the vocabulary is not empty")
    }
}

impl Executor for FakeExecutor {
    fn vocab_size(&self) -> usize {
        self.bounds.vocab
    }

    fn block_size(&self) -> usize {
        self.bounds.block_size
    }

    fn blocks(&self) -> usize {
        self.bounds.blocks
    }

    fn positions_max(&self) -> usize {
        self.bounds.positions_max
    }

    fn execute(&mut self, plan: &StepPlan) -> Result<&[f32], ExecError> {
        let step = self.steps;
        self.steps += 1;
        check_plan(plan, &self.bounds)?;
        if self.fail_at == Some(step) {
            return Err(ExecError::Device { what: format!("told to fail at step {step}") });
        }
        if self.lost_at.is_some_and(|at| step >= at) {
            return Err(CollectiveError::Gone { rank: 1 }.into());
        }
        let size = self.bounds.block_size;
        let slot = |table: &[u32], position: usize| table[position / size] as usize * size + position % size;
        for row in 0..plan.rows() {
            let table = plan.block_table(row);
            for token in plan.row(row) {
                self.slots[slot(table, plan.positions[token] as usize)] = plan.token_ids[token];
            }
        }
        self.logits.clear();
        let mut row = 0;
        for &token in &plan.logit_tokens {
            let token = token as usize;
            while plan.row(row).end <= token {
                row += 1;
            }
            let table = plan.block_table(row);
            self.seen.clear();
            self.seen.extend((0..=plan.positions[token] as usize).map(|p| self.slots[slot(table, p)]));
            let start = self.logits.len();
            let seed = hash(&self.seen);
            self.logits.extend((0..self.bounds.vocab as u32).map(|id| logit(seed, id)));
            if let Some(id) = scripted(&self.scripts, &self.seen) {
                self.logits[start + id as usize] = SCRIPTED_LOGIT;
            }
        }
        Ok(&self.logits)
    }
}

fn scripted(scripts: &[Script], tokens: &[u32]) -> Option<u32> {
    let mut best: Option<(usize, u32)> = None;
    for script in scripts {
        // The most of the answer that is already said; `said == len` means it is over.
        let matches = (0..script.answer.len()).rev().find(|&said| {
            tokens.strip_suffix(&script.answer[..said]).is_some_and(|rest| rest.ends_with(&script.after))
        });
        if let Some(said) = matches {
            let length = script.after.len() + said;
            if best.is_none_or(|(longest, _)| length > longest) {
                best = Some((length, script.answer[said]));
            }
        }
    }
    best.map(|(_, token)| token)
}

/// FNV-1a over the tokens' bytes: order and every id count.
fn hash(tokens: &[u32]) -> u64 {
    tokens
        .iter()
        .flat_map(|token| token.to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// From 0 up to 16, from the finaliser of SplitMix64.
fn logit(seed: u64, id: u32) -> f32 {
    let mut z = seed.wrapping_add(u64::from(id).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 40) as f32 * (16.0 / (1u64 << 24) as f32)
}

#[cfg(test)]
mod tests {
    use forebay_schedule::SeqId;

    use super::*;

    fn row(tokens: &[u32], first: usize, table: &[u32]) -> StepPlan {
        StepPlan {
            seqs: vec![SeqId(0)],
            token_ids: tokens[first..].to_vec(),
            positions: (first as u32..tokens.len() as u32).collect(),
            row_starts: vec![0, (tokens.len() - first) as u32],
            block_tables: table.to_vec(),
            table_starts: vec![0, table.len() as u32],
            logit_tokens: vec![(tokens.len() - first) as u32 - 1],
        }
    }

    fn greedy(logits: &[f32]) -> u32 {
        (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
    }

    #[test]
    fn the_output_depends_on_the_blocks_content_and_not_on_which_blocks() {
        let prompt = [5, 6, 7, 8, 9];
        let mut fake = FakeExecutor::new(100, 2, 10);
        let whole = fake.execute(&row(&prompt, 0, &[0, 1, 2])).unwrap().to_vec();
        assert_eq!(greedy(&whole), fake.next_after(&prompt));

        fake.execute(&row(&prompt[..3], 0, &[9, 4])).unwrap();
        assert_eq!(fake.execute(&row(&prompt, 3, &[9, 4, 7])).unwrap(), whole, "other blocks, two chunks");

        assert_ne!(fake.execute(&row(&prompt, 3, &[4, 9, 7])).unwrap(), whole, "blocks swapped");
        assert_ne!(fake.execute(&row(&prompt, 4, &[0, 8, 2])).unwrap(), whole, "a block never written");
    }

    #[test]
    fn a_script_is_said_token_by_token_after_its_trigger() {
        let fake = FakeExecutor::new(50, 4, 4).script(&[1, 2], &[10, 11, 2]).script(&[2], &[20]);
        assert_eq!(fake.next_after(&[7, 1, 2]), 10);
        assert_eq!(fake.next_after(&[7, 1, 2, 10]), 11);
        assert_eq!(fake.next_after(&[7, 1, 2, 10, 11]), 2);
        assert_eq!(fake.next_after(&[7, 2]), 20);
        assert_eq!(fake.next_after(&[7, 1, 2, 10, 11, 2]), 20, "over; the shorter script takes it from here");
    }

    #[test]
    fn a_step_fails_when_told_to() {
        let mut fake = FakeExecutor::new(10, 4, 4).fail_at_step(1);
        assert!(fake.execute(&row(&[1], 0, &[0])).is_ok());
        assert!(matches!(fake.execute(&row(&[1], 0, &[0])), Err(ExecError::Device { .. })));
        assert!(fake.execute(&row(&[1], 0, &[0])).is_ok());
        assert_eq!(fake.steps(), 3);
    }
}
