//! Who holds which prefix: the index that engines and the router write, and the router reads.
//!
//! Made before the engines start, so that no event of theirs is lost. One [`PrefixIndex`] per model: hashes are over
//! token ids, and equal ids of two models are different KV.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use forebay_kv::{KvEvent, Lane, Matches, PrefixIndex};
use forebay_types::{BlockHash, ModelName, ReplicaId};
use parking_lot::RwLock;

/// Where an engine in this process puts its cache events. Called from the engine's own thread; it takes a short lock
/// and never waits for I/O.
pub type KvSink = Arc<dyn Fn(&[KvEvent]) + Send + Sync>;

/// The prefixes of all fleets. Cheap to clone; every clone is the same view.
#[derive(Clone)]
pub struct PrefixView(Arc<Inner>);

struct Inner {
    blocks_per_replica_max: u32,
    models: RwLock<HashMap<ModelName, Arc<ModelPrefixes>>>,
}

/// One model's index and its replicas' places in it.
pub(crate) struct ModelPrefixes {
    index: RwLock<PrefixIndex>,
    lanes: RwLock<HashMap<ReplicaId, Lane>>,
    /// As the events say; 0 until there was one.
    block_tokens: AtomicU32,
}

impl PrefixView {
    /// Remembers at most so many blocks per replica (`router.prefix-blocks-max`).
    pub fn new(blocks_per_replica_max: u32) -> Self {
        Self(Arc::new(Inner { blocks_per_replica_max, models: RwLock::default() }))
    }

    /// What the engine that is `replica` of the fleet `model` is to call with its events, in their order.
    pub fn sink(&self, model: &ModelName, replica: &ReplicaId) -> KvSink {
        let prefixes = self.model(model);
        let lane = prefixes.lane(replica);
        Arc::new(move |events| prefixes.apply(lane, events))
    }

    pub(crate) fn model(&self, model: &ModelName) -> Arc<ModelPrefixes> {
        if let Some(prefixes) = self.0.models.read().get(model) {
            return Arc::clone(prefixes);
        }
        let mut models = self.0.models.write();
        let made = || {
            Arc::new(ModelPrefixes {
                index: RwLock::new(PrefixIndex::new(self.0.blocks_per_replica_max)),
                lanes: RwLock::default(),
                block_tokens: AtomicU32::new(0),
            })
        };
        Arc::clone(models.entry(model.clone()).or_insert_with(made))
    }
}

impl std::fmt::Debug for PrefixView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PrefixView").field("models", &self.0.models.read().len()).finish_non_exhaustive()
    }
}

impl ModelPrefixes {
    /// The replica's place, given out on first use. Replicas come from the configuration, so they are few.
    pub(crate) fn lane(&self, replica: &ReplicaId) -> Lane {
        let mut lanes = self.lanes.write();
        let next = Lane(
            u16::try_from(lanes.len()).expect("fewer than 65536 replicas, checked when fleets are built"),
        );
        *lanes.entry(replica.clone()).or_insert(next)
    }

    /// Tokens per block as the engine reports them, else `default`.
    pub(crate) fn block_tokens(&self, default: u32) -> u32 {
        match self.block_tokens.load(Ordering::Relaxed) {
            0 => default,
            known => known,
        }
    }

    /// Tokens per block from now on, given that a replica's blocks have `size`: the first one decides.
    pub(crate) fn adopt_block_tokens(&self, size: u32) -> u32 {
        match self.block_tokens.compare_exchange(0, size, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => size,
            Err(known) => known,
        }
    }

    pub(crate) fn apply(&self, lane: Lane, events: &[KvEvent]) {
        if events.is_empty() {
            return;
        }
        let mut index = self.index.write();
        for event in events {
            if let KvEvent::Stored { block_size, .. } = event {
                self.block_tokens.store(*block_size, Ordering::Relaxed);
            }
            index.apply(lane, event);
        }
    }

    /// A guess: what was sent there is going to be cached there.
    pub(crate) fn insert(&self, lane: Lane, hashes: &[BlockHash]) {
        if !hashes.is_empty() {
            self.index.write().insert(lane, hashes);
        }
    }

    /// Nothing is known to be cached there any more.
    pub(crate) fn forget(&self, lane: Lane) {
        self.index.write().remove_replica(lane);
    }

    /// Blocks that are known, or guessed, to be cached there.
    pub(crate) fn blocks_held(&self, lane: Lane) -> u32 {
        self.index.read().blocks_held(lane)
    }

    pub(crate) fn matched(&self, hashes: &[BlockHash]) -> Matches {
        self.index.read().matched_blocks(hashes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(n: u8) -> BlockHash {
        BlockHash([n; 32])
    }

    fn stored(hashes: &[BlockHash], block_size: u32) -> KvEvent {
        let tokens = vec![0; hashes.len() * block_size as usize];
        KvEvent::Stored { hashes: hashes.to_vec(), parent: None, tokens, block_size, cache_salt: None }
    }

    #[test]
    fn events_arrive_whoever_asks_first() {
        let view = PrefixView::new(100);
        let (model, engine) = (ModelName::from("m"), ReplicaId::from("engine"));
        let sink = view.sink(&model, &engine);
        sink(&[stored(&[hash(1), hash(2), hash(3)], 8), KvEvent::Removed { hashes: vec![hash(3)] }]);

        let prefixes = view.model(&model);
        let lane = prefixes.lane(&engine);
        assert_eq!(prefixes.matched(&[hash(1), hash(2), hash(3)]).blocks(lane), 2);
        assert_eq!(prefixes.block_tokens(16), 8);
        let other = prefixes.lane(&"http://b".into());
        assert_ne!(lane, other);
        assert_eq!(prefixes.matched(&[hash(1)]).blocks(other), 0);
        // Another model's equal ids are other KV.
        assert_eq!(view.model(&"n".into()).matched(&[hash(1)]).longest(), 0);
    }

    #[test]
    fn a_guess_is_forgotten_with_its_replica() {
        let view = PrefixView::new(100);
        let prefixes = view.model(&"m".into());
        let (a, b) = (prefixes.lane(&"a".into()), prefixes.lane(&"b".into()));
        prefixes.insert(a, &[hash(1), hash(2)]);
        prefixes.insert(b, &[hash(1)]);
        prefixes.forget(a);
        let matches = prefixes.matched(&[hash(1), hash(2)]);
        assert_eq!((matches.blocks(a), matches.blocks(b)), (0, 1));
        assert_eq!(prefixes.block_tokens(16), 16);
    }
}
