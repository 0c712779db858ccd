//! What HTTP replicas say about their KV caches: vLLM's KV events over ZMQ, kept in the prefix index.
//!
//! One task per replica subscribes, follows the sequence numbers ([`follow`]), asks for what it missed ([`history`]) and
//! turns the replica's names for blocks into our hashes ([`cache`]). A lost connection, or a replica that began anew,
//! empties the replica's lane of the index.
//!
//! Our own engine tells more than vLLM (`docs/kv-events.md`): with its snapshots the lane is exact from the beginning and
//! after every loss, its heartbeats tell of losses and of another cache. Of a vLLM there are replays, as far back as its
//! buffer goes.
//!
//! While the events tell everything that a replica has cached, nothing is guessed about it any more. Until then, and
//! after a gap that could not be filled, they and the guess stand side by side.
//!
//! On the same connection comes what the replica has to do (SGLang's `LoadStat`), where it tells that.
//!
//! What it deliberately does not do: listen for replicas that connect to us, and replicas with several data-parallel
//! ranks behind one URL (each rank has a cache and a socket of its own).

mod cache;
mod config;
mod follow;
mod history;
mod view;

#[cfg(test)]
mod simulation;

use std::sync::Arc;
use std::time::Duration;

use forebay_kv::codec::{BATCH_BYTES_MAX, HEARTBEAT_TOPIC, LOAD_TOPIC, decode_load};
use forebay_types::{ModelName, ReplicaId};
use forebay_zmtp::{DialError, Endpoint, Limits, Message, SocketType, ZmtpError, dial, subscribe};
use tokio::time::Instant;

use crate::live::Live;
use crate::metrics::KvEventMetrics;
use crate::prefix::ModelPrefixes;
use cache::Cache;
pub use config::{FleetKvEvents, KvEventSource, KvSourceError};
use history::{History, ReplaySocket};
pub(crate) use view::EventsView;
pub use view::{By, KvEventsStatus, Resync, Why};

/// A batch, its topic and its number.
const LIMITS: Limits = Limits { message_bytes_max: BATCH_BYTES_MAX + 4096, parts_max: 5 };
const RETRY_AFTER_MIN: Duration = Duration::from_millis(200);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(5);
/// A connection that lasted so long was a good one: the next one is tried at once.
const GOOD_AFTER: Duration = Duration::from_secs(10);
/// Heartbeats that may be missing before the connection counts as dead, and the least time for it: a busy machine is
/// late.
const BEATS_MISSED_MAX: u32 = 10;
const SILENCE_MIN: Duration = Duration::from_secs(10);

/// Where one replica publishes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Source {
    pub(crate) events: Endpoint,
    pub(crate) replay: Option<Endpoint>,
    pub(crate) topic: String,
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
    /// Where its load is noted.
    pub(crate) live: Arc<Live>,
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
        let (source, live) = (self.source.clone(), Arc::clone(&self.live));
        let mut cache = Cache::new(self, source.replay.clone().map(ReplaySocket));
        loop {
            let begun = Instant::now();
            let Err(error) = follow_once(&mut cache, &source, &live).await;
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
    #[error("no heartbeat for {} s", .0.as_secs())]
    Silent(Duration),
}

enum Never {}

/// One connection, from its beginning to its end.
async fn follow_once(
    cache: &mut Cache<ReplaySocket>,
    source: &Source,
    live: &Live,
) -> Result<Never, EndedError> {
    let (mut reader, mut writer) = dial(&source.events, SocketType::Sub, LIMITS).await?;
    for topic in [source.topic.as_str(), HEARTBEAT_TOPIC, LOAD_TOPIC] {
        writer.send(&[subscribe(topic.as_bytes())]).await?;
    }
    cache.on_connected().await;
    // Of a publisher that sends no heartbeats, silence says nothing.
    let mut silence_max = None;
    loop {
        let message = match silence_max {
            None => reader.recv().await?,
            Some(time) => match tokio::time::timeout(time, reader.recv()).await {
                Ok(message) => message?,
                Err(_) => return Err(EndedError::Silent(time)),
            },
        };
        if let Some(interval) = on_message(cache, source, live, &message).await? {
            silence_max = Some(interval.saturating_mul(BEATS_MISSED_MAX).max(SILENCE_MIN));
        }
    }
}

/// Returns the time to the next heartbeat, where this was one.
async fn on_message<H: History>(
    cache: &mut Cache<H>,
    source: &Source,
    live: &Live,
    message: &Message,
) -> Result<Option<Duration>, EndedError> {
    let [topic, seq, payload] = &message[..] else { return Err(EndedError::NotEvents) };
    let seq = u64::from_be_bytes(seq[..].try_into().map_err(|_| EndedError::NotEvents)?);
    if *topic == HEARTBEAT_TOPIC {
        return Ok(cache.on_heartbeat(seq, payload).await);
    }
    // A report that can't be read is no batch, also where all topics are followed: its number is another count's. Only
    // where the events themselves were given this topic, what can't be read as a report is one of them.
    let is_load = *topic == LOAD_TOPIC;
    if is_load && let Ok(load) = decode_load(payload) {
        live.on_report(&load);
    } else if topic.starts_with(source.topic.as_bytes()) && (!is_load || source.topic == LOAD_TOPIC) {
        cache.on_batch(seq, payload).await;
    }
    Ok(None)
}
