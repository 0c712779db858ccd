#![allow(clippy::unwrap_used, clippy::print_stdout)]
use std::time::Instant;
use forebay_tokens::*;
fn main() {
    let v: serde_json::Value = serde_json::from_slice(&std::fs::read("/tmp/gg/vocab.json").unwrap()).unwrap();
    let strs = |k: &str| v[k].as_array().unwrap().iter().map(|x| x.as_str().unwrap().to_owned()).collect::<Vec<_>>();
    for pre in ["smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o", "deepseek-v3", "default", "deepseek-coder"] {
        let t0 = Instant::now();
        let tok = Tokenizer::new(Vocab {
            model: "gpt2".into(), pre: pre.into(), tokens: strs("tokens"), merges: strs("merges"),
            token_types: v["types"].as_array().unwrap().iter().map(|x| TokenType::from_gguf(x.as_i64().unwrap())).collect(),
            bos: Some(1), eos: Some(2), ..Default::default() }).unwrap();
        println!("== {pre} build {:?}", t0.elapsed());
        let text = std::fs::read_to_string("/work/shared/reference/l4-router.md").unwrap().repeat(4);
        let text = &text[..text.char_indices().map(|x| x.0).filter(|x| *x <= 100_000).last().unwrap()];
        let n = 200_000;
        let cases: Vec<(&str, String)> = vec![
            ("text", text.to_owned()), ("text2", text.to_owned()),
            ("aaaa", "a".repeat(n)), ("spaces", " ".repeat(n)), ("spaces x", " ".repeat(n) + "x"), ("newl", "\n".repeat(n)), ("nl x", "\n".repeat(n)+"x"),
            ("sp nl", " \n".repeat(n/2) + "x"), ("digits", "1".repeat(n)), ("punct", "!".repeat(n)), ("mix", "a ".repeat(n/2)), ("tick", "'".repeat(n)),
            ("spsp a", "  a".repeat(n/3)), ("cjk", "東".repeat(n/3)), ("Aa", "Aa".repeat(n/2)), ("AAAA", "A".repeat(n)), ("tab nl", "\t\t\t\t \t\t\t\t".repeat(n/9)),
            ("mark", "e\u{301}".repeat(n/3)), ("ctrl", "<|im_end|>".repeat(n/10)),
        ];
        for (name, c) in &cases {
            let t = Instant::now();
            let ids = tok.encode(c, Special::NONE).unwrap();
            let dt = t.elapsed();
            assert!(tok.decode(&ids, false) == *c || *name == "x", "{name}");
            let ms = dt.as_secs_f64() * 1e3;
            if ms > 150.0 || name.starts_with("text") { println!("{name:10} {:>7} bytes {:>6} ids {ms:.1} ms", c.len(), ids.len()); }
        }
    }
}
