//! HTTP/2, in cleartext with prior knowledge and over TLS.

use super::*;
use crate::{BindError, TlsConfig, TlsError};
use forebay_config::Secret;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};

pub(super) type Client = SendRequest<Full<Bytes>>;

pub(super) async fn http2(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Client {
    let (client, connection) =
        within(hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(io))).await.unwrap();
    tokio::spawn(connection);
    client
}

async fn ask(client: &mut Client, uri: &str, body: &str) -> (StatusCode, String) {
    let request = Request::post(uri).body(Full::from(body.to_owned())).unwrap();
    let response = within(client.send_request(request)).await.unwrap();
    let status = response.status();
    let body = within(response.into_body().collect()).await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test]
async fn http2_with_prior_knowledge() {
    let edge = Running::start(EdgeConfig::default(), Some(echo())).await;
    let mut client = http2(edge.connect().await).await;
    let (status, body) = ask(&mut client, "http://a/v1/x", "hi").await;
    assert_eq!((status, body.as_str()), (StatusCode::OK, r#"{"method":"POST","path":"/v1/x","body":"hi"}"#));
    let (status, _) = ask(&mut client, "http://a/v1/%2e%2e/x", "").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    // One bad request does not cost the others their connection.
    assert_eq!(ask(&mut client, "http://a/v1/x", "").await.0, StatusCode::OK);
}

#[tokio::test]
async fn http2_limits() {
    let edge = Running::start(small_limits(), Some(echo())).await;
    let mut client = http2(edge.connect().await).await;
    let (status, body) = ask(&mut client, "http://a/v1/x", &"x".repeat(1001)).await;
    assert_eq!((status, body.contains("max-body")), (StatusCode::PAYLOAD_TOO_LARGE, true), "{body}");
    for (headers, limit) in [(101, "max-headers"), (1, "max-header-bytes")] {
        let value = if headers == 1 { "y".repeat(9000) } else { "y".to_owned() };
        let mut request = Request::get("http://a/v1/x").body(Full::default()).unwrap();
        for _ in 0..headers {
            request.headers_mut().append("x", value.parse().unwrap());
        }
        let response = within(client.send_request(request)).await.unwrap();
        assert_eq!(response.status(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
        assert!(response.headers().contains_key("x-request-id"));
        let body = within(response.into_body().collect()).await.unwrap().to_bytes();
        assert!(String::from_utf8_lossy(&body).contains(limit), "{body:?}");
    }
    // Told with a GOAWAY and closed when idle.
    within(async {
        while !client.is_closed() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    edge.metric_becomes("forebay_edge_connections", "0").await;
}

#[tokio::test]
async fn http2_streams_are_cancelled_and_drained_one_by_one() {
    let (stage, mut feeds) = streaming();
    let mut edge = Running::start(EdgeConfig::default(), Some(stage)).await;
    let mut client = http2(edge.connect().await).await;
    let request = || Request::post("http://a/v1/x").body(Full::from("{}")).unwrap();
    let (left, kept) = (client.send_request(request()), client.send_request(request()));
    let (left, mut kept) = (within(left).await.unwrap(), within(kept).await.unwrap());
    let (left_feed, kept_feed) = (within(feeds.recv()).await.unwrap(), within(feeds.recv()).await.unwrap());
    // RST_STREAM cancels one request, not its neighbour.
    drop(left);
    within(left_feed.closed()).await;
    assert!(!kept_feed.is_closed());
    edge.shut_down();
    within(async { while TcpStream::connect(edge.addr).await.is_ok() {} }).await;
    kept_feed.send(verbatim("data: 1\n\n")).await.unwrap();
    let frame = within(kept.body_mut().frame()).await.unwrap().unwrap();
    assert_eq!(frame.into_data().unwrap(), "data: 1\n\n");
    drop(kept_feed);
    let rest = within(kept.into_body().collect()).await.expect("ended, not reset");
    assert!(rest.to_bytes().is_empty());
    assert_eq!(edge.drained().await.cut, 0);
}

pub(super) struct Certified {
    pub(super) env: FixedEnvironment,
    pub(super) config: EdgeConfig,
    pub(super) cert: CertificateDer<'static>,
}

pub(super) fn certified() -> Certified {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let env = FixedEnvironment::new()
        .with_file("/server.pem", made.cert.pem())
        .with_file("/server.key", made.signing_key.serialize_pem());
    let tls = TlsConfig { cert: "/server.pem".into(), key: Secret::file("/server.key") };
    Certified { env, config: EdgeConfig { tls: Some(tls), ..small_limits() }, cert: made.cert.der().clone() }
}

pub(super) async fn tls(
    edge: &Running,
    cert: &CertificateDer<'static>,
    alpn: &[u8],
) -> tokio_rustls::client::TlsStream<TcpStream> {
    tls_over(edge.connect().await, cert, alpn).await
}

pub(super) async fn tls_over<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    cert: &CertificateDer<'static>,
    alpn: &[u8],
) -> tokio_rustls::client::TlsStream<S> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(cert.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let name = ServerName::try_from("localhost").unwrap();
    within(connector.connect(name, stream)).await.unwrap()
}

#[tokio::test]
async fn tls_with_both_protocols() {
    let Certified { env, config, cert } = certified();
    let edge = Running::start_in(config, Some(echo()), &env).await;
    let stream = tls(&edge, &cert, b"h2").await;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(b"h2".as_slice()));
    let mut client = http2(stream).await;
    assert_eq!(ask(&mut client, "https://localhost/v1/x", "hi").await.0, StatusCode::OK);

    let mut stream = tls(&edge, &cert, b"http/1.1").await;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(b"http/1.1".as_slice()));
    stream.write_all(post("/v1/x", "hi").as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    within(stream.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(status(std::str::from_utf8(&answer).unwrap()), 200);
}

#[tokio::test]
async fn handshakes_that_stall_or_fail_are_ended() {
    let Certified { env, config, .. } = certified();
    let edge = Running::start_in(config, Some(echo()), &env).await;
    assert_eq!(edge.raw("").await, "");
    edge.metric_becomes("forebay_edge_refused_total{reason=\"header-timeout\"}", "1").await;
    let mut tcp = edge.connect().await;
    tcp.write_all(get("/v1/models").as_bytes()).await.unwrap();
    let mut got = Vec::new();
    let _ = within(tcp.read_to_end(&mut got)).await;
    edge.metric_becomes("forebay_edge_refused_total{reason=\"tls-handshake\"}", "1").await;
}

#[tokio::test]
async fn bad_certificates_are_explained() {
    let Certified { env, config, .. } = certified();
    let bind = async |env: &FixedEnvironment| {
        let deps = EdgeDeps {
            llm: Some(echo()),
            operator: None,
            client: HttpClient::default(),
            registry: Registry::new(),
            recent: RecentRequests::new(1),
            version: String::new(),
            health: Arc::new(Health::ready),
        };
        match Edge::bind(&config, env, deps).await {
            Err(BindError::Tls(error)) => error,
            other => panic!("{other:?}"),
        }
    };
    assert!(matches!(bind(&FixedEnvironment::new()).await, TlsError::CertUnreadable { .. }));
    let no_cert = env.clone().with_file("/server.pem", "nothing");
    assert!(matches!(bind(&no_cert).await, TlsError::NoCert { .. }));
    let bad_key = env.clone().with_file("/server.key", "nothing");
    assert!(matches!(bind(&bad_key).await, TlsError::BadKey { .. }));
    let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let mismatch = env.clone().with_file("/server.key", other.signing_key.serialize_pem());
    let error = bind(&mismatch).await;
    assert!(matches!(error, TlsError::Mismatch { .. }));
    assert_eq!(
        error.to_string(),
        "the private key `file:/server.key` does not belong to the first certificate in `/server.pem`; correct \
         `edge.tls.key` or `edge.tls.cert`"
    );
}

#[test]
fn certificates_are_checked_without_a_start() {
    let Certified { env, config, .. } = certified();
    let tls = config.tls.expect("it has one");
    let check = |env: &FixedEnvironment, expect: &[(&str, &str)]| {
        let found = tls.problems(env);
        assert_eq!(found.len(), expect.len(), "{found:?}");
        for (found, (key, says)) in found.iter().zip(expect) {
            assert_eq!(found.key, *key, "{found}");
            assert!(found.problem.contains(says), "{found}");
        }
    };
    check(&env, &[]);
    let unread = [("tls.cert", "`/server.pem` can't be read"), ("tls.key", "`/server.key` does not exist")];
    check(&FixedEnvironment::new(), &unread);
    let nonsense = env.clone().with_file("/server.pem", "x").with_file("/server.key", "x");
    check(&nonsense, &[("tls.cert", "holds no PEM certificate"), ("tls.key", "`file:/server.key` of")]);
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    check(
        &env.clone().with_file("/server.pem", broken),
        &[("tls.cert", "first certificate in `/server.pem`")],
    );
    let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let mismatch = env.clone().with_file("/server.key", other.signing_key.serialize_pem());
    check(&mismatch, &[("tls.key", "`file:/server.key` does not belong to the first certificate")]);
}
