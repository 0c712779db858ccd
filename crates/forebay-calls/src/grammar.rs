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
    /// Held to the schema also where the model itself decides to call.
    pub strict: bool,
}

impl Function {
    /// With any object as arguments.
    fn loose(&self) -> Self {
        let any = Map::from_iter([("additionalProperties".to_owned(), true.into())]);
        Self { parameters: Some(any), ..self.clone() }
    }
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
        let (start, call) = match self {
            Self::Hermes => {
                (if many { "call (\"\\n\" call)*" } else { "call" }, tagged(&tag(&control, CALL), &control))
            }
            Self::Llama3Json => (if many { "call (\"; \" call)*" } else { "call" }, "object".to_owned()),
            Self::Json => {
                let start = if many { "call | \"[\" call (\", \" call)* \"]\"" } else { "call" };
                (start, "object".to_owned())
            }
        };
        format!("start: {start}\ncall: {call}\n{}", self.objects(functions))
    }

    /// A grammar of any text, at whose end may be calls as in [`grammar`](Self::grammar): those of strict functions fit
    /// their schemas. `None` where no tag tells a call from a text that only looks like one.
    pub fn grammar_behind_text(
        self,
        functions: &[Function],
        many: bool,
        control: impl Fn(&'static str) -> Option<u32>,
    ) -> Option<String> {
        if self != Self::Hermes {
            return None;
        }
        let more = if many { " (\"\\n\" call)*" } else { "" };
        let call = tagged(&tag(&control, CALL), &control);
        let begin = match control(CALL) {
            // No text spells it.
            Some(_) => "TEXT? call".to_owned(),
            // Up to the first tag. Lazy, so that from there on it is no longer text.
            None => "first".to_owned(),
        };
        let first = match control(CALL) {
            Some(_) => String::new(),
            None => {
                let upto = format!("upto[lazy]: /(.|\\n)*{CALL}/\n");
                format!("first: {}\n{upto}", tagged("upto", &control))
            }
        };
        let functions: Vec<Function> =
            functions.iter().map(|f| if f.strict { f.clone() } else { f.loose() }).collect();
        let objects = self.objects(&functions);
        Some(format!("start: TEXT? | {begin}{more}\nTEXT: /(.|\\n)+/\n{first}call: {call}\n{objects}"))
    }

    /// The rule `object`: a call of one of these functions.
    fn objects(self, functions: &[Function]) -> String {
        let key = if self == Self::Llama3Json { "parameters" } else { "arguments" };
        let names: Vec<String> = (0..functions.len()).map(|n| format!("f{n}")).collect();
        let mut grammar = format!("object: {}\n", names.join(" | "));
        for (rule, function) in names.iter().zip(functions) {
            let name = json!(function.name);
            let begin = literal(&format!("{{\"name\": {name}, \"{key}\": "));
            let schema = arguments(function.parameters.as_ref());
            grammar.push_str(&format!("{rule}: {begin} {rule}a \"}}\"\n{rule}a: %json {schema}\n"));
        }
        grammar
    }
}

fn tag(control: &impl Fn(&'static str) -> Option<u32>, tag: &'static str) -> String {
    control(tag).map_or_else(|| literal(tag), |id| format!("<[{id}]>"))
}

/// A call behind what begins it.
fn tagged(begin: &str, control: &impl Fn(&'static str) -> Option<u32>) -> String {
    format!("{begin} \"\\n\" object \"\\n\" {}", tag(control, CALL_END))
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
            Function { name: "f".into(), parameters: parameters.as_object().cloned(), strict: true },
            Function { name: "g".into(), parameters: None, strict: false },
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

    #[test]
    fn grammars_behind_text() {
        let functions = [
            Function { name: "f".into(), parameters: None, strict: true },
            Function { name: "g".into(), parameters: None, strict: false },
        ];
        let lines = |many, id| {
            let grammar = CallStyle::Hermes.grammar_behind_text(&functions, many, |_| id).unwrap_or_default();
            grammar.lines().map(str::to_owned).collect::<Vec<_>>()
        };
        let plain = lines(true, None);
        let expect = [
            r#"start: TEXT? | first ("\n" call)*"#,
            r#"TEXT: /(.|\n)+/"#,
            r#"first: upto "\n" object "\n" "</tool_call>""#,
            r#"upto[lazy]: /(.|\n)*<tool_call>/"#,
            r#"call: "<tool_call>" "\n" object "\n" "</tool_call>""#,
            "object: f0 | f1",
        ];
        assert_eq!(plain[..6], expect);
        assert!(plain[7].contains(r#""additionalProperties":false"#), "{}", plain[7]);
        assert!(plain[9].contains(r#""additionalProperties":true"#), "{}", plain[9]);
        let expect =
            ["start: TEXT? | TEXT? call", r#"TEXT: /(.|\n)+/"#, r#"call: <[7]> "\n" object "\n" <[7]>"#];
        assert_eq!(lines(false, Some(7))[..3], expect);
        for style in [CallStyle::Llama3Json, CallStyle::Json] {
            assert_eq!(style.grammar_behind_text(&functions, true, |_| None), None);
        }
    }
}
