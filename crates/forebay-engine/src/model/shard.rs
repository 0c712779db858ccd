//! How a model is divided among ranks that run it together.
//!
//! Tensor parallelism divides every matrix by its outputs and attention by its heads; pipeline parallelism divides the
//! layers. No product is divided along its inputs, so every value is the same chain of operations as in one rank, and
//! has the same bits.

use std::ops::Range;

use super::ModelSpec;

/// Numbers of ranks; the model is run by their product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranks {
    /// Ranks that compute each layer together.
    pub tensor: usize,
    /// Groups of such ranks ("stages"), each with layers of its own.
    pub pipeline: usize,
}

/// Why a model can't be divided so. The first two are worded as vLLM's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RanksError {
    #[error(
        "Total number of attention heads ({heads}) must be divisible by tensor parallel size ({tensor})."
    )]
    Heads { heads: usize, tensor: usize },
    #[error(
        "Total number of KV heads ({heads}) must be divisible by tensor parallel size ({tensor}), or divide it."
    )]
    KvHeads { heads: usize, tensor: usize },
    #[error("{what} of {size} can't be divided among {tensor} tensor parallel ranks")]
    Narrow { what: &'static str, size: usize, tensor: usize },
    #[error("the model's {layers} layers can't be divided into {pipeline} pipeline stages")]
    Layers { layers: usize, pipeline: usize },
}

impl Ranks {
    pub const ONE: Self = Self { tensor: 1, pipeline: 1 };

    /// All ranks.
    pub fn count(self) -> usize {
        self.tensor.saturating_mul(self.pipeline)
    }

    /// Whether the model can be divided so.
    pub fn check(self, spec: &ModelSpec) -> Result<(), RanksError> {
        let Self { tensor, pipeline } = self;
        if !spec.q_heads.is_multiple_of(tensor) {
            return Err(RanksError::Heads { heads: spec.q_heads, tensor });
        }
        if !spec.kv_heads.is_multiple_of(tensor) && !tensor.is_multiple_of(spec.kv_heads) {
            return Err(RanksError::KvHeads { heads: spec.kv_heads, tensor });
        }
        for (what, size) in [
            ("an embedding length", spec.dim),
            ("a feed forward length", spec.ffn_dim),
            ("a vocabulary", spec.vocab_size),
        ] {
            if size < tensor {
                return Err(RanksError::Narrow { what, size, tensor });
            }
        }
        if pipeline > spec.layers {
            return Err(RanksError::Layers { layers: spec.layers, pipeline });
        }
        Ok(())
    }

    /// How many ranks of a stage have each KV head: more than one where there are fewer heads than ranks.
    pub fn kv_copies(self, spec: &ModelSpec) -> usize {
        (self.tensor / spec.kv_heads).max(1)
    }

    /// What the rank `tensor` of the stage `stage` computes.
    pub fn shard(self, spec: &ModelSpec, stage: usize, tensor: usize) -> Shard {
        let layers = part(spec.layers, stage, self.pipeline);
        let kv_heads = if self.tensor > spec.kv_heads {
            // Shared with other ranks: the one that its queries need.
            let head = tensor * spec.kv_heads / self.tensor;
            head..head + 1
        } else {
            part(spec.kv_heads, tensor, self.tensor)
        };
        Shard {
            first: layers.start == 0,
            last: layers.end == spec.layers,
            layers,
            q_heads: part(spec.q_heads, tensor, self.tensor),
            kv_heads,
            tensor,
            of: self.tensor,
        }
    }
}

/// The part of a model that one rank has in memory and computes. Made by [`Ranks::shard`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    pub layers: Range<usize>,
    /// Whether it begins with the embeddings.
    pub first: bool,
    /// Whether it ends with the logits.
    pub last: bool,
    pub q_heads: Range<usize>,
    pub kv_heads: Range<usize>,
    tensor: usize,
    of: usize,
}

impl Shard {
    pub fn whole(spec: &ModelSpec) -> Self {
        Ranks::ONE.shard(spec, 0, 0)
    }

    /// Its outputs of a matrix with `rows` of them.
    pub fn rows(&self, rows: usize) -> Range<usize> {
        part(rows, self.tensor, self.of)
    }
}

/// Part `nth` of `count`; parts differ by one at most.
pub(crate) fn part(len: usize, nth: usize, count: usize) -> Range<usize> {
    len * nth / count..len * (nth + 1) / count
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::ModelFile;
    use crate::model::tiny::TinyLlama;

    fn spec(layers: usize, q_heads: usize, kv_heads: usize) -> ModelSpec {
        let tiny = TinyLlama { layers, q_heads, kv_heads, head_dim: 2, ..TinyLlama::default() };
        ModelFile::from_bytes(tiny.to_gguf()).unwrap().spec().unwrap()
    }

    #[test]
    fn sizes_that_do_not_divide_the_model_are_refused_with_the_reason() {
        let check = |(layers, q, kv), (tensor, pipeline), expect: &str| {
            let found = Ranks { tensor, pipeline }.check(&spec(layers, q, kv));
            assert_eq!(found.map_or_else(|error| error.to_string(), |()| String::new()), expect);
        };
        check((2, 4, 2), (1, 1), "");
        check((2, 4, 2), (2, 2), "");
        check((2, 4, 2), (4, 1), "");
        check((30, 9, 3), (3, 30), "");
        check((30, 9, 3), (9, 1), "");
        check(
            (30, 9, 3),
            (2, 1),
            "Total number of attention heads (9) must be divisible by tensor parallel size (2).",
        );
        check(
            (2, 12, 2),
            (3, 1),
            "Total number of KV heads (2) must be divisible by tensor parallel size (3), or divide it.",
        );
        check((2, 4, 2), (1, 3), "the model's 2 layers can't be divided into 3 pipeline stages");
        let narrow = ModelSpec { ffn_dim: 3, ..spec(2, 4, 2) };
        let error = Ranks { tensor: 4, pipeline: 1 }.check(&narrow).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a feed forward length of 3 can't be divided among 4 tensor parallel ranks"
        );
    }

    proptest! {
        #[test]
        fn shards_cover_the_model_and_queries_find_their_keys(
            layers in 1usize..9, group in 1usize..5, kv in 1usize..7, rows in 24usize..200,
            division in any::<prop::sample::Index>(),
        ) {
            let spec = spec(layers, group * kv, kv);
            let all = (1..=24).flat_map(|tensor| (1..=4).map(move |pipeline| Ranks { tensor, pipeline }));
            let possible: Vec<Ranks> = all.filter(|ranks| ranks.check(&spec).is_ok()).collect();
            let ranks @ Ranks { tensor, pipeline } = *division.get(&possible);
            let mut layer = 0;
            for stage in 0..pipeline {
                let (mut q, mut row, mut kv_held) = (0, 0, 0);
                for nth in 0..tensor {
                    let shard = ranks.shard(&spec, stage, nth);
                    prop_assert_eq!((shard.first, shard.last), (stage == 0, stage == pipeline - 1));
                    prop_assert_eq!(shard.layers.start, layer);
                    prop_assert_eq!((shard.q_heads.start, shard.rows(rows).start), (q, row));
                    prop_assert!(!shard.layers.is_empty() && !shard.rows(rows).is_empty());
                    // Query head `h` attends with KV head `h / group`, and within the rank with its own of that number.
                    let own_group = shard.q_heads.len() / shard.kv_heads.len();
                    for (own, head) in shard.q_heads.clone().enumerate() {
                        prop_assert_eq!(head / group, shard.kv_heads.start + own / own_group);
                    }
                    (q, row, kv_held) = (shard.q_heads.end, shard.rows(rows).end, kv_held + shard.kv_heads.len());
                }
                prop_assert_eq!((q, row, kv_held), (spec.q_heads, rows, spec.kv_heads * ranks.kv_copies(&spec)));
                layer = ranks.shard(&spec, stage, 0).layers.end;
            }
            prop_assert_eq!(layer, layers);
        }
    }
}
