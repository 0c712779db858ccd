//! The metrics registry: each layer registers its own metrics, the admin listener renders all of them.
//!
//! Names follow the field (`vllm:*` for the engine, `forebay_<layer>_*` for the rest). Labels are bounded by
//! configuration (models, replicas, consumers), never by what a client sends.

use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::Mutex;

pub use crate::series::{FittedHistograms, Summaries};
use crate::text;
pub use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts,
};

/// Seconds, for what a whole request or its first token takes.
pub const LATENCY_BUCKETS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
];

/// A name that was registered twice, or one that Prometheus does not allow: a defect, found at start.
#[derive(Debug, thiserror::Error)]
#[error("metric can't be registered: {0}")]
pub struct MetricError(#[from] prometheus::Error);

/// All metrics of the process. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    prometheus: prometheus::Registry,
    families: Arc<Mutex<Vec<Family>>>,
    /// Names of families, and further names that they have.
    aliases: Arc<Mutex<BTreeSet<(String, String)>>>,
}

/// One registered family, for the generated reference.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Family {
    pub name: String,
    /// `counter`, `gauge`, `histogram` or `summary`.
    pub kind: &'static str,
    pub labels: Vec<String>,
    pub help: String,
}

/// A kind of metric that can be registered.
pub trait Metric: prometheus::core::Collector + Clone + 'static {
    const KIND: &'static str;
}

macro_rules! kinds {
    ($($kind:literal: $($metric:ty),+;)+) => {
        $($(impl Metric for $metric {
            const KIND: &'static str = $kind;
        })+)+
    };
}

kinds! {
    "counter": IntCounter, IntCounterVec;
    "gauge": Gauge, GaugeVec, IntGauge, IntGaugeVec;
    "histogram": Histogram, HistogramVec, FittedHistograms;
    "summary": Summaries;
}

impl Registry {
    pub fn new() -> Self {
        Self::default()
    }

    /// Registers a collector and returns it: `registry.add(IntCounter::new(...))?`.
    pub fn add<M: Metric>(&self, metric: prometheus::Result<M>) -> Result<M, MetricError> {
        let metric = metric?;
        self.prometheus.register(Box::new(metric.clone()))?;
        let families = metric.desc().into_iter().map(|desc| Family {
            name: desc.fq_name.clone(),
            kind: M::KIND,
            labels: desc.variable_labels.clone(),
            help: desc.help.clone(),
        });
        self.families.lock().extend(families);
        Ok(metric)
    }

    /// What is known of the process itself, under the names that Prometheus' own clients have (`process_*`): memory, processor
    /// time, open files. Nothing where the system does not tell.
    pub fn add_process(&self) -> Result<(), MetricError> {
        #[cfg(target_os = "linux")]
        {
            use prometheus::core::Collector;
            let process = prometheus::process_collector::ProcessCollector::for_self();
            let family = |desc: &prometheus::core::Desc| Family {
                name: desc.fq_name.clone(),
                kind: if desc.fq_name.ends_with("_total") { "counter" } else { "gauge" },
                labels: Vec::new(),
                help: desc.help.clone(),
            };
            let families: Vec<Family> = process.desc().into_iter().map(family).collect();
            self.prometheus.register(Box::new(process))?;
            self.families.lock().extend(families);
        }
        Ok(())
    }

    pub fn counter(&self, name: &str, help: &str) -> Result<IntCounter, MetricError> {
        self.add(IntCounter::new(name, help))
    }

    pub fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, MetricError> {
        self.add(IntCounterVec::new(Opts::new(name, help), labels))
    }

    pub fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, MetricError> {
        self.add(IntGauge::new(name, help))
    }

    pub fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, MetricError> {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    pub fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Result<Histogram, MetricError> {
        self.add(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())))
    }

    pub fn histograms(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
        labels: &[&str],
    ) -> Result<HistogramVec, MetricError> {
        self.add(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels))
    }

    /// Histograms whose series have bounds of their own.
    pub fn fitted_histograms(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<FittedHistograms, MetricError> {
        self.add(FittedHistograms::new(name, help, labels))
    }

    /// Counts and sums, without quantiles.
    pub fn summaries(&self, name: &str, help: &str, labels: &[&str]) -> Result<Summaries, MetricError> {
        self.add(Summaries::new(name, help, labels))
    }

    /// Renders the family `name` a second time, under another name: for dashboards that know it by that.
    pub fn alias(&self, name: &str, other: &str) {
        self.aliases.lock().insert((name.to_owned(), other.to_owned()));
    }

    /// Prometheus text format 0.0.4.
    pub fn render(&self) -> String {
        let mut families = self.prometheus.gather();
        for (name, other) in &*self.aliases.lock() {
            let copy = families.iter().find(|family| family.name() == name).cloned();
            families.extend(copy.map(|mut family| {
                family.set_name(other.clone());
                family
            }));
        }
        text::render(&families)
    }

    /// `content-type` of [`Registry::render`].
    pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

    /// Every registered family, sorted, also those without a series yet. The metrics reference is made from it.
    pub fn families(&self) -> Vec<Family> {
        let mut families = self.families.lock().clone();
        families.sort();
        families
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vllm_names_render() {
        let registry = Registry::new();
        let hits = registry.counters("vllm:prompt_tokens_total", "Prompt tokens.", &["model_name"]);
        hits.expect("a name with a colon is allowed").with_label_values(&["m"]).inc_by(3);
        assert_eq!(
            registry.render(),
            "# HELP vllm:prompt_tokens_total Prompt tokens.\n# TYPE vllm:prompt_tokens_total counter\n\
             vllm:prompt_tokens_total{model_name=\"m\"} 3\n"
        );
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_process_is_told_of() {
        let registry = Registry::new();
        registry.add_process().expect("registers once");
        let text = registry.render();
        let value = |name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().expect("a number")
        };
        assert!(value("process_resident_memory_bytes") > 1e5);
        assert!(value("process_open_fds") >= 1.0 && value("process_max_fds") >= value("process_open_fds"));
        assert!(value("process_cpu_seconds_total") >= 0.0 && value("process_start_time_seconds") > 1e9);
        let kinds: Vec<&str> = registry.families().iter().map(|family| family.kind).collect();
        assert_eq!(kinds.iter().filter(|kind| **kind == "counter").count(), 1, "{kinds:?}");
    }

    #[test]
    fn a_family_can_have_a_second_name() {
        let registry = Registry::new();
        registry.counter("new_total", "New.").expect("registers once").inc_by(3);
        registry.alias("new_total", "old_total");
        registry.alias("new_total", "old_total");
        registry.alias("unknown_total", "older_total");
        let text = registry.render();
        assert_eq!(
            text,
            "# HELP new_total New.\n# TYPE new_total counter\nnew_total 3\n\
             # HELP old_total New.\n# TYPE old_total counter\nold_total 3\n"
        );
    }

    #[test]
    fn a_name_is_registered_once() {
        let registry = Registry::new();
        assert!(registry.counter("a", "A.").is_ok());
        assert!(registry.counter("a", "A.").is_err());
    }
}
