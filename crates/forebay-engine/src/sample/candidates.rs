//! Filters (min-p, top-k, top-p) and the draw itself, without sorting the whole vocabulary.

use forebay_types::TokenId;
use forebay_wire::Sampling;

/// First guess for how many of the most likely tokens hold `top_p` of the mass; grown by 8 until they do.
const SORTED_MIN: usize = 128;

/// Reused buffers of one sequence.
#[derive(Default)]
pub struct Candidates {
    /// (token, unnormalised probability)
    kept: Vec<(TokenId, f32)>,
}

impl Candidates {
    /// Draws one token: the one whose interval of the cumulative distribution holds `uniform`, in [0, 1).
    ///
    /// Temperature scales the logits first, so the filters see the distribution that is drawn from. Tokens are laid
    /// out by id where top-k and top-p cut nothing, else by falling probability (ties by id): a fixed order, so equal
    /// logits and an equal `uniform` give an equal token.
    pub fn draw(&mut self, logits: &[f32], params: &Sampling, uniform: f64) -> TokenId {
        let inverse = 1.0 / params.temperature;
        let max = logits.iter().copied().filter(|l| !l.is_nan()).fold(f32::NEG_INFINITY, f32::max);
        // exp(-∞) = 0 drops banned tokens; NaN compares false everywhere and is dropped too.
        let floor = if params.min_p > 0.0 { params.min_p } else { 0.0 };
        self.kept.clear();
        for (id, &logit) in logits.iter().enumerate() {
            let p = ((logit - max) * inverse).exp();
            if p > 0.0 && p >= floor {
                self.kept.push((id as TokenId, p));
            }
        }
        if self.kept.is_empty() {
            // All NaN or infinite: a broken model. The engine must go on; the first token is as good as any.
            return super::argmax(logits);
        }
        if params.top_k > 0 && (params.top_k as usize) < self.kept.len() {
            self.keep_largest(params.top_k as usize);
        }
        if params.top_p < 1.0 {
            self.keep_mass(params.top_p);
        }
        let total: f64 = self.kept.iter().map(|&(_, p)| f64::from(p)).sum();
        let target = uniform * total;
        let mut sum = 0.0;
        for &(id, p) in &self.kept {
            sum += f64::from(p);
            if target < sum {
                return id;
            }
        }
        self.kept[self.kept.len() - 1].0
    }

    fn keep_largest(&mut self, k: usize) {
        self.kept.select_nth_unstable_by(k - 1, by_probability);
        self.kept.truncate(k);
        self.kept.sort_unstable_by(by_probability);
    }

    /// The smallest set of most likely tokens that holds at least `top_p` of the mass (Holtzman et al. 2020).
    fn keep_mass(&mut self, top_p: f32) {
        let total: f64 = self.kept.iter().map(|&(_, p)| f64::from(p)).sum();
        let wanted = total * f64::from(top_p);
        let mut sorted = SORTED_MIN;
        loop {
            let n = sorted.min(self.kept.len());
            if n < self.kept.len() {
                self.kept.select_nth_unstable_by(n - 1, by_probability);
            }
            self.kept[..n].sort_unstable_by(by_probability);
            let mut sum = 0.0;
            let enough = self.kept[..n].iter().position(|&(_, p)| {
                sum += f64::from(p);
                sum >= wanted
            });
            match enough {
                Some(last) => return self.kept.truncate(last + 1),
                // Rounding can leave the sum a hair below a top_p near 1: then everything is kept.
                None if n == self.kept.len() => return,
                None => sorted *= 8,
            }
        }
    }
}

fn by_probability(a: &(TokenId, f32), b: &(TokenId, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every token is drawn for exactly its share of the uniform numbers, and no other token for any.
    #[test]
    fn a_known_distribution_is_cut_and_drawn_exactly() {
        let logits = [0.5f32, 0.25, 0.125, 0.0625, 0.0625].map(f32::ln);
        let check = |change: &dyn Fn(&mut Sampling), weights: [u32; 5]| {
            let mut params = Sampling::default();
            change(&mut params);
            let draws = weights.iter().sum::<u32>() * 16;
            let mut counts = [0; 5];
            let mut candidates = Candidates::default();
            for draw in 0..draws {
                // The middle of each step: rounding can't move it over a border.
                let uniform = (f64::from(draw) + 0.5) / f64::from(draws);
                counts[candidates.draw(&logits, &params, uniform) as usize] += 1;
            }
            assert_eq!(counts, weights.map(|weight| weight * 16), "{params:?}");
        };
        check(&|_| {}, [8, 4, 2, 1, 1]);
        check(&|p| p.temperature = 0.5, [64, 16, 4, 1, 1]);
        check(&|p| p.top_k = 1, [1, 0, 0, 0, 0]);
        check(&|p| p.top_k = 2, [2, 1, 0, 0, 0]);
        check(&|p| p.top_k = 4, [8, 4, 2, 1, 0]); // of equals, the lower id
        check(&|p| p.top_k = 9, [8, 4, 2, 1, 1]);
        check(&|p| p.top_p = 0.4, [1, 0, 0, 0, 0]);
        check(&|p| p.top_p = 0.6, [2, 1, 0, 0, 0]);
        check(&|p| p.top_p = 0.8, [4, 2, 1, 0, 0]); // the first sum that is not below it
        check(&|p| p.top_p = 0.9, [8, 4, 2, 1, 0]);
        check(&|p| p.min_p = 0.2, [4, 2, 1, 0, 0]); // of the most likely one's probability
        check(&|p| p.min_p = 0.6, [1, 0, 0, 0, 0]);
        check(&|p| p.min_p = 0.1, [8, 4, 2, 1, 1]);
        // One after another: `top_p` is a share of what the others left.
        check(&|p| (p.top_k, p.top_p) = (3, 0.8), [2, 1, 0, 0, 0]);
        check(&|p| (p.min_p, p.top_p) = (0.2, 0.8), [2, 1, 0, 0, 0]);
        check(&|p| (p.min_p, p.top_k) = (0.2, 2), [2, 1, 0, 0, 0]);
        check(&|p| (p.temperature, p.min_p) = (0.5, 0.2), [4, 1, 0, 0, 0]); // `min_p` after the temperature
    }

    /// The filtered draw against the plain definition: sort everything, cut, walk.
    #[test]
    fn equals_the_naive_definition() {
        let naive = |logits: &[f32], params: &Sampling, uniform: f64| {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut all: Vec<(TokenId, f32)> = logits
                .iter()
                .enumerate()
                .map(|(id, &l)| (id as TokenId, ((l - max) / params.temperature).exp()))
                .collect();
            all.retain(|&(_, p)| p >= params.min_p);
            let cut_by_k = params.top_k > 0 && (params.top_k as usize) < all.len();
            if cut_by_k || params.top_p < 1.0 {
                all.sort_by(by_probability);
            }
            if cut_by_k {
                all.truncate(params.top_k as usize);
            }
            let total: f64 = all.iter().map(|&(_, p)| f64::from(p)).sum();
            let mut sum = 0.0;
            let mut cut = all.len();
            for (i, &(_, p)) in all.iter().enumerate() {
                sum += f64::from(p);
                if params.top_p < 1.0 && sum >= total * f64::from(params.top_p) {
                    cut = i + 1;
                    break;
                }
            }
            all.truncate(cut);
            let total: f64 = all.iter().map(|&(_, p)| f64::from(p)).sum();
            let mut sum = 0.0;
            all.iter()
                .find(|&&(_, p)| {
                    sum += f64::from(p);
                    uniform * total < sum
                })
                .map(|&(id, _)| id)
        };
        let mut state = 1u64;
        let mut next = move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 24) as f32
        };
        let mut candidates = Candidates::default();
        for round in 0..200 {
            let logits: Vec<f32> = (0..2000).map(|_| next() * 4.0).collect();
            let params = Sampling {
                temperature: 0.25 + next(),
                top_p: if round % 3 == 0 { 1.0 } else { 0.3 + 0.69 * next() },
                top_k: if round % 2 == 0 { 0 } else { 1 + (next() * 1500.0) as u32 },
                min_p: if round % 5 == 0 { next() * 0.2 } else { 0.0 },
                ..Sampling::default()
            };
            let uniform = f64::from(next());
            assert_eq!(
                Some(candidates.draw(&logits, &params, uniform)),
                naive(&logits, &params, uniform),
                "{params:?}"
            );
        }
    }
}
