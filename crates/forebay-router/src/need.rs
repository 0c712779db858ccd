//! What a request needs, as far as placement is concerned: tokens, and the hashes of its blocks.

use std::sync::Arc;

use forebay_flow::PromptIds;
use forebay_kv::{BlockHasher, CacheSalt};
use forebay_types::{BlockHash, TokenId};
use forebay_wire::{Ask, Generate};

/// Prompts of one call whose blocks are hashed; the others count as not cached. A call with more is a batch job.
const PROMPTS_HASHED_MAX: usize = 16;

/// Tokens that are hashed on an I/O thread. 0.3 µs for each block of 16 with SHA instructions, three times that
/// without: 80 to 240 µs; more is moved away.
const HASHED_INLINE_MAX: u32 = 4096;

#[derive(Default)]
pub(crate) struct Need {
    pub(crate) prompt_tokens: u32,
    /// Choices over all prompts.
    pub(crate) choices: u32,
    pub(crate) tokens_max: Option<u32>,
    /// The chain of each prompt. Empty where ids are unknown or nobody asks.
    pub(crate) chains: Vec<Vec<BlockHash>>,
}

impl Need {
    /// Without hashes yet. All zeros for what computes nothing.
    pub(crate) fn of(ask: &Ask, ids: &PromptIds) -> Self {
        match ask {
            Ask::Generate(call) => Self {
                prompt_tokens: ids.tokens(),
                choices: call.n.saturating_mul(call.prompt.count() as u32),
                tokens_max: call.max_tokens,
                chains: Vec::new(),
            },
            Ask::Tokenize(_) | Ask::Detokenize(_) | Ask::ListModels | Ask::GetModel(_) => Self::default(),
        }
    }

    /// Hashes the prompts' blocks, off this thread where there are many.
    pub(crate) async fn hash(&mut self, call: &Generate, ids: &PromptIds, block_tokens: u32) {
        let PromptIds::Exact { prompts, .. } = ids else { return };
        let salt = call.cache_salt.as_deref().map(CacheSalt::new);
        if self.prompt_tokens <= HASHED_INLINE_MAX {
            self.chains = chains(prompts, block_tokens, salt);
            return;
        }
        let prompts = prompts.clone();
        // A panic there is a defect, but a prompt without hashes can still be placed.
        match tokio::task::spawn_blocking(move || chains(&prompts, block_tokens, salt)).await {
            Ok(chains) => self.chains = chains,
            Err(error) => tracing::error!(%error, "hashing a prompt failed"),
        }
    }
}

fn chains(prompts: &[Arc<[TokenId]>], block_tokens: u32, salt: Option<CacheSalt>) -> Vec<Vec<BlockHash>> {
    let chain = |ids: &Arc<[TokenId]>| {
        let mut hasher = BlockHasher::new(block_tokens as usize, salt.clone());
        hasher.extend(ids);
        hasher.hashes().to_vec()
    };
    prompts.iter().take(PROMPTS_HASHED_MAX).map(chain).collect()
}
