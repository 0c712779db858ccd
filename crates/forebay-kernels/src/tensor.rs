//! The number formats of GGUF tensors, and the plain way to read them.
//!
//! Block layouts are those of ggml (`ggml-common.h`, `ggml-quants.c`). Reading here is the reference that the
//! packed kernels are tested against; it also serves the look-up of token embeddings.

use half::{bf16, f16};

/// A tensor type of GGUF.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TensorType {
    F32,
    F16,
    BF16,
    /// 32 × i4 (offset 8), f16 scale.
    Q4_0,
    /// 32 × u4, f16 scale and minimum.
    Q4_1,
    /// 32 × i5 (offset 16), f16 scale.
    Q5_0,
    /// 32 × u5, f16 scale and minimum.
    Q5_1,
    /// 32 × i8, f16 scale.
    Q8_0,
    /// 256 × u4 in 8 groups with 6-bit scales and minima.
    Q4K,
    /// 256 × u5 in 8 groups with 6-bit scales and minima.
    Q5K,
    /// 256 × i6 (offset 32) in 16 groups with 8-bit scales.
    Q6K,
}

/// Why a row could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DequantizeError {
    #[error("{cols} values are no whole number of {ty:?} blocks")]
    PartialBlock { ty: TensorType, cols: usize },
    #[error("{cols} {ty:?} values are {expected} bytes, not {found}")]
    Length { ty: TensorType, cols: usize, expected: usize, found: usize },
}

impl TensorType {
    /// From ggml's number for it (`ggml_type`), as it stands in GGUF. `None`: not one of ours.
    pub fn from_ggml(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            30 => Self::BF16,
            _ => return None,
        })
    }

    /// Values in a block.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes in a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Bytes of a row of `cols` values. A partial block counts as a whole one.
    pub const fn row_bytes(self, cols: usize) -> usize {
        cols.div_ceil(self.block_len()) * self.block_bytes()
    }

    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }
}

/// Reads one row of `out.len()` values.
pub fn dequantize_row(ty: TensorType, bytes: &[u8], out: &mut [f32]) -> Result<(), DequantizeError> {
    let cols = out.len();
    if !cols.is_multiple_of(ty.block_len()) {
        return Err(DequantizeError::PartialBlock { ty, cols });
    }
    let expected = ty.row_bytes(cols);
    if bytes.len() != expected {
        return Err(DequantizeError::Length { ty, cols, expected, found: bytes.len() });
    }
    let blocks = bytes.chunks_exact(ty.block_bytes()).zip(out.chunks_exact_mut(ty.block_len()));
    for (block, out) in blocks {
        match ty {
            TensorType::F32 => out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
            TensorType::F16 => out[0] = f16_at(block, 0),
            TensorType::BF16 => out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
            _ => {
                // A 256-value block is read as eight groups of 32; see `Group`.
                for (i, out) in out.chunks_exact_mut(32).enumerate() {
                    let group = Group::read(ty, block, i);
                    for (j, o) in out.iter_mut().enumerate() {
                        *o = (f32::from(group.q[j]) - f32::from(group.offset)) * group.scale[j / 16]
                            + group.min;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Thirty-two quantised values, in the one form that all types have in common: `(q - offset) · scale + min`.
///
/// The packers go through it, so that a new type needs its bits taken apart in one place only.
pub(crate) struct Group {
    pub(crate) q: [u8; 32],
    pub(crate) offset: u8,
    /// Of the first and of the second sixteen values; equal but for Q6_K.
    pub(crate) scale: [f32; 2],
    pub(crate) min: f32,
}

impl Group {
    /// Takes group `index` (of `block_len / 32`) out of one block of a quantised type.
    pub(crate) fn read(ty: TensorType, block: &[u8], index: usize) -> Self {
        let mut q = [0; 32];
        let (offset, scale, min) = match ty {
            TensorType::F32 | TensorType::F16 | TensorType::BF16 => (0, [0.0; 2], 0.0),
            TensorType::Q4_0 => {
                nibbles(&block[2..18], &mut q);
                (8, [f16_at(block, 0); 2], 0.0)
            }
            TensorType::Q4_1 => {
                nibbles(&block[4..20], &mut q);
                (0, [f16_at(block, 0); 2], f16_at(block, 2))
            }
            TensorType::Q5_0 => {
                nibbles(&block[6..22], &mut q);
                fifth_bits(&block[2..6], &mut q);
                (16, [f16_at(block, 0); 2], 0.0)
            }
            TensorType::Q5_1 => {
                nibbles(&block[8..24], &mut q);
                fifth_bits(&block[4..8], &mut q);
                (0, [f16_at(block, 0); 2], f16_at(block, 2))
            }
            TensorType::Q8_0 => {
                for (q, &b) in q.iter_mut().zip(&block[2..34]) {
                    *q = b ^ 0x80;
                }
                (128, [f16_at(block, 0); 2], 0.0)
            }
            TensorType::Q4K | TensorType::Q5K => {
                let (sc, m) = scale_min_k4(&block[4..16], index);
                let low = if ty == TensorType::Q4K { &block[16..144] } else { &block[48..176] };
                for (j, q) in q.iter_mut().enumerate() {
                    let byte = low[index / 2 * 32 + j];
                    *q = if index.is_multiple_of(2) { byte & 15 } else { byte >> 4 };
                    if ty == TensorType::Q5K {
                        *q |= (block[16 + j] >> index & 1) << 4;
                    }
                }
                (0, [f16_at(block, 0) * f32::from(sc); 2], -f16_at(block, 2) * f32::from(m))
            }
            TensorType::Q6K => {
                // Two halves of 128; in each, quarter `t` of 32 takes a nibble of `ql` and two bits of `qh`.
                let (half, t) = (index / 4, index % 4);
                for (j, q) in q.iter_mut().enumerate() {
                    let low = block[half * 64 + t % 2 * 32 + j] >> (t / 2 * 4) & 15;
                    let high = block[128 + half * 32 + j] >> (2 * t) & 3;
                    *q = low | high << 4;
                }
                let d = f16_at(block, 208);
                let sc = |i: usize| d * f32::from(block[192 + index * 2 + i] as i8);
                (32, [sc(0), sc(1)], 0.0)
            }
        };
        Self { q, offset, scale, min }
    }
}

fn f16_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Low nibbles are values 0 to 15, high nibbles 16 to 31.
fn nibbles(bytes: &[u8], q: &mut [u8; 32]) {
    for (j, &b) in bytes.iter().enumerate() {
        q[j] = b & 15;
        q[j + 16] = b >> 4;
    }
}

fn fifth_bits(bytes: &[u8], q: &mut [u8; 32]) {
    for (j, q) in q.iter_mut().enumerate() {
        *q |= (bytes[j / 8] >> (j % 8) & 1) << 4;
    }
}

/// The 6-bit scale and minimum of group `j`, as ggml's `get_scale_min_k4` unpacks them.
fn scale_min_k4(q: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (q[j] & 63, q[j + 4] & 63)
    } else {
        (q[j + 4] & 15 | q[j - 4] >> 6 << 4, q[j + 4] >> 4 | q[j] >> 6 << 4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_hex(s: &str) -> Vec<u8> {
        s.as_bytes()
            .chunks(2)
            .map(|h| u8::from_str_radix(std::str::from_utf8(h).unwrap(), 16).unwrap())
            .collect()
    }

    /// Blocks and values from llama.cpp's own Python library.
    #[test]
    fn reads_blocks_as_ggml_does() {
        let mut seen = 0;
        for line in include_str!("../tests/data/ggml_blocks.txt").lines().filter(|l| !l.starts_with('#')) {
            let fields: Vec<&str> = line.split(' ').collect();
            let ty = crate::fixtures::TYPES.into_iter().find(|ty| format!("{ty:?}") == fields[0]).unwrap();
            let (block, expect) = (from_hex(fields[1]), from_hex(fields[2]));
            let mut out = vec![0.0; ty.block_len()];
            dequantize_row(ty, &block, &mut out).unwrap();
            for (i, (x, e)) in out.iter().zip(expect.as_chunks::<4>().0).enumerate() {
                let e = f32::from_be_bytes(*e);
                assert!((x - e).abs() <= 2e-7 * (1.0 + e.abs()), "{ty:?} at {i}: {x} for {e}");
            }
            seen += 1;
        }
        assert_eq!(seen, 10);
    }

    #[test]
    fn sizes_are_those_of_ggml() {
        let check = |number, len, bytes| {
            let ty = TensorType::from_ggml(number).unwrap();
            assert_eq!((ty.block_len(), ty.block_bytes()), (len, bytes), "{ty:?}");
        };
        check(0, 1, 4);
        check(1, 1, 2);
        check(2, 32, 18);
        check(3, 32, 20);
        check(6, 32, 22);
        check(7, 32, 24);
        check(8, 32, 34);
        check(12, 256, 144);
        check(13, 256, 176);
        check(14, 256, 210);
        check(30, 1, 2);
        assert_eq!(TensorType::from_ggml(10), None);
        assert_eq!(TensorType::Q4_1.row_bytes(576), 360);
    }

    #[test]
    fn wrong_lengths_are_refused() {
        let ty = TensorType::Q8_0;
        let partial = dequantize_row(ty, &[0; 34], &mut [0.0; 31]);
        assert_eq!(partial, Err(DequantizeError::PartialBlock { ty, cols: 31 }));
        let short = dequantize_row(ty, &[0; 33], &mut [0.0; 32]);
        assert_eq!(short, Err(DequantizeError::Length { ty, cols: 32, expected: 34, found: 33 }));
    }
}
