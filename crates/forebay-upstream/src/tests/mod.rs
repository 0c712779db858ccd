//! Against scripted servers on raw loopback sockets, so that each byte and its time are the test's.

// Client and server of a test are one joined future.
#![allow(clippy::large_futures)]

mod client;
mod generate;

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Nothing in these tests takes long; what does, hangs.
const PATIENCE: Duration = Duration::from_secs(20);

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it hangs")
}

/// A server that does what the test says.
struct Below {
    listener: TcpListener,
    addr: SocketAddr,
}

impl Below {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        Self { listener, addr }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr)
    }

    async fn accept(&self) -> TcpStream {
        within(self.listener.accept()).await.unwrap().0
    }
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

async fn write(tcp: &mut TcpStream, text: &str) {
    tcp.write_all(text.as_bytes()).await.unwrap();
}

/// Waits for the other side to close.
async fn closed(tcp: &mut TcpStream) {
    let mut rest = Vec::new();
    // An end or a reset.
    let _ = within(tcp.read_to_end(&mut rest)).await;
    assert!(rest.is_empty(), "{:?}", String::from_utf8_lossy(&rest));
}
