//! The series of one engine, and what is counted into them.

use std::time::Duration;

use forebay_observe::metrics::{Gauge, Histogram, IntCounter, IntGauge};
use forebay_types::FinishReason;

use super::operations::{Alive, ConstraintMetrics, EmbeddingSeries, StepFailure};
use super::{Counters, EngineMetrics, FINISHED, Histograms, SOURCES, TIERS, TokenHistograms};

/// The queue limit that a request hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejection {
    Requests,
    Tokens,
}

impl Rejection {
    fn as_str(self) -> &'static str {
        match self {
            Self::Requests => "max_num_queued_reqs",
            Self::Tokens => "max_num_queued_tokens",
        }
    }
}

/// The series of one engine. Dropped with its thread: then nothing runs or waits any more.
pub struct ModelMetrics {
    model: String,
    load: LoadGauges,
    waiting_for_room: IntGauge,
    waiting_for_resume: IntGauge,
    computed: IntCounter,
    cache_hit: IntCounter,
    cached_on_device: IntCounter,
    counters: Counters<IntCounter>,
    histograms: Histograms<Histogram>,
    token_histograms: TokenHistograms<Histogram>,
    constraints: ConstraintMetrics,
    pub(super) embedding: Option<EmbeddingSeries>,
    families: EngineMetrics,
    _alive: Alive,
}

/// How much an engine has to do, as routers ask for it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EngineLoad {
    pub running: u64,
    pub waiting: u64,
    /// From 0 to 1.
    pub kv_usage: f64,
}

/// The gauges that [`EngineLoad`] is read from.
#[derive(Clone)]
pub(crate) struct LoadGauges {
    usage: Gauge,
    running: IntGauge,
    waiting: IntGauge,
}

impl LoadGauges {
    pub(crate) fn read(&self) -> EngineLoad {
        let count = |gauge: &IntGauge| u64::try_from(gauge.get()).unwrap_or(0);
        EngineLoad {
            running: count(&self.running),
            waiting: count(&self.waiting),
            kv_usage: self.usage.get(),
        }
    }
}

/// What the engine knows after a step.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepRecord {
    pub running: usize,
    pub waiting: usize,
    /// Waiting for the end of a pause.
    pub parked: usize,
    pub kv_usage: f64,
    /// Tokens of this step; 0 for an idle update.
    pub tokens: usize,
    pub sampled_tokens: usize,
    /// Since the last record.
    pub preemptions: u64,
    pub prefix_queries: u64,
    pub prefix_hits: u64,
}

/// One finished sequence. Times are durations between its milestones; `None` where it did not get that far.
#[derive(Debug, Clone, Copy)]
pub struct RequestRecord {
    pub e2e: Duration,
    pub queue: Option<Duration>,
    pub prefill: Option<Duration>,
    pub decode: Option<Duration>,
    pub prompt_tokens: u32,
    /// Of the prompt; `None` where its first token was not reached.
    pub cached_tokens: Option<u32>,
    pub generation_tokens: u32,
    /// `None` for texts to embed.
    pub max_tokens: Option<u32>,
    pub preemptions: u32,
    pub reason: FinishReason,
}

impl EngineMetrics {
    pub(super) fn series(&self, model: &str, model_len: u32) -> ModelMetrics {
        let labels = [model, "0"];
        let and = |more: &'static str| [model, "0", more];
        // Series that dashboards rate() must exist before their first event, also those that never have one here.
        for reason in FINISHED {
            self.finished.with_label_values(&and(reason));
        }
        for source in SOURCES {
            self.by_source.with_label_values(&and(source));
        }
        for tier in TIERS {
            self.cached_by_tier.with_label_values(&and(tier));
        }
        for reason in [Rejection::Requests, Rejection::Tokens] {
            self.rejections.with_label_values(&[model, reason.as_str()]);
        }
        for (state, is_so) in [("awake", 1), ("weights_offloaded", 0), ("discard_all", 0)] {
            self.sleep_state.with_label_values(&and(state)).set(is_so);
        }
        self.operations.begin(model);
        ModelMetrics {
            model: model.to_owned(),
            load: LoadGauges {
                usage: self.usage.with_label_values(&labels),
                running: self.running.with_label_values(&labels),
                waiting: self.waiting.with_label_values(&labels),
            },
            waiting_for_room: self.waiting_by_reason.with_label_values(&and("capacity")),
            waiting_for_resume: self.waiting_by_reason.with_label_values(&and("deferred")),
            computed: self.by_source.with_label_values(&and("local_compute")),
            cache_hit: self.by_source.with_label_values(&and("local_cache_hit")),
            cached_on_device: self.cached_by_tier.with_label_values(&and("device")),
            counters: self.counters.map(|family| family.with_label_values(&labels)),
            histograms: self.histograms.map(|family| family.with_label_values(&labels)),
            token_histograms: self.token_histograms.fit(&labels, model_len),
            constraints: self.operations.constraints(model),
            embedding: None,
            _alive: self.operations.alive(model),
            families: self.clone(),
        }
    }
}

impl ModelMetrics {
    pub(crate) fn stuck_steps(&self) -> IntCounter {
        self.families.operations.stuck.with_label_values(&[self.model.as_str(), "0"])
    }

    pub(crate) fn load_gauges(&self) -> LoadGauges {
        self.load.clone()
    }

    /// For whoever compiles or follows them.
    pub(crate) fn constraints(&self) -> &ConstraintMetrics {
        &self.constraints
    }

    pub fn on_step(&self, step: &StepRecord) {
        self.load.running.set(step.running as i64);
        self.load.waiting.set((step.waiting + step.parked) as i64);
        self.load.usage.set(step.kv_usage);
        self.waiting_for_room.set(step.waiting as i64);
        self.waiting_for_resume.set(step.parked as i64);
        self.counters.preemptions.inc_by(step.preemptions);
        self.counters.prefix_queries.inc_by(step.prefix_queries);
        self.counters.prefix_hits.inc_by(step.prefix_hits);
        self.cached_on_device.inc_by(step.prefix_hits);
        if step.tokens > 0 {
            self.histograms.iteration.observe(step.tokens as f64);
            self.counters.generation_tokens.inc_by(step.sampled_tokens as u64);
        }
    }

    pub fn on_failed_step(&self, failure: StepFailure) {
        self.families.operations.on_failed_step(&self.model, failure);
    }

    /// Of an embedding engine: `texts` are computed together.
    pub fn on_batch(&self, texts: usize) {
        if let Some(embedding) = &self.embedding {
            embedding.batch_texts.observe(texts as f64);
        }
    }

    /// Of an embedding engine: the tokens of what is not computed yet.
    pub fn on_queue(&self, tokens: u64) {
        if let Some(embedding) = &self.embedding {
            embedding.queued_tokens.set(tokens as i64);
        }
    }

    /// A prompt counts whole, cached or not, when its prefill is done: what vLLM counts, so that cached ÷ all is the
    /// hit rate.
    pub fn on_first_token(&self, since_arrival: Duration, prompt_tokens: u32, cached_tokens: u32) {
        self.cache_hit.inc_by(u64::from(cached_tokens));
        self.computed.inc_by(u64::from(prompt_tokens.saturating_sub(cached_tokens)));
        self.histograms.ttft.observe(since_arrival.as_secs_f64());
        self.counters.prompt_tokens.inc_by(u64::from(prompt_tokens));
        self.counters.prompt_tokens_cached.inc_by(u64::from(cached_tokens));
    }

    pub fn on_next_token(&self, since_last: Duration) {
        self.histograms.itl.observe(since_last.as_secs_f64());
    }

    pub fn on_rejected(&self, reason: Rejection) {
        self.families.rejections.with_label_values(&[self.model.as_str(), reason.as_str()]).inc();
    }

    pub fn on_finished(&self, request: &RequestRecord) {
        let (h, tokens) = (&self.histograms, &self.token_histograms);
        h.e2e.observe(request.e2e.as_secs_f64());
        if let Some(queue) = request.queue {
            h.queue.observe(queue.as_secs_f64());
        }
        // An aborted sequence without a token has no prefill time; a zero would pull the percentiles down.
        if let (Some(prefill), Some(decode)) = (request.prefill, request.decode) {
            h.prefill.observe(prefill.as_secs_f64());
            h.decode.observe(decode.as_secs_f64());
            h.inference.observe((prefill + decode).as_secs_f64());
            // The first token is prefill's. Who has no other counts as 0, as in vLLM: every finished sequence is in it.
            let others = request.generation_tokens.saturating_sub(1).max(1);
            h.tpot.observe(decode.as_secs_f64() / f64::from(others));
        }
        h.preemptions.observe(f64::from(request.preemptions));
        tokens.prompt.observe(f64::from(request.prompt_tokens));
        if let Some(cached) = request.cached_tokens {
            tokens.prefill_computed.observe(f64::from(request.prompt_tokens.saturating_sub(cached)));
        }
        tokens.generation.observe(f64::from(request.generation_tokens));
        // As in vLLM, where 0 is none.
        if let Some(max_tokens) = request.max_tokens.filter(|&max_tokens| max_tokens > 0) {
            tokens.max_tokens.observe(f64::from(max_tokens));
        }
        // vLLM's engine stops there, and knows nothing of tools.
        let reason = match request.reason {
            FinishReason::ToolCalls => FinishReason::Stop.as_str(),
            other => other.as_str(),
        };
        self.families.finished.with_label_values(&[self.model.as_str(), "0", reason]).inc();
    }

    /// All `n` choices of a prompt are finished; none has more tokens than `most_generated`.
    pub fn on_prompt_finished(&self, n: u32, most_generated: u32) {
        self.histograms.n.observe(f64::from(n));
        self.token_histograms.most_generated.observe(f64::from(most_generated));
    }
}

impl Drop for ModelMetrics {
    fn drop(&mut self) {
        self.on_step(&StepRecord::default());
        self.on_queue(0);
        self.families.cache_info.remove(&self.model);
    }
}

impl<T> Counters<T> {
    fn map<U>(&self, f: impl Fn(&T) -> U) -> Counters<U> {
        Counters {
            prefix_queries: f(&self.prefix_queries),
            prefix_hits: f(&self.prefix_hits),
            preemptions: f(&self.preemptions),
            prompt_tokens: f(&self.prompt_tokens),
            prompt_tokens_cached: f(&self.prompt_tokens_cached),
            generation_tokens: f(&self.generation_tokens),
        }
    }
}

impl<T> Histograms<T> {
    fn map<U>(&self, f: impl Fn(&T) -> U) -> Histograms<U> {
        Histograms {
            ttft: f(&self.ttft),
            itl: f(&self.itl),
            tpot: f(&self.tpot),
            e2e: f(&self.e2e),
            queue: f(&self.queue),
            inference: f(&self.inference),
            prefill: f(&self.prefill),
            decode: f(&self.decode),
            n: f(&self.n),
            iteration: f(&self.iteration),
            preemptions: f(&self.preemptions),
        }
    }
}
