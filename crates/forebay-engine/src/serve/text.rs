//! The text side of a model, read from its file: vocabulary, special tokens, chat template.

use forebay_tokens::{TextModel, TokenType, Tokenizer, Vocab};

use crate::gguf::{Gguf, List, Value};

/// Why a model file's tokenizer can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error("the model file has no `{key}`")]
    Missing { key: &'static str },
    #[error("the tokenizer in the model file can't be used")]
    Tokenizer(#[source] forebay_tokens::BuildError),
    #[error("the chat template in the model file can't be used")]
    Template(#[source] forebay_tokens::TemplateError),
}

/// Reads `tokenizer.*` of a GGUF file.
pub(crate) fn text_model(gguf: &Gguf) -> Result<TextModel, TextError> {
    let texts = |key: &'static str| gguf.get(key).and_then(|v| v.as_texts()).map(<[String]>::to_vec);
    let id = |key: &str| gguf.get(key).and_then(|v| v.as_u64()).map(|id| id as u32);
    let text = |key: &str| gguf.get(key).and_then(|v| v.as_str()).map(str::to_owned);
    let tokens = texts("tokenizer.ggml.tokens").ok_or(TextError::Missing { key: "tokenizer.ggml.tokens" })?;
    let model = text("tokenizer.ggml.model").ok_or(TextError::Missing { key: "tokenizer.ggml.model" })?;
    let token_types = match gguf.get("tokenizer.ggml.token_type") {
        Some(Value::List(List::Ints(types))) => types.clone(),
        Some(Value::List(List::Uints(types))) => types.iter().map(|&t| t as i64).collect(),
        _ => Vec::new(),
    };
    let scores = match gguf.get("tokenizer.ggml.scores") {
        Some(Value::List(List::Floats(scores))) => scores.iter().map(|&score| score as f32).collect(),
        _ => Vec::new(),
    };
    // What llama.cpp takes a file of a SentencePiece model to mean that does not say.
    let is_sentencepiece = model == "llama";
    let flag = |key: &str, default| gguf.get(key).and_then(|v| v.as_bool()).unwrap_or(default);
    let vocab = Vocab {
        model,
        pre: text("tokenizer.ggml.pre").unwrap_or_else(|| "default".into()),
        tokens,
        merges: texts("tokenizer.ggml.merges").unwrap_or_default(),
        token_types: token_types.into_iter().map(TokenType::from_gguf).collect(),
        bos: id("tokenizer.ggml.bos_token_id"),
        eos: id("tokenizer.ggml.eos_token_id"),
        eot: id("tokenizer.ggml.eot_token_id"),
        unk: id("tokenizer.ggml.unknown_token_id"),
        pad: id("tokenizer.ggml.padding_token_id"),
        scores,
        add_bos: flag("tokenizer.ggml.add_bos_token", is_sentencepiece),
        add_space_prefix: flag("tokenizer.ggml.add_space_prefix", is_sentencepiece),
    };
    let template = text("tokenizer.chat_template");
    let tokenizer = Tokenizer::new(vocab).map_err(TextError::Tokenizer)?;
    TextModel::new(tokenizer, template.as_deref()).map_err(TextError::Template)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use forebay_tokens::Special;

    use super::*;
    use crate::model::ModelFile;

    #[derive(serde::Deserialize)]
    struct Case {
        text: String,
        ids: Vec<u32>,
    }

    /// Golden: llama.cpp, by `tests/reference/llamacpp_tokens.py`. Skipped unless `FOREBAY_TEST_GEMMA` is the path of
    /// Gemma 3 270M's GGUF file.
    #[test]
    fn gemma_ids_equal_those_of_llama_cpp() {
        let Some(path) = std::env::var_os("FOREBAY_TEST_GEMMA") else { return };
        let model = text_model(ModelFile::open(Path::new(&path)).unwrap().gguf().unwrap()).unwrap();
        let golden = include_str!("../../tests/fixtures/gemma3-tokens.json");
        for Case { text, ids } in serde_json::from_str::<Vec<Case>>(golden).unwrap() {
            assert_eq!(model.encode_text(&text, Special::NONE).unwrap(), ids, "{text:?}");
            // The vocabulary's sign for a space can't be told from one.
            assert_eq!(model.tokenizer().decode(&ids, true), text.replace('▁', " "));
        }
        assert_eq!(model.encode_text("Hi", Special::ADD).unwrap(), [2, 10979]);
        assert_eq!(model.encode_text("<bos>Hi<eos>", Special::PARSE).unwrap(), [2, 10979, 1]);
    }
}
