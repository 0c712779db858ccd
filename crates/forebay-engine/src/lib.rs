//! L5: the inference engine.

mod config;
pub mod exec;
mod generation;
pub mod gguf;
mod kv_events;
mod metrics;
pub mod model;
pub mod safetensors;
pub mod sample;
mod serve;
mod small_file;

pub use config::{EngineConfig, EngineConfigError, ReasoningParser, ToolCallParser};
pub use generation::{GenerationDefaults, GenerationError, GenerationSource};
pub use kv_events::{KvEventSource, KvEventsConfig, KvEventsError};
pub use metrics::{EngineLoad, EngineMetrics, LoadMetrics};
pub use serve::{
    Aborted, ChatTemplateError, EmbeddingEngine, Engine, EngineDeps, HfTextError, KvSink, ModelEngine,
    PauseMode, StartError, Stopped, TextError,
};
