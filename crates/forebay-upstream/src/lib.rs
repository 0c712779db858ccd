//! HTTP client side: pooled connections to upstreams, and LLM replies read frame by frame as they come.
//!
//! [`HttpClient`] knows HTTP and nothing of LLMs: it dials, pools and says what failed. [`Upstream`] is one server
//! with an OpenAI-shaped API: it posts a call and turns the answer into a [`forebay_flow::Reply`].
//!
//! What it deliberately does not do: retry (the router and the proxy know where else to go, this crate only says
//! whether that is safe), choose among addresses, or follow redirects. Connections are HTTP/1.1, one request at a
//! time each: dropping a reply closes its connection, which every server understands as "stop computing", and no
//! stream waits behind another.

mod client;
mod error;
mod fault;
mod pool;
mod reply;
mod tls;
mod upstream;

#[cfg(test)]
mod tests;

pub use client::{ClientConfig, Collected, HttpClient, Roots, full};
pub use error::UpstreamError;
pub use fault::{FaultKind, UpstreamFault};
pub use pool::{RequestBody, ResponseBody};
pub use upstream::{BaseUrlError, CallInfo, StreamUsage, Timeouts, Upstream};
