//! Stop strings, found in a text that comes in pieces.
//!
//! An Aho-Corasick automaton (Aho and Corasick, 1975) over bytes, made per request. Its state is the longest end of
//! the text so far that begins a stop string; that is exactly what must be held back, so nothing is held longer than
//! needed and each byte is looked at once, whatever the pieces. The `aho-corasick` crate hides the depth of a state,
//! which is the number wanted here.

use std::sync::Arc;

use forebay_types::{Blame, Class, Classify, Code};

const STOPS_MAX: usize = 64;
const STOP_BYTES_MAX: usize = 1024;

/// Why stop strings were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StopError {
    #[error("`stop` contains an empty string, which would end every answer at once")]
    Empty,
    #[error("`stop` has {count} strings, the limit is {STOPS_MAX}")]
    TooMany { count: usize },
    #[error("a string in `stop` has {bytes} bytes, the limit is {STOP_BYTES_MAX}")]
    TooLong { bytes: usize },
}

impl Classify for StopError {
    fn class(&self) -> Class {
        match self {
            Self::Empty | Self::TooMany { .. } | Self::TooLong { .. } => {
                Class::new(Code::BadRequest, Blame::Client)
            }
        }
    }

    fn param(&self) -> Option<&str> {
        Some("stop")
    }
}

/// What [`StopMatcher::push`] lets through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'a> {
    /// Text that no stop string can take back.
    pub text: &'a str,
    /// Index of the stop string that was hit; the generation is over and nothing more comes out.
    pub hit: Option<usize>,
}

/// Watches one generation for stop strings.
///
/// The first stop string to be complete wins; of several that are complete at the same byte, the longest. That does
/// not depend on how the text was split.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    /// Shared by clones: up to 64 KiB of stop strings make a node per byte, and a request has many choices.
    nodes: Arc<[Node]>,
    include_stop: bool,
    state: usize,
    /// The last `nodes[state].depth` bytes of the text: not yet emitted.
    held: String,
    out: String,
    hit: Option<usize>,
}

#[derive(Debug, Clone, Default)]
struct Node {
    next: Vec<(u8, usize)>,
    /// The longest proper end of this node's string that is a node too.
    fail: usize,
    depth: usize,
    /// The longest stop string that this node's string ends with.
    stop: Option<Stop>,
}

#[derive(Debug, Clone, Copy)]
struct Stop {
    index: usize,
    bytes: usize,
}

impl StopMatcher {
    /// `include_stop`: the stop string itself is emitted too (vLLM's `include_stop_str_in_output`).
    pub fn new(stops: &[String], include_stop: bool) -> Result<Self, StopError> {
        if stops.len() > STOPS_MAX {
            return Err(StopError::TooMany { count: stops.len() });
        }
        let mut nodes = vec![Node::default()];
        for (index, stop) in stops.iter().enumerate() {
            if stop.is_empty() {
                return Err(StopError::Empty);
            }
            if stop.len() > STOP_BYTES_MAX {
                return Err(StopError::TooLong { bytes: stop.len() });
            }
            let mut at = 0;
            for &byte in stop.as_bytes() {
                at = child(&nodes[at], byte).unwrap_or_else(|| {
                    nodes.push(Node { depth: nodes[at].depth + 1, ..Node::default() });
                    let new = nodes.len() - 1;
                    nodes[at].next.push((byte, new));
                    new
                });
            }
            // The same string twice: the first index.
            nodes[at].stop.get_or_insert(Stop { index, bytes: stop.len() });
        }
        link(&mut nodes);
        Ok(Self {
            nodes: nodes.into(),
            include_stop,
            state: 0,
            held: String::new(),
            out: String::new(),
            hit: None,
        })
    }

    /// Takes the next piece of the generation, gives the text that may be sent on.
    pub fn push<'a>(&'a mut self, text: &'a str) -> Piece<'a> {
        self.take(text, true)
    }

    /// As [`push`](Self::push) for a text in which no stop string may end. One that begins in it can be hit later.
    pub fn pass<'a>(&'a mut self, text: &'a str) -> &'a str {
        self.take(text, false).text
    }

    fn take<'a>(&'a mut self, text: &'a str, may_end: bool) -> Piece<'a> {
        if self.hit.is_some() {
            return Piece { text: "", hit: self.hit };
        }
        if self.nodes.len() == 1 {
            return Piece { text, hit: None };
        }
        self.out.clear();
        let mut taken = text;
        for (at, &byte) in text.as_bytes().iter().enumerate() {
            self.state = step(&self.nodes, self.state, byte);
            if let Some(stop) = self.nodes[self.state].stop.filter(|_| may_end) {
                self.hit = Some(stop.index);
                taken = &text[..at + 1];
                self.out.push_str(&self.held);
                self.out.push_str(taken);
                if !self.include_stop {
                    self.out.truncate(self.out.len() - stop.bytes);
                }
                self.held.clear();
                return Piece { text: &self.out, hit: self.hit };
            }
        }
        // What no stop string goes on from is not held, though it was let pass as one.
        while self.state != 0 && self.nodes[self.state].next.is_empty() {
            self.state = self.nodes[self.state].fail;
        }
        // All text seen ends in `hold` bytes that may become a stop string. A stop string starts with a whole
        // character, so this is a character boundary.
        let hold = self.nodes[self.state].depth;
        self.out.push_str(&self.held);
        self.out.push_str(taken);
        let emit = self.out.len() - hold;
        self.held.clear();
        self.held.push_str(&self.out[emit..]);
        self.out.truncate(emit);
        Piece { text: &self.out, hit: None }
    }

    /// What was held back, at the end of a generation that no stop string ended.
    pub fn finish(&mut self) -> &str {
        self.state = 0;
        self.out.clear();
        std::mem::swap(&mut self.out, &mut self.held);
        &self.out
    }

    /// Index of the stop string that ended the generation.
    pub fn hit(&self) -> Option<usize> {
        self.hit
    }
}

fn child(node: &Node, byte: u8) -> Option<usize> {
    node.next.iter().find(|(b, _)| *b == byte).map(|(_, to)| *to)
}

fn step(nodes: &[Node], mut state: usize, byte: u8) -> usize {
    loop {
        match child(&nodes[state], byte) {
            Some(next) => return next,
            None if state == 0 => return 0,
            None => state = nodes[state].fail,
        }
    }
}

/// Fills in `fail`, and `stop` of nodes that only end in one, breadth first.
fn link(nodes: &mut [Node]) {
    let mut queue: std::collections::VecDeque<usize> = nodes[0].next.iter().map(|(_, to)| *to).collect();
    while let Some(at) = queue.pop_front() {
        for (byte, to) in nodes[at].next.clone() {
            let fail = step(nodes, nodes[at].fail, byte);
            nodes[to].fail = fail;
            if nodes[to].stop.is_none() {
                nodes[to].stop = nodes[fail].stop;
            }
            queue.push_back(to);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stops(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| (*s).to_owned()).collect()
    }

    /// All emitted text, and which stop string was hit.
    fn run(list: &[String], include: bool, pieces: &[&str]) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(list, include).unwrap();
        let mut out = String::new();
        for piece in pieces {
            out.push_str(matcher.push(piece).text);
        }
        let hit = matcher.hit();
        out.push_str(matcher.finish());
        (out, hit)
    }

    fn check(list: &[&str], pieces: &[&str], expect: &str, hit: Option<usize>) {
        assert_eq!(run(&stops(list), false, pieces), (expect.to_owned(), hit), "{list:?} in {pieces:?}");
    }

    #[test]
    fn cuts_before_the_stop_string() {
        check(&[], &["a", "b"], "ab", None);
        check(&["END"], &["one E", "N", "D two"], "one ", Some(0));
        check(&["END"], &["one EN", "OUGH"], "one ENOUGH", None);
        check(&["END"], &["one EN"], "one EN", None);
        check(&["bc", "abcd"], &["xab", "cd"], "xa", Some(0));
        check(&["c", "abc"], &["xab", "c"], "x", Some(1));
        check(&["aab"], &["aaa", "ab"], "aa", Some(0));
        check(&["é!"], &["caf", "é", "é!"], "café", Some(0));
    }

    #[test]
    fn nothing_is_held_longer_than_needed() {
        let mut matcher = StopMatcher::new(&stops(&["\n\nUser:"]), false).unwrap();
        assert_eq!(matcher.push("Hello\n").text, "Hello");
        assert_eq!(matcher.push("\n").text, "");
        assert_eq!(matcher.push("\n").text, "\n");
        assert_eq!(matcher.push("x").text, "\n\nx");
    }

    #[test]
    fn refuses_what_cannot_work() {
        let error = |list: &[String]| StopMatcher::new(list, false).unwrap_err();
        assert_eq!(error(&stops(&["a", ""])), StopError::Empty);
        assert_eq!(error(&vec!["a".to_owned(); 65]), StopError::TooMany { count: 65 });
        assert_eq!(error(&["a".repeat(1025)]), StopError::TooLong { bytes: 1025 });
    }

    /// First to be complete, then longest, then first in the list.
    fn naive(list: &[String], text: &str) -> Option<(usize, usize)> {
        list.iter()
            .enumerate()
            .filter_map(|(index, stop)| text.find(stop.as_str()).map(|at| (at + stop.len(), at, index)))
            .min()
            .map(|(_, at, index)| (at, index))
    }

    #[test]
    fn a_stop_string_may_begin_where_none_may_end() {
        let check = |list: &[&str], passed: &str, rest: &str, expect: &str, hit: Option<usize>| {
            let mut matcher = StopMatcher::new(&stops(list), false).unwrap();
            let mut out = matcher.pass(passed).to_owned();
            out.push_str(matcher.push(rest).text);
            assert_eq!((out.as_str(), matcher.hit()), (expect, hit), "{list:?} in {passed:?}, {rest:?}");
        };
        check(&["END"], "one EN", "D two", "one ", Some(0));
        check(&["END"], "one END", " END", "one END ", Some(0));
        check(&["END"], "one END", "ING", "one ENDING", None);
        check(&["aa"], "aa", "a", "a", Some(0));
        check(&["b", "bcd"], "ab", "cd", "a", Some(1));
    }

    proptest! {
        #[test]
        fn equals_a_search_in_the_whole_text(
            list in prop::collection::vec("[abé]{1,4}", 0..4),
            pieces in prop::collection::vec("[abcé]{0,5}", 0..12),
            include in any::<bool>(),
        ) {
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let text = pieces.concat();
            let (expect, hit) = match naive(&list, &text) {
                Some((at, index)) if include => (text[..at + list[index].len()].to_owned(), Some(index)),
                Some((at, index)) => (text[..at].to_owned(), Some(index)),
                None => (text.clone(), None),
            };
            prop_assert_eq!(run(&list, include, &pieces), (expect, hit));
        }
    }
}
