//! ZeroMQ's wire protocol: as much of it as KV events need.
//!
//! ZMTP 3.0 with the NULL mechanism over TCP (ZeroMQ RFC 23), which every libzmq since 4.0 speaks. One [`Reader`] and
//! one [`Writer`] per connection; what a socket type does with its connections (fan out, filter, reconnect) is the
//! caller's, who thereby knows when a connection is lost.
//!
//! What it deliberately does not do: encryption and passwords (CURVE, PLAIN), transports other than TCP, queues.
//!
//! **Invariant:** memory is taken for bytes that have come, never for a length that a peer has announced, and a message
//! over the limit ends the connection. Whoever can reach a bound port must not be able to end the process.

mod connection;
mod dial;
mod endpoint;

pub use connection::{Limits, Message, Reader, SocketType, Writer, ZmtpError, handshake, subscribe};
pub use dial::{DialError, Halves, accept, dial};
pub use endpoint::{Endpoint, ParseEndpointError};

#[cfg(test)]
mod tests;
