//! Ids to text, one by one.
//!
//! A token may end in the middle of a character, so its bytes are held until the character is whole. This needs the
//! bytes of each token, not its text, and is O(1) per token; other engines decode a window of recent ids twice per
//! token and compare.

use std::sync::Arc;

use forebay_types::TokenId;

use crate::tokenizer::Tokenizer;

/// Incremental decoder of one generation.
///
/// Holds: all texts of [`push`](Self::push) and [`finish`](Self::finish) together are
/// [`Tokenizer::decode`] of all ids, and each is valid UTF-8. The one difference: a generation continues a prompt,
/// so its first space is kept also where a tokenizer drops the first space of a whole text (SentencePiece).
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// Control tokens that give text all the same.
    shown: Arc<[TokenId]>,
    /// The beginning of a character whose rest has not come: at most 3 bytes between calls.
    held: Vec<u8>,
    out: String,
}

impl Detokenizer {
    /// `skip_special`: control tokens give no text.
    pub fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Self {
            tokenizer,
            skip_special,
            shown: Arc::default(),
            held: Vec::with_capacity(32),
            out: String::with_capacity(32),
        }
    }

    /// These give text even where control tokens don't: tags that somebody looks for.
    pub fn showing(self, shown: Arc<[TokenId]>) -> Self {
        Self { shown, ..self }
    }

    /// The text that is certain with this id; empty while a character is not whole. Bytes that no continuation can
    /// make valid come as U+FFFD at once.
    pub fn push(&mut self, id: TokenId) -> &str {
        self.out.clear();
        if self.skip_special && self.tokenizer.is_special(id) && !self.shown.contains(&id) {
            return &self.out;
        }
        self.held.extend_from_slice(self.tokenizer.token_bytes(id));
        let mut done = 0;
        for chunk in self.held.utf8_chunks() {
            let invalid = chunk.invalid();
            let ends_here = done + chunk.valid().len() + invalid.len() == self.held.len();
            self.out.push_str(chunk.valid());
            done += chunk.valid().len();
            if invalid.is_empty() {
                break;
            }
            // At the very end it may be a character that is not whole yet.
            if ends_here && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none()) {
                break;
            }
            self.out.push(char::REPLACEMENT_CHARACTER);
            done += invalid.len();
        }
        self.held.drain(..done);
        &self.out
    }

    /// What is still held, as U+FFFD, at the end of the generation. Afterwards the decoder is as new.
    pub fn finish(&mut self) -> &str {
        self.out.clear();
        if !self.held.is_empty() {
            // One for the whole: `held` is one unfinished character, as `from_utf8_lossy` counts.
            self.out.push(char::REPLACEMENT_CHARACTER);
            self.held.clear();
        }
        &self.out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vocab::{TokenType, Vocab};
    use proptest::prelude::*;

    /// Ids 0..=255 are the bytes of that value, 256 is "é", 257 half of "東" and "x", 258 a control token.
    fn tokenizer() -> Tokenizer {
        let alphabet: String = (0..0x144).filter_map(char::from_u32).collect();
        let of = |byte: u8| alphabet.chars().find(|c| crate::alphabet::byte_of(*c) == Some(byte)).unwrap();
        let spell = |bytes: &[u8]| bytes.iter().map(|byte| of(*byte)).collect::<String>();
        let mut tokens: Vec<String> = (0..=255).map(|byte| spell(&[byte])).collect();
        tokens.extend([spell("é".as_bytes()), spell(&[0x9D, 0xB1, b'x']), "<|im_end|>".to_owned()]);
        let mut token_types = vec![TokenType::Normal; 258];
        token_types.push(TokenType::Control);
        let vocab =
            Vocab { model: "gpt2".into(), pre: "gpt-2".into(), tokens, token_types, ..Vocab::default() };
        Tokenizer::new(vocab).unwrap()
    }

    fn check(ids: &[TokenId], skip_special: bool, pieces: &[&str], end: &str) {
        let mut detokenizer = Detokenizer::new(tokenizer(), skip_special);
        let got: Vec<String> = ids.iter().map(|id| detokenizer.push(*id).to_owned()).collect();
        assert_eq!(got, pieces, "{ids:?}");
        assert_eq!(detokenizer.finish(), end, "{ids:?}");
    }

    #[test]
    fn holds_back_half_a_character() {
        check(&[104, 256, 105], true, &["h", "é", "i"], "");
        check(&[0xE6, 257], true, &["", "東x"], "");
        check(&[0xF0, 0x9F, 0x8E, 0x89], true, &["", "", "", "🎉"], "");
        check(&[0xF0, 0x9F, 104], true, &["", "", "\u{FFFD}h"], "");
        check(&[104, 0xE6, 0x9D], true, &["h", "", ""], "\u{FFFD}");
        check(&[0xFF, 0x80], true, &["\u{FFFD}", "\u{FFFD}"], "");
        check(&[0xE6, 258, 257, 999], true, &["", "", "東x", ""], "");
        check(&[104, 258], false, &["h", "<|im_end|>"], "");
    }

    #[test]
    fn some_control_tokens_can_be_shown() {
        let text = |shown: &[TokenId]| {
            let mut detokenizer = Detokenizer::new(tokenizer(), true).showing(shown.into());
            detokenizer.push(258).to_owned()
        };
        assert_eq!((&*text(&[]), &*text(&[258]), &*text(&[1])), ("", "<|im_end|>", ""));
    }

    proptest! {
        #[test]
        fn pieces_are_the_whole(
            // Mostly bytes that start or continue characters.
            ids in prop::collection::vec(prop_oneof![0..262u32, 0x80..0xC0u32, 0xE0..0xF8u32], 0..40),
            skip_special in any::<bool>(),
        ) {
            let tokenizer = tokenizer();
            let mut detokenizer = Detokenizer::new(tokenizer.clone(), skip_special);
            let mut all = String::new();
            for id in &ids {
                all.push_str(detokenizer.push(*id));
                prop_assert!(detokenizer.held.len() < 4);
            }
            all.push_str(detokenizer.finish());
            prop_assert_eq!(all, tokenizer.decode(&ids, skip_special));
        }
    }
}
