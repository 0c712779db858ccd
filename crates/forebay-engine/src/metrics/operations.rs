//! What an operator has to know and vLLM does not say: loads, engines that have ended, steps that failed, constraints that
//! were refused, batches of texts to embed.

use std::time::Duration;

use forebay_grammar::GrammarError;
use forebay_observe::metrics::{
    GaugeVec, Histogram, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts,
};
use forebay_observe::{MetricError, Registry};

use super::LABELS;

/// Texts of a batch: `engine.max-num-seqs` is 64 by default.
const TEXTS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

#[derive(Clone)]
pub(super) struct Operations {
    pub loads: LoadMetrics,
    alive: IntGaugeVec,
    failed_steps: IntCounterVec,
    constraints: IntCounterVec,
    batch_texts: HistogramVec,
    queued_tokens: IntGaugeVec,
    pub stuck: IntCounterVec,
}

/// How a step failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepFailure {
    /// Its requests failed, and the engine goes on.
    Step,
    /// The executor runs nothing any more, and the engine has ended: ranks were lost.
    Executor,
}

impl StepFailure {
    fn as_str(self) -> &'static str {
        match self {
            Self::Step => "step",
            Self::Executor => "executor",
        }
    }
}

/// Why a constraint was refused.
fn refusal(error: &GrammarError) -> &'static str {
    match error {
        GrammarError::Constraint(_) => "invalid",
        GrammarError::Matching(_) => "not_followed",
        GrammarError::NoEnd | GrammarError::Vocabulary(_) => "vocabulary",
        GrammarError::Thread(_) => "engine",
    }
}

const REFUSALS: [&str; 4] = ["invalid", "not_followed", "vocabulary", "engine"];

impl Operations {
    pub fn register(registry: &Registry) -> Result<Self, MetricError> {
        let labels = |more: &'static str| [LABELS[0], LABELS[1], more];
        Ok(Self {
            loads: LoadMetrics::register(registry)?,
            alive: registry.gauges(
                "forebay_engine_alive",
                "1 while the thread of an engine runs. 0 beside forebay_engine_loaded 1 is an engine that has died: unload it and load it again.",
                LABELS,
            )?,
            failed_steps: registry.counters(
                "forebay_engine_failed_steps_total",
                "Steps that failed, by what was lost: step (its requests) or executor (the engine; a rank has ended).",
                &labels("lost"),
            )?,
            constraints: registry.counters(
                "forebay_engine_constraints_refused_total",
                "Constraints of output that were refused, by reason: invalid (does not compile), not_followed (too costly, or at odds with allowed_token_ids), vocabulary (the model's can't be constrained) or engine (no thread to compile it on).",
                &labels("reason"),
            )?,
            batch_texts: registry.histograms(
                "forebay_engine_embed_batch_texts",
                "Texts that an embedding engine computed together.",
                TEXTS,
                LABELS,
            )?,
            queued_tokens: registry.gauges(
                "forebay_engine_embed_queued_tokens",
                "Tokens of texts that wait to be embedded: what engine.max-num-queued-tokens limits.",
                LABELS,
            )?,
            stuck: registry.counters(
                "forebay_engine_stuck_steps_total",
                "Steps that took longer than engine.watchdog.",
                LABELS,
            )?,
        })
    }

    /// Says that an engine lives, until the value is dropped: with its thread, however that ends.
    pub fn alive(&self, model: &str) -> Alive {
        let gauge = self.alive.with_label_values(&[model, "0"]);
        gauge.set(1);
        Alive(gauge)
    }

    pub fn constraints(&self, model: &str) -> ConstraintMetrics {
        let metrics = ConstraintMetrics { family: self.constraints.clone(), model: model.to_owned() };
        for reason in REFUSALS {
            metrics.family.with_label_values(&[model, "0", reason]);
        }
        metrics
    }

    pub fn on_failed_step(&self, model: &str, failure: StepFailure) {
        self.failed_steps.with_label_values(&[model, "0", failure.as_str()]).inc();
    }

    /// What only an embedding engine has.
    pub fn embedding(&self, model: &str) -> EmbeddingSeries {
        EmbeddingSeries {
            batch_texts: self.batch_texts.with_label_values(&[model, "0"]),
            queued_tokens: self.queued_tokens.with_label_values(&[model, "0"]),
        }
    }

    /// Series exist before their first event.
    pub fn begin(&self, model: &str) {
        for failure in [StepFailure::Step, StepFailure::Executor] {
            self.failed_steps.with_label_values(&[model, "0", failure.as_str()]);
        }
    }
}

pub(super) struct EmbeddingSeries {
    pub batch_texts: Histogram,
    pub queued_tokens: IntGauge,
}

pub(super) struct Alive(IntGauge);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.set(0);
    }
}

/// Counts the constraints that one engine refuses.
#[derive(Clone)]
pub(crate) struct ConstraintMetrics {
    family: IntCounterVec,
    model: String,
}

impl ConstraintMetrics {
    pub fn on_refused(&self, error: &GrammarError) {
        self.family.with_label_values(&[self.model.as_str(), "0", refusal(error)]).inc();
    }
}

/// Loads of models.
#[derive(Clone)]
pub struct LoadMetrics {
    loaded: IntGaugeVec,
    loads: IntCounterVec,
    seconds: GaugeVec,
}

impl LoadMetrics {
    fn register(registry: &Registry) -> Result<Self, MetricError> {
        let seconds = Opts::new(
            "forebay_engine_load_seconds",
            "What the last load that succeeded took, with the fetch of the model where it was not there.",
        );
        Ok(Self {
            loaded: registry.gauges(
                "forebay_engine_loaded",
                "1 while a configured model is in memory, 0 while it is not.",
                &["model_name"],
            )?,
            loads: registry.counters(
                "forebay_engine_loads_total",
                "Attempts to load a model, by outcome: ok or failed.",
                &["model_name", "outcome"],
            )?,
            seconds: registry.add(GaugeVec::new(seconds, &["model_name"]))?,
        })
    }

    /// A model is configured. Its series are there before its first load.
    pub fn on_configured(&self, model: &str) {
        self.loaded.with_label_values(&[model]).set(0);
        for outcome in ["ok", "failed"] {
            self.loads.with_label_values(&[model, outcome]);
        }
    }

    pub fn on_loaded(&self, model: &str, took: Duration) {
        self.loads.with_label_values(&[model, "ok"]).inc();
        self.seconds.with_label_values(&[model]).set(took.as_secs_f64());
        self.loaded.with_label_values(&[model]).set(1);
    }

    pub fn on_load_failed(&self, model: &str) {
        self.loads.with_label_values(&[model, "failed"]).inc();
    }

    pub fn on_unloaded(&self, model: &str) {
        self.loaded.with_label_values(&[model]).set(0);
    }
}
