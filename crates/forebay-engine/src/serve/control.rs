//! What operators ask of a running engine: end requests, pause, resume. vLLM's `/abort_requests`, `/pause`, `/resume`.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use forebay_types::{FinishReason, RequestId, Usage};
use forebay_wire::Event;
use tokio::sync::{mpsc, oneshot};

use super::engine::{Engine, INBOX_MAX, overloaded};
use super::events::too_slow;
use super::step_loop::StepLoop;
use super::submission::Submission;
use crate::exec::Executor;

/// What the step thread is told.
pub(crate) enum Message {
    Submit(Submission),
    Abort(Aborted),
    Pause {
        mode: PauseMode,
        clear_cache: bool,
        /// Told when nothing is computed any more.
        done: oneshot::Sender<()>,
    },
    Resume,
}

/// The requests that are ended with the finish reason `abort`; what they have written is theirs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Aborted {
    All,
    /// Made by [`Self::ids`].
    Ids(HashSet<RequestId>),
}

/// What becomes of the requests that run when an engine is paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PauseMode {
    /// They end with the finish reason `abort`.
    Abort,
    /// They are finished first.
    Wait,
    /// They stand still until the engine is resumed.
    Keep,
}

/// The step thread has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the engine has stopped")]
pub struct Stopped;

/// A pause as the step loop knows it.
pub(super) struct Pause {
    mode: PauseMode,
    clear_cache: bool,
    waiting: Vec<oneshot::Sender<()>>,
    /// Came meanwhile; an inbox full at most.
    parked: VecDeque<Submission>,
}

impl Engine {
    /// Ends requests with the finish reason `abort`, within one step. An id that no request has is ignored, as it may have
    /// ended a moment ago.
    pub async fn abort(&self, which: Aborted) -> Result<(), Stopped> {
        self.tell(Message::Abort(which)).await
    }

    /// Stops computing; requests that come wait until [`resume`](Self::resume). Ready when nothing runs any more.
    ///
    /// Cancellation: the engine stays paused.
    pub async fn pause(&self, mode: PauseMode, clear_cache: bool) -> Result<(), Stopped> {
        let (done, paused) = oneshot::channel();
        self.tell(Message::Pause { mode, clear_cache, done }).await?;
        paused.await.map_err(|_| Stopped)
    }

    pub async fn resume(&self) -> Result<(), Stopped> {
        self.tell(Message::Resume).await
    }

    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    async fn tell(&self, message: Message) -> Result<(), Stopped> {
        self.inbox.send(message).await.map_err(|_| Stopped)
    }
}

impl<E: Executor> StepLoop<E> {
    pub(super) fn on_message(&mut self, message: Message) {
        match message {
            Message::Submit(submission) => match &mut self.state.pause {
                Some(pause) => pause.park(submission, self.request_timeout),
                None => self.add(submission),
            },
            Message::Abort(which) => self.abort(&which),
            Message::Pause { mode, clear_cache, done } => self.pause(mode, clear_cache, done),
            Message::Resume => self.resume(),
        }
    }

    /// True where nothing may be computed now.
    pub(super) fn stands_still(&self) -> bool {
        self.state.pause.as_ref().is_some_and(|pause| pause.mode == PauseMode::Keep)
    }

    /// True where requests wait for the end of a pause.
    pub(super) fn waits_paused(&self) -> bool {
        self.state.pause.is_some() && (self.parked() > 0 || !self.state.requests.is_empty())
    }

    /// Requests that came during a pause.
    pub(super) fn parked(&self) -> usize {
        self.state.pause.as_ref().map_or(0, |pause| pause.parked.len())
    }

    fn pause(&mut self, mode: PauseMode, clear_cache: bool, done: oneshot::Sender<()>) {
        tracing::info!(?mode, "paused");
        let pause = self.state.pause.get_or_insert_with(|| Pause {
            mode,
            clear_cache: false,
            waiting: Vec::new(),
            parked: VecDeque::new(),
        });
        pause.mode = mode;
        // What stands still goes on with the blocks that it has.
        pause.clear_cache |= clear_cache && mode != PauseMode::Keep;
        pause.waiting.push(done);
        self.paused.store(true, Ordering::Release);
        if mode == PauseMode::Abort {
            let running: Vec<u64> = self.state.requests.keys().copied().collect();
            running.into_iter().for_each(|id| self.end_early(id));
        }
        self.settle_pause();
    }

    /// Tells those who wait for a pause that nothing is computed any more, once that is so.
    pub(super) fn settle_pause(&mut self) {
        let Some(pause) = &mut self.state.pause else { return };
        if pause.mode != PauseMode::Keep && !self.state.requests.is_empty() {
            return;
        }
        if std::mem::take(&mut pause.clear_cache) {
            self.scheduler.clear_cache();
        }
        for done in pause.waiting.drain(..) {
            // Whoever asked may have left.
            let _ = done.send(());
        }
    }

    pub(super) fn resume(&mut self) {
        let Some(Pause { waiting, parked, .. }) = self.state.pause.take() else { return };
        self.paused.store(false, Ordering::Release);
        tracing::info!(parked = parked.len(), "resumed");
        for done in waiting {
            // The pause that they wait for is over; dropped, they would believe that the engine has stopped.
            let _ = done.send(());
        }
        parked.into_iter().for_each(|submission| self.add(submission));
    }

    fn abort(&mut self, which: &Aborted) {
        let requests = self.state.requests.iter();
        let found: Vec<u64> =
            requests.filter(|(_, request)| request.submission.is_meant(which)).map(|(&id, _)| id).collect();
        found.into_iter().for_each(|id| self.end_early(id));
        if let Some(pause) = &mut self.state.pause {
            pause.parked.retain(|submission| {
                let is_meant = submission.is_meant(which);
                if is_meant {
                    say_aborted(submission, 0..submission.choices(), submission.nothing_used(), false);
                }
                !is_meant
            });
        }
    }

    /// Ends a request whose client is to get what there is.
    fn end_early(&mut self, id: u64) {
        let Some(mut request) = self.state.requests.remove(&id) else { return };
        let mut open = Vec::new();
        for seq in std::mem::take(&mut request.seqs) {
            if let Some((_, mut choice)) = self.state.choices.remove(&seq) {
                let (scheduler, metrics) = (&self.scheduler, &self.metrics);
                request.on_choice_ended(seq, &choice, FinishReason::Abort, scheduler, metrics);
                self.scheduler.abort(seq);
                open.push((choice.number, choice.abort()));
            }
        }
        if request.started {
            for delta in open.iter_mut().filter_map(|(_, delta)| delta.take()) {
                request.submission.send(Event::Delta(delta));
            }
        }
        let numbers = open.into_iter().map(|(number, _)| number);
        say_aborted(&request.submission, numbers, request.usage(), request.started);
    }
}

impl Pause {
    fn park(&mut self, submission: Submission, request_timeout: Duration) {
        if self.parked.len() >= INBOX_MAX {
            self.drop_the_gone(Instant::now(), request_timeout);
        }
        if self.parked.len() >= INBOX_MAX {
            submission.refuse(overloaded());
            return;
        }
        self.parked.push_back(submission);
    }

    /// Drops those whose client left or whose time is up.
    pub(super) fn drop_the_gone(&mut self, now: Instant, request_timeout: Duration) {
        self.parked.retain(|parked| {
            let is_late = now >= parked.deadline;
            if is_late {
                // Whoever left does not hear it.
                parked.refuse(too_slow(request_timeout));
            }
            !is_late && !parked.events.is_closed()
        });
    }
}

impl Submission {
    fn is_meant(&self, which: &Aborted) -> bool {
        which.has(&self.id, self.own_id.as_ref())
    }
}

impl Aborted {
    /// Those with these ids, alone or as replies have them (`chatcmpl-ID`).
    pub fn ids(asked: impl IntoIterator<Item = RequestId>) -> Self {
        const PREFIXES: [&str; 4] = ["chatcmpl-", "cmpl-", "generate-tokens-", "embd-"];
        let mut ids = HashSet::new();
        for id in asked {
            let bare = PREFIXES.iter().find_map(|prefix| id.as_str().strip_prefix(prefix));
            ids.extend(bare.map(RequestId::from));
            ids.insert(id);
        }
        Self::Ids(ids)
    }

    /// Whether a request is meant: by `x-request-id` or its `own` `request_id`.
    pub(super) fn has(&self, id: &RequestId, own: Option<&RequestId>) -> bool {
        match self {
            Self::All => true,
            Self::Ids(ids) => ids.contains(id) || own.is_some_and(|own| ids.contains(own)),
        }
    }
}

/// The events that end these choices of a request, and with them the request. The channel has room for all that the
/// request can produce: a failed send is a client that left.
fn say_aborted(submission: &Submission, choices: impl IntoIterator<Item = u32>, usage: Usage, started: bool) {
    if !started {
        let Usage { prompt_tokens, cached_tokens, .. } = usage;
        submission.send(Event::Started { prompt_tokens, cached_tokens });
    }
    for choice in choices {
        submission.send(Event::Finished { choice, reason: FinishReason::Abort, stop: None });
    }
    submission.send(Event::Done { usage });
}

/// What [`Engine::is_paused`] reads.
pub(super) type Paused = Arc<AtomicBool>;
/// Messages on their way to the step thread.
pub(super) type Inbox = mpsc::Receiver<Message>;
