//! A chat template from the configuration, in place of the model's own.

use std::path::PathBuf;

use forebay_tokens::{TemplateError, TextModel};

use crate::small_file::{self, SmallFileError};

/// Templates of models have some ten kilobytes.
const TEMPLATE_BYTES_MAX: u64 = 1024 * 1024;

/// Why a configured chat template can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ChatTemplateError {
    #[error("the chat template can't be read")]
    Read(#[from] SmallFileError),
    #[error("the chat template `{}` is not UTF-8", path.display())]
    Utf8 { path: PathBuf, source: std::str::Utf8Error },
    #[error("`engine.chat-template` is not a template that can be used")]
    Template(#[from] TemplateError),
}

/// `text` with the configured template. As in vLLM, what has Jinja's braces is the template itself, else it is a path.
pub(super) fn with_template(
    text: TextModel,
    configured: Option<&str>,
) -> Result<TextModel, ChatTemplateError> {
    let Some(configured) = configured else { return Ok(text) };
    if configured.contains("{{") || configured.contains("{%") {
        return Ok(TextModel::new(text.tokenizer().clone(), Some(configured))?);
    }
    let path = PathBuf::from(configured);
    let template = small_file::read(&path, TEMPLATE_BYTES_MAX)?;
    let template =
        std::str::from_utf8(&template).map_err(|source| ChatTemplateError::Utf8 { path, source })?;
    Ok(TextModel::new(text.tokenizer().clone(), Some(template))?)
}
