//! CPU kernels and the compute thread pool: the only crate with unsafe code.
//!
//! What a transformer's forward pass needs and nothing about any model: packed weight matrices in GGUF's
//! quantised types ([`Matrix`]), activations quantised per 32 values ([`Activations`]), their product
//! ([`matmul()`]), paged KV with causal attention ([`KvCache`], [`attention()`]), attention in both directions for
//! encoders ([`full_attention()`]), norms, rotary embedding, the threads to run it on ([`Pool`]) and a read-only
//! file mapping ([`MappedFile`]).
//!
//! **Invariant: same bits always.** A row of a result depends on its own input row only. Not on how many rows
//! are computed with it, nor on the number of threads, the chunking of a prefill, the block tables, or the
//! instruction set: every [`Isa`] does the same operations on every output in the same order, fused
//! multiply-adds included. Greedy decoding therefore gives the same text alone and in a batch, with and
//! without a prefix-cache hit, on every machine of a fleet.
//!
//! **Invariant: kernels are written once**, generic over the `Simd` trait, and instantiated per [`Isa`] at run
//! time. One portable binary, no `target-cpu` flag.
//!
//! Deliberately absent: file formats (GGUF is the engine's), sampling, scheduling, I/O, async, allocation in
//! the hot path after warm-up.
#![allow(
    unsafe_code,
    reason = "SIMD intrinsics, disjoint writes from several threads and file mapping need it; everything else \
              in the workspace is safe because these are here"
)]
#![warn(clippy::undocumented_unsafe_blocks)]

mod activations;
mod attention;
mod buffer;
mod elementwise;
mod encoder;
#[cfg(test)]
mod fixtures;
mod isa;
mod kv_cache;
mod mapped;
mod matmul;
mod matrix;
mod pool;
mod rope;
mod simd;
mod softmax;
mod tensor;

pub use activations::Activations;
pub use attention::{AttnRow, AttnShape, FullShape, attention, full_attention};
pub use elementwise::{add_assign, argmax, gelu_tanh_mul, rms_norm, scale_in_place, silu_mul};
pub use encoder::{gelu_erf_in_place, layer_norm_in_place};
pub use isa::Isa;
pub use kv_cache::{KvCache, KvError};
pub use mapped::{MapError, MappedFile};
pub use matmul::matmul;
pub use matrix::{Matrix, PackError, Part};
pub use pool::{Pool, spin};
pub use rope::{RopeStyle, RopeTable, rope_in_place};
pub use softmax::{SUMMED, exp_in_place, exp_sums, log_sum_exp};
pub use tensor::{DequantizeError, TensorType, dequantize_row};
