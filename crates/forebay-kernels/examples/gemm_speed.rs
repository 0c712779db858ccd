//! Speed of the matrix product on SmolLM2-135M's shapes: tokens per CPU-second and integer operations per second.
//!
//! `cargo run --release -p forebay-kernels --example gemm_speed [-- isa...]`
#![allow(clippy::print_stdout, reason = "its output is what it is for")]

use std::time::Instant;

use forebay_kernels::{
    Activations, AttnRow, AttnShape, Isa, KvCache, Matrix, Part, Pool, TensorType, attention, matmul,
    rms_norm, silu_mul,
};

const LAYERS: usize = 30;
/// (outputs, inputs): qkv, o, gate and up, down.
const SHAPES: [(usize, usize); 4] = [(960, 576), (576, 576), (3072, 576), (576, 1536)];
const HEAD: (usize, usize) = (49152, 576);

fn tensor(ty: TensorType, rows: usize, cols: usize) -> Vec<u8> {
    // Codes without pattern; scales of 2^-6 (f16 0x2400) wherever they stand.
    let mut bits = 1_u32;
    let mut out = vec![0; rows * ty.row_bytes(cols)];
    for block in out.chunks_exact_mut(ty.block_bytes()) {
        for byte in block.iter_mut() {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = (bits >> 24) as u8;
        }
        let scales = if matches!(ty, TensorType::Q4_1 | TensorType::Q5_1) { 4 } else { 2 };
        block[..scales].copy_from_slice(&[0, 0x24, 0, 0x24][..scales]);
    }
    out
}

fn pack(ty: TensorType, (rows, cols): (usize, usize), isa: Isa, pool: &Pool) -> Matrix {
    let data = tensor(ty, rows, cols);
    Matrix::pack(&[Part { ty, rows, data: &data }], cols, isa, pool).expect("shapes agree")
}

/// Seconds: wall time of the fastest of several runs, and CPU time of all threads in the mean.
///
/// On a machine that others use, CPU time is the number to compare.
fn measure(mut f: impl FnMut()) -> (f64, f64) {
    f();
    let (begin, cpu, mut wall) = (Instant::now(), cpu_seconds(), f64::MAX);
    let mut runs = 0;
    while runs < 3 || begin.elapsed().as_secs_f64() < 1.0 {
        let start = Instant::now();
        f();
        wall = wall.min(start.elapsed().as_secs_f64());
        runs += 1;
    }
    (wall, (cpu_seconds() - cpu) / f64::from(runs))
}

/// CPU time of this process so far; 0 where there is no `/proc`.
fn cpu_seconds() -> f64 {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return 0.0 };
    let nanos =
        |path| Some(std::fs::read_to_string(path).ok()?.split(' ').next()?.parse::<f64>().ok()? * 1e-9);
    tasks.flatten().filter_map(|task| nanos(task.path().join("schedstat"))).sum()
}

fn input(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 31 % 97) as f32 - 48.0) / 50.0).collect()
}

fn linear(ty: TensorType, isa: Isa, threads: usize, rows: &[usize]) {
    let pool = Pool::new(threads);
    let layers: Vec<Vec<Matrix>> =
        (0..LAYERS).map(|_| SHAPES.iter().map(|&shape| pack(ty, shape, isa, &pool)).collect()).collect();
    let head = pack(TensorType::Q8_0, HEAD, isa, &pool);
    let weights: usize = LAYERS * SHAPES.iter().map(|(n, k)| n * k).sum::<usize>();
    let bytes: usize = layers.iter().flatten().map(Matrix::bytes).sum();
    let mut a = Activations::new();
    for &m in rows {
        let x = input(m * 1536);
        let mut y = vec![0.0; m * 3072];
        let (seconds, cpu) = measure(|| {
            for w in layers.iter().flatten() {
                a.prepare(&pool, w, &x[..m * w.cols()]);
                matmul(&pool, w, &a, &mut y[..m * w.rows()]);
            }
        });
        let mut logits = vec![0.0; m.min(32) * HEAD.0];
        let (head_seconds, head_cpu) = measure(|| {
            a.prepare(&pool, &head, &x[..m.min(32) * HEAD.1]);
            matmul(&pool, &head, &a, &mut logits);
        });
        println!(
            "{ty:?} {isa:12} threads {threads} M {m:3}: layers {:6.0} tok/s {:6.0} tok/cpu-s {:5.0} GOPS/cpu \
             {:4.1} GB/s; head (M {:2}) {:6.2} ms {:6.2} cpu-ms {:4.1} GB/s",
            m as f64 / seconds,
            m as f64 / cpu,
            2.0 * (weights * m) as f64 / cpu / 1e9,
            bytes as f64 / seconds / 1e9,
            m.min(32),
            head_seconds * 1e3,
            head_cpu * 1e3,
            head.bytes() as f64 / head_seconds / 1e9,
        );
    }
}

fn attend(isa: Isa, threads: usize) {
    let pool = Pool::new(threads);
    let (heads, kv_heads, dim) = (9, 3, 64);
    let mut cache = KvCache::new(1, 2048, 16, kv_heads, dim).expect("memory").with_isa(isa);
    let token = input(kv_heads * dim);
    let start = Instant::now();
    for t in 0..2048 * 16 {
        cache.write(0, (t / 16) as u32, t % 16, &token, &token);
    }
    println!("{isa}: KV write {:.0} ns/token", start.elapsed().as_nanos() as f64 / 32768.0);
    let table: Vec<u32> = (0..2048).collect();
    let shape = AttnShape { heads, q_stride: heads * dim, scale: 0.125, window: None };
    for (name, rows, queries, position) in [
        ("prefill", 1, 512, 0),
        ("prefill", 1, 512, 1536),
        ("decode", 1, 1, 511),
        ("decode", 32, 1, 511),
        ("decode", 1, 1, 8191),
    ] {
        let q = input(rows * queries * heads * dim);
        let mut out = vec![0.0; q.len()];
        let list: Vec<AttnRow<'_>> = (0..rows)
            .map(|r| AttnRow {
                queries: r * queries..(r + 1) * queries,
                position,
                block_table: &table[r * 32..],
            })
            .collect();
        let (seconds, _) = measure(|| attention(&pool, &cache, 0, shape, &list, &q, &mut out));
        let pairs: usize = rows * (0..queries).map(|i| position + i + 1).sum::<usize>();
        println!(
            "{isa:12} threads {threads} {name} {rows}x{queries} at {position}: {:8.1} us, {:5.1} GFLOPS",
            seconds * 1e6,
            (pairs * heads * dim * 4) as f64 / seconds / 1e9
        );
    }
}

fn small(rows: usize) {
    let (x, weight) = (input(rows * 576), input(576));
    let mut out = vec![0.0; x.len()];
    let (norm, _) = measure(|| rms_norm(&x, &weight, 1e-5, &mut out));
    let gate_up = input(rows * 3072);
    let mut out = vec![0.0; rows * 1536];
    let (silu, _) = measure(|| silu_mul(&gate_up, 1536, &mut out));
    println!(
        "per row: rms_norm {:.0} ns, silu_mul {:.0} ns",
        norm * 1e9 / rows as f64,
        silu * 1e9 / rows as f64
    );
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
        if !wanted.is_empty() && !wanted.iter().any(|name| name == isa.as_str()) {
            continue;
        }
        let rows: &[usize] = if isa == Isa::Scalar { &[1, 8] } else { &[1, 8, 32, 512] };
        for threads in [1, 2] {
            linear(TensorType::Q4_1, isa, threads, rows);
            if isa != Isa::Scalar {
                attend(isa, threads);
            }
        }
    }
    if wanted.is_empty() {
        // No K-quants: 576 columns are no whole number of their blocks.
        for ty in [TensorType::Q4_0, TensorType::Q5_0, TensorType::Q5_1, TensorType::Q8_0, TensorType::BF16] {
            for threads in [1, 2] {
                linear(ty, Isa::detect(), threads, &[1, 8, 32]);
            }
        }
    }
    small(32);
}
