//! L2: who is calling, and how much of their quota is left.
//!
//! ```text
//! Received -> audit slot        or 503: what can't be audited is not done
//!          -> identify          401
//!          -> hold a request    429: before any work, and not given back where it is refused below
//!          -> parse, may use?   400, 403
//!          -> fits, encode      400; the prompt's tokens, once for the whole stack
//!          -> hold the tokens   429, names the limit
//!          -> Admitted -> next stage -> reply, metered until it ends
//!          -> settle, audit     exactly once: at the end, on an error, or when the client leaves
//! ```
//!
//! **Invariant:** nothing but [`Gateway`] makes a `Flow<Admitted>`, and it makes one only with a hold in hand.
//!
//! What it does not do: it knows no model (whether one exists is the proxy's to say), renders no reply, keeps no key in
//! readable form, and never writes a prompt or a completion to the audit log.

mod account;
mod audit;
mod clock;
mod config;
mod error;
mod gateway;
mod keys;
mod metered;
mod metrics;
mod ratelimit;
mod salt;
mod tally;

pub use config::{AuditConfig, ConsumerConfig, GatewayConfig, LimitsConfig, SaltScope};
pub use error::GatewayBuildError;
pub use gateway::{Gateway, GatewayDeps};
