//! Why a sequence is refused.

use std::time::Duration;

use forebay_types::{Blame, Class, Classify, Code, Retry};

use crate::SeqId;

/// Why a sequence was not queued. Nothing has changed in the scheduler.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// `limit` sequences wait or run (vLLM's `--max-num-queued-reqs`). The words are vLLM's, too: its clients know them.
    #[error(
        "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance."
    )]
    QueueFull {
        limit: u32,
        /// Until then there will be room again, probably.
        drain_in: Duration,
    },
    /// `waiting` prompt tokens wait, and with these they would be more than `limit` (vLLM's `--max-num-queued-tokens`).
    #[error(
        "The engine has reached its prefill token backlog limit. Please try again later or on a different instance."
    )]
    QueueTokensFull { waiting: u64, limit: u64, drain_in: Duration },
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
            Self::QueueFull { drain_in, .. } | Self::QueueTokensFull { drain_in, .. } => {
                Class::new(Code::Overloaded, Blame::Us).retry(Retry::After(*drain_in))
            }
            Self::PromptTooLong { .. } | Self::NeverFits { .. } => {
                Class::new(Code::ContextLengthExceeded, Blame::Client)
            }
            Self::EmptyPrompt => Class::new(Code::BadRequest, Blame::Client),
            Self::DuplicateId { .. } => Class::new(Code::Internal, Blame::Us),
        }
    }
}
