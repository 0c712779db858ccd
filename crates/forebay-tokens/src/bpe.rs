//! Byte-level byte-pair encoding of one word (Sennrich et al., 2016; the bytes are GPT-2's), fast.
//!
//! Most words are tokens: they cost one look-up. Others are merged pair by pair, best rank first, leftmost of equals:
//! with a plain scan while they are short, with a heap when long, so the worst word costs O(n log n). No cache, no
//! state, no allocation per word.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use ahash::AHashMap;
use forebay_types::TokenId;

/// Above this many symbols the heap is used; below, scanning an array is faster.
const SCAN_SYMBOLS_MAX: usize = 48;
const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Merge {
    rank: u32,
    id: TokenId,
}

/// The merges of a vocabulary by the ids they join.
pub(crate) struct ByteBpe {
    /// Id of each single byte; `NONE` where the vocabulary lacks it, and then the byte gives no token.
    bytes: [TokenId; 256],
    merges: AHashMap<(TokenId, TokenId), Merge>,
    /// Words that are one token.
    words: AHashMap<Box<[u8]>, TokenId>,
}

/// Buffers of one call, reused from word to word.
#[derive(Default)]
pub(crate) struct Scratch {
    ids: Vec<TokenId>,
    ranks: Vec<u32>,
    next: Vec<u32>,
    previous: Vec<u32>,
    heap: BinaryHeap<Reverse<(u32, u32, TokenId, TokenId)>>,
}

impl ByteBpe {
    /// `tokens`: bytes and id of each token that text may become, the last of equals wins. `merges`: the ids that
    /// are joined and the id that they become, best first. `ignore_merges`: a word that is a token is that token,
    /// even if merging would end elsewhere.
    pub(crate) fn new<'a>(
        tokens: impl Iterator<Item = (&'a [u8], TokenId)>,
        merges: impl Iterator<Item = (TokenId, TokenId, TokenId)>,
        ignore_merges: bool,
    ) -> Self {
        let mut bytes = [NONE; 256];
        let mut words: AHashMap<Box<[u8]>, TokenId> = AHashMap::new();
        for (text, id) in tokens {
            if let [byte] = text {
                bytes[usize::from(*byte)] = id;
            }
            if !text.is_empty() {
                words.insert(text.into(), id);
            }
        }
        // A pair that stands twice has the rank of its last, as in the `tokenizers` crate.
        let merges = (0u32..).zip(merges).map(|(rank, (a, b, id))| ((a, b), Merge { rank, id })).collect();
        let mut bpe = Self { bytes, merges, words };
        if !ignore_merges {
            let mut words = std::mem::take(&mut bpe.words);
            let mut scratch = Scratch::default();
            let mut ids = Vec::new();
            words.retain(|word, id| {
                ids.clear();
                bpe.merge(word, &mut scratch, &mut ids);
                ids == [*id]
            });
            bpe.words = words;
        }
        bpe.words.shrink_to_fit();
        bpe
    }

    /// Appends the ids of one word.
    pub(crate) fn encode(&self, word: &[u8], scratch: &mut Scratch, out: &mut Vec<TokenId>) {
        match self.words.get(word) {
            Some(id) => out.push(*id),
            None => self.merge(word, scratch, out),
        }
    }

    fn merge(&self, word: &[u8], scratch: &mut Scratch, out: &mut Vec<TokenId>) {
        let ids = &mut scratch.ids;
        ids.clear();
        ids.extend(word.iter().map(|byte| self.bytes[usize::from(*byte)]).filter(|id| *id != NONE));
        if ids.len() <= SCAN_SYMBOLS_MAX {
            self.merge_by_scan(scratch, out);
        } else {
            self.merge_by_heap(scratch, out);
        }
    }

    fn rank(&self, left: TokenId, right: TokenId) -> u32 {
        self.merges.get(&(left, right)).map_or(NONE, |merge| merge.rank)
    }

    fn merge_by_scan(&self, scratch: &mut Scratch, out: &mut Vec<TokenId>) {
        let Scratch { ids, ranks, .. } = scratch;
        ranks.clear();
        ranks.extend(ids.windows(2).map(|pair| self.rank(pair[0], pair[1])));
        // `min_by_key` gives the first of equals: the leftmost.
        while let Some((at, &rank)) = ranks.iter().enumerate().min_by_key(|(_, rank)| **rank)
            && rank != NONE
        {
            ids[at] = self.merges[&(ids[at], ids[at + 1])].id;
            ids.remove(at + 1);
            ranks.remove(at);
            if at > 0 {
                ranks[at - 1] = self.rank(ids[at - 1], ids[at]);
            }
            if at < ranks.len() {
                ranks[at] = self.rank(ids[at], ids[at + 1]);
            }
        }
        out.extend_from_slice(ids);
    }

    fn merge_by_heap(&self, scratch: &mut Scratch, out: &mut Vec<TokenId>) {
        let Scratch { ids, next, previous, heap, .. } = scratch;
        let count = u32::try_from(ids.len()).expect("texts are limited to far less than 4 GiB");
        next.clear();
        next.extend((1..count).chain([NONE]));
        previous.clear();
        previous.extend([NONE].into_iter().chain(0..count - 1));
        heap.clear();
        let push = |heap: &mut BinaryHeap<_>, at: u32, left: TokenId, right: TokenId| {
            let rank = self.rank(left, right);
            if rank != NONE {
                heap.push(Reverse((rank, at, left, right)));
            }
        };
        for at in 0..count - 1 {
            push(heap, at, ids[at as usize], ids[at as usize + 1]);
        }
        while let Some(Reverse((_, at, left, right))) = heap.pop() {
            let right_at = next[at as usize];
            // Stale: one of the two has been merged since. A merged-away symbol has the id `NONE`.
            if ids[at as usize] != left || right_at == NONE || ids[right_at as usize] != right {
                continue;
            }
            let id = self.merges[&(left, right)].id;
            ids[at as usize] = id;
            ids[right_at as usize] = NONE;
            let after = next[right_at as usize];
            next[at as usize] = after;
            if after != NONE {
                previous[after as usize] = at;
                push(heap, at, id, ids[after as usize]);
            }
            let before = previous[at as usize];
            if before != NONE {
                push(heap, before, ids[before as usize], id);
            }
        }
        out.extend(ids.iter().filter(|id| **id != NONE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokenizers::Model;
    use tokenizers::models::bpe::BPE;

    /// A vocabulary over `a`..`d` (with or without `d` itself), grown by random merges.
    fn vocabulary(with_d: bool, joins: &[(usize, usize)]) -> (Vec<String>, Vec<(usize, usize, usize)>) {
        let mut tokens: Vec<String> = ["a", "b", "c", "d"].iter().map(|text| (*text).to_owned()).collect();
        if !with_d {
            tokens.pop();
        }
        let mut merges = Vec::new();
        for (left, right) in joins {
            let (left, right) = (left % tokens.len(), right % tokens.len());
            let joined = format!("{}{}", tokens[left], tokens[right]);
            if joined.len() > 24 || merges.iter().any(|(l, r, _)| (*l, *r) == (left, right)) {
                continue;
            }
            // The same text may be reached by two merges.
            let id = tokens.iter().position(|text| *text == joined).unwrap_or_else(|| {
                tokens.push(joined);
                tokens.len() - 1
            });
            merges.push((left, right, id));
        }
        (tokens, merges)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]
        #[test]
        fn ids_are_those_of_the_library(
            with_d in any::<bool>(),
            ignore_merges in any::<bool>(),
            joins in prop::collection::vec((0..40usize, 0..40usize), 0..40),
            // Short words are merged by scan, long ones by heap.
            words in prop::collection::vec("[abcd]{1,12}|[abcd]{40,90}|(ab){1,60}|a{1,80}", 1..6),
        ) {
            let (tokens, merges) = vocabulary(with_d, &joins);
            let id = |index: usize| u32::try_from(index).unwrap();
            let bpe = ByteBpe::new(
                (0..).zip(&tokens).map(|(id, text)| (text.as_bytes(), id)),
                merges.iter().map(|(left, right, joined)| (id(*left), id(*right), id(*joined))),
                ignore_merges,
            );
            let library = BPE::builder()
                .vocab_and_merges(
                    (0..).zip(&tokens).map(|(id, text)| (text.clone(), id)).collect::<AHashMap<_, _>>(),
                    merges.iter().map(|(left, right, _)| (tokens[*left].clone(), tokens[*right].clone())).collect(),
                )
                .ignore_merges(ignore_merges)
                .build()
                .unwrap();
            let mut scratch = Scratch::default();
            for word in words {
                let mut ids = Vec::new();
                bpe.encode(word.as_bytes(), &mut scratch, &mut ids);
                let expect: Vec<u32> = library.tokenize(&word).unwrap().iter().map(|token| token.id).collect();
                prop_assert_eq!(ids, expect, "{}", word);
            }
        }
    }
}
