//! Tokenized once: how the gateway gets a prompt's tokens without knowing any engine.

use std::fmt;
use std::sync::Arc;

use forebay_types::{Fault, ModelName, TokenId, TokenizerId};
use forebay_wire::{Embed, Generate, Prompt};

/// A prompt's tokens.
#[derive(Clone)]
pub enum PromptIds {
    /// The ids of each prompt of the call, made with the tokenizer `tokenizer`.
    Exact { tokenizer: TokenizerId, prompts: Vec<Arc<[TokenId]>> },
    /// No tokenizer here for that model: a count from the bytes.
    Estimated { tokens: u32 },
}

impl PromptIds {
    /// An estimate from the text: 3.5 bytes per token, the usual figure for English with OpenAI's vocabularies.
    pub fn estimate(prompt: &Prompt) -> Self {
        Self::Estimated { tokens: (prompt.text_bytes() as f64 / 3.5).ceil() as u32 }
    }

    pub fn none() -> Self {
        Self::Estimated { tokens: 0 }
    }

    /// Tokens over all prompts.
    pub fn tokens(&self) -> u32 {
        match self {
            Self::Exact { prompts, .. } => prompts.iter().map(|ids| ids.len() as u32).sum(),
            Self::Estimated { tokens } => *tokens,
        }
    }
}

/// Without the ids: they are the client's text.
impl fmt::Debug for PromptIds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if matches!(self, Self::Exact { .. }) { "exact" } else { "estimated" };
        write!(f, "PromptIds({} tokens, {how})", self.tokens())
    }
}

/// Turns prompts into token ids. Pure CPU work: callers move it off the I/O threads where the prompt is long.
pub trait PromptEncoder: Send + Sync + 'static {
    /// Refuses a prompt that is too long for everybody who could answer, whatever its tokens are: a cheap look at its size
    /// before the work of [`encode`](Self::encode). One that passes may still turn out to be too long.
    fn fits(&self, model: &ModelName, prompt: &Prompt) -> Result<(), Fault>;

    /// The ids of the call's prompts, as the model is to see them: cut off where the call asks for it. An unknown model is
    /// estimated, not refused: whether it exists is the proxy's to say.
    fn encode(&self, call: &Generate) -> Result<PromptIds, Fault>;

    /// The ids of texts to embed, special ones around them. An estimate where nobody here has their tokenizer.
    fn encode_inputs(&self, call: &Embed) -> Result<PromptIds, Fault> {
        Ok(PromptIds::estimate(&call.input))
    }
}
