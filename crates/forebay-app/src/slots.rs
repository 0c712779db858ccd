//! The models of this process: each has a place of its own and is loaded and unloaded while the others serve.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_engine::{LoadMetrics, ModelEngine};
use forebay_flow::{Flow, Placed, Reply, Stage};
use forebay_types::{Blame, Class, Code, Fault, ModelName, Retry};
use parking_lot::RwLock;

use crate::error::one_line;
use crate::serve::StartError;

/// How often an unload looks whether a call still holds the engine.
const HELD_POLL: Duration = Duration::from_millis(10);

/// A model in memory, as far as a slot knows it.
pub trait Loaded: Send + Sync + 'static {
    /// One line for people.
    fn summary(&self) -> String;
    /// Tokens of one sequence at most.
    fn model_len(&self) -> u32;
    fn is_alive(&self) -> bool;
    /// Lets calls go on that wait for an operator.
    fn settle(&self) -> impl Future<Output = ()> + Send;
    /// Takes nothing more, finishes what runs, gives all memory back. Blocks.
    fn stop(self);
}

impl Loaded for ModelEngine {
    fn summary(&self) -> String {
        format!("{}, loaded in {:.1} s", ModelEngine::summary(self), self.load_time().as_secs_f64())
    }

    fn model_len(&self) -> u32 {
        ModelEngine::model_len(self)
    }

    fn is_alive(&self) -> bool {
        ModelEngine::is_alive(self)
    }

    async fn settle(&self) {
        if let Some(engine) = self.generating().filter(|engine| engine.is_paused()) {
            // One that has stopped keeps nobody.
            let _ = engine.resume().await;
        }
    }

    fn stop(self) {
        ModelEngine::stop(self);
    }
}

/// Loads a model: fetches its file where it is missing, reads and packs it.
pub type Loader<E> =
    Box<dyn Fn() -> Pin<Box<dyn Future<Output = Result<E, StartError>> + Send>> + Send + Sync>;

/// The place of one configured model.
pub struct Slot<E = ModelEngine> {
    model: ModelName,
    state: RwLock<State<E>>,
    /// Held by whoever loads or unloads.
    turn: tokio::sync::Mutex<()>,
    loader: Loader<E>,
    /// Tells the router that nothing of this engine's cache is left.
    forget: Box<dyn Fn() + Send + Sync>,
    metrics: LoadMetrics,
}

enum State<E> {
    Unloaded,
    Loading,
    Loaded(Arc<E>),
    /// Takes nothing more; what runs is finished.
    Draining,
    /// The last attempt to load it failed.
    Failed(String),
}

/// A slot for the admin API.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ModelStatus {
    pub model: ModelName,
    /// `unloaded`, `loading`, `loaded`, `draining`, `failed` or `dead`.
    pub state: &'static str,
    /// Of a loaded model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<u32>,
    /// Why the last attempt to load it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Why a model can't be loaded or unloaded now.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    #[error("`{model}` is loaded or unloaded by another request; ask again when that is done")]
    Busy { model: ModelName },
    #[error("`{model}` can't be loaded: {why}")]
    Failed { model: ModelName, why: String },
}

impl<E: Loaded> Slot<E> {
    /// An empty place. `forget` is called when an engine's memory is gone.
    pub fn new(
        model: ModelName,
        loader: Loader<E>,
        forget: Box<dyn Fn() + Send + Sync>,
        metrics: LoadMetrics,
    ) -> Self {
        metrics.on_configured(model.as_str());
        let (state, turn) = (RwLock::new(State::Unloaded), tokio::sync::Mutex::new(()));
        Self { model, state, turn, loader, forget, metrics }
    }

    pub fn model(&self) -> &ModelName {
        &self.model
    }

    /// The engine, while it is loaded.
    pub fn engine(&self) -> Option<Arc<E>> {
        match &*self.state.read() {
            State::Loaded(engine) => Some(Arc::clone(engine)),
            State::Unloaded | State::Loading | State::Draining | State::Failed(_) => None,
        }
    }

    pub fn status(&self) -> ModelStatus {
        let mut status = ModelStatus {
            model: self.model.clone(),
            state: "unloaded",
            summary: None,
            max_model_len: None,
            error: None,
        };
        match &*self.state.read() {
            State::Unloaded => {}
            State::Loading => status.state = "loading",
            State::Draining => status.state = "draining",
            State::Failed(why) => (status.state, status.error) = ("failed", Some(why.clone())),
            State::Loaded(engine) => {
                status.state = if engine.is_alive() { "loaded" } else { "dead" };
                status.summary = Some(engine.summary());
                status.max_model_len = Some(engine.model_len());
            }
        }
        status
    }

    /// Loads the model unless it is loaded. Cancellation: the slot is left unloaded.
    pub async fn load(&self) -> Result<(), StartError> {
        let _turn = self.turn.lock().await;
        self.load_in_turn().await
    }

    /// As [`load`](Self::load), for the admin API: does not wait for another load or unload.
    pub async fn try_load(&self) -> Result<(), SlotError> {
        let Ok(_turn) = self.turn.try_lock() else {
            return Err(SlotError::Busy { model: self.model.clone() });
        };
        let failed =
            |error: StartError| SlotError::Failed { model: self.model.clone(), why: one_line(&error) };
        self.load_in_turn().await.map_err(failed)
    }

    async fn load_in_turn(&self) -> Result<(), StartError> {
        if self.engine().is_some() {
            return Ok(());
        }
        *self.state.write() = State::Loading;
        // Whoever stops waiting must not leave a slot that says `loading` for ever.
        let undo = Undo(self);
        let begun = Instant::now();
        match (self.loader)().await {
            Ok(engine) => {
                tracing::info!(model = %self.model, "model loaded");
                self.metrics.on_loaded(self.model.as_str(), begun.elapsed());
                *self.state.write() = State::Loaded(Arc::new(engine));
                std::mem::forget(undo);
                Ok(())
            }
            Err(error) => {
                let why = one_line(&error);
                tracing::warn!(model = %self.model, why, "the model can't be loaded");
                self.metrics.on_load_failed(self.model.as_str());
                *self.state.write() = State::Failed(why);
                std::mem::forget(undo);
                Err(error)
            }
        }
    }

    /// Unloads the model: new requests are refused at once, those that run are finished, then its memory is free.
    /// Nothing where it is not loaded. Must not be cancelled in the middle: spawn it.
    pub async fn try_unload(&self) -> Result<(), SlotError> {
        let Ok(_turn) = self.turn.try_lock() else {
            return Err(SlotError::Busy { model: self.model.clone() });
        };
        let mut engine = {
            let mut state = self.state.write();
            match std::mem::replace(&mut *state, State::Draining) {
                State::Loaded(engine) => engine,
                State::Unloaded | State::Loading | State::Draining | State::Failed(_) => {
                    *state = State::Unloaded;
                    return Ok(());
                }
            }
        };
        tracing::info!(model = %self.model, "model is unloaded: requests that run are finished first");
        // Calls hold it until their first token, and no new one gets it.
        let engine = loop {
            match Arc::try_unwrap(engine) {
                Ok(engine) => break engine,
                Err(held) => engine = held,
            }
            // While it is paused they would hold it for ever, as no resume reaches it any more. Each time, because a pause
            // may have been on its way.
            engine.settle().await;
            tokio::time::sleep(HELD_POLL).await;
        };
        if tokio::task::spawn_blocking(move || engine.stop()).await.is_err() {
            tracing::error!(model = %self.model, "the engine panicked while it was stopped");
        }
        (self.forget)();
        self.metrics.on_unloaded(self.model.as_str());
        tracing::info!(model = %self.model, "model unloaded");
        *self.state.write() = State::Unloaded;
        Ok(())
    }

    fn refusal(&self) -> Fault {
        let why = match &*self.state.read() {
            State::Loading => "is being loaded; try again in a moment",
            State::Draining => "is being unloaded",
            State::Unloaded | State::Failed(_) | State::Loaded(_) => "is not loaded",
        };
        let class = Class::new(Code::ModelUnavailable, Blame::Us).retry(Retry::Elsewhere);
        Fault::new(class, format!("the model `{}` {why}", self.model))
            .detail("POST /api/models/load on the admin listener loads it")
    }
}

struct Undo<'a, E>(&'a Slot<E>);

impl<E> Drop for Undo<'_, E> {
    fn drop(&mut self) {
        *self.0.state.write() = State::Unloaded;
    }
}

impl<E: Loaded + Stage<Placed>> Stage<Placed> for Slot<E> {
    async fn call(&self, flow: Flow<Placed>) -> Result<Reply, Fault> {
        match self.engine() {
            Some(engine) => engine.call(flow).await,
            None => Err(self.refusal()),
        }
    }
}

#[cfg(test)]
mod tests;
