//! The thread of an embedding engine: takes requests, computes batches, answers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_schedule::AddError;
use forebay_types::{ConsumerName, Fault, FinishReason, TokenId};
use tokio::sync::{mpsc, oneshot};

use super::queue::{Job, Queue};
use crate::exec::Encoder;
use crate::metrics::{ModelMetrics, Rejection, RequestRecord, StepRecord};
use crate::serve::engine::{INBOX_MAX, RETRY_AFTER};
use crate::serve::events::too_slow;
use crate::serve::watchdog::{Heartbeat, StepShape};

/// One request.
pub(super) struct Submission {
    /// At least one, each with at least one token, within the model's limits.
    pub inputs: Vec<Arc<[TokenId]>>,
    pub priority: i32,
    pub tenant: ConsumerName,
    pub arrived: Instant,
    pub deadline: Instant,
    /// Gets all vectors, one after the other. Closed, the client has left.
    pub answer: oneshot::Sender<Result<Vec<f32>, Fault>>,
}

/// How much may be computed at a time, and wait.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    pub batch_tokens: usize,
    pub batch_inputs: usize,
    pub waiting_requests: u32,
    pub waiting_tokens: u64,
    /// For messages; each submission has its own deadline.
    pub request_timeout: Duration,
}

/// What the queue keeps of a request.
struct Owner {
    arrived: Instant,
    deadline: Instant,
    answer: oneshot::Sender<Result<Vec<f32>, Fault>>,
    vectors: Vec<f32>,
}

pub(super) struct Loop<E> {
    pub encoder: E,
    pub inbox: mpsc::Receiver<Submission>,
    pub limits: Limits,
    pub metrics: ModelMetrics,
    pub heartbeat: Arc<Heartbeat>,
}

impl<E: Encoder> Loop<E> {
    /// Until the inbox is closed and everything in it is answered.
    pub fn run(mut self) {
        let mut queue = Queue::new();
        loop {
            if queue.is_empty() {
                self.record(&queue, 0, 0);
                let Some(submission) = self.inbox.blocking_recv() else { return };
                self.admit(&mut queue, submission);
            }
            // An inbox full at most: a flood must not keep those who wait from being computed.
            for _ in 0..INBOX_MAX {
                let Ok(submission) = self.inbox.try_recv() else { break };
                self.admit(&mut queue, submission);
            }
            self.drop_the_gone(&mut queue);
            self.step(&mut queue);
        }
    }

    /// The limits are of what waits already: the largest request is taken by an idle engine.
    fn admit(&self, queue: &mut Queue<Owner>, submission: Submission) {
        let Submission { inputs, priority, tenant, arrived, deadline, answer } = submission;
        let (load, limits) = (queue.load(), &self.limits);
        let drain_in = RETRY_AFTER;
        let refused = if load.requests >= limits.waiting_requests as usize {
            let limit = limits.waiting_requests;
            Some((Rejection::Requests, AddError::QueueFull { limit, drain_in }))
        } else if load.tokens >= limits.waiting_tokens {
            let (waiting, limit) = (load.tokens, limits.waiting_tokens);
            Some((Rejection::Tokens, AddError::QueueTokensFull { waiting, limit, drain_in }))
        } else {
            None
        };
        match refused {
            Some((why, error)) => {
                self.metrics.on_rejected(why);
                // Nobody hears it where the client has left.
                let _ = answer.send(Err(error.into()));
            }
            None => {
                let owner = Owner { arrived, deadline, answer, vectors: Vec::new() };
                queue.push(inputs, priority, tenant, owner);
            }
        }
    }

    fn drop_the_gone(&self, queue: &mut Queue<Owner>) {
        let now = Instant::now();
        for job in queue.take(|job| job.owner.answer.is_closed() || now >= job.owner.deadline) {
            let Job { inputs, taken, owner, .. } = job;
            for ids in &inputs[taken..] {
                self.on_finished(&owner, ids.len(), None, now, FinishReason::Abort);
            }
            let _ = owner.answer.send(Err(too_slow(self.limits.request_timeout)));
        }
    }

    /// Computes one batch, and answers the requests that are complete with it.
    fn step(&mut self, queue: &mut Queue<Owner>) {
        let begun = Instant::now();
        let batch = queue.plan(self.limits.batch_tokens, self.limits.batch_inputs);
        let inputs: Vec<Arc<[TokenId]>> =
            batch.iter().map(|place| Arc::clone(&queue.job_mut(place.job).inputs[place.input])).collect();
        if inputs.is_empty() {
            return;
        }
        let tokens = inputs.iter().map(|ids| ids.len()).sum();
        self.record(queue, inputs.len(), tokens);
        self.metrics.on_batch(inputs.len());
        let dim = self.encoder.dim();
        let texts = inputs.len() as u64;
        let shape = StepShape {
            tokens: tokens as u64,
            sequences: texts,
            running: texts,
            waiting: queue.load().inputs as u64,
            ..StepShape::default()
        };
        self.heartbeat.begin(self.heartbeat.now(), &shape);
        let vectors = self.encoder.encode(&inputs);
        self.heartbeat.end(self.heartbeat.now());
        let now = Instant::now();
        for (place, vector) in batch.iter().zip(vectors.chunks_exact(dim)) {
            queue.job_mut(place.job).owner.vectors.extend_from_slice(vector);
        }
        for (place, ids) in batch.iter().zip(&inputs) {
            let owner = &queue.job_mut(place.job).owner;
            self.metrics.on_first_token(now.saturating_duration_since(owner.arrived), ids.len() as u32, 0);
            self.on_finished(owner, ids.len(), Some(begun), now, FinishReason::Stop);
        }
        for Job { owner, .. } in queue.take(|job| job.taken == job.inputs.len()) {
            let _ = owner.answer.send(Ok(owner.vectors));
        }
    }

    fn record(&self, queue: &Queue<Owner>, running: usize, tokens: usize) {
        let load = queue.load();
        self.metrics.on_step(&StepRecord { running, waiting: load.inputs, tokens, ..StepRecord::default() });
        self.metrics.on_queue(load.tokens);
    }

    /// Of one text, as vLLM counts: every input is a request of its own.
    fn on_finished(
        &self,
        owner: &Owner,
        tokens: usize,
        begun: Option<Instant>,
        now: Instant,
        reason: FinishReason,
    ) {
        self.metrics.on_finished(&RequestRecord {
            e2e: now.saturating_duration_since(owner.arrived),
            queue: begun.map(|begun| begun.saturating_duration_since(owner.arrived)),
            prefill: begun.map(|begun| now.saturating_duration_since(begun)),
            decode: begun.map(|_| Duration::ZERO),
            prompt_tokens: tokens as u32,
            cached_tokens: begun.map(|_| 0),
            generation_tokens: 0,
            max_tokens: None,
            preemptions: 0,
            reason,
        });
        self.metrics.on_prompt_finished(1, 0);
    }
}
