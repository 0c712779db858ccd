//! Several ranks that run one model together, each a thread of this process.
//!
//! Every rank has its shard's weights and KV cache and runs the same forward pass over it. They meet in a
//! [`Collective`] for each group of tensor parallel ranks and one for each chain of pipeline stages. The caller of
//! `execute` is itself a rank: the first of the last stage, where the logits are.
//!
//! A step is one pass, so stages work one after the other, and those of a chain share their compute threads: a
//! pipeline divides memory, not time. The ranks of a stage work at once, each with its share of the threads.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use forebay_kernels::Pool;
use forebay_schedule::StepPlan;

use super::links::Links;
use super::{
    BuildError, Collective, CollectiveError, CpuExecutor, CpuOptions, ExecError, Executor, ThreadCollective,
};
use crate::model::{ModelFile, Ranks};

/// A rank that waits longer than this for the others takes them for lost. Far above any pass; that of torch's process
/// groups.
const LOST_AFTER: Duration = Duration::from_secs(600);

/// Runs a model in several ranks. Results have the same bits as those of one rank.
///
/// A rank that fails or panics ends all: that step and every later one gives [`ExecError::Ranks`].
pub struct RankedExecutor {
    /// Or why they have ended.
    running: Result<Running, CollectiveError>,
    vocab_size: usize,
    block_size: usize,
    blocks: usize,
    positions_max: usize,
}

struct Running {
    /// Dropped first: others in the middle of a pass wait for it, and without it they fail there.
    driver: CpuExecutor,
    workers: Vec<Worker>,
}

/// Another rank, on a thread of its own. Dropping it ends the rank, whose links then fail for all that it shared one with.
struct Worker {
    /// `None`: it has been told to end.
    plans: Option<SyncSender<Arc<StepPlan>>>,
    thread: Option<JoinHandle<()>>,
}

impl RankedExecutor {
    /// Packs every rank's weights, on all threads, and starts the ranks.
    ///
    /// `options.threads` is what all ranks have together; the caller's `pool` is that of the first in each stage.
    pub fn new(
        file: &Arc<ModelFile>,
        ranks: Ranks,
        options: &CpuOptions,
        pool: Arc<Pool>,
    ) -> Result<Self, BuildError> {
        let group = |size| {
            let ends = ThreadCollective::group(size, LOST_AFTER).into_iter();
            ends.map(|end| Box::new(end) as Box<dyn Collective>).collect()
        };
        Self::with_groups(file, ranks, options, pool, &group)
    }

    /// `group(size)` makes the ends of a group.
    fn with_groups(
        file: &Arc<ModelFile>,
        ranks: Ranks,
        options: &CpuOptions,
        pool: Arc<Pool>,
        group: &dyn Fn(usize) -> Vec<Box<dyn Collective>>,
    ) -> Result<Self, BuildError> {
        let spec = file.spec()?;
        ranks.check(&spec)?;
        let packing = Pool::new(options.threads);
        // One for each tensor rank.
        let pools = std::iter::once(pool)
            .chain(std::iter::repeat_with(|| Arc::new(Pool::new(threads_per_rank(options.threads, ranks)))));
        let mut chains: Vec<_> =
            pools.take(ranks.tensor).map(|pool| (pool, group(ranks.pipeline).into_iter())).collect();
        let mut executors = Vec::with_capacity(ranks.count());
        for stage in 0..ranks.pipeline {
            for ((nth, tensor), (pool, chain)) in group(ranks.tensor).into_iter().enumerate().zip(&mut chains)
            {
                let pipeline = chain.next().expect("a group has an end for each of its ranks");
                let links = Links::new(tensor, pipeline);
                let (shard, pool) = (ranks.shard(&spec, stage, nth), Arc::clone(pool));
                executors.push(CpuExecutor::rank(file, spec.clone(), shard, links, options, pool, &packing)?);
            }
        }
        let driver = executors.remove((ranks.pipeline - 1) * ranks.tensor);
        let workers = executors.into_iter().enumerate().map(|(nth, executor)| Worker::start(nth, executor));
        Ok(Self {
            vocab_size: driver.vocab_size(),
            block_size: driver.block_size(),
            blocks: driver.blocks(),
            positions_max: driver.positions_max(),
            running: Ok(Running {
                workers: workers.collect::<Result<_, _>>().map_err(BuildError::Thread)?,
                driver,
            }),
        })
    }
}

impl Executor for RankedExecutor {
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn block_size(&self) -> usize {
        self.block_size
    }

    fn blocks(&self) -> usize {
        self.blocks
    }

    fn positions_max(&self) -> usize {
        self.positions_max
    }

    fn execute(&mut self, plan: &StepPlan) -> Result<&[f32], ExecError> {
        let running = self.running.as_mut().map_err(|failed| *failed)?;
        running.driver.check(plan)?;
        if plan.is_empty() {
            return Ok(&[]);
        }
        if let Err(failed) = running.compute(plan) {
            self.running = Err(failed);
        }
        match &self.running {
            Ok(running) => Ok(running.driver.logits(plan)),
            Err(failed) => Err((*failed).into()),
        }
    }
}

impl Running {
    /// One pass in all ranks. When the driver is done with it, all others are or are about to be.
    fn compute(&mut self, plan: &StepPlan) -> Result<(), CollectiveError> {
        let shared = Arc::new(plan.clone());
        for worker in &self.workers {
            if let Some(plans) = &worker.plans {
                // A rank that has ended takes none, and has dropped its links: the pass will say so.
                let _ = plans.send(Arc::clone(&shared));
            }
        }
        self.driver.compute(plan)
    }
}

impl Worker {
    fn start(nth: usize, mut rank: CpuExecutor) -> std::io::Result<Self> {
        let (plans, inbox) = sync_channel::<Arc<StepPlan>>(1);
        let run = move || {
            while let Ok(plan) = inbox.recv() {
                if let Err(error) = rank.compute(&plan) {
                    tracing::debug!(%error, "a rank of the model ends");
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name(format!("forebay-rank-{nth}")).spawn(run)?;
        Ok(Self { plans: Some(plans), thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.plans = None;
        let Some(thread) = self.thread.take() else { return };
        let name = thread.thread().name().unwrap_or_default().to_owned();
        if thread.join().is_err() {
            tracing::error!(thread = name, "a rank of the model had panicked");
        }
    }
}

/// Compute threads of one tensor parallel rank, where all have `threads`.
pub fn threads_per_rank(threads: usize, ranks: Ranks) -> usize {
    (threads / ranks.tensor).max(1)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use forebay_kernels::Isa;
    use forebay_schedule::SeqId;

    use super::*;
    use crate::model::tiny::TinyLlama;

    /// Panics in the call that takes `left` to zero, if it is the one of the rank that is to.
    struct Faulty {
        inner: ThreadCollective,
        left: Arc<AtomicUsize>,
    }

    impl Faulty {
        fn count(&self) {
            let before = self.left.fetch_sub(1, Ordering::SeqCst);
            assert!(before != 1, "injected");
        }
    }

    impl Collective for Faulty {
        fn rank(&self) -> usize {
            self.inner.rank()
        }

        fn size(&self) -> usize {
            self.inner.size()
        }

        fn all_gather(&mut self, part: &[f32], out: &mut [f32]) -> Result<(), CollectiveError> {
            self.count();
            self.inner.all_gather(part, out)
        }

        fn broadcast(&mut self, root: usize, values: &mut [f32]) -> Result<(), CollectiveError> {
            self.inner.broadcast(root, values)
        }

        fn barrier(&mut self) -> Result<(), CollectiveError> {
            self.inner.barrier()
        }

        fn send(&mut self, to: usize, values: &[f32]) -> Result<(), CollectiveError> {
            self.count();
            self.inner.send(to, values)
        }

        fn recv(&mut self, from: usize, values: &mut [f32]) -> Result<(), CollectiveError> {
            self.inner.recv(from, values)
        }
    }

    fn plan() -> StepPlan {
        StepPlan {
            seqs: vec![SeqId(0)],
            token_ids: vec![1, 2, 3],
            positions: vec![0, 1, 2],
            row_starts: vec![0, 3],
            block_tables: vec![0],
            table_starts: vec![0, 1],
            logit_tokens: vec![2],
        }
    }

    /// In ranks whose rank `faulty` (not the driver, which is the last stage's first) panics in its `nth` call.
    fn with_fault(ranks: Ranks, faulty: usize, nth: usize) -> RankedExecutor {
        let model = Arc::new(ModelFile::from_bytes(TinyLlama::default().to_gguf()).unwrap());
        let options =
            CpuOptions { isa: Isa::detect(), threads: 2, block_size: 16, blocks: 4, positions_max: 64 };
        let count = Arc::new(AtomicUsize::new(nth));
        // Groups are made tensor rank by tensor rank for the chains, then stage by stage.
        let groups = AtomicUsize::new(0);
        let group = |size| {
            let group = groups.fetch_add(1, Ordering::SeqCst);
            let counters = move |rank: usize| match group < ranks.tensor {
                true => rank * ranks.tensor + group == faulty,
                false => (group - ranks.tensor) * ranks.tensor + rank == faulty,
            };
            let ends = ThreadCollective::group(size, LOST_AFTER).into_iter().enumerate();
            let end = |(rank, inner)| {
                let never = Arc::new(AtomicUsize::new(usize::MAX));
                let left = if counters(rank) { Arc::clone(&count) } else { never };
                Box::new(Faulty { inner, left }) as Box<dyn Collective>
            };
            ends.map(end).collect()
        };
        RankedExecutor::with_groups(&model, ranks, &options, Arc::new(Pool::new(1)), &group).unwrap()
    }

    #[test]
    fn a_rank_that_panics_ends_all_of_them_and_every_later_pass() {
        for (tensor, pipeline, faulty) in
            [(2, 1, 1), (4, 1, 2), (1, 2, 0), (2, 2, 0), (2, 2, 1), (2, 2, 3), (4, 2, 6)]
        {
            // In the first pass, and in a later one. A rank makes 4 or more calls in two layers, or hands on once.
            for nth in [1, 2] {
                let mut executor = with_fault(Ranks { tensor, pipeline }, faulty, nth);
                let first = (0..3).find_map(|_| executor.execute(&plan()).map(<[f32]>::len).err());
                assert!(matches!(first, Some(ExecError::Ranks(_))), "{first:?}");
                assert!(first.unwrap().is_final());
                assert!(matches!(executor.execute(&plan()), Err(ExecError::Ranks(_))));
            }
        }
    }

    #[test]
    fn a_plan_that_is_not_valid_ends_nothing() {
        let mut executor = with_fault(Ranks { tensor: 2, pipeline: 2 }, 0, usize::MAX);
        let before = executor.execute(&plan()).unwrap().to_vec();
        let wrong = StepPlan { block_tables: vec![9], ..plan() };
        assert!(matches!(executor.execute(&wrong), Err(ExecError::Plan(_))));
        assert!(executor.execute(&StepPlan::default()).unwrap().is_empty());
        assert_eq!(executor.execute(&plan()).unwrap(), before);
    }
}
