//! The edge over real loopback sockets, with a scripted stack below.

mod http1;
mod llm_route;
mod operators;
mod protocols;
mod slow_readers;
mod streams;
mod unix_socket;
mod upstream_route;

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use forebay_config::{ByteSize, FixedEnvironment, HumanDuration, OneOrMany};
use forebay_flow::{Flow, Received, Reply, ReplyForm, Stage};
use forebay_observe::{RecentRequests, Registry};
use forebay_types::Fault;
use forebay_upstream::{ClientConfig, HttpClient};
use forebay_wire::Chunk;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::{DrainReport, Edge, EdgeConfig, EdgeDeps, Health, LlmStage, Operator};

/// Nothing in these tests takes long; what does, hangs.
const PATIENCE: Duration = Duration::from_secs(20);

type Answer = Pin<Box<dyn Future<Output = Result<Reply, Fault>> + Send>>;

/// A stage that does what the test says.
struct Script<F>(F);

impl<F: Fn(Flow<Received>) -> Answer + Send + Sync + 'static> Stage<Received> for Script<F> {
    fn call(&self, flow: Flow<Received>) -> impl Future<Output = Result<Reply, Fault>> + Send {
        (self.0)(flow)
    }
}

fn script(answer: impl Fn(Flow<Received>) -> Answer + Send + Sync + 'static) -> LlmStage {
    LlmStage::new(Arc::new(Script(answer)))
}

/// Answers with what came in: method, path, and body.
fn echo() -> LlmStage {
    script(|flow| {
        Box::pin(async move {
            let got = flow.stage;
            let body = String::from_utf8_lossy(&got.body).into_owned();
            let json = serde_json::json!({ "method": got.method.as_str(), "path": got.path, "body": body });
            Ok(Reply::json(json.to_string()))
        })
    })
}

/// A running edge.
struct Running {
    addr: SocketAddr,
    registry: Registry,
    recent: RecentRequests,
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<DrainReport>,
}

impl Running {
    async fn start(config: EdgeConfig, llm: Option<LlmStage>) -> Self {
        Self::start_in(config, llm, &FixedEnvironment::new()).await
    }

    async fn start_in(config: EdgeConfig, llm: Option<LlmStage>, env: &FixedEnvironment) -> Self {
        Self::start_with(config, llm, None, env).await
    }

    async fn start_with(
        mut config: EdgeConfig,
        llm: Option<LlmStage>,
        operator: Option<Arc<dyn Operator>>,
        env: &FixedEnvironment,
    ) -> Self {
        config.listen = OneOrMany::one(SocketAddr::from(([127, 0, 0, 1], 0)).into());
        let (registry, recent) = (Registry::new(), RecentRequests::new(16));
        let deps = EdgeDeps {
            llm,
            operator,
            client: HttpClient::new(ClientConfig::default()),
            registry: registry.clone(),
            recent: recent.clone(),
            version: "1.2.3".into(),
            health: Arc::new(Health::ready),
        };
        let edge = Edge::bind(&config, env, deps).await.expect("the test's configuration is good");
        let addr = edge.local_addrs()[0];
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(edge.run(async move {
            let _ = stopped.await;
        }));
        Self { addr, registry, recent, stop: Some(stop), served }
    }

    fn shut_down(&mut self) {
        let _ = self.stop.take().expect("shut down once").send(());
    }

    async fn drained(mut self) -> DrainReport {
        if self.stop.is_some() {
            self.shut_down();
        }
        within(self.served).await.unwrap()
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.addr).await.unwrap()
    }

    /// Sends bytes and reads until the edge closes.
    async fn raw(&self, bytes: impl AsRef<[u8]>) -> String {
        let mut tcp = self.connect().await;
        tcp.write_all(bytes.as_ref()).await.unwrap();
        read_to_end(&mut tcp).await
    }

    /// A metric's line, by its beginning.
    fn metric(&self, name: &str) -> Option<String> {
        let text = self.registry.render();
        text.lines().find_map(|line| line.strip_prefix(name)).map(|rest| rest.trim().to_owned())
    }

    /// Waits until a metric has a value.
    async fn metric_becomes(&self, name: &str, value: &str) {
        within(async {
            while self.metric(name).as_deref() != Some(value) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it hangs")
}

async fn read_to_end(tcp: &mut TcpStream) -> String {
    let mut got = Vec::new();
    within(tcp.read_to_end(&mut got)).await.unwrap();
    String::from_utf8(got).unwrap()
}

/// Reads until `end` was seen.
async fn read_until(tcp: &mut TcpStream, end: &str) -> String {
    let mut got = String::new();
    within(async {
        while !got.contains(end) {
            let mut piece = [0; 4096];
            let length = tcp.read(&mut piece).await.unwrap();
            assert!(length > 0, "closed after {got:?}");
            got.push_str(std::str::from_utf8(&piece[..length]).unwrap());
        }
    })
    .await;
    got
}

fn status(answer: &str) -> u16 {
    answer.get(9..12).and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("{answer:?}"))
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").unwrap().1
}

fn header<'a>(answer: &'a str, name: &str) -> Option<&'a str> {
    let head = answer.split_once("\r\n\r\n").unwrap().0;
    head.lines().skip(1).filter_map(|line| line.split_once(": ")).find(|(n, _)| *n == name).map(|(_, v)| v)
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
}

fn post(path: &str, body: &str) -> String {
    let length = body.len();
    format!("POST {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}")
}

fn verbatim(bytes: &'static str) -> Result<Chunk, Fault> {
    Ok(Chunk::Verbatim { bytes: Bytes::from_static(bytes.as_bytes()), usage: None, deltas: 1 })
}

/// Feeds the stream of the next request.
type Feed = mpsc::Sender<Result<Chunk, Fault>>;

/// A stage that answers every request with a stream, and hands its other end to the test.
fn streaming() -> (LlmStage, mpsc::Receiver<Feed>) {
    let (feeds, fed) = mpsc::channel(8);
    let stage = script(move |_flow| {
        let feeds = feeds.clone();
        Box::pin(async move {
            let (feed, chunks) = mpsc::channel(16);
            feeds.send(feed).await.expect("the test listens");
            let chunks = futures_util::stream::unfold(chunks, |mut chunks| async move {
                chunks.recv().await.map(|chunk| (chunk, chunks))
            });
            Ok(Reply::new(ReplyForm::Sse, Box::pin(chunks)))
        })
    });
    (stage, fed)
}

fn small_limits() -> EdgeConfig {
    let mut config = EdgeConfig::default();
    config.limits.max_body = ByteSize::new(1000);
    config.limits.max_header_bytes = ByteSize::kib(8);
    config.limits.header_timeout = HumanDuration::from_millis(200);
    config.limits.body_timeout = HumanDuration::from_millis(200);
    config.limits.idle_timeout = HumanDuration::from_millis(300);
    config
}
