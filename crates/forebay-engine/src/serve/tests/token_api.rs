//! Token ids in and out, and what a call would generate from.

use forebay_wire::ToolChoice;

use super::*;

fn ids(events: &[Event]) -> Vec<u32> {
    let of = |event: &Event| match event {
        Event::Delta(delta) => delta.token_ids.clone(),
        _ => Vec::new(),
    };
    events.iter().flat_map(of).collect()
}

fn bytes_of(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

fn by_tokens(prompt: &str) -> Generate {
    Generate {
        api: Api::Tokens,
        prompt: Prompt::Tokens(vec![bytes_of(prompt)]),
        return_token_ids: true,
        ..greedy("")
    }
}

#[tokio::test]
async fn every_token_is_returned() {
    let bench = bench(says("hi", "yes"), |_| {});
    let events = bench.events(by_tokens("hi")).await.unwrap();
    // With the one that ended it, as in vLLM.
    assert_eq!(ids(&events), [bytes_of("yes"), vec![EOS]].concat());
    // At once, also where the text is held back for a stop string.
    let call = Generate { stop: vec!["yes!".into()], logprobs: Some(0), ..by_tokens("hi") };
    let events = bench.events(call).await.unwrap();
    let deltas =
        || events.iter().filter_map(|e| if let Event::Delta(delta) = e { Some(delta) } else { None });
    assert!(deltas().all(|delta| delta.token_ids.len() == 1 && delta.logprobs.len() == 1), "{events:?}");
    assert_eq!(deltas().count(), 4);
    // Who did not ask gets none.
    assert_eq!(ids(&bench.events(greedy("hi")).await.unwrap()), [0u32; 0]);
}

#[tokio::test]
async fn the_rest_of_the_context_is_the_default() {
    let bench = bench(fake(), |config| config.model_len_max = 10);
    let events =
        bench.events(Generate { max_tokens: None, ignore_eos: true, ..by_tokens("hi") }).await.unwrap();
    assert_eq!(usage(&events).completion_tokens, 8);
    let fault = bench.start(by_tokens(&"x".repeat(10))).await.unwrap_err();
    assert_eq!((fault.class.code, fault.param.as_deref()), (Code::ContextLengthExceeded, Some("token_ids")));
    let call = Generate { prompt: Prompt::Tokens(vec![vec![VOCAB as u32]]), ..by_tokens("") };
    assert_eq!(bench.start(call).await.unwrap_err().param.as_deref(), Some("token_ids"));
}

#[tokio::test]
async fn what_is_rendered_is_what_is_generated_from() {
    let bench = bench(fake(), |config| config.model_len_max = 100);
    let render = async |call: Generate| {
        let mut reply = bench.call(Ask::Render(Box::new(call))).await.unwrap();
        match reply.chunks.next().await {
            Some(Ok(Chunk::Verbatim { bytes, .. })) => {
                serde_json::from_slice::<serde_json::Value>(&bytes).expect("is JSON")
            }
            other => panic!("{other:?}"),
        }
    };
    let both = Prompt::Text(vec!["ab".into(), "c".into()]);
    let rendered = render(Generate { prompt: both, ..greedy("") }).await;
    assert_eq!(rendered[0]["token_ids"], serde_json::json!([97, 98]));
    assert_eq!(rendered[1]["token_ids"], serde_json::json!([99]));
    assert_eq!(rendered[0]["sampling_params"]["max_tokens"], 32);
    let rendered = render(Generate { max_tokens: None, ..greedy("abc") }).await;
    assert_eq!(rendered[0]["sampling_params"]["max_tokens"], 16, "the API's default");
    let call = Ask::Render(Box::new(Generate { max_tokens: Some(99), ..greedy("abc") }));
    let fault = bench.call(call).await.unwrap_err();
    assert_eq!(fault.class.code, Code::ContextLengthExceeded, "as the call itself");
}

#[tokio::test]
async fn what_would_be_lost_is_not_rendered() {
    let bench = bench(fake(), |_| {});
    let check = async |call: Generate, code: Code, param: &str| {
        let fault = bench.call(Ask::Render(Box::new(call))).await.unwrap_err();
        assert_eq!((fault.class.code, fault.param.as_deref()), (code, Some(param)), "{fault}");
    };
    let need = Need { param: "use_beam_search".into(), what: "the engine samples" };
    check(Generate { needs: vec![need], ..greedy("a") }, Code::NotSupported, "use_beam_search").await;
    for tool_choice in [ToolChoice::Required, ToolChoice::Function("f".into())] {
        check(Generate { tool_choice, ..greedy("a") }, Code::BadRequest, "tool_choice").await;
    }
    for tool_choice in [ToolChoice::Auto, ToolChoice::None] {
        let call = Generate { tool_choice, ..greedy("a") };
        assert!(bench.call(Ask::Render(Box::new(call))).await.is_ok());
    }
}
