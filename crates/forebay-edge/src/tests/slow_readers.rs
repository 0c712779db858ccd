//! Clients that ask and then take nothing: their replies are dropped, whatever the protocol.

use super::protocols::{Certified, certified, http2, tls};
use super::*;
use http_body_util::{BodyExt, Full};
use tokio::io::AsyncWrite;

const ASK: &str = "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}";
const REFUSED: &str = "forebay_edge_refused_total{reason=\"write-timeout\"}";

fn impatient(config: EdgeConfig) -> EdgeConfig {
    let mut config = config;
    config.limits.write_timeout = HumanDuration::from_millis(300);
    config.limits.idle_timeout = HumanDuration::from_secs(100);
    config
}

/// More than sockets hold.
async fn feed_without_end(feed: &Feed) {
    let frame = Bytes::from(vec![b'x'; 64 * 1024]);
    within(async {
        while feed.send(Ok(Chunk::Verbatim { bytes: frame.clone(), usage: None, deltas: 1 })).await.is_ok() {}
    })
    .await;
}

async fn check_dropped(edge: &Running, feeds: &mut mpsc::Receiver<Feed>) {
    let feed = within(feeds.recv()).await.unwrap();
    // Ends when the edge has dropped the reply.
    feed_without_end(&feed).await;
    edge.metric_becomes("forebay_edge_streams_in_flight", "0").await;
    edge.metric_becomes("forebay_edge_requests_in_flight", "0").await;
    let record = &edge.recent.last(1)[0];
    assert!(record.spans.iter().any(|span| span.why.contains("write-timeout")), "{:?}", record.spans);
}

async fn ask(io: &mut (impl AsyncWrite + Unpin)) {
    io.write_all(ASK.as_bytes()).await.unwrap();
    io.flush().await.unwrap();
}

#[tokio::test]
async fn http1() {
    let (stage, mut feeds) = streaming();
    let edge = Running::start(impatient(EdgeConfig::default()), Some(stage)).await;
    let mut tcp = edge.connect().await;
    ask(&mut tcp).await;
    check_dropped(&edge, &mut feeds).await;
    edge.metric_becomes("forebay_edge_connections", "0").await;
    assert_eq!(edge.metric(REFUSED).as_deref(), Some("1"));
    // The client can see that it is not whole.
    let mut rest = Vec::new();
    assert!(within(tcp.read_to_end(&mut rest)).await.is_err(), "reset");
}

#[tokio::test]
async fn http1_over_tls() {
    let (stage, mut feeds) = streaming();
    let Certified { env, config, cert } = certified();
    let edge = Running::start_in(impatient(config), Some(stage), &env).await;
    let mut stream = tls(&edge, &cert, b"http/1.1").await;
    ask(&mut stream).await;
    check_dropped(&edge, &mut feeds).await;
    edge.metric_becomes("forebay_edge_connections", "0").await;
}

#[tokio::test]
async fn one_http2_stream_among_others() {
    let (stage, mut feeds) = streaming();
    let edge = Running::start(impatient(EdgeConfig::default()), Some(stage)).await;
    let mut client = http2(edge.connect().await).await;
    let request = || http::Request::post("http://a/v1/x").body(Full::from("{}")).unwrap();
    // Its body is never asked for, so its window is never opened again.
    let stuck = within(client.send_request(request())).await.unwrap();
    let stuck_feed = within(feeds.recv()).await.unwrap();
    let mut read = within(client.send_request(request())).await.unwrap();
    let read_feed = within(feeds.recv()).await.unwrap();
    feed_without_end(&stuck_feed).await;
    edge.metric_becomes(REFUSED, "1").await;
    edge.metric_becomes("forebay_edge_streams_in_flight", "1").await;
    let record = &edge.recent.last(1)[0];
    assert!(record.spans.iter().any(|span| span.why.contains("write-timeout")), "{:?}", record.spans);
    assert!(within(stuck.into_body().collect()).await.is_err(), "reset");
    // Its neighbour, which waits for the stack and not for its client, goes on.
    read_feed.send(verbatim("data: 1\n\n")).await.unwrap();
    let frame = within(read.body_mut().frame()).await.unwrap().unwrap();
    assert_eq!(frame.into_data().unwrap(), "data: 1\n\n");
}

#[tokio::test]
async fn a_whole_http2_connection() {
    let (stage, mut feeds) = streaming();
    let edge = Running::start(impatient(EdgeConfig::default()), Some(stage)).await;
    let (io, mut held) = tokio::io::duplex(1024);
    let mut tcp = edge.connect().await;
    // Between the client and the edge: once it is told to, it takes nothing from the edge any more.
    let (stop, mut stopped) = oneshot::channel::<()>();
    tokio::spawn(async move {
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut held, &mut tcp) => {}
            _ = &mut stopped => std::future::pending::<()>().await,
        }
    });
    let mut client = hyper::client::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new());
    // So large that the socket is full before the window is.
    client.initial_stream_window_size(1 << 30).initial_connection_window_size(1 << 30);
    let handshake = client.handshake(hyper_util::rt::TokioIo::new(io));
    let (mut client, connection) = within(handshake).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::post("http://a/v1/x").body(Full::new(Bytes::from_static(b"{}"))).unwrap();
    let _answer = within(client.send_request(request)).await.unwrap();
    stop.send(()).unwrap();
    check_dropped(&edge, &mut feeds).await;
    // With its connection, and not only its stream.
    edge.metric_becomes("forebay_edge_connections", "0").await;
    assert!(edge.metric(REFUSED).is_some());
}

#[tokio::test]
async fn a_slow_reader_is_not_a_stopped_one() {
    let (stage, mut feeds) = streaming();
    let edge = Running::start(impatient(EdgeConfig::default()), Some(stage)).await;
    let mut tcp = edge.connect().await;
    ask(&mut tcp).await;
    let feed = within(feeds.recv()).await.unwrap();
    // Longer than the limit without a byte to take, and then one.
    read_until(&mut tcp, "\r\n\r\n").await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    feed.send(verbatim("data: 1\n\n")).await.unwrap();
    read_until(&mut tcp, "data: 1").await;
    assert_eq!(edge.metric(REFUSED), None);
}
