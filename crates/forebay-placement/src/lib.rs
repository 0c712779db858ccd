//! Where a request runs: one pure function over what is known about a fleet.
//!
//! [`decide`] takes the fleet as it is seen now, the request, and a seed, and gives the replica with the lowest cost
//! *in seconds*. Seconds and not a weighted sum of scores: a cached prefix, a queue and a batch of decoding sequences
//! are only comparable as the time that they save or cost.
//!
//! No I/O, no clock, no randomness of its own. It does not know what a replica is (an engine in this process, a
//! server elsewhere), how its health is found out, or what a prompt's text is. One tier of KV cache only: blocks that
//! lie in host memory or on disk count as not cached.

mod decide;
mod speed;

pub use decide::{
    Ask, Candidate, Decision, FleetView, Load, PlaceError, ReplicaState, ReplicaView, Why, decide,
};
pub use speed::{PREFILL_RATE_PRIOR, Speed};
