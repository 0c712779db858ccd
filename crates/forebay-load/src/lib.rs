//! Load generator for any server with OpenAI's HTTP API: what `forebay bench` runs.
//!
//! ```text
//! Options -> target (model, tokenizer) -> prompts ─┐
//!                                     arrivals ────┴> requests in flight -> Samples -> Report
//! ```
//!
//! Prompts and arrivals come from a seed, so that two servers can be given the same work. Times are taken by the
//! monotonic clock where a frame's last byte is read. Memory is bounded: see [`Samples`].
//!
//! What it deliberately does not do: judge answers, retry (a failure is a result; only a kept connection that the server
//! closed is made anew, once, and counted), draw progress or print (the caller
//! does), or correct for its own CPU use: on a machine that it shares with the server both take from the same cores.

mod arrivals;
mod error;
mod options;
mod prompts;
mod report;
mod request;
mod run;
mod samples;
mod tally;
mod target;
mod words;

pub use error::{Failure, FailureKind, LoadError};
pub use options::{Endpoint, Load, Options, Prompts, Until};
pub use report::{FailureCount, Report};
pub use run::{Phase, Progress, Silent, Snapshot, run, run_until};
pub use samples::{Samples, Summary};
