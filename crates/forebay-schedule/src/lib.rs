//! Continuous batching and the KV block allocator. Pure: no I/O, no clock, no randomness.

mod plan;

pub use plan::{SeqId, StepPlan};
