//! What steps take, learned from those that ran: what turns a bound in milliseconds into one in tokens.
//!
//! A step's time is taken to be `a + b·decodes + p·prefill tokens + c·Σ context of the prefill tokens`. The four costs are
//! fitted to the steps that ran by least squares with exponential forgetting (recursive least squares in its information
//! form), under two conditions that make it robust where loads hardly vary: no cost is negative, and what the loads of
//! late say nothing about stays as it was.

use std::time::Duration;

use crate::StepPlan;

const COSTS: usize = 4;

/// Units of the four quantities that make them about as large as each other: 8 decodes, 64 tokens, 64 tokens at context 1024.
const UNITS: [f64; COSTS] = [1.0, 8.0, 64.0, 65_536.0];

/// Weight that a step keeps with each later one: about the last twenty count.
const KEPT: f64 = 0.95;
/// The same while steps take something else than expected for some time: others use the machine, or don't any more. What
/// was true before is forgotten soon.
const KEPT_DRIFTING: f64 = 0.7;
/// From this mean of the errors' logarithms on: a third longer than expected, or a quarter shorter.
const DRIFT: f64 = 0.3;
/// Weight of the newest step in that mean. One outlier alone doesn't reach `DRIFT`.
const DRIFT_NEWEST: f64 = 0.2;

/// How much the costs so far weigh against one step.
const ANCHOR: f64 = 0.01;

/// A step this many times longer than expected was held up by something else: the machine, not the tokens.
const OUTLIER: f64 = 4.0;
/// And by this much, so that costs which were next to nothing can grow.
const OUTLIER_SECONDS: f64 = 0.001;

/// Steps with decodes, and with prefill, after which its costs are known well enough to doubt the clock.
const FAMILIAR: u32 = 3;

/// Shorter steps weigh no more than one of this length.
const SECONDS_MIN: f64 = 1e-4;

/// What there is to compute in a step, as far as its time depends on it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Load {
    /// Rows of one token.
    pub(crate) decodes: u32,
    /// Tokens of the other rows.
    pub(crate) prefill_tokens: u32,
    /// Sum of their positions: the tokens that each of them attends to.
    pub(crate) prefill_context: u64,
}

impl Load {
    pub(crate) fn of(plan: &StepPlan) -> Self {
        let mut load = Self::default();
        for row in (0..plan.rows()).map(|row| plan.row(row)) {
            if row.len() == 1 {
                load.decodes += 1;
            } else {
                load.prefill_tokens += row.len() as u32;
                load.prefill_context += context(plan.positions[row.start], row.len() as u32);
            }
        }
        load
    }

    pub(crate) fn prefill(start: u32, tokens: u32) -> Self {
        Self { decodes: 0, prefill_tokens: tokens, prefill_context: context(start, tokens) }
    }

    fn quantities(self) -> [f64; COSTS] {
        let raw = [1.0, f64::from(self.decodes), f64::from(self.prefill_tokens), self.prefill_context as f64];
        std::array::from_fn(|i| raw[i] / UNITS[i])
    }
}

/// Sum of the positions of `tokens` tokens from position `start` on.
fn context(start: u32, tokens: u32) -> u64 {
    let tokens = u64::from(tokens);
    u64::from(start) * tokens + tokens * tokens.saturating_sub(1) / 2
}

/// See the module. All in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Pace {
    /// Of a step, and of one unit of each quantity.
    costs: [f64; COSTS],
    /// Of the steps so far, the later the heavier: products of quantities, and of quantities with the time taken.
    products: [[f64; COSTS]; COSTS],
    moments: [f64; COSTS],
    /// Mean logarithm of taken / expected.
    drift: f64,
    steps: u32,
    decode_steps: u32,
    prefill_steps: u32,
}

impl Pace {
    /// Whether a step was learned from.
    pub(crate) fn is_known(&self) -> bool {
        self.steps > 0
    }

    /// A step with this load took `elapsed`.
    pub(crate) fn learn(&mut self, load: Load, elapsed: Duration) {
        let x = load.quantities();
        let mut taken = elapsed.as_secs_f64();
        let mut expected = taken;
        let mut kept = KEPT;
        if self.is_known() {
            let fitted = self.seconds(load);
            if self.is_familiar(load) {
                taken = taken.min(fitted * OUTLIER + OUTLIER_SECONDS);
                let error = (taken.max(SECONDS_MIN) / fitted.max(SECONDS_MIN)).ln();
                self.drift += DRIFT_NEWEST * (error - self.drift);
                if self.drift.abs() > DRIFT {
                    kept = KEPT_DRIFTING;
                }
            }
            expected = fitted.clamp(taken / OUTLIER, taken * OUTLIER);
        }
        // Relative errors are what counts: 2 ms are much for a step of decodes, and nothing for a full prefill.
        let weight = expected.max(SECONDS_MIN).powi(-2);
        for i in 0..COSTS {
            for j in 0..COSTS {
                self.products[i][j] = self.products[i][j] * kept + weight * x[i] * x[j];
            }
            self.moments[i] = self.moments[i] * kept + weight * x[i] * taken;
        }
        self.fit(weight * ANCHOR);
        self.steps = self.steps.saturating_add(1);
        self.decode_steps = self.decode_steps.saturating_add(u32::from(load.decodes > 0));
        self.prefill_steps = self.prefill_steps.saturating_add(u32::from(load.prefill_tokens > 0));
    }

    fn is_familiar(&self, load: Load) -> bool {
        (load.decodes == 0 || self.decode_steps >= FAMILIAR)
            && (load.prefill_tokens == 0 || self.prefill_steps >= FAMILIAR)
    }

    /// What a step with this load will take.
    pub(crate) fn seconds(&self, load: Load) -> f64 {
        load.quantities().iter().zip(self.costs).map(|(x, cost)| x * cost).sum()
    }

    /// What a chunk of prefill adds to a step.
    pub(crate) fn prefill_seconds(&self, start: u32, tokens: u32) -> f64 {
        self.seconds(Load::prefill(start, tokens)) - self.costs[0]
    }

    /// Tokens from position `start` on that fit into `seconds` beside what else is in the step.
    pub(crate) fn prefill_tokens(&self, start: u32, seconds: f64) -> u32 {
        // n tokens take n·(p + c·start) + n²·c/2: a quadratic equation, in the form that bears c = 0.
        let per_context = self.costs[3] / UNITS[3];
        let per_token = self.costs[2] / UNITS[2] + per_context * f64::from(start);
        let seconds = seconds.max(0.0);
        let tokens =
            2.0 * seconds / (per_token + (per_token * per_token + 2.0 * per_context * seconds).sqrt());
        // Free tokens (0/0): as many as one likes.
        if tokens.is_nan() { u32::MAX } else { tokens as u32 }
    }

    /// Least squares with no cost below zero: the most negative one is held at zero, and the rest solved again.
    fn fit(&mut self, anchor: f64) {
        let mut free = [true; COSTS];
        loop {
            let fitted = self.solve(free, anchor);
            let lowest = (0..COSTS).filter(|&i| free[i]).min_by(|&i, &j| fitted[i].total_cmp(&fitted[j]));
            match lowest {
                Some(lowest) if fitted[lowest] < 0.0 => free[lowest] = false,
                _ => {
                    self.costs = fitted;
                    return;
                }
            }
        }
    }

    /// Gaussian elimination over the `free` costs; the others are 0. The matrix is positive definite by its anchor, so no
    /// pivot is 0.
    fn solve(&self, free: [bool; COSTS], anchor: f64) -> [f64; COSTS] {
        // The second term keeps pivots clear of rounding errors.
        let anchors: [f64; COSTS] = std::array::from_fn(|i| anchor + 1e-9 * self.products[i][i]);
        let mut rows: [[f64; COSTS + 1]; COSTS] = std::array::from_fn(|i| {
            std::array::from_fn(|j| match (j, i == j) {
                (COSTS, _) => self.moments[i] + anchors[i] * self.costs[i],
                (_, on_diagonal) => self.products[i][j] + if on_diagonal { anchors[i] } else { 0.0 },
            })
        });
        for pivot in (0..COSTS).filter(|&i| free[i]) {
            let above = rows[pivot];
            for below in (pivot + 1..COSTS).filter(|&i| free[i]) {
                let factor = rows[below][pivot] / above[pivot];
                for (cell, above) in rows[below].iter_mut().zip(above).skip(pivot) {
                    *cell -= factor * above;
                }
            }
        }
        let mut solved = [0.0; COSTS];
        for i in (0..COSTS).rev().filter(|&i| free[i]) {
            let known: f64 = (i + 1..COSTS).map(|j| rows[i][j] * solved[j]).sum();
            solved[i] = (rows[i][COSTS] - known) / rows[i][i];
        }
        solved
    }
}

#[cfg(test)]
mod tests;
