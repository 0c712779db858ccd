//! Model output into content, reasoning and calls: pieces don't matter, and what is no call is content.
#![no_main]

use forebay_calls::{CallStyle, Output, Parser, ThinkStyle};
use libfuzzer_sys::fuzz_target;

fn parse<'t>(
    style: Option<CallStyle>,
    think: Option<ThinkStyle>,
    pieces: impl IntoIterator<Item = &'t str>,
) -> Output {
    let mut parser = Parser::new(style, think);
    let mut all = Output::default();
    pieces.into_iter().for_each(|piece| all.add(parser.push(piece)));
    all.add(parser.finish());
    all
}

fuzz_target!(|input: (u8, u8, &str)| {
    let style = [None, Some(CallStyle::Hermes), Some(CallStyle::Llama3Json), Some(CallStyle::Json)]
        [input.0 as usize % 4];
    let think = [None, Some(ThinkStyle::Tagged), Some(ThinkStyle::Open)][input.1 as usize % 3];
    let text = input.2;
    let whole = parse(style, think, [text]);
    assert_eq!(parse(style, think, text.split_inclusive(|_| true)), whole);
    assert!(whole.calls.iter().all(|call| call.name.is_some() && text.contains(&call.arguments)));
    if whole.calls.is_empty() && think.is_none() {
        assert_eq!(whole.content, text);
    }
});
