//! vLLM's flags for a worker's port: who may ask, over what, under which path.

use std::path::PathBuf;

use clap::Args;
use forebay_config::{Environment, HumanDuration, OneOrMany, Secret};
use forebay_edge::{EdgeConfig, RouteConfig, TlsConfig};

/// Where vLLM looks for a key that is not on the command line.
const KEY_VARIABLE: &str = "VLLM_API_KEY";

#[derive(Args, Default)]
pub(crate) struct Front {
    /// Keys of which clients must show one for /v1, /v2 and /inference, and for what changes how the worker works;
    /// `env:NAME` and `file:PATH` keep them off the command line. $VLLM_API_KEY where absent
    #[arg(long, value_name = "KEY", num_args = 1..)]
    pub api_key: Vec<Secret>,
    /// Unix socket to listen on in place of --host and --port
    #[arg(long, value_name = "PATH")]
    pub uds: Option<PathBuf>,
    /// PEM file with the certificate and its chain: serve HTTPS
    #[arg(long, value_name = "FILE")]
    pub ssl_certfile: Option<PathBuf>,
    /// PEM file with the private key; the certificate's file where absent
    #[arg(long, value_name = "FILE", requires = "ssl_certfile")]
    pub ssl_keyfile: Option<PathBuf>,
    /// Path below which a proxy in front shows this worker; requests come with it or without
    #[arg(long, value_name = "PATH", value_parser = root_path)]
    pub root_path: Option<String>,
    /// Origins whose pages may call the worker, as a JSON list; `["*"]` is all. None where absent (vLLM: all)
    #[arg(long, value_name = "JSON", value_parser = origins)]
    pub allowed_origins: Option<Origins>,
    /// How long requests may go on after a stop was asked for; 0 aborts them at once (vLLM's default)
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub shutdown_timeout: u32,
    /// Pause of a stream after which a comment line keeps it open; 0 sends none (vLLM's default)
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub sse_keep_alive_interval: u32,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Origins(pub Vec<String>);

fn origins(text: &str) -> Result<Origins, String> {
    serde_json::from_str(text).map(Origins).map_err(|error| error.to_string())
}

/// With a slash at its beginning and none at its end; empty is none.
fn root_path(text: &str) -> Result<String, String> {
    let path = text.trim_end_matches('/');
    match path.is_empty() || path.starts_with('/') {
        true => Ok(path.to_owned()),
        false => Err("a path begins with `/`".to_owned()),
    }
}

impl Front {
    /// The edge of a worker with these flags.
    pub(crate) fn apply(&self, edge: EdgeConfig, env: &dyn Environment) -> EdgeConfig {
        let mut access_keys = self.api_key.clone();
        if access_keys.is_empty() && env.var(KEY_VARIABLE).is_ok_and(|key| !key.is_empty()) {
            access_keys.push(Secret::env(KEY_VARIABLE));
        }
        let tls = self.ssl_certfile.as_ref().map(|cert| TlsConfig {
            cert: cert.clone(),
            key: Secret::file(self.ssl_keyfile.as_ref().unwrap_or(cert)),
        });
        let route = |path: &str| RouteConfig {
            path: path.to_owned(),
            host: None,
            to: "llm".to_owned(),
            strip_prefix: false,
            waf: None,
            timeout: None,
        };
        let root = self.root_path.as_deref().filter(|path| !path.is_empty());
        EdgeConfig {
            listen: if self.uds.is_some() { OneOrMany::default() } else { edge.listen },
            uds: self.uds.clone(),
            access_keys,
            tls,
            routes: root.map_or_else(Vec::new, |root| vec![route(root), route("/")]),
            cors_origins: self.allowed_origins.clone().map_or_else(Vec::new, |origins| origins.0),
            drain_timeout: HumanDuration::from_secs(self.shutdown_timeout.into()),
            stream_heartbeat: match self.sse_keep_alive_interval {
                0 => None,
                seconds => Some(HumanDuration::from_secs(seconds.into())),
            },
            ..edge
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use forebay_config::FixedEnvironment;

    use super::*;

    #[test]
    fn flags_are_the_edges_configuration() {
        let env = FixedEnvironment::new().with_var(KEY_VARIABLE, "k");
        let front = Front {
            ssl_certfile: Some("c.pem".into()),
            root_path: Some(root_path("/llm/").expect("a path")),
            allowed_origins: Some(origins(r#"["http://a"]"#).expect("a list")),
            shutdown_timeout: 5,
            sse_keep_alive_interval: 15,
            ..Front::default()
        };
        let edge = front.apply(EdgeConfig::default(), &env);
        assert_eq!(edge.problems(), []);
        assert_eq!(edge.access_keys, [Secret::env(KEY_VARIABLE)]);
        let tls = edge.tls.expect("HTTPS");
        assert_eq!((tls.cert, tls.key), ("c.pem".into(), Secret::file("c.pem")));
        assert_eq!(edge.routes.iter().map(|route| route.path.as_str()).collect::<Vec<_>>(), ["/llm", "/"]);
        assert_eq!(
            (edge.cors_origins, edge.drain_timeout),
            (vec!["http://a".to_owned()], HumanDuration::from_secs(5))
        );
        assert_eq!(edge.stream_heartbeat, Some(HumanDuration::from_secs(15)));
        let given = Front { api_key: vec![Secret::plain("own")], ..Front::default() };
        assert_eq!(given.apply(EdgeConfig::default(), &env).access_keys, [Secret::plain("own")]);
        let open = Front::default()
            .apply(EdgeConfig::default(), &FixedEnvironment::new().with_var(KEY_VARIABLE, ""));
        assert!(open.access_keys.is_empty() && open.routes.is_empty() && open.tls.is_none());
        assert_eq!(open.stream_heartbeat, None);
        let socket = Front { uds: Some("/run/s".into()), ..Front::default() };
        let socket = socket.apply(EdgeConfig::default(), &FixedEnvironment::new());
        assert_eq!((socket.listen.len(), socket.uds.as_deref()), (0, Some(Path::new("/run/s"))));
        assert_eq!(socket.problems(), []);
    }

    #[test]
    fn mistakes_are_told() {
        assert_eq!(root_path("llm"), Err("a path begins with `/`".to_owned()));
        assert_eq!(root_path("/"), Ok(String::new()));
        assert!(origins("*").is_err());
    }
}
