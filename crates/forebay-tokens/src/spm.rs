//! SentencePiece's byte-pair encoding, as GGUF files of `tokenizer.ggml.model = "llama"` describe it.
//!
//! A text, its spaces written as `▁`, begins as characters; of all neighbours that together are a token, the pair
//! with the best score is joined, leftmost of equals, until none is left. A character that ended alone and is no
//! token becomes the tokens of its UTF-8 bytes (`<0xE2>`). Ids are those of llama.cpp (`llm_tokenizer_spm`), which are
//! SentencePiece's own for vocabularies without a normalizer (Llama 2, Mistral, Gemma).
//!
//! Different on purpose: control, unknown and byte tokens are never made of plain text that is spelled like them, as
//! in SentencePiece itself; llama.cpp does not exclude them. Deliberately absent: normalizers (NFKC and the like) and
//! the Unigram model.
//!
//! There is no pre-tokenizer, but a text is cut all the same: between two characters that stand next to each other
//! in no token, nothing can ever be joined, so both sides are encoded on their own. That keeps the queues short; the
//! worst text costs O(n log n).

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use ahash::{AHashMap, AHashSet};
use forebay_types::TokenId;

/// How a vocabulary spells a space.
pub(crate) const SPACE: char = '▁';
const NONE: u32 = u32::MAX;

/// The tokens that text may become, with their scores.
pub(crate) struct Spm {
    tokens: AHashMap<Box<str>, (TokenId, Score)>,
    /// What stands for a byte that is part of no token; `None` gives nothing.
    bytes: [Option<TokenId>; 256],
    /// Characters that are neighbours in some token: both ASCII, and others.
    ascii_neighbours: Box<[u128; 128]>,
    neighbours: AHashSet<(char, char)>,
    token_bytes_max: usize,
    /// Begin a text, and what follows a whole-string token, with a space.
    space_prefix: bool,
}

/// A score whose order is that of the numbers. A vocabulary may come from anywhere: NaN has a place, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Score(i32);

impl Score {
    fn new(score: f32) -> Self {
        // Adding makes zero of minus zero; the rest is `f32::total_cmp`.
        let bits = (score + 0.0).to_bits().cast_signed();
        Self(bits ^ ((bits >> 31) as u32 >> 1).cast_signed())
    }
}

/// A possible join. Greatest first: the best score, then the leftmost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Join {
    score: Score,
    left: Reverse<u32>,
    /// Bytes of both together when this was found: another sum now means that it is stale.
    bytes: u32,
}

#[derive(Debug, Clone, Copy)]
struct Symbol {
    start: u32,
    /// 0: joined to the one before.
    bytes: u32,
    next: u32,
    previous: u32,
}

/// Buffers of one call, reused from piece to piece.
#[derive(Default)]
pub(crate) struct Scratch {
    text: String,
    symbols: Vec<Symbol>,
    joins: BinaryHeap<Join>,
}

impl Spm {
    /// `tokens`: text, id and score of each token that plain text may become, the last of equals wins. `bytes`: the
    /// token of each byte; `unknown` stands in where there is none.
    pub(crate) fn new<'a>(
        tokens: impl Iterator<Item = (&'a str, TokenId, f32)>,
        bytes: [Option<TokenId>; 256],
        unknown: Option<TokenId>,
        space_prefix: bool,
    ) -> Self {
        let mut spm = Self {
            tokens: AHashMap::new(),
            bytes: bytes.map(|byte| byte.or(unknown)),
            ascii_neighbours: Box::new([0; 128]),
            neighbours: AHashSet::new(),
            token_bytes_max: 0,
            space_prefix,
        };
        for (text, id, score) in tokens.filter(|(text, ..)| !text.is_empty()) {
            spm.token_bytes_max = spm.token_bytes_max.max(text.len());
            for (left, right) in text.chars().zip(text.chars().skip(1)) {
                if left.is_ascii() && right.is_ascii() {
                    spm.ascii_neighbours[left as usize] |= 1 << right as u32;
                } else {
                    spm.neighbours.insert((left, right));
                }
            }
            spm.tokens.insert(text.into(), (id, Score::new(score)));
        }
        spm
    }

    /// Appends the ids of a text without whole-string tokens. `is_start`: it begins the whole, or follows such a
    /// token.
    pub(crate) fn encode(&self, text: &str, is_start: bool, scratch: &mut Scratch, out: &mut Vec<TokenId>) {
        let mut escaped = std::mem::take(&mut scratch.text);
        escaped.clear();
        if is_start && self.space_prefix {
            escaped.push(SPACE);
        }
        escaped.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));

        let mut start = 0;
        let mut before = None;
        for (at, c) in escaped.char_indices() {
            if before.is_some_and(|before| !self.are_neighbours(before, c)) {
                self.encode_piece(&escaped[start..at], scratch, out);
                start = at;
            }
            before = Some(c);
        }
        self.encode_piece(&escaped[start..], scratch, out);
        scratch.text = escaped;
    }

    fn are_neighbours(&self, left: char, right: char) -> bool {
        if left.is_ascii() && right.is_ascii() {
            self.ascii_neighbours[left as usize] >> right as u32 & 1 == 1
        } else {
            self.neighbours.contains(&(left, right))
        }
    }

    fn encode_piece(&self, piece: &str, scratch: &mut Scratch, out: &mut Vec<TokenId>) {
        let Scratch { symbols, joins, .. } = scratch;
        symbols.clear();
        joins.clear();
        for (nth, (start, c)) in (0u32..).zip(piece.char_indices()) {
            let start = u32::try_from(start).expect("texts are limited to far less than 4 GiB");
            let previous = nth.checked_sub(1).unwrap_or(NONE);
            symbols.push(Symbol { start, bytes: c.len_utf8() as u32, next: nth + 1, previous });
        }
        let Some(last) = symbols.last_mut() else { return };
        last.next = NONE;
        for left in 0..symbols.len() as u32 - 1 {
            joins.extend(self.join(piece, symbols, left, left + 1));
        }
        while let Some(Join { left: Reverse(left), bytes, .. }) = joins.pop() {
            let Symbol { bytes: left_bytes, next: right, previous, .. } = symbols[left as usize];
            // Stale: one of the two has been joined since, and symbols only grow.
            if left_bytes == 0 || right == NONE || left_bytes + symbols[right as usize].bytes != bytes {
                continue;
            }
            let after = symbols[right as usize].next;
            symbols[right as usize].bytes = 0;
            symbols[left as usize].bytes = bytes;
            symbols[left as usize].next = after;
            if after != NONE {
                symbols[after as usize].previous = left;
                joins.extend(self.join(piece, symbols, left, after));
            }
            if previous != NONE {
                joins.extend(self.join(piece, symbols, previous, left));
            }
        }
        for symbol in symbols.iter().filter(|symbol| symbol.bytes > 0) {
            let text = &piece[symbol.start as usize..][..symbol.bytes as usize];
            match self.tokens.get(text) {
                Some((id, _)) => out.push(*id),
                None => out.extend(text.bytes().filter_map(|byte| self.bytes[usize::from(byte)])),
            }
        }
    }

    fn join(&self, piece: &str, symbols: &[Symbol], left: u32, right: u32) -> Option<Join> {
        let start = symbols[left as usize].start as usize;
        let bytes = symbols[left as usize].bytes + symbols[right as usize].bytes;
        if bytes as usize > self.token_bytes_max {
            return None;
        }
        let (_, score) = *self.tokens.get(&piece[start..start + bytes as usize])?;
        Some(Join { score, left: Reverse(left), bytes })
    }
}

/// The byte that a byte token stands for: `<0x0A>`.
pub(crate) fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let hex = |c: u8| c.is_ascii_digit() || (b'A'..=b'F').contains(&c);
    if digits.len() != 2 || !digits.bytes().all(hex) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

/// The bytes of a normal token's text.
pub(crate) fn bytes_of(text: &str, out: &mut Vec<u8>) {
    for part in text.split_inclusive(SPACE) {
        match part.strip_suffix(SPACE) {
            Some(part) => {
                out.extend_from_slice(part.as_bytes());
                out.push(b' ');
            }
            None => out.extend_from_slice(part.as_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Ids 0..=255 are bytes, then the tokens in order.
    fn spm(tokens: &[(&str, f32)], space_prefix: bool) -> Spm {
        let tokens = (256..).zip(tokens).map(|(id, (text, score))| (*text, id, *score));
        Spm::new(tokens, std::array::from_fn(|byte| Some(byte as TokenId)), None, space_prefix)
    }

    fn encode(spm: &Spm, text: &str) -> Vec<TokenId> {
        let mut ids = Vec::new();
        spm.encode(text, true, &mut Scratch::default(), &mut ids);
        ids
    }

    fn check(tokens: &[(&str, f32)], text: &str, expect: &[TokenId]) {
        assert_eq!(encode(&spm(tokens, false), text), expect, "{text:?} of {tokens:?}");
    }

    #[test]
    fn joins_the_best_first_and_the_leftmost_of_equals() {
        let tokens = [("a", 0.0), ("b", 0.0), ("ab", -2.0), ("ba", -1.0), ("aa", -2.0), ("aba", -3.0)];
        check(&tokens, "", &[]);
        check(&tokens, "ab", &[258]);
        check(&tokens, "baab", &[259, 258]);
        check(&tokens, "aaa", &[260, 256]);
        check(&tokens, "aab", &[260, 257]);
        // "ba" comes first, then "a" and "ba" make "aba".
        check(&tokens, "aba", &[261]);
        // A pair whose parts are no tokens is joined all the same.
        check(&[("xy", -1.0)], "xyx", &[256, u32::from(b'x')]);
    }

    #[test]
    fn what_is_no_token_becomes_bytes() {
        check(&[("a", 0.0)], "aé", &[256, 0xC3, 0xA9]);
        let spm = Spm::new([("a", 7, 0.0)].into_iter(), [None; 256], Some(3), false);
        assert_eq!(encode(&spm, "aé"), [7, 3, 3]);
        let spm = Spm::new([("a", 7, 0.0)].into_iter(), [None; 256], None, false);
        assert_eq!(encode(&spm, "aé"), [7]);
    }

    #[test]
    fn spaces_and_the_prefix() {
        let tokens = [("▁", -1.0), ("▁▁", -2.0), ("a", -1.0), ("▁a", -3.0)];
        let ids = |prefix, text| encode(&spm(&tokens, prefix), text);
        assert_eq!(ids(false, "a a  a"), [258, 259, 257, 258]);
        assert_eq!(ids(true, "a a"), [259, 259]);
        assert_eq!(ids(true, ""), [256]);
    }

    #[test]
    fn byte_tokens_and_spaces_are_read() {
        assert_eq!((byte_of("<0x0A>"), byte_of("<0xff>"), byte_of("<0xFFF>")), (Some(10), None, None));
        assert_eq!((byte_of("<0xé>"), byte_of("<0x+1>")), (None, None));
        let mut bytes = Vec::new();
        bytes_of("▁a▁▁", &mut bytes);
        assert_eq!(bytes, b" a  ");
    }

    #[test]
    fn scores_are_ordered_as_numbers() {
        let scores = [f32::NEG_INFINITY, -1000.0, -1.5, -0.0, 1e-9, 2.0, f32::INFINITY].map(Score::new);
        assert!(scores.is_sorted());
        assert_eq!(Score::new(0.0), Score::new(-0.0));
    }

    /// The definition, without cuts and queues.
    fn by_definition(tokens: &[(String, f32)], text: &str) -> Vec<String> {
        let mut symbols: Vec<String> = text.chars().map(String::from).collect();
        loop {
            let mut best: Option<(f32, usize)> = None;
            for at in 1..symbols.len() {
                let joined = symbols[at - 1].clone() + &symbols[at];
                if let Some((_, score)) = tokens.iter().rfind(|(text, _)| *text == joined)
                    && best.is_none_or(|(best, _)| *score > best)
                {
                    best = Some((*score, at));
                }
            }
            let Some((_, at)) = best else { return symbols };
            let right = symbols.remove(at);
            symbols[at - 1].push_str(&right);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]
        #[test]
        fn ids_are_those_of_the_definition(
            tokens in prop::collection::vec(("[abcé]{1,5}", -4i8..0), 0..40),
            text in "[abcéx]{0,60}",
        ) {
            let tokens: Vec<(String, f32)> = tokens.into_iter().map(|(t, s)| (t, f32::from(s))).collect();
            let borrowed: Vec<(&str, f32)> = tokens.iter().map(|(text, score)| (text.as_str(), *score)).collect();
            let id = |text: &str| tokens.iter().rposition(|(token, _)| token == text).map(|at| at as u32 + 256);
            let expect: Vec<TokenId> = by_definition(&tokens, &text)
                .iter()
                .flat_map(|symbol| match id(symbol) {
                    Some(id) => vec![id],
                    None => symbol.bytes().map(u32::from).collect(),
                })
                .collect();
            prop_assert_eq!(encode(&spm(&borrowed, false), &text), expect);
        }
    }
}
