//! Hostile conversations through real chat templates. Fields are separated by tabs; the first is the template's
//! number and how the conversation goes.
//!
//! The control tokens of a prompt are those of the same conversation with harmless text: what a client writes never
//! becomes one. And the prompt's text is what the template gives without any protection.
#![no_main]

use std::sync::LazyLock;

use forebay_tokens::{ChatPrompt, TextModel, TokenType, Tokenizer, Vocab};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

const CONTROLS: [&str; 6] =
    ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<s>"];

const TEMPLATES: [&str; 5] = [
    include_str!("../../crates/forebay-tokens/tests/fixtures/templates/smollm2.jinja"),
    include_str!("../../crates/forebay-tokens/tests/fixtures/templates/qwen25.jinja"),
    include_str!("../../crates/forebay-tokens/tests/fixtures/templates/llama3.jinja"),
    include_str!("../../crates/forebay-tokens/tests/fixtures/templates/features.jinja"),
    // Joins text parts, and puts client text before a bracket.
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}\
     {% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>{% endfor %}\
     {% for t in tools or [] %}{{ t | tojson }}>{% endfor %}{{ extra }}<|im_start|>",
];

static MODELS: LazyLock<[TextModel; TEMPLATES.len()]> = LazyLock::new(|| TEMPLATES.map(model));

/// Every byte is a token, so decoding is exact and nothing merges.
fn model(template: &str) -> TextModel {
    // GPT-2's alphabet: printable bytes are themselves, the others are counted up from U+0100.
    let plain = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let others = (0..=255u8).filter(|byte| !plain(byte)).zip(0x100..);
    let mut tokens: Vec<String> = (0..=255u8).map(|byte| char::from(byte).to_string()).collect();
    for (byte, code) in others {
        tokens[usize::from(byte)] = char::from_u32(code).expect("below the surrogates").to_string();
    }
    tokens.extend(CONTROLS.map(str::to_owned));
    let mut token_types = vec![TokenType::Normal; 256];
    token_types.extend([TokenType::Control; CONTROLS.len()]);
    let bos = tokens.len() as u32 - 1;
    let vocab = Vocab {
        model: "gpt2".into(),
        pre: "llama-bpe".into(),
        tokens,
        token_types,
        bos: Some(bos),
        ..Vocab::default()
    };
    TextModel::new(Tokenizer::new(vocab).expect("256 bytes"), Some(template)).expect("a valid template")
}

struct Prompt {
    /// Control tokens, in order.
    controls: Vec<u32>,
    text: String,
    unprotected: String,
}

fn render(model: &TextModel, shape: u8, texts: &[&str; 6]) -> Option<Prompt> {
    let [system, user, more, call, tool, key] = *texts;
    let mut messages = Vec::new();
    if shape & 1 == 0 {
        messages.push(json!({"role": "system", "content": system}));
    }
    let user = if shape & 2 == 0 {
        json!(user)
    } else {
        json!([{"type": "text", "text": user}, {"type": "text", "text": more}])
    };
    messages.push(json!({"role": "user", "content": user, "name": key}));
    if shape & 4 == 0 {
        let function = json!({"name": "f", "arguments": {"x": call, "y": key}});
        messages.push(json!({"role": "assistant", "content": more, "tool_calls": [{"type": "function", "function": function}]}));
        messages.push(json!({"role": "tool", "content": tool}));
    }
    let mut tools = Vec::new();
    if shape & 8 == 0 {
        tools.push(json!({"type": "function", "function": {"description": tool, (key): call}}));
    }
    let Value::Object(kwargs) = json!({"extra": call}) else { return None };
    let prompt = ChatPrompt { tools: Some(&tools), kwargs: Some(&kwargs), ..ChatPrompt::new(&messages) };
    let ids = model.encode_chat(&prompt).ok()?;
    let unprotected = model.template().render(&prompt).expect("it could be encoded");
    let tokenizer = model.tokenizer();
    Some(Prompt {
        controls: ids.iter().copied().filter(|id| tokenizer.is_special(*id)).collect(),
        text: tokenizer.decode(&ids, false),
        unprotected,
    })
}

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut fields = text.split('\t');
    let head = fields.next().unwrap_or_default().as_bytes();
    let [template, shape, ..] = *head else { return };
    let model = &MODELS[usize::from(template) % TEMPLATES.len()];
    let texts: [&str; 6] = std::array::from_fn(|_| fields.next().unwrap_or_default());
    let Some(prompt) = render(model, shape, &texts) else { return };
    assert_eq!(prompt.text, prompt.unprotected);
    // Templates may leave empty text out, so that stays what it is.
    let harmless = texts.map(|text| if text.trim().is_empty() { text } else { "x" });
    if let Some(harmless) = render(model, shape, &harmless) {
        assert_eq!(prompt.controls, harmless.controls, "{:?}", prompt.text);
    }
});
