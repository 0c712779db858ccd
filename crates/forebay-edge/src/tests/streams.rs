//! Streams: frame by frame, broken off, left by the client, and drained.

use super::*;
use forebay_types::{Blame, Class, Code};

const ASK: &str = "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}";

#[tokio::test]
async fn frames_arrive_one_at_a_time() {
    let (stage, mut feeds) = streaming();
    let edge = Running::start(EdgeConfig::default(), Some(stage)).await;
    let mut tcp = edge.connect().await;
    tcp.write_all(ASK.as_bytes()).await.unwrap();
    let feed = within(feeds.recv()).await.unwrap();
    // The head leaves before the first frame is there.
    read_until(&mut tcp, "\r\n\r\n").await;
    for frame in ["data: 1\n\n", "data: 2\n\n", "data: 3\n\n"] {
        // The next one is only sent when this one has arrived, so a buffer anywhere would hang.
        feed.send(verbatim(frame)).await.unwrap();
        let got = read_until(&mut tcp, "\n\n\r\n").await;
        assert_eq!(got, format!("9\r\n{frame}\r\n"), "one chunk, one frame");
    }
    // A chunk that only counts sends nothing.
    feed.send(verbatim("")).await.unwrap();
    drop(feed);
    assert_eq!(read_until(&mut tcp, "0\r\n\r\n").await, "0\r\n\r\n");
}

#[tokio::test]
async fn an_error_after_the_first_byte_is_a_frame_without_done() {
    let (stage, mut feeds) = streaming();
    let edge = Running::start(EdgeConfig::default(), Some(stage)).await;
    let mut tcp = edge.connect().await;
    tcp.write_all(ASK.as_bytes()).await.unwrap();
    let feed = within(feeds.recv()).await.unwrap();
    feed.send(verbatim("data: 1\n\n")).await.unwrap();
    let fault = Fault::new(Class::new(Code::UpstreamFailed, Blame::Upstream), "it broke").detail("hush");
    feed.send(Err(fault)).await.unwrap();
    let got = read_until(&mut tcp, "0\r\n\r\n").await;
    assert!(got.contains("data: {\"error\":{\"message\":\"it broke\""), "{got}");
    assert!(!got.contains("[DONE]") && !got.contains("hush"), "{got}");
    // What is below is released although the client still holds the connection.
    within(feed.closed()).await;
}

#[tokio::test]
async fn a_client_that_leaves_drops_the_stream() {
    let (stage, mut feeds) = streaming();
    let edge = Running::start(EdgeConfig::default(), Some(stage)).await;
    for with_frame in [true, false] {
        let mut tcp = edge.connect().await;
        tcp.write_all(ASK.as_bytes()).await.unwrap();
        let feed = within(feeds.recv()).await.unwrap();
        if with_frame {
            feed.send(verbatim("data: 1\n\n")).await.unwrap();
            read_until(&mut tcp, "data: 1").await;
        }
        drop(tcp);
        // Without a single further write: hyper sees the end of the connection.
        within(feed.closed()).await;
    }
    edge.metric_becomes("forebay_edge_streams_in_flight", "0").await;
    edge.metric_becomes("forebay_edge_requests_in_flight", "0").await;
    assert!(edge.recent.last(1)[0].spans.iter().any(|span| span.why.contains("client-left")));
}

#[tokio::test]
async fn a_client_that_leaves_before_the_answer_drops_the_call() {
    let (called, mut calls) = mpsc::channel::<oneshot::Receiver<()>>(1);
    let stage = script(move |_| {
        let called = called.clone();
        Box::pin(async move {
            let (alive, gone) = oneshot::channel::<()>();
            called.send(gone).await.expect("the test listens");
            std::future::pending::<()>().await;
            drop(alive);
            Ok(Reply::json("{}"))
        })
    });
    let edge = Running::start(EdgeConfig::default(), Some(stage)).await;
    let mut tcp = edge.connect().await;
    tcp.write_all(ASK.as_bytes()).await.unwrap();
    let gone = within(calls.recv()).await.unwrap();
    drop(tcp);
    assert!(within(gone).await.is_err(), "the call's future was dropped");
    edge.metric_becomes("forebay_edge_requests_total{code=\"499\",route=\"/\"}", "1").await;
}

#[tokio::test]
async fn heartbeats_fill_silence() {
    let (stage, mut feeds) = streaming();
    let config =
        EdgeConfig { stream_heartbeat: Some(HumanDuration::from_millis(20)), ..EdgeConfig::default() };
    let edge = Running::start(config, Some(stage)).await;
    let mut tcp = edge.connect().await;
    tcp.write_all(ASK.as_bytes()).await.unwrap();
    let feed = within(feeds.recv()).await.unwrap();
    read_until(&mut tcp, ": ping\n\n\r\n8\r\n: ping\n\n").await;
    feed.send(verbatim("data: 1\n\n")).await.unwrap();
    read_until(&mut tcp, "data: 1\n\n").await;
}

#[tokio::test]
async fn a_drain_finishes_streams_and_refuses_newcomers() {
    let (stage, mut feeds) = streaming();
    let mut edge = Running::start(EdgeConfig::default(), Some(stage)).await;
    let mut silent = edge.connect().await;
    let mut idle = edge.connect().await;
    idle.write_all(b"GET /version HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    read_until(&mut idle, "1.2.3\"}").await;
    let mut tcp = edge.connect().await;
    tcp.write_all(ASK.as_bytes()).await.unwrap();
    let feed = within(feeds.recv()).await.unwrap();
    feed.send(verbatim("data: 1\n\n")).await.unwrap();
    read_until(&mut tcp, "data: 1").await;
    edge.shut_down();
    // Idle connections are closed now, not at the end.
    assert_eq!(read_to_end(&mut silent).await, "");
    assert_eq!(read_to_end(&mut idle).await, "");
    assert!(TcpStream::connect(edge.addr).await.is_err(), "the listener is closed");
    assert!(!edge.served.is_finished());
    feed.send(verbatim("data: [DONE]\n\n")).await.unwrap();
    drop(feed);
    let rest = read_to_end(&mut tcp).await;
    assert!(rest.contains("[DONE]") && rest.ends_with("0\r\n\r\n"), "{rest}");
    let report = edge.drained().await;
    assert_eq!(report.cut, 0);
}

#[tokio::test]
async fn a_drain_is_announced_before_the_port_closes() {
    let config = EdgeConfig { drain_delay: HumanDuration::from_millis(400), ..EdgeConfig::default() };
    let mut edge = Running::start(config, Some(echo())).await;
    edge.shut_down();
    within(async {
        while status(&edge.raw(get("/health")).await) != 503 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    // Who has not heard of it is still served, on new connections too.
    assert_eq!(status(&edge.raw(post("/v1/x", "{}")).await), 200);
    let addr = edge.addr;
    let report = edge.drained().await;
    assert!(report.took >= Duration::from_millis(400), "{report:?}");
    assert!(TcpStream::connect(addr).await.is_err());
}

#[tokio::test]
async fn a_drain_has_an_end() {
    let (stage, mut feeds) = streaming();
    let config = EdgeConfig { drain_timeout: HumanDuration::from_millis(50), ..EdgeConfig::default() };
    let edge = Running::start(config, Some(stage)).await;
    let mut tcp = edge.connect().await;
    tcp.write_all(ASK.as_bytes()).await.unwrap();
    let feed = within(feeds.recv()).await.unwrap();
    let report = edge.drained().await;
    assert_eq!((report.open, report.cut), (1, 1));
    within(feed.closed()).await;
    let mut rest = Vec::new();
    let _ = within(tcp.read_to_end(&mut rest)).await;
    assert!(!String::from_utf8_lossy(&rest).ends_with("0\r\n\r\n"), "cut, and seen to be cut");
}

#[tokio::test]
async fn an_answer_during_a_drain_says_close() {
    let (go, gone) = oneshot::channel::<()>();
    let gate = Arc::new(tokio::sync::Mutex::new(Some(gone)));
    let (called, mut calls) = mpsc::channel(1);
    let stage = script(move |_| {
        let (gate, called) = (gate.clone(), called.clone());
        Box::pin(async move {
            called.send(()).await.expect("the test listens");
            let gone = gate.lock().await.take().expect("called once");
            let _ = gone.await;
            Ok(Reply::json("{}"))
        })
    });
    let mut edge = Running::start(EdgeConfig::default(), Some(stage)).await;
    let mut tcp = edge.connect().await;
    tcp.write_all(ASK.as_bytes()).await.unwrap();
    within(calls.recv()).await.unwrap();
    edge.shut_down();
    // The listener is closed, so the connections have been told.
    within(async { while TcpStream::connect(edge.addr).await.is_ok() {} }).await;
    go.send(()).unwrap();
    let answer = read_to_end(&mut tcp).await;
    assert_eq!((status(&answer), header(&answer, "connection")), (200, Some("close")), "{answer}");
}
