//! What one forward pass computes, as plain data.

/// Identifies a running sequence (one choice of one request) between scheduler, executor and engine loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

/// One forward pass. Plain data, so that any executor (CPU, GPU, fake, a rank of several) can run it.
///
/// With `R` sequences, `T` tokens in the pass, `B` tokens per block:
///
/// | field            | shape           | meaning                                                    |
/// |------------------|-----------------|------------------------------------------------------------|
/// | `seqs`           | `[R]`           | which sequence row `r` is                                  |
/// | `token_ids`      | `[T]`           | the tokens to compute, row after row                       |
/// | `positions`      | `[T]`           | position of each token in its sequence, from 0             |
/// | `row_starts`     | `[R + 1]`       | prefix sums into `token_ids`; `row_starts[R] == T`         |
/// | `block_tables`   | `[Σ ceil(len/B)]` | KV blocks of every row, oldest first, row after row      |
/// | `table_starts`   | `[R + 1]`       | prefix sums into `block_tables`                            |
/// | `logit_tokens`   | `[S]`           | indices into `[T]` whose next-token logits are wanted, ascending |
///
/// Logits are wanted of every row's last known token, to choose the next one; and of the prompt's tokens before its
/// last where a sequence asks for them, once each.///
/// After the pass row `r` has `positions[row_starts[r + 1] - 1] + 1` tokens in its KV blocks. The tokens of a row
/// are consecutive. A block is written by at most one row of a pass, and no other row of that pass reads it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepPlan {
    pub seqs: Vec<SeqId>,
    pub token_ids: Vec<u32>,
    pub positions: Vec<u32>,
    pub row_starts: Vec<u32>,
    pub block_tables: Vec<u32>,
    pub table_starts: Vec<u32>,
    pub logit_tokens: Vec<u32>,
}

impl StepPlan {
    /// An empty plan with room for `rows` of `tokens` and `blocks` in all. Of each it takes no more than 64 Ki: a larger plan
    /// makes room itself.
    pub(crate) fn with_room(rows: u32, tokens: u32, blocks: u32) -> Self {
        let [rows, tokens, blocks] = [rows, tokens, blocks].map(|n| (n as usize).min(1 << 16));
        Self {
            seqs: Vec::with_capacity(rows),
            token_ids: Vec::with_capacity(tokens),
            positions: Vec::with_capacity(tokens),
            row_starts: Vec::with_capacity(rows + 1),
            block_tables: Vec::with_capacity(blocks),
            table_starts: Vec::with_capacity(rows + 1),
            logit_tokens: Vec::with_capacity(rows),
        }
    }

    pub fn rows(&self) -> usize {
        self.seqs.len()
    }

    pub fn tokens(&self) -> usize {
        self.token_ids.len()
    }

    pub fn is_empty(&self) -> bool {
        self.seqs.is_empty()
    }

    /// Range of row `r` in `token_ids` and `positions`.
    pub fn row(&self, r: usize) -> std::ops::Range<usize> {
        self.row_starts[r] as usize..self.row_starts[r + 1] as usize
    }

    /// KV blocks of row `r`, oldest first.
    pub fn block_table(&self, r: usize) -> &[u32] {
        &self.block_tables[self.table_starts[r] as usize..self.table_starts[r + 1] as usize]
    }
}
