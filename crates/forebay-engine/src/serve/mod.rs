//! Serving: from a placed request to a stream of events.
//!
//! [`Engine`] is the handle that the rest of the program holds; the step loop runs on a thread of its own and is
//! reached through one bounded channel. [`EmbeddingEngine`] is the same for encoders, and [`ModelEngine`] is either.
//! **Invariant:** nothing in here knows HTTP or JSON of a generation; the only JSON is that of `/tokenize`,
//! `/detokenize` and embeddings, through `forebay-wire`.

mod answers;
mod checks;
mod choice;
mod constrain;
mod control;
mod embed;
mod engine;
mod events;
mod hf_text;
mod layout;
mod load;
mod memory;
mod model_engine;
mod off_thread;
mod prompt;
mod reading;
mod request;
mod sampling;
mod scores;
mod start_error;
mod step_loop;
mod submission;
mod template;
mod text;
mod tokenizer_info;
mod told;
mod watchdog;
mod words;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use forebay_kv::KvEvent;
use forebay_kv::codec::LoadStat;
use tokio::sync::watch;

pub use control::{Aborted, PauseMode, Stopped};
pub use embed::EmbeddingEngine;
pub use engine::{Engine, EngineDeps};
pub use hf_text::HfTextError;
pub use model_engine::ModelEngine;
pub use start_error::StartError;
pub use template::ChatTemplateError;
pub use text::TextError;

/// Gets the KV events of an engine, in order, on the step thread: must be quick.
pub type KvSink = Arc<dyn Fn(&[KvEvent]) + Send + Sync>;

/// Who is told what the step loop does.
#[derive(Default)]
pub(crate) struct Sinks {
    pub(crate) kv: Option<KvSink>,
    /// Where the load is to be put, for who wants to know it.
    pub(crate) load: Option<watch::Sender<LoadStat>>,
}
