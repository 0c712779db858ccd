//! Where a socket listens or connects to.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A ZeroMQ endpoint over TCP: `tcp://HOST:PORT`, where `*` is all addresses of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Endpoint {
    /// `*`, a name or an address, IPv6 without its brackets.
    host: String,
    port: u16,
}

/// Why a text is no endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseEndpointError {
    #[error("an endpoint looks like `tcp://127.0.0.1:5557`, or `tcp://*:5557` to listen on all addresses")]
    Shape,
    #[error("only tcp:// endpoints are supported")]
    Transport,
    #[error("the endpoint's port is not a number from 0 to 65535")]
    Port,
}

impl Endpoint {
    /// A port at a host: a name, an IPv4 address, or an IPv6 address with or without brackets.
    pub fn new(host: &str, port: u16) -> Self {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        Self { host: bare.to_owned(), port }
    }

    /// Another port at the same host.
    pub fn with_port(&self, port: u16) -> Self {
        Self { host: self.host.clone(), port }
    }

    /// Whether a publisher listens here rather than connects: vLLM's rule, a `*` or a `::` in it.
    pub fn is_to_bind(&self) -> bool {
        self.host == "*" || self.host.contains("::")
    }

    /// For listening.
    pub fn bind_address(&self) -> (&str, u16) {
        (if self.host == "*" { "0.0.0.0" } else { &self.host }, self.port)
    }

    /// For connecting.
    pub fn address(&self) -> (&str, u16) {
        (&self.host, self.port)
    }
}

impl FromStr for Endpoint {
    type Err = ParseEndpointError;

    fn from_str(text: &str) -> Result<Self, ParseEndpointError> {
        let (transport, address) = text.split_once("://").ok_or(ParseEndpointError::Shape)?;
        if transport != "tcp" {
            return Err(ParseEndpointError::Transport);
        }
        let (host, port) = address.rsplit_once(':').ok_or(ParseEndpointError::Shape)?;
        let port = port.parse().map_err(|_| ParseEndpointError::Port)?;
        let host = Self::new(host, port);
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '*' | '%');
        if host.host.is_empty() || !host.host.chars().all(plain) {
            return Err(ParseEndpointError::Shape);
        }
        Ok(host)
    }
}

impl TryFrom<String> for Endpoint {
    type Error = ParseEndpointError;

    fn try_from(text: String) -> Result<Self, ParseEndpointError> {
        text.parse()
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> Self {
        endpoint.to_string()
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "tcp://[{}]:{}", self.host, self.port),
            false => write!(f, "tcp://{}:{}", self.host, self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        let check = |text: &str, binds: bool, address: (&str, u16), shown: &str| {
            let endpoint: Endpoint = text.parse().expect(text);
            assert_eq!((endpoint.is_to_bind(), endpoint.bind_address()), (binds, address), "{text}");
            assert_eq!(endpoint.to_string(), shown);
            assert_eq!(shown.parse(), Ok(endpoint));
        };
        check("tcp://*:5557", true, ("0.0.0.0", 5557), "tcp://*:5557");
        check("tcp://127.0.0.1:5557", false, ("127.0.0.1", 5557), "tcp://127.0.0.1:5557");
        check("tcp://[::]:1", true, ("::", 1), "tcp://[::]:1");
        check("tcp://:::1", true, ("::", 1), "tcp://[::]:1");
        check("tcp://epp.llm-d:5557", false, ("epp.llm-d", 5557), "tcp://epp.llm-d:5557");

        let check = |text: &str, expect: ParseEndpointError| {
            assert_eq!(text.parse::<Endpoint>(), Err(expect), "{text}");
        };
        check("*:5557", ParseEndpointError::Shape);
        check("tcp://5557", ParseEndpointError::Shape);
        check("tcp://:5557", ParseEndpointError::Shape);
        check("tcp://a b:5557", ParseEndpointError::Shape);
        check("tcp://me:secret@host:1", ParseEndpointError::Shape);
        check("tcp://*:70000", ParseEndpointError::Port);
        check("ipc:///tmp/kv", ParseEndpointError::Transport);
    }
}
