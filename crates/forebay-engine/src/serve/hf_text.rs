//! The text side of a model from the files of a Hugging Face directory.

use std::path::{Path, PathBuf};

use forebay_tokens::{HfFiles, TextModel, TextModelError};

use crate::small_file::{self, SmallFileError};

/// Gemma's `tokenizer.json`, one of the largest, has 33 MB.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
/// Of each other file. `tokenizer_config.json` lists added tokens: Gemma's has 1.2 MB.
pub(super) const FILE_BYTES_MAX: u64 = 16 << 20;
/// What a directory says of its tokenizer.
pub(super) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// Why the tokenizer or the chat template of a directory can't be used.
#[derive(Debug, thiserror::Error)]
pub enum HfTextError {
    #[error("{} is not there; a model without it can't be served", path.display())]
    NoTokenizer { path: PathBuf },
    #[error("a file of the tokenizer can't be read")]
    Read(#[from] SmallFileError),
    #[error("`{TOKENIZER_CONFIG}` is not as it should be")]
    Config(#[source] serde_json::Error),
    #[error("`chat_template.jinja` is not UTF-8")]
    Utf8(#[source] std::str::Utf8Error),
    #[error("the tokenizer in the model's directory can't be used")]
    Text(#[from] TextModelError),
}

/// Reads `tokenizer.json` and, where they are, the files that say what its tokens are for.
pub(crate) fn text_model(directory: &Path) -> Result<TextModel, HfTextError> {
    let path = directory.join("tokenizer.json");
    let Some(tokenizer) = small_file::read_if_there(&path, TOKENIZER_BYTES_MAX)? else {
        return Err(HfTextError::NoTokenizer { path });
    };
    let file = |name: &str| small_file::read_if_there(&directory.join(name), FILE_BYTES_MAX);
    let (config, special_tokens) = (file(TOKENIZER_CONFIG)?, file("special_tokens_map.json")?);
    let (generation, template) = (file("generation_config.json")?, file("chat_template.jinja")?);
    // What ends a generation stands in either; the one that is about generating goes first, as in transformers.
    let generation = match generation {
        Some(generation) => Some(generation),
        None => file(crate::model::CONFIG_FILE)?,
    };
    let chat_template = template.as_deref().map(std::str::from_utf8).transpose();
    Ok(TextModel::from_hf(HfFiles {
        tokenizer: &tokenizer,
        config: config.as_deref(),
        special_tokens: special_tokens.as_deref(),
        generation: generation.as_deref(),
        chat_template: chat_template.map_err(HfTextError::Utf8)?,
    })?)
}
