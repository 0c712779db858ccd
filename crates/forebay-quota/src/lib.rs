//! Token buckets, reservations and their settlement. Pure: time is an argument.

/// Proof that quota was reserved for a request: nothing below the gateway can be called without one.
///
/// Only a hold makes it, so a composition that forgets the reservation does not compile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserved(());
