//! How a model's output is read: the forms that calls and reasoning have.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The form of tool calls. Names are those of vLLM's `--tool-call-parser`, where it has the form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ToolCallParser {
    /// By the model's chat template.
    #[default]
    Auto,
    /// Tools can't be called.
    None,
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen 2.5 and 3, and models whose template knows of no tools.
    Hermes,
    /// `{"name": …, "parameters": {…}}`: Llama 3 and 4.
    #[serde(alias = "llama4_json")]
    Llama3Json,
    /// A JSON object with `name` and `arguments`, or an array of them.
    Json,
}

/// The form of reasoning. Names are those of vLLM's `--reasoning-parser`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReasoningParser {
    /// Between `<think>` and `</think>`, where the model's chat template has these tags.
    #[default]
    Auto,
    /// Reasoning stays in the text.
    None,
    /// Everything up to `</think>`, the beginning tag or not.
    #[serde(alias = "deepseek_v3")]
    DeepseekR1,
    /// Between `<think>` and `</think>`, whatever the template has.
    #[serde(alias = "glm45", alias = "olmo3")]
    Qwen3,
}

impl std::str::FromStr for ToolCallParser {
    type Err = serde::de::value::Error;

    /// By its name in the configuration.
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::deserialize(serde::de::IntoDeserializer::into_deserializer(name))
    }
}

impl std::str::FromStr for ReasoningParser {
    type Err = serde::de::value::Error;

    /// By its name in the configuration.
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::deserialize(serde::de::IntoDeserializer::into_deserializer(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_vllm() {
        let calls = |name: &str| name.parse::<ToolCallParser>().ok();
        assert_eq!(calls("hermes"), Some(ToolCallParser::Hermes));
        assert_eq!(calls("llama3_json"), Some(ToolCallParser::Llama3Json));
        assert_eq!(calls("llama4_json"), Some(ToolCallParser::Llama3Json));
        let unknown = "mistral".parse::<ToolCallParser>().map_err(|error| error.to_string());
        assert!(unknown.is_err_and(|text| text.contains("`mistral`") && text.contains("`hermes`")));
        let reasoning = |name: &str| name.parse::<ReasoningParser>().ok();
        assert_eq!(reasoning("deepseek_r1"), Some(ReasoningParser::DeepseekR1));
        assert_eq!(reasoning("qwen3"), Some(ReasoningParser::Qwen3));
    }
}
