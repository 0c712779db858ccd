use super::*;
use proptest::prelude::*;
use std::collections::VecDeque;

/// A hash that is not SHA-256, so that a test can name blocks by number.
fn block(n: u64) -> BlockHash {
    let mut bytes = [0xaa; 32];
    bytes[24..].copy_from_slice(&n.to_be_bytes());
    BlockHash(bytes)
}

fn blocks(names: &[u64]) -> Vec<BlockHash> {
    names.iter().map(|&n| block(n)).collect()
}

fn stored(names: &[u64]) -> KvEvent {
    KvEvent::Stored {
        hashes: blocks(names),
        parent: None,
        tokens: Vec::new(),
        block_size: 16,
        cache_salt: None,
    }
}

fn removed(names: &[u64]) -> KvEvent {
    KvEvent::Removed { hashes: blocks(names) }
}

#[test]
fn longest_prefix_per_replica() {
    fn check(prompt: &[u64], expect: &[(u16, u32)]) {
        let mut index = PrefixIndex::new(100);
        index.apply(Lane(0), &stored(&[1, 2, 3, 4]));
        index.apply(Lane(1), &stored(&[1, 2, 7, 8]));
        index.apply(Lane(2), &stored(&[2, 3, 4])); // the start is missing: no match
        index.apply(Lane(3), &stored(&[1, 2, 3, 4]));
        index.apply(Lane(3), &removed(&[3])); // a hole
        index.apply(Lane(70), &stored(&[1])); // a second word
        let matches = index.matched_blocks(&blocks(prompt));
        assert_eq!(
            matches.iter().map(|(lane, n)| (lane.0, n)).collect::<Vec<_>>(),
            expect,
            "prompt {prompt:?}"
        );
        assert_eq!(matches.longest(), expect.iter().map(|(_, n)| *n).max().unwrap_or(0));
    }
    check(&[1, 2, 3, 4, 5], &[(0, 4), (1, 2), (3, 2), (70, 1)]);
    check(&[1, 2, 7], &[(0, 2), (1, 3), (3, 2), (70, 1)]);
    check(&[1], &[(0, 1), (1, 1), (3, 1), (70, 1)]);
    check(&[9, 1, 2], &[]);
    check(&[], &[]);
}

#[test]
fn a_full_replica_drops_the_ends_of_old_chains_first() {
    let mut index = PrefixIndex::new(4);
    index.insert(Lane(0), &blocks(&[1, 2, 3]));
    index.insert(Lane(0), &blocks(&[11, 12]));
    assert_eq!(index.matched_blocks(&blocks(&[1, 2, 3])).blocks(Lane(0)), 2);
    assert_eq!(index.matched_blocks(&blocks(&[11, 12])).blocks(Lane(0)), 2);
    // Longer than the limit: the start is what is kept.
    index.insert(Lane(0), &blocks(&[21, 22, 23, 24, 25, 26]));
    assert_eq!(index.matched_blocks(&blocks(&[21, 22, 23, 24, 25, 26])).blocks(Lane(0)), 4);
    assert_eq!(index.blocks(), 4);
}

#[test]
fn a_removed_replica_leaves_nothing() {
    let mut index = PrefixIndex::new(100);
    index.insert(Lane(5), &blocks(&[1, 2]));
    index.insert(Lane(6), &blocks(&[1]));
    index.remove_replica(Lane(5));
    index.remove_replica(Lane(500));
    assert_eq!(index.matched_blocks(&blocks(&[1, 2])).iter().collect::<Vec<_>>(), [(Lane(6), 1)]);
    index.apply(Lane(6), &KvEvent::Cleared);
    assert_eq!(index.blocks(), 0);
    assert_eq!(index.blocks_held(Lane(6)), 0);
}

#[derive(Debug, Clone)]
enum Op {
    Insert(u16, Vec<u64>),
    Remove(u16, Vec<u64>),
    Clear(u16),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    // Few names, so that chains overlap; lanes on both sides of a word's end.
    let lane = || prop_oneof![0u16..4, 62u16..67, Just(130u16)];
    let names = || prop::collection::vec(0u64..12, 0..8);
    prop::collection::vec(
        prop_oneof![
            6 => (lane(), names()).prop_map(|(lane, names)| Op::Insert(lane, names)),
            3 => (lane(), names()).prop_map(|(lane, names)| Op::Remove(lane, names)),
            1 => lane().prop_map(Op::Clear),
        ],
        0..60,
    )
}

proptest! {
    /// Against one list of names per lane, oldest first.
    #[test]
    fn behaves_like_one_lru_list_per_replica(
        ops in ops(),
        limit in 1usize..10,
        prompts in prop::collection::vec(prop::collection::vec(0u64..12, 0..8), 1..6),
    ) {
        let mut index = PrefixIndex::new(limit as u32);
        let mut model = vec![VecDeque::<u64>::new(); 131];
        for op in ops {
            match op {
                Op::Insert(lane, names) => {
                    index.apply(Lane(lane), &stored(&names));
                    let held = &mut model[usize::from(lane)];
                    for name in names.iter().take(limit).rev() {
                        held.retain(|n| n != name);
                        if held.len() == limit { held.pop_front(); }
                        held.push_back(*name);
                    }
                }
                Op::Remove(lane, names) => {
                    index.apply(Lane(lane), &removed(&names));
                    model[usize::from(lane)].retain(|n| !names.contains(n));
                }
                Op::Clear(lane) => {
                    index.apply(Lane(lane), &KvEvent::Cleared);
                    model[usize::from(lane)].clear();
                }
            }
            let mut distinct: Vec<u64> = model.iter().flatten().copied().collect();
            distinct.sort_unstable();
            distinct.dedup();
            prop_assert_eq!(index.blocks(), distinct.len());
            for (lane, held) in model.iter().enumerate() {
                prop_assert_eq!(index.blocks_held(Lane(lane as u16)) as usize, held.len());
            }
        }
        let mut matches = Matches::default();
        for prompt in prompts {
            index.matched_blocks_into(&blocks(&prompt), &mut matches);
            for (lane, held) in model.iter().enumerate() {
                let expect = prompt.iter().take_while(|name| held.contains(name)).count();
                prop_assert_eq!(matches.blocks(Lane(lane as u16)) as usize, expect, "lane {}", lane);
            }
        }
    }
}
