use bytes::{Bytes, BytesMut};
use forebay_types::{FinishReason, Usage};
use http::Method;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{
    Api, Ask, Collector, Delta, Event, Prompt, RenderSpec, Renderer, Sampling, StopReason, TopLogprob, parse,
};

const PATH: &str = "/inference/v1/generate";

fn parsed(path: &str, body: &Value) -> Result<Generate, crate::ParseError> {
    let ask = parse(&Method::POST, path, Some("application/json"), &Bytes::from(body.to_string()), None)?;
    match ask {
        Ask::Generate(call) | Ask::Render(call) => Ok(*call),
        other => panic!("{other:?}"),
    }
}

#[test]
fn ids_and_sampling_are_read() {
    let call = parsed(
        PATH,
        &json!({
            "request_id": "r", "model": "m", "token_ids": [5, 6], "stream": true, "priority": -1,
            "stream_options": {"include_usage": true}, "cache_salt": "s",
            "sampling_params": {"temperature": 0, "max_tokens": 7, "logprobs": 2, "seed": -3, "detokenize": false},
        }),
    )
    .expect("is right");
    assert_eq!(call.api, Api::Tokens);
    assert!(matches!(&call.prompt, Prompt::Tokens(ids) if *ids == [vec![5, 6]]));
    assert_eq!((call.max_tokens, call.logprobs, call.priority), (Some(7), Some(2), -1));
    assert_eq!((call.stream, call.include_usage, call.cache_salt.as_deref()), (true, true, Some("s")));
    let expect = Sampling { left_open: call.sampling.left_open, ..Sampling::default() };
    assert_eq!(call.sampling, Sampling { temperature: 0.0, seed: Some(-3i64 as u64), ..expect });
    assert_eq!(call.request_id.as_deref(), Some("r"));
    assert!(call.return_token_ids && call.needs.is_empty(), "{:?}", call.needs);
}

#[test]
fn mistakes_are_told_where_they_stand() {
    let check = |change: Value, expect: &str| {
        let mut body = json!({"model": "m", "token_ids": [1], "sampling_params": {}});
        for (key, value) in change.as_object().expect("an object") {
            body[key] = value.clone();
        }
        let told = match parsed(PATH, &body) {
            Ok(call) => call.needs.first().map(|need| need.param.clone()).unwrap_or_default(),
            Err(error) => error.to_string(),
        };
        assert!(told.contains(expect), "{change}: {told}");
    };
    check(json!({"token_ids": null}), "Missing required parameter: 'token_ids'");
    check(json!({"token_ids": []}), "'token_ids'");
    check(json!({"token_ids": [-1]}), "'token_ids'");
    check(json!({"token_ids": [1.5]}), "'token_ids'");
    check(json!({"sampling_params": null}), "Missing required parameter: 'sampling_params'");
    check(json!({"sampling_params": 1}), "'sampling_params'");
    check(json!({"model": null}), "Missing required parameter: 'model'");
    check(json!({"priority": "high"}), "Invalid type for 'priority'");
    check(json!({"sampling_params": {"temperature": 9}}), "'sampling_params.temperature'");
    check(json!({"sampling_params": {"stop": [""]}}), "'sampling_params.stop'");
    check(json!({"sampling_params": {"logprobs": 1001}}), "'sampling_params.logprobs'");
    // Noted for whoever answers.
    check(json!({"kv_transfer_params": {}}), "kv_transfer_params");
    check(json!({"output_mode": "text"}), "output_mode");
    check(json!({"sampling_params": {"use_beam_search": true}}), "sampling_params.use_beam_search");
    // The one beside counts, not the one inside: nobody can say two things at once.
    check(json!({"sampling_params": {"stream": "x"}, "stream": false}), "");
}

fn spec(stream: bool) -> RenderSpec {
    let mut call = Generate::new(Api::Tokens, "m".into(), Prompt::Tokens(vec![vec![1, 2]]));
    (call.stream, call.include_usage, call.return_token_ids) = (stream, stream, true);
    RenderSpec::new(&call)
}

fn events() -> Vec<Event> {
    let logprob = TokenLogprob {
        token: 7,
        text: "x".into(),
        bytes: b"x".to_vec(),
        logprob: Some(-0.5),
        top: vec![TopLogprob { token: 9, text: "y".into(), bytes: b"y".to_vec(), logprob: -0.25 }],
    };
    let delta =
        |id, logprobs| Event::Delta(Delta { token_ids: vec![id], tokens: 1, logprobs, ..Delta::default() });
    vec![
        Event::Started { prompt_tokens: 2, cached_tokens: 0 },
        delta(7, vec![logprob]),
        delta(8, vec![]),
        Event::Finished { choice: 0, reason: FinishReason::Stop, stop: Some(StopReason::Token(8)) },
        Event::Done { usage: Usage { prompt_tokens: 2, completion_tokens: 2, ..Usage::default() } },
    ]
}

#[test]
fn replies_have_ids() {
    let spec = spec(false);
    let mut collector = Collector::new("r", 5, &spec);
    events().into_iter().for_each(|event| collector.push(event));
    let body: Value = serde_json::from_slice(&collector.finish().expect("is whole")).expect("is JSON");
    let named =
        |id: u32, logprob: f64| json!({"token": format!("token_id:{id}"), "logprob": logprob, "bytes": null});
    let mut entry = named(7, -0.5);
    entry["top_logprobs"] = json!([named(9, -0.25)]);
    assert_eq!(
        body,
        json!({
            "request_id": "generate-tokens-r", "created": 5, "model": "m",
            "choices": [{
                "index": 0, "token_ids": [7, 8], "logprobs": {"content": [entry]}, "finish_reason": "stop", "stop_reason": 8,
            }],
            "usage": {
                "prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
            "prompt_logprobs": null, "kv_transfer_params": null,
        })
    );
}

#[test]
fn frames_have_ids() {
    let mut renderer = Renderer::new("r", 5, &spec(true));
    let mut out = BytesMut::new();
    events().iter().for_each(|event| renderer.frame(event, &mut out));
    let text = String::from_utf8(out.to_vec()).expect("is text");
    let frames: Vec<&str> =
        text.split_terminator("\n\n").map(|frame| frame.trim_start_matches("data: ")).collect();
    assert_eq!(frames.len(), 5, "{text}");
    let choices: Vec<Value> = frames[..4]
        .iter()
        .map(|frame| serde_json::from_str::<Value>(frame).expect("is JSON")["choices"].clone())
        .collect();
    assert_eq!(choices[0][0]["token_ids"], json!([7]));
    let choice = |ids: &[u32], finish: Option<&str>, stop: Option<u32>| json!({"index": 0, "token_ids": ids, "logprobs": null, "finish_reason": finish, "stop_reason": stop});
    assert_eq!(choices[1][0], choice(&[8], None, None));
    assert_eq!(choices[2][0], choice(&[], Some("stop"), Some(8)));
    assert_eq!(choices[3], json!([]));
    assert_eq!(frames[4], "[DONE]");
}

proptest! {
    /// Who sends what was rendered gets what the call would have got.
    #[test]
    fn what_is_rendered_is_the_same_call(
        temperature in 0.0f32..2.0,
        top_p in 0.01f32..1.0,
        top_k in 0u32..100,
        seed in proptest::option::of(any::<i64>().prop_filter("-1 is none", |seed| *seed != -1)),
        stop in proptest::collection::vec("[a-z\"é]{1,5}", 0..3),
        bias in proptest::collection::btree_map(0u32..500, -100.0f32..100.0, 0..3),
        chat in any::<bool>(),
        regex in proptest::option::of("[a-z]{1,9}"),
        logprobs in proptest::option::of(0u32..20),
        scored in proptest::collection::vec(0u32..500, 0..3),
        n in 1u32..4,
    ) {
        let mut body = json!({
            "model": "m", "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "stop": stop, "n": n,
            "logit_bias": bias.iter().map(|(id, bias)| (id.to_string(), *bias)).collect::<std::collections::BTreeMap<_, _>>(),
        });
        if let Some(regex) = regex {
            body["structured_outputs"] = json!({"regex": regex});
        }
        if logprobs.is_some() && !scored.is_empty() {
            body["logprob_token_ids"] = json!(scored);
        }
        let path = if chat {
            body["messages"] = json!([{"role": "user", "content": "hi"}]);
            body["logprobs"] = logprobs.is_some().into();
            body["top_logprobs"] = json!(logprobs);
            "/v1/chat/completions/render"
        } else {
            body["prompt"] = "hi".into();
            body["logprobs"] = json!(logprobs);
            "/v1/completions/render"
        };
        let call = parsed(path, &body).expect("is right");
        let ids = [1u32, 2];
        let rendered = render_tokens_calls("r", &call, &[TokensCall { token_ids: &ids, max_tokens: 9 }]);
        let rendered: Value = serde_json::from_slice(&rendered).expect("is JSON");
        let one = if chat { rendered } else { rendered[0].clone() };
        let again = parsed(PATH, &one).expect("is understood");
        // What is rendered leaves nothing open.
        let expect = Sampling { left_open: again.sampling.left_open, ..call.sampling };
        prop_assert_eq!(again.sampling, expect);
        prop_assert_eq!((again.stop, again.n, again.logprobs), (call.stop, call.n, call.logprobs));
        prop_assert_eq!(again.logprob_token_ids, call.logprob_token_ids);
        prop_assert_eq!(again.constraint, call.constraint);
        prop_assert_eq!(again.max_tokens, Some(9));
        prop_assert!(matches!(again.prompt, Prompt::Tokens(prompts) if prompts == [vec![1, 2]]));
    }
}
