//! The `proxy` section.

use forebay_config::{HumanDuration, Secret};
use forebay_wire::Api;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What clients may ask for, and who answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct ProxyConfig {
    /// The models that clients may ask for; without any, each fleet is a model under its own name.
    pub models: Vec<ModelConfig>,
    /// Further attempts at the same provider after a failure that may pass; a fleet's router has its own.
    pub retries: u32,
    /// Wait before the first retry, doubled for each one after and shortened at random by up to a half.
    pub retry_backoff: HumanDuration,
    /// Time after which no further attempt is begun, counted from the first.
    pub attempts_deadline: HumanDuration,
    /// How long a deployment may take to its first byte before the next one is tried; the last fleet of a chain may take as long as the client waits.
    pub first_byte_timeout: HumanDuration,
    /// How long a provider may pause within a reply.
    pub chunk_timeout: HumanDuration,
    /// When a failing deployment is left out for a while.
    pub cooldown: CooldownConfig,
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            models: Vec::new(),
            retries: 1,
            retry_backoff: HumanDuration::from_millis(200),
            attempts_deadline: HumanDuration::from_secs(120),
            first_byte_timeout: HumanDuration::from_secs(60),
            chunk_timeout: HumanDuration::from_secs(60),
            cooldown: CooldownConfig::default(),
        }
    }
}

/// When a failing deployment is left out for a while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct CooldownConfig {
    /// Failed attempts in a row after which a deployment is left out; 0 turns this off.
    pub failures: u32,
    /// How long it is left out, and the longest `retry-after` of a provider that is believed.
    pub time: HumanDuration,
}

impl Default for CooldownConfig {
    fn default() -> Self {
        Self { failures: 3, time: HumanDuration::from_secs(30) }
    }
}

/// One model as clients know it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ModelConfig {
    /// What clients ask for.
    pub name: String,
    /// Who answers, first to last: the fallback chain.
    pub deployments: Vec<DeploymentConfig>,
    /// `proxy.retries` for this model.
    #[serde(default)]
    pub retries: Option<u32>,
    /// `proxy.first-byte-timeout` for this model; set here it binds the last fleet of the chain too.
    #[serde(default)]
    pub first_byte_timeout: Option<HumanDuration>,
    /// `proxy.chunk-timeout` for this model.
    #[serde(default)]
    pub chunk_timeout: Option<HumanDuration>,
}

/// One link of a chain: `{fleet: NAME}`, or `{provider: …, model: …, api-key: …}`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct DeploymentConfig {
    /// A fleet of the router, by its model.
    pub fleet: Option<String>,
    /// A provider elsewhere, by the dialect it speaks.
    pub provider: Option<Provider>,
    /// The model's name at the provider.
    pub model: Option<String>,
    /// The provider's key, as `env:NAME` or `file:PATH`.
    pub api_key: Option<Secret>,
    /// The provider's base URL, like `https://api.openai.com/v1`.
    pub base_url: Option<String>,
}

/// Whose API a provider speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Provider {
    /// OpenAI itself; `base-url` is `https://api.openai.com/v1` unless it is set.
    Openai,
    /// Any server with OpenAI's API; `base-url` is needed.
    OpenaiCompatible,
    /// Anthropic's endpoint in OpenAI's dialect, for chat; `base-url` is `https://api.anthropic.com/v1` unless it is set. Its native Messages API is not spoken yet.
    Anthropic,
}

impl Provider {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Openai => "openai",
            Self::OpenaiCompatible => "openai-compatible",
            Self::Anthropic => "anthropic",
        }
    }

    /// Whether there is such an endpoint.
    pub fn has(self, api: Api) -> bool {
        match self {
            // It may be a vLLM.
            Self::OpenaiCompatible => true,
            Self::Openai => api != Api::Tokens,
            Self::Anthropic => api == Api::ChatCompletions,
        }
    }

    /// Whether there is `/v1/embeddings`.
    pub fn has_embeddings(self) -> bool {
        match self {
            Self::Openai | Self::OpenaiCompatible => true,
            Self::Anthropic => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<ProxyConfig, String> {
        let source = forebay_config::Source::new("forebay.yaml", text);
        forebay_config::load(&source).map(|loaded| loaded.config).map_err(|found| found.to_string())
    }

    #[test]
    fn the_file() {
        let config = load(
            "models:
  - name: gpt-4o
    deployments:
      - {fleet: smollm2-135m-instruct}
      - {provider: anthropic, model: claude-sonnet-4-5, api-key: env:ANTHROPIC_API_KEY}
      - {provider: openai, model: gpt-4o, api-key: env:OPENAI_API_KEY, base-url: \"https://api.openai.com/v1\"}
    retries: 2
first-byte-timeout: 90s
",
        )
        .expect("valid");
        let links = &config.models[0].deployments;
        assert_eq!(links[0].fleet.as_deref(), Some("smollm2-135m-instruct"));
        assert_eq!(links[1].provider, Some(Provider::Anthropic));
        assert_eq!(links[2].api_key, Some(Secret::env("OPENAI_API_KEY")));
        assert_eq!(links[2].base_url.as_deref(), Some("https://api.openai.com/v1"));
        assert_eq!(config.models[0].retries, Some(2));
        assert_eq!(config.first_byte_timeout, HumanDuration::from_secs(90));
        assert_eq!(config.cooldown, CooldownConfig::default());
    }

    #[test]
    fn mistakes_point_at_themselves() {
        let check = |text: &str, expect: &[&str]| {
            let shown = load(text).expect_err("a mistake");
            for part in expect {
                assert!(shown.contains(part), "{shown}");
            }
        };
        check("retris: 10\n", &["forebay.yaml:1:1", "did you mean `retries`?"]);
        let text = "models:\n  - name: m\n    deployments: [{provider: openia}]\n";
        check(text, &["forebay.yaml:3:30", "openia"]);
    }
}
