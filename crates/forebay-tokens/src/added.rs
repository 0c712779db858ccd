//! Finds tokens that are whole strings (control tokens, user-defined words) in raw text, before any other cut.
//!
//! The `tokenizers` crate can do this too, but parses control tokens everywhere or nowhere per tokenizer; here it is
//! decided per call and per segment.

use std::ops::Range;

use aho_corasick::{AhoCorasick, MatchKind};
use forebay_types::TokenId;

use crate::vocab::BuildError;

/// A token that is matched as a whole. The flags are those of `added_tokens` in `tokenizer.json`.
#[derive(Debug, Clone)]
pub(crate) struct AddedToken {
    pub(crate) id: TokenId,
    pub(crate) text: String,
    /// Takes the whitespace on its left, or right, with it.
    pub(crate) lstrip: bool,
    pub(crate) rstrip: bool,
    /// Not inside a word.
    pub(crate) single_word: bool,
}

impl AddedToken {
    /// Matched anywhere, takes nothing with it.
    pub(crate) fn plain(id: TokenId, text: String) -> Self {
        Self { id, text, lstrip: false, rstrip: false, single_word: false }
    }
}

/// A part of a text: one whole token, or text still to be cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) range: Range<usize>,
    pub(crate) id: Option<TokenId>,
}

/// Leftmost-longest search for a set of whole-string tokens.
#[derive(Debug)]
pub(crate) struct AddedTokens {
    /// `None` when there are no tokens.
    finder: Option<AhoCorasick>,
    tokens: Vec<AddedToken>,
}

impl AddedTokens {
    pub(crate) fn new(mut tokens: Vec<AddedToken>) -> Result<Self, BuildError> {
        tokens.retain(|token| !token.text.is_empty());
        let finder = if tokens.is_empty() {
            None
        } else {
            let finder = AhoCorasick::builder()
                .match_kind(MatchKind::LeftmostLongest)
                .build(tokens.iter().map(|token| &token.text))
                .map_err(BuildError::Index)?;
            Some(finder)
        };
        Ok(Self { finder, tokens })
    }

    pub(crate) fn texts(&self) -> impl Iterator<Item = &str> {
        self.tokens.iter().map(|token| token.text.as_str())
    }

    /// Cuts `text[range]` at every token; the segments are in order, not empty and cover the range.
    pub(crate) fn cut(&self, text: &str, range: Range<usize>, out: &mut Vec<Segment>) {
        let mut rest = range.start;
        if let Some(finder) = &self.finder {
            let part = &text[range.clone()];
            for found in finder.find_iter(part) {
                let token = &self.tokens[found.pattern().as_usize()];
                let (mut start, mut end) = (range.start + found.start(), range.start + found.end());
                // The whitespace that an earlier token took with it may reach into this one.
                if start < rest {
                    continue;
                }
                let (before, after) = (&text[rest..start], &text[end..range.end]);
                if token.single_word && (before.ends_with(is_word) || after.starts_with(is_word)) {
                    continue;
                }
                if token.lstrip {
                    start = rest + before.trim_end().len();
                }
                if token.rstrip {
                    end = range.end - after.trim_start().len();
                }
                push(out, rest..start, None);
                push(out, start..end, Some(token.id));
                rest = end;
            }
        }
        push(out, rest..range.end, None);
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn push(out: &mut Vec<Segment>, range: Range<usize>, id: Option<TokenId>) {
    if !range.is_empty() {
        out.push(Segment { range, id });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: TokenId, text: &str) -> AddedToken {
        AddedToken::plain(id, text.into())
    }

    fn check(tokens: Vec<AddedToken>, text: &str, expect: &[(&str, Option<TokenId>)]) {
        let mut out = Vec::new();
        AddedTokens::new(tokens).unwrap().cut(text, 0..text.len(), &mut out);
        let got: Vec<_> = out.iter().map(|s| (&text[s.range.clone()], s.id)).collect();
        assert_eq!(got, expect);
    }

    #[test]
    fn cuts_at_whole_tokens() {
        check(vec![], "abc", &[("abc", None)]);
        check(vec![token(1, "<a>")], "", &[]);
        check(
            vec![token(1, "<a>")],
            "x<a><a>y",
            &[("x", None), ("<a>", Some(1)), ("<a>", Some(1)), ("y", None)],
        );
    }

    #[test]
    fn the_longest_wins() {
        check(
            vec![token(1, "<a"), token(2, "<a>")],
            "<a><ab",
            &[("<a>", Some(2)), ("<a", Some(1)), ("b", None)],
        );
    }

    #[test]
    fn strips_whitespace_and_respects_words() {
        let both = AddedToken { lstrip: true, rstrip: true, ..token(1, "<m>") };
        check(
            vec![both],
            "x <m> \n<m> y",
            &[("x", None), (" <m> \n", Some(1)), ("<m> ", Some(1)), ("y", None)],
        );
        let word = AddedToken { single_word: true, ..token(1, "cat") };
        check(vec![word], "a cat cats", &[("a ", None), ("cat", Some(1)), (" cats", None)]);
    }
}
