//! How a model and its KV cache are laid out.

use std::path::Path;

use forebay_config::ByteSize;

use super::memory::{available_memory, packed_bytes};
use super::start_error::StartError;
use crate::config::EngineConfig;
use crate::model::{ModelFile, ModelSpec, Ranks};

/// How much of what a model file and a configuration give.
pub(super) struct Layout {
    pub spec: ModelSpec,
    pub ranks: Ranks,
    pub block_size: usize,
    pub blocks: usize,
    /// Tokens of one sequence at most.
    pub positions_max: usize,
    /// What the model allows, where the cache is too small for it.
    pub cut_from: Option<usize>,
}

/// What a layout has to fit.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    pub cores: usize,
    /// Memory for weights and KV cache in bytes, where the system tells.
    pub memory: Option<u64>,
}

impl Room {
    /// Of this machine, now.
    pub fn here() -> Self {
        Self { cores: cores(), memory: available_memory() }
    }
}

/// The largest KV cache that is made without being asked for.
const KV_BYTES_DEFAULT_MAX: u64 = 4 << 30;
/// Where the system does not tell what it has.
const MEMORY_UNKNOWN: u64 = 4 << 30;

/// How large a KV cache is where nobody says: a quarter of what is left beside the weights, up to a limit, but as much as
/// `one` whole request needs where that is no more than half.
fn default_kv_bytes(left: u64, one: u64) -> u64 {
    (left / 4).min(KV_BYTES_DEFAULT_MAX).max(one.min(left / 2))
}

impl Layout {
    pub(super) fn plan(
        config: &EngineConfig,
        file: &ModelFile,
        path: &Path,
        room: Room,
    ) -> Result<Self, StartError> {
        let spec = file.spec().map_err(|source| StartError::Spec { path: path.into(), source })?;
        let block_size = config.block_size as usize;
        let ranks = config.ranks();
        ranks.check(&spec).map_err(|source| StartError::Ranks { path: path.into(), source })?;
        // One without a core of its own would only keep the others waiting.
        if ranks.count() > room.cores {
            return Err(StartError::Cores { ranks, cores: room.cores });
        }
        if let Some(asked) = config.max_model_len
            && asked as usize > spec.context_len
        {
            return Err(StartError::ModelLen { asked, trained: spec.context_len });
        }
        let positions_max = config.max_model_len.map_or(spec.context_len, |n| n as usize);
        let copies = ranks.kv_copies(&spec) as u64;
        let bytes_for = |blocks| copies * spec.memory_for_blocks(blocks, block_size);
        // The last token is not computed on, so it needs no place.
        let one = (positions_max - 1).div_ceil(block_size);
        let bytes = config.kv_cache_memory.map_or_else(
            || {
                let left = room.memory.unwrap_or(MEMORY_UNKNOWN).saturating_sub(packed_bytes(file));
                default_kv_bytes(left, bytes_for(one))
            },
            ByteSize::bytes,
        );
        let wanted = spec.blocks_for_memory(bytes / copies, block_size);
        if wanted == 0 {
            let (given, needed) = (ByteSize::new(bytes), ByteSize::new(bytes_for(1)));
            return Err(StartError::KvTooSmall { given, needed });
        }
        // No more blocks than all running sequences could fill.
        let useful = positions_max.div_ceil(block_size).saturating_mul(config.max_num_seqs as usize);
        let blocks = config.num_gpu_blocks_override.map_or(wanted.min(useful), |blocks| blocks as usize);
        // No sequence can be longer than the cache and its last token: tables of rotations for a trained context of 10^6
        // tokens would be memory for nothing.
        let fits = blocks * block_size + 1;
        if let Some(asked) = config.max_model_len.filter(|&asked| asked as usize > fits) {
            let (given, needed) = (ByteSize::new(bytes_for(blocks)), ByteSize::new(bytes_for(one)));
            return Err(StartError::KvTooSmallForLen { asked, given, needed, fits });
        }
        let cut_from = (positions_max > fits).then_some(positions_max);
        Ok(Self { spec, ranks, block_size, blocks, positions_max: positions_max.min(fits), cut_from })
    }

    /// Memory that the KV cache of all ranks takes, in bytes.
    pub(super) fn kv_bytes(&self) -> u64 {
        self.ranks.kv_copies(&self.spec) as u64 * self.spec.memory_for_blocks(self.blocks, self.block_size)
    }
}

pub(super) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tiny::TinyLlama;

    /// Two layers of 4 query heads and 2 KV heads of 16, which is 256 bytes of KV a token; on five cores.
    fn plan(config: &EngineConfig) -> Result<Layout, StartError> {
        let file = ModelFile::from_bytes(TinyLlama::default().to_gguf()).expect("is a model");
        Layout::plan(config, &file, Path::new("tiny.gguf"), Room { cores: 5, memory: Some(1 << 30) })
    }

    #[test]
    fn divisions_that_are_not_possible_are_refused_at_their_key() {
        let check = |(tensor, pipeline), at: &str, expect: &str| {
            let config = EngineConfig {
                tensor_parallel_size: tensor,
                pipeline_parallel_size: pipeline,
                ..EngineConfig::default()
            };
            let error = plan(&config).err().expect("is refused");
            let source = std::error::Error::source(&error).map_or_else(String::new, |why| format!(": {why}"));
            assert_eq!((error.at(), format!("{error}{source}").as_str()), (at, expect));
        };
        check(
            (3, 1),
            "engine.tensor-parallel-size",
            "the model in tiny.gguf can't be divided among ranks: Total number of attention heads (4) must be divisible \
             by tensor parallel size (3).",
        );
        check(
            (1, 3),
            "engine.pipeline-parallel-size",
            "the model in tiny.gguf can't be divided among ranks: the model's 2 layers can't be divided into 3 pipeline \
             stages",
        );
        check(
            (4, 2),
            "engine.tensor-parallel-size",
            "`engine.tensor-parallel-size` (4) times `engine.pipeline-parallel-size` (2) is more ranks than the machine \
             has cores (5); lower one of them",
        );
    }

    #[test]
    fn positions_are_those_that_the_cache_can_hold() {
        let check = |num_gpu_blocks_override, max_model_len, expect: usize| {
            let config = EngineConfig { num_gpu_blocks_override, max_model_len, ..EngineConfig::default() };
            assert_eq!(plan(&config).expect("fits").positions_max, expect);
        };
        check(None, None, 1024);
        check(Some(2), None, 33);
        check(Some(2), Some(20), 20);
        check(Some(2), Some(33), 33);
    }

    #[test]
    fn a_length_that_was_asked_for_is_kept_or_refused() {
        let config = EngineConfig {
            max_model_len: Some(34),
            kv_cache_memory: Some(ByteSize::new(2 * 16 * 256)),
            ..EngineConfig::default()
        };
        let error = plan(&config).err().expect("is refused");
        assert_eq!(error.at(), "engine.max-model-len");
        assert_eq!(
            error.to_string(),
            "one request of `engine.max-model-len` (34) needs a KV cache of 12KiB, more than the 8KiB that there is; give \
             `engine.kv-cache-memory` that much, or lower `engine.max-model-len` to 33"
        );
        let own = plan(&EngineConfig { max_model_len: None, ..config }).expect("the model's own is cut");
        assert_eq!((own.positions_max, own.cut_from), (33, Some(1024)));
    }

    #[test]
    fn the_cache_is_as_large_as_the_machine_allows() {
        let check = |left: u64, one: u64, expect: u64| assert_eq!(default_kv_bytes(left, one), expect);
        const GIB: u64 = 1 << 30;
        check(8 * GIB, GIB, 2 * GIB);
        check(64 * GIB, GIB, 4 * GIB);
        check(64 * GIB, 16 * GIB, 16 * GIB);
        check(8 * GIB, 16 * GIB, 4 * GIB);
        check(0, GIB, 0);
        // All that 128 sequences of 1024 tokens can use is less than what there is.
        let layout = plan(&EngineConfig::default()).expect("fits");
        assert_eq!(layout.kv_bytes(), 128 * 1024 * 256);
        assert_eq!(layout.cut_from, None);
    }

    #[test]
    fn ranks_that_share_a_head_share_the_memory() {
        let kv_cache_memory = Some(ByteSize::new(100 * 16 * 256));
        let blocks = |tensor_parallel_size| {
            let config = EngineConfig { kv_cache_memory, tensor_parallel_size, ..EngineConfig::default() };
            let layout = plan(&config).expect("fits");
            assert_eq!(Some(layout.kv_bytes()), kv_cache_memory.map(ByteSize::bytes));
            layout.blocks
        };
        // Four ranks for two KV heads: each head stands twice.
        assert_eq!([1, 2, 4].map(blocks), [100, 100, 50]);
    }
}
