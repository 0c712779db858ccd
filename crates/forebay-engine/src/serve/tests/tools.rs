//! Calls of tools and reasoning: what the model writes, and what it is made to write.

use forebay_wire::{Delta, ToolChoice};
use serde_json::{Value, json};

use super::*;
use crate::config::{ReasoningParser, ToolCallParser};

const ANSWER: &str = "<|im_start|>assistant\n";
/// A template of ChatML that opens the reasoning.
const OPENS_THINKING: &str = "{% for m in messages %}{{ m.content }}{% endfor %}|{{ '<think>\n' }}";
/// One that leaves the reasoning to the model.
const KNOWS_THINKING: &str =
    "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}|assistant|";
const CALL: &str = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>";

fn chat(tools: Value) -> Generate {
    let message =
        ChatMessage { role: "user".into(), content: Content::Text("hi".into()), extra: Default::default() };
    let prompt = Prompt::Chat {
        messages: vec![message],
        tools: Some(tools).filter(|tools| !tools.is_null()),
        add_generation_prompt: true,
        chat_template_kwargs: None,
    };
    Generate { api: Api::ChatCompletions, prompt, max_tokens: Some(256), ..greedy("") }
}

fn tools() -> Value {
    let number = json!({"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["a"]});
    json!([
        {"type": "function", "function": {"name": "f", "parameters": number}},
        {"type": "function", "function": {"name": "g", "description": "not ::= EBNF"}},
    ])
}

/// A model that goes on with `answer` where its prompt ends with `after`; tags are control tokens from 257 on.
fn model(template: Option<&str>, tags: &[&str], after: &str, answer: &str, config: EngineConfig) -> Bench {
    let ids = |text: &str| {
        let mut rest = text;
        let mut ids = Vec::new();
        while let Some(&byte) = rest.as_bytes().first() {
            let tag = tags.iter().position(|tag| rest.starts_with(tag));
            ids.push(tag.map_or(u32::from(byte), |n| 257 + n as u32));
            rest = tag.map_or(&rest[1..], |n| &rest[tags[n].len()..]);
        }
        ids
    };
    let mut answer = ids(answer);
    answer.push(EOS);
    let executor = FakeExecutor::new(VOCAB + tags.len(), 4, 1024).script(&ids(after), &answer);
    let room = |c: &mut SchedulerConfig| (c.blocks, c.model_len_max) = (1024, 2048);
    bench_of(text_model_with(template, tags), executor, room, config)
}

fn plain(answer: &str) -> Bench {
    model(None, &[], ANSWER, answer, EngineConfig::default())
}

/// All that was said in a choice, and the deltas that said it.
fn said(events: &[Event], choice: u32) -> (Delta, Vec<Delta>) {
    let deltas = events.iter().filter_map(|event| match event {
        Event::Delta(delta) if delta.choice == choice => Some(delta.clone()),
        _ => None,
    });
    let deltas: Vec<Delta> = deltas.collect();
    let mut all = Delta::default();
    for delta in &deltas {
        all.text.push_str(&delta.text);
        all.reasoning.push_str(&delta.reasoning);
        for piece in &delta.tool_calls {
            match all.tool_calls.last_mut() {
                Some(last) if last.index == piece.index => {
                    assert_eq!((&piece.id, &piece.name), (&None, &None), "only the first piece has them");
                    last.arguments.push_str(&piece.arguments);
                }
                _ => all.tool_calls.push(piece.clone()),
            }
        }
    }
    (all, deltas)
}

/// `name arguments` per call.
fn calls(all: &Delta) -> Vec<String> {
    let one = |(n, call): (usize, &forebay_wire::ToolCallDelta)| {
        assert_eq!(call.index as usize, n);
        assert!(call.id.as_ref().is_some_and(|id| id.starts_with("call_") && id.len() == 29), "{call:?}");
        format!("{} {}", call.name.as_deref().unwrap_or_default(), call.arguments)
    };
    all.tool_calls.iter().enumerate().map(one).collect()
}

#[tokio::test]
async fn a_call_is_told_from_text_and_comes_as_it_is_written() {
    let bench = plain(&format!("I will.\n{CALL}\n{CALL}"));
    let events = bench.events(chat(tools())).await.unwrap();
    let (all, deltas) = said(&events, 0);
    assert_eq!((&*all.text, calls(&all)), ("I will.\n", vec![r#"f {"a": 1}"#.to_owned(); 2]));
    assert_ne!(all.tool_calls[0].id, all.tool_calls[1].id);
    assert_eq!(reason(&events, 0), Some(FinishReason::ToolCalls));
    let pieces = deltas.iter().filter(|delta| !delta.tool_calls.is_empty()).count();
    assert_eq!(pieces, 2 * r#"{"a": 1}"#.len(), "a token each");
    let tokens: u32 = deltas.iter().map(|delta| delta.tokens).sum();
    assert_eq!(tokens, usage(&events).completion_tokens, "what is held back counts all the same");
    let labels = r#"vllm:request_success_total{engine="0",finished_reason="stop",model_name="fake"} 1"#;
    bench.wait_for(labels).await;

    let once = Generate { parallel_tool_calls: false, ..chat(tools()) };
    assert_eq!(calls(&said(&bench.events(once).await.unwrap(), 0).0).len(), 1);
    let text = Generate { tool_choice: ToolChoice::None, ..chat(tools()) };
    let events = bench.events(text).await.unwrap();
    assert_eq!(text_of(&events), format!("I will.\n{CALL}\n{CALL}"));
    assert_eq!(reason(&events, 0), Some(FinishReason::Stop));
    let events = bench.events(chat(Value::Null)).await.unwrap();
    assert_eq!(text_of(&events), format!("I will.\n{CALL}\n{CALL}"));
}

fn text_of(events: &[Event]) -> String {
    let (all, _) = said(events, 0);
    assert!(all.tool_calls.is_empty() && all.reasoning.is_empty());
    all.text
}

#[tokio::test]
async fn what_ends_a_call_early_leaves_what_there_is() {
    let bench = plain(CALL);
    let cut = |max: u32| Generate { max_tokens: Some(max), ..chat(tools()) };
    let up_to = |end: &str| (CALL.find(end).unwrap() + end.len()) as u32;
    let events = bench.events(cut(up_to("{\"a\":"))).await.unwrap();
    assert_eq!(calls(&said(&events, 0).0), [r#"f {"a":"#]);
    assert_eq!(reason(&events, 0), Some(FinishReason::Length));
    let events = bench.events(cut(up_to("\"na"))).await.unwrap();
    assert_eq!(text_of(&events), "<tool_call>\n{\"na");
    let stop = Generate { stop: vec!["1}".into()], ..chat(tools()) };
    let events = bench.events(stop).await.unwrap();
    assert_eq!(calls(&said(&events, 0).0), [r#"f {"a": "#]);
    assert_eq!(reason(&events, 0), Some(FinishReason::ToolCalls));
    // Every token has its log-probability, whatever it is part of.
    let events = bench.events(Generate { logprobs: Some(0), ..chat(tools()) }).await.unwrap();
    let (all, deltas) = said(&events, 0);
    assert_eq!(calls(&all), [r#"f {"a": 1}"#]);
    assert_eq!(
        deltas.iter().map(|delta| delta.logprobs.len()).sum::<usize>(),
        CALL.len() + 1,
        "the end, too"
    );
}

#[tokio::test]
async fn tags_that_are_control_tokens_are_seen_and_not_shown() {
    let tags = ["<tool_call>", "</tool_call>", "<other>"];
    let answer = format!("<other>So.{CALL}");
    let bench = model(None, &tags, ANSWER, &answer, EngineConfig::default());
    let (all, _) = said(&bench.events(chat(tools())).await.unwrap(), 0);
    assert_eq!((&*all.text, calls(&all)), ("So.", vec![r#"f {"a": 1}"#.to_owned()]));
    let forced = Generate { tool_choice: ToolChoice::Function("f".into()), ..chat(tools()) };
    let (all, _) = said(&bench.events(forced).await.unwrap(), 0);
    assert!(calls(&all)[0].starts_with("f {\"a\": "), "{all:?}");
}

#[tokio::test]
async fn the_form_follows_the_template_or_the_configuration() {
    let object = r#"{"name": "f", "parameters": {"a": 1}}"#;
    let own = "{{ tools | tojson if tools }}<|start_header_id|>{{ messages[0].content }}:";
    let with = |tool_call_parser| EngineConfig { tool_call_parser, ..EngineConfig::default() };
    let auto = ToolCallParser::Auto;
    let check = async |template, parser, after, answer: &str, expect: &[&str]| {
        let bench = model(template, &[], after, answer, with(parser));
        assert_eq!(calls(&said(&bench.events(chat(tools())).await.unwrap(), 0).0), expect, "{answer}");
    };
    check(Some(own), auto, ":", object, &[r#"f {"a": 1}"#]).await;
    check(Some(own), ToolCallParser::Hermes, ":", object, &[]).await;
    let json = "{{ tools | tojson if tools }}{{ messages[0].content }}:";
    check(Some(json), auto, ":", &format!("[{object}, {object}]"), &[r#"f {"a": 1}"#; 2]).await;
    check(None, auto, ANSWER, CALL, &[r#"f {"a": 1}"#]).await;
    let none = model(None, &[], ANSWER, CALL, with(ToolCallParser::None));
    let fault = none.start(chat(tools())).await.unwrap_err();
    assert_eq!((fault.class.code, fault.param.as_deref()), (Code::BadRequest, Some("tool_choice")));
    let text = Generate { tool_choice: ToolChoice::None, ..chat(tools()) };
    assert_eq!(text_of(&none.events(text).await.unwrap()), CALL);
}

#[tokio::test]
async fn a_call_that_is_wanted_comes_whatever_the_model_would_say() {
    for parser in [ToolCallParser::Hermes, ToolCallParser::Llama3Json, ToolCallParser::Json] {
        let config = EngineConfig { tool_call_parser: parser, ..EngineConfig::default() };
        let bench = model(None, &[], ANSWER, "No.", config);
        let check = async |choice: ToolChoice, parallel, names: &[&str], expect: FinishReason| {
            for seed in 0..6 {
                let sampling = Sampling { temperature: 1.5, seed: Some(seed), ..Sampling::default() };
                let call = Generate {
                    sampling,
                    n: 2,
                    tool_choice: choice.clone(),
                    parallel_tool_calls: parallel,
                    ..chat(tools())
                };
                let events = bench.events(call).await.unwrap();
                for n in 0..2 {
                    let (all, _) = said(&events, n);
                    assert!(all.text.is_empty() && !calls(&all).is_empty(), "{parser:?}: {all:?}");
                    let is_cut = reason(&events, n) == Some(FinishReason::Length);
                    assert!(is_cut || reason(&events, n) == Some(expect), "{parser:?}: {all:?}");
                    assert!(parallel || all.tool_calls.len() == 1);
                    for call in all.tool_calls.iter().take(all.tool_calls.len() - usize::from(is_cut)) {
                        let name = call.name.as_deref().unwrap_or_default();
                        assert!(names.contains(&name), "{name}");
                        let arguments: Value = serde_json::from_str(&call.arguments).unwrap();
                        let fits = match name {
                            "f" => arguments["a"].as_u64().is_some_and(|a| a < 100),
                            _ => arguments == json!({}),
                        };
                        assert!(fits, "{call:?}");
                    }
                }
            }
        };
        check(ToolChoice::Required, false, &["f", "g"], FinishReason::ToolCalls).await;
        check(ToolChoice::Required, true, &["f", "g"], FinishReason::ToolCalls).await;
        check(ToolChoice::Function("g".into()), true, &["g"], FinishReason::Stop).await;
    }
}

/// With one function that is strict.
fn strict(name: &str) -> Generate {
    let mut tools = tools();
    for tool in tools.as_array_mut().unwrap() {
        tool["function"]["strict"] = (tool["function"]["name"] == name).into();
    }
    Generate { parallel_tool_calls: false, ..chat(tools) }
}

/// Whether it calls is the model's to say; what it calls fits, where the function is strict.
#[tokio::test]
async fn strict_functions_are_called_as_their_schemas_say() {
    let too_much = CALL.replace("1}", "500}");
    for tags in [&[][..], &["<tool_call>", "</tool_call>"]] {
        for before in ["", "I < will.\n"] {
            let bench = model(None, tags, ANSWER, &format!("{before}{too_much}"), EngineConfig::default());
            // Nobody asked for more, or not of this function.
            for free in [chat(tools()), strict("g")] {
                let (all, _) = said(&bench.events(free).await.unwrap(), 0);
                assert_eq!((&*all.text, calls(&all)), (before, vec![r#"f {"a": 500}"#.to_owned()]));
            }
            let events = bench.events(strict("f")).await.unwrap();
            let (all, _) = said(&events, 0);
            assert_eq!((&*all.text, all.tool_calls.len()), (before, 1), "{all:?}");
            let arguments: Value = serde_json::from_str(&all.tool_calls[0].arguments).unwrap();
            assert!(arguments["a"].as_u64().is_some_and(|a| a < 100), "{arguments}");
            assert_eq!(reason(&events, 0), Some(FinishReason::ToolCalls));
        }
        let text = "No, not a <tool-call> today.\n";
        let bench = model(None, tags, ANSWER, text, EngineConfig::default());
        assert_eq!(text_of(&bench.events(strict("f")).await.unwrap()), text);
        // A constraint of the whole text goes before.
        let held = Generate { constraint: Some(Constraint::Choice(vec!["yes".into()])), ..strict("f") };
        assert_eq!(text_of(&bench.events(held).await.unwrap()), "yes");
    }
}

/// What is rendered holds no calls to schemas, so it is refused where the call itself would be held to them.
#[tokio::test]
async fn strict_functions_are_not_rendered() {
    let render = async |bench: &Bench, call: Generate| bench.call(Ask::Render(Box::new(call))).await;
    let hermes = plain("x");
    let fault = render(&hermes, strict("f")).await.unwrap_err();
    assert_eq!((fault.class.code, fault.param.as_deref()), (Code::BadRequest, Some("tools")), "{fault}");
    let held = Generate { constraint: Some(Constraint::JsonObject), ..strict("f") };
    let shown = Generate { tool_choice: ToolChoice::None, ..strict("f") };
    for call in [chat(tools()), held, shown] {
        assert!(render(&hermes, call).await.is_ok());
    }
    let config = EngineConfig { tool_call_parser: ToolCallParser::Json, ..EngineConfig::default() };
    let json = model(None, &[], ANSWER, "x", config);
    assert!(render(&json, strict("f")).await.is_ok(), "strict says nothing in this form");
}

#[tokio::test]
async fn a_schema_that_can_not_be_compiled_is_the_clients_mistake() {
    let bench = plain("x");
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": 7}}}}}]);
    let call = Generate { tool_choice: ToolChoice::Required, ..chat(tools.clone()) };
    let fault = bench.start(call).await.unwrap_err();
    assert_eq!((fault.class.code, fault.param.as_deref()), (Code::BadRequest, Some("tools")), "{fault:?}");
    assert_eq!(text_of(&bench.events(chat(tools)).await.unwrap()), "x");
}

#[tokio::test]
async fn reasoning_is_split_off_and_counted() {
    let opened = |answer| model(Some(OPENS_THINKING), &[], "<think>\n", answer, EngineConfig::default());
    let bench = opened("hm.</think>\n\nYes.");
    let events = bench.events(chat(Value::Null)).await.unwrap();
    let (all, _) = said(&events, 0);
    assert_eq!((&*all.reasoning, &*all.text), ("hm.", "\n\nYes."));
    assert_eq!(usage(&events).reasoning_tokens as usize, "hm.</think".len(), "all but the end of the tag");
    let quiet = Generate { include_reasoning: false, ..chat(Value::Null) };
    let events = bench.events(quiet).await.unwrap();
    assert_eq!(text_of(&events), "\n\nYes.");

    let tags = ["<think>", "</think>"];
    let with = |reasoning_parser| EngineConfig { reasoning_parser, ..EngineConfig::default() };
    let check = async |template, parser, answer: &str, expect: (&str, &str), tokens: u32| {
        let bench = model(template, &tags, "assistant|", answer, with(parser));
        let events = bench.events(chat(Value::Null)).await.unwrap();
        let (all, _) = said(&events, 0);
        assert_eq!((&*all.reasoning, &*all.text), expect, "{answer}");
        assert_eq!(usage(&events).reasoning_tokens, tokens, "{answer}");
    };
    use ReasoningParser::{Auto, DeepseekR1, None as Off, Qwen3};
    check(Some(KNOWS_THINKING), Auto, "<think>hm.</think>Yes.", ("hm.", "Yes."), 3).await;
    check(Some(KNOWS_THINKING), Auto, "Yes.", ("", "Yes."), 0).await;
    check(Some(KNOWS_THINKING), Off, "<think>hm.</think>Yes.", ("", "hm.Yes."), 0).await;
    check(Some(KNOWS_THINKING), DeepseekR1, "hm.</think>Yes.", ("hm.", "Yes."), 3).await;
    let unknowing = "{{ messages[0].content }}|assistant|";
    check(Some(unknowing), Auto, "<think>hm.</think>Yes.", ("", "hm.Yes."), 0).await;
    check(Some(unknowing), Qwen3, "<think>hm.</think>Yes.", ("hm.", "Yes."), 3).await;
}

/// A constraint is about the answer; what comes before it is free.
#[tokio::test]
async fn a_constraint_waits_for_the_end_of_reasoning() {
    let yes = Constraint::Choice(vec!["yes".into(), "no".into()]);
    let held = || Generate { constraint: Some(yes.clone()), ..chat(Value::Null) };
    let bench = model(Some(OPENS_THINKING), &[], "<think>\n", "hm.</think>whatever", EngineConfig::default());
    let events = bench.events(held()).await.unwrap();
    let (all, _) = said(&events, 0);
    assert_eq!(all.reasoning, "hm.");
    assert!(["yes", "no"].contains(&&*all.text), "{all:?}");
    assert_eq!(reason(&events, 0), Some(FinishReason::Stop));

    let tags = ["<think>", "</think>"];
    for (answer, reasoning) in [("<think>hm.</think>whatever", "hm."), ("yes", "")] {
        let bench = model(Some(KNOWS_THINKING), &tags, "assistant|", answer, EngineConfig::default());
        let (all, _) = said(&bench.events(held()).await.unwrap(), 0);
        assert_eq!(all.reasoning, reasoning);
        assert!(["yes", "no"].contains(&&*all.text), "{all:?}");
        if reasoning.is_empty() {
            continue;
        }
        let wanted = Generate { tool_choice: ToolChoice::Function("g".into()), ..chat(tools()) };
        let (all, _) = said(&bench.events(wanted).await.unwrap(), 0);
        assert_eq!((&*all.reasoning, calls(&all)), (reasoning, vec!["g {}".to_owned()]));
    }
}
