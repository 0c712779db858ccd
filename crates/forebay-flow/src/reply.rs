//! What comes back up: a head, and chunks as they are made.

use std::pin::Pin;

use forebay_types::Fault;
use forebay_wire::{Chunk, RenderSpec};
use futures_util::Stream;

/// Chunks as they are made. Pull-based: a reader that stops reading stops the writer at its bounded channel.
/// Dropping it cancels the request.
pub type ChunkStream = Pin<Box<dyn Stream<Item = Result<Chunk, Fault>> + Send>>;

/// The form in which the client is to get the reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyForm {
    /// `text/event-stream`: every chunk leaves as it comes.
    Sse,
    /// `application/json`: events are collected into one body; a verbatim body is passed as it is.
    Json,
}

/// A reply whose first chunk is certain: a layer returns it only when the layer below has begun to answer, so that
/// an error before the first byte is still an `Err` and can be retried elsewhere.
pub struct Reply {
    pub form: ReplyForm,
    /// Response headers for the client (`x-ratelimit-*`, `x-forebay-replica`), lower-case names.
    pub headers: http::HeaderMap,
    /// How the edge renders `Chunk::Event`s; set by the layer that parsed the call. Verbatim chunks don't need it.
    pub render: Option<RenderSpec>,
    pub chunks: ChunkStream,
}

impl Reply {
    pub fn new(form: ReplyForm, chunks: ChunkStream) -> Self {
        Self { form, headers: http::HeaderMap::new(), render: None, chunks }
    }

    /// A whole JSON body.
    pub fn json(body: impl Into<bytes::Bytes>) -> Self {
        let chunk = Chunk::Verbatim { bytes: body.into(), usage: None, deltas: 0 };
        Self::new(ReplyForm::Json, Box::pin(futures_util::stream::iter([Ok(chunk)])))
    }

    /// Says how events are rendered, unless a layer below has said so already.
    pub fn rendered_as(mut self, spec: impl FnOnce() -> RenderSpec) -> Self {
        self.render.get_or_insert_with(spec);
        self
    }

    /// Wraps the chunks: how a layer accounts for what passes.
    pub fn map_chunks(self, wrap: impl FnOnce(ChunkStream) -> ChunkStream) -> Self {
        Self { chunks: wrap(self.chunks), ..self }
    }
}

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reply")
            .field("form", &self.form)
            .field("headers", &self.headers)
            .finish_non_exhaustive()
    }
}
