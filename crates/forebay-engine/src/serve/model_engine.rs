//! One engine of either kind, by what the model is.

use std::path::Path;
use std::time::Duration;

use forebay_flow::{Flow, Placed, PromptIds, Reply, Stage};
use forebay_types::{Fault, ModelName};
use forebay_wire::{Embed, Generate, Prompt};

use super::{Aborted, EmbeddingEngine, Engine, EngineDeps, StartError, Stopped};
use crate::config::EngineConfig;
use crate::model::is_encoder;

/// A running engine: one that generates, or one that embeds.
pub enum ModelEngine {
    Generating(Box<Engine>),
    Embedding(Box<EmbeddingEngine>),
}

impl ModelEngine {
    /// Loads the model and starts its thread: an encoder where `path` is a directory whose `config.json` says so.
    /// Blocks until it is ready.
    ///
    /// Publishing KV events needs a tokio runtime around the call.
    pub fn start(
        config: &EngineConfig,
        path: &Path,
        model: ModelName,
        deps: EngineDeps<'_>,
    ) -> Result<Self, StartError> {
        if is_encoder(path) {
            let engine = EmbeddingEngine::start(config, path, model, deps)?;
            return Ok(Self::Embedding(Box::new(engine)));
        }
        Ok(Self::Generating(Box::new(Engine::start(config, path, model, deps)?)))
    }

    /// Whether [`ModelEngine::start`] would take this configuration for this model. Reads what describes it only, and
    /// leaves out what depends on the machine's free memory.
    pub fn inspect(config: &EngineConfig, path: &Path) -> Result<(), StartError> {
        if is_encoder(path) {
            return EmbeddingEngine::inspect(config, path);
        }
        Engine::inspect(config, path)
    }

    /// The engine of a model that generates.
    pub fn generating(&self) -> Option<&Engine> {
        match self {
            Self::Generating(engine) => Some(engine),
            Self::Embedding(_) => None,
        }
    }

    /// Ends requests: those that generate with the finish reason `abort`, others with an error.
    pub async fn abort(&self, which: Aborted) -> Result<(), Stopped> {
        match self {
            Self::Generating(engine) => engine.abort(which).await,
            Self::Embedding(engine) => {
                engine.abort(&which);
                Ok(())
            }
        }
    }

    /// Takes nothing more, finishes every request that it has, and gives its memory back. Blocks until then.
    pub fn stop(self) {
        match self {
            Self::Generating(engine) => engine.stop(),
            Self::Embedding(engine) => engine.stop(),
        }
    }

    /// Tokens of one sequence at most.
    pub fn model_len(&self) -> u32 {
        match self {
            Self::Generating(engine) => engine.model_len(),
            Self::Embedding(engine) => engine.model_len(),
        }
    }

    /// Refuses prompts that can't fit, by their size alone. One that passes may still be too long.
    pub fn fits(&self, prompt: &Prompt) -> Result<(), Fault> {
        match self {
            Self::Generating(engine) => engine.fits(prompt),
            Self::Embedding(engine) => engine.fits(prompt),
        }
    }

    /// The ids of each prompt of a call. Pure CPU work; an estimate where the call is one that the engine refuses.
    pub fn encode(&self, call: &Generate) -> Result<PromptIds, Fault> {
        match self {
            Self::Generating(engine) => engine.encode(call),
            Self::Embedding(_) => Ok(PromptIds::estimate(&call.prompt)),
        }
    }

    /// As [`ModelEngine::encode`], for texts to embed.
    pub fn encode_inputs(&self, call: &Embed) -> Result<PromptIds, Fault> {
        match self {
            Self::Generating(_) => Ok(PromptIds::estimate(&call.input)),
            Self::Embedding(engine) => engine.encode(call),
        }
    }

    pub fn load_time(&self) -> Duration {
        match self {
            Self::Generating(engine) => engine.load_time(),
            Self::Embedding(engine) => engine.load_time(),
        }
    }

    /// One line for people.
    pub fn summary(&self) -> &str {
        match self {
            Self::Generating(engine) => engine.summary(),
            Self::Embedding(engine) => engine.summary(),
        }
    }

    /// Whether what it computes takes longer than `engine.watchdog`.
    pub fn is_stuck(&self) -> bool {
        match self {
            Self::Generating(engine) => engine.is_stuck(),
            Self::Embedding(engine) => engine.is_stuck(),
        }
    }

    /// False once its thread has died: no request can succeed any more.
    pub fn is_alive(&self) -> bool {
        match self {
            Self::Generating(engine) => engine.is_alive(),
            Self::Embedding(engine) => engine.is_alive(),
        }
    }
}

impl Stage<Placed> for ModelEngine {
    async fn call(&self, flow: Flow<Placed>) -> Result<Reply, Fault> {
        match self {
            Self::Generating(engine) => engine.call(flow).await,
            Self::Embedding(engine) => engine.call(flow).await,
        }
    }
}
