//! Upstream routes, with a scripted server on raw sockets below.

use super::*;
use crate::RouteConfig;
use tokio::net::TcpListener;

struct Below {
    listener: TcpListener,
    edge: Running,
}

async fn below(strip_prefix: bool) -> Below {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = format!("http://{}/base", listener.local_addr().unwrap());
    let edge = Running::start(routed(&to, strip_prefix), None).await;
    Below { listener, edge }
}

fn routed(to: &str, strip_prefix: bool) -> EdgeConfig {
    let route = RouteConfig {
        path: "/api/".into(),
        host: None,
        to: to.into(),
        strip_prefix,
        waf: None,
        timeout: Some(HumanDuration::from_millis(200)),
    };
    EdgeConfig { routes: vec![route], ..small_limits() }
}

impl Below {
    async fn accept(&self) -> TcpStream {
        within(self.listener.accept()).await.unwrap().0
    }
}

#[tokio::test]
async fn requests_are_passed_on_with_clean_headers() {
    let below = below(true).await;
    let mut client = below.edge.connect().await;
    let request = "POST /api/users/7?x=1 HTTP/1.1\r\nhost: shop.example\r\nconnection: close, x-secret\r\n\
                   x-secret: 1\r\nx-forwarded-for: 6.6.6.6\r\nforwarded: for=6.6.6.6\r\nte: gzip\r\n\
                   x-request-id: r1\r\naccept: */*\r\ncontent-length: 2\r\n\r\nhi";
    client.write_all(request.as_bytes()).await.unwrap();
    let mut server = below.accept().await;
    let got = read_until(&mut server, "\r\n\r\nhi").await;
    assert!(got.starts_with("POST /base/users/7?x=1 HTTP/1.1\r\n"), "{got}");
    let upstream = below.listener.local_addr().unwrap().to_string();
    assert_eq!(header(&got, "host"), Some(upstream.as_str()));
    assert_eq!(header(&got, "x-forwarded-for"), Some("127.0.0.1"));
    assert_eq!(header(&got, "x-forwarded-proto"), Some("http"));
    assert_eq!(header(&got, "x-forwarded-host"), Some("shop.example"));
    assert_eq!(header(&got, "x-request-id"), Some("r1"));
    assert_eq!(header(&got, "content-length"), Some("2"));
    assert!(header(&got, "traceparent").is_some_and(|t| t.len() == 55), "{got}");
    for gone in ["x-secret", "connection", "te", "forwarded"] {
        assert_eq!(header(&got, gone), None, "{got}");
    }
    let answer = "HTTP/1.1 201 Created\r\nconnection: keep-alive\r\nkeep-alive: 5\r\nx-own: 1\r\ncontent-length: 3\r\n\r\nyes";
    server.write_all(answer.as_bytes()).await.unwrap();
    let answer = read_to_end(&mut client).await;
    assert_eq!((status(&answer), header(&answer, "x-own"), body(&answer)), (201, Some("1"), "yes"));
    assert_eq!((header(&answer, "keep-alive"), header(&answer, "x-request-id")), (None, Some("r1")));
}

#[tokio::test]
async fn both_directions_stream() {
    let below = below(false).await;
    let mut client = below.edge.connect().await;
    client
        .write_all(b"POST /api/x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
        .await
        .unwrap();
    let mut server = below.accept().await;
    let got = read_until(&mut server, "3\r\none\r\n").await;
    assert!(got.starts_with("POST /base/api/x "), "{got}");
    // The answer begins before the request ends, and each piece passes alone.
    server.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n").await.unwrap();
    read_until(&mut client, "1\r\na\r\n").await;
    client.write_all(b"3\r\ntwo\r\n0\r\n\r\n").await.unwrap();
    read_until(&mut server, "3\r\ntwo\r\n0\r\n\r\n").await;
    server.write_all(b"1\r\nb\r\n").await.unwrap();
    read_until(&mut client, "1\r\nb\r\n").await;
    server.write_all(b"0\r\n\r\n").await.unwrap();
    read_until(&mut client, "0\r\n\r\n").await;
}

#[tokio::test]
async fn a_client_that_leaves_closes_the_upstream() {
    let below = below(false).await;
    for answered in [false, true] {
        let mut client = below.edge.connect().await;
        client.write_all(b"GET /api/x HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let mut server = below.accept().await;
        read_until(&mut server, "\r\n\r\n").await;
        if answered {
            server.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nx").await.unwrap();
            read_until(&mut client, "\r\n\r\nx").await;
        }
        drop(client);
        let mut rest = Vec::new();
        let _ = within(server.read_to_end(&mut rest)).await;
    }
}

#[tokio::test]
async fn upstream_errors_are_json() {
    let below = below(false).await;
    let exchange = async |request: &str, answer: &str| {
        let mut client = below.edge.connect().await;
        client.write_all(request.as_bytes()).await.unwrap();
        let mut server = below.accept().await;
        read_until(&mut server, "\r\n\r\n").await;
        server.write_all(answer.as_bytes()).await.unwrap();
        if !answer.is_empty() {
            drop(server);
            return read_to_end(&mut client).await;
        }
        read_to_end(&mut client).await
    };
    let nonsense = exchange(&get("/api/x"), "what?\r\n\r\n").await;
    assert_eq!((status(&nonsense), nonsense.contains("upstream_failed")), (502, true), "{nonsense}");
    let late = exchange(&get("/api/x"), "").await;
    assert_eq!((status(&late), late.contains("\"timeout\"")), (504, true), "{late}");
    // Broken in the middle: the client can see that it is not whole.
    let cut = exchange(&get("/api/x"), "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc").await;
    assert_eq!((status(&cut), header(&cut, "content-length"), body(&cut)), (200, Some("9"), "abc"));
    let closed = {
        let Below { listener, edge } = below;
        drop(listener);
        edge.raw(get("/api/x")).await
    };
    assert_eq!(status(&closed), 502);
    assert!(!closed.contains("127.0.0.1"), "no address of ours: {closed}");
}

#[tokio::test]
async fn bad_request_bodies_are_the_clients_fault() {
    let below = below(false).await;
    let check = async |request: String, code: u16| {
        let mut client = below.edge.connect().await;
        client.write_all(request.as_bytes()).await.unwrap();
        let reading = read_to_end(&mut client);
        // The upstream may or may not see the beginning of the request; it never answers.
        let answer = tokio::select! {
            answer = reading => answer,
            never = async {
                let mut held = Vec::new();
                loop {
                    held.push(below.accept().await);
                }
            } => never,
        };
        assert_eq!(status(&answer), code, "{answer}");
    };
    let head = "POST /api/x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
    check(format!("{head}3\r\nabcX\r\n"), 400).await;
    check(format!("{head}7d0\r\n{}\r\n0\r\n\r\n", "x".repeat(2000)), 413).await;
    check(post("/api/x", &"x".repeat(1001)), 413).await;
}
