//! Rotary position embedding (Su et al., "RoFormer"), from a table of cosines and sines.
//!
//! Deliberately absent: how a model derives its scaling (linear, NTK, Llama 3, YaRN). Who reads the model's
//! configuration turns that into a factor per frequency and, for YaRN, a magnitude.

/// Which two values of a head rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RopeStyle {
    /// `(0, 1), (2, 3), ...`: GGUF files of the `llama` architecture.
    Interleaved,
    /// `(0, n/2), (1, n/2 + 1), ...`: GPT-NeoX, Hugging Face, and the other GGUF architectures (Qwen, Gemma).
    HalfSplit,
}

/// Cosines and sines of every position: `positions_max · rotary_dim` f32.
#[derive(Debug, Clone)]
pub struct RopeTable {
    rotary_dim: usize,
    positions: usize,
    /// `[position][rotary_dim / 2]` of (cos, sin).
    turns: Vec<(f32, f32)>,
}

impl RopeTable {
    /// Frequencies `theta^(-2i / rotary_dim)`, each divided by its entry in `factors` (as GGUF's
    /// `rope_freqs.weight` means it), all for positions below `positions_max`.
    ///
    /// `rotary_dim` is even: the head size, or less where only its first values rotate. Angles are computed in
    /// f64, so that late positions are as exact as early ones.
    ///
    /// # Panics
    /// If `rotary_dim` is odd or `factors` hasn't `rotary_dim / 2` entries.
    pub fn new(rotary_dim: usize, theta: f32, positions_max: usize, factors: Option<&[f32]>) -> Self {
        Self::with_magnitude(rotary_dim, theta, positions_max, factors, 1.0)
    }

    /// [`Self::new`] with cosines and sines scaled by `magnitude` (YaRN's attention factor).
    pub fn with_magnitude(
        rotary_dim: usize,
        theta: f32,
        positions_max: usize,
        factors: Option<&[f32]>,
        magnitude: f32,
    ) -> Self {
        assert!(rotary_dim.is_multiple_of(2), "values rotate in pairs");
        let pairs = rotary_dim / 2;
        assert!(factors.is_none_or(|f| f.len() == pairs), "one factor per pair");
        let frequencies: Vec<f64> = (0..pairs)
            .map(|i| {
                let plain = f64::from(theta).powf(-2.0 * i as f64 / rotary_dim as f64);
                plain / factors.map_or(1.0, |f| f64::from(f[i]))
            })
            .collect();
        let magnitude = f64::from(magnitude);
        let turns = (0..positions_max)
            .flat_map(|position| {
                frequencies.iter().map(move |f| {
                    let (sin, cos) = (position as f64 * f).sin_cos();
                    ((cos * magnitude) as f32, (sin * magnitude) as f32)
                })
            })
            .collect();
        Self { rotary_dim, positions: positions_max, turns }
    }

    pub fn positions(&self) -> usize {
        self.positions
    }

    pub fn rotary_dim(&self) -> usize {
        self.rotary_dim
    }
}

/// Rotates every head of one token: `heads` is `[n, head_dim]`, queries and keys alike.
///
/// # Panics
/// If `position` is beyond the table, or `heads` is no whole number of heads.
pub fn rope_in_place(
    table: &RopeTable,
    style: RopeStyle,
    heads: &mut [f32],
    head_dim: usize,
    position: usize,
) {
    assert!(position < table.positions, "position {position} of {}", table.positions);
    assert!(head_dim >= table.rotary_dim && heads.len().is_multiple_of(head_dim), "whole heads");
    let pairs = table.rotary_dim / 2;
    let turns = &table.turns[position * pairs..(position + 1) * pairs];
    for head in heads.chunks_exact_mut(head_dim) {
        let head = &mut head[..table.rotary_dim];
        match style {
            RopeStyle::Interleaved => {
                for (pair, &(cos, sin)) in head.as_chunks_mut::<2>().0.iter_mut().zip(turns) {
                    *pair = turn(*pair, cos, sin);
                }
            }
            RopeStyle::HalfSplit => {
                let (a, b) = head.split_at_mut(pairs);
                for ((a, b), &(cos, sin)) in a.iter_mut().zip(b).zip(turns) {
                    [*a, *b] = turn([*a, *b], cos, sin);
                }
            }
        }
    }
}

#[inline(always)]
fn turn([a, b]: [f32; 2], cos: f32, sin: f32) -> [f32; 2] {
    [a * cos - b * sin, a * sin + b * cos]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition: the pair is a complex number, turned by `position · theta^(-2i/n)`.
    fn check(style: RopeStyle, dim: usize, rotary: usize, position: usize) {
        let table = RopeTable::new(rotary, 10_000.0, position + 1, None);
        let x: Vec<f32> = (0..2 * dim).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut y = x.clone();
        rope_in_place(&table, style, &mut y, dim, position);
        for head in 0..2 {
            let (x, y) = (&x[head * dim..][..dim], &y[head * dim..][..dim]);
            assert_eq!(x[rotary..], y[rotary..]);
            for i in 0..rotary / 2 {
                let (a, b) = match style {
                    RopeStyle::Interleaved => (2 * i, 2 * i + 1),
                    RopeStyle::HalfSplit => (i, i + rotary / 2),
                };
                let angle = position as f64 * 10_000_f64.powf(-2.0 * i as f64 / rotary as f64);
                let (re, im) = (f64::from(x[a]), f64::from(x[b]));
                assert!((f64::from(y[a]) - (re * angle.cos() - im * angle.sin())).abs() < 1e-6);
                assert!((f64::from(y[b]) - (re * angle.sin() + im * angle.cos())).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn rotates_as_defined() {
        for style in [RopeStyle::Interleaved, RopeStyle::HalfSplit] {
            for (dim, rotary) in [(64, 64), (8, 8), (64, 16)] {
                for position in [0, 1, 17, 8191] {
                    check(style, dim, rotary, position);
                }
            }
        }
    }

    #[test]
    fn factors_slow_a_frequency_and_magnitude_scales() {
        let table = RopeTable::with_magnitude(4, 100.0, 9, Some(&[2.0, 4.0]), 3.0);
        let plain = RopeTable::new(4, 100.0, 9, None);
        assert!((table.turns[8 * 2].0 - 3.0 * plain.turns[4 * 2].0).abs() < 1e-6);
        assert!((table.turns[8 * 2 + 1].1 - 3.0 * plain.turns[2 * 2 + 1].1).abs() < 1e-6);
    }
}
