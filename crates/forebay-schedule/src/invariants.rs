//! What must always hold: one catalogue for property tests, simulation and debugging.

use crate::{Scheduler, SeqId};

/// An invariant that does not hold: a defect of this crate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokenInvariant {
    #[error("block {block} has {refs} references, which its place in or out of the free list denies")]
    FreeList { block: u32, refs: u32 },
    #[error("block {block} has a hash that leads elsewhere")]
    HashBijection { block: u32 },
    #[error("{hashed} blocks have a hash, {cached} hashes are cached")]
    HashCount { hashed: usize, cached: usize },
    #[error("block {block} has {refs} references, but {holders} sequences hold it")]
    References { block: u32, refs: u32, holders: u32 },
    #[error("sequence {} would write block {block}, which is shared or cached", .seq.0)]
    SharedWrite { seq: SeqId, block: u32 },
    #[error("sequence {} is in the wrong queue, or in none", .seq.0)]
    Queue { seq: SeqId },
    #[error("sequence {} has fewer blocks than its computed tokens need", .seq.0)]
    Blocks { seq: SeqId },
    #[error("the waiting queue is out of order, or counts its tokens wrong")]
    WaitingOrder,
    #[error("{running} sequences run, the limit is {limit}")]
    RunningMax { running: usize, limit: u32 },
}

impl Scheduler {
    /// Checks everything that must hold between calls. O(blocks + sequences); for tests, simulation and debugging.
    pub fn check_invariants(&self) -> Result<(), BrokenInvariant> {
        self.pool.check_invariants()?;
        let mut holders = vec![0u32; self.pool.blocks() as usize];
        for (&id, &slot) in &self.slots {
            let seq = &self.seqs[slot as usize];
            let queued = self.waiting.rings().map(|(tenant, ring)| {
                ring.iter()
                    .filter(|(rank, s)| *s == slot && *rank == seq.rank && tenant == seq.tenant)
                    .count()
            });
            let queued: usize = queued.sum();
            let running = self.running.iter().filter(|s| **s == slot).count();
            let expect = match seq.phase {
                crate::seq::Phase::Waiting => (1, 0),
                crate::seq::Phase::Running => (0, 1),
            };
            if seq.id != id || (queued, running) != expect {
                return Err(BrokenInvariant::Queue { seq: id });
            }
            for &block in &seq.blocks {
                holders[block as usize] += 1;
            }
            let computed = seq.computed + seq.scheduled;
            if (seq.blocks.len() as u64) * u64::from(self.config.block_size) < u64::from(computed) {
                return Err(BrokenInvariant::Blocks { seq: id });
            }
            for &block in &seq.blocks[(seq.computed / self.config.block_size) as usize..] {
                if self.pool.refs(block) != 1 || self.pool.hash(block).is_some() {
                    return Err(BrokenInvariant::SharedWrite { seq: id, block });
                }
            }
        }
        for (block, &holders) in (0..).zip(&holders) {
            if self.pool.refs(block) != holders {
                return Err(BrokenInvariant::References { block, refs: self.pool.refs(block), holders });
            }
        }
        let tokens: u64 = self
            .waiting
            .rings()
            .flat_map(|(_, ring)| ring)
            .map(|(_, s)| u64::from(self.seqs[*s as usize].tokens()))
            .sum();
        if !self.waiting.is_consistent() || tokens != self.waiting.tokens() {
            return Err(BrokenInvariant::WaitingOrder);
        }
        if self.waiting.len() + self.running.len() != self.slots.len() {
            return Err(BrokenInvariant::WaitingOrder);
        }
        if self.running.len() > self.config.running_max as usize {
            return Err(BrokenInvariant::RunningMax {
                running: self.running.len(),
                limit: self.config.running_max,
            });
        }
        Ok(())
    }
}
