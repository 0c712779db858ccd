//! The routing decision: decide(view, ask, rng) -> Decision. Pure.
