//! An executor whose passes last as long as a test wants.

use std::sync::mpsc;

use forebay_schedule::StepPlan;

use super::*;
use crate::exec::{ExecError, Executor};

/// Says that a pass has begun, and waits in it until the test lets it go.
pub struct Held {
    inner: FakeExecutor,
    begun: mpsc::Sender<()>,
    gate: mpsc::Receiver<()>,
}

/// The executor, what hears of every pass that it has begun, and what lets one go; all of them once it is dropped.
pub fn held(inner: FakeExecutor) -> (Held, mpsc::Receiver<()>, mpsc::Sender<()>) {
    let ((begun, has_begun), (open, gate)) = (mpsc::channel(), mpsc::channel());
    (Held { inner, begun, gate }, has_begun, open)
}

impl Executor for Held {
    fn vocab_size(&self) -> usize {
        self.inner.vocab_size()
    }

    fn block_size(&self) -> usize {
        self.inner.block_size()
    }

    fn blocks(&self) -> usize {
        self.inner.blocks()
    }

    fn positions_max(&self) -> usize {
        self.inner.positions_max()
    }

    fn execute(&mut self, plan: &StepPlan) -> Result<&[f32], ExecError> {
        let _ = self.begun.send(());
        let _ = self.gate.recv();
        self.inner.execute(plan)
    }
}
