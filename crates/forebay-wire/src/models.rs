//! The model list, in OpenAI's shape with vLLM's additions.

use bytes::Bytes;
use forebay_types::ModelName;
use serde::Serialize;

/// One model as `/v1/models` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelCard {
    /// What clients ask for.
    pub id: ModelName,
    /// Seconds since the Unix epoch.
    pub created: u64,
    pub owned_by: String,
    /// What is loaded behind the name, as vLLM tells it.
    pub root: Option<String>,
    /// The base model of an adapter.
    pub parent: Option<String>,
    /// Context length in tokens, where it is known.
    pub max_model_len: Option<u32>,
}

#[derive(Serialize)]
struct WireCard<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'a str,
    root: Option<&'a str>,
    parent: Option<&'a str>,
    max_model_len: Option<u32>,
    permission: [Permission; 1],
}

/// OpenAI's old field, which vLLM fills and some clients read.
#[derive(Serialize)]
struct Permission {
    id: String,
    object: &'static str,
    created: u64,
    allow_create_engine: bool,
    allow_sampling: bool,
    allow_logprobs: bool,
    allow_search_indices: bool,
    allow_view: bool,
    allow_fine_tuning: bool,
    organization: &'static str,
    group: Option<&'static str>,
    is_blocking: bool,
}

#[derive(Serialize)]
struct WireList<'a> {
    object: &'static str,
    data: Vec<WireCard<'a>>,
}

fn wire_card(card: &ModelCard) -> WireCard<'_> {
    WireCard {
        id: card.id.as_str(),
        object: "model",
        created: card.created,
        owned_by: &card.owned_by,
        root: card.root.as_deref(),
        parent: card.parent.as_deref(),
        max_model_len: card.max_model_len,
        permission: [Permission {
            id: format!("modelperm-{}", card.id),
            object: "model_permission",
            created: card.created,
            allow_create_engine: false,
            allow_sampling: true,
            allow_logprobs: true,
            allow_search_indices: false,
            allow_view: true,
            allow_fine_tuning: false,
            organization: "*",
            group: None,
            is_blocking: false,
        }],
    }
}

/// The body of `GET /v1/models`.
pub fn render_models(cards: &[ModelCard]) -> Bytes {
    to_bytes(&WireList { object: "list", data: cards.iter().map(wire_card).collect() })
}

/// The body of `GET /v1/models/{id}`.
pub fn render_model(card: &ModelCard) -> Bytes {
    to_bytes(&wire_card(card))
}

fn to_bytes<T: Serialize>(value: &T) -> Bytes {
    serde_json::to_vec(value).expect("strings and numbers serialize").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_and_card() {
        let card = ModelCard {
            id: "org/m".into(),
            created: 7,
            owned_by: "forebay".into(),
            root: Some("m.gguf".into()),
            parent: None,
            max_model_len: Some(4096),
        };
        let one = r#"{"id":"org/m","object":"model","created":7,"owned_by":"forebay","root":"m.gguf","parent":null,"max_model_len":4096,"permission":[{"id":"modelperm-org/m","object":"model_permission","created":7,"allow_create_engine":false,"allow_sampling":true,"allow_logprobs":true,"allow_search_indices":false,"allow_view":true,"allow_fine_tuning":false,"organization":"*","group":null,"is_blocking":false}]}"#;
        assert_eq!(render_model(&card), one);
        assert_eq!(render_models(&[card]), format!(r#"{{"object":"list","data":[{one}]}}"#));
        assert_eq!(render_models(&[]), r#"{"object":"list","data":[]}"#);
    }
}
