//! Metrics, traces, access log and audit records.
