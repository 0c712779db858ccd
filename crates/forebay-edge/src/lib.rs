//! L1: TLS, HTTP/1.1 and HTTP/2, routes, limits, streaming, drain.
//!
//! ```text
//! accept -> connection limit -> TLS -> HTTP/1.1 (raw heads watched) or HTTP/2 -> guard -> route
//!    -> llm:  whole body -> Flow<Received> -> next stage -> frames as they are made
//!    -> URL:  both bodies streamed to and from an upstream
//! ```
//!
//! **Invariant:** nothing is held back. A frame that is ready is written; there is no buffer to fill first, no
//! compression, and Nagle's algorithm is off.
//!
//! **Invariant:** a client that leaves drops the reply, and with it everything below.
//!
//! What it deliberately does not do: know who is calling (the gateway), read an LLM body (the wire crate, called by
//! the gateway), retry, cache, or serve files. HTTP/3 and the web application firewall are not there yet.

mod access;
mod answer;
mod body;
mod config;
mod connection;
mod cors;
mod guard;
mod head;
mod head_scan;
mod http_metrics;
mod listen;
mod llm;
mod lock;
mod metrics;
mod operator;
mod relay;
mod route;
mod service;
mod stall;
mod tls;
mod transport;
mod unix;

#[cfg(test)]
mod tests;

pub use config::{EdgeConfig, EdgeConfigError, EdgeLimits, ErrorForm, RouteConfig, Switch, TlsConfig};
pub use listen::{BindError, BoundEdge, DrainReport, Edge, EdgeDeps};
pub use llm::LlmStage;
pub use operator::{OPERATOR_PATHS, Operator, OperatorAsk, OperatorFuture, OperatorLoad, operator_method};
pub use service::Health;
pub use tls::TlsError;
pub use unix::{UnixSocketError, check_unix_socket};
