//! The `edge` section of `forebay.yaml`.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use forebay_config::{ByteSize, HumanDuration, ListenAddr, OneOrMany, Secret};
use forebay_wire::Dialect;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::unix::PATH_BYTES_MAX;

/// L1: the one front door of the platform.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct EdgeConfig {
    /// Address to listen on, or a list of them, `host:port`; use `0.0.0.0:8080` to be reached from other machines.
    pub listen: OneOrMany<ListenAddr>,
    /// Unix socket to listen on beside `listen`, which may then be `[]`; a socket that a killed server left is replaced, and the file is removed at the end.
    pub uds: Option<PathBuf>,
    /// Certificate and key; without them the edge speaks cleartext HTTP/1.1 and HTTP/2.
    pub tls: Option<TlsConfig>,
    /// Which path goes where, longest path first; without any, everything goes to the LLM route.
    pub routes: Vec<RouteConfig>,
    /// What one client may take up.
    pub limits: EdgeLimits,
    /// How long `/health` and `/ready` say 503 after a stop was asked for while requests are still served; under Kubernetes `5s` to `15s`, so that the pod is taken out of its endpoints before the port closes.
    pub drain_delay: HumanDuration,
    /// How long open requests may go on after the port was closed for a stop; longer than your longest generation.
    pub drain_timeout: HumanDuration,
    /// Whether each request is logged as one line of the target `forebay::access`: `on` or `off`.
    pub access_log: Switch,
    /// Whether `/metrics` is answered on LLM routes too, where vLLM has it, `on` or `off`; for a worker whose port only a router and a scraper reach.
    pub metrics: Switch,
    /// Whether what vLLM has for operators and routers is answered on LLM routes too, `on` or `off`: `/load`, `/kv_event_sources`, `/abort_requests`, `/pause`, `/resume`, `/is_paused`, and the header `endpoint-load-metrics`; without a `gateway`, `x-gateway-inference-fairness-id` says whose turn a request takes. For a worker whose port only a router reaches; the admin listener always has the paths.
    pub operator_api: Switch,
    /// Keys of which a client must show one as a bearer token for LLM paths below `/v1`, `/v2` and `/inference`, as `env:NAME` or `file:PATH` (vLLM's `--api-key`); for consumers with quotas use `gateway`.
    pub access_keys: Vec<Secret>,
    /// Origins whose pages may call LLM routes from a browser, like `https://app.example.org`, or `*` for all (vLLM's `--allowed-origins`); without any, no CORS headers are sent.
    pub cors_origins: Vec<String>,
    /// Pause of an event stream after which a comment line is sent to keep proxies in between from closing it; unset
    /// is never. Half of the shortest idle timeout on the way is a good value.
    pub stream_heartbeat: Option<HumanDuration>,
    /// Whose form errors have: `openai`, or `vllm` for clients that read `error.type` and `error.code` as vLLM writes them; `forebay worker` answers as `vllm`.
    pub errors: ErrorForm,
}

/// `openai` or `vllm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ErrorForm {
    OpenAi,
    Vllm,
}

impl From<ErrorForm> for Dialect {
    fn from(form: ErrorForm) -> Self {
        match form {
            ErrorForm::OpenAi => Self::OpenAi,
            ErrorForm::Vllm => Self::Vllm,
        }
    }
}

impl Default for EdgeConfig {
    fn default() -> Self {
        let listen = std::net::SocketAddr::from(([127, 0, 0, 1], 8080));
        Self {
            listen: OneOrMany::one(listen.into()),
            uds: None,
            tls: None,
            routes: Vec::new(),
            limits: EdgeLimits::default(),
            drain_delay: HumanDuration::from_secs(0),
            drain_timeout: HumanDuration::from_secs(30),
            access_log: Switch::On,
            metrics: Switch::Off,
            operator_api: Switch::Off,
            access_keys: Vec::new(),
            cors_origins: Vec::new(),
            stream_heartbeat: None,
            errors: ErrorForm::OpenAi,
        }
    }
}

/// Where certificate and key are.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct TlsConfig {
    /// PEM file with the certificate and its chain, the server's own first.
    pub cert: PathBuf,
    /// PEM private key, written `file:PATH` or `env:NAME`.
    pub key: Secret,
}

/// One route.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RouteConfig {
    /// Path prefix, beginning with `/`; a prefix matches whole segments, so `/api` takes `/api/x` but not `/apix`.
    pub path: String,
    /// Host name of the request that this route is for, without a port; unset is every host.
    #[serde(default)]
    pub host: Option<String>,
    /// `llm`, or the URL of an upstream like `http://127.0.0.1:9000`.
    pub to: String,
    /// Whether the route's path is taken off before the request goes on; on an `llm` route it always is, down to `/v1/`, which may be left out below a path without it: `/ai/` takes `/ai/v1/models` and `/ai/models`.
    #[serde(default)]
    pub strip_prefix: bool,
    /// Web application firewall; not supported yet, so anything but `off` is refused at start.
    #[serde(default)]
    pub waf: Option<Switch>,
    /// Longest wait for an upstream's response headers, and longest pause within its body; default `60s`, upstream routes only.
    #[serde(default)]
    pub timeout: Option<HumanDuration>,
}

/// `on` or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Switch {
    On,
    Off,
}

/// Limits of the edge. Each refusal names the one it hit.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct EdgeLimits {
    /// Largest request body; raise it for long contexts and images.
    pub max_body: ByteSize,
    /// Largest request head, all header lines together; at least `8KiB`.
    pub max_header_bytes: ByteSize,
    /// Header lines of a request at most.
    pub max_headers: usize,
    /// Open connections at most, over all addresses; one more is closed at once. Keep it below the process's file limit.
    pub max_connections: usize,
    /// Longest time for a TLS handshake, and for a request head from its first byte (or from connecting) to its end.
    pub header_timeout: HumanDuration,
    /// Longest time for a whole request body on an LLM route, and longest pause within one on an upstream route.
    pub body_timeout: HumanDuration,
    /// Longest time in which a client takes no byte of an answer that waits for it; then its connection, or its HTTP/2 stream, is closed and the reply dropped.
    pub write_timeout: HumanDuration,
    /// How long a connection without a request is kept; longer than the idle timeout of a load balancer in front.
    pub idle_timeout: HumanDuration,
    /// Requests in flight on one HTTP/2 connection at most.
    pub max_concurrent_streams: u32,
}

impl Default for EdgeLimits {
    fn default() -> Self {
        Self {
            max_body: ByteSize::mib(10),
            max_header_bytes: ByteSize::kib(32),
            max_headers: 100,
            max_connections: 10_000,
            header_timeout: HumanDuration::from_secs(10),
            body_timeout: HumanDuration::from_secs(60),
            write_timeout: HumanDuration::from_secs(60),
            idle_timeout: HumanDuration::from_secs(75),
            max_concurrent_streams: 128,
        }
    }
}

/// A value that is well-formed but can't be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`edge.{key}`: {problem}")]
pub struct EdgeConfigError {
    /// Below `edge`: `routes[0].to`.
    pub key: String,
    pub problem: String,
}

/// Smallest `max-header-bytes`: hyper's read buffer is never smaller.
const HEADER_BYTES_MIN: u64 = 8 * 1024;
/// Default of a route's `timeout`.
pub(crate) const ROUTE_TIMEOUT: Duration = Duration::from_secs(60);

impl EdgeConfig {
    /// Everything that is wrong with the values, for `forebay check` and before the start. Pure.
    pub fn problems(&self) -> Vec<EdgeConfigError> {
        let mut found = Vec::new();
        let mut add = |key: String, problem: &str| {
            found.push(EdgeConfigError { key, problem: problem.to_owned() });
        };
        if self.listen.is_empty() && self.uds.is_none() {
            add("listen".into(), "at least one address is needed");
        }
        if let Some(path) = &self.uds {
            match path.as_os_str().len() {
                0 => add("uds".into(), "the path is empty"),
                1..=PATH_BYTES_MAX => {}
                bytes => {
                    let problem = format!(
                        "the path has {bytes} bytes; that of a socket may have {PATH_BYTES_MAX} at most"
                    );
                    add("uds".into(), &problem);
                }
            }
        }
        let addresses: Vec<_> = self.listen.iter().collect();
        for (i, address) in addresses.iter().enumerate() {
            if let Some(other) = addresses[..i].iter().find(|other| overlap(other, address)) {
                let problem = match address == other {
                    true => format!("the address {address} is already in the list; remove one of the two"),
                    false => format!("{other} takes {address} too; remove one of the two"),
                };
                add(format!("listen[{i}]"), &problem);
            }
        }
        let mut seen = BTreeSet::new();
        for (i, route) in self.routes.iter().enumerate() {
            let key = |field: &str| format!("routes[{i}].{field}");
            if !route.path.starts_with('/') {
                add(key("path"), "a path begins with `/`");
            }
            if route.path.contains(['?', '#', '*', '{']) {
                add(key("path"), "a path is a plain prefix, without patterns");
            }
            let host = route.host.as_deref().map(str::to_ascii_lowercase);
            if host.as_deref().is_some_and(|host| host.is_empty() || host.contains(['/', ':', '*'])) {
                add(key("host"), "a host is a plain name without a port, like `api.example.org`");
            }
            if !seen.insert((host, route.path.trim_end_matches('/').to_owned())) {
                add(key("path"), "another route has the same host and path");
            }
            if route.to != "llm" {
                if let Err(problem) = crate::route::parse_upstream(&route.to) {
                    add(key("to"), problem);
                }
            } else if route.timeout.is_some() {
                add(key("timeout"), "an `llm` route has no timeout here; set those of `proxy` and `router`");
            }
            if route.waf == Some(Switch::On) {
                add(key("waf"), "the web application firewall is not supported yet; remove the key");
            }
        }
        for (i, origin) in self.cors_origins.iter().enumerate() {
            if !crate::cors::is_origin(origin) {
                add(
                    format!("cors_origins[{i}]").replace('_', "-"),
                    "an origin is `*`, or scheme, host and port without a path, like `https://app.example.org`",
                );
            }
        }
        let limits = &self.limits;
        if limits.max_header_bytes.bytes() < HEADER_BYTES_MIN {
            add("limits.max-header-bytes".into(), "the smallest value is 8KiB");
        }
        for (key, zero) in [
            ("limits.max-headers", limits.max_headers == 0),
            ("limits.max-connections", limits.max_connections == 0),
            ("limits.max-concurrent-streams", limits.max_concurrent_streams == 0),
            ("limits.header-timeout", limits.header_timeout.get().is_zero()),
            ("limits.body-timeout", limits.body_timeout.get().is_zero()),
            ("limits.write-timeout", limits.write_timeout.get().is_zero()),
            ("limits.idle-timeout", limits.idle_timeout.get().is_zero()),
            ("stream-heartbeat", self.stream_heartbeat.is_some_and(|every| every.get().is_zero())),
        ] {
            if zero {
                add(key.into(), "zero would refuse everything; leave the key out for the default");
            }
        }
        found
    }
}

/// Binding the second would fail, because the first has the port already.
fn overlap(first: &ListenAddr, second: &ListenAddr) -> bool {
    // Port 0 is another free port each time.
    if first.port() != second.port() || first.port() == 0 {
        return false;
    }
    match (first.socket_addr(), second.socket_addr()) {
        (Some(first), Some(second)) => {
            let wildcard = first.ip().is_unspecified() || second.ip().is_unspecified();
            // Whether `[::]` takes IPv4 too is the system's setting.
            first.ip() == second.ip() || (wildcard && first.is_ipv4() == second.is_ipv4())
        }
        (None, None) | (Some(_), None) | (None, Some(_)) => first.host().eq_ignore_ascii_case(second.host()),
    }
}
