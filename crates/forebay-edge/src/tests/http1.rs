//! HTTP/1.1 on the wire: what is refused, and every limit.

use super::*;

#[tokio::test]
async fn ambiguous_requests_are_refused_and_the_connection_closed() {
    let edge = Running::start(EdgeConfig::default(), Some(echo())).await;
    let good = "GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n";
    let check = async |request: &str, code: u16, says: &str| {
        // Whatever is smuggled behind the bad request gets no answer.
        let answer = edge.raw(format!("{request}{good}")).await;
        assert_eq!(status(&answer), code, "{request:?} got {answer:?}");
        assert!(answer.contains(says), "{request:?} got {answer:?}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{request:?} got {answer:?}");
        let json = body(&answer).starts_with("{\"error\":{") && header(&answer, "x-request-id").is_some();
        assert!(json, "{request:?} got {answer:?}");
    };
    let head = |lines: &str| format!("POST /v1/x HTTP/1.1\r\nhost: a\r\n{lines}\r\n");
    check("GET / HTTP/1.1\r\n\r\n", 400, "no host header").await;
    check("GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400, "more than one host").await;
    check("GET / HTTP/1.1\r\nhost: a/b\r\n\r\n", 400, "not a valid host").await;
    check("GET http://b/ HTTP/1.1\r\nhost: a\r\n\r\n", 400, "another host").await;
    check("get / HTTP/1.1\r\nhost: a\r\n\r\n", 400, "method").await;
    check(&head("content-length: 4\r\ncontent-length: 4\r\n"), 400, "more than one content-length").await;
    check(&head("content-length: 3\r\ntransfer-encoding: chunked\r\n"), 400, "both content-length").await;
    check(&head("transfer-encoding: chunked\r\ncontent-length: 3\r\n"), 400, "both content-length").await;
    check(&head("transfer-encoding: identity, chunked\r\n"), 400, "transfer-encoding").await;
    check(&head("transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n"), 400, "transfer-encoding")
        .await;
    check("GET / HTTP/1.1\nhost: a\n\n", 400, "CR LF").await;
    check("GET /../x HTTP/1.1\r\nhost: a\r\n\r\n", 400, "`..`").await;
    check("OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n", 400, "target").await;
    check("CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n", 400, "CONNECT").await;
    check(&head("expect: magic\r\n"), 400, "100-continue").await;
    check(&head("connection: upgrade\r\nupgrade: websocket\r\n"), 400, "websocket").await;
    // These hyper would refuse on its own, without a word.
    check(&head("content-length: 4, 4\r\n"), 400, "content-length").await;
    check(&head("content-length: -1\r\n"), 400, "content-length").await;
    check(&head("content-length: abc\r\n"), 400, "content-length").await;
    check(&head("transfer-encoding: gzip\r\n"), 400, "transfer-encoding").await;
    check("GET / HTTP/1.1\r\nhost : a\r\n\r\n", 400, "header line").await;
    check("GET / HTTP/1.1\r\nhost: a\r\n folded\r\n\r\n", 400, "header line").await;
    check("GET /a b HTTP/1.1\r\nhost: a\r\n\r\n", 400, "GET /path HTTP/1.1").await;
    check("GET / HTTP/9.9\r\nhost: a\r\n\r\n", 400, "GET /path HTTP/1.1").await;
    // The beginning of a TLS handshake, whose end would never come.
    check("\x16\x03\x01\x02\0\x01", 400, "GET /path HTTP/1.1").await;
    let reasons = [
        "host-missing",
        "length-and-encoding",
        "length-repeated",
        "length-invalid",
        "bare-line-feed",
        "method-invalid",
        "header-invalid",
        "request-line-invalid",
    ];
    assert!(edge.metric("forebay_edge_refused_total{reason=\"unparsable\"}").is_none());
    for reason in reasons {
        let name = format!("forebay_edge_refused_total{{reason=\"{reason}\"}}");
        assert!(edge.metric(&name).is_some(), "{reason}");
    }
}

#[tokio::test]
async fn bad_chunks_are_the_clients_fault() {
    let edge = Running::start(EdgeConfig::default(), Some(echo())).await;
    for chunks in
        ["4\r\nabcdX\r\n0\r\n\r\n", "0x4\r\nabcd\r\n0\r\n\r\n", "+4\r\nabcd\r\n0\r\n\r\n", "ggg\r\n"]
    {
        let head = "POST /v1/x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
        let answer = edge.raw(format!("{head}{chunks}")).await;
        assert_eq!(status(&answer), 400, "{chunks:?} got {answer:?}");
    }
}

#[tokio::test]
async fn keep_alive_pipelining_and_chunked_bodies_work() {
    let edge = Running::start(EdgeConfig::default(), Some(echo())).await;
    let chunked = "POST /v1/b HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nt: v\r\n\r\n";
    let plain = "POST /v1/a HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nhi";
    let answer = edge.raw(format!("{plain}{chunked}{}", get("/v1/c"))).await;
    let paths: Vec<_> = ["\"/v1/a\",\"body\":\"hi\"", "\"/v1/b\",\"body\":\"abcde\"", "\"/v1/c\""]
        .iter()
        .map(|part| answer.find(part).unwrap_or_else(|| panic!("{part} in {answer}")))
        .collect();
    assert!(paths.is_sorted(), "{answer}");
    let http10 = edge.raw("GET /v1/models HTTP/1.0\r\nhost: a\r\n\r\n").await;
    assert_eq!(status(&http10), 200);
}

#[tokio::test]
async fn heads_have_limits() {
    let edge = Running::start(small_limits(), Some(echo())).await;
    let check = async |head: String, limit: &str, id: &str| {
        let answer = edge.raw(head).await;
        assert_eq!((status(&answer), answer.contains(limit)), (431, true), "{answer}");
        assert!(body(&answer).contains("\"headers_too_large\""), "{answer}");
        assert_eq!(header(&answer, "x-request-id"), Some(id), "{answer}");
        assert_eq!(header(&answer, "connection"), Some("close"), "{answer}");
        edge.metric_becomes("forebay_edge_requests_in_flight", "0").await;
        let record = edge.recent.find(id).expect("recorded");
        assert_eq!((record.status, record.path.as_str(), record.method.as_str()), (431, "/v1/x", "PUT"));
    };
    let head =
        |id: &str, lines: &str| format!("PUT /v1/x HTTP/1.1\r\nhost: a\r\nx-request-id: {id}\r\n{lines}\r\n");
    let long = "edge.limits.max-header-bytes";
    check(head("r1", &format!("x: {}\r\n", "y".repeat(40_000))), long, "r1").await;
    // So long that the answer comes before the end of the head, and still arrives.
    check(head("r2", &format!("x: {}\r\n", "y".repeat(2_000_000))), long, "r2").await;
    check(head("r3", &"x: y\r\n".repeat(101)), "edge.limits.max-headers", "r3").await;
    edge.metric_becomes("forebay_edge_refused_total{reason=\"max-header-bytes\"}", "2").await;
    edge.metric_becomes("forebay_edge_refused_total{reason=\"max-headers\"}", "1").await;
    // Up to the limits all is well, also where it comes in pieces.
    let much = head("r4", &format!("connection: close\r\n{}", "x: y\r\n".repeat(97)));
    let mut tcp = edge.connect().await;
    for piece in much.as_bytes().chunks(100) {
        tcp.write_all(piece).await.unwrap();
        tokio::task::yield_now().await;
    }
    assert_eq!(status(&read_to_end(&mut tcp).await), 200);
    let wide = head("r5", &format!("connection: close\r\nx: {}\r\n", "y".repeat(8000)));
    assert_eq!(status(&edge.raw(wide).await), 200);
}

#[tokio::test]
async fn a_bad_request_waits_for_the_answers_before_it() {
    let edge = Running::start(EdgeConfig::default(), Some(echo())).await;
    let good = "GET /v1/a HTTP/1.1\r\nhost: a\r\n\r\n";
    let answer = edge.raw(format!("{good}{good}GET /v1/b HTTP/1.1\r\nhost : a\r\n\r\n{good}")).await;
    let statuses: Vec<_> = answer.match_indices("HTTP/1.1 ").map(|(at, _)| status(&answer[at..])).collect();
    assert_eq!(statuses, [200, 200, 400], "{answer}");
}

#[tokio::test]
async fn bodies_have_limits() {
    let edge = Running::start(small_limits(), Some(echo())).await;
    let names_limit = "1000 bytes; the limit is `edge.limits.max-body`";
    let exact = edge.raw(post("/v1/x", &"x".repeat(1000))).await;
    assert_eq!(status(&exact), 200);
    let announced = edge.raw(post("/v1/x", &"x".repeat(1001))).await;
    assert_eq!((status(&announced), announced.contains(names_limit)), (413, true), "{announced}");
    assert_eq!(header(&announced, "connection"), Some("close"));
    let head = "POST /v1/x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
    let chunked = edge.raw(format!("{head}400\r\n{}\r\n0\r\n\r\n", "x".repeat(1024))).await;
    assert_eq!((status(&chunked), chunked.contains(names_limit)), (413, true), "{chunked}");
    let slow = edge.raw("POST /v1/x HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nabc").await;
    assert_eq!((status(&slow), slow.contains("edge.limits.body-timeout")), (408, true), "{slow}");
}

#[tokio::test]
async fn a_large_refused_upload_still_gets_its_answer() {
    let edge = Running::start(small_limits(), Some(echo())).await;
    let answer = edge.raw(post("/v1/x", &"x".repeat(2_000_000))).await;
    assert_eq!(status(&answer), 413);
}

#[tokio::test]
async fn expect_100_is_answered_only_when_the_body_is_wanted() {
    let edge = Running::start(small_limits(), Some(echo())).await;
    let head = |length: u32| {
        format!(
            "POST /v1/x HTTP/1.1\r\nhost: a\r\nconnection: close\r\nexpect: 100-continue\r\ncontent-length: {length}\r\n\r\n"
        )
    };
    let refused = edge.raw(head(5000)).await;
    assert_eq!(status(&refused), 413, "{refused}");
    let mut tcp = edge.connect().await;
    tcp.write_all(head(2).as_bytes()).await.unwrap();
    let go_on = read_until(&mut tcp, "\r\n\r\n").await;
    assert_eq!(status(&go_on), 100, "{go_on}");
    tcp.write_all(b"ok").await.unwrap();
    assert_eq!(status(&read_to_end(&mut tcp).await), 200);
}

#[tokio::test]
async fn silent_and_slow_connections_are_closed() {
    let edge = Running::start(small_limits(), Some(echo())).await;
    // Each of these ends by the edge's doing.
    assert_eq!(edge.raw("").await, "", "a connection that says nothing");
    assert_eq!(edge.raw("GET /v1/models HTTP/1.1\r\nhost:").await, "", "a head that stops");
    let idle = edge.raw("GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert_eq!(status(&idle), 200, "an idle connection is closed after its answer");
    let second = edge.raw("GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\nGET /v1/mo").await;
    assert_eq!(second.matches("HTTP/1.1 200").count(), 1, "a second head that stops");
    edge.metric_becomes("forebay_edge_refused_total{reason=\"idle-timeout\"}", "1").await;
    edge.metric_becomes("forebay_edge_connections", "0").await;
}

#[tokio::test]
async fn a_slow_answer_is_not_an_idle_connection() {
    let mut config = small_limits();
    config.limits.idle_timeout = HumanDuration::from_millis(50);
    config.limits.header_timeout = HumanDuration::from_millis(50);
    let slow = script(|_| {
        Box::pin(async {
            tokio::time::sleep(Duration::from_millis(400)).await;
            Ok(Reply::json("{}"))
        })
    });
    let edge = Running::start(config, Some(slow)).await;
    assert_eq!(body(&edge.raw("GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n").await), "{}");
}

#[tokio::test]
async fn connections_have_a_limit() {
    let mut config = EdgeConfig::default();
    config.limits.max_connections = 1;
    let edge = Running::start(config, Some(echo())).await;
    let mut first = edge.connect().await;
    first.write_all(b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    read_until(&mut first, "\r\n\r\n").await;
    let mut second = edge.connect().await;
    let mut got = Vec::new();
    // Closed at once: an end, or a reset.
    let _ = within(second.read_to_end(&mut got)).await;
    assert!(got.is_empty());
    edge.metric_becomes("forebay_edge_refused_total{reason=\"max-connections\"}", "1").await;
}
