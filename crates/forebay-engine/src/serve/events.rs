//! The events of a request on their way to the client.

use std::time::{Duration, Instant};

use forebay_observe::{Layer, Trace};
use forebay_types::{Blame, Class, Code, Fault, Retry};
use forebay_wire::{Chunk, Event};
use tokio::sync::mpsc;

/// The events of one request. Dropping it closes the channel, which is how the step loop learns that the client left.
pub(super) struct EventStream {
    pub first: Option<Event>,
    pub receiver: mpsc::Receiver<Result<Event, Fault>>,
    pub trace: Trace,
    pub begun: Instant,
    pub ended: bool,
}

impl futures_util::Stream for EventStream {
    type Item = Result<Chunk, Fault>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        use std::task::Poll;
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(Chunk::Event(first))));
        }
        let item = std::task::ready!(self.receiver.poll_recv(context));
        match item {
            Some(Ok(event)) => {
                if let Event::Done { usage } = &event {
                    self.ended = true;
                    let why = format!("{} tokens", usage.completion_tokens);
                    self.trace.note(Layer::Engine, "decode", self.begun, why);
                }
                Poll::Ready(Some(Ok(Chunk::Event(event))))
            }
            Some(Err(fault)) => {
                self.ended = true;
                Poll::Ready(Some(Err(fault)))
            }
            // The step thread is gone in the middle of an answer.
            None if !self.ended => {
                self.ended = true;
                // Something has reached the client: the same request elsewhere would repeat it.
                let mut fault = stopped();
                fault.class.retry = Retry::Never;
                Poll::Ready(Some(Err(fault)))
            }
            None => Poll::Ready(None),
        }
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
