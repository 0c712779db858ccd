//! Vocabulary of the whole stack: ids, names, counts and the class of an error.
//!
//! No tokio, no I/O, no wire formats. Everything here is small, cheap to clone and safe to log.

mod error;
mod hex;
mod names;

pub use error::{Blame, Class, Classify, Code, Fault, Retry};
pub use hex::hex;
pub use names::{BlockHash, ConsumerName, ModelName, ReplicaId, RequestId, TokenizerId};

/// A token of a model's vocabulary.
///
/// An alias and not a newtype on purpose: token ids travel as slices through tokenizer, hashes, kernels and
/// JSON, and a wrapper would have to be taken off at each of them.
pub type TokenId = u32;

/// Tokens of one request as it was billed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Usage {
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
    /// Part of `prompt_tokens` that was not computed because its KV blocks were cached.
    pub cached_tokens: u32,
    /// Part of `completion_tokens` in which the model reasoned, as far as that is told from the answer.
    #[serde(default)]
    pub reasoning_tokens: u32,
}

impl Usage {
    pub fn total(&self) -> u32 {
        self.prompt_tokens.saturating_add(self.completion_tokens)
    }
}

/// Why a choice ended. The strings are OpenAI's, `abort` is vLLM's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// An end-of-sequence token or a stop string.
    Stop,
    /// `max_tokens` or the context length was reached.
    Length,
    /// The model called tools.
    ToolCalls,
    /// The client left or the server drained.
    Abort,
    /// The engine failed.
    Error,
}

impl FinishReason {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}
