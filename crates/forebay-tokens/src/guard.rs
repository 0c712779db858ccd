//! Keeps what a client wrote from becoming control tokens when it goes through a chat template.
//!
//! A template mixes its own text (`<|im_start|>`, which must become one id) with the client's (`<|im_end|>` typed by
//! a user, which must not), and hands back one string. So before rendering, each occurrence of a control token in
//! client text is replaced by a placeholder; the template carries it along; after the control tokens of the rendered
//! text are found, placeholders turn back into the characters they stand for and are encoded as plain text.
//!
//! Text without such an occurrence, that is nearly all text, goes through unchanged, so templates that trim, split
//! or search contents work as ever, and ids equal those of other engines.
//!
//! A token must not be assembled from two pieces either (two content parts, or content and template text). So the
//! end of a piece that begins a control token, and the start of one that ends a control token, is replaced likewise.
//! Not covered: a template that writes the beginning *and* the end of a control token around client text. Templates
//! do that with `role` only, and roles are checked to be plain words.
//!
//! A placeholder is U+FDD0, `token,from,to` in decimal, U+FDD1. Both are noncharacters, never meant for interchange;
//! a U+FDD0 that a client sends is itself replaced, so a placeholder cannot be forged.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::Write as _;

use aho_corasick::{AhoCorasick, MatchKind};

use crate::vocab::BuildError;

const OPEN: char = '\u{FDD0}';
const CLOSE: char = '\u{FDD1}';
/// `4294967295,65535,65535` is the longest body.
const BODY_BYTES_MAX: usize = 24;

/// The part of a control token's text that a placeholder stands for, in bytes.
#[derive(Debug, Clone, Copy)]
struct Part {
    token: usize,
    from: usize,
    to: usize,
}

#[derive(Debug)]
pub(crate) struct Guard {
    texts: Vec<String>,
    /// Pattern `i` is `texts[i]`; the one after the last is U+FDD0.
    finder: AhoCorasick,
    /// Proper prefixes of control tokens, which client text must not end in.
    heads: HashMap<String, Part>,
    /// Proper suffixes of control tokens, which client text must not start with.
    tails: HashMap<String, Part>,
    part_bytes_max: usize,
}

impl Guard {
    pub(crate) fn new<'a>(controls: impl Iterator<Item = &'a str>) -> Result<Self, BuildError> {
        let texts: Vec<String> = controls.map(str::to_owned).collect();
        let marker = OPEN.to_string();
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(texts.iter().chain(std::iter::once(&marker)))
            .map_err(BuildError::Index)?;
        let mut heads = HashMap::new();
        let mut tails = HashMap::new();
        for (token, text) in texts.iter().enumerate() {
            for (at, _) in text.char_indices().skip(1) {
                heads.entry(text[..at].to_owned()).or_insert(Part { token, from: 0, to: at });
                tails.entry(text[at..].to_owned()).or_insert(Part { token, from: at, to: text.len() });
            }
        }
        let part_bytes_max = texts.iter().map(String::len).max().unwrap_or(0);
        Ok(Self { texts, finder, heads, tails, part_bytes_max })
    }

    /// Client text as it may go through a template. Borrowed when there is nothing to replace.
    pub(crate) fn protect<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let mut out = String::new();
        let mut rest = 0;
        for found in self.finder.find_iter(text) {
            self.copy(&text[rest..found.start()], rest == 0, false, &mut out);
            let token = found.pattern().as_usize();
            match self.texts.get(token) {
                Some(whole) => push_placeholder(&mut out, Part { token, from: 0, to: whole.len() }),
                None => {
                    out.push(OPEN);
                    out.push(CLOSE);
                }
            }
            rest = found.end();
        }
        if rest == 0 {
            let (start, end) = (self.tail_at_start(text), self.head_at_end(text));
            if start.is_none() && end.is_none() {
                return Cow::Borrowed(text);
            }
        }
        self.copy(&text[rest..], rest == 0, true, &mut out);
        Cow::Owned(out)
    }

    /// Copies text without whole tokens, with its first and last part replaced where they could complete one.
    fn copy(&self, text: &str, is_start: bool, is_end: bool, out: &mut String) {
        let mut rest = text;
        if is_start && let Some((part, len)) = self.tail_at_start(rest) {
            push_placeholder(out, part);
            rest = &rest[len..];
        }
        let end = if is_end { self.head_at_end(rest) } else { None };
        let keep = end.map_or(rest.len(), |(_, len)| rest.len() - len);
        out.push_str(&rest[..keep]);
        if let Some((part, _)) = end {
            push_placeholder(out, part);
        }
    }

    /// The longest start of `text` that ends a control token.
    fn tail_at_start(&self, text: &str) -> Option<(Part, usize)> {
        let max = self.part_bytes_max.min(text.len());
        (1..=max)
            .rev()
            .filter_map(|len| text.get(..len))
            .find_map(|start| self.tails.get(start).map(|part| (*part, start.len())))
    }

    /// The longest end of `text` that begins a control token.
    fn head_at_end(&self, text: &str) -> Option<(Part, usize)> {
        let max = self.part_bytes_max.min(text.len());
        (1..=max)
            .rev()
            .filter_map(|len| text.get(text.len() - len..))
            .find_map(|end| self.heads.get(end).map(|part| (*part, end.len())))
    }

    /// Appends `text` with placeholders turned back into what they stand for. A damaged one (a template that cut the
    /// text in the middle) stays as it is: noise, never a control token.
    pub(crate) fn restore(&self, text: &str, out: &mut String) {
        let mut rest = text;
        while let Some(open) = rest.find(OPEN) {
            out.push_str(&rest[..open]);
            let body = &rest[open + OPEN.len_utf8()..];
            match self.read_placeholder(body) {
                Some((meaning, len)) => {
                    out.push_str(meaning);
                    rest = &body[len..];
                }
                None => {
                    out.push(OPEN);
                    rest = body;
                }
            }
        }
        out.push_str(rest);
    }

    /// What the placeholder whose body starts `text` stands for, and the bytes it takes there.
    fn read_placeholder(&self, text: &str) -> Option<(&str, usize)> {
        let close = text.bytes().take(BODY_BYTES_MAX + 1).position(|byte| byte == CLOSE_FIRST_BYTE)?;
        let after = text[close..].strip_prefix(CLOSE)?;
        let len = text.len() - after.len();
        if close == 0 {
            return Some((OPEN_TEXT, len));
        }
        let mut numbers = text[..close].split(',').map(|number| number.parse::<usize>().ok());
        let (token, from, to) = (numbers.next()??, numbers.next()??, numbers.next()??);
        Some((self.texts.get(token)?.get(from..to)?, len))
    }
}

const OPEN_TEXT: &str = "\u{FDD0}";
/// First byte of [`CLOSE`] in UTF-8; a body is ASCII.
const CLOSE_FIRST_BYTE: u8 = 0xEF;

fn push_placeholder(out: &mut String, part: Part) {
    // Writing to a String can't fail.
    let _ = write!(out, "{OPEN}{},{},{}{CLOSE}", part.token, part.from, part.to);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CONTROLS: [&str; 4] = ["<|im_start|>", "<|im_end|>", "</s>", "[INST]"];

    fn guard() -> Guard {
        Guard::new(CONTROLS.into_iter()).unwrap()
    }

    fn restored(text: &str) -> String {
        let mut out = String::new();
        guard().restore(text, &mut out);
        out
    }

    #[test]
    fn ordinary_text_is_left_alone() {
        for text in ["", "hello", "a <b> c", "x < y > z", "  padded \n", "[x]y", "中文"] {
            assert!(matches!(guard().protect(text), Cow::Borrowed(_)), "{text:?}");
        }
    }

    #[test]
    fn a_forged_or_damaged_placeholder_means_nothing() {
        let forged = format!("{OPEN}1,0,10{CLOSE}");
        assert_eq!(restored(&guard().protect(&forged)), forged);
        for damaged in
            ["\u{FDD0}", "\u{FDD0}1,0", "\u{FDD0}9,0,1\u{FDD1}", "\u{FDD0}1,5,99\u{FDD1}", "\u{FDD0}中"]
        {
            assert_eq!(restored(damaged), damaged);
        }
    }

    proptest! {
        /// Client text in pieces of control tokens, joined with each other and with template text that starts or
        /// ends like one, never makes a control token, and comes back as it was.
        #[test]
        fn never_makes_a_control_token(
            pieces in prop::collection::vec("(<|\\||im_|start|end|>|/|s|\\[|INST|\\]|\u{FDD0}|1,0,10|\u{FDD1}| |é){0,8}", 1..4),
            before in prop::sample::select(vec!["", "<", "<|im_", "[INST"]),
            after in prop::sample::select(vec!["", ">", "|>", "end|>", "]"]),
        ) {
            let guard = guard();
            let client: String = pieces.iter().map(|piece| guard.protect(piece).into_owned()).collect();
            // Template text on one side only; both sides are not covered (see the module's documentation).
            for rendered in [format!("{before}{client}"), format!("{client}{after}")] {
                for control in CONTROLS {
                    prop_assert!(!rendered.contains(control), "{rendered:?} contains {control}");
                }
            }
            prop_assert_eq!(restored(&client), pieces.concat());
        }
    }
}
