//! Tools and who may call them: `tools`, `tool_choice`, `parallel_tool_calls`, and the calls that a conversation has.

use serde_json::{Map, Value};

use super::ParseError;
use super::field::{Fields, Kind};
use crate::{Need, ToolChoice};

/// OpenAI's limit.
const TOOLS_MAX: usize = 128;
/// Calls in one message.
const CALLS_MAX: usize = 1024;
/// OpenAI takes 64 characters without `.` and `:`, vLLM any.
const NAME_BYTES_MAX: usize = 128;
const FUNCTIONS_ONLY: &str = "only functions can be called; write 'type': 'function'";

/// The array as it came, checked. `None` where it is missing or empty. Tools of other types are needs.
pub(super) fn tools(fields: &Fields<'_>, needs: &mut Vec<Need>) -> Result<Option<Vec<Value>>, ParseError> {
    let tools = match (fields.raw("tools"), fields.kind("tools")) {
        (Some(raw), Some(Kind::Array)) => fields.read::<Vec<Value>>("tools", raw)?,
        (Some(_), Some(got)) => return Err(mistyped("tools", "an array of objects", got)),
        _ => return Ok(None),
    };
    fields.check_length("tools", tools.len(), TOOLS_MAX)?;
    for (i, tool) in tools.iter().enumerate() {
        let at = format!("tools[{i}]");
        let tool = object(&at, Some(tool))?;
        if is_function(&at, tool, needs)? {
            let at = format!("{at}.function");
            function(&at, object(&at, tool.get("function"))?)?;
        }
    }
    Ok(Some(tools).filter(|tools| !tools.is_empty()))
}

fn function(at: &str, function: &Map<String, Value>) -> Result<(), ParseError> {
    let param = format!("{at}.name");
    let name = string(&param, function.get("name"))?.ok_or(ParseError::Missing { param: param.clone() })?;
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.:".contains(&byte);
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(is_plain) {
        let what =
            format!("expected 1 to {NAME_BYTES_MAX} of the characters a-z, A-Z, 0-9, '_', '-', '.' and ':'");
        return Err(ParseError::value(param, what));
    }
    string(&format!("{at}.description"), function.get("description"))?;
    match function.get("parameters") {
        None | Some(Value::Null | Value::Object(_)) => {}
        Some(other) => {
            let expected = "a JSON schema (an object)";
            return Err(mistyped(format!("{at}.parameters"), expected, Kind::of_value(other)));
        }
    }
    match function.get("strict") {
        None | Some(Value::Null | Value::Bool(_)) => Ok(()),
        Some(other) => Err(mistyped(format!("{at}.strict"), "a boolean", Kind::of_value(other))),
    }
}

/// `tool_choice`, which is about `tools`.
pub(super) fn choice(
    fields: &Fields<'_>,
    tools: Option<&[Value]>,
    needs: &mut Vec<Need>,
) -> Result<ToolChoice, ParseError> {
    let choice = match (fields.raw("tool_choice"), fields.kind("tool_choice")) {
        (None, _) | (_, None) => return Ok(ToolChoice::Auto),
        (Some("\"none\""), _) => return Ok(ToolChoice::None),
        (Some("\"auto\""), _) => ToolChoice::Auto,
        (Some("\"required\""), _) => ToolChoice::Required,
        (Some(raw), Some(Kind::Object)) => {
            let choice: Map<String, Value> = fields.read("tool_choice", raw)?;
            if !is_function("tool_choice", &choice, needs)? {
                return Ok(ToolChoice::Auto);
            }
            let function = object("tool_choice.function", choice.get("function"))?;
            const NAME: &str = "tool_choice.function.name";
            let name =
                string(NAME, function.get("name"))?.ok_or(ParseError::Missing { param: NAME.into() })?;
            ToolChoice::Function(name.to_owned())
        }
        (_, Some(Kind::String)) => {
            let what = "Supported values are: 'none', 'auto', 'required' and a function as an object";
            return Err(ParseError::value("tool_choice", what));
        }
        (_, Some(got)) => return Err(mistyped("tool_choice", "one of a string or an object", got)),
    };
    // As in vLLM, an empty list is a list: there is nothing that could be called.
    if fields.raw("tools").is_none() {
        return Err(ParseError::value("tool_choice", "only allowed when 'tools' are specified"));
    }
    match (&choice, tools) {
        (ToolChoice::Function(name), tools) => {
            let named = |tool: &&Value| tool.pointer("/function/name").and_then(Value::as_str) == Some(name);
            if !tools.unwrap_or_default().iter().any(|tool| named(&tool)) {
                let what = "the function does not match any of the specified 'tools'";
                return Err(ParseError::value("tool_choice.function.name", what));
            }
            Ok(choice)
        }
        (_, None) => Ok(ToolChoice::None),
        (_, Some(_)) => Ok(choice),
    }
}

/// What a message has to say about calls: those of an assistant, and which one a tool answers.
pub(super) fn check_message(
    param: &str,
    role: &str,
    message: &Map<String, Value>,
    needs: &mut Vec<Need>,
) -> Result<(), ParseError> {
    if role == "tool" {
        string(&format!("{param}.tool_call_id"), message.get("tool_call_id"))?;
    }
    if role != "assistant" {
        return Ok(());
    }
    let param = format!("{param}.tool_calls");
    let calls = match message.get("tool_calls") {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Array(calls)) if calls.len() <= CALLS_MAX => calls,
        Some(Value::Array(calls)) => {
            let what = format!("expected at most {CALLS_MAX} calls, but got {}", calls.len());
            return Err(ParseError::value(param, what));
        }
        Some(other) => return Err(mistyped(param, "an array of objects", Kind::of_value(other))),
    };
    for (i, call) in calls.iter().enumerate() {
        let at = format!("{param}[{i}]");
        let call = object(&at, Some(call))?;
        string(&format!("{at}.id"), call.get("id"))?;
        if !is_function(&at, call, needs)? {
            continue;
        }
        let at = format!("{at}.function");
        let function = object(&at, call.get("function"))?;
        let name = format!("{at}.name");
        string(&name, function.get("name"))?.ok_or(ParseError::Missing { param: name })?;
        match function.get("arguments") {
            // OpenAI has a string, vLLM takes the object that it stands for as well.
            None | Some(Value::Null | Value::String(_) | Value::Object(_)) => {}
            Some(other) => {
                let expected = "a string of JSON";
                return Err(mistyped(format!("{at}.arguments"), expected, Kind::of_value(other)));
            }
        }
    }
    Ok(())
}

/// Whether `type` says function, or nothing. Another type is a need.
fn is_function(at: &str, value: &Map<String, Value>, needs: &mut Vec<Need>) -> Result<bool, ParseError> {
    let param = format!("{at}.type");
    match string(&param, value.get("type"))? {
        None | Some("function") => Ok(true),
        Some(_) => {
            // One is enough to refuse for.
            if !needs.iter().any(|need| need.what == FUNCTIONS_ONLY) {
                needs.push(Need { param, what: FUNCTIONS_ONLY });
            }
            Ok(false)
        }
    }
}

fn object<'v>(param: &str, value: Option<&'v Value>) -> Result<&'v Map<String, Value>, ParseError> {
    match value {
        Some(Value::Object(fields)) => Ok(fields),
        None | Some(Value::Null) => Err(ParseError::Missing { param: param.into() }),
        Some(other) => Err(mistyped(param, "an object", Kind::of_value(other))),
    }
}

/// `None` where it is missing or null.
fn string<'v>(param: &str, value: Option<&'v Value>) -> Result<Option<&'v str>, ParseError> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(mistyped(param, "a string", Kind::of_value(other))),
    }
}

fn mistyped(param: impl Into<String>, expected: &'static str, got: Kind) -> ParseError {
    ParseError::Type { param: param.into(), expected, got }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::json;

    use super::*;
    use crate::{Ask, Generate, Prompt};

    fn parsed(change: &Value) -> Result<Generate, ParseError> {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
        for (key, value) in change.as_object().expect("fields") {
            body[key] = value.clone();
        }
        let body = Bytes::from(body.to_string());
        match crate::parse(&http::Method::POST, "/v1/chat/completions", None, &body, None)? {
            Ask::Generate(call) => Ok(*call),
            _ => unreachable!("a chat is a generation"),
        }
    }

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}})
    }

    #[test]
    fn choices() {
        let tools = [tool("f"), tool("math.add"), json!({"function": {"name": "g"}})];
        let check = |mut change: Value, expect: ToolChoice| {
            change["tools"] = json!(tools);
            let call = parsed(&change).expect("is taken");
            assert_eq!((call.tool_choice, call.needs.len()), (expect, 0), "{change}");
            let Prompt::Chat { tools: Some(shown), .. } = call.prompt else { panic!("{change}") };
            assert_eq!(shown, json!(tools), "as they came, whatever the choice");
        };
        check(json!({}), ToolChoice::Auto);
        check(json!({"tool_choice": null}), ToolChoice::Auto);
        check(json!({"tool_choice": "auto"}), ToolChoice::Auto);
        check(json!({"tool_choice": "none"}), ToolChoice::None);
        check(json!({"tool_choice": "required"}), ToolChoice::Required);
        let named = json!({"tool_choice": {"type": "function", "function": {"name": "math.add"}}});
        check(named, ToolChoice::Function("math.add".into()));
        let call = parsed(&json!({"tools": [], "tool_choice": "required"})).expect("is taken");
        assert_eq!(call.tool_choice, ToolChoice::None, "nothing to call");
        let call = parsed(&json!({"tools": tools, "parallel_tool_calls": false, "include_reasoning": false}));
        let call = call.expect("is taken");
        assert!(!call.parallel_tool_calls && !call.include_reasoning);
    }

    #[test]
    fn mistakes_name_their_field() {
        let check = |change: Value, param: &str, expect: &str| {
            let error = parsed(&change).expect_err("is refused");
            let fault = forebay_types::Fault::from(error.clone());
            assert_eq!(fault.param.as_deref(), Some(param), "{change}: {error}");
            assert!(error.to_string().contains(expect), "{change}: {error}");
        };
        let tools = |tools: Value| json!({"tools": tools});
        check(tools(json!([7])), "tools[0]", "an object");
        check(tools(json!([{}])), "tools[0].function", "Missing");
        check(tools(json!([{"type": 7}])), "tools[0].type", "a string");
        check(tools(json!([{"type": "function", "function": {}}])), "tools[0].function.name", "Missing");
        for name in ["", "get weather", "naïve", &"f".repeat(129)] {
            check(tools(json!([tool("f"), tool(name)])), "tools[1].function.name", "1 to 128");
        }
        let with = |key: &str, value: Value| {
            let mut tool = tool("f");
            tool["function"][key] = value;
            tools(json!([tool]))
        };
        check(with("parameters", json!([])), "tools[0].function.parameters", "a JSON schema");
        check(with("description", json!(1)), "tools[0].function.description", "a string");
        check(with("strict", json!("yes")), "tools[0].function.strict", "a boolean");
        check(tools(json!(vec![tool("f"); 129])), "tools", "maximum length 128");

        let choice = |choice: Value| json!({"tools": [tool("f")], "tool_choice": choice});
        check(choice(json!("sometimes")), "tool_choice", "Supported values");
        check(choice(json!(7)), "tool_choice", "a string or an object");
        check(choice(json!({"type": "function"})), "tool_choice.function", "Missing");
        check(choice(json!({"function": {"name": 7}})), "tool_choice.function.name", "a string");
        check(choice(json!({"function": {"name": "g"}})), "tool_choice.function.name", "does not match any");
        for choice in [json!("auto"), json!("required"), json!({"function": {"name": "f"}})] {
            check(json!({"tool_choice": choice}), "tool_choice", "only allowed when 'tools'");
        }
        check(
            json!({"tools": [], "tool_choice": {"function": {"name": "f"}}}),
            "tool_choice.function.name",
            "match",
        );
        check(json!({"parallel_tool_calls": "yes"}), "parallel_tool_calls", "a boolean");
        check(json!({"include_reasoning": 1}), "include_reasoning", "a boolean");
    }

    #[test]
    fn calls_in_messages() {
        let said = |calls: Value| json!({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": calls}]});
        let call = json!({"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}});
        for calls in [
            json!([call]),
            json!([call, call]),
            json!([]),
            json!(null),
            json!([{"function": {"name": "f", "arguments": {"a": 1}}}]),
            json!([{"function": {"name": "f"}}]),
        ] {
            assert!(parsed(&said(calls.clone())).is_ok_and(|call| call.needs.is_empty()), "{calls}");
        }
        let check = |calls: Value, param: &str| {
            let fault = forebay_types::Fault::from(parsed(&said(calls.clone())).expect_err("is refused"));
            assert_eq!(fault.param.as_deref(), Some(param), "{calls}");
        };
        check(json!({}), "messages[1].tool_calls");
        check(json!(["f"]), "messages[1].tool_calls[0]");
        check(json!([call, {"id": 7}]), "messages[1].tool_calls[1].id");
        check(json!([{"id": "1"}]), "messages[1].tool_calls[0].function");
        check(json!([{"function": {"arguments": "{}"}}]), "messages[1].tool_calls[0].function.name");
        let list = json!([{"function": {"name": "f", "arguments": []}}]);
        check(list, "messages[1].tool_calls[0].function.arguments");
        let answer = json!({"messages": [{"role": "tool", "content": "42", "tool_call_id": 7}]});
        let fault = forebay_types::Fault::from(parsed(&answer).expect_err("is refused"));
        assert_eq!(fault.param.as_deref(), Some("messages[0].tool_call_id"));
    }

    #[test]
    fn other_kinds_of_tools_are_for_those_who_have_them() {
        let custom = json!({"type": "custom", "custom": {"name": "f"}});
        let check = |change: Value, param: &str| {
            let call = parsed(&change).expect("is taken");
            let needs: Vec<_> = call.needs.iter().map(|need| need.param.as_str()).collect();
            assert_eq!(needs, [param], "{change}");
        };
        check(json!({"tools": [custom, custom]}), "tools[0].type");
        let allowed = json!({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}});
        check(json!({"tools": [tool("f")], "tool_choice": allowed}), "tool_choice.type");
        let call = json!({"id": "1", "type": "custom", "custom": {}});
        let said = json!([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]);
        check(json!({"messages": said}), "messages[1].tool_calls[0].type");
    }
}
