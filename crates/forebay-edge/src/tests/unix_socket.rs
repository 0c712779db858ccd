//! A Unix socket beside a port: the same answers, and the file goes with the edge.

use tokio::net::UnixStream;

use super::protocols::{Certified, certified, tls_over};
use super::*;

#[tokio::test]
async fn a_socket_answers_as_a_port_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let (stage, mut fed) = streaming();
    let config = EdgeConfig { uds: Some(path.clone()), ..small_limits() };
    let mut edge = Running::start(config, Some(stage)).await;

    let mut unix = UnixStream::connect(&path).await.unwrap();
    unix.write_all(get("/version").as_bytes()).await.unwrap();
    let mut answer = String::new();
    within(unix.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(status(&answer), 200);
    assert_eq!(body(&answer), body(&edge.raw(get("/version")).await));

    // A stream that runs when the stop comes is finished, and nobody can connect any more.
    let mut unix = UnixStream::connect(&path).await.unwrap();
    unix.write_all(post("/v1/chat/completions", "{}").as_bytes()).await.unwrap();
    let feed = within(fed.recv()).await.unwrap();
    feed.send(verbatim("data: one\n\n")).await.unwrap();
    edge.shut_down();
    within(async {
        while path.exists() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    feed.send(verbatim("data: [DONE]\n\n")).await.unwrap();
    drop(feed);
    let mut answer = String::new();
    within(unix.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.contains("data: one") && answer.contains("[DONE]"), "{answer}");
    assert_eq!(edge.drained().await.cut, 0);
}

#[tokio::test]
async fn a_socket_speaks_tls_where_the_port_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let Certified { env, config, cert } = certified();
    let config = EdgeConfig { uds: Some(path.clone()), ..config };
    let _edge = Running::start_in(config, Some(echo()), &env).await;
    let mut stream = tls_over(UnixStream::connect(&path).await.unwrap(), &cert, b"http/1.1").await;
    stream.write_all(get("/version").as_bytes()).await.unwrap();
    let mut answer = String::new();
    within(stream.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(status(&answer), 200);
}

#[test]
fn a_socket_alone_is_enough() {
    let check = |listen: bool, uds: Option<&str>, expect: &[&str]| {
        let mut config = EdgeConfig { uds: uds.map(Into::into), ..EdgeConfig::default() };
        if !listen {
            config.listen = OneOrMany::default();
        }
        let found: Vec<String> = config.problems().iter().map(ToString::to_string).collect();
        assert_eq!(found, expect);
    };
    check(true, Some("/run/s"), &[]);
    check(false, Some("s"), &[]);
    check(false, None, &["`edge.listen`: at least one address is needed"]);
    check(true, Some(""), &["`edge.uds`: the path is empty"]);
    let long = "x".repeat(104);
    check(true, Some(&long), &["`edge.uds`: the path has 104 bytes; that of a socket may have 103 at most"]);
}
