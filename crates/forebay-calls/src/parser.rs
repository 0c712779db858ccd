//! The parser: a state machine over characters.

use crate::envelope::{Envelope, Step};
use crate::{CallStyle, Output, Piece, THINK, THINK_END, ThinkStyle};

/// Bytes around a call's arguments at most; what is longer is content.
pub const HELD_BYTES_MAX: usize = 256 * 1024;
/// White space at the beginning and behind calls that is held back at most.
const SPACE_BYTES_MAX: usize = 256;

pub(crate) const CALL: &str = "<tool_call>";
pub(crate) const CALL_END: &str = "</tool_call>";
pub(crate) const PYTHON: &str = "<|python_tag|>";

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
    /// In front of a call's arguments, once it looks like a call.
    Call,
    Arguments,
    /// Behind a call's arguments, in the object around them.
    Tail,
}

/// Where calls follow each other in a list, or end with a tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Around {
    Nothing,
    /// Behind a call whose `</tool_call>` is to come.
    Tag,
    /// In a JSON array.
    Array,
    /// Behind a call that `;` may follow.
    Semicolon,
}

/// Parses one choice.
///
/// - A call is an object with a `name` and an object under `arguments` or `parameters`. It begins to be given out where
///   the arguments begin, which then come as they are written. Where they come before the name, the call is given out
///   whole. Anything else, or more than [`HELD_BYTES_MAX`] around the arguments, is content with its tags.
/// - From then on it stays a call, whatever follows: where the text is cut, its arguments are. A missing end tag, or a
///   missing `}` in front of it, ends it as well.
/// - White space in front of a call is dropped unless text comes before it, and behind a call unless text follows.
#[derive(Debug)]
pub struct Parser {
    style: Option<CallStyle>,
    state: State,
    around: Around,
    envelope: Envelope,
    /// Seen, but not yet given out.
    held: String,
    /// Calls so far.
    calls: u32,
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
        Self {
            style,
            state,
            around: Around::Nothing,
            envelope: Envelope::new(),
            held: String::new(),
            calls: 0,
            out: Output::default(),
        }
    }

    /// More text; what is decided by it.
    pub fn push(&mut self, text: &str) -> Output {
        text.chars().for_each(|c| self.on_char(c));
        std::mem::take(&mut self.out)
    }

    /// No more text comes: what was held back. Afterwards the parser takes nothing more.
    pub fn finish(&mut self) -> Output {
        match self.state {
            State::ThinkStart | State::Think => self.out.reasoning.push_str(&self.held),
            State::Start { .. } if self.calls > 0 && self.held.trim().is_empty() => {}
            // An end tag in part.
            State::Start { .. } if self.around == Around::Tag && CALL_END.starts_with(self.held.trim()) => {}
            State::Start { .. } | State::Text | State::Call => self.give_back(),
            State::Arguments | State::Tail => {}
        }
        self.held.clear();
        std::mem::take(&mut self.out)
    }

    /// Any call so far: the choice finishes with `tool_calls`.
    pub fn called(&self) -> bool {
        self.calls > 0
    }

    /// Whether what comes next is reasoning.
    pub fn thinks(&self) -> bool {
        matches!(self.state, State::ThinkStart | State::Think)
    }

    fn on_char(&mut self, c: char) {
        if self.state == State::Arguments {
            return self.on_arguments(c);
        }
        self.held.push(c);
        match self.state {
            State::ThinkStart => self.on_think_start(),
            State::Think => self.on_think(),
            State::Start { think } => self.on_start(think),
            State::Text => self.on_text(),
            State::Call => self.on_call(c),
            State::Tail => self.on_tail(c),
            State::Arguments => unreachable!("taken above"),
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

    /// What a call may begin with here.
    fn openers(&self) -> &'static [&'static str] {
        match (self.style, self.around) {
            (None, _) => &[],
            (Some(CallStyle::Hermes), _) => &[CALL],
            (Some(CallStyle::Llama3Json), Around::Semicolon) => &[PYTHON, "{", ";"],
            (Some(CallStyle::Llama3Json), _) => &[PYTHON, "{"],
            (Some(CallStyle::Json), Around::Array) => &[","],
            (Some(CallStyle::Json), _) => &["{", "["],
        }
    }

    /// What the list of calls, or the call before, may end with here.
    fn closer(&self) -> Option<&'static str> {
        match self.around {
            Around::Tag => Some(CALL_END),
            Around::Array => Some("]"),
            Around::Nothing | Around::Semicolon => None,
        }
    }

    fn on_start(&mut self, think: bool) {
        let seen = self.held.trim_start();
        let (openers, closer) = (self.openers(), self.closer());
        if think && seen == THINK {
            self.held.clear();
            self.state = State::Think;
        } else if closer == Some(seen) {
            self.held.clear();
            self.around = Around::Nothing;
        } else if openers.contains(&seen) {
            if seen == "[" {
                self.around = Around::Array;
            }
            let is_object = seen == "{";
            self.begin_call(is_object);
        } else {
            let open = (think && THINK.starts_with(seen))
                || openers.iter().chain(&closer).any(|tag| tag.starts_with(seen));
            if !open || self.held.len() > SPACE_BYTES_MAX {
                self.state = State::Text;
                self.on_text();
            }
        }
    }

    fn begin_call(&mut self, is_object: bool) {
        self.state = State::Call;
        self.envelope = Envelope::new();
        if is_object {
            self.envelope.on_char('{');
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
            self.begin_call(false);
        }
    }

    fn on_call(&mut self, c: char) {
        match self.envelope.on_char(c) {
            Step::More => self.limit(),
            Step::Broken => self.give_back_before(c),
            Step::Arguments => {
                let call = self.envelope.take();
                self.give_out(call);
                self.state = State::Arguments;
                self.argument(c);
            }
            Step::Closed => match self.envelope.take() {
                Some(call) => {
                    self.give_out(Some(call));
                    self.end_call();
                }
                None => {
                    self.around = Around::Nothing;
                    self.state = State::Text;
                    self.give_back();
                }
            },
        }
    }

    fn on_arguments(&mut self, c: char) {
        // No JSON has it outside of a string, so it is the end tag of a call that lacks a bracket.
        if c == '<' && self.style == Some(CallStyle::Hermes) && !self.envelope.in_string() {
            self.end_call();
            self.held.push(c);
            return self.on_start(false);
        }
        self.argument(c);
        if self.envelope.on_argument(c) {
            self.state = State::Tail;
        }
    }

    fn on_tail(&mut self, c: char) {
        match self.envelope.on_char(c) {
            // The arguments have come: a second value of that name is skipped.
            Step::More | Step::Arguments => self.limit(),
            Step::Closed => {
                self.held.clear();
                self.end_call();
            }
            Step::Broken if self.held.trim_start().len() == c.len_utf8() => {
                self.end_call();
                self.on_start(false);
            }
            Step::Broken => self.give_back_before(c),
        }
    }

    /// A call begins to be given out.
    fn give_out(&mut self, call: Option<(String, String)>) {
        let Some((name, arguments)) = call else { return };
        self.held.clear();
        self.out.calls.push(Piece { index: self.calls, name: Some(name), arguments });
        self.calls += 1;
    }

    /// The next character of the latest call's arguments.
    fn argument(&mut self, c: char) {
        let index = self.calls.saturating_sub(1);
        match self.out.calls.last_mut() {
            Some(piece) if piece.index == index => piece.arguments.push(c),
            _ => self.out.calls.push(Piece { index, name: None, arguments: c.into() }),
        }
    }

    fn end_call(&mut self) {
        self.state = State::Start { think: false };
        self.around = match (self.style, self.around) {
            (Some(CallStyle::Hermes), _) => Around::Tag,
            (Some(CallStyle::Llama3Json), _) => Around::Semicolon,
            (_, around) => around,
        };
    }

    fn limit(&mut self) {
        if self.held.len() > HELD_BYTES_MAX {
            self.state = State::Text;
            self.give_back();
        }
    }

    /// What is held is content up to `c`, its last character, which may be the beginning of something.
    fn give_back_before(&mut self, c: char) {
        self.held.pop();
        self.give_back();
        self.held.push(c);
        self.around = Around::Nothing;
        self.state = State::Text;
        self.on_text();
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
