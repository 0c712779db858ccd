//! Aborting, pausing and resuming from outside.

use super::*;
use crate::serve::{Aborted, PauseMode};

fn endless(prompt: &str) -> Generate {
    Generate { ignore_eos: true, max_tokens: Some(100_000), ..greedy(prompt) }
}

fn long_running() -> Bench {
    let blocks = 60_000;
    let executor = FakeExecutor::new(VOCAB, 4, blocks);
    bench(executor, |config| (config.model_len_max, config.blocks) = (200_000, blocks as u32))
}

async fn rest(mut reply: Reply) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some(chunk) = reply.chunks.next().await {
        match chunk.expect("no error") {
            Chunk::Event(event) => events.push(event),
            other => panic!("{other:?}"),
        }
    }
    events
}

const WAITS: &str = "vllm:num_requests_waiting{engine=\"0\",model_name=\"fake\"} 1";
const NOBODY_WAITS: &str = "vllm:num_requests_waiting{engine=\"0\",model_name=\"fake\"} 0";
const IDLE: &str = "vllm:num_requests_running{engine=\"0\",model_name=\"fake\"} 0";

#[tokio::test]
async fn an_aborted_request_keeps_what_it_has() {
    let check = async |which: Aborted, is_meant: bool| {
        let bench = long_running();
        // The bench calls every request `test`.
        let call = Generate { request_id: Some("mine".into()), ..endless("hi") };
        let reply = bench.start(call).await.unwrap();
        bench.engine.abort(which).await.unwrap();
        if !is_meant {
            bench.engine.abort(Aborted::All).await.unwrap();
        }
        let events = rest(reply).await;
        assert_eq!(reason(&events, 0), Some(FinishReason::Abort));
        let told: u32 = events.iter().map(|e| if let Event::Delta(d) = e { d.tokens } else { 0 }).sum();
        assert_eq!(usage(&events).completion_tokens, told, "every token that was counted was sent");
        bench.wait_for(IDLE).await;
    };
    check(Aborted::All, true).await;
    check(Aborted::ids(["other".into(), "test".into()]), true).await;
    check(Aborted::ids(["cmpl-test".into()]), true).await;
    check(Aborted::ids(["mine".into()]), true).await;
    check(Aborted::ids(["cmpl-mine".into()]), true).await;
    check(Aborted::ids(["tes".into(), "cmpl-".into(), "cmpl-min".into()]), false).await;
}

#[tokio::test]
async fn all_choices_of_an_aborted_request_end() {
    let bench = long_running();
    let call = Generate { n: 3, max_tokens: Some(2000), ..endless("hi") };
    let reply = bench.start(call).await.unwrap();
    bench.engine.abort(Aborted::All).await.unwrap();
    let events = rest(reply).await;
    for choice in 0..3 {
        assert_eq!(reason(&events, choice), Some(FinishReason::Abort), "{choice}");
    }
}

#[tokio::test]
async fn a_paused_engine_takes_requests_up_later() {
    let bench = bench(says("hi", "yes"), |_| {});
    bench.engine.pause(PauseMode::Abort, true).await.unwrap();
    assert!(bench.engine.is_paused());
    let resume = async {
        bench.wait_for(WAITS).await;
        bench.engine.resume().await.unwrap();
    };
    let (events, ()) = tokio::join!(bench.events(greedy("hi")), resume);
    assert_eq!(text(&events.unwrap(), 0), "yes");
    assert!(!bench.engine.is_paused());
}

#[tokio::test]
async fn a_pause_aborts_finishes_or_keeps() {
    let bench = long_running();
    let reply = bench.start(endless("hi")).await.unwrap();
    bench.engine.pause(PauseMode::Abort, false).await.unwrap();
    assert_eq!(reason(&rest(reply).await, 0), Some(FinishReason::Abort));
    bench.engine.resume().await.unwrap();

    let reply = bench.start(Generate { max_tokens: Some(50), ..endless("hi") }).await.unwrap();
    bench.engine.pause(PauseMode::Wait, false).await.unwrap();
    let events = rest(reply).await;
    assert_eq!((reason(&events, 0), usage(&events).completion_tokens), (Some(FinishReason::Length), 50));
    bench.engine.resume().await.unwrap();

    let reply = bench.start(Generate { max_tokens: Some(50), ..endless("hi") }).await.unwrap();
    bench.engine.pause(PauseMode::Keep, true).await.unwrap();
    bench.engine.resume().await.unwrap();
    assert_eq!(usage(&rest(reply).await).completion_tokens, 50, "nothing is lost");
}

#[tokio::test]
async fn a_resume_also_ends_a_pause_that_is_not_complete() {
    let bench = long_running();
    let reply = bench.start(endless("hi")).await.unwrap();
    let resume = async {
        while !bench.engine.is_paused() {
            tokio::task::yield_now().await;
        }
        bench.engine.resume().await
    };
    assert_eq!(tokio::join!(bench.engine.pause(PauseMode::Wait, false), resume), (Ok(()), Ok(())));
    drop(reply);
}

#[tokio::test]
async fn a_deadline_counts_during_a_pause() {
    // The configuration refuses 0 at the start; here it makes the deadline certain.
    let request_timeout = forebay_config::HumanDuration::from_millis(0);
    let bench = bench_with(fake(), |_| {}, EngineConfig { request_timeout, ..EngineConfig::default() });
    bench.engine.pause(PauseMode::Wait, false).await.unwrap();
    let fault = bench.events(greedy("hi")).await.unwrap_err();
    assert_eq!(fault.class.code, Code::UpstreamTimeout, "{fault}");
    assert!(bench.engine.is_paused());
}

#[tokio::test]
async fn clients_that_leave_during_a_pause_are_noticed() {
    let bench = long_running();
    let reply = bench.start(endless("hi")).await.unwrap();
    bench.engine.pause(PauseMode::Keep, false).await.unwrap();
    tokio::select! {
        _ = bench.start(endless("hi")) => panic!("nothing is computed"),
        () = bench.wait_for(WAITS) => {}
    }
    bench.wait_for(NOBODY_WAITS).await;
    drop(reply);
    bench.wait_for(IDLE).await;
    assert!(bench.engine.is_paused());
}

#[tokio::test]
async fn what_waits_for_a_resume_can_be_aborted() {
    let bench = long_running();
    bench.engine.pause(PauseMode::Wait, false).await.unwrap();
    let abort = async {
        bench.wait_for(WAITS).await;
        bench.engine.abort(Aborted::All).await.unwrap();
    };
    let (events, ()) = tokio::join!(bench.events(endless("hi")), abort);
    let events = events.unwrap();
    assert_eq!((reason(&events, 0), usage(&events).completion_tokens), (Some(FinishReason::Abort), 0));
}

#[tokio::test]
async fn a_clear_pause_forgets_the_cache() {
    let bench = bench(says("a long prompt", "yes"), |_| {});
    let cached = async || match bench.events(greedy("a long prompt")).await.unwrap().first() {
        Some(Event::Started { cached_tokens, .. }) => *cached_tokens,
        other => panic!("{other:?}"),
    };
    assert_eq!(cached().await, 0);
    assert_eq!(cached().await, 12);
    bench.engine.pause(PauseMode::Abort, true).await.unwrap();
    bench.engine.resume().await.unwrap();
    assert_eq!(cached().await, 0);
}

#[tokio::test]
async fn a_paused_engine_can_be_stopped() {
    let bench = long_running();
    let reply = bench.start(Generate { max_tokens: Some(9), ..endless("hi") }).await.unwrap();
    bench.engine.pause(PauseMode::Keep, false).await.unwrap();
    let Bench { engine, .. } = bench;
    tokio::task::spawn_blocking(move || engine.stop()).await.unwrap();
    assert_eq!(usage(&rest(reply).await).completion_tokens, 9);
}

#[tokio::test]
async fn load_is_told() {
    let bench = long_running();
    assert_eq!((bench.engine.load().running, bench.engine.load().waiting), (0, 0));
    let reply = bench.start(endless("hi")).await.unwrap();
    bench.wait_for("vllm:num_requests_running{engine=\"0\",model_name=\"fake\"} 1").await;
    let load = bench.engine.load();
    assert_eq!((load.running, load.waiting), (1, 0));
    assert!(load.kv_usage > 0.0);
    drop(reply);
}

#[tokio::test]
async fn the_engines_seed_is_for_those_that_bring_none() {
    let answers = async |seed: Option<u64>| {
        let bench = bench_with(fake(), |_| {}, EngineConfig { seed, ..EngineConfig::default() });
        let mut answers = Vec::new();
        for _ in 0..3 {
            let sampling = Sampling { temperature: 2.0, ..Sampling::default() };
            answers.push(text(&bench.events(Generate { sampling, ..greedy("hi") }).await.unwrap(), 0));
        }
        answers
    };
    let first = answers(Some(5)).await;
    assert_eq!(first, answers(Some(5)).await);
    assert_ne!(first, answers(Some(6)).await);
    assert_ne!(first[0], first[1]);
}

#[tokio::test]
async fn logprobs_are_limited_by_the_engine() {
    let bench = bench_with(fake(), |_| {}, EngineConfig { max_logprobs: 1, ..EngineConfig::default() });
    let check = async |logprobs: Option<u32>, prompt_logprobs: Option<u32>, expect: Option<&str>| {
        let fault = bench.start(Generate { logprobs, prompt_logprobs, ..greedy("hi") }).await.err();
        let refused = fault.as_ref().map(|fault| (fault.class.code, fault.param.as_deref()));
        assert_eq!(refused, expect.map(|param| (Code::BadRequest, Some(param))));
    };
    check(Some(1), Some(1), None).await;
    check(Some(2), None, Some("logprobs")).await;
    check(None, Some(2), Some("prompt_logprobs")).await;
}
