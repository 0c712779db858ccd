//! The prefix index under any events of any replicas, against one list of blocks per replica.
//!
//! The first byte is the limit per replica; then each event is a byte that says what (and of whom), a byte that says
//! how many blocks, and that many blocks. After each event a prompt of the same blocks is looked up.
#![no_main]

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use forebay_kv::{KvEvent, Lane, Matches, PrefixIndex};
use forebay_types::BlockHash;
use libfuzzer_sys::fuzz_target;

/// On both sides of a word's end of the holder sets.
const LANES: [u16; 8] = [0, 1, 2, 63, 64, 65, 130, 1000];

fn block(name: u8) -> BlockHash {
    let mut bytes = [0xaa; 32];
    bytes[24..].copy_from_slice(&u64::from(name).to_be_bytes());
    BlockHash(bytes)
}

fuzz_target!(|data: &[u8]| {
    let Some((&limit, mut data)) = data.split_first() else { return };
    let limit = usize::from(limit % 16);
    let mut index = PrefixIndex::new(limit as u32);
    let mut model: BTreeMap<u16, VecDeque<u8>> = BTreeMap::new();
    let mut matches = Matches::default();
    while let [what, count, rest @ ..] = data {
        let (names, after) = rest.split_at(rest.len().min(usize::from(count % 24)));
        data = after;
        let lane = LANES[usize::from(what % 8)];
        let held = model.entry(lane).or_default();
        let hashes: Vec<_> = names.iter().map(|name| block(*name)).collect();
        let event = match what / 8 % 4 {
            0 | 1 => {
                for name in names.iter().take(limit).rev() {
                    held.retain(|other| other != name);
                    if held.len() == limit {
                        held.pop_front();
                    }
                    held.push_back(*name);
                }
                KvEvent::Stored {
                    hashes: hashes.clone(),
                    parent: None,
                    tokens: Vec::new(),
                    block_size: 16,
                    cache_salt: None,
                }
            }
            2 => {
                held.retain(|name| !names.contains(name));
                KvEvent::Removed { hashes: hashes.clone() }
            }
            _ => {
                held.clear();
                KvEvent::Cleared
            }
        };
        index.apply(Lane(lane), &event);

        let distinct: BTreeSet<_> = model.values().flatten().collect();
        assert_eq!(index.blocks(), distinct.len());
        index.matched_blocks_into(&hashes, &mut matches);
        for lane in LANES {
            let held = model.get(&lane);
            let stored = held.map_or(0, VecDeque::len);
            assert_eq!(index.blocks_held(Lane(lane)) as usize, stored);
            let expect = names.iter().take_while(|name| held.is_some_and(|held| held.contains(name))).count();
            let matched = matches.blocks(Lane(lane)) as usize;
            assert_eq!(matched, expect, "lane {lane}");
            let prompt: BTreeSet<_> = names[..matched].iter().collect();
            assert!(prompt.len() <= stored, "more was matched than is stored");
        }
        assert!(matches.longest() as usize <= names.len());
    }
});
