//! The account of one request: closed exactly once, whatever becomes of it.

use std::sync::Arc;
use std::time::Instant;

use forebay_flow::{Origin, PromptIds, ReplyForm};
use forebay_observe::Layer;
use forebay_quota::Hold;
use forebay_types::{ConsumerName, Fault, ModelName, Usage};
use forebay_wire::{Chunk, error_row};

use crate::audit::{AuditRecord, AuditSlot};
use crate::clock::{Clock, UtcTime};
use crate::metrics::{Metrics, UNKNOWN};
use crate::tally::{Seen, Tally};

/// Bytes of a client's path that are written down.
const PATH_BYTES_MAX: usize = 256;
/// NGINX's status for a client that left before it had an answer.
const CLIENT_LEFT: u16 = 499;

/// Everything that must be settled for one request. Dropped before it was closed, it closes as cancelled: the client
/// left, and what was produced for it is charged.
pub(crate) struct Account {
    origin: Arc<Origin>,
    clock: Clock,
    metrics: Metrics,
    at: UtcTime,
    path: String,
    slot: Option<AuditSlot>,
    consumer: Option<ConsumerName>,
    model: Option<ModelName>,
    hold: Option<Hold>,
    /// Of a generation or of embeddings; other requests cost no tokens.
    tally: Option<Tally>,
    /// A reply has begun, so that its status is 200 whatever happens after.
    replied: bool,
    closed: bool,
}

struct Ending<'a> {
    status: u16,
    outcome: &'a str,
    /// It began and did not end.
    cut: bool,
    usage: Usage,
    estimated: bool,
}

impl Account {
    pub(crate) fn open(
        origin: Arc<Origin>,
        clock: Clock,
        metrics: Metrics,
        slot: AuditSlot,
        path: &str,
    ) -> Self {
        let path = path.split('?').next().unwrap_or_default();
        let mut end = path.len().min(PATH_BYTES_MAX);
        while !path.is_char_boundary(end) {
            end -= 1;
        }
        Self {
            origin,
            clock,
            metrics,
            at: UtcTime::now(),
            path: path[..end].to_owned(),
            slot: Some(slot),
            consumer: None,
            model: None,
            hold: None,
            tally: None,
            replied: false,
            closed: false,
        }
    }

    pub(crate) fn identified(&mut self, consumer: &ConsumerName) {
        self.consumer = Some(consumer.clone());
    }

    pub(crate) fn asked_for(&mut self, model: Option<&ModelName>) {
        self.model = model.cloned();
    }

    /// The request goes on with `hold`. For what costs tokens, `prompt` is what it is charged at least from now on, unless
    /// it is refused below: an engine may have begun with it.
    pub(crate) fn dispatched(&mut self, mut hold: Hold, prompt: Option<&PromptIds>) {
        if let Some(ids) = prompt {
            hold.spent(self.clock.now(), u64::from(ids.tokens()));
            self.tally = Some(Tally::of_prompt(ids));
        }
        self.metrics.holds.inc();
        self.hold = Some(hold);
    }

    pub(crate) fn replied(&mut self) {
        self.replied = true;
    }

    pub(crate) fn see(&mut self, chunk: &Chunk, form: ReplyForm) -> Seen {
        match &mut self.tally {
            Some(tally) => tally.see(chunk, form),
            // The whole reply is one body.
            None => Seen::Whole,
        }
    }

    /// The reply is whole.
    pub(crate) fn close_whole(&mut self) {
        let (usage, estimated) = self.used();
        self.close(Ending { status: 200, outcome: "ok", cut: false, usage, estimated });
    }

    /// The chunks ended without an error.
    pub(crate) fn close_ended(&mut self) {
        let cut = self.tally.as_ref().is_some_and(Tally::is_cut_by_ending);
        let (usage, estimated) = self.used();
        self.close(Ending { status: 200, outcome: if cut { "cut" } else { "ok" }, cut, usage, estimated });
    }

    /// Refused or failed. Before the reply began nothing is charged; after it, what was produced is.
    pub(crate) fn close_failed(&mut self, fault: &Fault) {
        let row = error_row(fault.class.code);
        let (status, (usage, estimated)) =
            if self.replied { (200, self.used()) } else { (row.status, (Usage::default(), false)) };
        self.close(Ending { status, outcome: row.name, cut: self.replied, usage, estimated });
    }

    fn close_cancelled(&mut self) {
        let (usage, estimated) = self.used();
        let status = if self.replied { 200 } else { CLIENT_LEFT };
        self.close(Ending { status, outcome: "cancelled", cut: self.replied, usage, estimated });
    }

    fn used(&self) -> (Usage, bool) {
        self.tally.as_ref().map_or((Usage::default(), false), Tally::usage)
    }

    fn close(&mut self, ending: Ending<'_>) {
        if std::mem::replace(&mut self.closed, true) {
            return;
        }
        let start = Instant::now();
        let Ending { status, outcome, cut, usage, estimated } = ending;
        let consumer = self.consumer.as_ref().map_or(UNKNOWN, ConsumerName::as_str);
        self.metrics.request(consumer, outcome);
        if self.tally.is_some() {
            self.metrics.charge(consumer, &usage);
        }
        if let Some(hold) = self.hold.take() {
            let total = u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens);
            let why = format!("{outcome}: {total} of {} held tokens used", hold.held());
            hold.settle(self.clock.now(), total);
            self.metrics.holds.dec();
            self.origin.trace.note(Layer::Gateway, "settle", start, why);
        }
        if let Some(slot) = self.slot.take() {
            slot.write(|| AuditRecord {
                at: self.at,
                request_id: self.origin.id.clone(),
                trace_id: self.origin.trace.context().trace_id_hex(),
                peer: self.origin.peer.ip(),
                consumer: self.consumer.clone(),
                model: self.model.clone(),
                path: std::mem::take(&mut self.path),
                status,
                outcome: outcome.to_owned(),
                prompt_tokens: usage.prompt_tokens,
                completion_tokens: usage.completion_tokens,
                cached_tokens: usage.cached_tokens,
                estimated,
                duration_ms: self.origin.received.elapsed().as_millis() as u64,
                cut,
            });
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.close_cancelled();
    }
}
