//! Texts to token ids.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use forebay_flow::PromptIds;
use forebay_tokens::{HfFiles, Special, TextModel};
use forebay_types::{Fault, TokenId};
use forebay_wire::Prompt;

use crate::serve::StartError;

/// The largest published tokenizers have some 30 MB.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// The tokenizer of a directory. Its own truncation and padding are for training and don't count.
pub(super) fn read(directory: &Path) -> Result<TextModel, StartError> {
    let tokenizer = file(directory, "tokenizer.json")?;
    let config = match file(directory, "tokenizer_config.json") {
        Err(StartError::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => None,
        read => Some(read?),
    };
    let files = HfFiles { tokenizer: &tokenizer, config: config.as_deref(), ..HfFiles::default() };
    TextModel::from_hf(files)
        .map_err(|source| StartError::Tokenizer { path: directory.into(), source: source.into() })
}

fn file(directory: &Path, name: &str) -> Result<Vec<u8>, StartError> {
    let path = directory.join(name);
    forebay_config::read_limited(&path, FILE_BYTES_MAX).map_err(|source| StartError::File { path, source })
}

/// `special`: put in what the model wants around a text. Control tokens that a text spells out are taken as such, as in
/// vLLM; token ids are taken as they are.
pub(super) fn encode(
    text: &TextModel,
    lower_case: bool,
    input: &Prompt,
    special: bool,
) -> Result<PromptIds, Fault> {
    let prompts: Vec<Arc<[TokenId]>> = match input {
        Prompt::Text(texts) => texts
            .iter()
            .map(|one| {
                let special = Special { add: special, parse: true };
                Ok(text.encode_text(&cased(one, lower_case), special)?.into())
            })
            .collect::<Result<_, Fault>>()?,
        Prompt::Tokens(prompts) => prompts.iter().map(|ids| ids.as_slice().into()).collect(),
        // Counted only, for a request that is refused.
        Prompt::Chat { .. } => return Ok(PromptIds::estimate(input)),
    };
    Ok(PromptIds::Exact { tokenizer: text.tokenizer().id(), prompts })
}

pub(super) fn cased(text: &str, lower_case: bool) -> Cow<'_, str> {
    if lower_case { text.to_lowercase().into() } else { text.into() }
}

/// The first `length` ids, of which the last are still `keep` where there is room for them: what Hugging Face's
/// tokenizers leave of a text that is too long.
pub(super) fn truncated(ids: &[TokenId], length: usize, keep: &[TokenId]) -> Arc<[TokenId]> {
    match length.checked_sub(keep.len()) {
        Some(head @ 1..) if ids.ends_with(keep) => [&ids[..head], keep].concat().into(),
        _ => ids[..length].into(),
    }
}
