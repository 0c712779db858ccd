//! The last requests with their waterfalls, for the admin API: bounded, newest last.

use std::collections::VecDeque;
use std::sync::Arc;

use forebay_types::RequestId;
use parking_lot::Mutex;

use crate::Span;

/// A finished request.
#[derive(Debug, Clone, serde::Serialize)]
pub struct RequestRecord {
    pub request_id: RequestId,
    pub trace_id: String,
    /// Seconds since the Unix epoch, with milliseconds.
    pub at: f64,
    pub method: String,
    pub path: String,
    pub status: u16,
    pub duration_us: u64,
    pub bytes_sent: u64,
    pub spans: Vec<Span>,
}

/// Ring of the last requests. Cheap to clone.
#[derive(Clone)]
pub struct RecentRequests(Arc<Ring>);

struct Ring {
    capacity: usize,
    records: Mutex<VecDeque<RequestRecord>>,
}

impl RecentRequests {
    pub fn new(capacity: usize) -> Self {
        Self(Arc::new(Ring { capacity, records: Mutex::new(VecDeque::new()) }))
    }

    pub fn push(&self, record: RequestRecord) {
        let mut records = self.0.records.lock();
        if records.len() >= self.0.capacity {
            records.pop_front();
        }
        if self.0.capacity > 0 {
            records.push_back(record);
        }
    }

    pub fn find(&self, request_id: &str) -> Option<RequestRecord> {
        self.0.records.lock().iter().rev().find(|r| r.request_id.as_str() == request_id).cloned()
    }

    /// The last `n`, newest first.
    pub fn last(&self, n: usize) -> Vec<RequestRecord> {
        self.0.records.lock().iter().rev().take(n).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str) -> RequestRecord {
        RequestRecord {
            request_id: id.into(),
            trace_id: String::new(),
            at: 0.0,
            method: "GET".into(),
            path: "/".into(),
            status: 200,
            duration_us: 1,
            bytes_sent: 0,
            spans: Vec::new(),
        }
    }

    #[test]
    fn keeps_the_newest() {
        let recent = RecentRequests::new(2);
        ["a", "b", "c"].into_iter().for_each(|id| recent.push(record(id)));
        assert!(recent.find("a").is_none());
        let last: Vec<_> = recent.last(9).into_iter().map(|r| r.request_id.as_str().to_owned()).collect();
        assert_eq!(last, ["c", "b"]);
    }
}
