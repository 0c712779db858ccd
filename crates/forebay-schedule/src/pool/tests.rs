use super::*;
use forebay_kv::{Lane, PrefixIndex};
use proptest::prelude::*;
use std::collections::VecDeque;

fn hash(n: u8) -> BlockHash {
    BlockHash([n; 32])
}

const FULL: FullBlock<'static> = FullBlock { parent: None, tokens: [&[1, 2], &[]], cache_salt: None };

#[test]
fn reuse_takes_uncached_blocks_then_the_oldest() {
    let mut pool = BlockPool::new(3, 2, true);
    let blocks: Vec<u32> = std::iter::from_fn(|| pool.try_alloc()).collect();
    assert_eq!(blocks, [0, 1, 2]);
    assert_eq!(pool.try_alloc(), None);
    assert_eq!(pool.seal(0, hash(10), &FULL), 0);
    assert_eq!(pool.seal(2, hash(12), &FULL), 2);
    pool.release(2);
    pool.release(0);
    pool.release(1);
    assert_eq!(pool.lookup(&hash(10)), Some(0), "freed, still cached");
    assert_eq!([pool.try_alloc(), pool.try_alloc()], [Some(1), Some(2)]);
    assert_eq!(pool.lookup(&hash(12)), None);
    pool.hold(0);
    assert_eq!(pool.try_alloc(), None);

    let mut events = Vec::new();
    pool.drain_events(&mut events);
    assert_eq!(events.last(), Some(&KvEvent::Removed { hashes: vec![hash(12)] }));
    events.clear();
    pool.drain_events(&mut events);
    assert_eq!(events, []);
}

/// A full cache, in which each new block pushes out an old one.
#[test]
fn the_cache_takes_no_memory_after_its_start() {
    let mut pool = BlockPool::new(100, 2, false);
    let counted = allocation_counter::measure(|| {
        for n in 0..100_000u64 {
            let mut name = [0; 32];
            name[..8].copy_from_slice(&n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
            let block = pool.try_alloc().unwrap();
            let block = pool.seal(block, BlockHash(name), &FULL);
            pool.release(block);
        }
    });
    assert_eq!(pool.cached_blocks(), 100);
    assert_eq!(counted.count_total, 0);
}

#[test]
fn the_second_of_two_equal_blocks_is_given_back() {
    let mut pool = BlockPool::new(2, 2, true);
    let (a, b) = (pool.try_alloc().unwrap(), pool.try_alloc().unwrap());
    assert_eq!(pool.seal(a, hash(1), &FULL), a);
    assert_eq!(pool.seal(b, hash(1), &FULL), a);
    assert_eq!((pool.refs(a), pool.refs(b), pool.free_blocks()), (2, 0, 1));
    let mut events = Vec::new();
    pool.drain_events(&mut events);
    assert_eq!(events.len(), 1, "the cache has it once: {events:?}");
}

#[test]
fn blocks_of_one_chain_are_one_event() {
    let mut pool = BlockPool::new(4, 2, true);
    let blocks: Vec<u32> = std::iter::from_fn(|| pool.try_alloc()).collect();
    let salt = CacheSalt::new("s");
    let seal = |pool: &mut BlockPool, i: usize, n: u8, parent: Option<u8>, tokens: [&[u32]; 2]| {
        let full = FullBlock { parent: parent.map(hash), tokens, cache_salt: Some(&salt) };
        assert_eq!(pool.seal(blocks[i], hash(n), &full), blocks[i]);
    };
    seal(&mut pool, 0, 1, None, [&[1, 2], &[]]);
    seal(&mut pool, 1, 2, Some(1), [&[3], &[4]]);
    seal(&mut pool, 2, 9, Some(1), [&[5, 6], &[]]);
    let mut events = Vec::new();
    pool.drain_events(&mut events);
    let stored = |hashes, parent, tokens, cache_salt| KvEvent::Stored {
        hashes,
        parent,
        tokens,
        block_size: 2,
        cache_salt,
    };
    assert_eq!(
        events,
        [
            stored(vec![hash(1), hash(2)], None, vec![1, 2, 3, 4], Some(salt.clone())),
            stored(vec![hash(9)], Some(hash(1)), vec![5, 6], None),
        ]
    );
}

#[test]
fn events_that_nobody_drains_are_bounded() {
    let mut pool = BlockPool::new(1, 2, true);
    for i in 0..5000u32 {
        let block = pool.try_alloc().unwrap();
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&i.to_be_bytes());
        assert_eq!(pool.seal(block, BlockHash(bytes), &FULL), block);
        pool.release(block);
    }
    let mut events = Vec::new();
    pool.drain_events(&mut events);
    assert_eq!(events[0], KvEvent::Cleared);
    assert!(events.len() <= 1026, "{}", events.len());
}

#[derive(Debug, Clone)]
enum Op {
    Alloc,
    /// Seal the n-th held block with this hash.
    Seal(usize, u8),
    /// Look up and hold.
    Hold(u8),
    Release(usize),
    Clear,
}

/// The same pool, from lists that are searched.
struct Model {
    refs: Vec<u32>,
    hashes: Vec<Option<u8>>,
    free: VecDeque<u32>,
    /// One entry per reference.
    held: Vec<u32>,
}

impl Model {
    fn release(&mut self, block: u32) {
        self.refs[block as usize] -= 1;
        if self.refs[block as usize] == 0 {
            match self.hashes[block as usize] {
                Some(_) => self.free.push_back(block),
                None => self.free.push_front(block),
            }
        }
    }

    fn find(&self, name: u8) -> Option<u32> {
        self.hashes.iter().position(|h| *h == Some(name)).map(|i| i as u32)
    }

    fn hold(&mut self, block: u32) {
        self.free.retain(|b| *b != block);
        self.refs[block as usize] += 1;
    }
}

proptest! {
    #[test]
    fn behaves_like_searched_lists(
        ops in prop::collection::vec(
            prop_oneof![
                4 => Just(Op::Alloc),
                4 => (any::<usize>(), 0u8..8).prop_map(|(i, n)| Op::Seal(i, n)),
                3 => (0u8..8).prop_map(Op::Hold),
                4 => any::<usize>().prop_map(Op::Release),
                1 => Just(Op::Clear),
            ],
            0..120,
        ),
        blocks in 1u32..9,
    ) {
        let mut pool = BlockPool::new(blocks, 2, true);
        let n = blocks as usize;
        let mut model =
            Model { refs: vec![0; n], hashes: vec![None; n], free: (0..blocks).collect(), held: Vec::new() };
        let (mut index, mut events) = (PrefixIndex::new(blocks), Vec::new());
        for op in ops {
            match op {
                Op::Alloc => {
                    let block = pool.try_alloc();
                    prop_assert_eq!(block, model.free.pop_front());
                    if let Some(block) = block {
                        model.hashes[block as usize] = None;
                        model.refs[block as usize] = 1;
                        model.held.push(block);
                    }
                }
                Op::Seal(i, name) if !model.held.is_empty() => {
                    let i = i % model.held.len();
                    let block = model.held[i];
                    if model.refs[block as usize] != 1 || model.hashes[block as usize].is_some() {
                        continue; // not writable, or sealed already
                    }
                    let now = pool.seal(block, hash(name), &FULL);
                    match model.find(name) {
                        Some(other) => {
                            prop_assert_eq!(now, other);
                            model.hold(other);
                            model.release(block);
                            model.held[i] = other;
                        }
                        None => {
                            prop_assert_eq!(now, block);
                            model.hashes[block as usize] = Some(name);
                        }
                    }
                }
                Op::Hold(name) => {
                    prop_assert_eq!(pool.lookup(&hash(name)), model.find(name));
                    if let Some(block) = model.find(name) {
                        pool.hold(block);
                        model.hold(block);
                        model.held.push(block);
                    }
                }
                Op::Release(i) if !model.held.is_empty() => {
                    let block = model.held.swap_remove(i % model.held.len());
                    pool.release(block);
                    model.release(block);
                }
                Op::Clear => {
                    pool.clear_cache();
                    model.hashes.fill(None);
                }
                Op::Seal(..) | Op::Release(_) => {}
            }
            prop_assert_eq!(pool.check_invariants(), Ok(()));
            prop_assert_eq!(pool.free_blocks() as usize, model.free.len());
            for block in 0..blocks {
                prop_assert_eq!(pool.refs(block), model.refs[block as usize]);
                prop_assert_eq!(pool.hash(block).copied(), model.hashes[block as usize].map(hash));
            }
            pool.drain_events(&mut events);
            for event in events.drain(..) {
                index.apply(Lane(0), &event);
            }
            prop_assert_eq!(index.blocks_held(Lane(0)) as usize, pool.cached_blocks());
            prop_assert!(pool.cached_hashes().all(|hash| index.holds(Lane(0), hash)));
        }
    }
}
