//! What comes back, canonically: the events of a generation, and chunks that carry either events or verbatim bytes.

use bytes::Bytes;
use forebay_types::{FinishReason, TokenId, Usage};

/// One step of a generation's reply, in the order: `Started`, then `Delta`s and one `Finished` per choice in any
/// interleaving, then `Done`.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The prompt was accepted. Sent before the first token, so that headers can leave.
    Started {
        prompt_tokens: u32,
        cached_tokens: u32,
    },
    Delta(Delta),
    Finished {
        choice: u32,
        reason: FinishReason,
    },
    /// Everything is finished. Always last; a stream that ends without it was cut.
    Done {
        usage: Usage,
    },
}

/// New text of one choice. `text` is valid UTF-8 and may be empty while bytes or a stop-string match are held back.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Delta {
    pub choice: u32,
    pub text: String,
    /// New completion tokens that this delta accounts for (0 for the echo of a prompt).
    pub tokens: u32,
    /// One entry per new token where logprobs were asked for.
    pub logprobs: Vec<TokenLogprob>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    pub token: TokenId,
    /// The token alone, invalid UTF-8 replaced.
    pub text: String,
    pub bytes: Vec<u8>,
    /// Natural logarithm; `None` for the first token of an echoed prompt.
    pub logprob: Option<f32>,
    /// Most likely first.
    pub top: Vec<TopLogprob>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct TopLogprob {
    pub token: TokenId,
    pub text: String,
    pub bytes: Vec<u8>,
    pub logprob: f32,
}

/// One piece of a reply on its way up.
#[derive(Debug, Clone, PartialEq)]
pub enum Chunk {
    /// From an engine in this process: rendered once, at the edge.
    Event(Event),
    /// From an upstream that speaks the client's dialect: passed as it came. One whole SSE frame (with its blank
    /// line), or a whole JSON body. `bytes` is empty where only the accounting is of interest (a usage frame that
    /// the client didn't ask for).
    Verbatim {
        bytes: Bytes,
        /// Usage as the upstream reported it, where this piece has it. The last one counts, never the sum.
        usage: Option<Usage>,
        /// Content deltas seen in this piece: the estimate for a stream that is cut before its usage.
        deltas: u32,
    },
}
