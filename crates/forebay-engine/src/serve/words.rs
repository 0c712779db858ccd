//! Words that are not to be generated. Pure.
//!
//! As vLLM does it: a word is a sequence of tokens, with a space before it and without; where what was generated ends
//! with all of them but the last, the last may not come.

use forebay_tokens::{EncodeError, Special, Tokenizer};
use forebay_types::TokenId;

/// The words of a request, as tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct BadWords(Vec<Vec<TokenId>>);

impl BadWords {
    pub(crate) fn new(words: &[String], tokenizer: &Tokenizer) -> Result<Self, EncodeError> {
        let mut found: Vec<Vec<TokenId>> = Vec::new();
        for word in words {
            let word = word.trim_start();
            let bare = tokenizer.encode(word, Special::NONE)?;
            let spaced = tokenizer.encode(&format!(" {word}"), Special::NONE)?;
            // A space that is a token of its own stands before the word, and the word is found without it.
            let is_another = spaced.len() == bare.len() && spaced.first() != bare.first();
            found.extend([Some(bare), is_another.then_some(spaced)].into_iter().flatten());
        }
        found.retain(|ids| !ids.is_empty());
        Ok(Self(found))
    }

    /// Tokens of the output that have to be remembered.
    pub(crate) fn reach(&self) -> usize {
        self.0.iter().map(|ids| ids.len() - 1).max().unwrap_or(0)
    }

    /// Adds the tokens that may not come after `output`.
    pub(crate) fn ban(&self, output: &[TokenId], banned: &mut Vec<TokenId>) {
        for ids in &self.0 {
            if let Some((last, before)) = ids.split_last()
                && output.ends_with(before)
            {
                banned.push(*last);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_token_is_banned_behind_the_others() {
        let words = BadWords(vec![vec![7], vec![1, 2, 3], vec![2, 9]]);
        assert_eq!(words.reach(), 2);
        let check = |output: &[TokenId], expect: &[TokenId]| {
            let mut banned = Vec::new();
            words.ban(output, &mut banned);
            assert_eq!(banned, expect, "{output:?}");
        };
        check(&[], &[7]);
        check(&[1], &[7]);
        check(&[1, 2], &[7, 3, 9]);
        check(&[5, 2], &[7, 9]);
        check(&[1, 2, 5], &[7]);
    }
}
