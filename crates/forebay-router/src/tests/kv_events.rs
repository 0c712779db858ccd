//! HTTP replicas that tell what they have cached: scripted publishers on real sockets.

use std::sync::Arc;

use bytes::Bytes;
use forebay_flow::Stage;
use forebay_kv::codec::{
    Epoch, HEARTBEAT_TOPIC, LOAD_TOPIC, LoadStat, SNAPSHOT_REQUEST, encode_batch, encode_load,
};
use forebay_kv::{BlockHasher, KvEvent, Lane, Publication};
use forebay_types::{BlockHash, TokenId};
use forebay_zmtp::{Halves, Limits, SocketType, accept};
use parking_lot::Mutex;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::http_replicas::{STREAM, eventually};
use super::script::{completion, drain, request};
use super::server::{Server, refusing, sse};
use super::{Bench, config};

const LIMITS: Limits = Limits { message_bytes_max: 1 << 16, parts_max: 4 };

/// The blocks of tokens that count up from `first`, under names that only their replica understands.
fn stored(first: TokenId, blocks: u8) -> KvEvent {
    let name = |n: u8| BlockHash([first as u8 ^ 0xa5 ^ n.wrapping_mul(31); 32]);
    KvEvent::Stored {
        hashes: (0..blocks).map(name).collect(),
        parent: None,
        tokens: (first..).take(usize::from(blocks) * 16).collect(),
        block_size: 16,
        cache_salt: None,
    }
}

fn removed(first: TokenId, blocks: u8) -> KvEvent {
    let KvEvent::Stored { hashes, .. } = stored(first, blocks) else { unreachable!() };
    KvEvent::Removed { hashes }
}

fn batch(seq: u64, events: &[KvEvent]) -> [Bytes; 3] {
    let mut payload = Vec::new();
    encode_batch(1.0, events, 0, &mut payload);
    ["t".into(), Bytes::copy_from_slice(&seq.to_be_bytes()), payload.into()]
}

struct Publisher {
    listener: TcpListener,
    replay: TcpListener,
}

impl Publisher {
    async fn new() -> Self {
        let bind = async || TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        Self { listener: bind().await, replay: bind().await }
    }

    fn source(&self, replica: &str, with_replay: bool) -> serde_json::Value {
        let at = |listener: &TcpListener| format!("tcp://{}", listener.local_addr().expect("bound"));
        let mut source = json!({"replica": replica, "endpoint": at(&self.listener)});
        if with_replay {
            source["replay-endpoint"] = json!(at(&self.replay));
        }
        source
    }

    /// The router's subscription.
    async fn subscriber(&self) -> Halves {
        let (stream, _) = self.listener.accept().await.expect("connected");
        let (mut reader, writer) = accept(stream, SocketType::Pub, LIMITS).await.expect("shaken");
        for topic in ["", HEARTBEAT_TOPIC, LOAD_TOPIC] {
            assert_eq!(reader.recv().await.expect("subscribed"), [forebay_zmtp::subscribe(topic.as_bytes())]);
        }
        (reader, writer)
    }
}

/// Answers every replay with what of `kept` it asks for, and notes what it was asked. As vLLM, it knows no snapshots.
fn replaying(listener: TcpListener, kept: Vec<(u64, KvEvent)>) -> (JoinHandle<()>, Arc<Mutex<Vec<u64>>>) {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let notes = Arc::clone(&asked);
    let task = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.expect("connected");
            let (mut reader, mut writer) = accept(stream, SocketType::Router, LIMITS).await.expect("shaken");
            let request = reader.recv().await.expect("a request");
            let start = u64::from_be_bytes(request[1][..].try_into().expect("8 bytes"));
            if request[1] != SNAPSHOT_REQUEST[..] {
                notes.lock().push(start);
            }
            for (seq, event) in kept.iter().filter(|(seq, _)| *seq >= start) {
                let [topic, seq, payload] = batch(*seq, std::slice::from_ref(event));
                writer.send(&[Bytes::new(), topic, seq, payload]).await.expect("sent");
            }
            let end = [Bytes::new(), Bytes::new(), Bytes::from_static(&[0xff; 8]), Bytes::new()];
            writer.send(&end).await.expect("sent");
        }
    });
    (task, asked)
}

/// Two replicas, and a publisher for the second.
struct Fleet {
    bench: Bench,
    publisher: Publisher,
    _servers: Vec<Server>,
}

impl Fleet {
    async fn new(with_replay: bool) -> Self {
        let servers = vec![Server::start(|_| sse(STREAM)).await, Server::start(|_| sse(STREAM)).await];
        Self::of([servers[0].url.clone(), servers[1].url.clone()], servers, with_replay).await
    }

    async fn of(urls: [String; 2], servers: Vec<Server>, with_replay: bool) -> Self {
        let publisher = Publisher::new().await;
        let sources = [publisher.source(&urls[1], with_replay)];
        let yaml = json!({
            "fleets": [{
                "model": "m", "replicas": urls,
                // Nobody publishes for the first.
                "kv-events": {"port": 9, "sources": sources},
            }],
            "health": {"interval": "1h", "unhealthy-after": 100},
        });
        Self { bench: Bench::new(Some(&config(yaml)), &[]), publisher, _servers: servers }
    }

    /// Blocks of the prompt that counts up from `first` at the first and the second replica.
    fn known(&self, first: TokenId) -> (u32, u32) {
        let mut hasher = BlockHasher::new(16, None);
        hasher.extend(&(first..first + 160).collect::<Vec<_>>());
        let matches = self.bench.prefix.model(&"m".into()).matched(hasher.hashes());
        (matches.blocks(Lane(0)), matches.blocks(Lane(1)))
    }

    async fn ask(&self, first: TokenId) -> String {
        let reply = self.bench.router.call(completion("m", first..first + 100)).await.expect("answered");
        let replica = reply.headers["x-forebay-replica"].to_str().expect("text").to_owned();
        drain(reply).await;
        replica
    }

    fn metric(&self, name: &str) -> String {
        let lines = self.bench.metric(name);
        lines.into_iter().find(|line| line.contains("#1") && !line.contains("yes")).expect("a series")
    }
}

#[tokio::test]
async fn placement_follows_what_a_replica_tells() {
    let fleet = Fleet::new(false).await;
    let (_reader, mut writer) = fleet.publisher.subscriber().await;
    writer.send(&batch(0, &[stored(0, 6)])).await.expect("sent");
    eventually("known", || fleet.known(0) == (0, 6)).await;
    assert_eq!(fleet.ask(0).await, "replica-2");
    // A client's own ids are real ones too, without a tokenizer here.
    let body = format!(r#"{{"model": "m", "prompt": {:?}, "stream": true}}"#, (0..100).collect::<Vec<u32>>());
    let ids = forebay_flow::PromptIds::Estimated { tokens: 100 };
    let reply = fleet.bench.router.call(request("m", "/v1/completions", &body, ids)).await.expect("answered");
    assert_eq!(reply.headers["x-forebay-replica"], "replica-2");
    drain(reply).await;
    assert_eq!(
        fleet.bench.metric("forebay_router_decisions_total"),
        [r##"{model="m",reason="prefix",replica="#1"} 2"##]
    );
    writer.send(&batch(1, &[removed(0, 6), stored(1000, 3)])).await.expect("sent");
    eventually("removed", || fleet.known(0) == (0, 0) && fleet.known(1000) == (0, 3)).await;
    assert_eq!(fleet.metric("forebay_router_kv_event_batches_total"), r##"{model="m",replica="#1"} 2"##);
}

/// What it has is known, so nothing is guessed; but of texts, whose ids can't be known here, it is.
#[tokio::test]
async fn nothing_is_guessed_about_who_tells_all() {
    // The first replica is not there, so that all requests go to the second.
    let (dead, _held) = refusing();
    let server = Server::start(|_| sse(STREAM)).await;
    let fleet = Fleet::of([dead, server.url.clone()], vec![server], false).await;
    let (reader, mut writer) = fleet.publisher.subscriber().await;
    writer.send(&batch(0, &[stored(0, 1)])).await.expect("sent");
    eventually("known", || fleet.known(0).1 == 1).await;
    assert_eq!(fleet.ask(1000).await, "replica-2");
    assert_eq!(fleet.known(1000), (0, 0));

    let body = format!(r#"{{"model": "m", "prompt": "{}", "stream": true}}"#, "x".repeat(800));
    for expect in [0, 192] {
        let ids = forebay_flow::PromptIds::Estimated { tokens: 228 };
        let reply =
            fleet.bench.router.call(request("m", "/v1/completions", &body, ids)).await.expect("answered");
        assert_eq!(reply.headers["x-forebay-replica"], "replica-2");
        drain(reply).await;
        let matched = fleet.bench.metric("forebay_router_prefix_matched_tokens_total");
        assert_eq!(matched, [format!(r#"{{model="m"}} {expect}"#)]);
    }

    // The connection is lost: its lane is empty, and guessing is all there is.
    drop((reader, writer));
    eventually("forgotten", || fleet.known(0) == (0, 0)).await;
    eventually("guessed", || fleet.metric("forebay_router_kv_events_connected").ends_with('0')).await;
    assert_eq!(fleet.ask(2000).await, "replica-2");
    assert_eq!(fleet.known(2000), (0, 6));

    // And again from the beginning.
    let (_reader, mut writer) = fleet.publisher.subscriber().await;
    writer.send(&batch(0, &[stored(0, 2)])).await.expect("sent");
    eventually("known again", || fleet.known(0) == (0, 2)).await;
    assert_eq!(fleet.known(2000), (0, 0));
}

#[tokio::test]
async fn missed_batches_are_asked_for() {
    let Fleet { bench, publisher, _servers } = Fleet::new(true).await;
    let kept = (0..8).map(|seq| (seq, stored(seq as TokenId * 1000, 2))).collect();
    let Publisher { listener, replay } = publisher;
    let (_replaying, asked) = replaying(replay, kept);
    let publisher =
        Publisher { listener, replay: TcpListener::bind("127.0.0.1:0").await.expect("a free port") };
    let fleet = Fleet { bench, publisher, _servers };
    let (_reader, mut writer) = fleet.publisher.subscriber().await;
    // What was before we listened.
    eventually("history", || fleet.known(7000) == (0, 2)).await;
    assert_eq!(*asked.lock(), [0]);
    // One that the replay brought already says something else here: it is not read.
    writer.send(&batch(7, &[stored(70_000, 2)])).await.expect("sent");
    writer.send(&batch(8, &[stored(8000, 2)])).await.expect("sent");
    eventually("live", || fleet.known(8000) == (0, 2)).await;
    assert_eq!((fleet.known(70_000), asked.lock().len()), ((0, 0), 1));
    // A gap that can't be filled: what is known stays, and guessing begins.
    writer.send(&batch(11, &[stored(11_000, 2)])).await.expect("sent");
    eventually("after the gap", || fleet.known(11_000) == (0, 2)).await;
    assert_eq!((*asked.lock()).clone(), [0, 9]);
    assert_eq!(fleet.known(8000), (0, 2));
    let resyncs = fleet.bench.metric("forebay_router_kv_event_resyncs_total");
    let expect = [
        r##"{by="nothing",model="m",replica="#1",why="gap"} 1"##,
        r##"{by="replay",model="m",replica="#1",why="joined"} 1"##,
    ];
    assert_eq!(resyncs, expect);
    assert_eq!(fleet.metric("forebay_router_kv_event_batches_lost_total"), r##"{model="m",replica="#1"} 2"##);
    // It begins anew on the same connection: what it had is gone, what it kept is asked for.
    writer.send(&batch(1, &[stored(90_000, 2)])).await.expect("sent");
    eventually("anew", || fleet.known(11_000) == (0, 0) && fleet.known(7000) == (0, 2)).await;
    assert_eq!((*asked.lock()).clone(), [0, 9, 0]);
}

#[tokio::test]
async fn what_is_no_event_is_survived() {
    let fleet = Fleet::new(false).await;
    let (_reader, mut writer) = fleet.publisher.subscriber().await;
    writer.send(&batch(0, &[stored(0, 2)])).await.expect("sent");
    let [topic, _, _] = batch(1, &[]);
    let seq = Bytes::copy_from_slice(&1u64.to_be_bytes());
    writer.send(&[topic, seq, Bytes::from_static(b"\xc1")]).await.expect("sent");
    writer.send(&batch(2, &[stored(1000, 2)])).await.expect("sent");
    eventually("read on", || fleet.known(1000) == (0, 2)).await;
    assert_eq!(fleet.known(0), (0, 2));
    assert_eq!(fleet.metric("forebay_router_kv_events_ignored_total"), r##"{model="m",replica="#1"} 1"##);
    // What is not even shaped like one ends the connection.
    writer.send(&[Bytes::from_static(b"?")]).await.expect("sent");
    eventually("ended", || fleet.known(0) == (0, 0)).await;
    let _again = fleet.publisher.subscriber().await;
}

/// What our engine does with a [`Publication`]: the replay socket.
fn serving(listener: TcpListener, publication: Arc<Mutex<Publication>>) -> JoinHandle<()> {
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.expect("connected");
            let (mut reader, mut writer) = accept(stream, SocketType::Router, LIMITS).await.expect("shaken");
            let request = reader.recv().await.expect("a request");
            let answer: Vec<(u64, Bytes)> = if request[1] == SNAPSHOT_REQUEST[..] {
                let snapshot = publication.lock().snapshot();
                let next = snapshot.next_seq();
                snapshot.into_payloads(1.0).map(|payload| (next, payload)).collect()
            } else {
                publication.lock().since(u64::from_be_bytes(request[1][..].try_into().expect("8 bytes")))
            };
            for (seq, payload) in answer {
                let seq = Bytes::copy_from_slice(&seq.to_be_bytes());
                writer.send(&[Bytes::new(), "t".into(), seq, payload]).await.expect("sent");
            }
            let end = [Bytes::new(), Bytes::new(), Bytes::from_static(&[0xff; 8]), Bytes::new()];
            writer.send(&end).await.expect("sent");
        }
    })
}

fn message(topic: &'static str, seq: u64, payload: Bytes) -> [Bytes; 3] {
    [topic.into(), Bytes::copy_from_slice(&seq.to_be_bytes()), payload]
}

fn heartbeat(publication: &Mutex<Publication>) -> [Bytes; 3] {
    let publication = publication.lock();
    let payload = publication.heartbeat(1.0, std::time::Duration::from_secs(60));
    message(HEARTBEAT_TOPIC, publication.next_seq(), payload)
}

#[tokio::test]
async fn a_late_router_is_exact_by_snapshot() {
    let Fleet { bench, publisher, _servers } = Fleet::new(true).await;
    // Of five batches, it keeps one.
    let publication = Arc::new(Mutex::new(Publication::new(Epoch([1; 16]), 1)));
    for n in 0..5 {
        publication.lock().on_step(1.0, [stored(n * 1000, 2)]);
    }
    publication.lock().on_step(1.0, [removed(0, 2)]);
    let Publisher { listener, replay } = publisher;
    let _serving = serving(replay, Arc::clone(&publication));
    let publisher =
        Publisher { listener, replay: TcpListener::bind("127.0.0.1:0").await.expect("a free port") };
    let fleet = Fleet { bench, publisher, _servers };
    let (_reader, mut writer) = fleet.publisher.subscriber().await;
    eventually("the snapshot", || fleet.known(4000) == (0, 2)).await;
    assert_eq!((fleet.known(0), fleet.known(1000)), ((0, 0), (0, 2)));
    assert_eq!(fleet.ask(1000).await, "replica-2");
    let status = || fleet.bench.router.fleets()[0].replicas[1].kv_events.clone().expect("it tells");
    eventually("in sync", || status().in_sync).await;
    assert_eq!((status().next_batch, status().cached_blocks), (6, 8));
    assert_eq!(status().epoch.as_deref(), Some("01".repeat(16).as_str()));

    // Two batches are lost, and nothing comes after them: the heartbeat tells, and a snapshot brings what is too old.
    publication.lock().on_step(1.0, [removed(4000, 2)]);
    publication.lock().on_step(1.0, [stored(6000, 2)]);
    writer.send(&heartbeat(&publication)).await.expect("sent");
    eventually("what was lost", || fleet.known(6000) == (0, 2) && fleet.known(4000) == (0, 0)).await;
    eventually("in sync again", || status().in_sync).await;
    let resyncs = fleet.bench.metric("forebay_router_kv_event_resyncs_total");
    let expect = [
        r##"{by="snapshot",model="m",replica="#1",why="gap"} 1"##,
        r##"{by="snapshot",model="m",replica="#1",why="joined"} 1"##,
    ];
    assert_eq!(resyncs, expect);
    assert_eq!(fleet.metric("forebay_router_kv_event_batches_lost_total"), r##"{model="m",replica="#1"} 2"##);

    // Another cache behind the same address.
    *publication.lock() = Publication::new(Epoch([2; 16]), 10);
    publication.lock().on_step(1.0, [stored(9000, 1)]);
    writer.send(&heartbeat(&publication)).await.expect("sent");
    eventually("anew", || fleet.known(9000) == (0, 1) && fleet.known(1000) == (0, 0)).await;
    eventually("in sync with it", || status().in_sync).await;
    assert_eq!((status().next_batch, status().cached_blocks), (1, 1));
}

#[tokio::test]
async fn what_others_gave_a_replica_counts() {
    let fleet = Fleet::new(false).await;
    let (_reader, mut writer) = fleet.publisher.subscriber().await;
    let mut payload = Vec::new();
    let load = LoadStat {
        running_requests: 3,
        waiting_requests: 4,
        waiting_uncached_tokens: 9000,
        ..LoadStat::default()
    };
    encode_load(&load, &mut payload);
    writer.send(&message(LOAD_TOPIC, 0, payload.into())).await.expect("sent");
    eventually("the report", || fleet.bench.load(1) == (7, 9000)).await;
    for n in 0..4 {
        assert_eq!(fleet.ask(n * 1000).await, "replica-1");
    }
    assert!(fleet.metric("forebay_router_reported_queued_tokens").ends_with(" 9000"));
    // Nonsense is no news.
    writer.send(&message(LOAD_TOPIC, 1, Bytes::from_static(b"\xc1"))).await.expect("sent");
    writer.send(&batch(0, &[stored(0, 2)])).await.expect("sent");
    eventually("read on", || fleet.known(0).1 == 2).await;
    assert_eq!(fleet.bench.load(1), (7, 9000));
}
