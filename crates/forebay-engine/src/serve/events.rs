//! The events of a request on their way to the client.

use std::time::{Duration, Instant};

use forebay_flow::ChunkStream;
use forebay_observe::{Layer, Trace};
use forebay_tokens::Tokenizer;
use forebay_types::{Blame, Class, Code, Fault, Retry};
use forebay_wire::{Chunk, Event};
use tokio::sync::mpsc;

use super::off_thread::OffThread;
use super::told::Told;

/// Tokens that are named on an I/O thread: about 100 µs.
const INLINE_NAMES_MAX: usize = 1000;

/// What is told of one request. Dropping it closes the channel, which is how the step loop learns that the client left.
pub(super) struct EventStream {
    /// What comes before anything that is received: the first event, and later the rest of one that is told in parts.
    pub next: Option<Told>,
    pub receiver: mpsc::Receiver<Result<Told, Fault>>,
    pub tokenizer: Tokenizer,
    pub off_thread: OffThread,
    pub trace: Trace,
    pub begun: Instant,
}

impl EventStream {
    /// Chunks up to the last event or the first fault.
    pub fn into_chunks(self) -> ChunkStream {
        Box::pin(futures_util::stream::unfold(Some(self), |stream| async move {
            let mut stream = stream?;
            let item = stream.next().await;
            let is_last = !matches!(&item, Ok(event) if !matches!(event, Event::Done { .. }));
            Some((item.map(Chunk::Event), (!is_last).then_some(stream)))
        }))
    }

    async fn next(&mut self) -> Result<Event, Fault> {
        let told = match self.next.take() {
            Some(told) => told,
            None => self.receiver.recv().await.unwrap_or_else(|| {
                // The step thread is gone in the middle of an answer. Something has reached the client: the same request
                // elsewhere would repeat it.
                let mut fault = stopped();
                fault.class.retry = Retry::Never;
                Err(fault)
            })?,
        };
        let (told, rest) = told.part(INLINE_NAMES_MAX);
        if rest.is_some() {
            // Others on this thread come between two parts.
            tokio::task::consume_budget().await;
        }
        self.next = rest;
        let event = match told.names() {
            0..=INLINE_NAMES_MAX => told.into_event(&self.tokenizer),
            _ => {
                let tokenizer = self.tokenizer.clone();
                self.off_thread.run(move || Ok(told.into_event(&tokenizer))).await?
            }
        };
        if let Event::Done { usage } = &event {
            let why = format!("{} tokens", usage.completion_tokens);
            self.trace.note(Layer::Engine, "decode", self.begun, why);
        }
        Ok(event)
    }
}

/// A request's time is up.
pub(super) fn too_slow(limit: Duration) -> Fault {
    let class = Class::new(Code::UpstreamTimeout, Blame::Us).retry(Retry::Never);
    let limit = forebay_config::HumanDuration::new(limit);
    Fault::new(class, format!("the request took longer than {limit} (`engine.request-timeout`)"))
}

pub(super) fn stopped() -> Fault {
    let class = Class::new(Code::ModelUnavailable, Blame::Us).retry(Retry::Elsewhere);
    Fault::new(class, "the engine has stopped")
        .detail("the step thread has ended; an earlier log line says why")
}
