//! What comes back, canonically: the events of a generation, and chunks that carry either events or verbatim bytes.

use bytes::Bytes;
use forebay_types::{FinishReason, TokenId, Usage};
use serde::Serialize;

/// One step of a generation's reply, in the order: `Started`, then `Delta`s and one `Finished` per choice in any
/// interleaving, then `Done`.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The prompt was accepted. Sent before the first token, so that headers can leave.
    Started {
        prompt_tokens: u32,
        cached_tokens: u32,
    },
    /// The tokens of one prompt with their log-probabilities, where `prompt_logprobs` or `return_token_ids` asked for
    /// them. After `Started`, before the first `Delta` of the prompt's choices.
    Prompt(PromptTokens),
    Delta(Delta),
    Finished {
        choice: u32,
        reason: FinishReason,
        /// vLLM's `stop_reason`; `None` where the text, the limit or an operator ended it.
        stop: Option<StopReason>,
    },
    /// Everything is finished. Always last; a stream that ends without it was cut.
    Done {
        usage: Usage,
    },
}

/// What in a choice's text ended it, beside the model's own end of text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum StopReason {
    /// One of the call's stop strings.
    Text(String),
    /// A token that ends texts: one of the call's, or one of the model's that is not its end of text proper.
    Token(TokenId),
}

/// A prompt as the model saw it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PromptTokens {
    /// Index of the prompt in the call.
    pub prompt: u32,
    pub ids: Vec<TokenId>,
    /// One entry per token: the token itself, then the most likely ones that are not it. The first entry is empty, as
    /// nothing comes before its token. `None` where they were not asked for.
    pub logprobs: Option<Vec<Vec<RankedLogprob>>>,
}

/// One token's log-probability where a prompt has it or could have had it.
#[derive(Debug, Clone, PartialEq)]
pub struct RankedLogprob {
    pub token: TokenId,
    /// The token alone, invalid UTF-8 replaced.
    pub text: String,
    pub logprob: f32,
    /// 1 is the most likely.
    pub rank: u32,
}

/// New text of one choice. `text` is valid UTF-8 and may be empty while bytes or a stop-string match are held back.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Delta {
    pub choice: u32,
    pub text: String,
    /// New text of the model's reasoning, where it is split from the answer.
    pub reasoning: String,
    /// What is new of the calls of tools.
    pub tool_calls: Vec<ToolCallDelta>,
    /// Ids of the new tokens, where the call asked for them (`return_token_ids`).
    pub token_ids: Vec<TokenId>,
    /// New completion tokens that this delta accounts for (0 for the echo of a prompt).
    pub tokens: u32,
    /// One entry per new token where logprobs were asked for.
    pub logprobs: Vec<TokenLogprob>,
}

/// A piece of a tool call. The first of a call has id and name; the arguments are the pieces of all, joined.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ToolCallDelta {
    /// Which call of the choice, from 0.
    pub index: u32,
    /// `call_…`, in the first piece.
    pub id: Option<String>,
    /// The function, in the first piece.
    pub name: Option<String>,
    /// More of the arguments, JSON as the model wrote it.
    pub arguments: String,
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
