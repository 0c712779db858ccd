//! What a run does. Plain values: the command line is defined by the binary.

use std::path::PathBuf;
use std::time::Duration;

use forebay_config::SecretValue;

use crate::error::LoadError;

/// Requests in flight at most, whatever the load: each holds a connection.
pub(crate) const IN_FLIGHT_LIMIT: u32 = 16_384;

/// Words of one prompt at most, about 4 MiB of text.
const PROMPT_TOKENS_LIMIT: u32 = 1_000_000;

/// One run against one server.
#[derive(Debug, Clone)]
pub struct Options {
    /// Base URL, with or without `/v1` at its end.
    pub url: String,
    /// The server's first model where absent.
    pub model: Option<String>,
    /// Sent as `authorization: Bearer`; never shown.
    pub api_key: Option<SecretValue>,
    pub endpoint: Endpoint,
    pub load: Load,
    pub until: Until,
    /// Requests before the measured ones, which are not counted. With 0 a server that refuses everything is a report
    /// full of failures; with 1 or more it is an error at once.
    pub warmup_requests: u64,
    pub prompts: Prompts,
    /// `max_tokens` of each request.
    pub output_tokens: u32,
    /// vLLM's `ignore_eos`: every reply is as long as `output_tokens`.
    pub ignore_eos: bool,
    /// The server's default where absent.
    pub temperature: Option<f64>,
    /// Streaming; without it there is no TTFT and no ITL to measure.
    pub stream: bool,
    /// Further fields of the request body; they replace ours of the same name.
    pub extra_body: serde_json::Map<String, serde_json::Value>,
    /// Of prompts and arrivals: same seed, same work.
    pub seed: u64,
    /// From sending a request to the end of its reply.
    pub request_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            url: "http://127.0.0.1:8080".into(),
            model: None,
            api_key: None,
            endpoint: Endpoint::Chat,
            load: Load::Concurrency(1),
            until: Until::Requests(100),
            warmup_requests: 1,
            prompts: Prompts::Synthetic { prompt_tokens: 128, shared_prefix_tokens: 0 },
            output_tokens: 64,
            ignore_eos: false,
            temperature: Some(0.0),
            stream: true,
            extra_body: serde_json::Map::new(),
            seed: 0,
            request_timeout: Duration::from_secs(600),
        }
    }
}

/// Which API is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
}

impl Endpoint {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completions => "completions",
        }
    }

    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
        }
    }
}

/// When a request is sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Load {
    /// So many in flight at any time: the next is sent when one is done. A slow server is asked less often, which
    /// hides how long its queue would grow; use a rate to see that.
    Concurrency(u32),
    /// Independent arrivals, so many per second on average, whether or not earlier ones are done. One that would go
    /// over `in_flight_max` waits and is counted as delayed.
    Poisson { per_second: f64, in_flight_max: u32 },
    /// The same at equal distances.
    Constant { per_second: f64, in_flight_max: u32 },
}

impl Load {
    /// Requests in flight at most.
    pub fn in_flight_max(self) -> u32 {
        match self {
            Self::Concurrency(n) => n,
            Self::Poisson { in_flight_max, .. } | Self::Constant { in_flight_max, .. } => in_flight_max,
        }
    }

    /// Requests per second that are asked for; `None` where the server's speed decides.
    pub fn per_second(self) -> Option<f64> {
        match self {
            Self::Concurrency(_) => None,
            Self::Poisson { per_second, .. } | Self::Constant { per_second, .. } => Some(per_second),
        }
    }
}

/// When no further request is sent. Those in flight are waited for and counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    Requests(u64),
    Duration(Duration),
}

/// Where prompts come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompts {
    /// Random common words. The lengths are of the text: what a chat template adds comes on top.
    Synthetic {
        prompt_tokens: u32,
        /// Of these, how many at the beginning are the same in all requests. Without any, no two prompts begin alike,
        /// so that a prefix cache can't make the server look faster than it is.
        shared_prefix_tokens: u32,
    },
    /// One JSON value per line, sent in order and again from the first: a string, or an object with `prompt` or
    /// `messages` and, if wanted, `max_tokens`.
    File(PathBuf),
}

impl Options {
    /// Refuses what can't be run, before anything is sent.
    pub(crate) fn validate(&self) -> Result<(), LoadError> {
        let refuse = |option, why| Err(LoadError::Option { option, why });
        if let Some(per_second) = self.load.per_second()
            && !(per_second.is_finite() && (0.001..=1e6).contains(&per_second))
        {
            return refuse("rate", "must be between 0.001 and 1,000,000 requests per second");
        }
        if !(1..=IN_FLIGHT_LIMIT).contains(&self.load.in_flight_max()) {
            return refuse("concurrency", "must be between 1 and 16,384 requests in flight");
        }
        if self.until == Until::Requests(0) || self.until == Until::Duration(Duration::ZERO) {
            return refuse("requests", "there is nothing to measure in 0 requests or 0 s");
        }
        if self.output_tokens == 0 {
            return refuse("output-tokens", "must be 1 or more");
        }
        if let Prompts::Synthetic { prompt_tokens, shared_prefix_tokens } = self.prompts {
            if !(1..=PROMPT_TOKENS_LIMIT).contains(&prompt_tokens) {
                return refuse("prompt-tokens", "must be between 1 and 1,000,000");
            }
            if shared_prefix_tokens > prompt_tokens {
                return refuse("shared-prefix-tokens", "must not be more than `prompt-tokens`");
            }
        }
        if self.request_timeout.is_zero() {
            return refuse("timeout", "must be more than 0");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_make_no_sense_are_refused() {
        let check = |change: fn(&mut Options), expect: Option<&str>| {
            let mut options = Options::default();
            change(&mut options);
            let found = options.validate().err().map(|error| error.to_string());
            assert_eq!(found.as_deref().and_then(|text| text.split(':').next()), expect);
        };
        check(|_| {}, None);
        check(|o| o.load = Load::Concurrency(0), Some("concurrency"));
        check(|o| o.load = Load::Concurrency(IN_FLIGHT_LIMIT + 1), Some("concurrency"));
        check(|o| o.load = Load::Poisson { per_second: f64::NAN, in_flight_max: 8 }, Some("rate"));
        check(|o| o.load = Load::Constant { per_second: 0.0, in_flight_max: 8 }, Some("rate"));
        check(|o| o.load = Load::Constant { per_second: 2.5, in_flight_max: 8 }, None);
        check(|o| o.until = Until::Requests(0), Some("requests"));
        check(|o| o.until = Until::Duration(Duration::ZERO), Some("requests"));
        check(|o| o.output_tokens = 0, Some("output-tokens"));
        check(|o| o.prompts = synthetic(0, 0), Some("prompt-tokens"));
        check(|o| o.prompts = synthetic(8, 9), Some("shared-prefix-tokens"));
        check(|o| o.prompts = synthetic(8, 8), None);
        check(|o| o.request_timeout = Duration::ZERO, Some("timeout"));
    }

    fn synthetic(prompt_tokens: u32, shared_prefix_tokens: u32) -> Prompts {
        Prompts::Synthetic { prompt_tokens, shared_prefix_tokens }
    }

    #[test]
    fn a_key_is_not_shown() {
        let options = Options { api_key: Some(SecretValue::new("sk-secret")), ..Options::default() };
        assert!(!format!("{options:?}").contains("sk-secret"));
    }
}
