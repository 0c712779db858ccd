//! What an engine's replies say where a request does not: the model's name, usage, how tokens are named.

use forebay_types::ModelName;
use forebay_wire::{Generate, RenderSpec};

use crate::config::EngineConfig;

/// How replies look, as configured.
pub(crate) struct Answers {
    model: ModelName,
    aliases: Vec<ModelName>,
    /// vLLM's `--enable-force-include-usage`.
    force_usage: bool,
    /// vLLM's `--return-tokens-as-token-ids`.
    tokens_as_ids: bool,
}

impl Answers {
    pub(super) fn new(config: &EngineConfig, model: &ModelName) -> Self {
        Self {
            model: model.clone(),
            aliases: config.aliases().collect(),
            force_usage: config.enable_force_include_usage,
            tokens_as_ids: config.return_tokens_as_token_ids,
        }
    }

    /// What a reply calls the model, by the name that was asked for. A name that is not the engine's is one of the layers
    /// above, and stays.
    pub(super) fn name<'n>(&'n self, asked: &'n ModelName) -> &'n ModelName {
        if self.aliases.contains(asked) { &self.model } else { asked }
    }

    pub(super) fn spec(&self, call: &Generate) -> RenderSpec {
        let asked = RenderSpec::new(call);
        RenderSpec {
            model: self.name(&call.model).clone(),
            include_usage: asked.include_usage || self.force_usage,
            continuous_usage: asked.continuous_usage || self.force_usage,
            tokens_as_ids: call.tokens_as_ids.unwrap_or(self.tokens_as_ids),
            ..asked
        }
    }
}

#[cfg(test)]
mod tests {
    use forebay_wire::{Api, Prompt};

    use super::*;

    #[test]
    fn a_request_goes_before_the_configuration() {
        let forced = EngineConfig {
            served_model_name: vec!["m".to_owned(), "alias".to_owned()].into(),
            enable_force_include_usage: true,
            return_tokens_as_token_ids: true,
            ..EngineConfig::default()
        };
        let check = |config: &EngineConfig,
                     asked: &str,
                     change: fn(&mut Generate),
                     expect: (&str, bool, bool, bool)| {
            let mut call = Generate::new(Api::Completions, asked.into(), Prompt::Text(vec!["x".into()]));
            change(&mut call);
            let spec = Answers::new(config, &"m".into()).spec(&call);
            let said = (spec.model.as_str(), spec.include_usage, spec.continuous_usage, spec.tokens_as_ids);
            assert_eq!(said, expect, "{asked}");
        };
        let plain = EngineConfig::default();
        check(&plain, "m", |_| {}, ("m", false, false, false));
        check(&plain, "m", |c| c.include_usage = true, ("m", true, false, false));
        check(&plain, "m", |c| c.tokens_as_ids = Some(true), ("m", false, false, true));
        check(&forced, "alias", |_| {}, ("m", true, true, true));
        check(&forced, "gpt-4o", |c| c.tokens_as_ids = Some(false), ("gpt-4o", true, true, false));
    }
}
