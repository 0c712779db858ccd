//! A chat template from the configuration, in place of the model's own.

use std::io::Read;
use std::path::PathBuf;

use forebay_tokens::{TemplateError, TextModel};

/// Templates of models have some ten kilobytes.
const TEMPLATE_BYTES_MAX: u64 = 1024 * 1024;

/// Why a configured chat template can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ChatTemplateError {
    #[error("the chat template `{}` can't be read", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("the chat template `{}` is larger than {TEMPLATE_BYTES_MAX} bytes", path.display())]
    TooLarge { path: PathBuf },
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
    let mut template = String::new();
    let read = std::fs::File::open(&path)
        .and_then(|file| file.take(TEMPLATE_BYTES_MAX + 1).read_to_string(&mut template));
    match read {
        Ok(bytes) if bytes as u64 > TEMPLATE_BYTES_MAX => Err(ChatTemplateError::TooLarge { path }),
        Ok(_) => Ok(TextModel::new(text.tokenizer().clone(), Some(&template))?),
        Err(source) => Err(ChatTemplateError::Unreadable { path, source }),
    }
}
