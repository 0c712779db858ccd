//! Hostile and random files: bounded work, an answer, never a panic.

mod sample;

use std::time::Instant;

use forebay_config::{Diagnostics, FILE_BYTES_MAX, Source, load};
use proptest::prelude::*;
use sample::Sample;

fn try_load(text: impl Into<String>) -> Result<(), Diagnostics> {
    load::<Sample>(&Source::new("x", text)).map(|_| ())
}

fn refused(text: impl Into<String>, expect: &str) {
    let diagnostics = try_load(text).expect_err("accepted").to_string();
    assert!(diagnostics.contains(expect), "{diagnostics}");
}

#[test]
fn size_is_bounded() {
    refused("#".repeat(FILE_BYTES_MAX + 1), "the file is larger than 1024 KiB");
    assert!(try_load(format!("#{}", "x".repeat(FILE_BYTES_MAX - 1))).is_ok());
    refused(format!("a: [{}]", "1,".repeat(200_000)), "more than 100000 values");
}

#[test]
fn depth_is_bounded() {
    let nested = |depth: usize| format!("a: {}{}", "[".repeat(depth), "]".repeat(depth));
    refused(nested(63), "unknown key `a`");
    refused(nested(64), "nested deeper than 64 levels");
    refused("[".repeat(500_000), "nested deeper than 64 levels");
    refused("{a: ".repeat(200_000), "nested deeper than 64 levels");
    refused("- ".repeat(200_000), "nested deeper than 64 levels");
    refused("? ".repeat(200_000), "nested deeper than 64 levels");
    let indented: String = (0..700).map(|i| format!("{}a:\n", " ".repeat(i))).collect();
    refused(indented, "nested deeper than 64 levels");
    // Aliases count with their own depth.
    let aliased: String = (1..80).map(|i| format!("a{i}: &a{i} [*a{}]\n", i - 1)).collect();
    refused(format!("a0: &a0 []\n{aliased}"), "nested deeper than 64 levels");
}

#[test]
fn aliases_are_bounded() {
    let mut laughs = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n".to_owned();
    for i in 1..20 {
        let nine = vec![format!("*a{}", i - 1); 9].join(", ");
        laughs.push_str(&format!("a{i}: &a{i} [{nine}]\n"));
    }
    refused(laughs, "more than 100000 values");

    let text = "x".repeat(500_000);
    refused(format!("a: &a {text}\nb: [{}]", vec!["*a"; 1000].join(", ")), "too much text");
    refused(format!("a: &a {{? {text} : 1}}\nb: [{}]", vec!["*a"; 1000].join(", ")), "");
}

#[test]
fn merging_is_not_quadratic() {
    let keys: String = (0..20_000).map(|i| format!("k{i}: 1, ")).collect();
    let start = Instant::now();
    assert!(try_load(format!("a: &a {{{keys}}}\nb: {{<<: *a, x: 1}}\n")).is_err());
    // Quadratic would be 4e8 comparisons of text; a generous bound, since debug builds share machines.
    assert!(start.elapsed().as_secs() < 20);
}

/// Pieces that make YAML go wrong in interesting ways more often than random characters do.
fn piece() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => prop::sample::select(vec![
            "edge", "router", "gateway", "store", "proxy", "fleets", "model", "keys", "listen", "ports", "redis",
            "consumers", "backends", "provider", "openai", "null", "~", "on", "12", "-1", "1e9", ".nan", "env:A",
            "sk-x", "30s",
        ]).prop_map(str::to_owned),
        4 => prop::sample::select(vec![
            ": ", ":\n  ", "\n", "\n  ", "\n    ", "- ", "\n- ", ", ", "{", "}", "[", "]", "\"", "'", "|\n", ">-\n ",
            "&a ", "*a", "<<: ", "!!str ", "!x ", "? ", "# ", "---\n", "...\n", "%YAML 1.2\n", "\t", "\r\n", "\r",
            "\u{feff}", "\u{85}", "\\x",
        ]).prop_map(str::to_owned),
        1 => ".{0,3}",
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn never_panics(pieces in prop::collection::vec(piece(), 0..30)) {
        if let Err(diagnostics) = try_load(pieces.concat()) {
            prop_assert!(!diagnostics.is_empty());
            prop_assert!(diagnostics.has_errors());
            let shown = format!("{diagnostics}{}", diagnostics.to_json());
            prop_assert!(!shown.contains('\x1b'));
        }
    }

    #[test]
    fn never_panics_on_any_text(text in any::<String>()) {
        let _ = try_load(text);
    }
}
