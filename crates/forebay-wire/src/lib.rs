//! OpenAI JSON to one canonical call, canonical events to OpenAI JSON and SSE.
//!
//! The only crate with wire structs: everything inside the stack speaks [`Ask`] and [`Event`]. Pure: bytes in, bytes
//! out, no I/O, no clock.
//!
//! ```text
//! body -> parse -> Ask            Event -> Renderer  -> SSE frames
//!                                 Event -> Collector -> one JSON body
//! body -> splice -> body          Fault -> render_fault / fault_frame
//! upstream bytes -> SseSplitter -> frames -> scan_frame -> usage
//!                                          -> Relabel -> frames for the client
//! ```
//!
//! What it does not do: it validates no model name, applies no chat template and counts no tokens.

mod ask;
mod collect;
mod embeddings;
mod error;
mod event;
mod json;
mod models;
mod need;
mod parse;
mod relabel;
mod render;
mod scan;
mod splice;
mod sse;
mod tokenized;
mod tokens;

pub use ask::{
    Api, Ask, ChatMessage, Constraint, Content, Detokenize, Embed, Generate, LeftOpen, Prompt, Sampling,
    Tokenize, TokenizeInput, ToolChoice, TruncationSide, VectorFormat,
};
pub use collect::{CollectError, Collector};
pub use embeddings::{EmbeddingsHead, render_embeddings};
pub use error::{
    Dialect, ErrorRow, UpstreamError, error_row, error_rows, fault_frame, parse_error, render_fault, vllm_row,
};
pub use event::{
    Chunk, Delta, Event, PromptTokens, RankedLogprob, StopReason, TokenLogprob, ToolCallDelta, TopLogprob,
};
pub use models::{ModelCard, render_model, render_models};
pub use need::Need;
pub use parse::{ParseError, check_encoding, parse, route_name};
pub use relabel::{FrameUsage, Relabel};
pub use render::{RenderSpec, Renderer};
pub use scan::{FrameInfo, scan_body, scan_frame};
pub use splice::{Change, Edit, SpliceError, for_replica, for_upstream, splice, with_model};
pub use sse::{FRAME_BYTES_MAX, FrameTooLong, SseSplitter};
pub use tokenized::{render_detokenized, render_tokenized};
pub use tokens::{TokensCall, render_tokens_calls};
