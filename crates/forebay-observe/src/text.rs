//! Prometheus' text format 0.0.4, with bounds of buckets spelled as its client for Python spells them.
//!
//! A bound is the value of a label, so that `sum by (le)` over programs that spell it differently adds nothing up:
//! `le="1"` and `le="1.0"` are two buckets. vLLM has `1.0`, and so has OpenMetrics.

use prometheus::proto::{LabelPair, Metric, MetricFamily, MetricType};

/// Renders families that have at least one series.
pub(crate) fn render(families: &[MetricFamily]) -> String {
    let mut out = String::new();
    for family in families {
        let name = family.name();
        push_all(&mut out, &["# HELP ", name, " ", &escaped(family.help(), false), "\n"]);
        push_all(&mut out, &["# TYPE ", name, " ", kind(family.get_field_type()), "\n"]);
        for metric in family.get_metric() {
            put_metric(&mut out, name, family.get_field_type(), metric);
        }
    }
    out
}

fn kind(kind: MetricType) -> &'static str {
    match kind {
        MetricType::COUNTER => "counter",
        MetricType::GAUGE => "gauge",
        MetricType::SUMMARY => "summary",
        MetricType::HISTOGRAM => "histogram",
        MetricType::UNTYPED => "untyped",
    }
}

fn put_metric(out: &mut String, name: &str, kind: MetricType, metric: &Metric) {
    let labels = metric.get_label();
    let mut put = |suffix: &str, le: Option<&str>, value: &str| {
        push_all(out, &[name, suffix]);
        put_labels(out, labels, le);
        push_all(out, &[" ", value, "\n"]);
    };
    match kind {
        MetricType::COUNTER => put("", None, &metric.get_counter().get_value().to_string()),
        MetricType::GAUGE => put("", None, &metric.get_gauge().get_value().to_string()),
        MetricType::HISTOGRAM => {
            let histogram = metric.get_histogram();
            let count = histogram.get_sample_count().to_string();
            for bucket in histogram.get_bucket() {
                put("_bucket", Some(&bound(bucket.upper_bound())), &bucket.cumulative_count().to_string());
            }
            put("_bucket", Some("+Inf"), &count);
            put("_sum", None, &histogram.get_sample_sum().to_string());
            put("_count", None, &count);
        }
        MetricType::SUMMARY => {
            put("_sum", None, &metric.get_summary().sample_sum().to_string());
            put("_count", None, &metric.get_summary().sample_count().to_string());
        }
        // `Registry::add` takes nothing of this kind.
        MetricType::UNTYPED => {}
    }
}

fn put_labels(out: &mut String, labels: &[LabelPair], le: Option<&str>) {
    let pairs = labels.iter().map(|label| (label.name(), label.value()));
    let mut before = "{";
    for (name, value) in pairs.chain(le.map(|bound| ("le", bound))) {
        push_all(out, &[before, name, "=\"", &escaped(value, true), "\""]);
        before = ",";
    }
    if before == "," {
        out.push('}');
    }
}

/// The finite bound of a bucket: `0.001`, `1.0`, `100000.0`, and `1e+06` from a million on.
fn bound(bound: f64) -> String {
    let text = format!("{bound:?}");
    match text.find('.') {
        Some(dot) if bound > 0.0 && dot > 6 => {
            let digits = text.replace('.', "");
            let (first, rest) = digits.split_at(1);
            match rest.trim_end_matches('0') {
                "" => format!("{first}e+{:02}", dot - 1),
                rest => format!("{first}.{rest}e+{:02}", dot - 1),
            }
        }
        Some(_) | None => text,
    }
}

fn escaped(text: &str, quotes: bool) -> String {
    let text = text.replace('\\', "\\\\").replace('\n', "\\n");
    if quotes { text.replace('"', "\\\"") } else { text }
}

fn push_all(out: &mut String, pieces: &[&str]) {
    pieces.iter().for_each(|piece| out.push_str(piece));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_spelled_as_pythons_client_does() {
        let check = |given: f64, expect: &str| assert_eq!(bound(given), expect);
        check(0.001, "0.001");
        check(0.5, "0.5");
        check(1.0, "1.0");
        check(16_384.0, "16384.0");
        check(500_000.0, "500000.0");
        check(1_000_000.0, "1e+06");
        check(2_500_000.0, "2.5e+06");
        check(20_000_000.0, "2e+07");
    }

    #[test]
    fn values_of_labels_can_hold_anything() {
        let check = |value: &str, expect: &str| assert_eq!(escaped(value, true), expect);
        check("plain é", "plain é");
        check("a\"b\\c\nd", "a\\\"b\\\\c\\nd");
        assert_eq!(escaped("a \"word\"", false), "a \"word\"");
    }
}
