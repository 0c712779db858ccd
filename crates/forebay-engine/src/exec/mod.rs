//! Executors: they run a [`StepPlan`] and give logits back.
//!
//! An executor owns the KV blocks' memory and nothing else that lasts: which sequence owns which block, what is
//! cached and who runs next is the scheduler's. It knows no request, no text and no sampling.

mod bert;
mod check;
mod collective;
mod cpu;
mod fake;
mod links;
mod ranks;
mod ropes;

use std::sync::Arc;

use forebay_kernels::Pool;
use forebay_schedule::StepPlan;
use forebay_types::{Blame, Class, Classify, Code, Retry};

use crate::model::{ModelFile, Ranks};

pub use bert::{BertEncoder, Encoder};
pub use check::PlanError;
pub use collective::{Collective, CollectiveError, ThreadCollective};
pub use cpu::{BuildError, CpuExecutor, CpuOptions};
pub use fake::FakeExecutor;
pub use ranks::{RankedExecutor, threads_per_rank};

/// Makes a model ready to run: the one place that chooses weights, KV layout and kernels.
///
/// `pool` has [`threads_per_rank`] threads, which the caller may use between passes.
pub fn start(
    file: &Arc<ModelFile>,
    ranks: Ranks,
    options: &CpuOptions,
    pool: Arc<Pool>,
) -> Result<Box<dyn Executor>, BuildError> {
    if ranks == Ranks::ONE {
        return Ok(Box::new(CpuExecutor::with_pool(file, options, pool)?));
    }
    Ok(Box::new(RankedExecutor::new(file, ranks, options, pool)?))
}

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

impl<E: Executor + ?Sized> Executor for Box<E> {
    fn vocab_size(&self) -> usize {
        (**self).vocab_size()
    }

    fn block_size(&self) -> usize {
        (**self).block_size()
    }

    fn blocks(&self) -> usize {
        (**self).blocks()
    }

    fn positions_max(&self) -> usize {
        (**self).positions_max()
    }

    fn execute(&mut self, plan: &StepPlan) -> Result<&[f32], ExecError> {
        (**self).execute(plan)
    }
}

/// Why a pass could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The scheduler made a plan that breaks its own contract: a defect of ours.
    #[error("the step plan is not valid")]
    Plan(#[from] PlanError),
    /// Only [`FakeExecutor::fail_at_step`] does this, until there is a device that can fail for once.
    #[error("the device failed: {what}")]
    Device { what: String },
    /// Ranks have ended: every later pass fails too.
    #[error("the ranks of the model have lost each other")]
    Ranks(#[from] CollectiveError),
}

impl ExecError {
    /// Whether the executor will never run a pass again.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Ranks(_))
    }
}

impl Classify for ExecError {
    fn class(&self) -> Class {
        match self {
            Self::Plan(_) | Self::Device { .. } => Class::new(Code::Internal, Blame::Us),
            Self::Ranks(_) => Class::new(Code::ModelUnavailable, Blame::Us).retry(Retry::Elsewhere),
        }
    }
}
