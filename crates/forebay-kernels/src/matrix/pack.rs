//! Puts weights into tiles. Runs once per tensor, at load.

use half::f16;

use super::{GROUP, Layout, PackError, Part, Segment, TILE, layout};
use crate::buffer::Buffer;
use crate::tensor::Group;
use crate::{Pool, TensorType};

/// Packs parts of one type. Lengths have been checked.
pub(super) fn segment(
    parts: &[Part<'_>],
    first_row: usize,
    cols: usize,
    pool: &Pool,
) -> Result<Segment, PackError> {
    let ty = parts[0].ty;
    let rows: usize = parts.iter().map(|part| part.rows).sum();
    let layout = layout(ty);
    let tile_bytes = match layout {
        Some(layout) => cols / GROUP * layout.block_bytes(),
        None if ty == TensorType::BF16 => cols.div_ceil(2) * TILE * 4,
        None => cols * TILE * ty.block_bytes(),
    };
    let bytes = rows.div_ceil(TILE).saturating_mul(tile_bytes);
    let mut data = Buffer::zeroed(bytes).ok_or(PackError::Memory { bytes })?;
    let row_bytes = ty.row_bytes(cols);
    // Parts without rows have no data to take rows from.
    let source: Vec<&[u8]> = parts.iter().flat_map(|part| part.data.chunks_exact(row_bytes)).collect();
    pool.run_rows(&mut data, tile_bytes, 1, &|tile, out| {
        let rows = &source[tile * TILE..((tile + 1) * TILE).min(source.len())];
        match layout {
            Some(layout) => quantized_tile(ty, layout, rows, out),
            None if ty == TensorType::BF16 => bf16_tile(rows, out),
            None => float_tile(ty.block_bytes(), rows, out),
        }
    });
    Ok(Segment { ty, first_row, rows, tile_bytes, data })
}

/// Rows that a tile lacks stay zero: zero codes with zero scale.
fn quantized_tile(ty: TensorType, layout: Layout, rows: &[&[u8]], out: &mut [u8]) {
    let groups_per_block = ty.block_len() / GROUP;
    for (index, out) in out.chunks_exact_mut(layout.block_bytes()).enumerate() {
        let (block, group) = (index / groups_per_block, index % groups_per_block);
        for (row, bytes) in rows.iter().enumerate() {
            let bytes = &bytes[block * ty.block_bytes()..(block + 1) * ty.block_bytes()];
            let group = Group::read(ty, bytes, group);
            codes(layout, &group.q, row, out);
            let mut at = layout.code_bytes();
            for &scale in group.scale.iter().take(layout.halves) {
                number(layout, scale, &mut out[at..], row);
                at += layout.scale_bytes();
            }
            if layout.min {
                number(layout, group.min, &mut out[at..], row);
            }
        }
    }
}

fn codes(layout: Layout, q: &[u8; GROUP], row: usize, out: &mut [u8]) {
    // [k-group][vector of 16 rows][row][k]
    let (vector, lane) = (row / 16, row % 16);
    for (k, &q) in q.iter().enumerate() {
        let (g, j) = (k / 4, k % 4);
        if layout.nibbles {
            out[g % 4 * 128 + vector * 64 + lane * 4 + j] |= if g < 4 { q } else { q << 4 };
        } else {
            out[g * 128 + vector * 64 + lane * 4 + j] = q;
        }
    }
}

fn number(layout: Layout, x: f32, out: &mut [u8], row: usize) {
    if layout.wide {
        out[row * 4..row * 4 + 4].copy_from_slice(&x.to_le_bytes());
    } else {
        // Exact: the narrow layouts are those whose file has f16.
        out[row * 2..row * 2 + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes());
    }
}

fn float_tile(width: usize, rows: &[&[u8]], out: &mut [u8]) {
    for (k, out) in out.chunks_exact_mut(TILE * width).enumerate() {
        for (out, row) in out.chunks_exact_mut(width).zip(rows) {
            out.copy_from_slice(&row[k * width..(k + 1) * width]);
        }
    }
}

/// The smallest weight, 2^-50. A product with an activation of at least [`crate::activations::BF16_MIN`] is a
/// multiple of 2^-120, and so is every sum of such: none is subnormal, which VDPBF16PS alone would take for zero.
const BF16_MIN: u16 = (127 - 50) << 7;

fn bf16_tile(rows: &[&[u8]], out: &mut [u8]) {
    for (pair, out) in out.chunks_exact_mut(TILE * 4).enumerate() {
        for (out, row) in out.as_chunks_mut::<4>().0.iter_mut().zip(rows) {
            let weights = row[pair * 4..].as_chunks::<2>().0;
            for (out, &weight) in out.as_chunks_mut::<2>().0.iter_mut().zip(weights) {
                let size = u16::from_le_bytes(weight) & 0x7fff;
                *out = if size < BF16_MIN { [0; 2] } else { weight };
            }
        }
    }
}
