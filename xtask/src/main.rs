//! Repository tasks: test, tidy, docs, bench.
fn main() {}
