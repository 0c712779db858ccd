//! vLLM's `GET /tokenizer_info`: `tokenizer_config.json`, or what it would say of a model that has none.

use std::path::Path;

use bytes::Bytes;
use forebay_flow::Reply;
use forebay_tokens::TextModel;
use forebay_types::{Blame, Class, Code, Fault, TokenId};
use serde_json::{Map, Value};

use super::hf_text::{FILE_BYTES_MAX, HfTextError, TOKENIZER_CONFIG};
use crate::small_file;

/// What files of a tokenizer name that has no class of its own in transformers.
const CLASS: &str = "PreTrainedTokenizerFast";
/// Files of the machine that this runs on.
const FILES: [&str; 2] = ["vocab_file", "merges_file"];

/// The body of the answer. `directory` is that of a model in Hugging Face's layout.
pub(super) fn render(
    text: &TextModel,
    directory: Option<&Path>,
    model_len: u32,
) -> Result<Bytes, HfTextError> {
    let path = directory.map(|directory| directory.join(TOKENIZER_CONFIG));
    let file = match path {
        Some(path) => small_file::read_if_there(&path, FILE_BYTES_MAX)?,
        None => None,
    };
    let mut info: Map<String, Value> = match file {
        Some(json) => serde_json::from_slice(&json).map_err(HfTextError::Config)?,
        None => Map::new(),
    };
    info.retain(|key, _| !FILES.contains(&key.as_str()));
    info.values_mut().for_each(to_content);
    let tokenizer = text.tokenizer();
    for (key, id) in [
        ("bos_token", tokenizer.bos()),
        ("eos_token", tokenizer.eos()),
        ("unk_token", tokenizer.unk()),
        ("pad_token", tokenizer.pad()),
    ] {
        if let Some(piece) = id.and_then(|id| tokenizer.token_piece(id)) {
            info.entry(key).or_insert_with(|| piece.into());
        }
    }
    info.entry("model_max_length").or_insert_with(|| model_len.into());
    info.entry("added_tokens_decoder").or_insert_with(|| {
        let ids = 0..tokenizer.vocab_size() as TokenId;
        let special = ids.filter(|&id| tokenizer.is_special(id));
        special
            .filter_map(|id| Some((id.to_string(), tokenizer.token_piece(id)?.into())))
            .collect::<Map<_, _>>()
            .into()
    });
    info.entry("tokenizer_class").or_insert_with(|| CLASS.into());
    // The one that is used, wherever it came from.
    info.insert("chat_template".to_owned(), text.template().source().into());
    Ok(Value::Object(info).to_string().into())
}

/// A token that is described is its text, as in vLLM.
fn to_content(value: &mut Value) {
    match value {
        Value::Object(fields) => match fields.shift_remove("content") {
            Some(content) => *value = content,
            None => fields.values_mut().for_each(to_content),
        },
        Value::Array(items) => items.iter_mut().for_each(to_content),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// `info` where the endpoint is on.
pub(super) fn answer(info: Option<&Bytes>) -> Result<Reply, Fault> {
    match info {
        Some(info) => Ok(Reply::json(info.clone())),
        None => {
            let class = Class::new(Code::RouteNotFound, Blame::Client);
            Err(Fault::new(class, "/tokenizer_info is off here (`engine.enable-tokenizer-info-endpoint`)"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::hf_text;

    fn fixture() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-bert")
    }

    fn info(directory: Option<&Path>) -> Result<Value, HfTextError> {
        let text = hf_text::text_model(&fixture())?;
        render(&text, directory, 48).map(|body| serde_json::from_slice(&body).expect("JSON"))
    }

    #[test]
    fn the_file_as_vllm_shows_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let write = |text: &str| std::fs::write(dir.path().join(TOKENIZER_CONFIG), text).expect("written");
        write(
            r#"{"tokenizer_class": "BertTokenizer", "vocab_file": "/home/me/vocab.txt", "merges_file": null, "x": [1],
                "mask_token": {"content": "[MASK]", "lstrip": false}, "chat_template": "not the one that is used",
                "added_tokens_decoder": {"0": {"content": "[PAD]", "special": true}}}"#,
        );
        let info = info(Some(dir.path())).expect("is right");
        let used = info["chat_template"].as_str().expect("a template");
        assert!(used.contains("im_start"), "{used}");
        assert_eq!(
            info,
            serde_json::json!({
                "tokenizer_class": "BertTokenizer", "x": [1], "mask_token": "[MASK]", "unk_token": "[UNK]",
                "pad_token": "[PAD]", "added_tokens_decoder": {"0": "[PAD]"}, "model_max_length": 48,
                "chat_template": used,
            })
        );
        write("[]");
        assert!(matches!(super::tests::info(Some(dir.path())), Err(HfTextError::Config(_))));
    }

    #[test]
    fn without_a_file_the_tokenizer_tells() {
        let info = info(None).expect("is right");
        assert_eq!((&info["tokenizer_class"], &info["model_max_length"]), (&CLASS.into(), &48.into()));
        let special = info["added_tokens_decoder"].as_object().expect("tokens");
        assert!(special.values().any(|token| token == "[CLS]"), "{special:?}");
    }

    #[test]
    fn it_is_off_unless_turned_on() {
        let fault = answer(None).expect_err("off");
        assert_eq!(fault.class.code, Code::RouteNotFound);
        assert!(answer(Some(&Bytes::from_static(b"{}"))).is_ok());
    }
}
