//! The parser: a state machine over characters.

use crate::call::{one, one_or_array, separated};
use crate::{Call, CallStyle, Output, ThinkStyle};

/// Bytes of a call at most; what is longer is content.
pub const HELD_BYTES_MAX: usize = 256 * 1024;
/// White space at the beginning and behind calls that is held back at most.
const SPACE_BYTES_MAX: usize = 256;

const THINK: &str = "<think>";
const THINK_END: &str = "</think>";
const CALL: &str = "<tool_call>";
const CALL_END: &str = "</tool_call>";
const PYTHON: &str = "<|python_tag|>";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// White space so far, since the prompt opened the reasoning.
    ThinkStart,
    Think,
    /// White space so far, since the beginning, the reasoning or a call.
    Start {
        think: bool,
    },
    Text,
    /// Behind `<tool_call>`.
    Call {
        in_string: bool,
        escaped: bool,
    },
    /// The whole answer may be calls.
    Whole,
}

/// Parses one choice.
///
/// - A call is given out when it is complete: at `</tool_call>` outside of a JSON string for [`CallStyle::Hermes`], at the
///   end of the text for the others, whose calls are the whole answer or not calls.
/// - A call is an object with a `name` and an object under `arguments` or `parameters`. Anything else between the tags, or
///   more than [`HELD_BYTES_MAX`], is content with its tags. A Hermes call that is whole when the text ends needs no end
///   tag.
/// - White space in front of a call is dropped unless text comes before it, and behind a call unless text follows.
#[derive(Debug)]
pub struct Parser {
    style: Option<CallStyle>,
    state: State,
    /// Seen, but not yet given out.
    held: String,
    /// Where the JSON of a call begins in `held`.
    body: usize,
    called: bool,
    out: Output,
}

impl Parser {
    /// `None`: calls are not looked for, reasoning is not.
    pub fn new(style: Option<CallStyle>, think: Option<ThinkStyle>) -> Self {
        let state = match think {
            Some(ThinkStyle::Open) => State::ThinkStart,
            Some(ThinkStyle::Tagged) => State::Start { think: true },
            None => State::Start { think: false },
        };
        Self { style, state, held: String::new(), body: 0, called: false, out: Output::default() }
    }

    /// More text; what is decided by it.
    pub fn push(&mut self, text: &str) -> Output {
        text.chars().for_each(|c| self.on_char(c));
        std::mem::take(&mut self.out)
    }

    /// No more text comes: what was held back.
    pub fn finish(mut self) -> Output {
        match self.state {
            State::ThinkStart | State::Think => self.out.reasoning.push_str(&self.held),
            State::Start { .. } if self.called && self.held.trim().is_empty() => {}
            State::Start { .. } | State::Text => self.give_back(),
            State::Call { .. } => {
                let body = &self.held[self.body..];
                let calls = one(&body[..body.len() - overlap(body, CALL_END)]).map(|call| vec![call]);
                self.on_calls(calls);
            }
            State::Whole => {
                let text = self.held.trim();
                let calls = match self.style {
                    Some(CallStyle::Llama3Json) => separated(text.strip_prefix(PYTHON).unwrap_or(text)),
                    _ => one_or_array(text),
                };
                self.on_calls(calls);
            }
        }
        self.out
    }

    /// Any call so far: the choice finishes with `tool_calls`.
    pub fn called(&self) -> bool {
        self.called
    }

    fn on_char(&mut self, c: char) {
        self.held.push(c);
        match self.state {
            State::ThinkStart => self.on_think_start(),
            State::Think => self.on_think(),
            State::Start { think } => self.on_start(think),
            State::Text => self.on_text(),
            State::Call { in_string, escaped } => self.on_call(c, in_string, escaped),
            State::Whole => self.limit(),
        }
    }

    fn on_think_start(&mut self) {
        let seen = self.held.trim_start();
        if seen == THINK {
            self.held.clear();
            self.state = State::Think;
        } else if !THINK.starts_with(seen) || self.held.len() > SPACE_BYTES_MAX {
            self.state = State::Think;
            self.on_think();
        }
    }

    fn on_think(&mut self) {
        if let Some(before) = self.held.strip_suffix(THINK_END) {
            self.out.reasoning.push_str(before);
            self.held.clear();
            self.state = State::Start { think: false };
            return;
        }
        let decided = self.held.len() - overlap(&self.held, THINK_END);
        self.out.reasoning.extend(self.held.drain(..decided));
    }

    fn on_start(&mut self, think: bool) {
        let seen = self.held.trim_start();
        let openers: &[&str] = match self.style {
            Some(CallStyle::Hermes) => &[CALL],
            Some(CallStyle::Llama3Json) => &[PYTHON, "{"],
            Some(CallStyle::Json) => &["{", "["],
            None => &[],
        };
        if think && seen == THINK {
            self.held.clear();
            self.state = State::Think;
        } else if openers.contains(&seen) {
            self.body = self.held.len();
            self.state = match self.style {
                Some(CallStyle::Hermes) => State::Call { in_string: false, escaped: false },
                _ => State::Whole,
            };
        } else {
            let open = (think && THINK.starts_with(seen)) || openers.iter().any(|o| o.starts_with(seen));
            let space = seen.is_empty() && (open || self.called);
            if (!open && !space) || self.held.len() > SPACE_BYTES_MAX {
                self.state = State::Text;
                self.on_text();
            }
        }
    }

    fn on_text(&mut self) {
        if self.style != Some(CallStyle::Hermes) {
            return self.give_back();
        }
        let tag = if self.held.ends_with(CALL) { CALL.len() } else { overlap(&self.held, CALL) };
        let decided = self.held.len() - tag;
        self.out.content.extend(self.held.drain(..decided));
        if tag == CALL.len() {
            self.body = tag;
            self.state = State::Call { in_string: false, escaped: false };
        }
    }

    fn on_call(&mut self, c: char, in_string: bool, escaped: bool) {
        let in_string = if c == '"' && !escaped { !in_string } else { in_string };
        self.state = State::Call { in_string, escaped: in_string && c == '\\' && !escaped };
        if in_string || !self.held[self.body..].ends_with(CALL_END) {
            return self.limit();
        }
        let call = one(&self.held[self.body..self.held.len() - CALL_END.len()]);
        self.on_calls(call.map(|call| vec![call]));
    }

    /// What is held is these calls, or text.
    fn on_calls(&mut self, calls: Option<Vec<Call>>) {
        let Some(calls) = calls else {
            self.state = State::Text;
            return self.give_back();
        };
        self.out.calls.extend(calls);
        self.called = true;
        self.held.clear();
        self.state = State::Start { think: false };
    }

    fn limit(&mut self) {
        if self.held.len() > HELD_BYTES_MAX {
            self.on_calls(None);
        }
    }

    fn give_back(&mut self) {
        self.out.content.push_str(&self.held);
        self.held.clear();
    }
}

/// Bytes at the end of `text` that may be the beginning of `tag`: the most, less than all of it.
fn overlap(text: &str, tag: &str) -> usize {
    let most = text.len().min(tag.len() - 1);
    (1..=most).rev().find(|&n| text.as_bytes().ends_with(&tag.as_bytes()[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests;
