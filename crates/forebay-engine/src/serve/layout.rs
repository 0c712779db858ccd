//! How a model's KV cache is laid out.

use std::path::Path;

use super::start_error::StartError;
use crate::config::EngineConfig;
use crate::model::{ModelFile, ModelSpec};

/// How much of what a model file and a configuration give.
pub(super) struct Layout {
    pub spec: ModelSpec,
    pub block_size: usize,
    pub blocks: usize,
    pub positions_max: usize,
}

impl Layout {
    pub(super) fn plan(config: &EngineConfig, file: &ModelFile, path: &Path) -> Result<Self, StartError> {
        let spec = ModelSpec::from_gguf(file.gguf())
            .map_err(|source| StartError::Spec { path: path.into(), source })?;
        let block_size = config.block_size as usize;
        let wanted = spec.blocks_for_memory(config.kv_cache_memory.bytes(), block_size);
        if wanted == 0 {
            let needed = forebay_config::ByteSize::new(spec.memory_for_blocks(1, block_size));
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
        Ok(Self { spec, block_size, blocks: wanted.min(useful), positions_max })
    }
}
