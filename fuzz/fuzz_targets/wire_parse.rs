//! Every endpoint of the LLM API: `METHOD PATH [CONTENT-TYPE]`, a line break, the body.
//!
//! Any bytes give a call or an error. A call is within its limits, and the body that is forwarded for it is read as
//! the same call by the next server.
#![no_main]

use bytes::Bytes;
use forebay_types::Classify;
use forebay_wire::{Ask, Embed, Generate, Prompt, for_upstream, parse, with_model};
use http::Method;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some(end) = data.iter().position(|byte| *byte == b'\n') else { return };
    let Ok(head) = std::str::from_utf8(&data[..end]) else { return };
    let mut words = head.splitn(3, ' ');
    let Ok(method) = Method::from_bytes(words.next().unwrap_or_default().as_bytes()) else { return };
    let path = words.next().unwrap_or_default();
    let body = Bytes::copy_from_slice(&data[end + 1..]);
    match parse(&method, path, words.next(), &body, None) {
        Ok(Ask::Generate(call)) => check(&call),
        Ok(Ask::Embed(call)) => check_embed(&call),
        Ok(_) => {}
        Err(error) => {
            let _ = (error.class(), error.param());
            // What a client sent is not echoed at length.
            let text = error.to_string();
            assert!(text.len() < 2048 + method.as_str().len(), "{} bytes of message", text.len());
        }
    }
});

fn check_embed(call: &Embed) {
    assert!((1..=2048).contains(&call.input.count()));
    if let Prompt::Tokens(prompts) = &call.input {
        assert!(prompts.iter().all(|prompt| !prompt.is_empty()));
    }
    assert!(call.dimensions != Some(0));
    let forwarded = with_model(&call.body, "other").expect("what was parsed can be spliced");
    let Ok(Ask::Embed(again)) = parse(&Method::POST, "/v1/embeddings", None, &forwarded, None) else {
        panic!("the forwarded body is not understood: {forwarded:?}");
    };
    assert_eq!(again.model.as_str(), "other");
    let same = Embed { model: call.model.clone(), body: call.body.clone(), ..(*again).clone() };
    assert_eq!(format!("{same:?}"), format!("{call:?}"));
}

fn check(call: &Generate) {
    assert!(call.n >= 1 && call.prompt.count() >= 1);
    if let Prompt::Tokens(prompts) = &call.prompt {
        assert!(prompts.iter().all(|prompt| !prompt.is_empty()));
    }
    let sampling = &call.sampling;
    assert!(sampling.temperature.is_finite() && sampling.temperature >= 0.0);
    assert!(sampling.top_p > 0.0 && sampling.top_p <= 1.0);
    assert!((0.0..=1.0).contains(&sampling.min_p));
    assert!(sampling.repetition_penalty.is_finite() && sampling.repetition_penalty > 0.0);
    assert!((-2.0..=2.0).contains(&sampling.presence_penalty));
    assert!((-2.0..=2.0).contains(&sampling.frequency_penalty));
    assert!(sampling.logit_bias.len() <= 1024);
    assert!(sampling.logit_bias.iter().all(|(_, bias)| (-100.0..=100.0).contains(bias)));
    assert!(call.logprobs.is_none_or(|top| top <= 20));

    let forwarded = for_upstream(call, "other").expect("what was parsed can be spliced");
    let path = match call.api {
        forebay_wire::Api::ChatCompletions => "/v1/chat/completions",
        forebay_wire::Api::Completions => "/v1/completions",
        forebay_wire::Api::Tokens => "/inference/v1/generate",
    };
    let Ok(Ask::Generate(again)) = parse(&Method::POST, path, None, &forwarded, None) else {
        panic!("the forwarded body is not understood: {forwarded:?}");
    };
    assert_eq!(again.model.as_str(), "other");
    assert!(!call.stream || again.include_usage, "a stream without usage can't be accounted");
    let same = Generate {
        model: call.model.clone(),
        include_usage: call.include_usage,
        body: call.body.clone(),
        ..*again
    };
    assert_eq!(format!("{same:?}"), format!("{call:?}"));
}
