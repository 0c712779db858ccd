use std::time::Duration;

use bytes::Bytes;
use forebay_kv::codec::{
    END_SEQ, EventBatch, HEARTBEAT_TOPIC, LOAD_TOPIC, ReplicaEvent, SNAPSHOT_REQUEST, decode_batch,
    decode_load,
};
use forebay_observe::Registry;
use forebay_types::BlockHash;
use forebay_zmtp::{Halves, Limits, SocketType, dial, subscribe};

use super::*;

const LIMITS: Limits = Limits { message_bytes_max: 1 << 20, parts_max: 8 };

fn config(yaml: serde_json::Value) -> KvEventsConfig {
    serde_json::from_value(yaml).expect("a valid configuration")
}

fn metrics() -> KvEventMetrics {
    KvEventFamilies::register(&Registry::new()).expect("registered once").for_model("m")
}

fn stored(n: u8) -> KvEvent {
    KvEvent::Stored {
        hashes: vec![BlockHash([n; 32])],
        parent: None,
        tokens: vec![n.into(); 4],
        block_size: 4,
        cache_salt: None,
    }
}

/// The block's name, as it goes over the wire.
fn name(n: u8) -> u64 {
    u64::from_be_bytes([n; 8])
}

struct Bench {
    sink: KvSink,
    load: watch::Sender<LoadStat>,
    metrics: KvEventMetrics,
    events: Endpoint,
    replay: Endpoint,
    epoch: Epoch,
}

/// Listening on ports that the system chose.
fn bench(topic: &str, buffer_steps: u32) -> Bench {
    let yaml = serde_json::json!({
        "endpoint": "tcp://127.0.0.1:0", "bind": true, "replay-endpoint": "tcp://127.0.0.1:0",
        "topic": topic, "buffer-steps": buffer_steps,
    });
    let publisher = Publisher::bind(&config(yaml)).expect("bound");
    let KvEventSource { data_parallel_rank, endpoint, replay_endpoint, topic: told } = publisher.source();
    assert_eq!((data_parallel_rank, told.as_str()), (0, topic));
    assert!(!endpoint.to_string().ends_with(":0"), "{endpoint}");
    let (replay, epoch, metrics) = (replay_endpoint.expect("bound"), publisher.epoch, metrics());
    let (sink, load) = publisher.start(metrics.clone());
    Bench { sink, load, metrics, events: endpoint, replay, epoch }
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("in time")
}

/// Topic, sequence number, names of the stored blocks; a cleared cache is 0.
fn read(message: &[Bytes]) -> (String, u64, Vec<u64>) {
    let [topic, seq, payload] = message else { panic!("{message:?}") };
    let batch = decode_batch(payload).expect("a batch");
    assert_eq!(batch.data_parallel_rank, Some(0));
    let names = batch.events.into_iter().flat_map(|event| match event {
        ReplicaEvent::Stored { names, .. } => names,
        ReplicaEvent::Cleared => vec![0],
        other => panic!("{other:?}"),
    });
    let seq = u64::from_be_bytes(seq[..].try_into().expect("8 bytes"));
    (String::from_utf8_lossy(topic).into_owned(), seq, names.collect())
}

/// Subscribes, and publishes until something of it arrives: a subscription has no answer.
async fn subscribed(bench: &Bench, topic: &[u8]) -> (Halves, u64) {
    let (mut reader, mut writer) = dial(&bench.events, SocketType::Sub, LIMITS).await.expect("connected");
    writer.send(&[subscribe(topic)]).await.expect("sent");
    let seq = loop {
        (bench.sink)(&[stored(1)]);
        if let Ok(message) = tokio::time::timeout(Duration::from_millis(20), reader.recv()).await {
            break read(&message.expect("open")).1;
        }
    };
    // All that was published meanwhile.
    let mut last = seq;
    while let Ok(message) = tokio::time::timeout(Duration::from_millis(100), reader.recv()).await {
        last = read(&message.expect("open")).1;
    }
    ((reader, writer), last)
}

#[tokio::test]
async fn a_subscriber_gets_every_step_in_order() {
    let bench = bench("kv@a@m", 100);
    let ((mut reader, _writer), last) = soon(subscribed(&bench, b"kv@")).await;
    assert_eq!(bench.metrics.subscribers.get(), 1);
    for n in 0..50 {
        (bench.sink)(&[stored(n), stored(n + 100)]);
    }
    for n in 0..50 {
        let got = read(&soon(reader.recv()).await.expect("open"));
        assert_eq!(got, ("kv@a@m".to_owned(), last + 1 + u64::from(n), vec![name(n), name(n + 100)]));
    }
    drop((reader, _writer));
    soon(async {
        while bench.metrics.subscribers.get() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn topics_are_filtered() {
    let bench = bench("kv@a@m", 100);
    let (mut reader, mut writer) =
        soon(dial(&bench.events, SocketType::Sub, LIMITS)).await.expect("connected");
    writer.send(&[subscribe(b"other")]).await.expect("sent");
    // Another one sees that events flow, this one gets none.
    let _other = soon(subscribed(&bench, b"")).await;
    assert!(tokio::time::timeout(Duration::from_millis(50), reader.recv()).await.is_err());
}

#[tokio::test]
async fn missed_steps_are_replayed() {
    let bench = bench("t", 3);
    (0..5).for_each(|n| (bench.sink)(&[stored(n)]));
    let (mut reader, mut writer) =
        soon(dial(&bench.replay, SocketType::Dealer, LIMITS)).await.expect("connected");
    let ask =
        async |start: u64, reader: &mut forebay_zmtp::Reader<_>, writer: &mut forebay_zmtp::Writer<_>| {
            writer.send(&[Bytes::new(), Bytes::copy_from_slice(&start.to_be_bytes())]).await.expect("sent");
            let mut got = Vec::new();
            loop {
                let message = reader.recv().await.expect("open");
                assert_eq!(message[0], "");
                if message[2] == [0xff; 8][..] {
                    assert_eq!((message.len(), &message[1][..], &message[3][..]), (4, &b""[..], &b""[..]));
                    return got;
                }
                let (topic, seq, names) = read(&message[1..]);
                assert_eq!((topic.as_str(), names), ("t", vec![name(seq as u8)]));
                got.push(seq);
            }
        };
    // Until the task has taken them all.
    soon(async { while ask(4, &mut reader, &mut writer).await.is_empty() {} }).await;
    assert_eq!(soon(ask(0, &mut reader, &mut writer)).await, [2, 3, 4]);
    assert_eq!(soon(ask(3, &mut reader, &mut writer)).await, [3, 4]);
    assert_eq!(soon(ask(5, &mut reader, &mut writer)).await, [0u64; 0]);
    // What is no request ends the connection, and nothing else.
    writer.send(&[Bytes::from_static(b"?")]).await.expect("sent");
    assert!(soon(reader.recv()).await.is_err());
    (bench.sink)(&[stored(9)]);
    assert!(soon(dial(&bench.replay, SocketType::Dealer, LIMITS)).await.is_ok());
}

/// The messages of one answer without their end, and how they begin.
async fn ask(halves: &mut Halves, request: &[u8]) -> Vec<(String, u64, EventBatch)> {
    halves.1.send(&[Bytes::new(), Bytes::copy_from_slice(request)]).await.expect("sent");
    let mut got = Vec::new();
    loop {
        let message = halves.0.recv().await.expect("open");
        let [empty, topic, seq, payload] = &message[..] else { panic!("{message:?}") };
        assert_eq!(empty, "");
        if seq[..] == END_SEQ {
            return got;
        }
        let seq = u64::from_be_bytes(seq[..].try_into().expect("8 bytes"));
        got.push((String::from_utf8_lossy(topic).into_owned(), seq, decode_batch(payload).expect("a batch")));
    }
}

/// Its beginning is long out of the buffer: a snapshot has it, and goes on where the live events do.
#[tokio::test]
async fn a_snapshot_is_the_whole_cache() {
    let bench = bench("t", 1);
    let mut halves = soon(dial(&bench.replay, SocketType::Dealer, LIMITS)).await.expect("connected");
    let empty = soon(ask(&mut halves, SNAPSHOT_REQUEST)).await;
    assert_eq!((empty.len(), empty[0].1, &empty[0].2.events[..]), (1, 0, &[ReplicaEvent::Cleared][..]));

    (0..9).for_each(|n| (bench.sink)(&[stored(n)]));
    (bench.sink)(&[KvEvent::Removed { hashes: vec![BlockHash([3; 32]), BlockHash([5; 32])] }]);
    soon(async { while ask(&mut halves, &9u64.to_be_bytes()).await.is_empty() {} }).await;
    let snapshot = soon(ask(&mut halves, SNAPSHOT_REQUEST)).await;
    let mut cached = Vec::new();
    for (n, (topic, seq, batch)) in snapshot.into_iter().enumerate() {
        assert_eq!((topic.as_str(), seq, batch.epoch, batch.heartbeat), ("t", 10, Some(bench.epoch), None));
        assert_eq!(batch.events.contains(&ReplicaEvent::Cleared), n == 0);
        cached.extend(batch.events.into_iter().filter_map(|event| match event {
            ReplicaEvent::Stored { names, .. } => Some(names[0]),
            _ => None,
        }));
    }
    cached.sort();
    assert_eq!(cached, [0, 1, 2, 4, 6, 7, 8].map(name));
    assert_eq!(bench.metrics.snapshots.get(), 2);
    // The two have nothing to do with each other.
    assert_eq!(soon(ask(&mut halves, &0u64.to_be_bytes())).await.len(), 1);
}

#[tokio::test]
async fn who_names_heartbeats_gets_them_and_nobody_else() {
    let bench = bench("", 10);
    let ((mut everything, _writer), _) = soon(subscribed(&bench, b"")).await;
    let (mut reader, mut writer) =
        soon(dial(&bench.events, SocketType::Sub, LIMITS)).await.expect("connected");
    writer.send(&[subscribe(HEARTBEAT_TOPIC.as_bytes())]).await.expect("sent");
    // One at once, as an answer to the subscription, and then as time goes by.
    let mut seqs = Vec::new();
    for _ in 0..2 {
        let message = soon(reader.recv()).await.expect("open");
        let [topic, seq, payload] = &message[..] else { panic!("{message:?}") };
        assert_eq!(topic, HEARTBEAT_TOPIC);
        let batch = decode_batch(payload).expect("a batch");
        assert_eq!((batch.epoch, batch.events.len()), (Some(bench.epoch), 0));
        assert_eq!(batch.heartbeat, Some(Duration::from_secs(1)));
        seqs.push(u64::from_be_bytes(seq[..].try_into().expect("8 bytes")));
    }
    assert_eq!(seqs[0], seqs[1]);
    (bench.sink)(&[stored(9)]);
    let message = soon(everything.recv()).await.expect("open");
    assert_eq!(read(&message), (String::new(), seqs[0], vec![name(9)]));
}

#[tokio::test]
async fn the_load_is_pushed_to_who_names_it() {
    let bench = bench("", 10);
    let (mut reader, mut writer) =
        soon(dial(&bench.events, SocketType::Sub, LIMITS)).await.expect("connected");
    writer.send(&[subscribe(LOAD_TOPIC.as_bytes())]).await.expect("sent");
    // Whatever becomes of those in between, the last one is told, and what does not change is told again.
    for running_requests in 1..=100 {
        bench.load.send_replace(LoadStat { running_requests, ..LoadStat::default() });
    }
    let mut seqs = Vec::new();
    let mut told = 0;
    while told < 2 {
        let message = soon(reader.recv()).await.expect("open");
        let [topic, seq, payload] = &message[..] else { panic!("{message:?}") };
        assert_eq!(topic, LOAD_TOPIC);
        seqs.push(u64::from_be_bytes(seq[..].try_into().expect("8 bytes")));
        told += u32::from(decode_load(payload).expect("a report").running_requests == 100);
    }
    assert!(seqs.is_sorted() && seqs.len() < 50, "{seqs:?}");
}

#[tokio::test]
async fn every_cache_has_an_epoch_of_its_own() {
    assert_ne!(bench("", 1).epoch, bench("", 1).epoch);
}

#[tokio::test]
async fn it_connects_where_the_endpoint_is_a_host() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    let publisher =
        Publisher::bind(&config(serde_json::json!({"endpoint": format!("tcp://127.0.0.1:{port}")})));
    let sink = publisher.expect("nothing to bind").start(metrics()).0;
    // Twice: it comes back after the subscriber has gone.
    for n in 0..2 {
        let (stream, _) = soon(listener.accept()).await.expect("connected");
        let (mut reader, mut writer) =
            soon(forebay_zmtp::accept(stream, SocketType::Sub, LIMITS)).await.expect("shaken");
        writer.send(&[subscribe(b"")]).await.expect("sent");
        let message = soon(async {
            loop {
                sink(&[stored(n)]);
                if let Ok(message) = tokio::time::timeout(Duration::from_millis(20), reader.recv()).await {
                    return message.expect("open");
                }
            }
        });
        assert_eq!(read(&message.await).2, [name(n)]);
    }
}

/// The task is held up: what doesn't fit becomes one step, in its order, and the queue is open again after it.
#[test]
fn an_overflow_loses_nothing() {
    let (steps, queue) = mpsc::channel(2);
    let (overflow, metrics) = (Overflow::default(), metrics());
    let sink = sink(steps, overflow.clone(), metrics.clone());
    let mut inbox = Inbox { queue, overflow };
    let next = |inbox: &mut Inbox| inbox.queue.try_recv().map(|step| step.events);
    (0..5).for_each(|n| sink(&[stored(n)]));
    assert!(inbox.overflowed().is_none());
    assert_eq!(next(&mut inbox), Ok(vec![stored(0)]));
    // There is room, but not before those that wait.
    sink(&[stored(5)]);
    assert_eq!(next(&mut inbox), Ok(vec![stored(1)]));
    assert!(next(&mut inbox).is_err());
    let overflowed = inbox.overflowed().expect("four steps").events;
    assert_eq!(overflowed, (2..6).map(stored).collect::<Vec<_>>());
    assert!(inbox.overflowed().is_none());
    sink(&[stored(6)]);
    assert_eq!(next(&mut inbox), Ok(vec![stored(6)]));
    assert_eq!(metrics.dropped_queue.get(), 0);
}

#[test]
fn an_endless_overflow_never_leaves_a_subscriber_with_what_is_gone() {
    let (steps, queue) = mpsc::channel(1);
    let (overflow, metrics) = (Overflow::default(), metrics());
    let sink = sink(steps, overflow.clone(), metrics.clone());
    let mut inbox = Inbox { queue, overflow };
    sink(&[stored(0)]);
    let many = vec![KvEvent::Removed { hashes: Vec::new() }; OVERFLOW_MAX];
    sink(&many);
    sink(&[stored(1)]);
    sink(&[stored(2)]);
    assert_eq!(metrics.dropped_queue.get(), 1);
    assert!(inbox.queue.try_recv().is_ok());
    assert_eq!(inbox.overflowed().expect("more").events, [KvEvent::Cleared, stored(2)]);
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let endpoint = format!("tcp://{}", taken.local_addr().expect("bound"));
    let yaml = serde_json::json!({"endpoint": "tcp://127.0.0.1:1", "replay-endpoint": endpoint});
    let error = Publisher::bind(&config(yaml)).err().expect("in use").to_string();
    assert_eq!(error, format!("can't listen on {endpoint} (`engine.kv-events.replay-endpoint`)"));
}
