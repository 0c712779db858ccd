use std::collections::HashMap;

use forebay_types::TokenId;
use proptest::prelude::*;

use super::*;
use crate::{BlockHasher, CacheSalt, Lane, PrefixIndex};

fn stored(names: &[u64], parent: Option<u64>, tokens: impl IntoIterator<Item = TokenId>) -> ReplicaEvent {
    let tokens: Vec<TokenId> = tokens.into_iter().collect();
    ReplicaEvent::Stored {
        names: names.to_vec(),
        parent,
        block_size: (tokens.len() / names.len()) as u32,
        tokens,
        cache_salt: None,
        medium: Medium::Device,
        group: 0,
    }
}

fn removed(names: &[u64], medium: Medium, group: u32) -> ReplicaEvent {
    ReplicaEvent::Removed { names: names.to_vec(), medium, group }
}

fn copied(names: &[u64], medium: Medium) -> ReplicaEvent {
    ReplicaEvent::Stored {
        names: names.to_vec(),
        parent: None,
        tokens: Vec::new(),
        block_size: 0,
        cache_salt: None,
        medium,
        group: 0,
    }
}

fn hashes(block_size: usize, tokens: impl IntoIterator<Item = TokenId>) -> Vec<BlockHash> {
    let mut hasher = BlockHasher::new(block_size, None);
    hasher.extend(&tokens.into_iter().collect::<Vec<_>>());
    hasher.hashes().to_vec()
}

/// The index after these events, asked for the prompt `0, 1, 2, …`: how many blocks of 4 match.
fn matched(renamer: &mut Renamer, index: &mut PrefixIndex, events: &[ReplicaEvent]) -> u32 {
    for event in events {
        if let Some(event) = renamer.rename(event) {
            index.apply(Lane(0), &event);
        }
    }
    index.matched_blocks(&hashes(4, 0..40)).blocks(Lane(0))
}

#[test]
fn names_become_hashes() {
    let check = |events: &[ReplicaEvent], expect: u32, unknown: u64| {
        let (mut renamer, mut index) = (Renamer::new(4, 100), PrefixIndex::new(100));
        assert_eq!(matched(&mut renamer, &mut index, events), expect, "{events:?}");
        assert_eq!(renamer.unknown(), unknown, "{events:?}");
    };
    let first = || stored(&[70, 71], None, 0..8);
    let next = || stored(&[72], Some(71), 8..12);
    check(&[first()], 2, 0);
    check(&[first(), next()], 3, 0);
    check(&[first(), first(), next()], 3, 0);
    check(&[next()], 0, 1);
    check(&[first(), next(), removed(&[71], Medium::Device, 0)], 1, 0);
    check(&[first(), removed(&[99], Medium::Device, 0)], 2, 0);
    // Its parent is gone, and so is what it could be hashed with.
    check(&[first(), removed(&[71], Medium::Device, 0), next()], 1, 1);
    check(&[first(), ReplicaEvent::Cleared], 0, 0);
    check(&[first(), ReplicaEvent::Cleared, next()], 0, 1);
    // The last copy counts.
    let host = || copied(&[70, 71], Medium::Host);
    check(&[first(), host(), removed(&[71], Medium::Device, 0)], 2, 0);
    check(&[first(), host(), removed(&[71], Medium::Device, 0), removed(&[71], Medium::Host, 0)], 1, 0);
    check(&[copied(&[70], Medium::Host)], 0, 1);
    // Another group drops its own block of the same name.
    check(&[first(), removed(&[70, 71], Medium::Device, 1)], 2, 0);
    // Longer blocks count for several of ours; shorter ones can't be cut to fit.
    check(&[stored(&[70], None, 0..8), stored(&[71], Some(70), 8..16)], 4, 0);
    check(&[stored(&[70, 71, 72], None, 0..6)], 0, 1);
}

#[test]
fn a_salt_counts_for_the_first_block_alone() {
    let salt = CacheSalt::new("s");
    let mut hasher = BlockHasher::new(4, Some(salt.clone()));
    hasher.extend(&(0..12).collect::<Vec<_>>());
    let mut renamer = Renamer::new(4, 100);
    let mut event = stored(&[1, 2], None, 0..8);
    if let ReplicaEvent::Stored { cache_salt, .. } = &mut event {
        *cache_salt = Some(salt);
    }
    let of = |event: Option<KvEvent>| match event {
        Some(KvEvent::Stored { hashes, .. }) => hashes,
        other => panic!("{other:?}"),
    };
    assert_eq!(of(renamer.rename(&event)), hasher.hashes()[..2]);
    assert_eq!(of(renamer.rename(&stored(&[3], Some(2), 8..12))), hasher.hashes()[2..]);
}

#[test]
fn it_forgets_the_oldest() {
    let mut renamer = Renamer::new(4, 2);
    for name in 0..5 {
        renamer.rename(&stored(&[name], None, [name as TokenId; 4]));
        assert!(renamer.len() <= 2);
    }
    assert_eq!(renamer.rename(&removed(&[2], Medium::Device, 0)), None);
    assert!(matches!(renamer.rename(&removed(&[3], Medium::Device, 0)), Some(KvEvent::Removed { .. })));
    assert_eq!(renamer.len(), 1);
}

proptest! {
    /// Against a cache that keeps its blocks in a plain map: after any life, the index knows exactly its blocks.
    #[test]
    fn the_index_follows_a_cache(ops in prop::collection::vec((0u8..8, 0u64..30, 0u64..30), 0..120)) {
        let (mut renamer, mut index) = (Renamer::new(2, 1000), PrefixIndex::new(1000));
        // By name: tokens from the sequence's start.
        let mut cache: HashMap<u64, Vec<TokenId>> = HashMap::new();
        for (op, name, parent) in ops {
            let event = match op {
                0..=4 if !cache.contains_key(&name) => {
                    let before = cache.get(&parent).cloned();
                    let tokens = [name as TokenId, name as TokenId + 100];
                    let parent = before.is_some().then_some(parent);
                    let whole = [before.unwrap_or_default(), tokens.to_vec()].concat();
                    // A cache has a block once.
                    if cache.values().any(|known| *known == whole) { continue; }
                    cache.insert(name, whole);
                    stored(&[name], parent, tokens)
                }
                5 | 6 => {
                    cache.remove(&name);
                    removed(&[name], Medium::Device, 0)
                }
                7 if name == 0 => {
                    cache.clear();
                    ReplicaEvent::Cleared
                }
                _ => continue,
            };
            if let Some(event) = renamer.rename(&event) {
                index.apply(Lane(0), &event);
            }
            prop_assert_eq!(index.blocks_held(Lane(0)) as usize, cache.len());
            for tokens in cache.values() {
                let hashes = hashes(2, tokens.iter().copied());
                prop_assert!(index.holds(Lane(0), &hashes[hashes.len() - 1]));
            }
        }
    }
}
