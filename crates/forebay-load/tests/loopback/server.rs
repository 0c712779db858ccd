//! A scripted HTTP/1.1 server on loopback: what it does with each request is written down beforehand.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// One thing the server does.
#[derive(Debug, Clone)]
pub enum Step {
    /// A whole answer with its length.
    Answer(u16, String),
    /// The head of an event stream.
    Stream,
    /// One event, as a chunk of the body.
    Event(String),
    /// The end of the body.
    End,
    Wait(Duration),
    /// Closes the connection in the middle.
    Close,
}

/// What the server saw of a request.
#[derive(Debug, Clone)]
pub struct Seen {
    pub path: String,
    /// Lower-case head, without the request line.
    pub head: String,
    pub body: Value,
}

pub struct Server {
    pub url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    pub connections: Arc<AtomicU64>,
}

impl Server {
    /// `script` gets each request and how many generations came before it.
    pub async fn start(script: impl Fn(&Seen, u64) -> Vec<Step> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let (seen, connections) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicU64::new(0)));
        let server = Self { url, seen: seen.clone(), connections: connections.clone() };
        let (script, count) = (Arc::new(script), Arc::new(AtomicU64::new(0)));
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::Relaxed);
                let (script, count, seen) = (script.clone(), count.clone(), seen.clone());
                tokio::spawn(async move {
                    let mut socket = socket;
                    let _ = socket.set_nodelay(true);
                    while let Some(request) = read_request(&mut socket).await {
                        let n = match request.path.ends_with("completions") {
                            true => count.fetch_add(1, Ordering::Relaxed),
                            false => 0,
                        };
                        seen.lock().expect("no panic").push(request.clone());
                        if !play(&mut socket, script(&request, n)).await {
                            break;
                        }
                    }
                });
            }
        });
        server
    }

    pub fn seen(&self, path: &str) -> Vec<Seen> {
        self.seen.lock().expect("no panic").iter().filter(|request| request.path == path).cloned().collect()
    }
}

async fn read_request(socket: &mut TcpStream) -> Option<Seen> {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
            let path = head.split(' ').nth(1)?.to_owned();
            let head = head.to_ascii_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            let length: usize = length.map_or(0, |length| length.parse().expect("a number"));
            while bytes.len() < end + 4 + length {
                if socket.read_buf(&mut bytes).await.ok()? == 0 {
                    return None;
                }
            }
            let body = serde_json::from_slice(&bytes[end + 4..]).unwrap_or(Value::Null);
            return Some(Seen { path, head, body });
        }
        if socket.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
}

/// False where the connection is over.
async fn play(socket: &mut TcpStream, steps: Vec<Step>) -> bool {
    for step in steps {
        let text = match step {
            Step::Answer(status, body) => format!(
                "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            ),
            Step::Stream => {
                "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                    .to_owned()
            }
            Step::Event(data) => {
                let frame = format!("data: {data}\n\n");
                format!("{:x}\r\n{frame}\r\n", frame.len())
            }
            Step::End => "0\r\n\r\n".to_owned(),
            Step::Wait(time) => {
                tokio::time::sleep(time).await;
                continue;
            }
            Step::Close => return false,
        };
        if socket.write_all(text.as_bytes()).await.is_err() {
            return false;
        }
    }
    true
}
