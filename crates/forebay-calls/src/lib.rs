//! Model output, piece by piece, into content, reasoning and tool calls. Pure.
//!
//! However a text is cut into pieces, the joined [`Output`]s are the same: the parser goes by character, and decides by
//! what it has seen only. What turns out not to be a call is content, as it was written: nothing is lost but tags, the
//! white space around calls, and the JSON around their arguments.
//!
//! [`CallStyle::grammar`] is the other direction: the texts that are calls, for output that has to be one.

mod envelope;
mod grammar;
mod parser;

pub use grammar::Function;
pub use parser::{HELD_BYTES_MAX, Parser};

/// How a model writes calls. The names are those of vLLM's `--tool-call-parser`, except `Json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CallStyle {
    /// `hermes`, Qwen too: `<tool_call>{"name":…,"arguments":{…}}</tool_call>`, anywhere, any number.
    Hermes,
    /// `llama3_json`: the answer is `{"name":…,"parameters":{…}}`, several with `;` between, optionally behind
    /// `<|python_tag|>`.
    Llama3Json,
    /// The answer is a call as a JSON object, several in a row, or an array of calls.
    Json,
}

impl CallStyle {
    /// The tags of this style, which may be control tokens.
    pub fn tags(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &[parser::CALL, parser::CALL_END],
            Self::Llama3Json => &[parser::PYTHON],
            Self::Json => &[],
        }
    }
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

/// The beginning of reasoning.
pub const THINK: &str = "<think>";
/// The end of reasoning.
pub const THINK_END: &str = "</think>";

/// What is new.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Output {
    pub content: String,
    pub reasoning: String,
    /// Pieces of calls, in order.
    pub calls: Vec<Piece>,
}

/// What is new of one call.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Piece {
    /// Which call, from 0.
    pub index: u32,
    /// The function, in the first piece of a call.
    pub name: Option<String>,
    /// More of the arguments, as the model writes them: a JSON object once all pieces are joined, unless the text was cut
    /// or the model made a mistake.
    pub arguments: String,
}

impl Output {
    pub fn is_empty(&self) -> bool {
        self.content.is_empty() && self.reasoning.is_empty() && self.calls.is_empty()
    }

    /// Adds what came next.
    pub fn add(&mut self, next: Output) {
        self.content.push_str(&next.content);
        self.reasoning.push_str(&next.reasoning);
        for piece in next.calls {
            match self.calls.last_mut() {
                Some(last) if last.index == piece.index => last.arguments.push_str(&piece.arguments),
                _ => self.calls.push(piece),
            }
        }
    }
}
