//! A cache, its publisher and its follower, with a bad network between them: whatever was lost, came twice, out of
//! order or from an earlier life, in the end the follower knows exactly what is cached.
//!
//! The cache is the engine's own block pool, the publisher the engine's without its sockets, and all goes through the
//! wire format. The one thing that the network does not do is to bring batches of an earlier life after some of a later
//! one: they don't say whose they are, and a TCP connection keeps their order.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use forebay_kv::codec::Epoch;
use forebay_kv::{BlockHasher, Publication};
use forebay_observe::Registry;
use forebay_schedule::{BlockPool, FullBlock};
use forebay_zmtp::Endpoint;
use futures_util::FutureExt;
use parking_lot::Mutex;
use proptest::prelude::*;
use tokio::time::Instant;

use super::cache::Cache;
use super::history::{Answer, History, HistoryError, Wanted};
use super::{EventsView, Source, Subscription};
use crate::live::Live;
use crate::metrics::Metrics;
use crate::prefix::{ModelPrefixes, PrefixView};

const BLOCK: usize = 2;
/// Fewer than the prompts have, so that blocks are evicted.
const POOL_BLOCKS: u32 = 12;

/// What happens next.
#[derive(Debug, Clone)]
enum Event {
    /// The engine computes a prompt.
    Prompt(Vec<u32>),
    ClearCache,
    Heartbeat,
    /// The follower takes so many messages from the network.
    Deliver(usize),
    Lose(prop::sample::Index),
    Repeat(prop::sample::Index),
    Swap(prop::sample::Index),
    /// The engine begins anew; what it had sent is still on its way.
    Restart,
    /// The connection is lost, with all that is on it.
    Reconnect,
    /// The next answer breaks off after so many messages.
    BreakOff(usize),
}

#[derive(Debug, Clone)]
struct Message {
    life: u8,
    what: What,
    seq: u64,
    payload: Bytes,
}

#[derive(Debug, Clone, Copy)]
enum What {
    Batch,
    Heartbeat,
}

struct Engine {
    pool: BlockPool,
    publication: Publication,
    buffer_steps: usize,
    life: u8,
    /// vLLM knows none.
    makes_snapshots: bool,
    break_off: Option<usize>,
}

impl Engine {
    fn new(buffer_steps: usize, makes_snapshots: bool) -> Self {
        Self {
            pool: BlockPool::new(POOL_BLOCKS, BLOCK as u32, true),
            publication: Publication::new(Epoch([0; 16]), buffer_steps),
            buffer_steps,
            life: 0,
            makes_snapshots,
            break_off: None,
        }
    }

    fn restart(&mut self) {
        self.life += 1;
        self.pool = BlockPool::new(POOL_BLOCKS, BLOCK as u32, true);
        self.publication = Publication::new(Epoch([self.life; 16]), self.buffer_steps);
    }

    fn compute(&mut self, tokens: &[u32]) {
        let mut hasher = BlockHasher::new(BLOCK, None);
        hasher.extend(tokens);
        let hashes = hasher.hashes();
        let mut held = Vec::new();
        for (n, hash) in hashes.iter().enumerate() {
            if let Some(cached) = self.pool.lookup(hash) {
                self.pool.hold(cached);
                held.push(cached);
                continue;
            }
            let Some(block) = self.pool.try_alloc() else { break };
            let full = FullBlock {
                parent: n.checked_sub(1).map(|before| hashes[before]),
                tokens: [&tokens[n * BLOCK..][..BLOCK], &[]],
                cache_salt: None,
            };
            held.push(self.pool.seal(block, *hash, &full));
        }
        held.into_iter().rev().for_each(|block| self.pool.release(block));
    }

    fn publish(&mut self) -> Option<Message> {
        let mut events = Vec::new();
        self.pool.drain_events(&mut events);
        let (seq, payload) = self.publication.on_step(1.0, events)?;
        Some(Message { life: self.life, what: What::Batch, seq, payload })
    }

    fn heartbeat(&self) -> Message {
        let payload = self.publication.heartbeat(1.0, Duration::from_secs(1));
        Message { life: self.life, what: What::Heartbeat, seq: self.publication.next_seq(), payload }
    }
}

struct Asked(Arc<Mutex<Engine>>);

struct Prepared {
    messages: VecDeque<(u64, Bytes)>,
    breaks_off: bool,
}

impl History for Asked {
    type Answer = Prepared;

    async fn ask(&self, wanted: Wanted) -> Result<Prepared, HistoryError> {
        let mut engine = self.0.lock();
        let mut messages: VecDeque<_> = match wanted {
            Wanted::Since(seq) => engine.publication.since(seq).into(),
            Wanted::Snapshot if !engine.makes_snapshots => VecDeque::new(),
            Wanted::Snapshot => {
                let snapshot = engine.publication.snapshot();
                let next = snapshot.next_seq();
                snapshot.into_payloads(1.0).map(|payload| (next, payload)).collect()
            }
        };
        let break_off = engine.break_off.take();
        messages.truncate(break_off.unwrap_or(usize::MAX));
        Ok(Prepared { messages, breaks_off: break_off.is_some() })
    }
}

impl Answer for Prepared {
    async fn next(&mut self) -> Result<Option<(u64, Bytes)>, HistoryError> {
        match self.messages.pop_front() {
            None if self.breaks_off => Err(HistoryError::Timeout),
            message => Ok(message),
        }
    }
}

struct World {
    engine: Arc<Mutex<Engine>>,
    network: VecDeque<Message>,
    cache: Cache<Asked>,
    view: Arc<EventsView>,
    prefixes: Arc<ModelPrefixes>,
    lane: forebay_kv::Lane,
}

/// Nothing in here waits.
fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("ready at once")
}

impl World {
    fn new(engine: Engine) -> Self {
        let metrics = Metrics::register(&Registry::new()).expect("registered once");
        let prefixes = PrefixView::new(1000).model(&"m".into());
        let (lane, view) = (prefixes.lane(&"r".into()), Arc::new(EventsView::default()));
        let source = Source { events: Endpoint::new("r", 1), replay: None, topic: String::new() };
        let subscription = Subscription {
            model: "m".into(),
            replica: "r".into(),
            source,
            prefixes: Arc::clone(&prefixes),
            lane,
            blocks_max: 1000,
            view: Arc::clone(&view),
            live: Live::new(metrics.replica("m", "r"), Instant::now()),
            metrics: metrics.kv_events("m", "r"),
        };
        let engine = Arc::new(Mutex::new(engine));
        let mut cache = Cache::new(subscription, Some(Asked(Arc::clone(&engine))));
        now(cache.on_connected());
        Self { engine, network: VecDeque::new(), cache, view, prefixes, lane }
    }

    fn deliver(&mut self, count: usize) {
        for _ in 0..count {
            let Some(Message { what, seq, payload, .. }) = self.network.pop_front() else { return };
            match what {
                What::Batch => now(self.cache.on_batch(seq, &payload)),
                What::Heartbeat => {
                    now(self.cache.on_heartbeat(seq, &payload));
                }
            }
        }
    }

    fn on(&mut self, event: Event) {
        let at = |index: prop::sample::Index, len: usize| (len > 0).then(|| index.index(len));
        match event {
            Event::Prompt(tokens) => {
                self.engine.lock().compute(&tokens);
                self.network.extend(self.engine.lock().publish());
            }
            Event::ClearCache => {
                self.engine.lock().pool.clear_cache();
                self.network.extend(self.engine.lock().publish());
            }
            Event::Heartbeat => self.network.push_back(self.engine.lock().heartbeat()),
            Event::Deliver(count) => self.deliver(count),
            Event::Lose(index) => {
                if let Some(n) = at(index, self.network.len()) {
                    self.network.remove(n);
                }
            }
            Event::Repeat(index) => {
                if let Some(n) = at(index, self.network.len()) {
                    let again = self.network[n].clone();
                    let end = self.network.partition_point(|message| message.life <= again.life);
                    self.network.insert(end, again);
                }
            }
            Event::Swap(index) => {
                if let Some(n) = at(index, self.network.len().saturating_sub(1))
                    && self.network[n].life == self.network[n + 1].life
                {
                    self.network.swap(n, n + 1);
                }
            }
            Event::Restart => self.engine.lock().restart(),
            Event::Reconnect => {
                self.network.clear();
                self.cache.on_lost();
                now(self.cache.on_connected());
            }
            Event::BreakOff(messages) => self.engine.lock().break_off = Some(messages),
        }
    }

    /// Whether the follower's blocks are the cache's.
    fn is_exact(&self) -> bool {
        let engine = self.engine.lock();
        let known = |hash| self.prefixes.matched(std::slice::from_ref(hash)).blocks(self.lane) == 1;
        let cached = engine.pool.cached_blocks();
        engine.pool.cached_hashes().all(known) && self.prefixes.blocks_held(self.lane) as usize == cached
    }
}

fn prompt() -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(0u32..2, 2..12)
}

fn index() -> impl Strategy<Value = prop::sample::Index> {
    any::<prop::sample::Index>()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    /// After the network has calmed down, three heartbeats at most: one may find another epoch while old messages come,
    /// one may have its answer broken off.
    #[test]
    fn our_engines_cache_is_known_exactly(
        buffer_steps in 0usize..5,
        events in prop::collection::vec(prop_oneof![
            8 => prompt().prop_map(Event::Prompt),
            1 => Just(Event::ClearCache),
            3 => Just(Event::Heartbeat),
            8 => (0usize..4).prop_map(Event::Deliver),
            3 => index().prop_map(Event::Lose),
            3 => index().prop_map(Event::Repeat),
            3 => index().prop_map(Event::Swap),
            1 => Just(Event::Restart),
            1 => Just(Event::Reconnect),
            1 => (0usize..3).prop_map(Event::BreakOff),
        ], 0..60),
    ) {
        let mut world = World::new(Engine::new(buffer_steps, true));
        events.into_iter().for_each(|event| world.on(event));
        for _ in 0..3 {
            world.on(Event::Heartbeat);
            world.deliver(usize::MAX);
        }
        prop_assert!(world.view.is_complete());
        prop_assert!(world.is_exact());
    }

    /// Of a vLLM, which has neither epochs nor snapshots, not all can be known; but it is known whether it is.
    #[test]
    fn of_a_vllm_what_counts_as_all_is_all(
        buffer_steps in 0usize..5,
        events in prop::collection::vec(prop_oneof![
            8 => prompt().prop_map(Event::Prompt),
            1 => Just(Event::ClearCache),
            8 => (0usize..4).prop_map(Event::Deliver),
            3 => index().prop_map(Event::Lose),
            1 => Just(Event::Reconnect),
            1 => (0usize..3).prop_map(Event::BreakOff),
        ], 0..60),
    ) {
        let mut world = World::new(Engine::new(buffer_steps, false));
        events.into_iter().for_each(|event| world.on(event));
        // One more batch comes through: without it, what was lost last is not noticed.
        world.on(Event::Prompt(vec![9; BLOCK]));
        world.on(Event::Prompt(vec![8; BLOCK]));
        world.deliver(usize::MAX);
        prop_assert!(!world.view.is_complete() || world.is_exact());
    }
}

/// Its number is of another count: where all topics are followed, it must not be taken for a batch.
#[test]
fn a_load_report_that_cannot_be_read_is_no_batch() {
    // Of a vLLM an old number says that it began anew, and all is forgotten.
    let mut world = World::new(Engine::new(4, false));
    for token in 0..4 {
        world.on(Event::Prompt(vec![token; BLOCK]));
    }
    world.deliver(usize::MAX);
    let held = world.prefixes.blocks_held(world.lane);
    assert!(held > 0 && world.is_exact());
    let source = Source { events: Endpoint::new("r", 1), replay: None, topic: String::new() };
    let metrics = Metrics::register(&Registry::new()).expect("registered once");
    let live = Live::new(metrics.replica("m", "r"), Instant::now());
    let seq = Bytes::copy_from_slice(&0u64.to_be_bytes());
    let message = vec![Bytes::from_static(b"load"), seq, Bytes::from_static(b"?")];
    assert!(now(super::on_message(&mut world.cache, &source, &live, &message)).is_ok());
    assert_eq!(world.prefixes.blocks_held(world.lane), held);
    assert!(world.is_exact());
}
