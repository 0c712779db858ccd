//! Why an engine can't be started.

use std::io;
use std::path::PathBuf;

use forebay_tokens::TextModelError;

use super::hf_text::HfTextError;
use super::template::ChatTemplateError;
use super::text::TextError;
use crate::config::EngineConfigError;
use crate::exec::BuildError;
use crate::generation::GenerationError;
use crate::kv_events::KvEventsError;
use crate::model::{EncoderError, OpenError, Ranks, RanksError, SpecError};

/// Why an engine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] EngineConfigError),
    #[error(transparent)]
    Open(Box<OpenError>),
    #[error("the model in {} can't be served", path.display())]
    Spec { path: PathBuf, source: SpecError },
    #[error("the model in {} can't be served", path.display())]
    Text { path: PathBuf, source: TextError },
    #[error("the model in {} can't be served", path.display())]
    HfText { path: PathBuf, source: Box<HfTextError> },
    #[error(
        "the sampling defaults for the model in {} can't be used; a value that is neither `auto` nor `vllm` is their path, \
         and `engine.generation-config: vllm` leaves them out",
        path.display()
    )]
    Generation { path: PathBuf, source: Box<GenerationError> },
    #[error("the model in {} can't be loaded", path.display())]
    Build { path: PathBuf, source: BuildError },
    #[error("the encoder in {} can't be served", path.display())]
    Encoder { path: PathBuf, source: Box<EncoderError> },
    /// `key` with its section.
    #[error("`{key}` can't be had with an encoder; leave it out")]
    NotForEncoders { key: &'static str },
    #[error("can't read {}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("the tokenizer in {} can't be used", path.display())]
    Tokenizer { path: PathBuf, source: Box<TextModelError> },
    #[error(transparent)]
    ChatTemplate(#[from] ChatTemplateError),
    #[error(
        "`engine.kv-cache-memory` ({given}) is less than one block of this model: give it {needed} or more"
    )]
    KvTooSmall { given: forebay_config::ByteSize, needed: forebay_config::ByteSize },
    #[error(
        "one request of `engine.max-model-len` ({asked}) needs a KV cache of {needed}, more than the {given} that there is; \
         give `engine.kv-cache-memory` that much, or lower `engine.max-model-len` to {fits}"
    )]
    KvTooSmallForLen {
        asked: u32,
        given: forebay_config::ByteSize,
        needed: forebay_config::ByteSize,
        /// The longest that the cache has room for.
        fits: usize,
    },
    #[error(
        "`engine.max-model-len` is {asked}, but the model was trained for {trained} tokens; lower it or leave it out"
    )]
    ModelLen { asked: u32, trained: usize },
    #[error(
        "not enough memory: the model needs about {weights} and `engine.kv-cache-memory` is {kv}, but only {available} \
         is available; lower `engine.kv-cache-memory` or use a smaller model"
    )]
    Memory {
        weights: forebay_config::ByteSize,
        kv: forebay_config::ByteSize,
        available: forebay_config::ByteSize,
    },
    #[error("the model in {} can't be divided among ranks", path.display())]
    Ranks { path: PathBuf, source: RanksError },
    #[error(
        "`engine.tensor-parallel-size` ({}) times `engine.pipeline-parallel-size` ({}) is more ranks than the machine has \
         cores ({cores}); lower one of them",
        ranks.tensor, ranks.pipeline
    )]
    Cores { ranks: Ranks, cores: usize },
    #[error(transparent)]
    KvEvents(#[from] KvEventsError),
    #[error("the engine's thread can't be started")]
    Thread(#[source] std::io::Error),
}

impl From<OpenError> for StartError {
    fn from(error: OpenError) -> Self {
        Self::Open(Box::new(error))
    }
}

impl StartError {
    /// The configuration key that is at fault, or is closest to it.
    pub fn at(&self) -> &'static str {
        match self {
            Self::Open(_)
            | Self::Spec { .. }
            | Self::Text { .. }
            | Self::HfText { .. }
            | Self::Build { .. }
            | Self::Encoder { .. }
            | Self::File { .. }
            | Self::Tokenizer { .. } => "engine.model",
            Self::KvTooSmall { .. } | Self::Memory { .. } => "engine.kv-cache-memory",
            Self::Generation { .. } => "engine.generation-config",
            Self::ModelLen { .. } | Self::KvTooSmallForLen { .. } => "engine.max-model-len",
            Self::Ranks { source: RanksError::Layers { .. }, .. } => "engine.pipeline-parallel-size",
            Self::Cores { ranks: Ranks { tensor: 1, .. }, .. } => "engine.pipeline-parallel-size",
            Self::Ranks { .. } | Self::Cores { .. } => "engine.tensor-parallel-size",
            Self::NotForEncoders { key } => key,
            Self::KvEvents(_) => "engine.kv-events",
            Self::ChatTemplate(_) => "engine.chat-template",
            Self::Config(_) | Self::Thread(_) => "engine",
        }
    }
}
