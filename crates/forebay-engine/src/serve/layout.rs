//! How a model and its KV cache are laid out.

use std::path::Path;

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
}

impl Layout {
    /// `cores`: of the machine.
    pub(super) fn plan(
        config: &EngineConfig,
        file: &ModelFile,
        path: &Path,
        cores: usize,
    ) -> Result<Self, StartError> {
        let spec = file.spec().map_err(|source| StartError::Spec { path: path.into(), source })?;
        let block_size = config.block_size as usize;
        let ranks = config.ranks();
        ranks.check(&spec).map_err(|source| StartError::Ranks { path: path.into(), source })?;
        // One without a core of its own would only keep the others waiting.
        if ranks.count() > cores {
            return Err(StartError::Cores { ranks, cores });
        }
        let copies = ranks.kv_copies(&spec) as u64;
        let wanted = spec.blocks_for_memory(config.kv_cache_memory.bytes() / copies, block_size);
        if wanted == 0 {
            let needed = forebay_config::ByteSize::new(copies * spec.memory_for_blocks(1, block_size));
            return Err(StartError::KvTooSmall { given: config.kv_cache_memory, needed });
        }
        if let Some(asked) = config.max_model_len
            && asked as usize > spec.context_len
        {
            return Err(StartError::ModelLen { asked, trained: spec.context_len });
        }
        let positions_max = config.max_model_len.map_or(spec.context_len, |n| n as usize);
        // No more blocks than all running sequences could fill.
        let useful = positions_max.div_ceil(block_size).saturating_mul(config.max_num_seqs as usize);
        let blocks = config.num_gpu_blocks_override.map_or(wanted.min(useful), |blocks| blocks as usize);
        // No sequence can be longer than the cache and its last token, which needs no place: tables of rotations for a
        // trained context of 10^6 tokens would be memory for nothing.
        let positions_max = positions_max.min(blocks * block_size + 1);
        Ok(Self { spec, ranks, block_size, blocks, positions_max })
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
    use forebay_config::ByteSize;

    use super::*;
    use crate::model::tiny::TinyLlama;

    /// Two layers of 4 query heads and 2 KV heads of 16, which is 256 bytes of KV a token; on five cores.
    fn plan(config: &EngineConfig) -> Result<Layout, StartError> {
        let file = ModelFile::from_bytes(TinyLlama::default().to_gguf()).expect("is a model");
        Layout::plan(config, &file, Path::new("tiny.gguf"), 5)
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
    }

    #[test]
    fn ranks_that_share_a_head_share_the_memory() {
        let kv_cache_memory = ByteSize::new(100 * 16 * 256);
        let blocks = |tensor_parallel_size| {
            let config = EngineConfig { kv_cache_memory, tensor_parallel_size, ..EngineConfig::default() };
            let layout = plan(&config).expect("fits");
            assert_eq!(layout.kv_bytes(), kv_cache_memory.bytes());
            layout.blocks
        };
        // Four ranks for two KV heads: each head stands twice.
        assert_eq!([1, 2, 4].map(blocks), [100, 100, 50]);
    }
}
