//! Metrics, traces, access log and audit records.

pub mod metrics;
mod recent;
mod series;
mod text;
mod trace;

pub use metrics::{MetricError, Registry};
pub use recent::{RecentRequests, RequestRecord};
pub use trace::{Layer, Span, Trace, TraceContext};
