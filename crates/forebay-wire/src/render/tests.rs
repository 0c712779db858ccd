//! Streams and bodies of the same events, side by side.

use forebay_types::{FinishReason, Usage};
use serde_json::{Value, json};

use super::*;
use crate::{
    CollectError, Collector, Prompt, RankedLogprob, StopReason, TokenLogprob, ToolCallDelta, TopLogprob,
};

fn spec(api: Api, choices: u32, include_usage: bool) -> RenderSpec {
    let call = Generate::new(api, "m".into(), Prompt::Text(vec![String::new()]));
    RenderSpec { choices, stream: true, include_usage, ..RenderSpec::new(&call) }
}

fn delta(choice: u32, text: &str) -> Event {
    Event::Delta(Delta { choice, text: text.into(), tokens: 1, ..Delta::default() })
}

fn scored(text: &str, logprob: Option<f32>, top: &[(u32, &str, f32)]) -> Event {
    let top = top.iter().map(|(token, text, logprob)| TopLogprob {
        token: *token,
        text: (*text).into(),
        bytes: text.as_bytes().to_vec(),
        logprob: *logprob,
    });
    let entry = TokenLogprob {
        token: 7,
        text: text.into(),
        bytes: text.as_bytes().to_vec(),
        logprob,
        top: top.collect(),
    };
    Event::Delta(Delta { text: text.into(), tokens: 1, logprobs: vec![entry], ..Delta::default() })
}

fn finished(choice: u32, reason: FinishReason) -> Event {
    Event::Finished { choice, reason, stop: None }
}

const STARTED: Event = Event::Started { prompt_tokens: 3, cached_tokens: 2 };
const DONE: Event = Event::Done {
    usage: Usage { prompt_tokens: 3, completion_tokens: 2, cached_tokens: 2, reasoning_tokens: 0 },
};

fn stream(spec: &RenderSpec, events: &[Event]) -> String {
    let mut renderer = Renderer::new("r1", 1700000000, spec);
    let mut out = BytesMut::new();
    events.iter().for_each(|event| renderer.frame(event, &mut out));
    String::from_utf8(out.to_vec()).unwrap()
}

fn collect(spec: &RenderSpec, events: &[Event]) -> Result<String, CollectError> {
    let mut collector = Collector::new("r1", 1700000000, spec);
    events.iter().cloned().for_each(|event| collector.push(event));
    collector.finish().map(|body| String::from_utf8(body.to_vec()).unwrap())
}

fn frames(stream: &str) -> Vec<Value> {
    let payload = |frame: &str| frame.strip_prefix("data: ").unwrap().to_owned();
    let frames: Vec<_> = stream.split_terminator("\n\n").map(payload).collect();
    let (done, frames) = frames.split_last().unwrap();
    assert_eq!(done, "[DONE]");
    frames.iter().map(|frame| serde_json::from_str(frame).unwrap()).collect()
}

#[test]
fn chat_stream() {
    let events = [STARTED, delta(0, "a\"\n"), delta(0, ""), finished(0, FinishReason::Stop), DONE];
    let head = r#"data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":1700000000,"model":"m","choices":["#;
    let role =
        r#"{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}"#;
    let text = r#"{"index":0,"delta":{"content":"a\"\n"},"logprobs":null,"finish_reason":null}"#;
    let last = r#"{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":null}"#;
    let usage = r#"{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,"prompt_tokens_details":{"cached_tokens":2}}"#;
    assert_eq!(
        stream(&spec(Api::ChatCompletions, 1, false), &events),
        format!("{head}{role}]}}\n\n{head}{text}]}}\n\n{head}{last}]}}\n\ndata: [DONE]\n\n")
    );
    assert_eq!(
        stream(&spec(Api::ChatCompletions, 1, true), &events),
        format!(
            "{head}{role}],\"usage\":null}}\n\n{head}{text}],\"usage\":null}}\n\n{head}{last}],\"usage\":null}}\n\n\
             {head}],\"usage\":{usage}}}\n\ndata: [DONE]\n\n"
        )
    );
}

#[test]
fn usage_so_far_in_every_frame() {
    let many = Event::Delta(Delta { choice: 0, text: "b".into(), tokens: 3, ..Delta::default() });
    // What is held back counts with the next frame.
    let events = [STARTED, delta(0, "a"), delta(0, ""), many, finished(0, FinishReason::Stop), DONE];
    for api in [Api::ChatCompletions, Api::Completions] {
        let spec = RenderSpec { continuous_usage: true, ..spec(api, 1, true) };
        let usage = |frame: &Value| {
            let usage = &frame["usage"];
            assert_eq!(
                (&usage["prompt_tokens"], &usage["prompt_tokens_details"]["cached_tokens"]),
                (&json!(3), &json!(2))
            );
            usage["completion_tokens"].as_u64().unwrap()
        };
        let seen: Vec<u64> = frames(&stream(&spec, &events)).iter().map(usage).collect();
        let roles = usize::from(api == Api::Completions);
        assert_eq!(seen, [0, 1, 5, 5, 2][roles..], "the last is the engine's own");
    }
}

#[test]
fn reasoning_is_part_of_the_completion() {
    let usage = Usage { prompt_tokens: 3, completion_tokens: 9, cached_tokens: 0, reasoning_tokens: 4 };
    let events = [STARTED, delta(0, "a"), finished(0, FinishReason::Stop), Event::Done { usage }];
    let body = collect(&spec(Api::ChatCompletions, 1, false), &events).unwrap();
    let read: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(read["usage"]["completion_tokens_details"], json!({"reasoning_tokens": 4}));
    assert_eq!(crate::scan_body(body.as_bytes()), Some(usage));
}

#[test]
fn completion_stream() {
    let events = [STARTED, delta(0, "a"), finished(0, FinishReason::Length), DONE];
    let head =
        r#"data: {"id":"cmpl-r1","object":"text_completion","created":1700000000,"model":"m","choices":["#;
    assert_eq!(
        stream(&spec(Api::Completions, 1, false), &events),
        format!(
            "{head}{{\"index\":0,\"text\":\"a\",\"logprobs\":null,\"finish_reason\":null,\"stop_reason\":null}}]}}\n\n\
             {head}{{\"index\":0,\"text\":\"\",\"logprobs\":null,\"finish_reason\":\"length\",\"stop_reason\":null}}]}}\n\ndata: [DONE]\n\n"
        )
    );
}

#[test]
fn bodies_order_their_choices() {
    let events = [
        STARTED,
        delta(1, "x"),
        delta(0, "a"),
        delta(1, "y"),
        finished(1, FinishReason::Length),
        delta(0, "b"),
        finished(0, FinishReason::Stop),
        DONE,
    ];
    let usage = r#""usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,"prompt_tokens_details":{"cached_tokens":2}}"#;
    assert_eq!(
        collect(&spec(Api::ChatCompletions, 2, false), &events).unwrap(),
        format!(
            r#"{{"id":"chatcmpl-r1","object":"chat.completion","created":1700000000,"model":"m","choices":[{{"index":0,"message":{{"role":"assistant","content":"ab","refusal":null}},"logprobs":null,"finish_reason":"stop","stop_reason":null}},{{"index":1,"message":{{"role":"assistant","content":"xy","refusal":null}},"logprobs":null,"finish_reason":"length","stop_reason":null}}],{usage}}}"#
        )
    );
    assert_eq!(
        collect(&spec(Api::Completions, 2, false), &events).unwrap(),
        format!(
            r#"{{"id":"cmpl-r1","object":"text_completion","created":1700000000,"model":"m","choices":[{{"index":0,"text":"ab","logprobs":null,"finish_reason":"stop","stop_reason":null}},{{"index":1,"text":"xy","logprobs":null,"finish_reason":"length","stop_reason":null}}],{usage}}}"#
        )
    );
    let roles = frames(&stream(&spec(Api::ChatCompletions, 2, false), &events));
    assert_eq!((&roles[0]["choices"][0]["index"], &roles[1]["choices"][0]["index"]), (&json!(0), &json!(1)));
}

#[test]
fn chat_logprobs() {
    let event = scored("é", Some(-0.5), &[(7, "é", -0.5), (8, "b", f32::NEG_INFINITY)]);
    let expect = json!({"content": [{
        "token": "é", "logprob": -0.5, "bytes": [195, 169],
        "top_logprobs": [
            {"token": "é", "logprob": -0.5, "bytes": [195, 169]},
            {"token": "b", "logprob": -9999.0, "bytes": [98]},
        ]}], "refusal": null});
    let spec = spec(Api::ChatCompletions, 1, false);
    let events = [STARTED, event, finished(0, FinishReason::Stop), DONE];
    assert_eq!(frames(&stream(&spec, &events))[1]["choices"][0]["logprobs"], expect);
    let body: Value = serde_json::from_str(&collect(&spec, &events).unwrap()).unwrap();
    assert_eq!(body["choices"][0]["logprobs"], expect);
}

#[test]
fn completion_logprobs() {
    // An echoed prompt's first token has none, the chosen token is added where it is not among the top, and texts that
    // read the same stand once.
    let events = [
        STARTED,
        scored("éa", None, &[]),
        scored("b", Some(-2.0), &[(8, "c", -0.25), (9, "c", -0.5)]),
        scored("d", Some(-1.0), &[(7, "d", -1.0)]),
        finished(0, FinishReason::Stop),
        DONE,
    ];
    let spec = spec(Api::Completions, 1, false);
    let body: Value = serde_json::from_str(&collect(&spec, &events).unwrap()).unwrap();
    let expect = json!({
        "text_offset": [0, 2, 3], "token_logprobs": [null, -2.0, -1.0], "tokens": ["éa", "b", "d"],
        "top_logprobs": [null, {"b": -2.0, "c": -0.25}, {"d": -1.0}]});
    assert_eq!(body["choices"][0]["logprobs"], expect);
    let frames = frames(&stream(&spec, &events));
    let offsets: Vec<_> =
        frames[..3].iter().map(|f| f["choices"][0]["logprobs"]["text_offset"][0].clone()).collect();
    assert_eq!(offsets, [json!(0), json!(2), json!(3)]);
}

#[test]
fn tokens_that_are_no_text_keep_their_bytes_apart() {
    let part = |bytes: &[u8], logprob| TopLogprob {
        token: u32::from(bytes[bytes.len() - 1]),
        text: String::from_utf8_lossy(bytes).into_owned(),
        bytes: bytes.to_vec(),
        logprob,
    };
    let top =
        vec![part(b"\xe2\x80", -0.25), part(b"\xe2", -0.5), part(b" \xf0\x9f", -1.0), part(b"\\\xff", -2.0)];
    let TopLogprob { token, text, bytes, logprob } = top[1].clone();
    let entry = TokenLogprob { token, text, bytes, logprob: Some(logprob), top };
    let event = Event::Delta(Delta { tokens: 1, logprobs: vec![entry], ..Delta::default() });
    let events = [STARTED, event, finished(0, FinishReason::Stop), DONE];
    let body = collect(&spec(Api::Completions, 1, false), &events).unwrap();
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(
        body["choices"][0]["logprobs"],
        json!({
        "text_offset": [0], "token_logprobs": [-0.5], "tokens": ["bytes:\\xe2"],
        "top_logprobs": [{
            "bytes:\\xe2\\x80": -0.25, "bytes:\\xe2": -0.5, "bytes: \\xf0\\x9f": -1.0, "bytes:\\x5c\\xff": -2.0,
        }]})
    );
}

/// Two prompts of two choices each, with everything that can be told of tokens.
#[test]
fn ids_and_log_probabilities_of_prompts() {
    let ranked =
        |token: u32, text: &str, logprob, rank| RankedLogprob { token, text: text.into(), logprob, rank };
    let told = |prompt: u32| {
        let entry = vec![ranked(8, "b", -1.5, 3), ranked(9, "\"", f32::NEG_INFINITY, 1)];
        Event::Prompt(PromptTokens { prompt, ids: vec![7, 8 + prompt], logprobs: Some(vec![vec![], entry]) })
    };
    let said = |choice: u32| {
        Event::Delta(Delta {
            choice,
            text: "x".into(),
            token_ids: vec![choice, 5],
            tokens: 2,
            ..Delta::default()
        })
    };
    let end = |choice: u32| {
        [
            Event::Delta(Delta { choice, token_ids: vec![2], tokens: 1, ..Delta::default() }),
            finished(choice, FinishReason::Stop),
        ]
    };
    let rendered = json!([null, {
        "8": {"logprob": -1.5, "rank": 3, "decoded_token": "b"},
        "9": {"logprob": -9999.0, "rank": 1, "decoded_token": "\""},
    }]);

    let full =
        |api, choices| RenderSpec { token_ids: true, choices_per_prompt: 2, ..spec(api, choices, false) };
    let mut events = vec![STARTED, told(1), said(2), told(0), said(0), said(1), said(3)];
    events.extend((0..4).flat_map(end));
    events.push(DONE);
    let spec = full(Api::Completions, 4);
    let body: Value = serde_json::from_str(&collect(&spec, &events).unwrap()).unwrap();
    for choice in 0..4 {
        let got = &body["choices"][choice];
        assert_eq!(got["token_ids"], json!([choice, 5, 2]));
        assert_eq!(got["prompt_token_ids"], json!([7, 8 + choice / 2]));
        assert_eq!(got["prompt_logprobs"], rendered);
    }
    let frames_seen = frames(&stream(&spec, &events));
    for choice in 0..4 {
        let of = |frame: &&Value| frame["choices"][0]["index"] == choice;
        let of_choice: Vec<&Value> =
            frames_seen.iter().filter(of).map(|frame| &frame["choices"][0]).collect();
        assert_eq!(of_choice[0]["prompt_token_ids"], json!([7, 8 + choice / 2]), "in the first frame");
        assert_eq!(of_choice[1].get("prompt_token_ids"), None, "and only there");
        assert_eq!(
            (&of_choice[0]["token_ids"], &of_choice[1]["token_ids"]),
            (&json!([choice, 5]), &json!([2]))
        );
    }

    let mut events = vec![STARTED, told(0), said(0), said(1)];
    events.extend((0..2).flat_map(end));
    events.push(DONE);
    let spec = full(Api::ChatCompletions, 2);
    let body: Value = serde_json::from_str(&collect(&spec, &events).unwrap()).unwrap();
    assert_eq!((&body["prompt_token_ids"], &body["prompt_logprobs"]), (&json!([7, 8]), &rendered));
    assert_eq!(body["choices"][1]["token_ids"], json!([1, 5, 2]));
    let frames_seen = frames(&stream(&spec, &events));
    assert!(frames_seen[..2].iter().all(|frame| frame["prompt_token_ids"] == json!([7, 8])));
    assert!(frames_seen[2..].iter().all(|frame| frame.get("prompt_token_ids").is_none()));
    assert_eq!(frames_seen[2]["choices"][0]["token_ids"], json!([0, 5]));
    assert_eq!(frames_seen.len(), 2 + 6);
}

#[test]
fn tokens_are_named_by_their_ids_and_replies_by_the_client() {
    let events = [
        STARTED,
        scored("b", Some(-0.5), &[(3, "b", -0.25), (4, "c", -1.0)]),
        finished(0, FinishReason::Stop),
        DONE,
    ];
    let body = |api| {
        let spec = RenderSpec { tokens_as_ids: true, request_id: Some("mine".into()), ..spec(api, 1, false) };
        let text = stream(&spec, &events);
        let id = match api {
            Api::ChatCompletions => "\"id\":\"chatcmpl-mine\"",
            Api::Completions => "\"id\":\"cmpl-mine\"",
            Api::Tokens => "\"request_id\":\"generate-tokens-mine\"",
        };
        assert!(text.contains(id), "{text}");
        let body: Value = serde_json::from_str(&collect(&spec, &events).unwrap()).unwrap();
        body["choices"][0]["logprobs"].clone()
    };
    assert_eq!(body(Api::Tokens)["content"][0]["token"], "token_id:7");
    let completion = body(Api::Completions);
    assert_eq!(completion["tokens"], json!(["token_id:7"]));
    let top = json!([{"token_id:7": -0.5, "token_id:3": -0.25, "token_id:4": -1.0}]);
    assert_eq!(completion["top_logprobs"], top);
    let chat = &body(Api::ChatCompletions)["content"][0];
    assert_eq!((&chat["token"], &chat["bytes"]), (&json!("token_id:7"), &json!([98])));
    assert_eq!(chat["top_logprobs"][1]["token"], "token_id:4");
}

/// As in vLLM: in every body, in the last frame of a chat's choice, in every frame of the other APIs.
#[test]
fn what_stopped_a_choice_is_told() {
    let check = |api, stop: Option<StopReason>, expect: Value| {
        let finished = Event::Finished { choice: 0, reason: FinishReason::Stop, stop };
        let events = [STARTED, delta(0, "a"), finished, DONE];
        let spec = spec(api, 1, false);
        let frames = frames(&stream(&spec, &events));
        let told: Vec<_> = frames.iter().map(|frame| frame["choices"][0].get("stop_reason")).collect();
        let (last, before) = told.split_last().unwrap();
        assert_eq!(*last, Some(&expect));
        let expect_before = (api != Api::ChatCompletions).then_some(&Value::Null);
        assert!(before.iter().all(|told| *told == expect_before), "{before:?}");
        let body: Value = serde_json::from_str(&collect(&spec, &events).unwrap()).unwrap();
        assert_eq!(body["choices"][0].get("stop_reason"), Some(&expect));
    };
    for api in [Api::ChatCompletions, Api::Completions] {
        check(api, None, Value::Null);
        check(api, Some(StopReason::Text("\n\"END\"".into())), json!("\n\"END\""));
        check(api, Some(StopReason::Token(7)), json!(7));
    }
}

#[test]
fn half_a_reply_is_no_body() {
    let check = |events: &[Event], expect| {
        assert_eq!(collect(&spec(Api::Completions, 1, false), events), Err(expect));
    };
    check(&[STARTED, delta(0, "a")], CollectError::Cut);
    check(&[STARTED, delta(0, "a"), finished(0, FinishReason::Stop)], CollectError::Cut);
    check(&[STARTED, delta(0, "a"), DONE], CollectError::Cut);
    check(&[STARTED, finished(0, FinishReason::Error), DONE], CollectError::EngineFailed);
    check(
        &[delta(5, "a"), finished(0, FinishReason::Stop), DONE],
        CollectError::UnknownChoice { choice: 5, choices: 1 },
    );
}

/// What we render is what our own scanner reads in a stack above.
#[test]
fn our_frames_scan() {
    let events = [STARTED, delta(0, "a"), delta(0, "\"usage\":{}"), finished(0, FinishReason::Stop), DONE];
    for api in [Api::ChatCompletions, Api::Completions] {
        let mut splitter = crate::SseSplitter::new();
        splitter.push(stream(&spec(api, 1, true), &events).into());
        let mut deltas = 0;
        let mut usage = None;
        let mut done = false;
        while let Some(frame) = splitter.next_frame().unwrap() {
            let info = crate::scan_frame(&frame);
            deltas += info.deltas;
            usage = info.usage.or(usage);
            done = info.done;
            assert!(!info.error);
        }
        let Event::Done { usage: expect } = DONE else { unreachable!() };
        assert_eq!((deltas, usage, done), (2, Some(expect), true));
    }
}

/// A piece of call `index`; the first one has a name.
fn call(index: u32, name: Option<&str>, arguments: &str) -> Event {
    let piece = ToolCallDelta {
        index,
        id: name.map(|_| format!("call_{index}")),
        name: name.map(Into::into),
        arguments: arguments.into(),
    };
    Event::Delta(Delta { tokens: 1, tool_calls: vec![piece], ..Delta::default() })
}

#[test]
fn tool_calls_and_reasoning() {
    let reasoning = Event::Delta(Delta { reasoning: "hm".into(), tokens: 1, ..Delta::default() });
    let events = [
        STARTED,
        reasoning,
        call(0, Some("f"), ""),
        call(0, None, r#"{"a":"#),
        call(0, None, "1}"),
        call(1, Some("g"), "{}"),
        finished(0, FinishReason::ToolCalls),
        DONE,
    ];
    let spec = spec(Api::ChatCompletions, 1, false);
    let frames = frames(&stream(&spec, &events));
    let deltas: Vec<_> = frames[1..].iter().map(|frame| frame["choices"][0]["delta"].clone()).collect();
    let first = |index: u32, name: &str, arguments: &str| {
        let function = json!({"name": name, "arguments": arguments});
        let call =
            json!({"index": index, "id": format!("call_{index}"), "type": "function", "function": function});
        json!({"tool_calls": [call]})
    };
    let more = |arguments: &str| json!({"tool_calls": [{"index": 0, "function": {"arguments": arguments}}]});
    assert_eq!(
        deltas,
        [
            json!({"reasoning": "hm", "reasoning_content": "hm"}),
            first(0, "f", ""),
            more(r#"{"a":"#),
            more("1}"),
            first(1, "g", "{}"),
            json!({}),
        ]
    );
    assert_eq!(frames[6]["choices"][0]["finish_reason"], "tool_calls");

    let body: Value = serde_json::from_str(&collect(&spec, &events).unwrap()).unwrap();
    let whole = |id: &str, name: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
    assert_eq!(
        body["choices"][0]["message"],
        json!({
            "role": "assistant",
            "content": null,
            "refusal": null,
            "reasoning": "hm",
            "reasoning_content": "hm",
            "tool_calls": [whole("call_0", "f", r#"{"a":1}"#), whole("call_1", "g", "{}")],
        })
    );
}

#[test]
fn text_beside_a_call_is_content() {
    let both = Event::Delta(Delta {
        text: "so".into(),
        tool_calls: vec![ToolCallDelta {
            id: Some("call_0".into()),
            name: Some("f".into()),
            ..ToolCallDelta::default()
        }],
        tokens: 1,
        ..Delta::default()
    });
    let events = [STARTED, both, finished(0, FinishReason::ToolCalls), DONE];
    let spec = spec(Api::ChatCompletions, 1, false);
    let delta = frames(&stream(&spec, &events))[1]["choices"][0]["delta"].clone();
    assert_eq!(delta["content"], "so");
    assert_eq!(delta["tool_calls"][0]["function"], json!({"name": "f", "arguments": ""}));
    let body: Value = serde_json::from_str(&collect(&spec, &events).unwrap()).unwrap();
    assert_eq!(body["choices"][0]["message"]["content"], "so");
}
