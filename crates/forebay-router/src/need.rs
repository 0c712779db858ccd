//! What a request needs, as far as placement is concerned: tokens, and who holds the blocks of its prompts.

use std::sync::Arc;

use forebay_flow::PromptIds;
use forebay_kv::{BlockHasher, CacheSalt, Lane};
use forebay_types::{BlockHash, TokenId};
use forebay_wire::{Ask, Generate, Prompt};

use crate::prefix::ModelPrefixes;
use crate::stand_in::stand_ins;

/// Prompts of one call whose blocks are hashed; the others count as not cached. A call with more is a batch job.
const PROMPTS_HASHED_MAX: usize = 16;

/// Tokens whose blocks are worked on in an I/O thread. Hashing takes 0.3 µs for each block of 16 with SHA
/// instructions, three times that without, and a look-up less: about 100 to 250 µs; more is moved away.
const INLINE_TOKENS_MAX: u32 = 4096;

#[derive(Default)]
pub(crate) struct Need {
    pub(crate) prompt_tokens: u32,
    /// Choices over all prompts.
    pub(crate) choices: u32,
    pub(crate) tokens_max: Option<u32>,
    /// The blocks of each prompt. Empty where nobody asks.
    chains: Arc<Vec<Vec<BlockHash>>>,
    /// The blocks are of ids that no replica ever reports.
    stand_ins: bool,
    /// Blocks that each replica of the fleet holds, over all prompts.
    pub(crate) matched: Vec<u32>,
}

impl Need {
    /// Without its blocks yet. All zeros for what computes nothing.
    pub(crate) fn of(ask: &Ask, ids: &PromptIds) -> Self {
        match ask {
            Ask::Generate(call) => Self {
                prompt_tokens: ids.tokens(),
                choices: call.n.saturating_mul(call.prompt.count() as u32),
                tokens_max: call.max_tokens,
                ..Self::default()
            },
            // Nothing of it is cached, and nothing is generated.
            Ask::Embed(_) => Self { prompt_tokens: ids.tokens(), choices: 1, ..Self::default() },
            Ask::Render(_)
            | Ask::Tokenize(_)
            | Ask::Detokenize(_)
            | Ask::TokenizerInfo
            | Ask::ListModels
            | Ask::GetModel(_) => Self::default(),
        }
    }

    /// Hashes the prompts' blocks and looks up who holds them, in the order of `lanes`.
    pub(crate) async fn look_up(
        &mut self,
        call: &Generate,
        ids: &PromptIds,
        block_tokens: u32,
        prefixes: &Arc<ModelPrefixes>,
        lanes: Vec<Lane>,
    ) {
        let salt = call.cache_salt.as_deref().map(CacheSalt::new);
        let (exact, estimated) = match ids {
            PromptIds::Exact { prompts, .. } => (Some(prompts.clone()), None),
            PromptIds::Estimated { .. } => (None, Some(call.prompt.clone())),
        };
        self.stand_ins = estimated.as_ref().is_some_and(|prompt| !matches!(prompt, Prompt::Tokens(_)));
        let prefixes = Arc::clone(prefixes);
        let work = move || {
            let prompts = exact.or_else(|| estimated.as_ref().map(stand_ins)).unwrap_or_default();
            let chains = chains(&prompts, block_tokens, salt);
            let matched = matched(&chains, &prefixes, &lanes);
            (Arc::new(chains), matched)
        };
        if let Some((chains, matched)) = self.compute(work).await {
            self.chains = chains;
            self.matched = matched;
        }
    }

    /// What is cached of this prompt can only be guessed: without its tokenizer, no event is about its blocks.
    pub(crate) fn has_stand_ins(&self) -> bool {
        self.stand_ins
    }

    /// Notes that the replica at `lane` is going to have these prompts cached: a guess, for one that doesn't tell.
    pub(crate) async fn guess_cached(&self, prefixes: &Arc<ModelPrefixes>, lane: Lane) {
        if self.chains.is_empty() {
            return;
        }
        let (chains, prefixes) = (Arc::clone(&self.chains), Arc::clone(prefixes));
        self.compute(move || chains.iter().for_each(|chain| prefixes.insert(lane, chain))).await;
    }

    /// Here, or off this thread where there is much to do.
    async fn compute<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        if self.prompt_tokens <= INLINE_TOKENS_MAX {
            return Some(work());
        }
        // A panic there is a defect, but a prompt without blocks can still be placed.
        tokio::task::spawn_blocking(work)
            .await
            .inspect_err(|error| tracing::error!(%error, "a prompt's blocks could not be worked on"))
            .ok()
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

fn matched(chains: &[Vec<BlockHash>], prefixes: &ModelPrefixes, lanes: &[Lane]) -> Vec<u32> {
    let mut blocks = vec![0u32; lanes.len()];
    for chain in chains {
        let matches = prefixes.matched(chain);
        for (blocks, &lane) in blocks.iter_mut().zip(lanes) {
            *blocks = blocks.saturating_add(matches.blocks(lane));
        }
    }
    blocks
}

#[cfg(test)]
mod tests {
    use forebay_flow::TokenizerId;

    use super::*;
    use crate::PrefixView;

    fn generate(salt: &str) -> Generate {
        let body = format!(r#"{{"model": "m", "prompt": ["p", "q"]{salt}}}"#).into();
        match forebay_wire::parse(&http::Method::POST, "/v1/completions", None, &body, None) {
            Ok(Ask::Generate(call)) => *call,
            other => panic!("{other:?}"),
        }
    }

    /// Both sides of the limit give the same; the long one is worked on in another thread.
    #[tokio::test]
    async fn blocks_are_found_over_all_prompts() {
        for tokens in [64, 8192] {
            let prefixes = PrefixView::new(10_000).model(&"m".into());
            let (a, b) = (prefixes.lane(&"a".into()), prefixes.lane(&"b".into()));
            let prompts: Vec<Arc<[TokenId]>> = vec![(0..tokens).collect(), (5..5 + tokens).collect()];
            let ids = PromptIds::Exact { tokenizer: TokenizerId([1; 32]), prompts };
            let need = async |salt: &str| {
                let call = generate(salt);
                let mut need = Need::of(&Ask::Generate(Box::new(call.clone())), &ids);
                need.look_up(&call, &ids, 16, &prefixes, vec![a, b]).await;
                need
            };
            let first = need("").await;
            assert_eq!((first.prompt_tokens, first.choices), (2 * tokens, 2));
            assert_eq!(first.matched, [0, 0]);
            first.guess_cached(&prefixes, b).await;
            assert_eq!(need("").await.matched, [0, 2 * tokens / 16]);
            assert_eq!(need(r#", "cache_salt": "s""#).await.matched, [0, 0]);
        }
    }
}
