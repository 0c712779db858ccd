//! OpenAI JSON to one canonical call, canonical events to OpenAI JSON and SSE.
//!
//! The only crate with wire structs: everything inside the stack speaks [`Ask`] and [`Event`]. Pure: bytes in, bytes
//! out, no I/O, no clock.

mod ask;
mod event;

pub use ask::{
    Api, Ask, ChatMessage, Content, Detokenize, Generate, Prompt, Sampling, Tokenize, TokenizeInput,
};
pub use event::{Chunk, Delta, Event, TokenLogprob, TopLogprob};
