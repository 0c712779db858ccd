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
pub use metrics::EngineMetrics;
pub use serve::{
    EmbeddingEngine, Engine, EngineDeps, HfTextError, KvSink, ModelEngine, StartError, TextError,
};
