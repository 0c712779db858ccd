//! The engine's metrics: those of vLLM under its names, labels and buckets, so that dashboards and routers made for vLLM
//! read them, and under names of our own what it does not tell.
//!
//! Source: vLLM 0.32 and 0.33, `vllm/v1/metrics/loggers.py`; `tests/fixtures/vllm-metrics.json` is what it exports.

mod buckets;
mod cache_info;
mod operations;
mod series;
#[cfg(test)]
mod tests;

use forebay_observe::metrics::{
    FittedHistograms, GaugeVec, Histogram, HistogramVec, IntCounterVec, IntGaugeVec, Opts,
};
use forebay_observe::{MetricError, Registry};

use crate::kv_events::KvEventFamilies;
use cache_info::CacheInfo;
use operations::Operations;

pub use cache_info::KvInfo;
pub(crate) use operations::ConstraintMetrics;
pub use operations::{LoadMetrics, StepFailure};
pub(crate) use series::LoadGauges;
pub use series::{EngineLoad, ModelMetrics, Rejection, RequestRecord, StepRecord};

const LABELS: &[&str] = &["model_name", "engine"];

/// Why sequences end, as vLLM names it. It ends one that repeats itself; here there is no such limit.
const FINISHED: [&str; 5] = ["stop", "length", "abort", "error", "repetition"];
/// Where keys and values of prompts come from. They are never sent by another process here.
const SOURCES: [&str; 3] = ["local_compute", "local_cache_hit", "external_kv_transfer"];
/// What memory the cached ones were in. Here all of it is what vLLM calls the device's.
const TIERS: [&str; 5] = ["device", "host", "p2p", "disk", "external_unspecified"];

/// Names that vLLM once had for what has another name now, or had `gpu` in it.
const FORMER_NAMES: [(&str, &str); 4] = [
    ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    ("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total"),
    ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"),
    ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
];

/// Families shared by all engines of the process; [`EngineMetrics::for_model`] gives one engine its series.
#[derive(Clone)]
pub struct EngineMetrics {
    usage: GaugeVec,
    running: IntGaugeVec,
    waiting: IntGaugeVec,
    waiting_by_reason: IntGaugeVec,
    sleep_state: IntGaugeVec,
    cache_info: CacheInfo,
    counters: Counters<IntCounterVec>,
    finished: IntCounterVec,
    rejections: IntCounterVec,
    by_source: IntCounterVec,
    cached_by_tier: IntCounterVec,
    histograms: Histograms<HistogramVec>,
    token_histograms: TokenHistograms<FittedHistograms>,
    operations: Operations,
    pub(crate) kv_events: KvEventFamilies,
}

#[derive(Clone)]
struct Counters<T> {
    prefix_queries: T,
    prefix_hits: T,
    preemptions: T,
    prompt_tokens: T,
    prompt_tokens_cached: T,
    generation_tokens: T,
}

#[derive(Clone)]
struct Histograms<T> {
    ttft: T,
    itl: T,
    tpot: T,
    e2e: T,
    queue: T,
    inference: T,
    prefill: T,
    decode: T,
    n: T,
    iteration: T,
    preemptions: T,
}

/// Counts of tokens, whose bounds depend on the model.
#[derive(Clone)]
struct TokenHistograms<T> {
    prompt: T,
    generation: T,
    most_generated: T,
    max_tokens: T,
    prefill_computed: T,
}

impl EngineMetrics {
    pub fn register(registry: &Registry) -> Result<Self, MetricError> {
        let usage = Opts::new("vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.");
        let labels = |more: &'static str| [LABELS[0], LABELS[1], more];
        Ok(Self {
            usage: registry.add(GaugeVec::new(usage, LABELS))?,
            running: registry.gauges(
                "vllm:num_requests_running",
                "Number of requests in model execution batches.",
                LABELS,
            )?,
            waiting: registry.gauges(
                "vllm:num_requests_waiting",
                "Number of requests waiting to be processed.",
                LABELS,
            )?,
            waiting_by_reason: registry.gauges(
                "vllm:num_requests_waiting_by_reason",
                "Number of waiting requests by reason: capacity, or deferred while the engine is paused.",
                &labels("reason"),
            )?,
            sleep_state: registry.gauges(
                "vllm:engine_sleep_state",
                "Whether the engine is awake: it always is.",
                &labels("sleep_state"),
            )?,
            cache_info: CacheInfo::register(registry)?,
            counters: Counters::register(registry)?,
            finished: registry.counters(
                "vllm:request_success_total",
                "Count of successfully processed requests.",
                &labels("finished_reason"),
            )?,
            rejections: registry.counters(
                "vllm:admission_rejections_total",
                "Number of admission attempts rejected by a queue limit, by reason.",
                &["model_name", "reason"],
            )?,
            by_source: registry.counters(
                "vllm:prompt_tokens_by_source_total",
                "Number of prompt tokens by where their keys and values came from.",
                &labels("source"),
            )?,
            cached_by_tier: registry.counters(
                "vllm:prompt_tokens_cached_by_source_total",
                "Prefix cache hits in tokens by the memory that they were in, counted at admission: always device, the memory of the engine.",
                &labels("source"),
            )?,
            histograms: Histograms::register(registry)?,
            token_histograms: TokenHistograms::register(registry)?,
            operations: Operations::register(registry)?,
            kv_events: KvEventFamilies::register(registry)?,
        })
    }

    /// Renders what vLLM has renamed under its former names, too: for old dashboards.
    pub fn show_former_names(registry: &Registry) {
        for (name, former) in FORMER_NAMES {
            registry.alias(name, former);
        }
    }

    /// Loads of models, for whoever does them.
    pub fn loads(&self) -> &LoadMetrics {
        &self.operations.loads
    }

    /// The series of one engine.
    pub fn for_model(&self, model: &str, kv: &KvInfo) -> ModelMetrics {
        self.cache_info.add(model, kv);
        self.series(model, kv.model_len)
    }

    /// The series of one engine that has no KV cache, and takes texts of `model_len` tokens.
    pub fn for_encoder(&self, model: &str, model_len: u32) -> ModelMetrics {
        let mut series = self.series(model, model_len);
        series.embedding = Some(self.operations.embedding(model));
        series
    }
}

impl Counters<IntCounterVec> {
    fn register(registry: &Registry) -> Result<Self, MetricError> {
        let counter = |name: &str, help: &str| registry.counters(name, help, LABELS);
        Ok(Self {
            prefix_queries: counter(
                "vllm:prefix_cache_queries_total",
                "Prefix cache queries, in terms of number of queried tokens.",
            )?,
            prefix_hits: counter(
                "vllm:prefix_cache_hits_total",
                "Prefix cache hits, in terms of number of cached tokens.",
            )?,
            preemptions: counter(
                "vllm:num_preemptions_total",
                "Cumulative number of preemptions from the engine.",
            )?,
            prompt_tokens: counter("vllm:prompt_tokens_total", "Number of prefill tokens processed.")?,
            prompt_tokens_cached: counter(
                "vllm:prompt_tokens_cached_total",
                "Number of prompt tokens taken from the prefix cache.",
            )?,
            generation_tokens: counter(
                "vllm:generation_tokens_total",
                "Number of generation tokens processed.",
            )?,
        })
    }
}

impl Histograms<HistogramVec> {
    fn register(registry: &Registry) -> Result<Self, MetricError> {
        let histogram =
            |name: &str, help: &str, buckets: &[f64]| registry.histograms(name, help, buckets, LABELS);
        Ok(Self {
            ttft: histogram(
                "vllm:time_to_first_token_seconds",
                "Histogram of time to first token in seconds.",
                buckets::TTFT,
            )?,
            itl: histogram(
                "vllm:inter_token_latency_seconds",
                "Histogram of inter-token latency in seconds.",
                buckets::ITL,
            )?,
            tpot: histogram(
                "vllm:request_time_per_output_token_seconds",
                "Histogram of time_per_output_token_seconds per request.",
                buckets::ITL,
            )?,
            e2e: histogram(
                "vllm:e2e_request_latency_seconds",
                "Histogram of e2e request latency in seconds.",
                buckets::REQUEST,
            )?,
            queue: histogram(
                "vllm:request_queue_time_seconds",
                "Histogram of time spent in WAITING phase for request.",
                buckets::REQUEST,
            )?,
            inference: histogram(
                "vllm:request_inference_time_seconds",
                "Histogram of time spent in RUNNING phase for request.",
                buckets::REQUEST,
            )?,
            prefill: histogram(
                "vllm:request_prefill_time_seconds",
                "Histogram of time spent in PREFILL phase for request.",
                buckets::REQUEST,
            )?,
            decode: histogram(
                "vllm:request_decode_time_seconds",
                "Histogram of time spent in DECODE phase for request.",
                buckets::REQUEST,
            )?,
            n: histogram("vllm:request_params_n", "Histogram of the n request parameter.", buckets::N)?,
            iteration: histogram(
                "vllm:iteration_tokens_total",
                "Histogram of number of tokens per engine_step.",
                buckets::ITERATION,
            )?,
            preemptions: histogram(
                "vllm:request_num_preemptions",
                "Histogram of the number of times a request was preempted.",
                buckets::PREEMPTIONS,
            )?,
        })
    }
}

impl TokenHistograms<FittedHistograms> {
    fn register(registry: &Registry) -> Result<Self, MetricError> {
        let histogram = |name: &str, help: &str| registry.fitted_histograms(name, help, LABELS);
        Ok(Self {
            prompt: histogram("vllm:request_prompt_tokens", "Number of prefill tokens processed.")?,
            generation: histogram(
                "vllm:request_generation_tokens",
                "Number of generation tokens processed.",
            )?,
            most_generated: histogram(
                "vllm:request_max_num_generation_tokens",
                "Histogram of the most generation tokens of any choice of a request.",
            )?,
            max_tokens: histogram(
                "vllm:request_params_max_tokens",
                "Histogram of the max_tokens request parameter.",
            )?,
            prefill_computed: histogram(
                "vllm:request_prefill_kv_computed_tokens",
                "Histogram of new KV tokens computed during prefill, without cached tokens.",
            )?,
        })
    }

    fn fit(&self, labels: &[&str], model_len: u32) -> TokenHistograms<Histogram> {
        let bounds = buckets::tokens(model_len);
        let fit = |family: &FittedHistograms| family.fit(labels, &bounds);
        TokenHistograms {
            prompt: fit(&self.prompt),
            generation: fit(&self.generation),
            most_generated: fit(&self.most_generated),
            max_tokens: fit(&self.max_tokens),
            prefill_computed: fit(&self.prefill_computed),
        }
    }
}
