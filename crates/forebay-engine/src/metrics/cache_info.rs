//! `vllm:cache_config_info`: how a KV cache is laid out, said by labels.

use std::collections::HashMap;
use std::sync::Arc;

use forebay_observe::metrics::IntGaugeVec;
use forebay_observe::{MetricError, Registry};
use parking_lot::Mutex;

/// Of vLLM's labels those that say something here. `engine` is not its configuration's, and stands last.
const LABELS: [&str; 16] = [
    "block_size",
    "cache_dtype",
    "cache_hit_alignment_tokens",
    "effective_attention_block_size",
    "enable_prefix_caching",
    "hash_block_size",
    "is_attention_free",
    "kv_cache_max_concurrency",
    "kv_cache_memory_bytes",
    "kv_cache_size_tokens",
    "kv_offloading_size",
    "num_cpu_blocks",
    "num_gpu_blocks",
    "num_gpu_blocks_override",
    "prefix_caching_hash_algo",
    "engine",
];

/// How an engine's KV cache is laid out.
#[derive(Debug, Clone, Copy)]
pub struct KvInfo {
    pub block_size: u32,
    pub blocks: u32,
    /// `engine.num-gpu-blocks-override`.
    pub blocks_override: Option<u32>,
    /// Of all blocks.
    pub bytes: u64,
    pub prefix_caching: bool,
    /// Tokens of one sequence at most.
    pub model_len: u32,
}

impl KvInfo {
    /// As Python prints them.
    fn values(&self) -> [String; LABELS.len()] {
        let Self { block_size, blocks, blocks_override, bytes, prefix_caching, model_len } = *self;
        let none = || "None".to_owned();
        let flag = |is: bool| if is { "True" } else { "False" }.to_owned();
        let block = block_size.to_string();
        let per_sequence = model_len.div_ceil(block_size.max(1)).max(1);
        [
            block.clone(),
            "float16".to_owned(),
            block.clone(),
            block.clone(),
            flag(prefix_caching),
            block,
            flag(false),
            format!("{:?}", f64::from(blocks) / f64::from(per_sequence)),
            bytes.to_string(),
            (u64::from(blocks) * u64::from(block_size)).to_string(),
            none(),
            none(),
            blocks.to_string(),
            blocks_override.map_or_else(none, |blocks| blocks.to_string()),
            "sha256_cbor".to_owned(),
            "0".to_owned(),
        ]
    }
}

/// The caches of the process. As in vLLM, their series do not name the model: equal ones are one.
#[derive(Clone)]
pub(super) struct CacheInfo {
    family: IntGaugeVec,
    by_model: Arc<Mutex<HashMap<String, [String; LABELS.len()]>>>,
}

impl CacheInfo {
    pub fn register(registry: &Registry) -> Result<Self, MetricError> {
        let help = "Information of the LLMEngine CacheConfig";
        Ok(Self {
            family: registry.gauges("vllm:cache_config_info", help, &LABELS)?,
            by_model: Arc::default(),
        })
    }

    pub fn add(&self, model: &str, kv: &KvInfo) {
        let values = kv.values();
        // Held over all of it: another model with such a cache may be going at the same time.
        let mut by_model = self.by_model.lock();
        self.take_out(&mut by_model, model);
        self.family.with_label_values(&values).set(1);
        by_model.insert(model.to_owned(), values);
    }

    /// A model is gone, and with it what only its cache was like.
    pub fn remove(&self, model: &str) {
        self.take_out(&mut self.by_model.lock(), model);
    }

    fn take_out(&self, by_model: &mut HashMap<String, [String; LABELS.len()]>, model: &str) {
        let Some(values) = by_model.remove(model) else { return };
        if !by_model.values().any(|others| *others == values) {
            // It is there: whatever is in the map was set.
            let _ = self.family.remove_label_values(&values);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_caches_that_are_there_are_told() {
        let registry = Registry::new();
        let info = CacheInfo::register(&registry).expect("registers once");
        let kv = |blocks| KvInfo {
            block_size: 16,
            blocks,
            blocks_override: None,
            bytes: 4096,
            prefix_caching: true,
            model_len: 100,
        };
        let check = |expect: &[&str]| {
            let text = registry.render();
            let told: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
            assert_eq!(told.len(), expect.len(), "{text}");
            assert!(expect.iter().all(|label| told.iter().any(|line| line.contains(label))), "{text}");
        };
        info.add("a", &kv(7));
        check(&["kv_cache_max_concurrency=\"1.0\""]);
        info.add("b", &kv(7));
        check(&["num_gpu_blocks=\"7\""]);
        info.add("a", &kv(14));
        check(&["num_gpu_blocks=\"7\"", "kv_cache_size_tokens=\"224\""]);
        info.remove("b");
        check(&["kv_cache_max_concurrency=\"2.0\""]);
        info.remove("b");
        info.remove("a");
        check(&[]);
    }
}
