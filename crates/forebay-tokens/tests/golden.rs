//! Against golden files made by the `tokenizers` Python package and by Jinja2; see `fixtures/make_golden.py`.

#![allow(clippy::unwrap_used)] // Helpers of tests are outside of what the lint excepts.

use std::time::{Duration, SystemTime};

use forebay_tokens::{ChatPrompt, CivilTime, Special, TextModel, TokenType, Tokenizer, Vocab};
use serde_json::Value as Json;

const TINY: &str = include_str!("fixtures/tiny.json");
const CONFIG: &str = r#"{"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}}"#;

fn json(text: &str) -> Json {
    serde_json::from_str(text).unwrap()
}

/// The fixture as a GGUF would carry it.
fn vocab(pre: &str) -> Vocab {
    let spec = json(TINY);
    let mut tokens: Vec<(u64, String, TokenType)> = spec["model"]["vocab"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(text, id)| (id.as_u64().unwrap(), text.clone(), TokenType::Normal))
        .collect();
    for added in spec["added_tokens"].as_array().unwrap() {
        let id = added["id"].as_u64().unwrap();
        let kind = if added["special"] == true { TokenType::Control } else { TokenType::UserDefined };
        tokens.retain(|token| token.0 != id);
        tokens.push((id, added["content"].as_str().unwrap().to_owned(), kind));
    }
    tokens.sort_by_key(|token| token.0);
    let merges = spec["model"]["merges"].as_array().unwrap().iter();
    Vocab {
        model: "gpt2".into(),
        pre: pre.into(),
        token_types: tokens.iter().map(|token| token.2).collect(),
        tokens: tokens.into_iter().map(|token| token.1).collect(),
        merges: merges.map(|m| format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap())).collect(),
        bos: Some(0),
        eos: Some(2),
        add_bos: true,
        ..Vocab::default()
    }
}

fn ids(case: &Json, field: &str) -> Vec<u32> {
    serde_json::from_value(case[field].clone()).unwrap()
}

#[test]
fn ids_and_texts_equal_the_python_package() {
    let golden = json(include_str!("fixtures/tokenizer_golden.json"));
    for set in golden.as_array().unwrap() {
        let pre = set["pre"].as_str().unwrap();
        let tokenizer = Tokenizer::new(vocab(pre)).unwrap();
        for case in set["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let parsed = ids(case, "parsed");
            assert_eq!(tokenizer.encode(text, Special::PARSE).unwrap(), parsed, "{pre}: {text:?}");
            assert_eq!(tokenizer.encode(text, Special::NONE).unwrap(), ids(case, "plain"), "{pre}: {text:?}");
            let with_bos = tokenizer.encode(text, Special::ALL).unwrap();
            assert_eq!((with_bos[0], &with_bos[1..]), (0, &parsed[..]), "{pre}: {text:?}");
            assert_eq!(tokenizer.decode(&parsed, true), case["decoded"].as_str().unwrap(), "{pre}: {text:?}");
            assert_eq!(tokenizer.decode(&parsed, false), text, "{pre}");
        }
    }
}

#[test]
fn tokenizer_json_equals_the_python_package() {
    let golden = json(include_str!("fixtures/tokenizer_golden.json"));
    let set = golden.as_array().unwrap().iter().find(|set| set["pre"] == "gpt-2").unwrap();
    let tokenizer = Tokenizer::from_json(TINY.as_bytes(), Some(CONFIG.as_bytes()), None).unwrap();
    for case in set["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let parsed = ids(case, "parsed");
        assert_eq!(tokenizer.encode(text, Special::PARSE).unwrap(), parsed, "{text:?}");
        assert_eq!(tokenizer.encode(text, Special::NONE).unwrap(), ids(case, "plain"), "{text:?}");
        // The post-processor of the file puts token 0 first.
        assert_eq!(tokenizer.encode(text, Special::ALL).unwrap(), [&[0], &parsed[..]].concat(), "{text:?}");
        assert_eq!(tokenizer.decode(&parsed, true), case["decoded"].as_str().unwrap(), "{text:?}");
    }
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(0), Some(2)));
    assert_eq!(tokenizer.eog(), [0, 2, 3]);
    let plain = Tokenizer::new(vocab("gpt-2")).unwrap();
    for id in 0..u32::try_from(plain.vocab_size()).unwrap() {
        assert_eq!(plain.token_bytes(id), tokenizer.token_bytes(id), "{id}");
    }
}

#[test]
fn sentencepiece_vocabularies_equal_sentencepiece() {
    let golden = json(include_str!("fixtures/spm_golden.json"));
    for model in golden.as_array().unwrap() {
        let field = |name: &str| model[name].clone();
        let types: Vec<i64> = serde_json::from_value(field("types")).unwrap();
        let tokenizer = Tokenizer::new(Vocab {
            model: "llama".into(),
            tokens: serde_json::from_value(field("tokens")).unwrap(),
            scores: serde_json::from_value(field("scores")).unwrap(),
            token_types: types.into_iter().map(TokenType::from_gguf).collect(),
            add_space_prefix: field("add_space_prefix") == true,
            unk: Some(0),
            ..Vocab::default()
        })
        .unwrap();
        for case in model["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids = ids(case, "ids");
            let what = format!("{}: {text:?}", model["name"]);
            assert_eq!(tokenizer.encode(text, Special::NONE).unwrap(), ids, "{what}");
            assert_eq!(tokenizer.decode(&ids, true), case["decoded"].as_str().unwrap(), "{what}");
        }
    }
}

#[test]
fn prompts_equal_jinja2() {
    // 2024-07-26 15:04:05
    let now = CivilTime::from(SystemTime::UNIX_EPOCH + Duration::from_secs(1_722_006_245));
    let golden = json(include_str!("fixtures/template_golden.json"));
    for case in golden.as_array().unwrap() {
        let source = match case["template"].as_str().unwrap() {
            "features" => include_str!("fixtures/templates/features.jinja"),
            "llama3" => include_str!("fixtures/templates/llama3.jinja"),
            "qwen25" => include_str!("fixtures/templates/qwen25.jinja"),
            "smollm2" => include_str!("fixtures/templates/smollm2.jinja"),
            other => panic!("no template {other}"),
        };
        let mut vocab = vocab("gpt-2");
        // The golden prompts say `<s>` and `</s>`.
        vocab.tokens[0] = "<s>".into();
        vocab.tokens[2] = "</s>".into();
        let model = TextModel::new(Tokenizer::new(vocab).unwrap(), Some(source)).unwrap();

        let mut kwargs = case["prompt"].as_object().unwrap().clone();
        let messages = kwargs.remove("messages").unwrap();
        let tools = kwargs.remove("tools");
        let prompt = ChatPrompt {
            tools: tools.as_ref().map(|tools| tools.as_array().unwrap().as_slice()),
            add_generation_prompt: kwargs.remove("add_generation_prompt").is_none_or(|yes| yes == true),
            kwargs: Some(&kwargs),
            now,
            ..ChatPrompt::new(messages.as_array().unwrap())
        };
        let what = format!("{} of {}", case["conversation"], case["template"]);
        // These would leave tools, calls and answers out, or write them in ways that no model has seen.
        let about_tools = |message: &Json| message["role"] == "tool" || message["tool_calls"].is_array();
        if !model.template().shows_tools()
            && (tools.is_some() || messages.as_array().unwrap().iter().any(about_tools))
        {
            let text = model.template().render(&prompt).unwrap();
            assert!(text.contains("tool_call>") || text.contains("<tool_response>"), "{what}: {text}");
            continue;
        }
        match (model.template().render(&prompt), case["text"].as_str(), case["error"].as_str()) {
            (Ok(text), Some(expect), _) => {
                assert_eq!(text, expect, "{what}");
                // None of these conversations contains a control token, so guarding must not change an id.
                let rendered = model.tokenizer().encode(&text, Special::PARSE).unwrap();
                assert_eq!(model.encode_chat(&prompt).unwrap(), rendered, "{what}");
            }
            (Err(error), _, Some(expect)) => assert!(error.to_string().contains(expect), "{what}: {error}"),
            (got, _, _) => panic!("{what}: {got:?}"),
        }
    }
}
