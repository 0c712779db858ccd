//! What a run found: for machines with the field names of `vllm bench serve`, for people as a table.

use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::options::{Endpoint, Load, Options};
use crate::samples::{Samples, Summary};
use crate::tally::Tally;

/// Failures of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailureCount {
    /// `status_429`, `timeout`, `connect`, …
    pub kind: String,
    pub count: u64,
    /// What was said at the first of them.
    pub first_message: String,
}

/// One run's result. Times are in milliseconds; warm-up requests are in none of the numbers.
#[derive(Debug, Clone)]
pub struct Report {
    /// Base URL without `/v1`.
    pub url: String,
    pub model: String,
    pub endpoint: Endpoint,
    pub stream: bool,
    pub load: Load,
    pub seed: u64,
    pub output_tokens_asked: u32,
    /// What the server's tokenizer said about our text; `None` where it could not be asked and one was assumed.
    pub tokens_per_word: Option<f64>,
    /// The run was ended from outside.
    pub stopped: bool,
    /// From the first request sent to the last reply read.
    pub duration: Duration,
    pub completed: u64,
    pub failed: u64,
    /// In flight when the run was stopped from outside.
    pub abandoned: u64,
    pub failures: Vec<FailureCount>,
    /// As the server counts, so with what its chat template adds. 0 where it does not say.
    pub prompt_tokens: u64,
    /// Part of `prompt_tokens` that a prefix cache had.
    pub cached_tokens: u64,
    /// As the server counts; frames with text where it does not say.
    pub output_tokens: u64,
    /// Completed requests whose tokens the server did not count.
    pub without_usage: u64,
    /// Requests of an open load that were sent more than 10 ms late: the generator, not the server, set the pace.
    pub delayed: u64,
    /// Completed requests that were sent twice, as the server had closed a kept connection without saying so.
    pub reconnected: u64,
    pub in_flight_peak: usize,
    /// To the first piece of output.
    pub ttft: Option<Summary>,
    /// Per output token after the first, of each request.
    pub tpot: Option<Summary>,
    /// Between pieces of output, of all requests together.
    pub itl: Option<Summary>,
    /// From sending the request to the end of its reply.
    pub e2e: Option<Summary>,
    /// Whether all percentiles are of all samples.
    pub exact: bool,
}

impl Report {
    pub(crate) fn new(
        options: &Options,
        url: String,
        model: String,
        tokens_per_word: Option<f64>,
        duration: Duration,
        stopped: bool,
        tally: Tally,
    ) -> Self {
        Self {
            url,
            model,
            endpoint: options.endpoint,
            stream: options.stream,
            load: options.load,
            seed: options.seed,
            output_tokens_asked: options.output_tokens,
            tokens_per_word,
            stopped,
            duration,
            completed: tally.completed,
            failed: tally.failed,
            abandoned: tally.abandoned,
            prompt_tokens: tally.prompt_tokens,
            cached_tokens: tally.cached_tokens,
            output_tokens: tally.output_tokens,
            without_usage: tally.without_usage,
            delayed: tally.delayed,
            reconnected: tally.reconnected,
            in_flight_peak: tally.in_flight_peak,
            exact: [&tally.ttft, &tally.tpot, &tally.itl, &tally.e2e].into_iter().all(Samples::is_exact),
            ttft: tally.ttft.summary(),
            tpot: tally.tpot.summary(),
            itl: tally.itl.summary(),
            e2e: tally.e2e.summary(),
            failures: tally.failures.into_values().collect(),
        }
    }

    /// Completed requests per second.
    pub fn request_throughput(&self) -> f64 {
        self.per_second(self.completed)
    }

    /// Output tokens per second over all requests.
    pub fn output_throughput(&self) -> f64 {
        self.per_second(self.output_tokens)
    }

    /// Prompt and output tokens per second over all requests.
    pub fn total_token_throughput(&self) -> f64 {
        self.per_second(self.prompt_tokens + self.output_tokens)
    }

    fn per_second(&self, n: u64) -> f64 {
        n as f64 / self.duration.as_secs_f64().max(1e-9)
    }

    /// The report with `vllm bench serve`'s field names, and ours where it has none. A series without samples is
    /// `null`, not 0.
    pub fn to_json(&self) -> Value {
        let failures: Map<String, Value> = self
            .failures
            .iter()
            .map(|f| (f.kind.clone(), json!({"count": f.count, "first_message": f.first_message})))
            .collect();
        let (arrivals, max_concurrency) = match self.load {
            Load::Concurrency(n) => ("closed", n),
            Load::Poisson { in_flight_max, .. } => ("poisson", in_flight_max),
            Load::Constant { in_flight_max, .. } => ("constant", in_flight_max),
        };
        let mut out = json!({
            "endpoint_type": self.endpoint.as_str(),
            "base_url": self.url,
            "model_id": self.model,
            "stream": self.stream,
            "seed": self.seed,
            "arrivals": arrivals,
            "request_rate": self.load.per_second(),
            "max_concurrency": max_concurrency,
            "max_concurrent_requests": self.in_flight_peak,
            "num_prompts": self.completed + self.failed,
            "duration": self.duration.as_secs_f64(),
            "completed": self.completed,
            "failed": self.failed,
            "abandoned": self.abandoned,
            "stopped": self.stopped,
            "delayed": self.delayed,
            "reconnected": self.reconnected,
            "failures": failures,
            "total_input_tokens": self.prompt_tokens,
            "total_cached_tokens": self.cached_tokens,
            "total_output_tokens": self.output_tokens,
            "requests_without_usage": self.without_usage,
            "tokens_per_word": self.tokens_per_word,
            "exact_percentiles": self.exact,
            "request_throughput": self.request_throughput(),
            "output_throughput": self.output_throughput(),
            "total_token_throughput": self.total_token_throughput(),
        });
        for (name, series) in
            [("ttft", &self.ttft), ("tpot", &self.tpot), ("itl", &self.itl), ("e2el", &self.e2e)]
        {
            let of = |get: fn(&Summary) -> f64| series.as_ref().map(get);
            out[format!("mean_{name}_ms")] = json!(of(|s| s.mean));
            out[format!("std_{name}_ms")] = json!(of(|s| s.std));
            out[format!("min_{name}_ms")] = json!(of(|s| s.min));
            out[format!("median_{name}_ms")] = json!(of(|s| s.p50));
            out[format!("p90_{name}_ms")] = json!(of(|s| s.p90));
            out[format!("p95_{name}_ms")] = json!(of(|s| s.p95));
            out[format!("p99_{name}_ms")] = json!(of(|s| s.p99));
            out[format!("max_{name}_ms")] = json!(of(|s| s.max));
        }
        out
    }
}

impl fmt::Display for Report {
    /// The table for a person; ends with a line feed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stream = if self.stream { "streamed" } else { "not streamed" };
        writeln!(f, "{} at {} ({}, {stream})", self.model, self.url, self.endpoint.as_str())?;
        writeln!(f)?;
        let mut row = |name: &str, value: String| writeln!(f, "  {name:<20} {value}");
        row(
            "load",
            match self.load {
                Load::Concurrency(n) => format!("{n} in flight"),
                Load::Poisson { per_second, .. } => format!("{per_second} requests/s, Poisson arrivals"),
                Load::Constant { per_second, .. } => format!("{per_second} requests/s, constant"),
            },
        )?;
        let abandoned = match self.abandoned {
            0 => String::new(),
            n => format!(", {n} given up when the run was stopped"),
        };
        row("requests", format!("{} completed, {} failed{abandoned}", self.completed, self.failed))?;
        row("duration", format!("{:.2} s", self.duration.as_secs_f64()))?;
        row("request throughput", format!("{:.2} requests/s", self.request_throughput()))?;
        row("output throughput", format!("{:.1} tokens/s", self.output_throughput()))?;
        row("total throughput", format!("{:.1} tokens/s", self.total_token_throughput()))?;
        let each = |tokens: u64| tokens as f64 / (self.completed.max(1) as f64);
        let (prompt, cached, output) =
            (each(self.prompt_tokens), each(self.cached_tokens), each(self.output_tokens));
        row(
            "tokens per request",
            format!("{prompt:.1} prompt, of them {cached:.1} cached, {output:.1} output"),
        )?;

        writeln!(
            f,
            "\n  {:<8}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}",
            "ms", "mean", "p50", "p90", "p95", "p99", "max"
        )?;
        for (name, series) in
            [("TTFT", &self.ttft), ("TPOT", &self.tpot), ("ITL", &self.itl), ("E2E", &self.e2e)]
        {
            write!(f, "  {name:<8}")?;
            match series {
                Some(s) => {
                    for value in [s.mean, s.p50, s.p90, s.p95, s.p99, s.max] {
                        write!(f, "{:>10}", millis(value))?;
                    }
                }
                None => write!(f, "{:>10}", "-")?,
            }
            writeln!(f)?;
        }

        if !self.failures.is_empty() {
            writeln!(f, "\n  failures")?;
            for failure in &self.failures {
                writeln!(f, "  {:>6} {:<16} {}", failure.count, failure.kind, failure.first_message)?;
            }
        }
        let mut note = |text: &str| writeln!(f, "\n  note: {text}");
        if self.delayed > 0 {
            note(&format!(
                "{} requests were sent late; raise the limit of requests in flight",
                self.delayed
            ))?;
        }
        if self.reconnected > 0 {
            let n = self.reconnected;
            note(&format!("{n} requests were sent again: the server had closed a kept connection"))?;
        }
        if self.without_usage > 0 {
            note(&format!(
                "{} replies had no usage; their tokens are counted by frames",
                self.without_usage
            ))?;
        }
        if !self.exact {
            note("percentiles are of a uniform sample of 2^20 values")?;
        }
        Ok(())
    }
}

/// Three significant digits or more, and microseconds for what is short.
fn millis(value: f64) -> String {
    match value {
        v if v < 10.0 => format!("{v:.3}"),
        v if v < 100.0 => format!("{v:.2}"),
        v => format!("{v:.1}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Failure, FailureKind};
    use crate::request::Timing;

    fn report() -> Report {
        let ms = Duration::from_millis;
        let mut tally = Tally { in_flight_peak: 2, ..Tally::default() };
        let usage = forebay_types::Usage {
            prompt_tokens: 100,
            completion_tokens: 3,
            cached_tokens: 16,
            ..Default::default()
        };
        for extra in [0, 10] {
            tally.record(Ok(Timing {
                ttft: Some(ms(20 + extra)),
                gaps: vec![ms(4), ms(6)],
                decode: ms(10),
                e2e: ms(31 + extra),
                usage: Some(usage),
                reconnected: false,
                pieces: 3,
            }));
        }
        tally.record(Err(Failure::new(FailureKind::Status(429), "slow down")));
        let options = Options { load: Load::Concurrency(2), ..Options::default() };
        let url = "http://127.0.0.1:1".to_owned();
        Report::new(&options, url, "m".into(), Some(1.0), ms(500), false, tally)
    }

    #[test]
    fn as_a_table() {
        let expect = "\
m at http://127.0.0.1:1 (chat, streamed)

  load                 2 in flight
  requests             2 completed, 1 failed
  duration             0.50 s
  request throughput   4.00 requests/s
  output throughput    12.0 tokens/s
  total throughput     412.0 tokens/s
  tokens per request   100.0 prompt, of them 16.0 cached, 3.0 output

  ms            mean       p50       p90       p95       p99       max
  TTFT         25.00     25.00     29.00     29.50     29.90     30.00
  TPOT         5.000     5.000     5.000     5.000     5.000     5.000
  ITL          5.000     5.000     6.000     6.000     6.000     6.000
  E2E          36.00     36.00     40.00     40.50     40.90     41.00

  failures
       1 status_429       slow down
";
        assert_eq!(report().to_string(), expect);
    }

    #[test]
    fn as_json() {
        let json = report().to_json();
        let check = |key: &str, expect: Value| assert_eq!(json[key], expect, "{key}");
        check("completed", json!(2));
        check("failed", json!(1));
        check("duration", json!(0.5));
        check("request_rate", Value::Null);
        check("max_concurrency", json!(2));
        check("total_input_tokens", json!(200));
        check("total_output_tokens", json!(6));
        check("request_throughput", json!(4.0));
        check("output_throughput", json!(12.0));
        check("total_token_throughput", json!(412.0));
        check("mean_ttft_ms", json!(25.0));
        check("median_ttft_ms", json!(25.0));
        check("mean_tpot_ms", json!(5.0));
        check("max_itl_ms", json!(6.0));
        check("max_e2el_ms", json!(41.0));
        check("failures", json!({"status_429": {"count": 1, "first_message": "slow down"}}));
    }

    #[test]
    fn without_samples_there_are_no_zeros() {
        let options = Options::default();
        let report =
            Report::new(&options, "u".into(), "m".into(), None, Duration::ZERO, false, Tally::default());
        assert_eq!(report.to_json()["p99_ttft_ms"], Value::Null);
        assert!(report.to_string().contains("  TTFT             -\n"));
    }
}
