//! The decision.

use std::fmt;
use std::time::Duration;

use forebay_types::{Blame, Class, Classify, Code, ModelName, Retry};

use crate::speed::{PREFILL_RATE_PRIOR, Speed};

/// The externality of a prefill: while it is computed, everybody behind it waits for it too. 1 counts one such
/// waiter, whatever the queue behind is going to be.
const LAMBDA: f64 = 1.0;

/// Costs that differ by less than this share are equal: what floating point leaves of equal inputs.
const TIE: f64 = 1e-9;

/// A fleet as it is seen now. Positions in `replicas` name the replicas.
#[derive(Debug, Clone, Copy)]
pub struct FleetView<'a> {
    pub model: &'a ModelName,
    pub replicas: &'a [ReplicaView],
    /// Uncached prompt tokens that a replica may have waiting before it is skipped. A prompt that is longer than this
    /// still goes to a replica with nothing waiting.
    pub queued_tokens_max: u64,
    /// From any fixed start; the same start as in each [`Speed`].
    pub now: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReplicaView {
    pub state: ReplicaState,
    pub load: Load,
    pub speed: Speed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplicaState {
    Up,
    /// Finishes what it has and gets nothing new.
    Draining,
    Down,
}

/// What a replica was given and has not finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Requests in flight, waiting and decoding.
    pub requests: u32,
    /// Uncached prompt tokens of the requests whose first token has not come.
    pub queued_tokens: u64,
}

/// The request, as far as placement is concerned.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    pub prompt_tokens: u32,
    /// Tokens of a KV block: the unit of `matched_blocks`.
    pub block_tokens: u32,
    /// Leading blocks of the prompt that each replica holds, by its position. A position past the end holds none.
    pub matched_blocks: &'a [u32],
    /// New tokens that are expected, not the maximum that is allowed.
    pub output_tokens: u32,
    /// Positions that have failed this request already.
    pub tried: &'a [usize],
}

/// One replica that could have been chosen, and what it would have cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    pub replica: usize,
    pub cached_blocks: u32,
    /// Prompt tokens that have to be computed there, at least 1 of a prompt that is not empty.
    pub uncached_tokens: u32,
    /// Seconds until what waits there is computed.
    pub wait_s: f64,
    /// Seconds for this prompt's uncached part.
    pub prefill_s: f64,
    /// Seconds that the requests in flight there add to this one's decoding.
    pub decode_s: f64,
}

impl Candidate {
    /// `T = wait + (1 + λ) · prefill + decode`, seconds.
    pub fn cost_s(&self) -> f64 {
        self.wait_s + (1.0 + LAMBDA) * self.prefill_s + self.decode_s
    }
}

/// Why this replica and no other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Why {
    /// There was no other.
    Only,
    /// It holds the most of the prompt.
    Prefix,
    /// Another one holds more of the prompt, or nobody holds any: it is the soonest done.
    Load,
    /// Equal to others, drawn by lot.
    Tie,
}

impl Why {
    /// As a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Only => "only",
            Self::Prefix => "prefix",
            Self::Load => "load",
            Self::Tie => "tie",
        }
    }
}

/// Where the request goes.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    pub replica: usize,
    pub cached_blocks: u32,
    pub cached_tokens: u32,
    pub uncached_tokens: u32,
    /// Expected seconds until the first token.
    pub estimated_s: f64,
    pub why: Why,
    /// Everyone that could have been chosen, by position.
    pub candidates: Vec<Candidate>,
}

impl fmt::Display for Decision {
    /// For people, in a trace: `prefix: 512 of 600 tokens cached, first token in 44 ms, of 3 candidates`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} of {} tokens cached, first token in {:.0} ms, of {} candidate{}",
            self.why.as_str(),
            self.cached_tokens,
            self.cached_tokens + self.uncached_tokens,
            self.estimated_s * 1e3,
            self.candidates.len(),
            if self.candidates.len() == 1 { "" } else { "s" },
        )
    }
}

/// Why a request could not be given to a replica.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PlaceError {
    #[error("no ready replica serves `{model}`")]
    NoWorker { model: ModelName },
    #[error(
        "every replica of `{model}` has at least {queued} prompt tokens waiting, \
         the limit (`router.queued-tokens-max`) is {limit}"
    )]
    Saturated { model: ModelName, queued: u64, limit: u64, drain_in: Duration },
}

impl Classify for PlaceError {
    fn class(&self) -> Class {
        match self {
            Self::NoWorker { .. } => Class::new(Code::ModelUnavailable, Blame::Us),
            Self::Saturated { drain_in, .. } => {
                Class::new(Code::Overloaded, Blame::Us).retry(Retry::After(*drain_in))
            }
        }
    }
}

/// Chooses the replica with the lowest cost in seconds. Pure: same view, ask and seed, same decision.
///
/// For each replica that is up, was not tried and is not full, with `r` its prefill rate in tokens per second:
///
/// | term    | seconds                               | meaning                                              |
/// |---------|---------------------------------------|------------------------------------------------------|
/// | wait    | `queued_tokens / r`                   | what was handed over before has to be computed first |
/// | prefill | `uncached / r`, counted `1 + λ` times | the prompt itself; once more for those who wait behind |
/// | decode  | `requests · output_tokens / r`        | each neighbour adds one token to each of our steps   |
///
/// A neighbour's token is priced like a prefill token because a step is bound by compute once it mixes both; on an
/// accelerator whose decode is bound by memory this overestimates the term a little, which spreads requests.
///
/// A replica that was never measured is taken to be as fast as the fastest, so that it is tried. Equal costs are
/// drawn by lot from `seed`: many routers with the same view don't all choose the same replica.
///
/// O(replicas). Source of the form of the cost: Dynamo's KV router (prefill and decode load) and SMG's expected wait,
/// both in units of their own; here in seconds, so that no weights are left to tune.
pub fn decide(view: &FleetView<'_>, ask: &Ask<'_>, seed: u64) -> Result<Decision, PlaceError> {
    let fastest = view
        .replicas
        .iter()
        .filter_map(|r| r.speed.last_measured())
        .fold(None, |max: Option<f64>, rate| Some(max.map_or(rate, |max| max.max(rate))));
    let prior = fastest.unwrap_or(PREFILL_RATE_PRIOR);

    let mut candidates = Vec::with_capacity(view.replicas.len());
    let mut full: Option<(u64, Duration)> = None;
    for (position, replica) in view.replicas.iter().enumerate() {
        if replica.state != ReplicaState::Up || ask.tried.contains(&position) {
            continue;
        }
        let rate = replica.speed.rate(view.now, prior);
        let candidate = price(position, replica, ask, rate);
        let queued = replica.load.queued_tokens;
        let after = queued.saturating_add(u64::from(candidate.uncached_tokens));
        if queued > 0 && after > view.queued_tokens_max {
            let over = after - view.queued_tokens_max;
            // At most the whole queue has to drain: into an empty replica every prompt goes.
            let drain_s = over.min(queued) as f64 / rate;
            let drain_in = Duration::from_secs_f64(drain_s.min(600.0));
            full = Some(full.map_or((queued, drain_in), |(q, d)| (q.min(queued), d.min(drain_in))));
            continue;
        }
        candidates.push(candidate);
    }

    let Some(lowest) = candidates.iter().map(Candidate::cost_s).reduce(f64::min) else {
        return Err(match full {
            Some((queued, drain_in)) => PlaceError::Saturated {
                model: view.model.clone(),
                queued,
                limit: view.queued_tokens_max,
                drain_in,
            },
            None => PlaceError::NoWorker { model: view.model.clone() },
        });
    };
    let is_lowest = |c: &&Candidate| c.cost_s() <= lowest * (1.0 + TIE);
    let ties = candidates.iter().filter(is_lowest).count();
    let lot = (mix(seed) % ties as u64) as usize;
    let chosen = *candidates
        .iter()
        .filter(is_lowest)
        .nth(lot)
        .expect("the lowest cost is one of the candidates' costs");

    let most_cached = candidates.iter().map(|c| c.cached_blocks).max().unwrap_or(0);
    let why = if candidates.len() == 1 {
        Why::Only
    } else if ties > 1 {
        Why::Tie
    } else if most_cached > 0 && chosen.cached_blocks == most_cached {
        Why::Prefix
    } else {
        Why::Load
    };
    Ok(Decision {
        replica: chosen.replica,
        cached_blocks: chosen.cached_blocks,
        cached_tokens: ask.prompt_tokens - chosen.uncached_tokens,
        uncached_tokens: chosen.uncached_tokens,
        estimated_s: chosen.wait_s + chosen.prefill_s,
        why,
        candidates,
    })
}

fn price(position: usize, replica: &ReplicaView, ask: &Ask<'_>, rate: f64) -> Candidate {
    let matched = ask.matched_blocks.get(position).copied().unwrap_or(0);
    // The last token is always computed: its logits are the first output.
    let cached_tokens = matched.saturating_mul(ask.block_tokens).min(ask.prompt_tokens.saturating_sub(1));
    let uncached_tokens = ask.prompt_tokens - cached_tokens;
    Candidate {
        replica: position,
        cached_blocks: matched,
        uncached_tokens,
        wait_s: replica.load.queued_tokens as f64 / rate,
        prefill_s: f64::from(uncached_tokens) / rate,
        decode_s: f64::from(replica.load.requests) * f64::from(ask.output_tokens) / rate,
    }
}

/// SplitMix64's finalizer: neighbouring seeds give unrelated lots.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests;
