//! What HTTP replicas say about their KV caches: vLLM's KV events over ZMQ, kept in the prefix index.
//!
//! One task per replica subscribes, follows the sequence numbers ([`follow`]), asks for what it missed ([`replay`]) and
//! turns the replica's names for blocks into our hashes (`forebay_kv::Renamer`). A lost connection, or a replica that
//! began anew, empties the replica's lane of the index.
//!
//! While the events tell everything that a replica has cached, nothing is guessed about it any more. Until then, and
//! after a gap that could not be filled, they and the guess stand side by side.
//!
//! What it deliberately does not do: listen for replicas that connect to us, and replicas with several data-parallel
//! ranks behind one URL (each rank has a cache and a socket of its own).

mod config;
mod follow;
mod replay;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use forebay_kv::codec::{BATCH_BYTES_MAX, ReplicaEvent, decode_batch};
use forebay_kv::{KvEvent, Renamer};
use forebay_types::{ModelName, ReplicaId};
use forebay_zmtp::{DialError, Endpoint, Limits, SocketType, ZmtpError, dial, subscribe};
use tokio::time::Instant;

use crate::metrics::KvEventMetrics;
use crate::prefix::ModelPrefixes;
pub use config::{FleetKvEvents, KvEventSource, KvSourceError};
use follow::{Follower, Live};

/// A batch, its topic and its number.
const LIMITS: Limits = Limits { message_bytes_max: BATCH_BYTES_MAX + 4096, parts_max: 5 };
const RETRY_AFTER_MIN: Duration = Duration::from_millis(200);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(5);
/// A connection that lasted so long was a good one: the next one is tried at once.
const GOOD_AFTER: Duration = Duration::from_secs(10);
/// Larger blocks than any engine has; a first event must not be able to make the index useless.
const BLOCK_TOKENS_MAX: u32 = 1024;

/// Where one replica publishes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Source {
    pub(crate) events: Endpoint,
    pub(crate) replay: Option<Endpoint>,
    pub(crate) topic: String,
}

/// What the rest of the router wants to know about a replica's events.
#[derive(Debug, Default)]
pub(crate) struct EventsView {
    connected: AtomicBool,
    complete: AtomicBool,
}

impl EventsView {
    /// The connection stands: that the cache is gone will be heard on it.
    pub(crate) fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// All that is cached is known.
    pub(crate) fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Relaxed)
    }
}

/// One replica's events on their way into the index.
pub(crate) struct Subscription {
    pub(crate) model: ModelName,
    pub(crate) replica: ReplicaId,
    pub(crate) source: Source,
    pub(crate) prefixes: Arc<ModelPrefixes>,
    pub(crate) lane: forebay_kv::Lane,
    pub(crate) blocks_max: u32,
    pub(crate) view: Arc<EventsView>,
    pub(crate) metrics: KvEventMetrics,
}

impl Subscription {
    /// Subscribes, and again whenever the connection is lost. Never returns.
    ///
    /// Cancellation: at any point; the lane stays as it is.
    pub(crate) async fn run(self) {
        let (model, replica, endpoint) =
            (self.model.clone(), self.replica.clone(), self.source.events.clone());
        let mut retry_after = RETRY_AFTER_MIN;
        let mut said = false;
        let mut cache = Cache::new(self);
        loop {
            let begun = Instant::now();
            let Err(error) = cache.follow_once().await;
            if cache.on_lost() {
                said = false;
                tracing::warn!(%model, %replica, %endpoint, error = &error as &dyn std::error::Error, "KV events ended");
            } else if !std::mem::replace(&mut said, true) {
                tracing::warn!(%model, %replica, %endpoint, error = &error as &dyn std::error::Error, "no KV events yet");
            }
            retry_after = match begun.elapsed() > GOOD_AFTER {
                true => RETRY_AFTER_MIN,
                false => (retry_after * 2).min(RETRY_AFTER_MAX),
            };
            tokio::time::sleep(retry_after).await;
        }
    }
}

/// Why a connection's events ended.
#[derive(Debug, thiserror::Error)]
enum EndedError {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error(transparent)]
    Zmtp(#[from] ZmtpError),
    #[error("the publisher's messages are not KV events")]
    NotEvents,
}

enum Never {}

/// A replica's cache as far as its events tell.
struct Cache {
    at: Subscription,
    follower: Follower,
    renamer: Option<Renamer>,
    unknown_seen: u64,
}

impl Cache {
    fn new(at: Subscription) -> Self {
        Self { at, follower: Follower::default(), renamer: None, unknown_seen: 0 }
    }

    /// One connection, from its beginning to its end.
    async fn follow_once(&mut self) -> Result<Never, EndedError> {
        let (mut reader, mut writer) = dial(&self.at.source.events, SocketType::Sub, LIMITS).await?;
        writer.send(&[subscribe(self.at.source.topic.as_bytes())]).await?;
        self.forget();
        self.at.view.connected.store(true, Ordering::Relaxed);
        self.at.metrics.connected.set(1);
        let (model, replica) = (&self.at.model, &self.at.replica);
        tracing::info!(%model, %replica, endpoint = %self.at.source.events, "listening to KV events");
        // What was cached before we listened.
        self.fill_gap(0, None).await;
        loop {
            let message = reader.recv().await?;
            let [topic, seq, payload] = &message[..] else { return Err(EndedError::NotEvents) };
            let seq = <[u8; 8]>::try_from(&seq[..]).map_err(|_| EndedError::NotEvents)?;
            if topic.starts_with(self.at.source.topic.as_bytes()) {
                self.on_batch(u64::from_be_bytes(seq), payload).await;
            }
        }
    }

    async fn on_batch(&mut self, seq: u64, payload: &Bytes) {
        let mut live = self.follower.on_live(seq);
        if live == Live::Restarted {
            let (model, replica) = (&self.at.model, &self.at.replica);
            tracing::info!(%model, %replica, seq, "the replica's KV events began anew");
            self.forget();
            live = self.follower.on_live(seq);
        }
        match live {
            Live::Next => {}
            Live::Seen => return,
            Live::Gap { from } => self.fill_gap(from, Some(seq)).await,
            Live::Restarted => return,
        }
        // A replay may have brought this one as well.
        if self.follower.expects() <= seq {
            self.apply(seq, payload);
        }
    }

    /// Asks for the batches from `from` on; `until` came live already. What can't be had is noted as missing.
    async fn fill_gap(&mut self, from: u64, until: Option<u64>) {
        let missed_before = self.follower.is_missing();
        let filled = match self.at.source.replay.clone() {
            None => false,
            Some(endpoint) => match self.replay(&endpoint, from).await {
                Ok(()) => {
                    until.is_none_or(|until| self.follower.expects() >= until)
                        && self.follower.is_missing() == missed_before
                }
                Err(error) => {
                    let (model, replica) = (&self.at.model, &self.at.replica);
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(%model, %replica, %endpoint, error, "KV events can't be replayed");
                    false
                }
            },
        };
        let Some(until) = until else {
            self.publish_state();
            return;
        };
        match filled {
            true => self.at.metrics.gaps_filled.inc(),
            false => {
                self.at.metrics.gaps_left.inc();
                self.follower.skip_to(until);
                self.publish_state();
            }
        }
    }

    async fn replay(&mut self, endpoint: &Endpoint, from: u64) -> Result<(), replay::ReplayError> {
        let mut replay = replay::Replay::ask(endpoint, from).await?;
        while let Some((seq, payload)) = replay.next().await? {
            // A batch may have come twice; older ones than asked for don't come.
            if seq >= self.follower.expects() {
                self.apply(seq, &payload);
            }
        }
        self.follower.on_replayed();
        Ok(())
    }

    /// Puts one batch into the index.
    fn apply(&mut self, seq: u64, payload: &[u8]) {
        self.follower.on_applied(seq);
        self.at.metrics.batches.inc();
        match decode_batch(payload) {
            Ok(batch) => {
                self.at.metrics.ignored.inc_by(batch.ignored.into());
                let events: Vec<KvEvent> =
                    batch.events.iter().filter_map(|event| self.rename(event)).collect();
                self.at.prefixes.apply(self.at.lane, &events);
            }
            Err(error) => {
                let (model, replica) = (&self.at.model, &self.at.replica);
                tracing::warn!(%model, %replica, seq, %error, "a batch of KV events can't be read");
                self.at.metrics.ignored.inc();
                self.follower.on_unreadable();
            }
        }
        self.publish_state();
    }

    fn rename(&mut self, event: &ReplicaEvent) -> Option<KvEvent> {
        if *event == ReplicaEvent::Cleared {
            self.follower.on_cleared();
        }
        let theirs = match event {
            ReplicaEvent::Stored { block_size, .. } if *block_size > 0 => Some(*block_size),
            _ => None,
        };
        let ours = theirs
            .filter(|&size| size <= BLOCK_TOKENS_MAX)
            .map(|size| self.at.prefixes.adopt_block_tokens(size));
        if let Some(ours) = ours
            && self.renamer.as_ref().is_none_or(|renamer| renamer.block_size() != ours)
        {
            if self.renamer.is_some() {
                // An engine in this process has its own block size, and came later.
                self.at.prefixes.forget(self.at.lane);
                self.follower.on_unreadable();
            }
            self.renamer = Some(Renamer::new(ours, self.at.blocks_max));
            self.unknown_seen = 0;
        }
        let Some(renamer) = &mut self.renamer else {
            return (*event == ReplicaEvent::Cleared).then_some(KvEvent::Cleared);
        };
        let renamed = renamer.rename(event);
        self.at.metrics.ignored.inc_by(renamer.unknown() - self.unknown_seen);
        self.unknown_seen = renamer.unknown();
        renamed
    }

    fn publish_state(&self) {
        self.at.view.complete.store(self.follower.is_complete(), Ordering::Relaxed);
    }

    /// Nothing is known any more.
    fn forget(&mut self) {
        self.follower = Follower::default();
        if let Some(renamer) = &mut self.renamer {
            renamer.clear();
        }
        self.at.prefixes.forget(self.at.lane);
        self.publish_state();
    }

    /// The connection is lost. False if there was none.
    fn on_lost(&mut self) -> bool {
        let was_connected = self.at.view.connected.swap(false, Ordering::Relaxed);
        if was_connected {
            self.forget();
            self.at.metrics.connected.set(0);
        }
        was_connected
    }
}
