use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::{BlockHasher, ExtraKey, block_hash, none_hash};

fn hash(n: u8) -> BlockHash {
    BlockHash([n; 32])
}

/// A chain of blocks `names` of two tokens each, after `parent`.
fn stored(parent: Option<u8>, names: &[u8]) -> KvEvent {
    KvEvent::Stored {
        hashes: names.iter().copied().map(hash).collect(),
        parent: parent.map(hash),
        tokens: names.iter().flat_map(|&n| [u32::from(n), 7]).collect(),
        block_size: 2,
        cache_salt: None,
    }
}

fn removed(names: &[u8]) -> KvEvent {
    KvEvent::Removed { hashes: names.iter().copied().map(hash).collect() }
}

fn told(mirror: &mut CacheMirror, event: KvEvent) -> Vec<KvEvent> {
    let mut out = Vec::new();
    mirror.apply(event, &mut out);
    out
}

#[test]
fn what_has_no_parent_waits_for_it() {
    let mut mirror = CacheMirror::default();
    assert_eq!(told(&mut mirror, stored(None, &[1, 2])), [stored(None, &[1, 2])]);
    assert_eq!(told(&mut mirror, KvEvent::Cleared), [KvEvent::Cleared]);
    // Sequences that were running go on.
    assert_eq!(told(&mut mirror, stored(Some(2), &[3, 4])), []);
    assert_eq!(told(&mut mirror, stored(Some(4), &[5])), []);
    assert_eq!(told(&mut mirror, stored(Some(9), &[10])), []);
    assert_eq!((mirror.len(), mirror.contains(&hash(3))), (0, false));
    assert_eq!(told(&mut mirror, stored(None, &[1])), [stored(None, &[1])]);
    // Removed before anybody heard of it.
    assert_eq!(told(&mut mirror, removed(&[10, 5, 1])), [removed(&[1])]);
    let expect = [stored(None, &[1, 2]), stored(Some(2), &[3]), stored(Some(3), &[4])];
    assert_eq!(told(&mut mirror, stored(None, &[1, 2])), expect);
    assert_eq!(mirror.len(), 4);
    assert_eq!(told(&mut mirror, removed(&[4, 8])), [removed(&[4])]);
    assert_eq!(told(&mut mirror, removed(&[8])), []);
}

#[test]
fn a_snapshot_is_in_pieces_with_parents_first() {
    let mut mirror = CacheMirror::default();
    for event in [stored(None, &[1, 2, 3, 4, 5]), stored(Some(2), &[6, 7]), stored(None, &[8])] {
        told(&mut mirror, event);
    }
    let pieces: Vec<_> = mirror.clone().into_events(3).collect();
    let sizes = |events: &Vec<KvEvent>| {
        let blocks = |event: &KvEvent| match event {
            KvEvent::Stored { hashes, .. } => hashes.len(),
            _ => 0,
        };
        events.iter().map(blocks).sum::<usize>()
    };
    assert_eq!(pieces.iter().map(sizes).collect::<Vec<_>>(), [3, 3, 2]);
    assert_eq!(CacheMirror::default().into_events(3).count(), 0);
    // Slots are used again; what is gone is not told.
    told(&mut mirror, removed(&[5, 4, 7]));
    told(&mut mirror, stored(Some(8), &[9]));
    let names: BTreeSet<_> = hashes(mirror.into_events(100).flatten());
    assert_eq!(names, [1, 2, 3, 6, 8, 9].map(hash).into());
}

#[test]
fn what_can_not_be_hit_is_left_out() {
    let mut mirror = CacheMirror::default();
    told(&mut mirror, stored(None, &[1, 2, 3]));
    told(&mut mirror, stored(None, &[4]));
    told(&mut mirror, removed(&[2]));
    assert_eq!(hashes(mirror.into_events(100).flatten()), [1, 4].map(hash).into());
    // Nor is one that claims to be its own parent.
    let mut mirror = CacheMirror::default();
    told(&mut mirror, stored(None, &[1]));
    told(&mut mirror, stored(Some(1), &[2]));
    told(&mut mirror, removed(&[1]));
    told(&mut mirror, stored(Some(2), &[1]));
    assert_eq!(mirror.into_events(100).count(), 0);
}

fn hashes(events: impl Iterator<Item = KvEvent>) -> BTreeSet<BlockHash> {
    let of = |event| match event {
        KvEvent::Stored { hashes, .. } => hashes,
        other => panic!("{other:?}"),
    };
    events.flat_map(of).collect()
}

/// One change of a cache: a prompt of such tokens is stored, one is evicted from its end, or all are forgotten.
#[derive(Debug, Clone)]
enum Change {
    Store {
        tokens: Vec<u32>,
        salted: bool,
    },
    Evict(prop::sample::Index),
    /// While a sequence with such a prompt goes on, to this many blocks more.
    Clear {
        tokens: Vec<u32>,
        more: u32,
    },
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let tokens = || prop::collection::vec(0u32..2, 2..10);
    let change = prop_oneof![
        6 => (tokens(), any::<bool>()).prop_map(|(tokens, salted)| Change::Store { tokens, salted }),
        4 => any::<prop::sample::Index>().prop_map(Change::Evict),
        1 => (tokens(), 0u32..3).prop_map(|(tokens, more)| Change::Clear { tokens, more }),
    ];
    prop::collection::vec(change, 0..40)
}

proptest! {
    /// Whatever was told, and a snapshot at any moment, say what can be hit; and that is what the tokens hash to.
    #[test]
    fn what_is_told_is_what_can_be_hit(changes in changes(), piece in 1usize..5) {
        let mut mirror = CacheMirror::default();
        // Block to parent, as the cache has them; and as a receiver has.
        let mut cache: BTreeMap<BlockHash, Option<BlockHash>> = BTreeMap::new();
        let mut receiver: BTreeSet<BlockHash> = BTreeSet::new();
        for change in changes {
            let mut events = Vec::new();
            match change {
                Change::Store { tokens, salted } => {
                    let salt = salted.then(|| CacheSalt::new("s"));
                    store(&mut cache, &tokens, 0, salt, &mut events);
                }
                Change::Evict(which) if !cache.is_empty() => {
                    let leaf = |hash: &&BlockHash| !cache.values().any(|parent| parent.as_ref() == Some(*hash));
                    let leaves: Vec<_> = cache.keys().filter(leaf).copied().collect();
                    let hash = leaves[which.index(leaves.len())];
                    cache.remove(&hash);
                    events.push(KvEvent::Removed { hashes: vec![hash] });
                }
                Change::Evict(_) => {}
                Change::Clear { mut tokens, more } => {
                    cache.clear();
                    events.push(KvEvent::Cleared);
                    let done = tokens.len() / 2;
                    tokens.resize(tokens.len() + more as usize * 2, 1);
                    store(&mut cache, &tokens, done, None, &mut events);
                }
            }
            let mut out = Vec::new();
            events.into_iter().for_each(|event| mirror.apply(event, &mut out));
            for event in out {
                receive(&mut receiver, event)?;
            }
            let mut hittable = BTreeSet::new();
            for &hash in cache.keys() {
                let mut at = Some(hash);
                while let Some(parent) = at.and_then(|at| cache.get(&at)) {
                    match parent {
                        None => {
                            hittable.insert(hash);
                            break;
                        }
                        Some(parent) => at = Some(*parent),
                    }
                }
            }
            prop_assert_eq!(&receiver, &hittable);
            prop_assert_eq!(mirror.len(), hittable.len());
            let mut late = BTreeSet::new();
            for event in mirror.clone().into_events(piece).flatten() {
                receive(&mut late, event)?;
            }
            prop_assert_eq!(&late, &hittable);
        }
    }
}

/// The blocks of a prompt from number `from` on, where they are not there.
fn store(
    cache: &mut BTreeMap<BlockHash, Option<BlockHash>>,
    tokens: &[u32],
    from: usize,
    salt: Option<CacheSalt>,
    events: &mut Vec<KvEvent>,
) {
    let mut hasher = BlockHasher::new(2, salt.clone());
    hasher.extend(tokens);
    let all = hasher.hashes();
    for (n, hash) in all.iter().enumerate().skip(from) {
        let parent = n.checked_sub(1).map(|before| all[before]);
        if cache.insert(*hash, parent).is_none() {
            events.push(KvEvent::Stored {
                hashes: vec![*hash],
                parent,
                tokens: tokens[n * 2..n * 2 + 2].to_vec(),
                block_size: 2,
                cache_salt: salt.clone().filter(|_| n == 0),
            });
        }
    }
}

fn receive(receiver: &mut BTreeSet<BlockHash>, event: KvEvent) -> Result<(), TestCaseError> {
    match event {
        KvEvent::Stored { hashes, parent, tokens, block_size, cache_salt } => {
            prop_assert!(parent.is_none_or(|parent| receiver.contains(&parent)), "an unknown parent");
            let mut previous = parent.unwrap_or_else(none_hash);
            for (n, (hash, tokens)) in hashes.iter().zip(tokens.chunks(block_size as usize)).enumerate() {
                let salt = cache_salt.as_ref().filter(|_| n == 0).map(ExtraKey::CacheSalt);
                previous = block_hash(&previous, tokens, salt.as_slice());
                prop_assert_eq!(previous, *hash);
                receiver.insert(*hash);
            }
        }
        KvEvent::Removed { hashes } => {
            for hash in hashes {
                prop_assert!(receiver.remove(&hash), "what was never told is removed");
            }
        }
        KvEvent::Cleared => receiver.clear(),
    }
    Ok(())
}
