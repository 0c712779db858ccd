//! Executors: they run a [`StepPlan`] and give logits back.
//!
//! An executor owns the KV blocks' memory and nothing else that lasts: which sequence owns which block, what is
//! cached and who runs next is the scheduler's. It knows no request, no text and no sampling.

mod check;
mod collective;
mod cpu;
mod fake;

use forebay_schedule::StepPlan;
use forebay_types::{Blame, Class, Classify, Code};

pub use check::PlanError;
pub use collective::{Collective, CollectiveError, ThreadCollective};
pub use cpu::{BuildError, CpuExecutor, CpuOptions};
pub use fake::FakeExecutor;

/// Runs forward passes, one at a time.
pub trait Executor: Send {
    /// Number of logits per token, `V`.
    fn vocab_size(&self) -> usize;

    /// Tokens per KV block, `B`.
    fn block_size(&self) -> usize;

    /// Number of KV blocks; block ids in a plan are below it.
    fn blocks(&self) -> usize;

    /// Positions a sequence may have; positions in a plan are below it.
    fn positions_max(&self) -> usize;

    /// Computes the plan's tokens, writes their K and V to the blocks, and gives the wanted logits.
    ///
    /// | value  | shape    | meaning                                                          |
    /// |--------|----------|------------------------------------------------------------------|
    /// | result | `[S, V]` | row `s`: logits for the token after `plan.logit_tokens[s]`, unscaled |
    ///
    /// A token at position `p` of its sequence goes to block `table[p / B]`, slot `p % B`, and attends to positions
    /// `0..=p` of its own sequence only. Whatever stands in the blocks below the row's first position is taken as
    /// computed. Result rows are bit-identical for the same sequence content, whatever else is in the plan, however
    /// the prompt was cut into chunks, whichever blocks it has and however many threads work.
    ///
    /// Blocks until done. Cancellation: none within a pass; the caller drops a cancelled sequence from the next plan.
    /// After an error the blocks written by this plan hold unspecified values; all others are untouched.
    fn execute(&mut self, plan: &StepPlan) -> Result<&[f32], ExecError>;
}

/// Why a pass could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The scheduler made a plan that breaks its own contract: a defect of ours.
    #[error("the step plan is not valid")]
    Plan(#[from] PlanError),
    /// Only [`FakeExecutor::fail_at_step`] does this, until there is a device that can fail.
    #[error("the device failed: {what}")]
    Device { what: String },
}

impl Classify for ExecError {
    fn class(&self) -> Class {
        match self {
            Self::Plan(_) | Self::Device { .. } => Class::new(Code::Internal, Blame::Us),
        }
    }
}
