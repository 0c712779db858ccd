//! Tools for templates that know of none: they, their calls and their answers are written into the messages, as Hermes and
//! Qwen models have seen them.
//!
//! Without it such a template leaves tools out of the prompt in silence, which is what Transformers and vLLM do: the model
//! is asked to use what it was never shown. llama.cpp writes them into the system message, too, but in a form of its own
//! (`{"tool_call": …}` or `{"response": …}`) to which it then holds all output, so that plain answers pay for it as well.
//! The form of Hermes is the one that most small models were trained on, and text beside calls stays plain text.

use serde_json::{Map, Value as Json, json};

use super::python::dumps;

/// What the messages have to say about tools, in words. Untouched where nothing is to be said.
///
/// `system`: whether the template takes a system message; else the tools are shown in the first message of the user.
pub(super) fn written_out(messages: &[Json], tools: &[Json], system: bool) -> Option<Vec<Json>> {
    let is_about_tools =
        |message: &Json| role(message) == "tool" || message.get("tool_calls").is_some_and(|c| !c.is_null());
    if tools.is_empty() && !messages.iter().any(is_about_tools) {
        return None;
    }
    let mut out: Vec<Json> = Vec::with_capacity(messages.len() + 1);
    let mut answers = false;
    for message in messages {
        let is_answer = role(message) == "tool";
        match message {
            Json::Object(fields) if is_answer => {
                let text = format!("<tool_response>\n{}\n</tool_response>", text(fields.get("content")));
                match out.last_mut().and_then(Json::as_object_mut) {
                    // Templates want user and assistant in turn.
                    Some(last) if answers => append(last, &text, "\n"),
                    _ => out.push(json!({"role": "user", "content": text})),
                }
            }
            Json::Object(fields) => out.push(Json::Object(with_calls(fields))),
            // Refused later, with its place.
            other => out.push(other.clone()),
        }
        answers = is_answer;
    }
    if !tools.is_empty() {
        show(&mut out, &section(tools), system);
    }
    Some(out)
}

fn role(message: &Json) -> &str {
    message.get("role").and_then(Json::as_str).unwrap_or_default()
}

fn section(tools: &[Json]) -> String {
    let lines: Vec<String> = tools.iter().map(dumps).collect();
    format!(
        "You can call functions to help the user. Their signatures, one JSON object a line:\n<tools>\n{}\n</tools>\n\n\
         To call a function, answer with its name and its arguments as a JSON object between tags, and nothing else:\n\
         <tool_call>\n{{\"name\": \"<function>\", \"arguments\": {{<arguments>}}}}\n</tool_call>",
        lines.join("\n")
    )
}

fn show(messages: &mut Vec<Json>, section: &str, system: bool) {
    let takes = |message: &Json| match role(message) {
        "system" | "developer" => system,
        role => role == "user" && !system,
    };
    match messages.iter_mut().find(|message| takes(message)).and_then(Json::as_object_mut) {
        Some(message) if system => append(message, section, "\n\n"),
        Some(message) => {
            let asked = text(message.get("content"));
            message.insert("content".to_owned(), format!("{section}\n\n{asked}").into());
        }
        None => {
            let role = if system { "system" } else { "user" };
            messages.insert(0, json!({"role": role, "content": section}));
        }
    }
}

/// An assistant's message with its calls as text.
fn with_calls(message: &Map<String, Json>) -> Map<String, Json> {
    let mut message = message.clone();
    let Some(Json::Array(calls)) = message.shift_remove("tool_calls") else { return message };
    for call in calls {
        let function = call.get("function").unwrap_or(&Json::Null);
        let name = function.get("name").cloned().unwrap_or_default();
        let arguments = match function.get("arguments") {
            // JSON as it came, or whatever else the client took for it.
            Some(Json::String(text)) if !text.trim().is_empty() => text.clone(),
            Some(object @ Json::Object(_)) => dumps(object),
            _ => "{}".to_owned(),
        };
        let text = format!("<tool_call>\n{{\"name\": {name}, \"arguments\": {arguments}}}\n</tool_call>");
        append(&mut message, &text, "\n");
    }
    message
}

/// Adds to the content, whatever its form.
fn append(message: &mut Map<String, Json>, more: &str, between: &str) {
    let content = match message.get_mut("content") {
        Some(Json::Array(parts)) => return parts.push(json!({"type": "text", "text": more})),
        Some(Json::String(text)) if !text.is_empty() => format!("{text}{between}{more}"),
        _ => more.to_owned(),
    };
    message.insert("content".to_owned(), content.into());
}

fn text(content: Option<&Json>) -> String {
    match content {
        Some(Json::String(text)) => text.clone(),
        Some(Json::Array(parts)) => {
            parts.iter().filter_map(super::messages::part_text).collect::<Vec<_>>().join("\n")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(messages: Json, tools: Json, system: bool) -> Option<Json> {
        let list = |json: &Json| json.as_array().expect("a list").clone();
        written_out(&list(&messages), &list(&tools), system).map(Json::from)
    }

    #[test]
    fn messages_without_tools_are_untouched() {
        let messages = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": null}]);
        assert_eq!(written(messages, json!([]), true), None);
    }

    #[test]
    fn tools_are_shown_once_where_the_template_takes_them() {
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        let check = |messages: Json, system: bool, expect: &[(&str, &str, &str)]| {
            let got = written(messages.clone(), tools.clone(), system).expect("is written");
            let got = got.as_array().expect("a list");
            assert_eq!(got.len(), expect.len(), "{got:?}");
            for (message, (role, start, end)) in got.iter().zip(expect) {
                assert_eq!(message["role"], *role);
                let content = text(message.get("content"));
                assert!(content.starts_with(start) && content.ends_with(end), "{messages}: {content:?}");
            }
        };
        let user = json!({"role": "user", "content": "hi"});
        check(json!([user]), true, &[("system", "You can call", "</tool_call>"), ("user", "hi", "hi")]);
        let system = json!({"role": "system", "content": "Be kind."});
        let kind = ("system", "Be kind.\n\nYou can call", "</tool_call>");
        check(json!([system, user]), true, &[kind, ("user", "hi", "hi")]);
        let parts = json!({"role": "system", "content": [{"type": "text", "text": "Be kind."}]});
        check(
            json!([parts, user]),
            true,
            &[("system", "Be kind.\nYou can", "</tool_call>"), ("user", "hi", "hi")],
        );
        let asked = ("user", "You can call", "</tool_call>\n\nhi");
        check(json!([system, user]), false, &[("system", "Be kind.", "kind."), asked]);
        let shown = written(json!([user]), tools.clone(), true).expect("is written");
        let line = r#"{"type": "function", "function": {"name": "f"}}"#;
        assert!(shown[0]["content"].as_str().is_some_and(|text| text.contains(line)), "{shown}");
    }

    #[test]
    fn calls_and_answers_become_text() {
        let call = |arguments: Json| json!({"id": "1", "function": {"name": "f", "arguments": arguments}});
        let messages = json!([
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "So.", "tool_calls": [call(json!("{\"a\":1}")), call(json!({"a": 2}))]},
            {"role": "tool", "tool_call_id": "1", "content": "one"},
            {"role": "tool", "content": [{"type": "text", "text": "two"}]},
            {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "g"}}]},
            {"role": "tool", "content": "three"},
        ]);
        let tagged = |text: &str| format!("<tool_call>\n{text}\n</tool_call>");
        let (one, two) = (
            tagged(r#"{"name": "f", "arguments": {"a":1}}"#),
            tagged(r#"{"name": "f", "arguments": {"a": 2}}"#),
        );
        assert_eq!(
            written(messages, json!([]), true),
            Some(json!([
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": format!("So.\n{one}\n{two}")},
                {"role": "user", "content": "<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response>"},
                {"role": "assistant", "content": tagged(r#"{"name": "g", "arguments": {}}"#)},
                {"role": "user", "content": "<tool_response>\nthree\n</tool_response>"},
            ]))
        );
    }
}
