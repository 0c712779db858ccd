//! Text to tokens and back: tokenizer, chat template, incremental detokenizer, stop matcher. Pure.
//!
//! | type            | does                                                                                 |
//! |-----------------|--------------------------------------------------------------------------------------|
//! | [`Tokenizer`]   | text ⇄ ids, from the plain data of a GGUF or from a `tokenizer.json`                  |
//! | [`ChatTemplate`]| messages → prompt text, with the Jinja template that came with the model              |
//! | [`TextModel`]   | both together: messages → ids, where what a client wrote never becomes a control token |
//! | [`Detokenizer`] | ids → text, one by one, never half a character                                       |
//! | [`StopMatcher`] | text → text up to the first stop string, whatever the pieces it comes in             |
//!
//! What it deliberately does not: read model files (the caller brings [`Vocab`] or bytes), know wire formats beyond
//! the shape of a chat message, keep a clock (a template that prints the date is given one), or count money.
//!
//! **Invariant**: only the template's own text makes control tokens. What clients write (contents, tool schemas,
//! arguments, template arguments) is encoded as plain text; see `guard.rs`.

mod added;
mod alphabet;
mod bpe;
mod detokenize;
mod guard;
mod json;
mod pre;
mod spm;
mod stop;
mod template;
mod text_model;
mod tokenizer;
mod vocab;
mod words;

pub use detokenize::Detokenizer;
pub use stop::{Piece, StopError, StopMatcher};
pub use template::{ChatPrompt, ChatTemplate, CivilTime, TemplateError};
pub use text_model::{ChatError, HfFiles, TextModel, TextModelError};
pub use tokenizer::{EncodeError, Special, Tokenizer, TokenizerId};
pub use vocab::{BuildError, TokenType, Vocab};
