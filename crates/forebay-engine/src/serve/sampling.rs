//! The rows of a step that want a token: what each needs from its choice, so that they can be sampled in parallel.

use std::sync::Arc;
use std::time::Instant;

use forebay_grammar::{GrammarError, Mask};
use forebay_schedule::{SeqId, StepPlan};
use forebay_types::TokenId;

use super::constrain::Constrained;
use super::step_loop::LoopState;
use super::submission::How;
use super::watchdog::InStep;
use crate::sample::{Choice as Sampled, Sampler, Wanted};

pub(super) struct SampleJob {
    pub seq: SeqId,
    pub row: usize,
    pub sampler: Option<Sampler>,
    /// Whose end tokens may not be chosen now.
    pub banned: Option<Arc<How>>,
    /// Tokens that would complete a bad word.
    pub bad: Vec<TokenId>,
    /// Whose allowed tokens are the only ones.
    pub allowed: Option<Arc<How>>,
    pub logprobs: Option<Wanted>,
    pub constrained: Option<Constrained>,
    /// May come whatever the constraint says.
    pub think_token: Option<TokenId>,
    pub mask: Option<Mask>,
    pub sampled: Option<Sampled>,
}

impl SampleJob {
    /// Does nothing where the sampler was taken away.
    pub(super) fn sample(&mut self, row: &[f32]) {
        let Some(sampler) = &mut self.sampler else { return };
        let allowed = self.allowed.as_ref().and_then(|how| how.allowed.as_ref());
        if let Some(ends) = &self.banned {
            self.bad.extend_from_slice(&ends.end_tokens);
        }
        let mask = self.mask.as_ref().or(allowed);
        self.sampled = Some(sampler.choose(row, &self.bad, mask, self.logprobs.as_ref()));
    }
}

impl LoopState {
    /// The masks of the rows to be sampled, which were made while the model computed. A choice whose constraint failed
    /// is not sampled, and its request ends with the reason.
    pub(super) fn take_masks(&mut self) {
        for job in &mut self.jobs {
            let Some(constrained) = &mut job.constrained else { continue };
            let allowed = job.allowed.as_ref().and_then(|how| how.allowed.as_ref());
            let mask = constrained.mask().and_then(|mut mask| {
                job.think_token.into_iter().for_each(|token| mask.allow(token));
                match allowed {
                    Some(allowed) if !mask.intersect(allowed) => Err(GrammarError::Matching(
                        "none of `allowed_token_ids` may come next in the constraint".to_owned(),
                    )),
                    _ => Ok(mask),
                }
            });
            match mask {
                Ok(mask) => job.mask = Some(mask),
                Err(error) => {
                    job.sampler = None;
                    self.broken.push((job.seq, error));
                }
            }
        }
    }

    /// Who is in a step, for the watchdog.
    pub(super) fn in_step<'a>(&'a self, plan: &'a StepPlan) -> impl Iterator<Item = InStep> + 'a {
        plan.seqs.iter().enumerate().filter_map(|(r, seq)| {
            let row = plan.row(r);
            let (id, _) = self.choices.get(seq)?;
            let request = self.requests.get(id)?.submission.id.clone();
            Some(InStep { request, seq: seq.0, tokens: row.len(), position: plan.positions[row.start] })
        })
    }

    /// What the step told of prompts joins what is known of them.
    pub(super) fn apply_scores(&mut self) {
        for mut job in self.score_jobs.drain(..) {
            let request = self.requests.get_mut(&job.request);
            if let Some(scores) = request.and_then(|request| request.scores.get_mut(job.prompt)) {
                scores.take(&mut job);
            }
        }
    }

    /// Takes the samplers of the rows that want a token out of their choices, so that rows can be sampled in
    /// parallel. Beside the last of a prompt, its other tokens may be wanted, too: those are lined up to be scored.
    pub(super) fn line_up(&mut self, plan: &StepPlan, now: Instant) {
        self.jobs.clear();
        self.score_jobs.clear();
        let mut next = 0;
        for (r, &seq) in plan.seqs.iter().enumerate() {
            let end = plan.row(r).end as u32;
            let rows = next..plan.logit_tokens.partition_point(|&token| token < end);
            next = rows.end;
            let Some((id, choice)) = self.choices.get_mut(&seq) else { continue };
            choice.first_scheduled.get_or_insert(now);
            let Some(last) = rows.clone().last() else { continue };
            let Some(request) = self.requests.get_mut(id) else { continue };
            let ids = &request.submission.prompts[choice.prompt].ids;
            if let Some(scores) = request.scores.get_mut(choice.prompt) {
                scores.line_up((*id, choice.prompt), ids, plan, rows, &mut self.score_jobs);
            }
            // The place behind the prompt's last token is the first that is sampled.
            let position = plan.positions[plan.logit_tokens[last] as usize] as usize;
            if position + 1 >= ids.len() {
                let row = last;
                self.jobs.push(SampleJob {
                    seq,
                    row,
                    banned: choice.banned_ends().cloned(),
                    bad: choice.bad_now(),
                    allowed: choice.allowed().cloned(),
                    logprobs: choice.logprobs(),
                    sampler: choice.sampler.take(),
                    think_token: choice.think_token(),
                    constrained: if choice.thinks() { None } else { choice.constrained.take() },
                    mask: None,
                    sampled: None,
                });
            }
        }
    }
}
