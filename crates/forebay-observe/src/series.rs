//! Kinds of metrics that the `prometheus` crate does not have.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus::core::{Collector, Desc};
use prometheus::proto::{LabelPair, Metric, MetricFamily, MetricType, Summary};
use prometheus::{Histogram, HistogramOpts, Result};

/// Histograms of one family, each series with bounds of its own: what a model can do bounds what is counted of it.
#[derive(Clone)]
pub struct FittedHistograms {
    desc: Desc,
    series: Arc<Mutex<BTreeMap<Vec<String>, Fitted>>>,
}

struct Fitted {
    bounds: Vec<f64>,
    histogram: Histogram,
}

impl FittedHistograms {
    pub(crate) fn new(name: &str, help: &str, labels: &[&str]) -> Result<Self> {
        Ok(Self { desc: describe(name, help, labels)?, series: Arc::default() })
    }

    /// The series with these values of its labels. One that was there with other bounds begins anew.
    ///
    /// # Panics
    /// As `with_label_values` of other families, where there is not one value per label; and where bounds do not rise.
    pub fn fit(&self, values: &[&str], bounds: &[f64]) -> Histogram {
        let key = owned(values);
        let mut series = self.series.lock();
        if let Some(Fitted { histogram, .. }) = series.get(&key).filter(|fitted| fitted.bounds == bounds) {
            return histogram.clone();
        }
        let Desc { fq_name, help, variable_labels, .. } = &self.desc;
        assert_eq!(values.len(), variable_labels.len(), "one value per label of {fq_name}");
        let labels: HashMap<String, String> = variable_labels.iter().cloned().zip(key.clone()).collect();
        let opts = HistogramOpts::new(fq_name, help).const_labels(labels).buckets(bounds.to_vec());
        let histogram = Histogram::with_opts(opts).expect("bounds rise");
        series.insert(key, Fitted { bounds: bounds.to_vec(), histogram: histogram.clone() });
        histogram
    }
}

impl Collector for FittedHistograms {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let series = self.series.lock();
        let families = series.values().flat_map(|fitted| fitted.histogram.collect());
        let metrics = families.flat_map(|mut family| family.take_metric()).collect();
        vec![family(&self.desc, MetricType::HISTOGRAM, metrics)]
    }
}

/// Counts and sums of one family: summaries without quantiles, as Prometheus' client for Python has them.
#[derive(Clone)]
pub struct Summaries {
    desc: Desc,
    series: Arc<Mutex<BTreeMap<Vec<String>, Summed>>>,
}

#[derive(Clone, Copy, Default)]
struct Summed {
    count: u64,
    sum: f64,
}

impl Summaries {
    pub(crate) fn new(name: &str, help: &str, labels: &[&str]) -> Result<Self> {
        Ok(Self { desc: describe(name, help, labels)?, series: Arc::default() })
    }

    /// `values` are those of the labels, in their order.
    pub fn observe(&self, values: &[&str], value: f64) {
        debug_assert_eq!(values.len(), self.desc.variable_labels.len());
        let mut series = self.series.lock();
        let summed = series.entry(owned(values)).or_default();
        summed.count += 1;
        summed.sum += value;
    }
}

impl Collector for Summaries {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let series = self.series.lock();
        let metric = |(values, &Summed { count, sum }): (&Vec<String>, &Summed)| {
            let mut summary = Summary::default();
            summary.set_sample_count(count);
            summary.set_sample_sum(sum);
            let pair = |(name, value): (&String, &String)| {
                let mut pair = LabelPair::default();
                pair.set_name(name.clone());
                pair.set_value(value.clone());
                pair
            };
            let labels = self.desc.variable_labels.iter().zip(values).map(pair).collect();
            let mut metric = Metric::from_label(labels);
            metric.set_summary(summary);
            metric
        };
        vec![family(&self.desc, MetricType::SUMMARY, series.iter().map(metric).collect())]
    }
}

fn describe(name: &str, help: &str, labels: &[&str]) -> Result<Desc> {
    Desc::new(name.to_owned(), help.to_owned(), owned(labels), HashMap::new())
}

fn owned(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}

fn family(desc: &Desc, kind: MetricType, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(desc.fq_name.clone());
    family.set_help(desc.help.clone());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

#[cfg(test)]
mod tests {
    use crate::Registry;

    #[test]
    fn series_have_bounds_of_their_own() {
        let registry = Registry::new();
        let lengths = registry.fitted_histograms("lengths", "Lengths.", &["model"]).expect("registers once");
        assert_eq!(registry.render(), "", "a family without a series is not there");
        lengths.fit(&["b"], &[1.0]).observe(3.0);
        lengths.fit(&["a"], &[1.0, 5.0]).observe(3.0);
        lengths.fit(&["a"], &[1.0, 5.0]).observe(0.5);
        let expect = "# HELP lengths Lengths.\n# TYPE lengths histogram\n\
                      lengths_bucket{model=\"a\",le=\"1.0\"} 1\nlengths_bucket{model=\"a\",le=\"5.0\"} 2\n\
                      lengths_bucket{model=\"a\",le=\"+Inf\"} 2\nlengths_sum{model=\"a\"} 3.5\n\
                      lengths_count{model=\"a\"} 2\n\
                      lengths_bucket{model=\"b\",le=\"1.0\"} 0\nlengths_bucket{model=\"b\",le=\"+Inf\"} 1\n\
                      lengths_sum{model=\"b\"} 3\nlengths_count{model=\"b\"} 1\n";
        assert_eq!(registry.render(), expect);
        // The model came back with room for more.
        lengths.fit(&["b"], &[1.0, 9.0]);
        assert!(registry.render().contains("lengths_bucket{model=\"b\",le=\"9.0\"} 0\n"));
        assert_eq!(registry.families()[0].labels, ["model"]);
    }

    #[test]
    fn summaries_count_and_add_up() {
        let registry = Registry::new();
        let bytes = registry.summaries("bytes", "Bytes.", &["handler"]).expect("registers once");
        bytes.observe(&["/a"], 2.0);
        bytes.observe(&["/a"], 0.5);
        bytes.observe(&["none"], 0.0);
        let expect = "# HELP bytes Bytes.\n# TYPE bytes summary\n\
                      bytes_sum{handler=\"/a\"} 2.5\nbytes_count{handler=\"/a\"} 2\n\
                      bytes_sum{handler=\"none\"} 0\nbytes_count{handler=\"none\"} 1\n";
        assert_eq!(registry.render(), expect);
        assert_eq!(registry.families()[0].kind, "summary");
    }
}
