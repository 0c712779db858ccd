//! Clients that leave, one and thousands, and clients that do not read.

use forebay_types::TokenId;
use futures_util::{FutureExt, stream};

use super::held::held;
use super::*;

const ABORTED: &str =
    "vllm:request_success_total{engine=\"0\",finished_reason=\"abort\",model_name=\"fake\"} 1";

/// Nobody runs, nobody waits, no block is held.
async fn all_is_free(bench: &Bench) {
    for name in ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"] {
        bench.wait_for(&format!("vllm:{name}{{engine=\"0\",model_name=\"fake\"}} 0")).await;
    }
}

fn of_length(prompt: &str, tokens: u32) -> Generate {
    Generate { ignore_eos: true, max_tokens: Some(tokens), return_token_ids: true, ..greedy(prompt) }
}

fn output(events: &[Event]) -> Vec<TokenId> {
    let ids = |event: &Event| if let Event::Delta(delta) = event { delta.token_ids.clone() } else { vec![] };
    events.iter().flat_map(ids).collect()
}

/// What the executor says after a prompt, computed without an engine.
fn expected(fake: &FakeExecutor, call: &Generate) -> Vec<TokenId> {
    let Prompt::Text(prompts) = &call.prompt else { panic!("a text") };
    let mut tokens: Vec<TokenId> = prompts[0].bytes().map(TokenId::from).collect();
    let prompt = tokens.len();
    for _ in 0..call.max_tokens.expect("is set") {
        tokens.push(fake.next_after(&tokens));
    }
    tokens.split_off(prompt)
}

#[tokio::test]
async fn a_client_that_leaves_is_in_no_further_step() {
    let (held, begun, open) = held(fake());
    let bench = bench(held, |c| c.model_len_max = 200);
    let has_begun = || begun.recv_timeout(Duration::from_secs(20)).expect("a step begins");
    open.send(()).unwrap();
    let reply = bench.start(of_length("to be continued", 150)).await.unwrap();
    has_begun();
    // It leaves while its second step is computed: that is the last that it is in.
    has_begun();
    drop(reply);
    open.send(()).unwrap();
    bench.wait_for(ABORTED).await;
    all_is_free(&bench).await;
    assert!(begun.try_recv().is_err(), "a step began for nobody");
}

#[tokio::test]
async fn a_client_that_leaves_before_its_first_token_frees_its_place() {
    let (held, begun, open) = held(fake());
    let bench = bench(held, |_| {});
    let mut start = Box::pin(bench.start(of_length("too slow for me", 20)));
    while begun.try_recv().is_err() {
        assert!(start.as_mut().now_or_never().is_none(), "no step has ended");
        tokio::task::yield_now().await;
    }
    drop(start);
    open.send(()).unwrap();
    bench.wait_for(ABORTED).await;
    all_is_free(&bench).await;
    assert!(begun.try_recv().is_err(), "a step began for nobody");
}

#[tokio::test]
async fn who_does_not_read_stops_nobody_and_loses_nothing() {
    let bench = bench(fake(), |_| {});
    let slow = of_length("the slow reader", 100);
    let reply = bench.start(slow.clone()).await.unwrap();
    let quick = of_length("another", 40);
    assert_eq!(output(&bench.events(quick.clone()).await.unwrap()), expected(&fake(), &quick));
    all_is_free(&bench).await;
    assert_eq!(output(&read(reply).await), expected(&fake(), &slow));
}

async fn read(mut reply: Reply) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some(chunk) = reply.chunks.next().await {
        match chunk.expect("no fault") {
            Chunk::Event(event) => events.push(event),
            other => panic!("the engine sends events, not {other:?}"),
        }
    }
    events
}

/// What a client of the storm does.
#[derive(Clone, Copy, Debug)]
enum Client {
    Reads,
    /// Reads when all others are done.
    ReadsLast,
    /// Leaves when it has looked so often whether its answer begins.
    LeavesWaiting(u32),
    /// Leaves after so many events.
    LeavesAfter(u32),
}

/// Gives back the reply of who reads last.
async fn visit<'c>(bench: &Bench, call: &'c Generate, client: Client) -> Option<(&'c Generate, Reply)> {
    let mut start = Box::pin(bench.start(call.clone()));
    if let Client::LeavesWaiting(looks) = client {
        for _ in 0..looks {
            if start.as_mut().now_or_never().is_some() {
                break;
            }
            tokio::task::yield_now().await;
        }
        return None;
    }
    let mut reply = start.await.expect("there is room for all");
    match client {
        Client::ReadsLast => return Some((call, reply)),
        Client::LeavesAfter(events) => {
            let mut left = events;
            while left > 0 && reply.chunks.next().await.is_some() {
                left -= 1;
            }
        }
        _ => assert_eq!(output(&read(reply).await), expected(&fake(), call), "{client:?}: {call:?}"),
    }
    None
}

/// Thousands of short requests over few blocks, so that sequences wait and are preempted, and half of the clients leave.
#[tokio::test]
async fn a_storm_of_cancellations_leaves_nothing_behind() {
    const REQUESTS: u32 = 3000;
    const AT_ONCE: usize = 200;
    let mut state = 4u64;
    let mut below = move |n: u32| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 33) % u64::from(n)) as u32
    };
    let bench = bench(fake(), |c| c.running_max = 32);
    let clients: Vec<(Generate, Client)> = (0..REQUESTS)
        .map(|i| {
            // A tenth of the beginnings is shared.
            let begin = if below(10) == 0 { "as others begin ".into() } else { format!("{i}: ") };
            let call = of_length(&format!("{begin}{}", "x".repeat(below(20) as usize)), 1 + below(12));
            let client = match below(16) {
                0..7 => Client::Reads,
                7 => Client::ReadsLast,
                8..12 => Client::LeavesWaiting(below(30)),
                _ => Client::LeavesAfter(below(8)),
            };
            (call, client)
        })
        .collect();
    let kept: Vec<_> = stream::iter(&clients)
        .map(|(call, client)| visit(&bench, call, *client))
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    all_is_free(&bench).await;
    assert!(!bench.registry.render().contains("finished_reason=\"abort\",model_name=\"fake\"} 0"));
    for (call, reply) in kept.into_iter().flatten() {
        assert_eq!(output(&read(reply).await), expected(&fake(), call), "read last: {call:?}");
    }
}
