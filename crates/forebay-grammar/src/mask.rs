//! A set of tokens.

use forebay_types::TokenId;

/// Which tokens may come next: one bit each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    words: Vec<u32>,
}

impl Mask {
    pub(crate) fn from_words(words: Vec<u32>) -> Self {
        Self { words }
    }

    /// Exactly these tokens.
    pub fn of(tokens: &[TokenId], vocab_size: usize) -> Self {
        let mut mask = Self::from_words(vec![0; vocab_size.div_ceil(32)]);
        tokens.iter().for_each(|&token| mask.allow(token));
        mask
    }

    pub fn allows(&self, token: TokenId) -> bool {
        let word = self.words.get(token as usize / 32).copied().unwrap_or(0);
        word & (1 << (token % 32)) != 0
    }

    /// Leaves only what is also in `other`. False where nothing is left.
    pub fn intersect(&mut self, other: &Self) -> bool {
        for (n, word) in self.words.iter_mut().enumerate() {
            *word &= other.words.get(n).copied().unwrap_or(0);
        }
        self.words.iter().any(|&word| word != 0)
    }

    /// Makes every logit of a token that may not come minus infinity.
    pub fn apply(&self, logits: &mut [f32]) {
        for (n, chunk) in logits.chunks_mut(32).enumerate() {
            let word = self.words.get(n).copied().unwrap_or(0);
            if word == u32::MAX {
                continue;
            }
            for (bit, logit) in chunk.iter_mut().enumerate() {
                if word & (1 << bit) == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// One more.
    pub fn allow(&mut self, token: TokenId) {
        if let Some(word) = self.words.get_mut(token as usize / 32) {
            *word |= 1 << (token % 32);
        }
    }
}
