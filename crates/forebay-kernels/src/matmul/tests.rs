use proptest::prelude::*;

use super::*;
use crate::fixtures::{Random, TYPES};
use crate::{Part, dequantize_row};

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.supported())
}

fn product(pool: &Pool, isa: Isa, parts: &[Part<'_>], cols: usize, x: &[f32]) -> Vec<f32> {
    let w = Matrix::pack(parts, cols, isa, pool).unwrap();
    let mut a = Activations::new();
    a.prepare(pool, &w, x);
    let mut y = vec![f32::NAN; a.rows() * w.rows()];
    matmul(pool, &w, &a, &mut y);
    y
}

fn weights(ty: TensorType, data: &[u8], cols: usize) -> Vec<Vec<f32>> {
    data.chunks_exact(ty.row_bytes(cols))
        .map(|row| {
            let mut out = vec![0.0; cols];
            dequantize_row(ty, row, &mut out).unwrap();
            out
        })
        .collect()
}

/// Against f64 with the dequantised weights, for every type and instruction set, at shapes that leave parts of
/// tiles and of micro-tiles over.
#[test]
fn agrees_with_the_dequantised_weights() {
    let pool = Pool::new(2);
    for ty in TYPES {
        for (rows, cols, tokens) in [(1, 256, 1), (33, 512, 7), (96, 256, 13), (70, 768, 4)] {
            let mut random = Random(rows as u64);
            let data = random.tensor(ty, rows, cols);
            let mut x = random.floats(tokens * cols);
            if ty == TensorType::BF16 {
                // Which rounds them.
                x.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
            }
            let w = weights(ty, &data, cols);
            let expect: Vec<f64> = x
                .chunks_exact(cols)
                .flat_map(|x| {
                    w.iter().map(move |w| x.iter().zip(w).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum())
                })
                .collect();
            // Rounding of an activation in [-1, 1] to 127 steps has a standard deviation of 0.29 / 127; six of
            // them, times the length of the row of weights. Floats are off by their own rounding only.
            let factor = if ty.is_quantized() { 6.0 * 0.29 / 127.0 } else { 5e-6 };
            let tolerance: Vec<f64> = w
                .iter()
                .map(|w| factor * w.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>().sqrt())
                .collect();
            let mut first: Option<Vec<f32>> = None;
            for isa in isas() {
                let y = product(&pool, isa, &[Part { ty, rows, data: &data }], cols, &x);
                for (i, (y, e)) in y.iter().zip(&expect).enumerate() {
                    let error = (f64::from(*y) - e).abs();
                    assert!(error <= tolerance[i % rows], "{ty:?} {isa} {rows}x{cols} at {i}: {y} for {e}");
                }
                let same = first.get_or_insert_with(|| y.clone());
                assert!(bits(same) == bits(&y), "{ty:?} {rows}x{cols}: {isa} differs from the first ISA");
            }
        }
    }
}

/// With activations that eight bits hold exactly, only f32 rounding is left.
#[test]
fn quantised_products_are_exact_but_for_rounding() {
    let pool = Pool::new(1);
    for ty in TYPES {
        let (rows, cols) = (40, 512);
        let mut random = Random(7);
        let data = random.tensor(ty, rows, cols);
        let x: Vec<f32> =
            (0..cols).map(|i| if i % 32 == 5 { 127.0 } else { (random.unit() * 127.0).round() }).collect();
        let expect = weights(ty, &data, cols)
            .iter()
            .map(|w| x.iter().zip(w).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>())
            .collect::<Vec<_>>();
        let norm = (expect.iter().map(|y| y * y).sum::<f64>() / rows as f64).sqrt();
        for isa in isas() {
            let y = product(&pool, isa, &[Part { ty, rows, data: &data }], cols, &x);
            for (y, e) in y.iter().zip(&expect) {
                assert!((f64::from(*y) - e).abs() <= 1e-5 * norm, "{ty:?} {isa}: {y} for {e}");
            }
        }
    }
}

#[test]
fn the_largest_codes_and_activations_don_t_saturate() {
    for isa in isas() {
        for (code, weight) in [(0x7f, 127.0), (0x80, -128.0), (0x81, -127.0)] {
            let mut block = vec![code; 34];
            block[..2].copy_from_slice(&half::f16::ONE.to_le_bytes());
            for sign in [1.0, -1.0] {
                let part = Part { ty: TensorType::Q8_0, rows: 1, data: &block };
                let y = product(&Pool::new(1), isa, &[part], 32, &[127.0 * sign; 32]);
                assert_eq!(y, [weight * 127.0 * 32.0 * sign], "{isa}");
            }
        }
    }
}

#[test]
fn parts_of_several_types_are_rows_of_one_matrix() {
    let (cols, x) = (256, Random(1).floats(3 * 256));
    let pool = Pool::new(2);
    let mut random = Random(2);
    let tensors: Vec<(TensorType, usize, Vec<u8>)> = [
        (TensorType::Q4K, 40),
        (TensorType::Q4K, 5),
        (TensorType::Q6K, 33),
        (TensorType::F16, 64),
        (TensorType::Q4K, 1),
    ]
    .into_iter()
    .map(|(ty, rows)| (ty, rows, random.tensor(ty, rows, cols)))
    .collect();
    let parts: Vec<Part<'_>> =
        tensors.iter().map(|(ty, rows, data)| Part { ty: *ty, rows: *rows, data }).collect();
    for isa in isas() {
        let y = product(&pool, isa, &parts, cols, &x);
        let mut expect = vec![Vec::new(); 3];
        for part in &parts {
            let y = product(&pool, isa, &[*part], cols, &x);
            for (expect, y) in expect.iter_mut().zip(y.chunks_exact(part.rows)) {
                expect.extend_from_slice(y);
            }
        }
        assert_eq!(bits(&y), bits(&expect.concat()), "{isa}");
    }
}

#[test]
fn float_weights_need_no_round_number_of_columns() {
    let mut random = Random(3);
    let (rows, cols) = (5, 37);
    let data = random.tensor(TensorType::F32, rows, cols);
    let x = random.floats(2 * cols);
    let part = Part { ty: TensorType::F32, rows, data: &data };
    let y = product(&Pool::new(1), Isa::detect(), &[part], cols, &x);
    let w = weights(TensorType::F32, &data, cols);
    for (i, y) in y.iter().enumerate() {
        let expect: f32 = x[i / rows * cols..][..cols].iter().zip(&w[i % rows]).map(|(a, b)| a * b).sum();
        assert!((y - expect).abs() < 1e-5);
    }
}

/// Sizes from the smallest to the largest, whose sums cancel, overflow and vanish: each instruction set, and
/// AVX-512 without its instruction for bf16, has the bits of the portable code.
#[test]
fn bf16_products_have_the_same_bits_at_any_size() {
    let pool = Pool::new(1);
    let mut random = Random(11);
    for cols in [1, 2, 7, 64] {
        let mut wild = |count: usize, smallest: i32| -> Vec<f32> {
            let size = |unit: f32| (smallest as f32 + unit * (128 - smallest) as f32).exp2();
            (0..count).map(|_| size(random.unit().abs()) * random.unit().signum()).collect()
        };
        for smallest in [-148, -60, 0] {
            let data: Vec<u8> = wild(50 * cols, smallest)
                .iter()
                .flat_map(|&w| half::bf16::from_f32(w).to_le_bytes())
                .collect();
            let x = wild(9 * cols, smallest);
            let part = Part { ty: TensorType::BF16, rows: 50, data: &data };
            let numbers = |y: Vec<f32>| {
                bits(&y.iter().map(|y| if y.is_nan() { f32::NAN } else { *y }).collect::<Vec<_>>())
            };
            let expect = numbers(product(&pool, Isa::Scalar, &[part], cols, &x));
            for isa in isas() {
                assert!(
                    numbers(product(&pool, isa, &[part], cols, &x)) == expect,
                    "{isa} {cols} from 2^{smallest}"
                );
            }
            #[cfg(target_arch = "x86_64")]
            if let Some(avx512) = crate::simd::Avx512::detect() {
                let w = Matrix::pack(&[part], cols, Isa::Avx512Vnni, &pool).unwrap();
                let mut a = Activations::new();
                a.prepare(&pool, &w, &x);
                let mut y = vec![f32::NAN; 9 * 50];
                let to = SharedMut::new(&mut y);
                let segment = &w.segments()[0];
                let block =
                    Block { segment, tiles: 0..segment.tiles(), x: &a, rows: 0..9, y: to, stride: 50 };
                avx512.enter(bf16::Kernel { block: &block });
                assert!(numbers(y) == expect, "without bf16: {cols} from 2^{smallest}");
            }
        }
    }
}

#[test]
fn bad_shapes_are_refused() {
    let check = |parts: &[Part<'_>], cols, expect| {
        assert_eq!(Matrix::pack(parts, cols, Isa::Scalar, &Pool::new(1)).err(), Some(expect));
    };
    let ty = TensorType::Q8_0;
    check(&[], 32, crate::PackError::Empty);
    check(&[Part { ty, rows: 1, data: &[0; 34] }], 33, crate::PackError::PartialBlock { ty, cols: 33 });
    check(
        &[Part { ty, rows: 2, data: &[0; 34] }],
        32,
        crate::PackError::Length { ty, rows: 2, cols: 32, expected: 68, found: 34 },
    );
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// The hard property: a row doesn't know what it was computed with.
    #[test]
    fn a_row_has_the_same_bits_alone_and_in_any_batch_on_any_threads(
        seed: u64,
        ty in proptest::sample::select(&TYPES[..]),
        rows in 1_usize..100,
        blocks in 1_usize..4,
        tokens in 1_usize..20,
        threads in 1_usize..4,
    ) {
        let cols = blocks * 256;
        let mut random = Random(seed);
        let data = random.tensor(ty, rows, cols);
        let x = random.floats(tokens * cols);
        let part = Part { ty, rows, data: &data };
        let pool = Pool::new(threads);
        let one = Pool::new(1);
        for isa in isas() {
            let together = product(&pool, isa, &[part], cols, &x);
            let w = Matrix::pack(&[part], cols, isa, &one).unwrap();
            let mut a = Activations::new();
            let mut alone = vec![0.0; rows];
            for (x, y) in x.chunks_exact(cols).zip(together.chunks_exact(rows)) {
                a.quantize(&one, isa, x, 1, cols);
                matmul(&one, &w, &a, &mut alone);
                prop_assert_eq!(bits(&alone), bits(y), "{} {:?}", isa, ty);
            }
        }
    }
}
