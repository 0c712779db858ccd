//! Watches a reply on its way up: load, speed and lengths are learned from what passes.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use forebay_flow::{ChunkStream, ReplyForm};
use forebay_types::Fault;
use forebay_wire::{Chunk, Event};
use futures_util::Stream;

use crate::lengths::Lengths;
use crate::live::InFlight;

/// The chunks as they came. Ends the request's [`InFlight`] with the last chunk, or when it is dropped.
pub(crate) struct Tracked {
    chunks: ChunkStream,
    flight: Option<InFlight>,
    lengths: Arc<Lengths>,
    /// Whether a chunk comes as soon as there is a token. Not so for a JSON body from elsewhere: its prompt counts as
    /// queued until the body is there, and nothing is learned from it.
    token_by_token: bool,
    choices: u32,
    completion_tokens: u32,
    cached_tokens: Option<u32>,
}

impl Tracked {
    pub(crate) fn wrap(
        chunks: ChunkStream,
        form: ReplyForm,
        flight: InFlight,
        lengths: Arc<Lengths>,
        choices: u32,
    ) -> ChunkStream {
        let token_by_token = form == ReplyForm::Sse;
        let flight = Some(flight);
        Box::pin(Self {
            chunks,
            flight,
            lengths,
            token_by_token,
            choices,
            completion_tokens: 0,
            cached_tokens: None,
        })
    }

    fn see(&mut self, chunk: &Chunk) {
        let Some(flight) = &mut self.flight else { return };
        match chunk {
            Chunk::Event(Event::Started { prompt_tokens, cached_tokens }) => {
                flight.on_started(*prompt_tokens, *cached_tokens);
            }
            Chunk::Event(Event::Delta(delta)) => {
                if delta.tokens > 0 {
                    flight.on_first_token();
                }
            }
            Chunk::Event(Event::Prompt(_) | Event::Finished { .. }) => {}
            Chunk::Event(Event::Done { usage }) => {
                self.completion_tokens = usage.completion_tokens;
                self.finish();
            }
            Chunk::Verbatim { usage, deltas, .. } => {
                if self.token_by_token && *deltas > 0 {
                    flight.on_first_token();
                }
                // Cumulative where it comes more than once: the last one counts.
                if let Some(usage) = usage {
                    self.completion_tokens = usage.completion_tokens;
                    self.cached_tokens = Some(usage.cached_tokens);
                }
            }
        }
    }

    /// The reply is whole.
    fn finish(&mut self) {
        if let Some(flight) = self.flight.take() {
            if let Some(cached) = self.cached_tokens {
                flight.on_cached(cached);
            }
            if self.completion_tokens > 0 {
                self.lengths.on_finished(self.completion_tokens / self.choices.max(1));
            }
        }
    }
}

impl Stream for Tracked {
    type Item = Result<Chunk, Fault>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = std::task::ready!(self.chunks.as_mut().poll_next(cx));
        match &item {
            Some(Ok(chunk)) => self.see(chunk),
            // Broken off: neither its length nor its end says anything about the replica's work.
            Some(Err(_)) => self.flight = None,
            None => self.finish(),
        }
        Poll::Ready(item)
    }
}
