//! Which path goes where: host, then the longest prefix. Pure.

use std::time::Duration;

use http::Uri;

use crate::config::{EdgeConfig, ROUTE_TIMEOUT, RouteConfig};
use crate::operator::operator_method;

/// All routes, made once.
#[derive(Debug)]
pub(crate) struct RouteTable {
    /// With a host before without, longest prefix first: the first match is the one.
    routes: Vec<Route>,
}

#[derive(Debug)]
pub(crate) struct Route {
    /// For metrics and logs: as configured, so bounded.
    pub(crate) label: String,
    host: Option<String>,
    /// Without a slash at the end; empty is every path.
    prefix: String,
    pub(crate) target: Target,
}

#[derive(Debug)]
pub(crate) enum Target {
    Llm {
        /// Taken off the path, so that `/v1/` is left.
        mount: String,
        /// The route is a mount without `/v1/`, below which `/v1` may be left out.
        v1_optional: bool,
    },
    Upstream(UpstreamTarget),
}

#[derive(Debug)]
pub(crate) struct UpstreamTarget {
    /// `http://127.0.0.1:9000/base`, no slash at the end.
    pub(crate) base: String,
    /// `127.0.0.1:9000`, for the log.
    pub(crate) authority: String,
    /// Taken off the path.
    pub(crate) strip: String,
    pub(crate) timeout: Duration,
}

impl RouteTable {
    /// From a configuration without problems.
    pub(crate) fn new(config: &EdgeConfig) -> Self {
        let mut routes: Vec<_> = config.routes.iter().map(Route::new).collect();
        if routes.is_empty() {
            let target = Target::Llm { mount: String::new(), v1_optional: false };
            routes.push(Route { label: "/".into(), host: None, prefix: String::new(), target });
        }
        routes.sort_by_key(|route| (route.host.is_none(), std::cmp::Reverse(route.prefix.len())));
        Self { routes }
    }

    pub(crate) fn has_llm(&self) -> bool {
        self.routes.iter().any(|route| matches!(route.target, Target::Llm { .. }))
    }

    pub(crate) fn labels(&self) -> impl Iterator<Item = &str> {
        self.routes.iter().map(|route| route.label.as_str())
    }

    /// `host` in lower case, without a port.
    pub(crate) fn find(&self, host: &str, path: &str) -> Option<&Route> {
        self.routes.iter().find(|route| {
            route.host.as_deref().is_none_or(|own| own == host) && is_prefix(&route.prefix, path)
        })
    }
}

impl Route {
    fn new(config: &RouteConfig) -> Self {
        let prefix = config.path.trim_end_matches('/').to_owned();
        let host = config.host.as_deref().map(str::to_ascii_lowercase);
        let label = match &host {
            Some(host) => format!("{host}{}", config.path),
            None => config.path.clone(),
        };
        let target = if config.to == "llm" {
            // `/api/v1/chat/` is the LLM API mounted at `/api`; a path without `/v1` is a mount as a whole.
            let whole = format!("{prefix}/");
            let v1 = whole.find("/v1/");
            let mount = v1.map_or(prefix.as_str(), |at| &prefix[..at]).to_owned();
            // Not at the root, where the API is as OpenAI has it.
            Target::Llm { v1_optional: v1.is_none() && !mount.is_empty(), mount }
        } else {
            Target::Upstream(UpstreamTarget {
                base: config.to.trim_end_matches('/').to_owned(),
                authority: authority(&config.to),
                strip: if config.strip_prefix { prefix.clone() } else { String::new() },
                timeout: config.timeout.map_or(ROUTE_TIMEOUT, |timeout| timeout.get()),
            })
        };
        Self { label, host, prefix, target }
    }
}

/// Whole segments: `/api` takes `/api` and `/api/x`, not `/apix`.
fn is_prefix(prefix: &str, path: &str) -> bool {
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// A path without its mount; what is left begins with `/`.
pub(crate) fn without_mount<'a>(mount: &str, path: &'a str) -> &'a str {
    match path.strip_prefix(mount) {
        Some("") => "/",
        Some(rest) if rest.starts_with('/') => rest,
        Some(_) | None => path,
    }
}

/// Paths of an LLM route that are not below `/v1`, as vLLM has them. Those of operators are others.
const OUTSIDE_V1: [&str; 9] = [
    "/health",
    "/ping",
    "/version",
    "/metrics",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
    "/inference/v1/generate",
    "/load",
];

fn is_outside_v1(path: &str) -> bool {
    OUTSIDE_V1.contains(&path) || operator_method(path).is_some()
}

/// The path that the stack below is asked for.
pub(crate) fn llm_path(mount: &str, v1_optional: bool, path: &str) -> String {
    let path = without_mount(mount, path);
    if !v1_optional || path == "/" || is_prefix("/v1", path) || is_outside_v1(path) {
        return path.to_owned();
    }
    format!("/v1{path}")
}

fn authority(url: &str) -> String {
    let uri: Option<Uri> = url.parse().ok();
    uri.as_ref().and_then(Uri::authority).map(ToString::to_string).unwrap_or_default()
}

/// Checks the URL of an upstream route.
pub(crate) fn parse_upstream(to: &str) -> Result<(), &'static str> {
    const SHAPE: &str = "write `llm`, or a URL like `http://127.0.0.1:9000`";
    let uri: Uri = to.parse().map_err(|_| SHAPE)?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none_or(str::is_empty) {
        return Err(SHAPE);
    }
    if uri.query().is_some() || uri.authority().is_some_and(|a| a.as_str().contains('@')) {
        return Err("the URL must not have a query or a user name");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(routes: &[(&str, Option<&str>, &str)]) -> EdgeConfig {
        let routes = routes
            .iter()
            .map(|(path, host, to)| RouteConfig {
                path: (*path).into(),
                host: host.map(Into::into),
                to: (*to).into(),
                strip_prefix: false,
                waf: None,
                timeout: None,
            })
            .collect();
        EdgeConfig { routes, ..EdgeConfig::default() }
    }

    #[test]
    fn host_then_longest_prefix() {
        let config = config(&[
            ("/v1/", None, "llm"),
            ("/api/v1/chat/", None, "llm"),
            ("/api/", None, "http://a:1"),
            ("/api/v1/users/", None, "http://b:1/"),
            ("/", Some("Shop.example"), "https://c"),
        ]);
        assert_eq!(config.problems(), []);
        let table = RouteTable::new(&config);
        let check = |host: &str, path: &str, expect: Option<&str>| {
            assert_eq!(table.find(host, path).map(|r| r.label.as_str()), expect, "{host}{path}");
        };
        check("x", "/v1/models", Some("/v1/"));
        check("x", "/v1", Some("/v1/"));
        check("x", "/v1x", None);
        check("x", "/api/v1/users/7", Some("/api/v1/users/"));
        check("x", "/api/v1/chat/completions", Some("/api/v1/chat/"));
        check("x", "/api/other", Some("/api/"));
        check("x", "/apis", None);
        check("x", "*", None);
        check("shop.example", "/v1/models", Some("shop.example/"));
    }

    #[test]
    fn llm_mounts_end_before_v1() {
        let check = |route: &str, path: &str, expect: &str| {
            let table = RouteTable::new(&config(&[(route, None, "llm")]));
            let found = table.find("x", path).map(|r| &r.target);
            let Some(Target::Llm { mount, v1_optional }) = found else { panic!("{route} {path}: {found:?}") };
            assert_eq!(llm_path(mount, *v1_optional, path), expect, "{route} {path}");
        };
        check("/", "/v1/models", "/v1/models");
        check("/v1/", "/v1/models", "/v1/models");
        check("/api/v1/chat/", "/api/v1/chat/completions", "/v1/chat/completions");
        check("/api/v1", "/api/v1/models", "/v1/models");
        check("/llm", "/llm/v1/models", "/v1/models");
        check("/llm/", "/llm/tokenize", "/tokenize");
        check("/llm/", "/llm", "/");
        // What a client has whose base URL ends with the mount.
        check("/llm/", "/llm/chat/completions", "/v1/chat/completions");
        check("/llm", "/llm/models/org/m", "/v1/models/org/m");
        check("/llm/", "/llm/v1", "/v1");
        check("/llm/", "/llm/v1x", "/v1/v1x");
        check("/llm/", "/llm/health", "/health");
        check("/llm/", "/llm/ping", "/ping");
        check("/llm/", "/llm/load", "/load");
        check("/llm/", "/llm/pause", "/pause");
        check("/llm/", "/llm/tokenizer_info", "/tokenizer_info");
        // Elsewhere nothing is made up.
        check("/", "/chat/completions", "/chat/completions");
        check("/api/v1/chat/", "/api/v1/chat/completions", "/v1/chat/completions");
        check("/api/v1beta/", "/api/v1beta/tokenize", "/tokenize");
    }

    #[test]
    fn upstreams_are_split() {
        let check = |to: &str, expect: (&str, &str)| {
            let table = RouteTable::new(&config(&[("/", None, to)]));
            let Some(Target::Upstream(target)) = table.find("x", "/").map(|r| &r.target) else {
                panic!("{to}")
            };
            assert_eq!((target.base.as_str(), target.authority.as_str()), expect);
        };
        check("http://a:9000/base/", ("http://a:9000/base", "a:9000"));
        check("https://b", ("https://b", "b"));
    }

    #[test]
    fn problems_name_their_key() {
        let check = |routes: &[(&str, Option<&str>, &str)], expect: &[&str]| {
            let found: Vec<_> = config(routes).problems().iter().map(ToString::to_string).collect();
            assert_eq!(found, expect);
        };
        check(&[("/", None, "llm")], &[]);
        check(&[("x", None, "llm")], &["`edge.routes[0].path`: a path begins with `/`"]);
        check(
            &[("/a", None, "llm"), ("/a/", None, "llm")],
            &["`edge.routes[1].path`: another route has the same host and path"],
        );
        let shape = "`edge.routes[0].to`: write `llm`, or a URL like `http://127.0.0.1:9000`";
        check(&[("/", None, "LLM")], &[shape]);
        check(&[("/", None, "ftp://a")], &[shape]);
        check(&[("/", None, "127.0.0.1:9000")], &[shape]);
        check(
            &[("/", None, "http://u:p@a")],
            &["`edge.routes[0].to`: the URL must not have a query or a user name"],
        );
        check(
            &[("/", Some("a:80"), "llm")],
            &["`edge.routes[0].host`: a host is a plain name without a port, like `api.example.org`"],
        );
    }

    #[test]
    fn the_firewall_is_refused_not_ignored() {
        let mut config = config(&[("/", None, "http://a:1")]);
        config.routes[0].waf = Some(crate::Switch::On);
        assert_eq!(
            config.problems()[0].to_string(),
            "`edge.routes[0].waf`: the web application firewall is not supported yet; remove the key"
        );
        config.routes[0].waf = Some(crate::Switch::Off);
        assert_eq!(config.problems(), []);
    }
}
