//! Cases per style, and that pieces don't matter.

use proptest::prelude::*;

use super::*;

fn add(all: &mut Output, new: Output) {
    all.content.push_str(&new.content);
    all.reasoning.push_str(&new.reasoning);
    all.calls.extend(new.calls);
}

fn parse<'t>(
    style: Option<CallStyle>,
    think: Option<ThinkStyle>,
    pieces: impl IntoIterator<Item = &'t str>,
) -> Output {
    let mut parser = Parser::new(style, think);
    let mut all = Output::default();
    for piece in pieces {
        add(&mut all, parser.push(piece));
    }
    add(&mut all, parser.finish());
    all
}

/// `expect`: content, reasoning, and `name arguments` per call.
#[track_caller]
fn check(style: CallStyle, think: Option<ThinkStyle>, text: &str, expect: (&str, &str, &[&str])) {
    let got = parse(Some(style), think, [text]);
    let calls: Vec<_> = got.calls.iter().map(|call| format!("{} {}", call.name, call.arguments)).collect();
    assert_eq!(
        (&*got.content, &*got.reasoning, &*calls),
        (expect.0, expect.1, &*expect.2.iter().map(|c| (*c).to_owned()).collect::<Vec<_>>())
    );
}

#[test]
fn hermes() {
    let check = |text: &str, content: &str, calls: &[&str]| {
        check(CallStyle::Hermes, None, text, (content, "", calls));
    };
    let call = r#"<tool_call>{"name":"f","arguments":{"a": {"b":1}}}</tool_call>"#;
    check("just text", "just text", &[]);
    check(call, "", &[r#"f {"a": {"b":1}}"#]);
    check(&format!("\n{call}\n{call}\n"), "", &[r#"f {"a": {"b":1}}"#; 2]);
    check(&format!("Let me see.\n{call} done"), "Let me see.\n done", &[r#"f {"a": {"b":1}}"#]);
    check(&format!("<{call}"), "<", &[r#"f {"a": {"b":1}}"#]);
    // An end tag in a string is part of the string.
    check(
        r#"<tool_call>{"name":"f","arguments":{"a":"\"</tool_call>"}}</tool_call>"#,
        "",
        &[r#"f {"a":"\"</tool_call>"}"#],
    );
    // The end tag may be missing, in part too.
    check(r#"<tool_call>{"name":"f","arguments":{}}"#, "", &["f {}"]);
    check(r#"<tool_call>{"name":"f","arguments":{}}</tool_"#, "", &["f {}"]);
    // No calls.
    for text in [
        "<tool_call>",
        "<tool_",
        " ",
        "<tool_call>no</tool_call> more",
        r#"<tool_call>{"name":"f","arguments":{"a":"#,
        r#"<tool_call>{"name":"f"}</tool_call>"#,
        r#"<tool_call>{"name":"","arguments":{}}</tool_call>"#,
        r#"<tool_call>{"name":"f","arguments":"{}"}</tool_call>"#,
        r#"<tool_call>{"name":"f","arguments":{}}}</tool_call>"#,
    ] {
        check(text, text, &[]);
    }
    // What is no call doesn't hide the next one.
    check(
        r#"<tool_call>{</tool_call><tool_call>{"name":"f","arguments":{}}</tool_call>"#,
        "<tool_call>{</tool_call>",
        &["f {}"],
    );
}

#[test]
fn llama3_json() {
    let check = |text: &str, content: &str, calls: &[&str]| {
        check(CallStyle::Llama3Json, None, text, (content, "", calls));
    };
    check(r#" {"name":"f","parameters":{"a":1}} "#, "", &[r#"f {"a":1}"#]);
    check(
        r#"<|python_tag|>{"name":"f","parameters":{}}; {"name":"g","arguments":{}}"#,
        "",
        &["f {}", "g {}"],
    );
    for text in [
        "text",
        "<|python_tag|>print(1)",
        r#"{"answer":42}"#,
        r#"{"name":"f","parameters":{}};"#,
        r#"{"name":"f","parameters":{}} and text"#,
        r#"text {"name":"f","parameters":{}}"#,
        "{",
    ] {
        check(text, text, &[]);
    }
}

#[test]
fn json() {
    let check = |text: &str, content: &str, calls: &[&str]| {
        check(CallStyle::Json, None, text, (content, "", calls));
    };
    check(r#"{"name":"f","arguments":{"a":"}"}}"#, "", &[r#"f {"a":"}"}"#]);
    check(r#"[{"name":"f","arguments":{}}, {"name":"g","parameters":{}}]"#, "", &["f {}", "g {}"]);
    for text in ["[]", "[1]", r#"[{"name":"f","arguments":{}}, 1]"#, "null"] {
        check(text, text, &[]);
    }
}

#[test]
fn reasoning() {
    use ThinkStyle::{Open, Tagged};
    let call = r#"<tool_call>{"name":"f","arguments":{}}</tool_call>"#;
    let check = |think, text: &str, expect: (&str, &str, &[&str])| {
        check(CallStyle::Hermes, Some(think), text, expect)
    };
    check(Tagged, "<think>hm\n</think>\n\nyes", ("\n\nyes", "hm\n", &[]));
    check(Open, "hm</think>yes", ("yes", "hm", &[]));
    check(Open, "\n<think>hm</think>yes", ("yes", "hm", &[]));
    check(Open, "never ends </thin", ("", "never ends </thin", &[]));
    check(Tagged, "no <think>hm</think>", ("no <think>hm</think>", "", &[]));
    check(Tagged, "<thing", ("<thing", "", &[]));
    check(Tagged, &format!("<think>{call}</think>\n{call}"), ("", call, &["f {}"]));
}

#[test]
fn without_styles_all_is_content() {
    let text = r#"<think>a</think> <tool_call>{"name":"f","arguments":{}}</tool_call>"#;
    assert_eq!(parse(None, None, [text]), Output { content: text.into(), ..Output::default() });
}

#[test]
fn a_call_is_given_out_at_its_end_tag_and_text_at_once() {
    let mut parser = Parser::new(Some(CallStyle::Hermes), None);
    assert_eq!(parser.push("ab<tool").content, "ab");
    assert!(parser.push(r#"_call>{"name":"f","arguments":{}}</tool_call"#).is_empty());
    assert!(!parser.called());
    assert_eq!(parser.push(">").calls.len(), 1);
    assert!(parser.called());
}

#[test]
fn what_is_held_is_bounded() {
    for (style, begin) in
        [(CallStyle::Hermes, "<tool_call>"), (CallStyle::Json, "{"), (CallStyle::Llama3Json, "{")]
    {
        let mut parser = Parser::new(Some(style), None);
        let mut all = parser.push(begin);
        let piece = "é".repeat(1000);
        let mut pushed = begin.len();
        while pushed <= HELD_BYTES_MAX {
            add(&mut all, parser.push(&piece));
            pushed += piece.len();
        }
        assert_eq!(all.content.len(), pushed);
    }
}

fn fragments() -> impl Strategy<Value = String> {
    let fragment = prop::sample::select(vec![
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<|python_tag|>",
        "<",
        "</",
        "tool_call",
        " ",
        "\n",
        ";",
        "{",
        "}",
        "[",
        "]",
        ",",
        "\"",
        "\\",
        "é",
        "x",
        r#"{"name":"f","arguments":{"a":"ü"}}"#,
        r#"{"name":"g","parameters":{}}"#,
        r#"{"name":"#,
    ]);
    prop::collection::vec(fragment, 0..12).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn pieces_do_not_matter(
        text in fragments(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        style in prop::sample::select(vec![None, Some(CallStyle::Hermes), Some(CallStyle::Llama3Json), Some(CallStyle::Json)]),
        think in prop::sample::select(vec![None, Some(ThinkStyle::Tagged), Some(ThinkStyle::Open)]),
    ) {
        let chars: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| chars[cut.index(chars.len())]).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&str> = cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]).collect();
        let whole = parse(style, think, [&*text]);
        prop_assert_eq!(&parse(style, think, pieces), &whole);
        if whole.calls.is_empty() && think.is_none() {
            prop_assert_eq!(&whole.content, &text);
        }
    }
}
