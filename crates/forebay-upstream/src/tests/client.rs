//! The pool, and every way for an exchange to fail.

use bytes::Bytes;
use forebay_types::{Classify, Retry};
use http::Request;
use http_body_util::BodyExt;

use super::*;
use crate::client::full;
use crate::{ClientConfig, HttpClient, RequestBody, Roots, UpstreamError};

fn get(url: &str) -> Request<RequestBody> {
    Request::get(url).body(full(Bytes::new())).unwrap()
}

async fn exchange(client: &HttpClient, url: &str) -> Result<Bytes, UpstreamError> {
    within(client.exchange(get(url), 100, Duration::from_millis(300))).await.map(|answer| answer.body)
}

/// Answers one request on a connection.
async fn answer(tcp: &mut TcpStream, answer: &str) -> String {
    let got = read_until(tcp, "\r\n\r\n").await;
    write(tcp, answer).await;
    got
}

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

#[tokio::test]
async fn a_connection_is_used_again() {
    let below = Below::start().await;
    let client = HttpClient::default();
    let url = below.url("/a?b=c");
    let (got, mut tcp) = tokio::join!(exchange(&client, &url), async {
        let mut tcp = below.accept().await;
        let got = answer(&mut tcp, OK).await;
        assert_eq!(got, format!("GET /a?b=c HTTP/1.1\r\nhost: {}\r\n\r\n", below.addr));
        tcp
    });
    assert_eq!(got.unwrap(), "ok");
    for _ in 0..3 {
        // Nobody accepts: only the old connection can answer.
        let (got, _) = tokio::join!(exchange(&client, &url), answer(&mut tcp, OK));
        assert_eq!(got.unwrap(), "ok");
    }
}

#[tokio::test]
async fn idle_connections_are_closed_without_being_asked() {
    let below = Below::start().await;
    let config = ClientConfig { idle_timeout: Duration::from_millis(30), ..ClientConfig::default() };
    let client = HttpClient::new(config);
    let url = below.url("/");
    let (got, mut tcp) = tokio::join!(exchange(&client, &url), async {
        let mut tcp = below.accept().await;
        answer(&mut tcp, OK).await;
        tcp
    });
    assert_eq!(got.unwrap(), "ok");
    closed(&mut tcp).await;
}

#[tokio::test]
async fn dropping_the_client_closes_idle_connections() {
    let below = Below::start().await;
    let client = HttpClient::default();
    let url = below.url("/");
    let (got, mut tcp) = tokio::join!(exchange(&client, &url), async {
        let mut tcp = below.accept().await;
        answer(&mut tcp, OK).await;
        tcp
    });
    assert_eq!(got.unwrap(), "ok");
    drop(client);
    closed(&mut tcp).await;
}

#[tokio::test]
async fn a_connection_the_server_closed_is_not_used_again() {
    let below = Below::start().await;
    let client = HttpClient::default();
    let url = below.url("/");
    for _ in 0..3 {
        let (got, ()) = tokio::join!(exchange(&client, &url), async {
            let mut tcp = below.accept().await;
            answer(&mut tcp, OK).await;
        });
        assert_eq!(got.unwrap(), "ok");
        // The end of the connection arrives.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn dropping_an_answer_closes_its_connection() {
    let below = Below::start().await;
    let client = HttpClient::default();
    // Before the head.
    let request = tokio::spawn({
        let (client, url) = (client.clone(), below.url("/"));
        async move { client.send(get(&url)).await.map(drop) }
    });
    let mut tcp = below.accept().await;
    read_until(&mut tcp, "\r\n\r\n").await;
    request.abort();
    closed(&mut tcp).await;
    // In the middle of the body.
    let url = below.url("/");
    let (response, mut tcp) = tokio::join!(client.send(get(&url)), async {
        let mut tcp = below.accept().await;
        answer(&mut tcp, "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf").await;
        tcp
    });
    let mut body = response.unwrap().into_body();
    assert_eq!(within(body.frame()).await.unwrap().unwrap().into_data().unwrap(), "half");
    drop(body);
    closed(&mut tcp).await;
}

#[tokio::test]
async fn failures_say_whether_anything_was_sent() {
    let below = Below::start().await;
    let client = HttpClient::default();
    let url = below.url("/");
    let failing = async |text: &'static str| {
        let (got, ()) = tokio::join!(exchange(&client, &url), async {
            let mut tcp = below.accept().await;
            answer(&mut tcp, text).await;
        });
        got.unwrap_err()
    };
    let nonsense = failing("SMTP ready\r\n\r\n").await;
    assert!(matches!(nonsense, UpstreamError::Protocol { .. }), "{nonsense:?}");
    let reset = failing("").await;
    assert!(matches!(reset, UpstreamError::Reset { unsent: false, .. }), "{reset:?}");
    let cut = failing("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nx").await;
    assert!(matches!(cut, UpstreamError::Reset { unsent: false, .. }), "{cut:?}");
    let late = {
        let (got, _tcp) = tokio::join!(exchange(&client, &url), below.accept());
        got.unwrap_err()
    };
    assert!(matches!(late, UpstreamError::FirstByteTimeout { .. }), "{late:?}");
    assert_eq!(late.class().retry, Retry::Never);
    drop(below);
    let refused = exchange(&client, &url).await.unwrap_err();
    assert!(matches!(refused, UpstreamError::Connect { .. }), "{refused:?}");
    assert!(refused.is_unsent());
    assert_eq!(refused.class().retry, Retry::Elsewhere);
    assert_eq!(refused.to_string(), "the upstream can't be reached");
    assert!(refused.detail().contains("127.0.0.1"), "{}", refused.detail());
    for url in ["ftp://a/", "/a", "http://u@a/"] {
        let error = exchange(&client, url).await.unwrap_err();
        assert!(matches!(error, UpstreamError::Url { .. }), "{url}: {error:?}");
    }
}

#[tokio::test]
async fn answers_have_a_limit() {
    let below = Below::start().await;
    let client = HttpClient::default();
    let url = below.url("/");
    let (got, ()) = tokio::join!(exchange(&client, &url), async {
        let mut tcp = below.accept().await;
        let body = "x".repeat(101);
        answer(&mut tcp, &format!("HTTP/1.1 200 OK\r\ncontent-length: 101\r\n\r\n{body}")).await;
    });
    let error = got.unwrap_err();
    assert!(matches!(error, UpstreamError::AnswerTooLarge { limit: 100, .. }), "{error:?}");
}

#[tokio::test]
async fn requests_in_flight_have_a_limit() {
    let below = Below::start().await;
    let config = ClientConfig {
        connections_per_host_max: 1,
        connect_timeout: Duration::from_millis(50),
        ..ClientConfig::default()
    };
    let client = HttpClient::new(config);
    let url = below.url("/");
    let (first, mut tcp) = tokio::join!(client.send(get(&url)), async {
        let mut tcp = below.accept().await;
        answer(&mut tcp, "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n").await;
        tcp
    });
    let busy = exchange(&client, &url).await.unwrap_err();
    assert!(matches!(busy, UpstreamError::Busy { limit: 1, .. }), "{busy:?}");
    // The place is free again when the answer has ended.
    write(&mut tcp, "ok").await;
    first.unwrap().into_body().collect().await.unwrap();
    let (got, _) = tokio::join!(exchange(&client, &url), answer(&mut tcp, OK));
    assert_eq!(got.unwrap(), "ok");
}

#[tokio::test]
async fn a_body_that_fails_is_not_the_upstreams_fault() {
    let below = Below::start().await;
    let client = HttpClient::default();
    let pieces = futures_util::stream::iter([
        Ok(http_body::Frame::data(Bytes::from_static(b"half"))),
        Err("the producer left".into()),
    ]);
    let body = http_body_util::StreamBody::new(pieces).boxed_unsync();
    let request = Request::post(below.url("/")).body(body).unwrap();
    let (got, _tcp) = tokio::join!(within(client.send(request)), below.accept());
    let error = got.unwrap_err();
    assert!(matches!(error, UpstreamError::RequestBody { .. }), "{error:?}");
}

#[tokio::test]
async fn tls_is_checked() {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let server = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(server));
    let below = Below::start().await;
    let serve_one = async || {
        let Ok(mut tls) = acceptor.accept(below.accept().await).await else { return };
        let mut head = [0; 1024];
        let _ = tls.read(&mut head).await;
        let _ = tls.write_all(OK.as_bytes()).await;
        let _ = tls.flush().await;
        let _ = tls.read(&mut head).await;
    };
    let trusting = |pem: String| {
        let roots = Roots::Pem(pem.into_bytes());
        HttpClient::new(ClientConfig { roots, ..ClientConfig::default() })
    };
    let url = |host: &str| format!("https://{host}:{}/", below.addr.port());
    let ask = async |client: HttpClient, url: String| {
        let asked = async {
            let got = exchange(&client, &url).await;
            // Closes the pooled connection, which ends the server's turn.
            drop(client);
            got
        };
        within(async { tokio::join!(asked, serve_one()) }).await.0
    };
    assert_eq!(ask(trusting(made.cert.pem()), url("localhost")).await.unwrap(), "ok");
    let wrong_name = ask(trusting(made.cert.pem()), url("127.0.0.1")).await.unwrap_err();
    assert!(matches!(wrong_name, UpstreamError::Tls { .. }), "{wrong_name:?}");
    let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let untrusted = ask(trusting(other.cert.pem()), url("localhost")).await.unwrap_err();
    assert!(matches!(untrusted, UpstreamError::Tls { .. }) && untrusted.is_unsent(), "{untrusted:?}");
}

#[tokio::test]
async fn a_stalled_handshake_costs_one_request() {
    let below = Below::start().await;
    let url = format!("https://localhost:{}/", below.addr.port());
    let cert = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap().cert;
    let client = HttpClient::new(ClientConfig {
        roots: Roots::Pem(cert.pem().into_bytes()),
        connect_timeout: Duration::from_millis(50),
        ..ClientConfig::default()
    });
    let (got, _silent) = tokio::join!(exchange(&client, &url), below.accept());
    let error = got.unwrap_err();
    assert!(matches!(error, UpstreamError::ConnectTimeout { .. }), "{error:?}");
    assert!(error.is_unsent());
}
