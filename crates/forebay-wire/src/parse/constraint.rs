//! What the output has to match: OpenAI's `response_format` and vLLM's `structured_outputs`.

use serde_json::Value;

use super::ParseError;
use super::field::{Fields, Kind};
use crate::{Constraint, Need};

/// Bytes of a regular expression or a grammar.
const TEXT_BYTES_MAX: usize = 64 * 1024;
/// Bytes of a JSON schema. The compiler has limits of its own on what it may cost.
const SCHEMA_BYTES_MAX: usize = 256 * 1024;
const CHOICES_MAX: usize = 1024;

/// Fields that vLLM once had and now ignores. An answer that ignores them is not what was asked for.
const REMOVED: [&str; 6] = [
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
];
const REPLACED: &str = "newer versions of vLLM don't read it either; write 'structured_outputs'";
const TAGS: &str = "structural tags can't be followed; ask for a JSON schema or a grammar";

pub(super) fn parse(fields: &Fields<'_>, needs: &mut Vec<Need>) -> Result<Option<Constraint>, ParseError> {
    for name in REMOVED {
        needs.extend(fields.need(name, &[], REPLACED));
    }
    let format = response_format(fields, needs)?;
    let structured = structured_outputs(fields, needs)?;
    if format.is_some() && structured.is_some() {
        let what = "only one of 'response_format' and 'structured_outputs' can be given";
        return Err(ParseError::value("structured_outputs", what));
    }
    Ok(format.or(structured))
}

fn response_format(fields: &Fields<'_>, needs: &mut Vec<Need>) -> Result<Option<Constraint>, ParseError> {
    let Some(format) = fields.inner("response_format", "response_format.")? else { return Ok(None) };
    match format.string("type")?.as_deref() {
        None => Err(ParseError::Missing { param: "response_format.type".into() }),
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Constraint::JsonObject)),
        Some("json_schema") => {
            let inner = format.inner("json_schema", "response_format.json_schema.")?;
            let inner = inner.ok_or(ParseError::Missing { param: "response_format.json_schema".into() })?;
            // OpenAI wants a name, and uses it for nothing that reaches the client.
            inner
                .string("name")?
                .ok_or(ParseError::Missing { param: "response_format.json_schema.name".into() })?;
            inner.boolean("strict")?;
            let raw = inner.raw("schema").filter(|raw| *raw != "null");
            // Without a schema OpenAI takes any object.
            raw.map_or(Ok(Constraint::JsonObject), |raw| schema("response_format.json_schema.schema", raw))
                .map(Some)
        }
        Some("structural_tag") => {
            needs.push(Need { param: "response_format".into(), what: TAGS });
            Ok(None)
        }
        Some(_) => Err(ParseError::value(
            "response_format.type",
            "Supported values are: 'text', 'json_object' and 'json_schema'",
        )),
    }
}

fn structured_outputs(fields: &Fields<'_>, needs: &mut Vec<Need>) -> Result<Option<Constraint>, ParseError> {
    let Some(options) = fields.inner("structured_outputs", "structured_outputs.")? else { return Ok(None) };
    let mut found = Vec::new();
    if let Some(raw) = options.raw("json").filter(|raw| *raw != "null") {
        // A schema, or a string that holds one.
        let text = if raw.starts_with('"') { options.string("json")? } else { None };
        found.push(schema("structured_outputs.json", text.as_deref().unwrap_or(raw))?);
    }
    if options.boolean("json_object")? == Some(true) {
        found.push(Constraint::JsonObject);
    }
    if let Some(regex) = text(&options, "regex")? {
        found.push(Constraint::Regex(regex));
    }
    if let Some(grammar) = text(&options, "grammar")? {
        found.push(Constraint::Grammar(grammar));
    }
    if let Some(choices) = choices(&options)? {
        found.push(Constraint::Choice(choices));
    }
    if options.kind("structural_tag").is_some() {
        needs.push(Need { param: "structured_outputs.structural_tag".into(), what: TAGS });
    }
    for (option, what) in [
        ("disable_any_whitespace", "write the schema's own 'x-guidance'"),
        ("disable_additional_properties", "set 'additionalProperties' to false in the schema"),
        ("whitespace_pattern", "write the schema's own 'x-guidance'"),
    ] {
        needs.extend(options.need(option, &["false"], what));
    }
    match found.len() {
        0 | 1 => Ok(found.pop()),
        n => Err(ParseError::value("structured_outputs", format!("expected one constraint, but got {n}"))),
    }
}

fn schema(param: &str, raw: &str) -> Result<Constraint, ParseError> {
    if raw.len() > SCHEMA_BYTES_MAX {
        return Err(ParseError::value(param, format!("longer than {SCHEMA_BYTES_MAX} bytes")));
    }
    let schema: Value = super::field::read(param, raw)?;
    match Kind::of_value(&schema) {
        Kind::Object => Ok(Constraint::JsonSchema(schema)),
        got => Err(ParseError::Type { param: param.into(), expected: "a JSON schema (an object)", got }),
    }
}

fn text(options: &Fields<'_>, name: &str) -> Result<Option<String>, ParseError> {
    let text = options.string(name)?;
    let at = || format!("structured_outputs.{name}");
    match &text {
        Some(text) if text.is_empty() => Err(ParseError::value(at(), "an empty string")),
        Some(text) if text.len() > TEXT_BYTES_MAX => {
            Err(ParseError::value(at(), format!("longer than {TEXT_BYTES_MAX} bytes")))
        }
        _ => Ok(text),
    }
}

fn choices(options: &Fields<'_>) -> Result<Option<Vec<String>>, ParseError> {
    const AT: &str = "structured_outputs.choice";
    let Some(items) = options.array("choice", CHOICES_MAX)? else { return Ok(None) };
    let one = |(i, raw): (usize, &serde_json::value::RawValue)| {
        let param = format!("{AT}[{i}]");
        match super::field::kind_of(raw) {
            Kind::String => super::field::read::<String>(&param, raw.get()),
            got => Err(ParseError::Type { param, expected: "a string", got }),
        }
    };
    let choices = items.into_iter().enumerate().map(one).collect::<Result<Vec<_>, _>>()?;
    if choices.is_empty() || choices.iter().any(String::is_empty) {
        return Err(ParseError::value(AT, "expected at least one choice, and none empty"));
    }
    if choices.iter().map(String::len).sum::<usize>() > TEXT_BYTES_MAX {
        return Err(ParseError::value(AT, format!("longer than {TEXT_BYTES_MAX} bytes in all")));
    }
    Ok(Some(choices))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::json;

    use super::*;
    use crate::Ask;

    fn parsed(fields: &Value) -> Result<Option<Constraint>, String> {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
        for (key, value) in fields.as_object().expect("fields") {
            body[key] = value.clone();
        }
        let body = Bytes::from(body.to_string());
        match crate::parse(&http::Method::POST, "/v1/chat/completions", None, &body, None) {
            Ok(Ask::Generate(call)) => Ok(call.constraint),
            Ok(_) => unreachable!("a chat is a generation"),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn constraints_of_both_dialects() {
        let schema = json!({"type": "object"});
        let check = |fields: Value, expect: Option<Constraint>| {
            assert_eq!(parsed(&fields), Ok(expect), "{fields}");
        };
        let format = |format: Value| json!({"response_format": format});
        let structured = |options: Value| json!({"structured_outputs": options});
        check(json!({}), None);
        check(format(json!(null)), None);
        check(format(json!({"type": "text"})), None);
        check(format(json!({"type": "json_object"})), Some(Constraint::JsonObject));
        let named =
            json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": true}});
        check(format(named), Some(Constraint::JsonSchema(schema.clone())));
        let bare = json!({"type": "json_schema", "json_schema": {"name": "n"}});
        check(format(bare), Some(Constraint::JsonObject));
        check(structured(json!({"json": schema})), Some(Constraint::JsonSchema(schema.clone())));
        check(structured(json!({"json": schema.to_string()})), Some(Constraint::JsonSchema(schema.clone())));
        check(structured(json!({"json_object": true})), Some(Constraint::JsonObject));
        check(structured(json!({"json_object": false})), None);
        check(structured(json!({"regex": "a+"})), Some(Constraint::Regex("a+".into())));
        check(
            structured(json!({"grammar": "start: \"a\""})),
            Some(Constraint::Grammar("start: \"a\"".into())),
        );
        let choices = Constraint::Choice(vec!["a".into(), "b".into()]);
        check(structured(json!({"choice": ["a", "b"], "regex": null})), Some(choices));
    }

    #[test]
    fn mistakes_name_their_field() {
        let check = |fields: Value, expect: &str| {
            let error = parsed(&fields).expect_err("is refused");
            assert!(error.contains(expect), "{fields}: {error}");
        };
        let format = |format: Value| json!({"response_format": format});
        let structured = |options: Value| json!({"structured_outputs": options});
        check(format(json!({})), "response_format.type");
        check(format(json!({"type": "xml"})), "response_format.type");
        check(format(json!({"type": "json_schema"})), "response_format.json_schema");
        check(format(json!({"type": "json_schema", "json_schema": {}})), "response_format.json_schema.name");
        let list = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": []}});
        check(format(list), "response_format.json_schema.schema");
        check(structured(json!("x")), "structured_outputs");
        check(structured(json!({"json": "{"})), "structured_outputs.json");
        check(structured(json!({"json": 7})), "structured_outputs.json");
        check(structured(json!({"regex": ""})), "structured_outputs.regex");
        check(structured(json!({"regex": "a".repeat(70_000)})), "structured_outputs.regex");
        check(structured(json!({"choice": []})), "structured_outputs.choice");
        check(structured(json!({"choice": ["a", ""]})), "structured_outputs.choice");
        check(structured(json!({"choice": ["a", 7]})), "structured_outputs.choice[1]");
        check(structured(json!({"regex": "a", "json_object": true})), "got 2");
        let both = json!({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}});
        check(both, "only one of");
    }
}
