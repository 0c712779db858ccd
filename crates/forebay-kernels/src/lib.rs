//! CPU kernels and the compute thread pool: the only crate with unsafe code.
