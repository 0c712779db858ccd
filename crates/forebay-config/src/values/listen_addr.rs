//! Where to listen: `host:port`.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use super::written_as_text;

/// An address to listen on: an IP address or a host name, and a port. `0.0.0.0:8443`, `[::]:8443`, `localhost:80`.
///
/// Names are not resolved here; pass [`host`](Self::host) and [`port`](Self::port) to the resolver of your runtime.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ListenAddr {
    /// Without the brackets of an IPv6 address.
    host: String,
    port: u16,
}

/// Why a text is not an address to listen on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseListenAddrError {
    #[error("an address can't be empty; write `127.0.0.1:8080`")]
    Empty,
    #[error(
        "the host is missing; write `127.0.0.1:{port}` for this machine only or `0.0.0.0:{port}` for all interfaces"
    )]
    NoHost { port: String },
    #[error("the port is missing; write `{host}:8080`")]
    NoPort { host: String },
    #[error("`{port}` is not a port; ports are numbers from 0 to 65535")]
    BadPort { port: String },
    #[error("an IPv6 address needs brackets; write `[{address}]:8080`")]
    BareIpv6 { address: String },
    #[error("`{host}` is not an IP address")]
    BadIp { host: String },
    #[error("`{host}` is not a host name")]
    BadHost { host: String },
    #[error("an address to listen on has no scheme; write `{rest}`")]
    Scheme { rest: String },
}

impl ListenAddr {
    /// IP address or host name; an IPv6 address without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// 0 asks the system for a free port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The socket address, unless the host is a name that needs a resolver.
    pub fn socket_addr(&self) -> Option<SocketAddr> {
        self.host.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, self.port))
    }

    /// Reachable from this machine only.
    pub fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.socket_addr().is_some_and(|addr| addr.ip().is_loopback())
    }
}

impl From<SocketAddr> for ListenAddr {
    fn from(addr: SocketAddr) -> Self {
        Self { host: addr.ip().to_string(), port: addr.port() }
    }
}

impl FromStr for ListenAddr {
    type Err = ParseListenAddrError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        use ParseListenAddrError as E;
        let text = text.trim();
        if text.is_empty() {
            return Err(E::Empty);
        }
        if let Some((_, rest)) = text.split_once("://") {
            let rest = rest.split('/').next().unwrap_or(rest);
            return Err(E::Scheme { rest: rest.to_owned() });
        }
        if text.parse::<Ipv6Addr>().is_ok() {
            return Err(E::BareIpv6 { address: text.to_owned() });
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, port),
            _ if text.bytes().all(|b| b.is_ascii_digit()) => return Err(E::NoHost { port: text.to_owned() }),
            _ => return Err(E::NoPort { host: text.to_owned() }),
        };
        if host.is_empty() || host == "*" {
            return Err(E::NoHost { port: port.to_owned() });
        }
        if port.is_empty() {
            return Err(E::NoPort { host: host.to_owned() });
        }
        // `u16::from_str` takes a leading `+`; a port has none.
        let port = match port.parse() {
            Ok(number) if !port.starts_with('+') => number,
            _ => return Err(E::BadPort { port: port.to_owned() }),
        };
        if let Some(inner) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            return match inner.parse::<Ipv6Addr>() {
                Ok(ip) => Ok(Self { host: ip.to_string(), port }),
                Err(_) => Err(E::BadIp { host: inner.to_owned() }),
            };
        }
        // Digits and dots only is meant as an IPv4 address; a resolver would look `10.0.0.256` up as a name.
        if host.bytes().all(|b| b.is_ascii_digit() || b == b'.') && host.parse::<IpAddr>().is_err() {
            return Err(E::BadIp { host: host.to_owned() });
        }
        if host.len() > 253
            || !host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
        {
            return Err(E::BadHost { host: host.to_owned() });
        }
        Ok(Self { host: host.to_owned(), port })
    }
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

written_as_text!(
    ListenAddr,
    "ListenAddr",
    "listen-addr",
    "an address to listen on, like `127.0.0.1:8080`",
    "127.0.0.1:8080"
);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(text: &str, expect: Result<&str, &str>) {
        let got = text.parse::<ListenAddr>().map(|a| a.to_string()).map_err(|e| e.to_string());
        assert_eq!(got, expect.map(str::to_owned).map_err(str::to_owned), "{text:?}");
    }

    #[test]
    fn parses_addresses() {
        check("127.0.0.1:8080", Ok("127.0.0.1:8080"));
        check("0.0.0.0:0", Ok("0.0.0.0:0"));
        check("[::]:8443", Ok("[::]:8443"));
        check("[0:0::1]:8443", Ok("[::1]:8443"));
        check("localhost:80", Ok("localhost:80"));
    }

    #[test]
    fn says_what_to_write_instead() {
        check("", Err("an address can't be empty; write `127.0.0.1:8080`"));
        let no_host = "the host is missing; write `127.0.0.1:8080` for this machine only or `0.0.0.0:8080` for all interfaces";
        check("8080", Err(no_host));
        check(":8080", Err(no_host));
        check("*:8080", Err(no_host));
        check("127.0.0.1", Err("the port is missing; write `127.0.0.1:8080`"));
        check("[::1]", Err("the port is missing; write `[::1]:8080`"));
        check("localhost:", Err("the port is missing; write `localhost:8080`"));
        check("localhost:http", Err("`http` is not a port; ports are numbers from 0 to 65535"));
        check("localhost:+80", Err("`+80` is not a port; ports are numbers from 0 to 65535"));
        check("localhost:65536", Err("`65536` is not a port; ports are numbers from 0 to 65535"));
        check("::1", Err("an IPv6 address needs brackets; write `[::1]:8080`"));
        check("10.0.0.256:80", Err("`10.0.0.256` is not an IP address"));
        check("[zz]:80", Err("`zz` is not an IP address"));
        check("a b:80", Err("`a b` is not a host name"));
        check("http://localhost:80/x", Err("an address to listen on has no scheme; write `localhost:80`"));
    }

    #[test]
    fn knows_loopback() {
        let loopback = |text: &str| text.parse::<ListenAddr>().unwrap().is_loopback();
        assert!(loopback("127.0.0.1:1") && loopback("[::1]:1") && loopback("localhost:1"));
        assert!(!loopback("0.0.0.0:1") && !loopback("example.org:1"));
    }

    proptest! {
        #[test]
        fn prints_what_it_parses(addr in any::<SocketAddr>()) {
            // A scope id has no place in the text form.
            let addr = ListenAddr::from(SocketAddr::new(addr.ip(), addr.port()));
            prop_assert_eq!(addr.to_string().parse(), Ok(addr));
        }

        #[test]
        fn never_panics(text in "[0-9a-z.:\\[\\]*/+]{0,20}|.{0,20}") {
            let _ = text.parse::<ListenAddr>();
        }
    }
}
