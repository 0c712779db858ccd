//! Continuous batching and the KV block allocator. Pure: no I/O, no clock, no randomness.
//!
//! One [`Scheduler`] per engine, driven by the engine's step loop:
//!
//! ```text
//! loop {
//!     scheduler.try_add(now, …)               // arrivals
//!     let plan = scheduler.plan_step(now);    // what to compute
//!     executor.run(plan)?                     // else scheduler.on_step_failed()
//!     scheduler.on_step_done(elapsed);        // how long it took, for bounds in time
//!     scheduler.on_token(seq, token)          // one per row that ends with the last known token
//!     scheduler.finish(seq)                   // stop reached; abort(seq) when the client left
//!     scheduler.drain_events(&mut events)     // for whoever indexes this cache
//! }
//! ```
//!
//! - `plan`: the contract with executors, plain data.
//! - `pool`: KV blocks: reference counts, the prefix cache, LRU reuse.
//! - `queue`: who is next: priority, fairness between tenants, ageing.
//! - `scheduler`: sequences' lives.
//! - `step`, and its parts `room` (blocks, preemption), `budget` (prefill beside decodes) and `admit`: planning one step.
//! - `pace`: what steps take, by what they took: prefill beside decodes is bounded in time.
//!
//! **Invariant:** the scheduler doesn't know models, text, sampling or HTTP. A sequence is token ids and limits.
//!
//! Deliberately absent: swapping to host memory, speculative tokens, sliding-window attention. Each would show up in
//! `step` only.

mod admit;
mod budget;
mod config;
mod error;
mod events;
mod invariants;
mod pace;
mod plan;
mod pool;
mod queue;
mod room;
mod scheduler;
mod seq;
mod stats;
mod step;

pub use config::SchedulerConfig;
pub use error::AddError;
pub use invariants::BrokenInvariant;
pub use plan::{SeqId, StepPlan};
pub use pool::{BlockPool, FullBlock};
pub use scheduler::{Added, Scheduler, TokenOutcome};
pub use seq::{NewSeq, SeqInfo};
pub use stats::SchedulerStats;
