//! Prompts, and what can go wrong in a template.

use super::*;
use serde_json::json;

fn render(source: &str, messages: &Json) -> Result<String, TemplateError> {
    ChatTemplate::new(Some(source))?.render(&ChatPrompt::new(messages.as_array().unwrap()))
}

fn check(source: &str, content: Json, expect: &str) {
    let messages = json!([{"role": "user", "content": content}]);
    assert_eq!(render(source, &messages).unwrap(), expect, "{source}");
}

#[test]
fn content_comes_as_the_template_wants_it() {
    let parts = json!([{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]);
    let as_text = "{% for m in messages %}{{ m.content + '!' }}{% endfor %}";
    check(as_text, json!("a"), "a!");
    check(as_text, parts.clone(), "a\nb!");
    check(as_text, json!(null), "!");
    let as_parts = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}";
    check(as_parts, json!("a"), "[a]");
    check(as_parts, parts.clone(), "[a][][b]");
    check(as_parts, json!(null), "");
    let either = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}\
                  {{ m.content | map(attribute='text') | join('+') }}{% endif %}{% endfor %}";
    check(either, json!("a"), "a");
    check(either, json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), "a+b");
}

#[test]
fn a_model_without_a_template_gets_chatml() {
    let messages = [json!({"role": "user", "content": "hi"}), json!({"role": "assistant"})];
    let text = ChatTemplate::new(None).unwrap().render(&ChatPrompt::new(&messages)).unwrap();
    assert_eq!(
        text,
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn arguments_of_tool_calls_become_objects() {
    // One that knows of tools.
    let source = "{{ tools | tojson if tools }}{% for m in messages %}{% for c in m.tool_calls %}\
                  {{ c.function.arguments | tojson }};{% endfor %}{% endfor %}";
    let call = |arguments: &str| json!({"function": {"name": "f", "arguments": arguments}});
    let messages = json!([{"role": "assistant", "tool_calls": [
        call("{\"b\":1,\"a\":[]}"), call(""), call("[not json"), {"function": {"name": "f"}}
    ]}]);
    assert_eq!(render(source, &messages).unwrap(), "{\"b\": 1, \"a\": []};{};\"[not json\";{};");
}

#[test]
fn tools_reach_the_prompt_with_any_template() {
    let tools = [json!({"type": "function", "function": {"name": "get_weather"}})];
    let prompt_of = |source: &str| {
        let template = ChatTemplate::new(Some(source)).unwrap();
        let messages = [json!({"role": "user", "content": "hi"})];
        let prompt = ChatPrompt { tools: Some(&tools), ..ChatPrompt::new(&messages) };
        (template.shows_tools(), template.render(&prompt).unwrap())
    };
    let own = "{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}";
    assert_eq!(prompt_of(own), (true, "[get_weather]hi".to_owned()));
    let (own, text) = prompt_of("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}");
    assert!(!own && text.starts_with("<system>You can call") && text.ends_with("<user>hi"), "{text}");
    let no_system = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}\
                     <{{ m.role }}>{{ m.content }}{% endfor %}";
    let (own, text) = prompt_of(no_system);
    assert!(!own && text.starts_with("<user>You can call") && text.ends_with("</tool_call>\n\nhi"), "{text}");
}

#[test]
fn continues_the_last_message() {
    let source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}";
    let template = ChatTemplate::new(Some(source)).unwrap();
    let render = |content: Json| {
        let messages =
            [json!({"role": "user", "content": "So"}), json!({"role": "assistant", "content": content})];
        let prompt = ChatPrompt {
            add_generation_prompt: false,
            continue_final_message: true,
            ..ChatPrompt::new(&messages)
        };
        template.render(&prompt)
    };
    assert_eq!(render(json!(" So, ")).unwrap(), "<user>So</><assistant>So,");
    assert_eq!(render(json!([{"type": "text", "text": "x"}])).unwrap(), "<user>So</><assistant>x");
}

#[test]
fn failures_say_whose_they_are() {
    let messages = json!([{"role": "user", "content": "x"}]);
    let class = |source: &str| {
        let error = render(source, &messages).unwrap_err();
        (error.class().code, error.to_string())
    };
    let (code, text) = class("{% if %}");
    assert_eq!(code, Code::Internal);
    assert!(text.starts_with("the chat template does not compile: syntax error:"), "{text}");
    let (code, text) = class("{{ raise_exception('roles must alternate') }}");
    assert_eq!(code, Code::BadRequest);
    assert_eq!(text, "the model's chat template refuses these messages: roles must alternate");
    let (code, text) = class("\n{{ messages[0].name.first }}");
    assert_eq!(code, Code::BadRequest);
    assert!(text.ends_with("(line 2 of the template)"), "{text}");
}

#[test]
fn a_template_that_runs_away_is_stopped() {
    let messages = json!([{"role": "user", "content": "x"}]);
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
    assert!(matches!(render(endless, &messages), Err(TemplateError::TooMuchWork)));
    let long = "{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}";
    assert!(matches!(render(long, &messages), Err(TemplateError::TooLong)));
    let deep = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
    assert!(matches!(render(deep, &messages), Err(TemplateError::Failed { .. })));
}
