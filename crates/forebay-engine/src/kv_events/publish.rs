//! The publishing task: a PUB socket, and a ROUTER socket for replays and snapshots.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use forebay_kv::Publication;
use forebay_kv::codec::{END_SEQ, HEARTBEAT_TOPIC, LOAD_TOPIC, LoadStat, SNAPSHOT_REQUEST, encode_load};
use forebay_zmtp::{DialError, Endpoint, Halves, Limits, Message, SocketType, ZmtpError, accept, dial};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Notify, Semaphore, broadcast, watch};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::metrics::KvEventMetrics;
use super::{Inbox, KvEventsConfig, Step, Way, unix_seconds};

/// Batches that a subscriber may be behind before it misses some, as with a PUB socket's high-water mark.
const BEHIND_MAX: usize = 1024;
const CONNECTIONS_MAX: usize = 64;
const TOPICS_MAX: usize = 64;
/// A peer that takes nothing for so long is gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two tries to connect, and after a listener that can't accept.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Subscriptions and replay requests are small.
const LIMITS: Limits = Limits { message_bytes_max: 4096, parts_max: 4 };
/// Of each one there is a copy of the cache's index in memory.
const SNAPSHOTS_MAX: usize = 2;

/// Topic, sequence number, payload.
#[derive(Clone)]
struct Live {
    frames: Arc<[Bytes; 3]>,
    /// Not for those who want everything: only for those who name it.
    named_only: bool,
}

impl Live {
    fn new(topic: Bytes, seq: u64, payload: Bytes, named_only: bool) -> Self {
        let seq = Bytes::copy_from_slice(&seq.to_be_bytes());
        Self { frames: Arc::new([topic, seq, payload]), named_only }
    }

    fn is_for(&self, topics: &[Bytes]) -> bool {
        let wanted = |topic: &Bytes| {
            self.frames[0].starts_with(topic) && !(self.named_only && topic.len() < self.frames[0].len())
        };
        topics.iter().any(wanted)
    }
}

/// What the connections share.
#[derive(Clone)]
pub(super) struct Publishing {
    /// Held while a batch is taken in, and while a snapshot is copied (some milliseconds for a large cache): batches
    /// wait in the queue meanwhile, steps don't.
    publication: Arc<Mutex<Publication>>,
    live: broadcast::Sender<Live>,
    /// Somebody has just asked for heartbeats: the first one tells that the subscription stands, and where.
    hello: Arc<Notify>,
    /// Copies of the cache that are being sent.
    snapshots: Arc<Semaphore>,
    topic: Bytes,
    heartbeat: Duration,
    load_interval: Duration,
    metrics: KvEventMetrics,
}

impl Publishing {
    pub(super) fn new(publication: Publication, config: &KvEventsConfig, metrics: KvEventMetrics) -> Self {
        Self {
            publication: Arc::new(Mutex::new(publication)),
            live: broadcast::channel(BEHIND_MAX).0,
            hello: Arc::default(),
            snapshots: Arc::new(Semaphore::new(SNAPSHOTS_MAX)),
            topic: config.topic.clone().into(),
            heartbeat: config.heartbeat_interval.get(),
            load_interval: config.load_interval.get(),
            metrics,
        }
    }

    /// Runs until the step thread has gone. Cancellation: all connections are closed.
    pub(super) async fn run(
        self,
        mut inbox: Inbox,
        load: watch::Receiver<LoadStat>,
        events: Way,
        replay: Option<TcpListener>,
    ) {
        // Dropping the set ends what is in it.
        let mut sockets = JoinSet::new();
        let subscribed = {
            let this = self.clone();
            move |halves| serve_subscriber(halves, this.live.subscribe(), this.clone())
        };
        match events {
            Way::Listen(listener) => drop(sockets.spawn(serve(listener, SocketType::Pub, subscribed))),
            Way::Connect(endpoint) => drop(sockets.spawn(keep_connected(endpoint, subscribed))),
        }
        if let Some(listener) = replay {
            let this = self.clone();
            let asked = move |halves| serve_replay(halves, this.clone());
            sockets.spawn(serve(listener, SocketType::Router, asked));
        }
        sockets.spawn(self.clone().report_load(load));
        let mut beats = tokio::time::interval(self.heartbeat);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                step = inbox.recv() => match step {
                    Some(step) => self.on_step(step).await,
                    None => return,
                },
                _ = beats.tick() => self.heartbeat().await,
                () = self.hello.notified() => self.heartbeat().await,
            }
            if let Some(step) = inbox.overflowed() {
                self.on_step(step).await;
            }
        }
    }

    async fn on_step(&self, step: Step) {
        if let Some((seq, payload)) = self.publication.lock().await.on_step(step.ts, step.events) {
            self.metrics.sent.inc();
            self.send(Live::new(self.topic.clone(), seq, payload, false));
        }
    }

    async fn heartbeat(&self) {
        let publication = self.publication.lock().await;
        let payload = publication.heartbeat(unix_seconds(), self.heartbeat);
        let topic = Bytes::from_static(HEARTBEAT_TOPIC.as_bytes());
        self.send(Live::new(topic, publication.next_seq(), payload, true));
    }

    fn send(&self, message: Live) {
        // An error is that nobody listens.
        let _ = self.live.send(message);
    }

    /// Sends the load when it has changed, and as often as a heartbeat otherwise, so that a late subscriber has it soon.
    async fn report_load(self, mut load: watch::Receiver<LoadStat>) {
        let mut seq = 0;
        loop {
            // Whether it changed or time has passed makes no difference; without a sender the engine ends.
            if let Ok(Err(_)) = tokio::time::timeout(self.heartbeat, load.changed()).await {
                return;
            }
            let mut payload = Vec::with_capacity(64);
            encode_load(&load.borrow_and_update(), &mut payload);
            let topic = Bytes::from_static(LOAD_TOPIC.as_bytes());
            self.send(Live::new(topic, seq, payload.into(), true));
            seq += 1;
            tokio::time::sleep(self.load_interval).await;
        }
    }

    /// Sends the cache as of now. O(blocks) memory until it is sent, for so many at a time.
    async fn send_snapshot(&self, writer: &mut Out) -> Result<(), ZmtpError> {
        // Both are never closed, and no copy fails.
        let Ok(_permit) = self.snapshots.acquire().await else { return Ok(()) };
        let publication = Arc::clone(&self.publication).lock_owned().await;
        let copied = tokio::task::spawn_blocking(move || publication.snapshot()).await;
        let snapshot = copied.map_err(std::io::Error::other)?;
        let seq = Bytes::copy_from_slice(&snapshot.next_seq().to_be_bytes());
        for payload in snapshot.into_payloads(unix_seconds()) {
            send(writer, &[Bytes::new(), self.topic.clone(), seq.clone(), payload]).await?;
        }
        self.metrics.snapshots.inc();
        Ok(())
    }
}

/// Takes connections, a limited number at a time.
async fn serve<F: Future<Output = Result<(), ZmtpError>> + Send + 'static>(
    listener: TcpListener,
    socket: SocketType,
    each: impl Fn(Halves) -> F + Clone + Send + 'static,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) if connections.len() < CONNECTIONS_MAX => {
                    let each = each.clone();
                    connections.spawn(async move {
                        let ended = shake_and_serve(stream, socket, each).await;
                        tracing::debug!(%peer, ?socket, ?ended, "a KV-event connection ended");
                    });
                }
                Ok((_, peer)) => tracing::warn!(%peer, "refused: {CONNECTIONS_MAX} KV-event connections are open"),
                Err(error) => {
                    tracing::warn!(%error, "a KV-event connection could not be accepted");
                    tokio::time::sleep(RETRY_AFTER).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn shake_and_serve<F: Future<Output = Result<(), ZmtpError>>>(
    stream: TcpStream,
    socket: SocketType,
    each: impl Fn(Halves) -> F,
) -> Result<(), DialError> {
    let halves = accept(stream, socket, LIMITS).await?;
    Ok(each(halves).await?)
}

/// For a subscriber that listens, as llm-d's can.
async fn keep_connected<F: Future<Output = Result<(), ZmtpError>> + Send + 'static>(
    endpoint: Endpoint,
    each: impl Fn(Halves) -> F,
) {
    let mut said = false;
    loop {
        match dial(&endpoint, SocketType::Pub, LIMITS).await {
            Ok(halves) => {
                tracing::info!(%endpoint, "KV events have a subscriber");
                said = false;
                let ended = each(halves).await;
                tracing::info!(%endpoint, ?ended, "the subscriber to KV events is gone");
            }
            // Said once, not every second.
            Err(error) if !std::mem::replace(&mut said, true) => {
                tracing::warn!(%endpoint, error = &error as &dyn std::error::Error, "no subscriber to KV events yet");
            }
            Err(_) => {}
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

/// Counts for as long as it lives.
struct Counted(KvEventMetrics);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.subscribers.dec();
    }
}

async fn serve_subscriber(
    (mut reader, mut writer): Halves,
    mut live: broadcast::Receiver<Live>,
    publishing: Publishing,
) -> Result<(), ZmtpError> {
    publishing.metrics.subscribers.inc();
    let metrics = Counted(publishing.metrics.clone());
    let mut topics: Vec<Bytes> = Vec::new();
    loop {
        tokio::select! {
            message = reader.recv() => {
                let message = message?;
                on_subscription(&mut topics, &message)?;
                if message[0].strip_prefix(b"\x01") == Some(HEARTBEAT_TOPIC.as_bytes()) {
                    publishing.hello.notify_one();
                }
            }
            message = live.recv() => match message {
                Ok(message) if message.is_for(&topics) => send(&mut writer, &message.frames[..]).await?,
                Ok(_) => {}
                // It sees the gap in the sequence numbers.
                Err(broadcast::error::RecvError::Lagged(missed)) => metrics.0.dropped_subscriber.inc_by(missed),
                Err(broadcast::error::RecvError::Closed) => return Ok(()),
            },
        }
    }
}

fn on_subscription(topics: &mut Vec<Bytes>, message: &Message) -> Result<(), ZmtpError> {
    let [message] = &message[..] else { return Err(ZmtpError::Protocol) };
    match message.first() {
        Some(1) if topics.len() < TOPICS_MAX => topics.push(message.slice(1..)),
        Some(0) => {
            let topic = message.slice(1..);
            if let Some(n) = topics.iter().position(|known| *known == topic) {
                topics.swap_remove(n);
            }
        }
        _ => return Err(ZmtpError::Protocol),
    }
    Ok(())
}

/// Answers `["", start]` with all batches from `start` on that are kept, `["", "snapshot"]` with the whole cache; and
/// both with an end. One request after the other.
async fn serve_replay((mut reader, mut writer): Halves, publishing: Publishing) -> Result<(), ZmtpError> {
    loop {
        let request = reader.recv().await?;
        let [empty, start] = &request[..] else { return Err(ZmtpError::Protocol) };
        let (true, Ok(start)) = (empty.is_empty(), <[u8; 8]>::try_from(&start[..])) else {
            return Err(ZmtpError::Protocol);
        };
        if start == *SNAPSHOT_REQUEST {
            publishing.send_snapshot(&mut writer).await?;
        } else {
            let batches = publishing.publication.lock().await.since(u64::from_be_bytes(start));
            for (seq, payload) in batches {
                let seq = Bytes::copy_from_slice(&seq.to_be_bytes());
                send(&mut writer, &[Bytes::new(), publishing.topic.clone(), seq, payload]).await?;
            }
        }
        let end = [Bytes::new(), Bytes::new(), Bytes::from_static(&END_SEQ), Bytes::new()];
        send(&mut writer, &end).await?;
    }
}

type Out = forebay_zmtp::Writer<tokio::net::tcp::OwnedWriteHalf>;

async fn send(writer: &mut Out, parts: &[Bytes]) -> Result<(), ZmtpError> {
    tokio::time::timeout(WRITE_TIMEOUT, writer.send(parts))
        .await
        .unwrap_or_else(|_| Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()))
}
