//! One rank's ends towards the other ranks of its model.

use super::{Collective, CollectiveError};
use crate::model::part;

/// A rank alone has none: then nothing is copied and nobody is waited for.
pub(super) struct Links {
    tensor: Option<TensorGroup>,
    /// Its ranks are the stages, in their order.
    pipeline: Option<Box<dyn Collective>>,
}

/// The ranks that compute each layer together.
struct TensorGroup {
    collective: Box<dyn Collective>,
    /// This rank's values; grown to the largest so far, as `all`.
    part: Vec<f32>,
    /// `[rank][part]`
    all: Vec<f32>,
}

impl Links {
    pub(super) fn none() -> Self {
        Self { tensor: None, pipeline: None }
    }

    /// Groups of one are as good as none.
    pub(super) fn new(tensor: Box<dyn Collective>, pipeline: Box<dyn Collective>) -> Self {
        let tensor = (tensor.size() > 1).then(|| TensorGroup {
            collective: tensor,
            part: Vec::new(),
            all: Vec::new(),
        });
        Self { tensor, pipeline: (pipeline.size() > 1).then_some(pipeline) }
    }

    /// Fills `out`, `[rows, width]`: `compute` writes this rank's columns of every row (`[rows, columns]`, the part of
    /// `width` that its shard has), and the other ranks give theirs.
    pub(super) fn fill(
        &mut self,
        out: &mut [f32],
        rows: usize,
        compute: impl FnOnce(&mut [f32]),
    ) -> Result<(), CollectiveError> {
        let Some(TensorGroup { collective, part: own, all }) = &mut self.tensor else {
            compute(out);
            return Ok(());
        };
        if rows == 0 {
            return Ok(());
        }
        let (size, width) = (collective.size(), out.len() / rows);
        let columns = |rank: usize| part(width, rank, size);
        // Ranks gather the same count, so a rank with a column less sends a few values that nobody reads.
        let count = rows * width.div_ceil(size);
        own.resize(count.max(own.len()), 0.0);
        compute(&mut own[..rows * columns(collective.rank()).len()]);
        if rows == 1 && width.is_multiple_of(size) {
            return collective.all_gather(&own[..count], out);
        }
        all.resize((size * count).max(all.len()), 0.0);
        let all = &mut all[..size * count];
        collective.all_gather(&own[..count], all)?;
        for (rank, part) in all.chunks_exact(count).enumerate() {
            let columns = columns(rank);
            for (to, from) in out.chunks_exact_mut(width).zip(part.chunks_exact(columns.len())) {
                to[columns.clone()].copy_from_slice(from);
            }
        }
        Ok(())
    }

    /// Takes what the stage before has computed. `false`: this is the first stage.
    pub(super) fn receive(&mut self, x: &mut [f32]) -> Result<bool, CollectiveError> {
        let Some(pipeline) = &mut self.pipeline else { return Ok(false) };
        let Some(before) = pipeline.rank().checked_sub(1) else { return Ok(false) };
        pipeline.recv(before, x).map(|()| true)
    }

    /// Gives the next stage what this one has computed; does nothing on the last.
    pub(super) fn hand_on(&mut self, x: &[f32]) -> Result<(), CollectiveError> {
        let Some(pipeline) = &mut self.pipeline else { return Ok(()) };
        let next = pipeline.rank() + 1;
        if next == pipeline.size() { Ok(()) } else { pipeline.send(next, x) }
    }
}
