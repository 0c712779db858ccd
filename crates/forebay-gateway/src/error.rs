//! Why a gateway can't be built, and why a request is not admitted.

use std::io;
use std::path::PathBuf;

use forebay_config::SecretError;
use forebay_observe::MetricError;
use forebay_types::{Blame, Class, Classify, Code, ConsumerName, ModelName};

/// Why the gateway can't start. `at` is the place in the file, like `gateway.consumers[0].keys[1]`.
#[derive(Debug, thiserror::Error)]
pub enum GatewayBuildError {
    #[error(
        "`gateway.consumers` is empty, so nobody could call; add a consumer, or remove the `gateway` section"
    )]
    NoConsumers,
    #[error("`{at}` is empty; give the consumer a name")]
    NoName { at: String },
    #[error("`{at}`: there is another consumer named `{name}`")]
    DuplicateConsumer { at: String, name: String },
    #[error("`{at}` is empty; a consumer needs a key, like `env:TEAM_A_KEY`")]
    NoKeys { at: String },
    #[error("`{at}` is empty, which allows nothing; name models, or remove it to allow all")]
    NoModels { at: String },
    #[error("`{at}`: {source}")]
    Secret { at: String, source: SecretError },
    #[error("`{at}`: the key has more than {limit} bytes (`gateway.key-bytes-max`)")]
    KeyTooLong { at: String, limit: usize },
    #[error("`{at}`: the key has blanks or characters that a header can't carry")]
    KeyNotSendable { at: String },
    #[error("`{at}`: consumer `{other}` has the same key; whose a request is must be certain")]
    SharedKey { at: String, other: String },
    #[error("`{at}`: the secret has fewer than {least} bytes, so it could be guessed")]
    SaltSecretShort { at: String, least: usize },
    #[error("`gateway.cache-salt-secret` is for `gateway.cache-salt: consumer`; set that, or remove it")]
    SaltSecretUnused,
    #[error("`gateway.audit.dir`: `{}` can't be used for the audit log", path.display())]
    AuditDir { path: PathBuf, source: io::Error },
    #[error("`gateway.audit.pending-max` must be at least 1")]
    NoAuditRoom,
    #[error("the audit log's thread can't be started")]
    AuditThread(#[source] io::Error),
    #[error("the system gives no random bytes")]
    Random(#[source] getrandom::Error),
    #[error(transparent)]
    Metric(#[from] MetricError),
}

impl GatewayBuildError {
    /// The place in the file, for a diagnostic that points at it.
    pub fn at(&self) -> Option<&str> {
        match self {
            Self::NoConsumers => Some("gateway.consumers"),
            Self::NoName { at }
            | Self::DuplicateConsumer { at, .. }
            | Self::NoKeys { at }
            | Self::NoModels { at }
            | Self::Secret { at, .. }
            | Self::KeyTooLong { at, .. }
            | Self::KeyNotSendable { at }
            | Self::SharedKey { at, .. }
            | Self::SaltSecretShort { at, .. } => Some(at),
            Self::SaltSecretUnused => Some("gateway.cache-salt-secret"),
            Self::AuditDir { .. } => Some("gateway.audit.dir"),
            Self::NoAuditRoom => Some("gateway.audit.pending-max"),
            Self::AuditThread(_) | Self::Random(_) | Self::Metric(_) => None,
        }
    }
}

/// Why a caller is not who they should be. Says nothing of the key that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum IdentifyError {
    #[error(
        "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth \
         (i.e. Authorization: Bearer YOUR_KEY)."
    )]
    Missing,
    #[error("Incorrect API key provided. Check that it is complete and still in use.")]
    Incorrect,
    #[error("The header '{header}' is there more than once. Send one key.")]
    Repeated { header: &'static str },
}

impl Classify for IdentifyError {
    fn class(&self) -> Class {
        let code = match self {
            Self::Missing | Self::Incorrect => Code::InvalidApiKey,
            Self::Repeated { .. } => Code::BadRequest,
        };
        Class::new(code, Blame::Client)
    }
}

/// Why a known caller may not do this.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DeniedError {
    #[error("Consumer `{consumer}` is not allowed to use the model `{model}`.")]
    Model { consumer: ConsumerName, model: ModelName },
    #[error(
        "Missing required parameter: 'model'. Consumer `{consumer}` may use certain models only, so name one."
    )]
    NoModel { consumer: ConsumerName },
}

impl Classify for DeniedError {
    fn class(&self) -> Class {
        let code = match self {
            Self::Model { .. } => Code::ModelDenied,
            Self::NoModel { .. } => Code::BadRequest,
        };
        Class::new(code, Blame::Client)
    }

    fn param(&self) -> Option<&str> {
        Some("model")
    }
}
