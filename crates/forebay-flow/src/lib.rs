//! How a request passes from layer to layer: `Flow<Stage>`, `trait Stage` and the reply.
//!
//! A stage value says what has been proved about the request so far. The life of a request:
//!
//! ```text
//! edge     makes Flow<Received>
//! gateway  Received -> Admitted   who is calling, quota held, prompt tokenized or estimated
//! proxy    Admitted -> Resolved   which fleet or provider serves it
//! router   Resolved -> Placed     which replica, and why
//! engine   Placed   -> Reply      tokens
//! ```
//!
//! **Invariant:** dropping the future of a call, or the reply's chunks, cancels the request: every hold taken on the
//! way down is released by `Drop`, and the engine frees its KV blocks one step later.

mod encoder;
mod reply;
mod stage;

pub use encoder::{PromptEncoder, PromptIds};
pub use forebay_types::TokenizerId;
pub use reply::{ChunkStream, Reply, ReplyForm};
pub use stage::{Admitted, Caller, FAIRNESS_ID, Flow, Origin, Placed, Received, Resolved, Stage};
