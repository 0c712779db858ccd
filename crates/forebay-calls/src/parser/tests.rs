//! Cases per style, and that pieces don't matter.

use proptest::prelude::*;

use super::*;

fn parse<'t>(
    style: Option<CallStyle>,
    think: Option<ThinkStyle>,
    pieces: impl IntoIterator<Item = &'t str>,
) -> Output {
    let mut parser = Parser::new(style, think);
    let mut all = Output::default();
    for piece in pieces {
        all.add(parser.push(piece));
    }
    all.add(parser.finish());
    all
}

/// `expect`: content, reasoning, and `name arguments` per call.
#[track_caller]
fn check(style: CallStyle, think: Option<ThinkStyle>, text: &str, expect: (&str, &str, &[&str])) {
    let got = parse(Some(style), think, [text]);
    let calls: Vec<_> = got
        .calls
        .iter()
        .map(|call| format!("{} {}", call.name.as_deref().unwrap_or("?"), call.arguments))
        .collect();
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
        r#"<tool_call>{"name":"f","arguments":"#,
        r#"<tool_call>{"arguments":{"a":1},"name":"#,
        r#"<tool_call>{"name":"f"}</tool_call>"#,
        r#"<tool_call>{"name":"","arguments":{}}</tool_call>"#,
        r#"<tool_call>{"name":"f","arguments":"{}"}</tool_call>"#,
        r#"<tool_call>{"name":7,"arguments":{}}</tool_call>"#,
        r#"<tool_call>[{"name":"f","arguments":{}}]</tool_call>"#,
    ] {
        check(text, text, &[]);
    }
    // The arguments may come first, and other keys anywhere.
    check(
        r#"<tool_call>{"id":[1,"}"],"arguments":{"a":"{"},"x":-1.5e3,"name":"f"}</tool_call>"#,
        "",
        &[r#"f {"a":"{"}"#],
    );
    check(
        r#"<tool_call>{"name":"f","arguments":{},"parameters":{"b":1},"name":"g"}</tool_call>"#,
        "",
        &["f {}"],
    );
    // What is cut is a call with what there is of its arguments.
    check(r#"<tool_call>{"name":"f","arguments":{"a":"#, "", &[r#"f {"a":"#]);
    check(r#"<tool_call>{"name":"f","arguments":{"a":1}, "id"#, "", &[r#"f {"a":1}"#]);
    // A bracket too few or too many.
    check(r#"<tool_call>{"name":"f","arguments":{"a":1</tool_call>x"#, "x", &[r#"f {"a":1"#]);
    check(r#"<tool_call>{"name":"f","arguments":{"a":1}</tool_call>x"#, "x", &[r#"f {"a":1}"#]);
    check(r#"<tool_call>{"name":"f","arguments":{}}}</tool_call>"#, "}</tool_call>", &["f {}"]);
    check(
        r#"<tool_call>{"name":"f","arguments":{}}<tool_call>{"name":"g","arguments":{}} and so on"#,
        " and so on",
        &["f {}", "g {}"],
    );
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
    check(r#"{"name":"f","parameters":{}};{"parameters":{"a":1},"name":"g"}"#, "", &["f {}", r#"g {"a":1}"#]);
    // What follows is content.
    check(r#"{"name":"f","parameters":{}};"#, ";", &["f {}"]);
    check(r#"{"name":"f","parameters":{}} and text"#, " and text", &["f {}"]);
    check(r#"{"name":"f","parameters":{}}; {"answer":42}"#, r#"; {"answer":42}"#, &["f {}"]);
    for text in
        ["text", "<|python_tag|>print(1)", r#"{"answer":42}"#, r#"text {"name":"f","parameters":{}}"#, "{"]
    {
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
    check("{\"name\":\"f\",\"arguments\":{}}\n{\"name\":\"g\",\"arguments\":{}}", "", &["f {}", "g {}"]);
    check(r#"[{"name":"f","arguments":{}}] so"#, " so", &["f {}"]);
    check(r#"[{"name":"f","arguments":{}]"#, "", &["f {}"]);
    check(r#"[{"name":"f","arguments":{}}, 1]"#, ", 1]", &["f {}"]);
    for text in ["[]", "[1]", "null"] {
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

fn piece(index: u32, name: Option<&str>, arguments: &str) -> Piece {
    Piece { index, name: name.map(Into::into), arguments: arguments.into() }
}

#[test]
fn text_and_arguments_come_as_they_are_written() {
    let mut parser = Parser::new(Some(CallStyle::Hermes), None);
    assert_eq!(parser.push("ab<tool").content, "ab");
    assert!(parser.push(r#"_call>{"name":"f","arguments": "#).is_empty());
    assert!(!parser.called());
    assert_eq!(parser.push("{").calls, [piece(0, Some("f"), "{")]);
    assert!(parser.called());
    assert_eq!(parser.push(r#""a": "#).calls, [piece(0, None, r#""a": "#)]);
    assert_eq!(parser.push("1}").calls, [piece(0, None, "1}")]);
    assert!(parser.push("}</tool_call").is_empty());
    assert_eq!(
        parser.push(r#"><tool_call>{"arguments":{},"name":"g"}"#).calls,
        [piece(1, Some("g"), "{}")],
        "whole, as the name comes last"
    );
    assert!(parser.push("</tool_call>\n").is_empty());
    assert!(parser.finish().is_empty());
}

#[test]
fn it_is_known_where_reasoning_is() {
    let mut parser = Parser::new(None, Some(ThinkStyle::Tagged));
    let mut seen = Vec::new();
    for text in ["\n", "<think>", "a", "</think>", "b"] {
        parser.push(text);
        seen.push(parser.thinks());
    }
    assert_eq!(seen, [false, true, true, false, false]);
    assert!(Parser::new(None, Some(ThinkStyle::Open)).thinks());
}

#[test]
fn what_is_held_is_bounded() {
    for (style, begin) in [
        (CallStyle::Hermes, "<tool_call>{\""),
        (CallStyle::Json, "[{\"a\":{\""),
        (CallStyle::Llama3Json, "{\"name\":\""),
    ] {
        let mut parser = Parser::new(Some(style), None);
        let mut all = parser.push(begin);
        let piece = "é".repeat(1000);
        let mut pushed = begin.len();
        while pushed <= HELD_BYTES_MAX {
            all.add(parser.push(&piece));
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
        r#""arguments":"#,
        "]}",
        ",",
        "1",
    ]);
    prop::collection::vec(fragment, 0..12).prop_map(|parts| parts.concat())
}

/// The text, cut at some of its characters.
fn pieces<'t>(text: &'t str, cuts: &[prop::sample::Index]) -> Vec<&'t str> {
    let chars: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| chars[cut.index(chars.len())]).collect();
    cuts.extend([0, text.len()]);
    cuts.sort_unstable();
    cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]).collect()
}

/// A JSON object.
fn arguments() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        any::<i32>().prop_map(serde_json::Value::from),
        "[a-z{}\"\\\\<>/é\n]{0,6}".prop_map(serde_json::Value::from),
        Just("</tool_call>".into()),
        Just(serde_json::Value::Null),
    ];
    let value = leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(serde_json::Value::from),
            prop::collection::btree_map("[a-z\"]{0,4}", inner, 0..3).prop_map(serde_json::Value::from_iter),
        ]
    });
    prop::collection::btree_map("[a-z\"]{0,4}", value, 0..3)
        .prop_map(|fields| serde_json::Value::from_iter(fields).to_string())
}

proptest! {
    #[test]
    fn pieces_do_not_matter(
        text in fragments(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        style in prop::sample::select(vec![None, Some(CallStyle::Hermes), Some(CallStyle::Llama3Json), Some(CallStyle::Json)]),
        think in prop::sample::select(vec![None, Some(ThinkStyle::Tagged), Some(ThinkStyle::Open)]),
    ) {
        let whole = parse(style, think, [&*text]);
        prop_assert_eq!(&parse(style, think, pieces(&text, &cuts)), &whole);
        if whole.calls.is_empty() && think.is_none() {
            prop_assert_eq!(&whole.content, &text);
        }
        for (n, call) in whole.calls.iter().enumerate() {
            prop_assert_eq!(call.index as usize, n);
            prop_assert!(call.name.is_some());
            prop_assert!(text.contains(&call.arguments));
        }
    }

    /// What a grammar of the style lets a model write is read as the calls that it means.
    #[test]
    fn calls_are_read_as_they_are_meant(
        said in "[a-z .]{0,8}",
        calls in prop::collection::vec(("[a-z_]{1,8}", arguments()), 1..4),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        style in prop::sample::select(vec![CallStyle::Hermes, CallStyle::Llama3Json, CallStyle::Json]),
    ) {
        let key = if style == CallStyle::Llama3Json { "parameters" } else { "arguments" };
        let objects: Vec<String> = calls
            .iter()
            .map(|(name, arguments)| format!("{{\"name\": \"{name}\", \"{key}\": {arguments}}}"))
            .collect();
        let text = match style {
            CallStyle::Hermes => {
                let tagged = |object| format!("<tool_call>\n{object}\n</tool_call>");
                said.clone() + &objects.iter().map(tagged).collect::<Vec<_>>().join("\n")
            }
            CallStyle::Llama3Json => objects.join("; "),
            CallStyle::Json => format!("[{}]", objects.join(", ")),
        };
        let got = parse(Some(style), None, pieces(&text, &cuts));
        let expect: Vec<Piece> = calls
            .iter()
            .enumerate()
            .map(|(n, (name, arguments))| piece(n as u32, Some(name), arguments))
            .collect();
        prop_assert_eq!(got.calls, expect);
        let said = if style == CallStyle::Hermes && !said.trim().is_empty() { &*said } else { "" };
        prop_assert_eq!(got.content, said);
    }
}
