//! The texts that are calls of given functions, as a grammar in Lark's notation with llguidance's `%json`.

use serde_json::{Map, Value, json};

use crate::CallStyle;
use crate::parser::{CALL, CALL_END};

/// A function that may be called.
#[derive(Debug, Clone, PartialEq)]
pub struct Function {
    pub name: String,
    /// A JSON schema of the arguments; none is no arguments.
    pub parameters: Option<Map<String, Value>>,
}

impl CallStyle {
    /// A grammar of exactly one call of one of these functions, or of one and more where `many`; `functions` is not empty.
    ///
    /// All of it is what [`Parser`](crate::Parser) reads in this style. `control` knows the id of a tag that is a control
    /// token of the vocabulary, which no text spells.
    pub fn grammar(
        self,
        functions: &[Function],
        many: bool,
        control: impl Fn(&'static str) -> Option<u32>,
    ) -> String {
        let tag = |tag| control(tag).map_or_else(|| literal(tag), |id| format!("<[{id}]>"));
        let (start, call, key) = match self {
            Self::Hermes => {
                let call = format!("{} \"\\n\" object \"\\n\" {}", tag(CALL), tag(CALL_END));
                (if many { "call (\"\\n\" call)*" } else { "call" }, call, "arguments")
            }
            Self::Llama3Json => {
                (if many { "call (\"; \" call)*" } else { "call" }, "object".to_owned(), "parameters")
            }
            Self::Json => {
                let start = if many { "call | \"[\" call (\", \" call)* \"]\"" } else { "call" };
                (start, "object".to_owned(), "arguments")
            }
        };
        let names: Vec<String> = (0..functions.len()).map(|n| format!("f{n}")).collect();
        let mut grammar = format!("start: {start}\ncall: {call}\nobject: {}\n", names.join(" | "));
        for (rule, function) in names.iter().zip(functions) {
            let name = json!(function.name);
            let begin = literal(&format!("{{\"name\": {name}, \"{key}\": "));
            let schema = arguments(function.parameters.as_ref());
            grammar.push_str(&format!("{rule}: {begin} {rule}a \"}}\"\n{rule}a: %json {schema}\n"));
        }
        grammar
    }
}

fn literal(text: &str) -> String {
    json!(text).to_string()
}

/// The schema of a function's arguments: an object, written as models have seen it, `{"a": 1, "b": 2}`.
fn arguments(parameters: Option<&Map<String, Value>>) -> Value {
    let mut schema = parameters.cloned().unwrap_or_default();
    schema.insert("type".to_owned(), "object".into());
    // Keys that the caller didn't declare are no use to it, and a small model doesn't stop to invent them. Where the schema
    // says more than its properties, it says what else may come.
    let plain = ["additionalProperties", "patternProperties", "anyOf", "oneOf", "allOf", "$ref"];
    if !plain.iter().any(|key| schema.contains_key(*key)) {
        schema.insert("additionalProperties".to_owned(), false.into());
    }
    schema.insert(
        "x-guidance".to_owned(),
        json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "}),
    );
    Value::Object(schema)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grammars() {
        let parameters = json!({"properties": {"a": {"type": "integer"}}});
        let functions = [
            Function { name: "f".into(), parameters: parameters.as_object().cloned() },
            Function { name: "g".into(), parameters: None },
        ];
        let grammar = CallStyle::Hermes.grammar(&functions, true, |tag| (tag == "</tool_call>").then_some(7));
        let style =
            r#""x-guidance":{"whitespace_flexible":false,"item_separator":", ","key_separator":": "}"#;
        let expect = [
            r#"start: call ("\n" call)*"#,
            r#"call: "<tool_call>" "\n" object "\n" <[7]>"#,
            "object: f0 | f1",
            r#"f0: "{\"name\": \"f\", \"arguments\": " f0a "}""#,
            &format!(
                r#"f0a: %json {{"properties":{{"a":{{"type":"integer"}}}},"type":"object","additionalProperties":false,{style}}}"#
            ),
            r#"f1: "{\"name\": \"g\", \"arguments\": " f1a "}""#,
            &format!(r#"f1a: %json {{"type":"object","additionalProperties":false,{style}}}"#),
        ];
        assert_eq!(grammar.lines().collect::<Vec<_>>(), expect);
        let starts = |style: CallStyle, many| {
            style.grammar(&functions, many, |_| None).lines().next().map(str::to_owned)
        };
        assert_eq!(starts(CallStyle::Llama3Json, true).as_deref(), Some(r#"start: call ("; " call)*"#));
        assert_eq!(
            starts(CallStyle::Json, true).as_deref(),
            Some(r#"start: call | "[" call (", " call)* "]""#)
        );
        assert_eq!(starts(CallStyle::Json, false).as_deref(), Some("start: call"));
    }
}
