//! Model output, piece by piece, into content, reasoning and tool calls. Pure.
//!
//! However a text is cut into pieces, the joined [`Output`]s are the same: the parser goes by character, and decides by
//! what it has seen only. What turns out not to be a call is content, as it was written: nothing is lost but tags and the
//! white space around calls.

mod call;
mod parser;

pub use call::Call;
pub use parser::{HELD_BYTES_MAX, Parser};

/// How a model writes calls. The names are those of vLLM's `--tool-call-parser`, except `Json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CallStyle {
    /// `hermes`, Qwen too: `<tool_call>{"name":…,"arguments":{…}}</tool_call>`, anywhere, any number.
    Hermes,
    /// `llama3_json`: the whole answer is `{"name":…,"parameters":{…}}`, several with `;` between, optionally behind
    /// `<|python_tag|>`.
    Llama3Json,
    /// The whole answer is one call as a JSON object, or an array of calls.
    Json,
}

/// Where a model's reasoning is, between `<think>` and `</think>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ThinkStyle {
    /// The answer may begin with `<think>`.
    Tagged,
    /// The prompt ends inside `<think>`, or the model reasons first without being asked to: everything up to
    /// `</think>` is reasoning, all of it where the tag doesn't come.
    Open,
}

/// What is new.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Output {
    pub content: String,
    pub reasoning: String,
    /// Whole calls, in order.
    pub calls: Vec<Call>,
}

impl Output {
    pub fn is_empty(&self) -> bool {
        self.content.is_empty() && self.reasoning.is_empty() && self.calls.is_empty()
    }
}
