//! Filters (min-p, top-k, top-p) and the draw itself: the vocabulary is read with vector kernels and never sorted.

use forebay_kernels::{SUMMED, argmax, exp_in_place, exp_sums};
use forebay_types::TokenId;
use forebay_wire::Sampling;

use super::largest::{at_least, largest};

/// First guess for how many of the most likely tokens hold `top_p` of the mass; grown by [`GROWTH`] until they do.
const GUESS: usize = 256;
const GROWTH: usize = 16;
/// So few are sorted, more are halved first.
const SORTED: usize = 32;

/// Reused buffers of one sequence.
#[derive(Default)]
pub struct Candidates {
    /// (token, weight), the weight being a logit until [`Self::weigh`].
    kept: Vec<(TokenId, f32)>,
    weights: Vec<f32>,
    /// Of every [`SUMMED`] tokens.
    sums: Vec<f64>,
}

/// How candidates are laid out on the line that the draw points at.
enum Layout {
    ById,
    /// By falling probability, ties by id.
    Falling,
}

/// From logits to weights: relative to the most likely token, whose weight is 1.
#[derive(Clone, Copy)]
struct Softmax {
    max: f32,
    inverse: f32,
}

impl Candidates {
    /// Draws one token: the one whose interval of the cumulative distribution holds `uniform`, in [0, 1).
    ///
    /// Temperature scales the logits first, so the filters see the distribution that is drawn from. Tokens are laid
    /// out by id where top-k and top-p cut nothing, else by falling probability (ties by id): a fixed order, so equal
    /// logits and an equal `uniform` give an equal token. What is less likely than the most likely one by e^87, is banned
    /// or is NaN is never drawn.
    pub fn draw(&mut self, logits: &[f32], params: &Sampling, uniform: f64) -> TokenId {
        let Some(best) = argmax(logits) else { return 0 };
        let max = logits[best];
        if max.is_infinite() {
            // A broken model. The engine must go on; one token is as good as any.
            return best as TokenId;
        }
        let softmax = Softmax { max, inverse: 1.0 / params.temperature };
        let k = if params.top_k > 0 { params.top_k as usize } else { logits.len() };
        let layout = if k < logits.len() {
            self.take_top(logits, softmax, k, params.min_p)
        } else if params.min_p > 0.0 {
            let floor =
                f64::from(max) + f64::from(params.temperature) * (f64::from(params.min_p).ln() - MARGIN);
            at_least(logits, (floor as f32).next_down(), &mut self.kept);
            self.weigh(softmax, params.min_p);
            Layout::ById
        } else if params.top_p < 1.0 {
            let wanted = self.sum(logits, softmax) * f64::from(params.top_p);
            self.take_mass(logits, softmax, wanted);
            return self.draw_falling(uniform);
        } else {
            return self.draw_from_all(logits, softmax, uniform).unwrap_or(best as TokenId);
        };
        if params.top_p < 1.0 {
            let wanted = mass(&self.kept) * f64::from(params.top_p);
            self.keep_mass(wanted);
            return self.draw_falling(uniform);
        }
        match layout {
            Layout::ById => self.draw_by_id(uniform),
            Layout::Falling => self.draw_falling(uniform),
        }
    }

    /// The `k` most likely whose weight is `min_p` at least.
    fn take_top(&mut self, logits: &[f32], softmax: Softmax, k: usize, min_p: f32) -> Layout {
        // One more tells whether any is cut.
        largest(logits, k + 1, &mut self.kept);
        self.weigh(softmax, min_p);
        if self.kept.len() <= k {
            self.kept.sort_unstable_by_key(|&(id, _)| id);
            return Layout::ById;
        }
        self.kept.select_nth_unstable_by(k, by_probability);
        self.kept.truncate(k);
        Layout::Falling
    }

    /// The smallest set of most likely tokens that weighs at least `wanted` (Holtzman et al. 2020).
    fn take_mass(&mut self, logits: &[f32], softmax: Softmax, wanted: f64) {
        let mut guess = GUESS;
        loop {
            largest(logits, guess, &mut self.kept);
            self.weigh(softmax, 0.0);
            if guess >= logits.len() || mass(&self.kept) >= wanted {
                return self.keep_mass(wanted);
            }
            guess *= GROWTH;
        }
    }

    /// Of the candidates, the most likely that weigh at least `wanted`.
    fn keep_mass(&mut self, wanted: f64) {
        let last = place(&mut self.kept, |sum| sum >= wanted);
        self.kept.truncate(last + 1);
    }

    /// Turns the candidates' logits into weights, and drops those that weigh nothing, or less than `floor`.
    fn weigh(&mut self, softmax: Softmax, floor: f32) {
        self.weights.clear();
        self.weights.extend(self.kept.iter().map(|&(_, logit)| logit));
        exp_in_place(&mut self.weights, softmax.max, softmax.inverse);
        for (kept, &weight) in self.kept.iter_mut().zip(&self.weights) {
            kept.1 = weight;
        }
        self.kept.retain(|&(_, weight)| weight > 0.0 && weight >= floor);
    }

    /// The weight of all tokens, and in `sums` that of each part of them.
    fn sum(&mut self, logits: &[f32], softmax: Softmax) -> f64 {
        self.sums.clear();
        exp_sums(logits, softmax.max, softmax.inverse, |sum| self.sums.push(sum));
        self.sums.iter().sum()
    }

    /// From the whole vocabulary: only the part in which the draw ends is looked at token by token.
    fn draw_from_all(&mut self, logits: &[f32], softmax: Softmax, uniform: f64) -> Option<TokenId> {
        let mut target = uniform * self.sum(logits, softmax);
        // Rounding can leave the draw a hair behind the last: then that is it.
        let mut part = self.sums.iter().rposition(|&sum| sum > 0.0)?;
        for (i, &sum) in self.sums[..part].iter().enumerate() {
            if target < sum {
                part = i;
                break;
            }
            target -= sum;
        }
        let start = part * SUMMED;
        self.weights.clear();
        self.weights.extend_from_slice(&logits[start..logits.len().min(start + SUMMED)]);
        exp_in_place(&mut self.weights, softmax.max, softmax.inverse);
        let weighing = self.weights.iter().enumerate().filter(|&(_, &weight)| weight > 0.0);
        walk(weighing.map(|(i, &weight)| ((start + i) as TokenId, weight)), target)
    }

    fn draw_by_id(&self, uniform: f64) -> TokenId {
        let target = uniform * mass(&self.kept);
        walk(self.kept.iter().copied(), target).unwrap_or_default()
    }

    fn draw_falling(&mut self, uniform: f64) -> TokenId {
        let target = uniform * mass(&self.kept);
        let at = place(&mut self.kept, |sum| target < sum);
        self.kept[at].0
    }
}

/// In natural logarithms: what is so little below `min_p` is looked at closely. More than all rounding between a logit and
/// its weight.
const MARGIN: f64 = 1e-3;

fn mass(kept: &[(TokenId, f32)]) -> f64 {
    kept.iter().map(|&(_, weight)| f64::from(weight)).sum()
}

/// The first whose interval ends behind `target`; the last where rounding keeps the sum below that.
fn walk(line: impl Iterator<Item = (TokenId, f32)>, target: f64) -> Option<TokenId> {
    let mut sum = 0.0;
    let mut last = None;
    for (id, weight) in line {
        sum += f64::from(weight);
        last = Some(id);
        if target < sum {
            break;
        }
    }
    last
}

/// In falling order, the place of the first whose sum with all before it is `reached`; the last where none is. Those
/// before it come to stand before it, in no order. `kept` is not empty.
///
/// Halves what is left until it is short enough to be sorted: O(n) in the mean.
fn place(kept: &mut [(TokenId, f32)], reached: impl Fn(f64) -> bool) -> usize {
    let (mut from, mut to, mut sum) = (0, kept.len(), 0.0);
    while to - from > SORTED {
        let middle = from + (to - from) / 2;
        kept[from..to].select_nth_unstable_by(middle - from, by_probability);
        let half = mass(&kept[from..middle]);
        if reached(sum + half) {
            to = middle;
        } else {
            (from, sum) = (middle, sum + half);
        }
    }
    kept[from..to].sort_unstable_by(by_probability);
    let at = kept[from..to].iter().position(|&(_, weight)| {
        sum += f64::from(weight);
        reached(sum)
    });
    at.map_or(to - 1, |at| from + at)
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

    /// The plain definition: sort everything, cut, and give each token its interval.
    fn intervals(logits: &[f32], params: &Sampling) -> Vec<(TokenId, f64, f64)> {
        let max = logits.iter().copied().filter(|l| !l.is_nan()).fold(f32::NEG_INFINITY, f32::max);
        let mut all: Vec<(TokenId, f32)> = logits
            .iter()
            .enumerate()
            .map(|(id, &l)| (id as TokenId, ((l - max) / params.temperature).exp()))
            .collect();
        all.retain(|&(_, p)| p > 0.0 && p >= params.min_p);
        let cut_by_k = params.top_k > 0 && (params.top_k as usize) < all.len();
        if cut_by_k || params.top_p < 1.0 {
            all.sort_by(by_probability);
        }
        if cut_by_k {
            all.truncate(params.top_k as usize);
        }
        if params.top_p < 1.0 {
            let wanted = mass(&all) * f64::from(params.top_p);
            let mut sum = 0.0;
            let enough = all.iter().position(|&(_, p)| {
                sum += f64::from(p);
                sum >= wanted
            });
            all.truncate(enough.map_or(all.len(), |last| last + 1));
        }
        let total = mass(&all);
        let mut sum = 0.0;
        let interval = |&(id, p): &(TokenId, f32)| {
            let from = sum;
            sum += f64::from(p) / total;
            (id, from, sum)
        };
        all.iter().map(interval).collect()
    }

    /// Every draw is in its token's interval, but for what two ways of rounding `exp` can move a border.
    #[test]
    fn equals_the_naive_definition() {
        let mut state = 1u64;
        let mut next = move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 24) as f32
        };
        let mut candidates = Candidates::default();
        for round in 0..600 {
            let vocabulary = 1 + (next() * 5000.0) as usize;
            let spread = [4.0, 20.0, 120.0][round % 3];
            let mut logits: Vec<f32> = (0..vocabulary).map(|_| (next() - 0.5) * spread).collect();
            for _ in 0..if round % 4 == 0 { vocabulary / 2 } else { 0 } {
                let other = logits[(next() * vocabulary as f32) as usize % vocabulary];
                logits[(next() * vocabulary as f32) as usize % vocabulary] = match (next() * 4.0) as u32 {
                    0 => f32::NAN,
                    1 => f32::NEG_INFINITY,
                    _ => other,
                };
            }
            let params = Sampling {
                temperature: 0.25 + next(),
                top_p: if round % 3 == 0 { 1.0 } else { 0.3 + 0.69 * next() },
                top_k: if round % 2 == 0 { 0 } else { 1 + (next() * 1500.0) as u32 },
                min_p: if round % 5 == 0 { next() * 0.2 } else { 0.0 },
                ..Sampling::default()
            };
            let intervals = intervals(&logits, &params);
            for uniform in [0.0, f64::from(next()), f64::from(next()), 1.0 - f64::EPSILON] {
                let drawn = candidates.draw(&logits, &params, uniform);
                let own = intervals.iter().find(|&&(id, ..)| id == drawn);
                assert!(
                    own.is_some_and(|&(_, from, to)| (from - 1e-5..to + 1e-5).contains(&uniform)),
                    "round {round}: {drawn} at {own:?} for {uniform}, {params:?}"
                );
            }
        }
    }

    /// More than one part, most of them empty, and the draw at either end.
    #[test]
    fn banned_tokens_are_never_drawn() {
        let mut logits = vec![f32::NEG_INFINITY; 5 * SUMMED];
        (logits[2 * SUMMED - 1], logits[3 * SUMMED + 7]) = (1.0, 1.0);
        let params = Sampling::default();
        let mut candidates = Candidates::default();
        for (uniform, expect) in [
            (0.0, 2 * SUMMED - 1),
            (0.49, 2 * SUMMED - 1),
            (0.51, 3 * SUMMED + 7),
            (1.0 - f64::EPSILON / 2.0, 3 * SUMMED + 7),
        ] {
            assert_eq!(candidates.draw(&logits, &params, uniform) as usize, expect, "{uniform}");
        }
    }

    #[test]
    fn drawing_again_allocates_nothing() {
        let logits: Vec<f32> = (0..20_000).map(|id| (id % 97) as f32 * 0.1).collect();
        let plain = Sampling::default();
        for params in [
            plain.clone(),
            Sampling { top_k: 40, ..plain.clone() },
            Sampling { top_p: 0.9, ..plain.clone() },
            Sampling { min_p: 0.05, ..plain.clone() },
        ] {
            let mut candidates = Candidates::default();
            candidates.draw(&logits, &params, 0.5);
            let again = allocation_counter::measure(|| {
                candidates.draw(&logits, &params, 0.25);
            });
            assert_eq!(again.count_total, 0, "{params:?}");
        }
    }
}
