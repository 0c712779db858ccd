//! Weights, packed once at load for the kernels of [`crate::matmul()`].
//!
//! A matrix is cut into tiles of 32 output rows. A quantised tile is one stream of blocks, 32 columns each:
//!
//! | part   | bytes      | content                                                                         |
//! |--------|------------|---------------------------------------------------------------------------------|
//! | codes  | 512 / 1024 | 4-bit: for k-group `g` of 4, two vectors `[16 rows][4 k]`, low nibble `g`, high `g + 4`; 8-bit: the same for `g` of 8 |
//! | scales | 64 / 128 (/ 256) | f16 or f32 of the 32 rows (twice where a scale covers 16 columns)          |
//! | minima | 0 / 64 / 128 | f16 or f32 of the 32 rows                                                      |
//!
//! so that sixteen output rows share a vector, one broadcast of four activations feeds a `VPDPBUSD`, and decoding
//! reads memory strictly forward. A tile of f32 or f16 is `[k][32 rows]`, of bf16 `[k / 2][32 rows][2 k]`: pairs for
//! VDPBF16PS, an odd last column with a zero beside it. Codes are unsigned; a type with an offset takes
//! it off the integer sum, exactly.

mod pack;

use crate::buffer::Buffer;
use crate::{Isa, Pool, TensorType};

/// Output rows of a tile.
pub(crate) const TILE: usize = 32;
/// Columns of a quantised block.
pub(crate) const GROUP: usize = 32;

/// Why weights could not be packed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    #[error("a matrix needs at least one row and one column")]
    Empty,
    #[error("{cols} columns are no whole number of {ty:?} blocks")]
    PartialBlock { ty: TensorType, cols: usize },
    #[error("{rows} x {cols} {ty:?} weights are {expected} bytes, not {found}")]
    Length { ty: TensorType, rows: usize, cols: usize, expected: usize, found: usize },
    #[error("no memory for {bytes} bytes of weights")]
    Memory { bytes: usize },
}

/// Some output rows of a matrix, as they stand in a GGUF file: `rows` rows one after the other.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    pub ty: TensorType,
    pub rows: usize,
    pub data: &'a [u8],
}

/// A weight matrix `[rows, cols]`; a product with it maps `cols` inputs to `rows` outputs.
pub struct Matrix {
    isa: Isa,
    rows: usize,
    cols: usize,
    segments: Vec<Segment>,
}

/// Consecutive rows of one type.
pub(crate) struct Segment {
    pub(crate) ty: TensorType,
    pub(crate) first_row: usize,
    pub(crate) rows: usize,
    pub(crate) tile_bytes: usize,
    pub(crate) data: Buffer,
}

impl Segment {
    pub(crate) fn tiles(&self) -> usize {
        self.rows.div_ceil(TILE)
    }

    #[inline(always)]
    pub(crate) fn tile(&self, index: usize) -> &[u8] {
        &self.data[index * self.tile_bytes..(index + 1) * self.tile_bytes]
    }
}

/// How a quantised type is laid out in a tile.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    /// Two codes to a byte.
    pub(crate) nibbles: bool,
    /// What to take off a code; 0 or a power of two.
    pub(crate) offset: u8,
    /// Whether there is a minimum to add.
    pub(crate) min: bool,
    /// f32 scales and minima, for types whose scales are products that f16 can't hold.
    pub(crate) wide: bool,
    /// Scales per 32 columns: 1 or 2.
    pub(crate) halves: usize,
}

impl Layout {
    const PLAIN: Self = Self { nibbles: false, offset: 0, min: false, wide: false, halves: 1 };

    pub(crate) const fn code_bytes(self) -> usize {
        if self.nibbles { TILE * GROUP / 2 } else { TILE * GROUP }
    }

    /// Bytes of 32 scales.
    pub(crate) const fn scale_bytes(self) -> usize {
        if self.wide { TILE * 4 } else { TILE * 2 }
    }

    pub(crate) const fn block_bytes(self) -> usize {
        self.code_bytes() + self.scale_bytes() * (self.halves + self.min as usize)
    }
}

/// A quantised type as the kernels see it.
pub(crate) trait Quant {
    const LAYOUT: Layout;
}

macro_rules! quants {
    ($($name:ident: $layout:expr;)*) => {$(
        pub(crate) struct $name;
        impl Quant for $name {
            const LAYOUT: Layout = $layout;
        }
    )*};
}

quants! {
    Q4_0: Layout { nibbles: true, offset: 8, ..Layout::PLAIN };
    Q4_1: Layout { nibbles: true, min: true, ..Layout::PLAIN };
    Q5_0: Layout { offset: 16, ..Layout::PLAIN };
    Q5_1: Layout { min: true, ..Layout::PLAIN };
    Q8_0: Layout { offset: 128, ..Layout::PLAIN };
    Q4K: Layout { nibbles: true, min: true, wide: true, ..Layout::PLAIN };
    Q5K: Layout { min: true, wide: true, ..Layout::PLAIN };
    Q6K: Layout { offset: 32, wide: true, halves: 2, ..Layout::PLAIN };
}

/// The layout of a type; `None` for a float.
pub(crate) fn layout(ty: TensorType) -> Option<Layout> {
    Some(match ty {
        TensorType::F32 | TensorType::F16 | TensorType::BF16 => return None,
        TensorType::Q4_0 => Q4_0::LAYOUT,
        TensorType::Q4_1 => Q4_1::LAYOUT,
        TensorType::Q5_0 => Q5_0::LAYOUT,
        TensorType::Q5_1 => Q5_1::LAYOUT,
        TensorType::Q8_0 => Q8_0::LAYOUT,
        TensorType::Q4K => Q4K::LAYOUT,
        TensorType::Q5K => Q5K::LAYOUT,
        TensorType::Q6K => Q6K::LAYOUT,
    })
}

impl Matrix {
    /// Packs the rows of all parts, one after the other, into one matrix (queries, keys and values of a layer,
    /// say, which then cost one pass over the activations). Parts may differ in type.
    ///
    /// `isa` runs the products; where the CPU lacks it they run portably. O(weights), in parallel on `pool`;
    /// takes 0.63 bytes a weight for 4-bit types, 1.06 for 5 to 8 bits, and the own size for floats.
    pub fn pack(parts: &[Part<'_>], cols: usize, isa: Isa, pool: &Pool) -> Result<Self, PackError> {
        let rows = parts.iter().map(|part| part.rows).sum();
        if rows == 0 || cols == 0 {
            return Err(PackError::Empty);
        }
        for part in parts {
            let &Part { ty, rows, data } = part;
            if !cols.is_multiple_of(ty.block_len()) {
                return Err(PackError::PartialBlock { ty, cols });
            }
            let expected = rows.saturating_mul(ty.row_bytes(cols));
            if data.len() != expected {
                return Err(PackError::Length { ty, rows, cols, expected, found: data.len() });
            }
        }
        let mut segments = Vec::new();
        let mut first_row = 0;
        for same_type in parts.chunk_by(|a, b| a.ty == b.ty) {
            let segment = pack::segment(same_type, first_row, cols, pool)?;
            first_row += segment.rows;
            segments.push(segment);
        }
        Ok(Self { isa, rows, cols, segments })
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Memory that the packed weights take; also what one decoding step reads.
    pub fn bytes(&self) -> usize {
        self.segments.iter().map(|segment| segment.data.len()).sum()
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    pub(crate) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    pub(crate) fn has_quantized(&self) -> bool {
        self.segments.iter().any(|segment| segment.ty.is_quantized())
    }

    pub(crate) fn has_float(&self) -> bool {
        self.segments.iter().any(|segment| matches!(segment.ty, TensorType::F32 | TensorType::F16))
    }

    pub(crate) fn has_bf16(&self) -> bool {
        self.segments.iter().any(|segment| segment.ty == TensorType::BF16)
    }
}
