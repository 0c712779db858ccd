//! A model's text side as one value: tokenizer and chat template.

use std::sync::Arc;

use forebay_types::{Class, Classify, TokenId};

use crate::detokenize::Detokenizer;
use crate::json::{TemplateText, TokenizerConfig};
use crate::template::{ChatPrompt, ChatTemplate, TemplateError, TokenTexts};
use crate::tokenizer::{EncodeError, Special, Tokenizer};
use crate::vocab::BuildError;

/// Why messages could not become ids.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error(transparent)]
    Encode(#[from] EncodeError),
}

impl Classify for ChatError {
    fn class(&self) -> Class {
        match self {
            Self::Template(error) => error.class(),
            Self::Encode(error) => error.class(),
        }
    }

    fn param(&self) -> Option<&str> {
        match self {
            Self::Template(error) => error.param(),
            Self::Encode(error) => error.param(),
        }
    }
}

/// The files of a Hugging Face model that concern text, as bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct HfFiles<'a> {
    /// `tokenizer.json`
    pub tokenizer: &'a [u8],
    /// `tokenizer_config.json`
    pub config: Option<&'a [u8]>,
    /// `special_tokens_map.json`: roles of tokens that `tokenizer_config.json` doesn't name.
    pub special_tokens: Option<&'a [u8]>,
    /// `generation_config.json`, or another with its `eos_token_id`.
    pub generation: Option<&'a [u8]>,
    /// `chat_template.jinja`; where it exists it goes before the one in `tokenizer_config.json`.
    pub chat_template: Option<&'a str>,
}

/// Tokenizer and chat template of one model. A cheap clone.
#[derive(Debug, Clone)]
pub struct TextModel {
    tokenizer: Tokenizer,
    template: Arc<ChatTemplate>,
}

/// Why a model's text side could not be built.
#[derive(Debug, thiserror::Error)]
pub enum TextModelError {
    #[error(transparent)]
    Tokenizer(#[from] BuildError),
    #[error(transparent)]
    Template(#[from] TemplateError),
}

impl Classify for TextModelError {
    fn class(&self) -> Class {
        match self {
            Self::Tokenizer(error) => error.class(),
            Self::Template(error) => error.class(),
        }
    }
}

impl TextModel {
    /// `chat_template`: the model's own (`tokenizer.chat_template` of a GGUF), or ChatML if it has none.
    pub fn new(tokenizer: Tokenizer, chat_template: Option<&str>) -> Result<Self, TemplateError> {
        let text = |id: Option<TokenId>| id.and_then(|id| tokenizer.token_piece(id)).map(str::to_owned);
        let tokens = TokenTexts {
            bos: text(tokenizer.bos()),
            eos: text(tokenizer.eos()),
            unk: text(tokenizer.unk()),
            pad: text(tokenizer.pad()),
        };
        let template = Arc::new(ChatTemplate::with_tokens(chat_template, tokens)?);
        Ok(Self { tokenizer, template })
    }

    pub fn from_hf(files: HfFiles<'_>) -> Result<Self, TextModelError> {
        let config = TokenizerConfig::read(files.config, files.special_tokens)?;
        let tokenizer = Tokenizer::with_config(files.tokenizer, &config, files.generation)?;
        let in_config = match &config.chat_template {
            Some(TemplateText::One(template)) => Some(template.as_str()),
            Some(TemplateText::Named(list)) => {
                list.iter().find(|named| named.name == "default").map(|named| named.template.as_str())
            }
            None => None,
        };
        Ok(Self::new(tokenizer, files.chat_template.or(in_config))?)
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// Ids of a conversation.
    ///
    /// Only the template's own text makes control tokens; in messages, tools, documents and template arguments,
    /// `<|im_end|>` is six harmless tokens of plain text (see `guard.rs`). For conversations without such text the
    /// ids are those of vLLM and Transformers. Pure.
    pub fn encode_chat(&self, prompt: &ChatPrompt<'_>) -> Result<Vec<TokenId>, ChatError> {
        let rendered = self.template.render_guarded(prompt, Some(self.tokenizer.guard()))?;
        Ok(self.tokenizer.encode_rendered(&rendered)?)
    }

    /// Ids of a text; for the raw prompt of a completions call use [`Special::ALL`], as vLLM does.
    pub fn encode_text(&self, text: &str, special: Special) -> Result<Vec<TokenId>, EncodeError> {
        self.tokenizer.encode(text, special)
    }

    pub fn detokenizer(&self, skip_special: bool) -> Detokenizer {
        Detokenizer::new(self.tokenizer.clone(), skip_special)
    }
}
