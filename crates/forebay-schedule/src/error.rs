//! Why a sequence is refused.

use forebay_types::{Blame, Class, Classify, Code, Retry};

use crate::SeqId;

/// Why a sequence was not queued. Nothing has changed in the scheduler.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    #[error(
        "the engine's queue is full: {limit} requests are waiting, which is `engine.max-num-queued-reqs`"
    )]
    QueueFull { limit: u32 },
    #[error(
        "the engine's queue is full: {waiting} prompt tokens are waiting, `engine.max-num-queued-tokens` is {limit}"
    )]
    QueueTokensFull { waiting: u64, limit: u64 },
    #[error(
        "the prompt has {prompt_tokens} tokens; with at least one to generate, the model's limit is {limit}"
    )]
    PromptTooLong { prompt_tokens: usize, limit: u32 },
    #[error(
        "{tokens} tokens (prompt and max_tokens) need more KV cache than the engine has: it holds {limit} tokens"
    )]
    NeverFits { tokens: u64, limit: u64 },
    #[error("the prompt is empty")]
    EmptyPrompt,
    #[error("sequence {} exists already", .id.0)]
    DuplicateId { id: SeqId },
}

impl Classify for AddError {
    fn class(&self) -> Class {
        match self {
            // Nothing was computed; another replica may have room.
            Self::QueueFull { .. } | Self::QueueTokensFull { .. } => {
                Class::new(Code::Overloaded, Blame::Us).retry(Retry::Elsewhere)
            }
            Self::PromptTooLong { .. } | Self::NeverFits { .. } => {
                Class::new(Code::ContextLengthExceeded, Blame::Client)
            }
            Self::EmptyPrompt => Class::new(Code::BadRequest, Blame::Client),
            Self::DuplicateId { .. } => Class::new(Code::Internal, Blame::Us),
        }
    }
}
