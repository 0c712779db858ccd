//! Grammars in EBNF to Lark: what is read here is nothing that llguidance's own parser refuses.
#![no_main]

use std::sync::LazyLock;

use forebay_grammar::{Grammars, ebnf_to_lark};
use forebay_tokens::{TokenType, Tokenizer, Vocab};
use libfuzzer_sys::fuzz_target;

static GRAMMARS: LazyLock<Grammars> = LazyLock::new(|| {
    let vocab = Vocab {
        model: "gpt2".into(),
        pre: "default".into(),
        tokens: ["a", "b", "<end>"].map(str::to_owned).to_vec(),
        token_types: vec![TokenType::Normal, TokenType::Normal, TokenType::Control],
        eos: Some(2),
        ..Vocab::default()
    };
    let tokenizer = Tokenizer::new(vocab).expect("three tokens");
    Grammars::new(&tokenizer).expect("has an end")
});

fuzz_target!(|text: &str| {
    let Ok(lark) = ebnf_to_lark(text) else { return };
    assert!(lark.starts_with("start: "));
    if let Err(error) = GRAMMARS.compile_lark(lark) {
        // With its place: a mistake of the notation, or a limit. A grammar without any text has none.
        let told = error.to_string();
        assert!(told.contains("limit") || !told.contains(": at "), "{told}");
    }
});
