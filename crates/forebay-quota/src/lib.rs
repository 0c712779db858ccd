//! Token buckets, reservations and their settlement. Pure: time is an argument.
//!
//! ```text
//! try_hold(now, tokens) -> Hold     takes one request and `tokens` at once, or nothing
//! hold.spent(n)                     what is certain to be charged from now on
//! hold.settle(now, used)            gives back or charges the difference
//! drop(hold)                        settles for what was `spent`
//! ```
//!
//! A limit of `n` per window is a bucket that holds `n` and refills by `n` per window, continuously. So whatever the
//! order of holds and settlements, what is used within any time `t` is at most `n + n * t / window`, plus what calls
//! used beyond their holds, which becomes debt.
//!
//! What it does not do: no money, no windows over a day, nothing shared between processes.

mod bucket;
mod ledger;

pub use bucket::Window;
pub use ledger::{Hold, Ledger, Limited, Limits, Refused, Reserved, Snapshot};
