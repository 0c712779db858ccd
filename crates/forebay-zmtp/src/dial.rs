//! TCP connections, made and taken.

use std::io;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use crate::connection::{Limits, Reader, SocketType, Writer, ZmtpError, handshake};
use crate::endpoint::Endpoint;

/// For name look-up, connecting and the handshake together: all of it is small and near.
const TIME_MAX: Duration = Duration::from_secs(5);
/// A peer whose machine has gone sends no end; after about this long it is taken for gone.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;

/// Both ends of a connection.
pub type Halves = (Reader<OwnedReadHalf>, Writer<OwnedWriteHalf>);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("the connection can't be made")]
    Connect(#[source] io::Error),
    #[error("no answer within {} s", TIME_MAX.as_secs())]
    Timeout,
    #[error(transparent)]
    Zmtp(#[from] ZmtpError),
}

/// Connects to an endpoint. Cancellation: the connection is closed.
pub async fn dial(endpoint: &Endpoint, socket: SocketType, limits: Limits) -> Result<Halves, DialError> {
    let connect = async {
        let stream = TcpStream::connect(endpoint.address()).await.map_err(DialError::Connect)?;
        Ok(shake(stream, socket, limits).await?)
    };
    tokio::time::timeout(TIME_MAX, connect).await.map_err(|_| DialError::Timeout)?
}

/// Shakes hands on a connection that a listener has taken. Cancellation: the connection is closed.
pub async fn accept(stream: TcpStream, socket: SocketType, limits: Limits) -> Result<Halves, DialError> {
    tokio::time::timeout(TIME_MAX, async { Ok(shake(stream, socket, limits).await?) })
        .await
        .map_err(|_| DialError::Timeout)?
}

async fn shake(stream: TcpStream, socket: SocketType, limits: Limits) -> Result<Halves, ZmtpError> {
    stream.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL);
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    let keepalive = keepalive.with_retries(KEEPALIVE_PROBES);
    SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
    let (read, write) = stream.into_split();
    handshake(read, write, socket, limits).await
}
