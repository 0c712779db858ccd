//! The step loop: takes submissions, plans, computes, samples, sends events. Runs on a thread of its own and owns
//! everything it touches, so that nothing here waits for a lock or for a reader.
//!
//! One turn: take what arrived, drop who left, plan, execute, sample every row (in parallel), send, publish KV events
//! and metrics. A client that leaves during a turn is out of the next plan, and its blocks are free.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_grammar::GrammarError;
use forebay_kernels::Pool;
use forebay_kv::CacheSalt;
use forebay_kv::KvEvent;
use forebay_schedule::{AddError, NewSeq, Scheduler, SeqId};
use forebay_tokens::Tokenizer;
use forebay_types::{Fault, FinishReason, Retry, TokenId};
use forebay_wire::Event;
use tokio::sync::mpsc;

use crate::exec::Executor;
use crate::metrics::{ModelMetrics, Rejection, StepFailure, StepRecord};

use super::KvSink;
use super::choice::{ChoiceState, Ending};
use super::constrain::MaskThread;
use super::control::{Inbox, Pause, Paused};
use super::engine::INBOX_MAX;
use super::events::{stopped, too_slow};
use super::load::LoadReport;
use super::request::Request;
use super::sampling::SampleJob;
use super::scores::{ScoreJob, told_echo, told_prompt};
use super::submission::Submission;
use super::told::Told;
use super::watchdog::{Heartbeat, Phase, StepShape};

/// How long the loop sleeps where work waits but nothing can be planned: only a defect of the scheduler leads here,
/// and it must not become a busy loop.
const STUCK_NAP: Duration = Duration::from_millis(5);
/// How often a paused engine looks who has left and whose time is up: neither sends it a message.
const PAUSE_NAP: Duration = Duration::from_millis(50);

pub(crate) struct StepLoop<E> {
    pub executor: E,
    pub scheduler: Scheduler,
    pub pool: Arc<Pool>,
    pub tokenizer: Tokenizer,
    pub metrics: ModelMetrics,
    pub kv_sink: Option<KvSink>,
    pub load: LoadReport,
    pub inbox: Inbox,
    pub paused: Paused,
    pub heartbeat: Arc<Heartbeat>,
    /// For messages; each submission has its own deadline.
    pub request_timeout: Duration,
    pub state: LoopState,
}

/// What the loop remembers between turns.
pub(crate) struct LoopState {
    begun: Instant,
    next_seq: u64,
    next_request: u64,
    pub(super) requests: HashMap<u64, Request>,
    pub(super) choices: HashMap<SeqId, (u64, ChoiceState)>,
    kv_events: Vec<KvEvent>,
    pub(super) jobs: Vec<SampleJob>,
    pub(super) score_jobs: Vec<ScoreJob>,
    /// Choices whose constraint could not be followed in this turn.
    pub(super) broken: Vec<(SeqId, GrammarError)>,
    /// Started by the first constrained choice.
    masks: Option<MaskThread>,
    seen: Seen,
    /// The last turn could plan nothing though requests wait.
    stuck: bool,
    pub(super) pause: Option<Pause>,
}

/// Totals at the last metrics record: the scheduler counts up, metrics want the difference.
#[derive(Default, Clone, Copy)]
struct Seen {
    preemptions: u64,
    prefix_queries: u64,
    prefix_hits: u64,
}

/// What a turn did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    Worked,
    /// Nothing to do until something arrives.
    Idle,
    /// The inbox is closed and everything is finished, or the executor has failed for good.
    Closed,
}

impl LoopState {
    pub(crate) fn new(begun: Instant) -> Self {
        Self {
            begun,
            next_seq: 0,
            next_request: 0,
            requests: HashMap::new(),
            choices: HashMap::new(),
            kv_events: Vec::new(),
            jobs: Vec::new(),
            score_jobs: Vec::new(),
            broken: Vec::new(),
            masks: None,
            seen: Seen::default(),
            stuck: false,
            pause: None,
        }
    }
}

impl<E: Executor> StepLoop<E> {
    /// Runs until the inbox is closed and every request is done. Uses no CPU while idle, and next to none while requests
    /// wait for the end of a pause.
    pub(crate) fn run(mut self) {
        loop {
            match self.turn() {
                Turn::Worked => {}
                Turn::Closed => return,
                Turn::Idle if self.waits_paused() => std::thread::sleep(PAUSE_NAP),
                Turn::Idle => match self.inbox.blocking_recv() {
                    Some(message) => self.on_message(message),
                    // No request waits here: what a pause had parked would have been resumed by the turn.
                    None => return,
                },
            }
        }
    }

    /// One turn. Never blocks but for the computation itself.
    pub(crate) fn turn(&mut self) -> Turn {
        let closed = self.take_arrivals();
        self.drop_the_gone();
        self.settle_pause();
        if closed {
            // Nobody is left to do it.
            self.resume();
        }
        if self.stands_still() {
            self.publish(0, 0);
            return Turn::Idle;
        }
        let now = Instant::now();
        let before = self.shape();
        let Self { executor, scheduler, pool, state, load, heartbeat, metrics, .. } = &mut *self;
        let plan = scheduler.plan_step(now.saturating_duration_since(state.begun));
        if plan.is_empty() {
            self.publish(0, 0);
            if self.state.requests.is_empty() {
                return if closed { Turn::Closed } else { Turn::Idle };
            }
            // Said once, not two hundred times a second.
            if !std::mem::replace(&mut self.state.stuck, true) {
                let requests = self.state.requests.len();
                tracing::error!(
                    requests,
                    "nothing can be planned while requests wait: a defect of the scheduler"
                );
            }
            std::thread::sleep(STUCK_NAP);
            return Turn::Worked;
        }
        let (tokens, rows) = (plan.tokens(), plan.logit_tokens.len());
        load.on_plan(plan);
        state.stuck = false;
        state.line_up(plan, now);
        let shape = StepShape { tokens: tokens as u64, sequences: plan.seqs.len() as u64, ..before };
        heartbeat.list(state.in_step(plan));
        heartbeat.begin(heartbeat.now(), &shape);
        let failed = match executor.execute(plan) {
            Ok(logits) => {
                let stride = logits.len() / rows.max(1);
                let logits = |row: usize| &logits[row * stride..(row + 1) * stride];
                heartbeat.enter(Phase::Masks);
                state.take_masks();
                heartbeat.enter(Phase::Sampling);
                pool.run_rows(&mut state.score_jobs, 1, 1, &|_, jobs| {
                    jobs.iter_mut().for_each(|job| job.score(logits(job.row())));
                });
                pool.run_rows(&mut state.jobs, 1, 1, &|_, jobs| {
                    jobs.iter_mut().for_each(|job| job.sample(logits(job.row)));
                });
                None
            }
            Err(error) if error.is_final() => {
                tracing::error!(error = %error, source = ?std::error::Error::source(&error), "the model can't be run any more");
                metrics.on_failed_step(StepFailure::Executor);
                self.heartbeat.end(self.heartbeat.now());
                self.end();
                return Turn::Closed;
            }
            Err(error) => {
                tracing::error!(error = %error, source = ?std::error::Error::source(&error), "a step failed");
                metrics.on_failed_step(StepFailure::Step);
                Some((plan.seqs.clone(), Fault::internal(error.to_string())))
            }
        };
        self.heartbeat.end(self.heartbeat.now());
        let generated = match failed {
            None => {
                let elapsed = now.elapsed();
                self.scheduler.on_step_done(elapsed);
                self.load.on_step_done(elapsed);
                for (seq, error) in std::mem::take(&mut self.state.broken) {
                    self.metrics.constraints().on_refused(&error);
                    if let Some(&(request, _)) = self.state.choices.get(&seq) {
                        self.fail(request, error.into(), FinishReason::Error);
                    }
                }
                self.state.apply_scores();
                self.apply_samples()
            }
            Some((seqs, fault)) => {
                self.scheduler.on_step_failed();
                self.state.jobs.clear();
                self.state.score_jobs.clear();
                for seq in seqs {
                    if let Some(&(request, _)) = self.state.choices.get(&seq) {
                        self.fail(request, fault.clone(), FinishReason::Error);
                    }
                }
                0
            }
        };
        self.publish(tokens, generated);
        Turn::Worked
    }

    /// Fails every request that there is. Those that come later find the engine stopped.
    fn end(&mut self) {
        self.scheduler.on_step_failed();
        self.state.jobs.clear();
        let requests: Vec<(u64, bool)> =
            self.state.requests.iter().map(|(&id, request)| (id, request.started)).collect();
        for (id, started) in requests {
            let mut fault = stopped();
            if started {
                // Something has reached the client: the same request elsewhere would repeat it.
                fault.class.retry = Retry::Never;
            }
            self.fail(id, fault, FinishReason::Error);
        }
        self.publish(0, 0);
    }

    /// Takes what has arrived, an inbox full at most: a flood must not keep those who run from their next token. True
    /// where nothing more will come.
    fn take_arrivals(&mut self) -> bool {
        for _ in 0..INBOX_MAX {
            match self.inbox.try_recv() {
                Ok(message) => self.on_message(message),
                Err(mpsc::error::TryRecvError::Empty) => return false,
                Err(mpsc::error::TryRecvError::Disconnected) => return true,
            }
        }
        false
    }

    /// Puts a request's sequences into the queue: all of them, or none and a refusal.
    pub(super) fn add(&mut self, submission: Submission) {
        let now = self.state.begun.elapsed();
        let id = self.state.next_request;
        self.state.next_request += 1;
        let mut seqs = Vec::new();
        let mut refused = None;
        'all: for (p, prompt) in submission.prompts.iter().enumerate() {
            for i in 0..submission.n {
                let seq = SeqId(self.state.next_seq);
                self.state.next_seq += 1;
                let new = NewSeq {
                    id: seq,
                    prompt: prompt.ids.clone(),
                    max_new_tokens: prompt.max_tokens,
                    cache_salt: submission.how.cache_salt.as_deref().map(CacheSalt::new),
                    // vLLM counts the other way: lower goes first.
                    priority: submission.how.priority.saturating_neg(),
                    tenant: submission.how.tenant.clone(),
                    prompt_logits: submission.how.prompt_scores().is_some(),
                };
                if let Err(error) = self.scheduler.try_add(now, new) {
                    refused = Some(error);
                    break 'all;
                }
                let number = p as u32 * submission.n + i;
                let choice = ChoiceState::new(
                    number,
                    p,
                    submission.how.seed.wrapping_add(u64::from(i)),
                    prompt.max_tokens,
                    &prompt.ids,
                    submission.how.clone(),
                    self.tokenizer.clone(),
                    submission.how.matcher.clone(),
                );
                self.state.choices.insert(seq, (id, choice));
                seqs.push(seq);
            }
        }
        if let Some(error) = refused {
            for seq in seqs {
                self.scheduler.abort(seq);
                self.state.choices.remove(&seq);
            }
            // The client reads vLLM's words; the log also says which limit it was.
            let rejection = match &error {
                AddError::QueueFull { limit, .. } => {
                    Some((Rejection::Requests, format!("`engine.max-num-queued-reqs` is {limit}")))
                }
                AddError::QueueTokensFull { waiting, limit, .. } => {
                    let limit = format!("{waiting} wait, and `engine.max-num-queued-tokens` is {limit}");
                    Some((Rejection::Tokens, limit))
                }
                _ => None,
            };
            let mut fault = Fault::from(error);
            if let Some((rejection, limit)) = rejection {
                self.metrics.on_rejected(rejection);
                fault = fault.detail(limit);
            }
            submission.refuse(fault);
            return;
        }
        self.state.requests.insert(id, Request::new(submission, seqs));
    }

    /// Aborts requests whose client left or whose time is up, parked ones too.
    fn drop_the_gone(&mut self) {
        let now = Instant::now();
        let gone: Vec<(u64, bool)> = self
            .state
            .requests
            .iter()
            .filter_map(|(&id, request)| {
                let left = request.submission.events.is_closed();
                (left || now >= request.submission.deadline).then_some((id, left))
            })
            .collect();
        for (id, left) in gone {
            let fault = too_slow(self.request_timeout);
            tracing::debug!(request = id, left, "request aborted");
            self.fail(id, fault, FinishReason::Abort);
        }
        if let Some(pause) = &mut self.state.pause {
            pause.drop_the_gone(now, self.request_timeout);
        }
    }

    /// Ends a whole request early.
    fn fail(&mut self, id: u64, fault: Fault, reason: FinishReason) {
        let Some(mut request) = self.state.requests.remove(&id) else { return };
        for seq in std::mem::take(&mut request.seqs) {
            if let Some((_, choice)) = self.state.choices.remove(&seq) {
                request.on_choice_ended(seq, &choice, reason, &self.scheduler, &self.metrics);
                self.scheduler.abort(seq);
            }
        }
        request.submission.refuse(fault);
    }

    /// Gives every choice its token. Returns how many tokens were generated.
    fn apply_samples(&mut self) -> usize {
        let now = Instant::now();
        let mut generated = 0;
        let mut jobs = std::mem::take(&mut self.state.jobs);
        for job in &mut jobs {
            let (Some(sampler), Some(sampled)) = (job.sampler.take(), job.sampled.take()) else { continue };
            let Some((id, choice)) = self.state.choices.get_mut(&job.seq) else { continue };
            let id = *id;
            choice.sampler = Some(sampler);
            let constrained = job.constrained.take();
            let is_held = constrained.is_some();
            choice.constrained = constrained.or(choice.constrained.take());
            match choice.last_token.replace(now) {
                Some(last) => self.metrics.on_next_token(now.saturating_duration_since(last)),
                None => choice.first_token = Some(now),
            }
            let before = choice.generated;
            let advance = choice.on_token(&sampled);
            // What begins to reason is no part of what the constraint is about.
            let follows = is_held && !choice.thinks();
            let (number, prompt, new) = (choice.number, choice.prompt, choice.generated - before);
            generated += new as usize;
            if before == 0 {
                self.on_first(id, job.seq, number, prompt, now);
            }
            if advance.finished.is_none() {
                self.scheduler.on_token(job.seq, sampled.token);
                if follows {
                    self.follow(job.seq, sampled.token);
                }
            }
            if let Some(delta) = advance.delta {
                self.send(id, Event::Delta(delta));
            }
            if let Some(request) = self.state.requests.get_mut(&id) {
                request.completion_tokens += new;
            }
            if let Some(ending) = advance.finished {
                self.close_choice(id, job.seq, number, ending);
                if new == 0 {
                    // Nothing was to be generated: no example of how long outputs are.
                    self.scheduler.abort(job.seq);
                } else {
                    self.scheduler.finish(job.seq);
                }
            }
        }
        jobs.clear();
        self.state.jobs = jobs;
        generated
    }

    /// Has the mask behind `token` made, while the next step is computed.
    fn follow(&mut self, seq: SeqId, token: TokenId) {
        let Some((id, choice)) = self.state.choices.get_mut(&seq) else { return };
        let Some(constrained) = &mut choice.constrained else { return };
        if self.state.masks.is_none() {
            match MaskThread::start() {
                Ok(thread) => self.state.masks = Some(thread),
                Err(error) => {
                    let (id, fault) = (*id, Fault::internal(format!("no thread for constraints: {error}")));
                    return self.fail(id, fault, FinishReason::Error);
                }
            }
        }
        if let Some(masks) = &self.state.masks
            && !masks.follow(constrained, token)
        {
            self.state.masks = None;
        }
    }

    /// The first token of a choice: headers can leave, and it is known what the cache gave.
    fn on_first(&mut self, id: u64, seq: SeqId, number: u32, prompt: usize, now: Instant) {
        let cached = self.scheduler.info(seq).map_or(0, |info| info.cached_tokens);
        if let Some((_, choice)) = self.state.choices.get_mut(&seq) {
            choice.cached = Some(cached);
        }
        let Some(request) = self.state.requests.get_mut(&id) else { return };
        let first_of_prompt = request.on_first_token(prompt, cached);
        let prompt_tokens = request.submission.prompts[prompt].ids.len() as u32;
        let since = now.saturating_duration_since(request.submission.arrived);
        self.metrics.on_first_token(since, prompt_tokens, cached);
        if !request.started {
            request.started = true;
            let usage = request.usage();
            let (prompt_tokens, cached_tokens) = (usage.prompt_tokens, usage.cached_tokens);
            request.submission.send(Event::Started { prompt_tokens, cached_tokens });
        }
        tracing::trace!(request = id, choice = number, cached, first_of_prompt, "first token");
        let Request { submission, scores, .. } = request;
        if first_of_prompt && let Some(told) = told_prompt(submission, prompt, scores.get_mut(prompt)) {
            submission.tell(Told::Prompt(told.into()));
        }
        if let Some(told) = told_echo(submission, prompt, number, scores.get_mut(prompt)) {
            submission.tell(Told::Prompt(told.into()));
        }
    }

    fn close_choice(&mut self, id: u64, seq: SeqId, number: u32, ending: Ending) {
        let Ending { reason, stop } = ending;
        let choice = self.state.choices.remove(&seq);
        let Some(request) = self.state.requests.get_mut(&id) else { return };
        request.open -= 1;
        if let Some((_, choice)) = choice {
            request.reasoning_tokens += choice.reasoning_tokens;
            request.on_choice_ended(seq, &choice, reason, &self.scheduler, &self.metrics);
        }
        let done = request.open == 0;
        self.send(id, Event::Finished { choice: number, reason, stop });
        if done && let Some(request) = self.state.requests.remove(&id) {
            request.submission.send(Event::Done { usage: request.usage() });
        }
    }

    fn send(&self, id: u64, event: Event) {
        if let Some(request) = self.state.requests.get(&id) {
            request.submission.send(event);
        }
    }

    /// What there is to do before a step is planned.
    fn shape(&self) -> StepShape {
        let stats = self.scheduler.stats();
        StepShape {
            running: stats.running.into(),
            waiting: stats.waiting.into(),
            blocks_used: stats.blocks_held.into(),
            ..StepShape::default()
        }
    }

    /// KV events and metrics of this turn.
    fn publish(&mut self, tokens: usize, sampled_tokens: usize) {
        let parked = self.parked();
        let state = &mut self.state;
        state.kv_events.clear();
        self.scheduler.drain_events(&mut state.kv_events);
        if let Some(sink) = &self.kv_sink
            && !state.kv_events.is_empty()
        {
            sink(&state.kv_events);
        }
        let stats = self.scheduler.stats();
        self.load.publish(&stats);
        let seen = Seen {
            preemptions: stats.preemptions,
            prefix_queries: stats.prefix_query_tokens,
            prefix_hits: stats.prefix_hit_tokens,
        };
        self.metrics.on_step(&StepRecord {
            running: stats.running as usize,
            waiting: stats.waiting as usize,
            parked,
            kv_usage: stats.kv_usage(),
            tokens,
            sampled_tokens,
            preemptions: seen.preemptions - state.seen.preemptions,
            prefix_queries: seen.prefix_queries - state.seen.prefix_queries,
            prefix_hits: seen.prefix_hits - state.seen.prefix_hits,
        });
        state.seen = seen;
    }
}
