//! From configuration to chains of deployments.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use forebay_config::{Environment, SecretError, SecretValue, closest};
use forebay_observe::{MetricError, Registry};
use forebay_types::ModelName;
use forebay_upstream::{BaseUrlError, HttpClient, Timeouts, Upstream};
use forebay_wire::ModelCard;
use http::HeaderValue;
use parking_lot::Mutex;

use crate::config::{DeploymentConfig, ModelConfig, Provider, ProxyConfig};
use crate::cooldown::Cooldown;

const OPENAI_BASE_URL: &str = "https://api.openai.com/v1";
/// Anthropic's endpoint in OpenAI's dialect, which takes the key as a bearer token.
const ANTHROPIC_BASE_URL: &str = "https://api.anthropic.com/v1";

/// A fleet of the router, as the model list shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FleetCard {
    pub model: ModelName,
    /// Further names of it, for clients.
    pub aliases: Vec<ModelName>,
    /// Tokens of context, where it is known.
    pub max_model_len: Option<u32>,
    /// Seconds since the Unix epoch.
    pub created: u64,
}

/// What the proxy works with.
pub struct ProxyDeps<'a> {
    pub client: HttpClient,
    pub registry: &'a Registry,
    /// The fleets of the router below.
    pub fleets: Vec<FleetCard>,
}

/// Why a proxy can't be built. [`ProxyBuildError::at`] says where in the file.
#[derive(Debug, thiserror::Error)]
pub enum ProxyBuildError {
    #[error("the model `{model}` stands here twice; list all its deployments in one")]
    ModelTwice { at: String, model: ModelName },
    #[error("the model's name can't be empty")]
    NoName { at: String },
    #[error("the model `{model}` has no deployments; add one like {{fleet: NAME}}")]
    NoDeployments { at: String, model: ModelName },
    #[error("a deployment is either {{fleet: NAME}} or {{provider: openai, model: NAME, api-key: env:NAME}}")]
    NeitherOrBoth { at: String },
    #[error("`{key}` belongs to a provider, and this deployment is a fleet")]
    NotForFleets { at: String, key: &'static str },
    #[error("no fleet `{fleet}` (there {}{})", list(fleets), did_you_mean(fleet, fleets))]
    NoFleet { at: String, fleet: ModelName, fleets: Vec<ModelName> },
    #[error("the provider needs `{key}`")]
    Needs { at: String, key: &'static str },
    #[error("the provider's `base-url` can't be used")]
    Url { at: String, source: BaseUrlError },
    #[error("the provider's key can't be read")]
    Secret { at: String, source: SecretError },
    #[error("a deployment's name can't stand in a response header: only visible ASCII can")]
    Label { at: String },
    #[error("the proxy's metrics can't be registered")]
    Metrics(#[from] MetricError),
}

fn list(fleets: &[ModelName]) -> String {
    match fleets {
        [] => "is none".to_owned(),
        _ => {
            let names: Vec<String> = fleets.iter().map(|model| format!("`{model}`")).collect();
            format!("is {}", names.join(", "))
        }
    }
}

fn did_you_mean(fleet: &ModelName, fleets: &[ModelName]) -> String {
    let names: Vec<&str> = fleets.iter().map(ModelName::as_str).collect();
    closest(fleet.as_str(), &names).map(|name| format!("; did you mean `{name}`?")).unwrap_or_default()
}

impl ProxyBuildError {
    /// Path in the configuration (`proxy.models[0].deployments[1].fleet`), where the mistake is in one place.
    pub fn at(&self) -> Option<&str> {
        match self {
            Self::ModelTwice { at, .. }
            | Self::NoName { at }
            | Self::NoDeployments { at, .. }
            | Self::NeitherOrBoth { at }
            | Self::NotForFleets { at, .. }
            | Self::NoFleet { at, .. }
            | Self::Needs { at, .. }
            | Self::Url { at, .. }
            | Self::Secret { at, .. }
            | Self::Label { at } => Some(at),
            Self::Metrics(_) => None,
        }
    }
}

/// A model and its chain.
pub(crate) struct Model {
    pub(crate) name: ModelName,
    /// Of a fleet under its own name: what else it is called.
    aliases: Vec<ModelName>,
    pub(crate) card: ModelCard,
    /// Never empty.
    pub(crate) deployments: Vec<Deployment>,
    pub(crate) retries: u32,
    pub(crate) timeouts: Timeouts,
    /// The model sets its own `first-byte-timeout`, which then also binds a last fleet.
    pub(crate) first_byte_is_own: bool,
}

impl Model {
    /// Everything that it can be asked for by, its own name first.
    pub(crate) fn names(&self) -> impl Iterator<Item = &ModelName> {
        std::iter::once(&self.name).chain(&self.aliases)
    }
}

pub(crate) struct Deployment {
    /// `fleet/NAME` or `openai/NAME`: in `x-forebay-deployment`, metrics and traces.
    pub(crate) label: HeaderValue,
    pub(crate) target: Target,
    pub(crate) cooldown: Mutex<Cooldown>,
}

impl Deployment {
    pub(crate) fn label(&self) -> &str {
        self.label.to_str().expect("made of visible ASCII, checked when it was built")
    }
}

pub(crate) enum Target {
    Fleet(ModelName),
    Provider {
        provider: Provider,
        upstream: Upstream,
        /// The model's name there.
        model: String,
    },
}

/// The models, in the order in which they are listed, and where each name is.
pub(crate) struct Models {
    pub(crate) all: Vec<Model>,
    pub(crate) by_name: HashMap<ModelName, usize>,
}

/// Chains for every model. Without `models` in the file each fleet is a model under its own name and its aliases; with
/// them, only they can be asked for, and a fleet that nobody names is hidden.
pub(crate) fn build(
    config: &ProxyConfig,
    env: &dyn Environment,
    deps: &ProxyDeps<'_>,
) -> Result<Models, ProxyBuildError> {
    let implied: Vec<ModelConfig>;
    let listed = if config.models.is_empty() {
        implied = deps.fleets.iter().map(|fleet| under_its_own_name(&fleet.model)).collect();
        &implied
    } else {
        &config.models
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let mut models = Models { all: Vec::with_capacity(listed.len()), by_name: HashMap::new() };
    for (n, model) in listed.iter().enumerate() {
        let at = format!("proxy.models[{n}]");
        let name = ModelName::from(model.name.as_str());
        if model.name.is_empty() {
            return Err(ProxyBuildError::NoName { at: format!("{at}.name") });
        }
        if models.by_name.insert(name.clone(), n).is_some() {
            return Err(ProxyBuildError::ModelTwice { at: format!("{at}.name"), model: name });
        }
        if model.deployments.is_empty() {
            return Err(ProxyBuildError::NoDeployments { at: format!("{at}.deployments"), model: name });
        }
        let deployments = model
            .deployments
            .iter()
            .enumerate()
            .map(|(m, link)| deployment(link, format!("{at}.deployments[{m}]"), env, deps))
            .collect::<Result<Vec<_>, _>>()?;
        models.all.push(Model {
            aliases: Vec::new(),
            card: card(&name, &deployments, &deps.fleets, now),
            name,
            deployments,
            retries: model.retries.unwrap_or(config.retries),
            timeouts: Timeouts {
                first_byte: model.first_byte_timeout.unwrap_or(config.first_byte_timeout).get(),
                between_chunks: model.chunk_timeout.unwrap_or(config.chunk_timeout).get(),
            },
            first_byte_is_own: model.first_byte_timeout.is_some(),
        });
    }
    if config.models.is_empty() {
        for (n, fleet) in deps.fleets.iter().enumerate() {
            for alias in &fleet.aliases {
                // Names of their own go before those that are only aliases.
                if let Entry::Vacant(free) = models.by_name.entry(alias.clone()) {
                    free.insert(n);
                    models.all[n].aliases.push(alias.clone());
                }
            }
        }
    }
    Ok(models)
}

fn under_its_own_name(fleet: &ModelName) -> ModelConfig {
    let link = DeploymentConfig { fleet: Some(fleet.as_str().to_owned()), ..DeploymentConfig::default() };
    ModelConfig {
        name: fleet.as_str().to_owned(),
        deployments: vec![link],
        retries: None,
        first_byte_timeout: None,
        chunk_timeout: None,
    }
}

fn deployment(
    link: &DeploymentConfig,
    at: String,
    env: &dyn Environment,
    deps: &ProxyDeps<'_>,
) -> Result<Deployment, ProxyBuildError> {
    let (label, target) = match (&link.fleet, link.provider) {
        (Some(fleet), None) => (format!("fleet/{fleet}"), fleet_target(link, fleet, &at, deps)?),
        (None, Some(provider)) => {
            let (upstream, model) = provider_target(link, provider, &at, env, deps)?;
            (format!("{}/{model}", provider.as_str()), Target::Provider { provider, upstream, model })
        }
        (None, None) | (Some(_), Some(_)) => return Err(ProxyBuildError::NeitherOrBoth { at }),
    };
    let label = HeaderValue::try_from(label)
        .ok()
        .filter(|label| label.to_str().is_ok())
        .ok_or(ProxyBuildError::Label { at })?;
    Ok(Deployment { label, target, cooldown: Mutex::new(Cooldown::default()) })
}

fn fleet_target(
    link: &DeploymentConfig,
    fleet: &str,
    at: &str,
    deps: &ProxyDeps<'_>,
) -> Result<Target, ProxyBuildError> {
    let only_for_providers = [
        ("model", link.model.is_some()),
        ("api-key", link.api_key.is_some()),
        ("base-url", link.base_url.is_some()),
    ];
    if let Some((key, _)) = only_for_providers.into_iter().find(|(_, present)| *present) {
        return Err(ProxyBuildError::NotForFleets { at: format!("{at}.{key}"), key });
    }
    let fleet = ModelName::from(fleet);
    if !deps.fleets.iter().any(|card| card.model == fleet) {
        let fleets = deps.fleets.iter().map(|card| card.model.clone()).collect();
        return Err(ProxyBuildError::NoFleet { at: format!("{at}.fleet"), fleet, fleets });
    }
    Ok(Target::Fleet(fleet))
}

fn provider_target(
    link: &DeploymentConfig,
    provider: Provider,
    at: &str,
    env: &dyn Environment,
    deps: &ProxyDeps<'_>,
) -> Result<(Upstream, String), ProxyBuildError> {
    let needs = |key| ProxyBuildError::Needs { at: at.to_owned(), key };
    let base_url = match (provider, &link.base_url) {
        (_, Some(url)) => url.as_str(),
        (Provider::Openai, None) => OPENAI_BASE_URL,
        (Provider::Anthropic, None) => ANTHROPIC_BASE_URL,
        (Provider::OpenaiCompatible, None) => return Err(needs("base-url")),
    };
    let model = link.model.clone().ok_or_else(|| needs("model"))?;
    // A server of one's own may have no key; these always ask for one.
    if provider != Provider::OpenaiCompatible && link.api_key.is_none() {
        return Err(needs("api-key"));
    }
    let key: Option<SecretValue> = link
        .api_key
        .as_ref()
        .map(|key| key.resolve(env))
        .transpose()
        .map_err(|source| ProxyBuildError::Secret { at: format!("{at}.api-key"), source })?;
    let upstream = Upstream::new(deps.client.clone(), base_url, key.as_ref().map(SecretValue::expose))
        .map_err(|source| {
            let key = if source == BaseUrlError::Key { "api-key" } else { "base-url" };
            ProxyBuildError::Url { at: format!("{at}.{key}"), source }
        })?;
    Ok((upstream, model))
}

/// How the model is listed. A chain is as long as its first fleet: what comes after is the exception.
fn card(name: &ModelName, deployments: &[Deployment], fleets: &[FleetCard], now: u64) -> ModelCard {
    let fleet = deployments.iter().find_map(|deployment| match &deployment.target {
        Target::Fleet(fleet) => fleets.iter().find(|card| card.model == *fleet),
        Target::Provider { .. } => None,
    });
    let root = match &deployments[0].target {
        Target::Fleet(fleet) => fleet.as_str().to_owned(),
        Target::Provider { model, .. } => model.clone(),
    };
    ModelCard {
        id: name.clone(),
        created: fleet.map_or(now, |card| card.created),
        owned_by: "forebay".to_owned(),
        root: Some(root),
        parent: None,
        max_model_len: fleet.and_then(|card| card.max_model_len),
    }
}
