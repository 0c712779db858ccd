//! The publishing task: a PUB socket and a ROUTER socket for replay.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use forebay_kv::codec::encode_batch;
use forebay_zmtp::{DialError, Endpoint, Halves, Limits, Message, SocketType, ZmtpError, accept, dial};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{broadcast, mpsc};
use tokio::task::JoinSet;

use super::buffer::Buffer;
use super::metrics::KvEventMetrics;
use super::{Step, Way};

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
/// Ends a replay.
const END_SEQ: [u8; 8] = [0xff; 8];

/// Topic, sequence number, payload.
type Batch = Arc<[Bytes; 3]>;

/// Runs until the step thread has gone. Cancellation: all connections are closed.
pub(super) async fn run(
    mut queue: mpsc::Receiver<Step>,
    events: Way,
    replay: Option<TcpListener>,
    topic: String,
    buffer: Arc<Buffer>,
    metrics: KvEventMetrics,
) {
    let topic = Bytes::from(topic);
    let (live, _) = broadcast::channel::<Batch>(BEHIND_MAX);
    // Dropping the set ends what is in it.
    let mut sockets = JoinSet::new();
    let subscribed = {
        let (live, metrics) = (live.clone(), metrics.clone());
        move |halves| serve_subscriber(halves, live.subscribe(), metrics.clone())
    };
    match events {
        Way::Listen(listener) => drop(sockets.spawn(serve(listener, SocketType::Pub, subscribed))),
        Way::Connect(endpoint) => drop(sockets.spawn(keep_connected(endpoint, subscribed))),
    }
    if let Some(listener) = replay {
        let (topic, buffer) = (topic.clone(), Arc::clone(&buffer));
        let asked = move |halves| serve_replay(halves, topic.clone(), Arc::clone(&buffer));
        sockets.spawn(serve(listener, SocketType::Router, asked));
    }
    while let Some(step) = queue.recv().await {
        let mut payload = Vec::with_capacity(256);
        encode_batch(step.ts, &step.events, 0, &mut payload);
        let payload = Bytes::from(payload);
        let seq = buffer.push(payload.clone());
        metrics.sent.inc();
        // An error is that nobody listens.
        let _ = live.send(Arc::new([topic.clone(), Bytes::copy_from_slice(&seq.to_be_bytes()), payload]));
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
    mut live: broadcast::Receiver<Batch>,
    metrics: KvEventMetrics,
) -> Result<(), ZmtpError> {
    metrics.subscribers.inc();
    let metrics = Counted(metrics);
    let mut topics: Vec<Bytes> = Vec::new();
    loop {
        tokio::select! {
            message = reader.recv() => on_subscription(&mut topics, &message?)?,
            batch = live.recv() => match batch {
                Ok(batch) if topics.iter().any(|topic| batch[0].starts_with(topic)) => {
                    send(&mut writer, &batch[..]).await?;
                }
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

/// Answers `["", start]` with all batches from `start` on that are kept, and an end. One request after the other.
async fn serve_replay(
    (mut reader, mut writer): Halves,
    topic: Bytes,
    buffer: Arc<Buffer>,
) -> Result<(), ZmtpError> {
    loop {
        let request = reader.recv().await?;
        let [empty, start] = &request[..] else { return Err(ZmtpError::Protocol) };
        let (true, Ok(start)) = (empty.is_empty(), <[u8; 8]>::try_from(&start[..])) else {
            return Err(ZmtpError::Protocol);
        };
        for (seq, payload) in buffer.since(u64::from_be_bytes(start)) {
            let seq = Bytes::copy_from_slice(&seq.to_be_bytes());
            send(&mut writer, &[Bytes::new(), topic.clone(), seq, payload]).await?;
        }
        let end = [Bytes::new(), Bytes::new(), Bytes::from_static(&END_SEQ), Bytes::new()];
        send(&mut writer, &end).await?;
    }
}

async fn send(
    writer: &mut forebay_zmtp::Writer<tokio::net::tcp::OwnedWriteHalf>,
    parts: &[Bytes],
) -> Result<(), ZmtpError> {
    tokio::time::timeout(WRITE_TIMEOUT, writer.send(parts))
        .await
        .unwrap_or_else(|_| Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()))
}
