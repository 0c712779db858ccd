//! Random tensors for tests.

use half::{bf16, f16};

use crate::TensorType;

pub(crate) const TYPES: [TensorType; 11] = [
    TensorType::F32,
    TensorType::F16,
    TensorType::BF16,
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::Q5_0,
    TensorType::Q5_1,
    TensorType::Q8_0,
    TensorType::Q4K,
    TensorType::Q5K,
    TensorType::Q6K,
];

/// SplitMix64: tests want the same numbers everywhere.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In [-1, 1).
    pub(crate) fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }

    pub(crate) fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit()).collect()
    }

    /// `rows` rows of any codes, with scales that make weights of about 0.1.
    pub(crate) fn tensor(&mut self, ty: TensorType, rows: usize, cols: usize) -> Vec<u8> {
        let mut out = Vec::new();
        for _ in 0..rows * cols / ty.block_len() {
            let mut block: Vec<u8> = (0..ty.block_bytes()).map(|_| self.bits() as u8).collect();
            let mut put =
                |at: usize, x: f32| block[at..at + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes());
            let (a, b) = (self.unit() * 0.1, self.unit() * 0.1);
            match ty {
                TensorType::F32 => block = a.to_le_bytes().to_vec(),
                TensorType::F16 => put(0, a),
                TensorType::BF16 => block = bf16::from_f32(a).to_le_bytes().to_vec(),
                TensorType::Q4_0 | TensorType::Q5_0 => put(0, a / 16.0),
                TensorType::Q4_1 | TensorType::Q5_1 => {
                    put(0, a / 16.0);
                    put(2, b);
                }
                TensorType::Q8_0 => put(0, a / 128.0),
                TensorType::Q4K | TensorType::Q5K => {
                    put(0, a.abs() / 512.0);
                    put(2, b.abs() / 64.0);
                }
                TensorType::Q6K => put(208, a / 2048.0),
            }
            out.extend(block);
        }
        out
    }
}
