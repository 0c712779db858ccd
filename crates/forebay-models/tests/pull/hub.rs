//! A small hub on loopback, for one repository: `org/repo`.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use forebay_models::{HubConfig, Store};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What the hub does with a large file.
#[derive(Clone, Copy, PartialEq)]
pub enum Behaviour {
    Whole,
    /// Sends this many bytes of the body and breaks the connection.
    BreakAt(usize),
    /// Serves something else than it announces.
    Corrupt,
}

/// The repository as it is now.
pub struct Repo {
    pub behaviour: Behaviour,
    pub commit: Option<String>,
    /// By path. Large ones come by a redirect to storage and have a SHA-256, as with the real hub's LFS.
    pub files: HashMap<String, (Vec<u8>, Large)>,
    /// Whether the listing has sizes and hashes.
    pub tells_sizes: bool,
    /// A file, and a size that the listing has for it instead of its own.
    pub announce: Option<(String, u64)>,
    /// Answered without this one only with 401.
    pub token: Option<String>,
}

pub type Large = bool;

pub struct Hub {
    pub address: SocketAddr,
    pub repo: Arc<Mutex<Repo>>,
    /// Heads of requests, in lower case.
    pub seen: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    pub async fn of<const N: usize>(files: [(&str, Vec<u8>, Large); N]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a loopback port");
        let address = listener.local_addr().expect("bound");
        let files = files.map(|(path, content, large)| (path.to_owned(), (content, large)));
        let repo = Arc::new(Mutex::new(Repo {
            behaviour: Behaviour::Whole,
            commit: Some("c0".repeat(20)),
            files: files.into_iter().collect(),
            tells_sizes: true,
            announce: None,
            token: None,
        }));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let hub = Self { address, repo: repo.clone(), seen: seen.clone() };
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                tokio::spawn(serve(socket, address, repo.clone(), seen.clone()));
            }
        });
        hub
    }

    pub fn change(&self, change: impl FnOnce(&mut Repo)) {
        change(&mut self.repo.lock().expect("not poisoned"));
    }

    pub fn behave(&self, behaviour: Behaviour) {
        self.change(|repo| repo.behaviour = behaviour);
    }

    pub fn content(&self, path: &str) -> Vec<u8> {
        self.repo.lock().expect("not poisoned").files[path].0.clone()
    }

    /// How many requests began so.
    pub fn count(&self, start: &str) -> usize {
        self.seen.lock().expect("not poisoned").iter().filter(|head| head.starts_with(start)).count()
    }

    pub fn store(&self, dir: &tempfile::TempDir) -> Store {
        let endpoint = format!("http://{}", self.address);
        Store::new(dir.path(), HubConfig { endpoint, token: Some("hf_secret".into()) })
            .with_python("/nonexistent/python")
    }
}

async fn serve(
    mut socket: TcpStream,
    address: SocketAddr,
    repo: Arc<Mutex<Repo>>,
    seen: Arc<Mutex<Vec<String>>>,
) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if socket.read(&mut byte).await.unwrap_or(0) == 0 {
            return;
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    seen.lock().expect("not poisoned").push(head.to_ascii_lowercase());
    let answer = repo.lock().expect("not poisoned").answer(address, &head);
    let _ = socket.write_all(&answer).await;
}

impl Repo {
    fn answer(&self, address: SocketAddr, head: &str) -> Vec<u8> {
        let path = head.split_whitespace().nth(1).unwrap_or_default();
        let lower = head.to_ascii_lowercase();
        let may = self.token.as_ref().is_none_or(|token| head.contains(&format!("Bearer {token}")));
        if let Some(name) = path.strip_prefix("/storage/") {
            let (content, _) = &self.files[name];
            return self.storage(&lower, content);
        }
        if !may {
            return answer("401 Unauthorized", "", b"");
        }
        if path == "/api/models/org/repo?blobs=true" {
            return answer("200 OK", "", self.listing().to_string().as_bytes());
        }
        let revision = self.commit.as_deref().unwrap_or("main");
        let file = path.strip_prefix("/org/repo/resolve/").and_then(|rest| rest.split_once('/'));
        let file = file.filter(|(asked, _)| *asked == revision || *asked == "main");
        match file.and_then(|(_, name)| Some((name, self.files.get(name)?))) {
            None => answer("404 Not Found", "", b""),
            Some((_, (content, false))) => answer("200 OK", "etag: \"0123\"\r\n", content),
            Some((name, (content, true))) => {
                let sha = sha256(content);
                let location = format!("location: http://{address}/storage/{name}\r\n");
                answer("302 Found", &format!("x-linked-etag: \"{sha}\"\r\n{location}"), b"")
            }
        }
    }

    fn listing(&self) -> Value {
        let file = |(path, (content, large)): (&String, &(Vec<u8>, Large))| {
            let announced = self.announce.as_ref().filter(|(name, _)| name == path);
            let size = announced.map_or(content.len() as u64, |(_, size)| *size);
            match (self.tells_sizes, large) {
                (false, _) => json!({"rfilename": path}),
                (true, false) => json!({"rfilename": path, "size": size}),
                (true, true) => json!({"rfilename": path, "size": size, "lfs": {"sha256": sha256(content)}}),
            }
        };
        json!({"sha": self.commit, "siblings": self.files.iter().map(file).collect::<Vec<_>>()})
    }

    fn storage(&self, head: &str, content: &[u8]) -> Vec<u8> {
        let start = head.split("range: bytes=").nth(1).and_then(|range| range.split('-').next());
        let start = start.and_then(|start| start.parse::<usize>().ok());
        let size = content.len();
        let mut body = content[start.unwrap_or(0).min(size)..].to_vec();
        let (status, range) = match start {
            None => ("200 OK", String::new()),
            Some(start) if start >= size => {
                ("416 Range Not Satisfiable", format!("content-range: bytes */{size}\r\n"))
            }
            Some(start) => {
                ("206 Partial Content", format!("content-range: bytes {start}-{}/{size}\r\n", size - 1))
            }
        };
        if self.behaviour == Behaviour::Corrupt && !body.is_empty() {
            body[0] ^= 1;
        }
        let mut out = answer(status, &range, &body);
        if let Behaviour::BreakAt(n) = self.behaviour {
            out.truncate(out.len() - body.len() + n.min(body.len()));
        }
        out
    }
}

fn answer(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n{headers}\r\n");
    [head.as_bytes(), body].concat()
}

fn sha256(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}
