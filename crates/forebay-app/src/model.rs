//! Where the engine's model file comes from.

use std::path::PathBuf;

use forebay_config::Environment;
use forebay_engine::EngineConfig;
use forebay_models::{HubConfig, ModelRef, Progress, PullError, ReferenceError, Store};
use forebay_types::ModelName;
use forebay_upstream::HttpClient;

/// A model file on this machine, and what it is called.
#[derive(Debug, Clone)]
pub struct LocalModel {
    pub name: ModelName,
    pub path: PathBuf,
    /// Where it came from, for people.
    pub source: String,
}

#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    #[error(transparent)]
    Pull(#[from] PullError),
    #[error("no directory for models: set FOREBAY_CACHE_DIR (or HOME)")]
    NoDirectory,
}

/// The model store of this user: `$FOREBAY_CACHE_DIR`, else `$XDG_CACHE_HOME/forebay`, else `~/.cache/forebay`.
pub fn store(env: &dyn Environment) -> Result<Store, ModelError> {
    let set = |name: &str| env.var(name).ok().filter(|value| !value.is_empty());
    let cache = set("FOREBAY_CACHE_DIR")
        .map(PathBuf::from)
        .or_else(|| set("XDG_CACHE_HOME").map(|dir| PathBuf::from(dir).join("forebay")))
        .or_else(|| set("HOME").map(|dir| PathBuf::from(dir).join(".cache/forebay")))
        .ok_or(ModelError::NoDirectory)?;
    let mut hub = HubConfig { token: set("HF_TOKEN"), ..HubConfig::default() };
    if let Some(endpoint) = set("HF_ENDPOINT") {
        hub.endpoint = endpoint;
    }
    Ok(Store::new(cache.join("models"), hub))
}

/// What the configured model is called, before anything is fetched.
pub fn name(config: &EngineConfig) -> Result<ModelName, ReferenceError> {
    let reference = ModelRef::parse(&config.model)?;
    Ok(config.served_name().map_or_else(|| reference.default_name(), str::to_owned).into())
}

/// The file of the configured model, fetched where it is not there yet.
pub async fn obtain(
    config: &EngineConfig,
    store: &Store,
    client: &HttpClient,
    progress: &dyn Progress,
) -> Result<LocalModel, ModelError> {
    let reference = ModelRef::parse(&config.model)?;
    let resolved = store.pull(client, &reference, progress).await?;
    let name = config.served_name().map_or(resolved.name, str::to_owned);
    Ok(LocalModel { name: name.into(), path: resolved.path, source: resolved.source })
}
