//! L5: the inference engine.

mod config;
pub mod exec;
pub mod gguf;
mod metrics;
pub mod model;
pub mod sample;
mod serve;

pub use config::{EngineConfig, EngineConfigError};
pub use metrics::EngineMetrics;
pub use serve::{Engine, EngineDeps, KvSink, StartError, TextError};
