//! Log-probabilities of prompts: those that the same tokens had when they were generated.

use forebay_wire::{Delta, PromptTokens, RankedLogprob, TokenLogprob};

use super::*;
use crate::serve::told::{Told, ToldPrompt, What};

fn prompt_events(events: &[Event]) -> Vec<PromptTokens> {
    let of = |event: &Event| if let Event::Prompt(prompt) = event { Some(prompt.clone()) } else { None };
    events.iter().filter_map(of).collect()
}

fn logprobs(events: &[Event], choice: u32) -> Vec<TokenLogprob> {
    let of = |event: &Event| match event {
        Event::Delta(delta) if delta.choice == choice => delta.logprobs.clone(),
        _ => Vec::new(),
    };
    events.iter().flat_map(of).collect()
}

/// Twenty tokens of the model's own, after a short prompt, and the text of all.
fn babble(seed: u64) -> Generate {
    Generate {
        sampling: Sampling { temperature: 1.0, seed: Some(seed), ..Sampling::default() },
        logprobs: Some(3),
        return_token_ids: true,
        ignore_eos: true,
        max_tokens: Some(20),
        ..greedy("babble")
    }
}

fn token_ids(events: &[Event]) -> Vec<u32> {
    let of =
        |event: &Event| if let Event::Delta(delta) = event { delta.token_ids.clone() } else { Vec::new() };
    events.iter().flat_map(of).collect()
}

#[tokio::test]
async fn an_echo_scores_a_text_as_when_it_was_generated() {
    let check = async |change: fn(&mut SchedulerConfig), others: u64| {
        let bench = bench(fake(), change);
        let said = bench.events(babble(1)).await.unwrap();
        let all: Vec<u32> = "babble".bytes().map(u32::from).chain(token_ids(&said)).collect();
        let call = Generate {
            prompt: Prompt::Tokens(vec![all.clone()]),
            echo: true,
            logprobs: Some(3),
            max_tokens: Some(0),
            ..greedy("")
        };
        let beside = futures_util::future::join_all((0..others).map(|i| bench.events(babble(i))));
        let (events, _) = tokio::join!(bench.events(call), beside);
        let events = events.unwrap();
        let echoed = logprobs(&events, 0);
        assert_eq!(echoed.iter().map(|entry| entry.token).collect::<Vec<_>>(), all);
        assert_eq!((echoed[0].logprob, echoed[0].top.len()), (None, 0));
        assert!(echoed[1..6].iter().all(|entry| entry.logprob.is_some() && entry.top.len() == 3));
        assert_eq!(echoed[6..], logprobs(&said, 0), "bit for bit");
        assert_eq!(reason(&events, 0), Some(FinishReason::Length));
        assert_eq!(
            usage(&events),
            Usage { prompt_tokens: 26, completion_tokens: 0, cached_tokens: 0, ..Usage::default() }
        );
    };
    check(|_| {}, 0).await;
    check(|c| c.prompt_logits_max = 3, 0).await;
    check(|c| c.prompt_logits_max = 1, 2).await;
    check(|c| (c.step_tokens_max, c.running_max) = (8, 4), 5).await;
    // Too few blocks for all at once: some are preempted half scored.
    check(|c| (c.blocks, c.reserve_output, c.prompt_logits_max) = (12, false, 2), 5).await;
    check(|c| c.prefix_cache = false, 1).await;
}

#[tokio::test]
async fn a_prompt_s_own_token_comes_first_and_every_other_once() {
    let bench = bench(fake(), |_| {});
    let check = async |top: u32| {
        let call = Generate { prompt_logprobs: Some(top), stream: false, ..greedy("some prompt") };
        let events = bench.events(call).await.unwrap();
        let [prompt] = &prompt_events(&events)[..] else { panic!("one prompt") };
        assert_eq!((prompt.prompt, &prompt.ids[..]), (0, &[][..]), "ids are not asked for");
        let entries = prompt.logprobs.as_ref().unwrap();
        assert_eq!(entries.len(), "some prompt".len());
        assert!(entries[0].is_empty());
        for (entry, byte) in entries.iter().zip("some prompt".bytes()).skip(1) {
            let RankedLogprob { token, text, rank, .. } = &entry[0];
            assert_eq!((*token, text.as_bytes()), (u32::from(byte), &[byte][..]));
            let ranks: Vec<u32> = entry[1..].iter().map(|other| other.rank).collect();
            let expect: Vec<u32> = (1..=top).filter(|r| r != rank).collect();
            assert_eq!(ranks, expect);
            assert!(entry[1..].windows(2).all(|pair| pair[0].logprob >= pair[1].logprob));
            assert!(
                entry[1..].iter().all(|other| (other.logprob >= entry[0].logprob) == (other.rank < *rank))
            );
        }
    };
    check(0).await;
    check(1).await;
    check(20).await;
}

#[tokio::test]
async fn each_prompt_is_told_once_and_before_its_choices() {
    let bench = bench(fake(), |c| c.prompt_logits_max = 4);
    let call = Generate {
        prompt: Prompt::Text(vec!["first prompt".into(), "a second one".into()]),
        n: 3,
        prompt_logprobs: Some(1),
        echo: true,
        logprobs: Some(2),
        max_tokens: Some(3),
        ..greedy("")
    };
    let events = bench.events(call).await.unwrap();
    let told = |prompt: u32| {
        events.iter().position(|e| matches!(e, Event::Prompt(told) if told.prompt == prompt)).unwrap()
    };
    for choice in 0..6 {
        let first = events.iter().position(|e| matches!(e, Event::Delta(delta) if delta.choice == choice));
        assert!(told(choice / 3) < first.unwrap(), "choice {choice}");
        let entries = logprobs(&events, choice);
        assert_eq!(entries.len(), 12 + 3);
        assert!(entries[1..12].iter().all(|entry| entry.top.len() == 2), "as many as `logprobs` says");
    }
    let prompts = prompt_events(&events);
    assert_eq!(prompts.len(), 2);
    let lengths = |prompt: &PromptTokens| prompt.logprobs.as_ref().unwrap().iter().map(Vec::len).max();
    assert!(prompts.iter().all(|prompt| lengths(prompt) <= Some(2)), "as many as `prompt_logprobs` says");
}

#[tokio::test]
async fn scoring_leaves_its_blocks_in_the_cache() {
    let bench = bench(fake(), |_| {});
    let prompt = "a prompt of more than one block";
    let scored = || Generate { echo: true, logprobs: Some(0), max_tokens: Some(0), ..greedy(prompt) };
    assert_eq!(usage(&bench.events(scored()).await.unwrap()).cached_tokens, 0);
    assert_eq!(usage(&bench.events(scored()).await.unwrap()).cached_tokens, 0, "logits are not cached");
    assert_eq!(usage(&bench.events(greedy(prompt)).await.unwrap()).cached_tokens, 28);
}

#[tokio::test]
async fn a_failed_step_ends_the_request_and_not_the_engine() {
    let bench = bench(fake().fail_at_step(1), |c| c.prompt_logits_max = 4);
    let call = || Generate { echo: true, logprobs: Some(1), max_tokens: Some(1), ..greedy("a prompt") };
    assert_eq!(bench.events(call()).await.unwrap_err().class.code, Code::Internal);
    assert_eq!(logprobs(&bench.events(call()).await.unwrap(), 0).len(), 9);
}

#[tokio::test]
async fn more_log_probabilities_than_memory_is_for_are_refused() {
    let bench = bench(fake(), |c| (c.blocks, c.model_len_max) = (64, 250));
    let check = async |change: fn(&mut Generate), param: &str| {
        let mut call =
            Generate { prompt: Prompt::Tokens(vec![vec![1; 200]; 256]), max_tokens: Some(1), ..greedy("") };
        change(&mut call);
        let fault = bench.events(call).await.unwrap_err();
        assert_eq!((fault.class.code, fault.param.as_deref()), (Code::BadRequest, Some(param)));
        assert!(fault.message.contains("the limit is 1048576"), "{}", fault.message);
    };
    check(|c| c.prompt_logprobs = Some(20), "prompt_logprobs").await;
    check(|c| (c.echo, c.logprobs, c.n) = (true, Some(9), 4), "logprobs").await;
}

#[tokio::test]
async fn chosen_tokens_are_scored_instead_of_the_most_likely() {
    let bench = bench(says("go", "yes"), |_| {});
    let ids = vec![u32::from(b'n'), u32::from(b'y'), u32::from(b'n')];
    let call = Generate { logprobs: Some(1), logprob_token_ids: ids.clone(), ..greedy("go") };
    let entries = logprobs(&bench.events(call).await.unwrap(), 0);
    assert_eq!(entries.len(), 4, "one per token, the one that ends the text too");
    assert_eq!(entries[3].text, "<|end|>");
    for entry in &entries {
        assert_eq!(entry.top.iter().map(|top| top.token).collect::<Vec<_>>(), ids);
    }
    assert_eq!(entries[0].top[1].logprob, entries[0].logprob.unwrap(), "`y` was said");
    let unknown = Generate { logprobs: Some(1), logprob_token_ids: vec![9999], ..greedy("go") };
    let fault = bench.events(unknown).await.unwrap_err();
    assert_eq!((fault.class.code, fault.param.as_deref()), (Code::BadRequest, Some("logprob_token_ids")));
}

/// All that the step thread tells of a call.
async fn told(bench: &Bench, call: &Generate) -> Vec<Told> {
    let (origin, now) = (origin(), Instant::now());
    let submitted = bench.engine.submit(call, PromptIds::none(), &origin, "anonymous".into(), now);
    let mut receiver = submitted.await.unwrap();
    let mut all = Vec::new();
    while let Some(told) = receiver.recv().await {
        all.push(told.unwrap());
    }
    all
}

#[tokio::test]
async fn the_step_thread_hands_over_ids_and_numbers() {
    let bench = bench(fake(), |c| c.prompt_logits_max = 4);
    let call = Generate {
        prompt: Prompt::Text(vec!["first prompt".into(), "a second one".into()]),
        n: 2,
        prompt_logprobs: Some(3),
        echo: true,
        logprobs: Some(2),
        max_tokens: Some(3),
        ..greedy("")
    };
    let mut prompts: Vec<ToldPrompt> = Vec::new();
    for told in told(&bench, &call).await {
        match told {
            Told::Prompt(prompt) => prompts.push(*prompt),
            Told::Event(Event::Prompt(prompt)) => panic!("named on the step thread: {prompt:?}"),
            Told::Event(Event::Delta(delta)) => {
                assert!(delta.logprobs.len() <= delta.tokens as usize, "of new tokens only: {delta:?}");
            }
            Told::Event(_) => {}
        }
    }
    for number in 0..2u32 {
        let is_its = |prompt: &&ToldPrompt| match prompt.what {
            What::Prompt { number: its, .. } => its == number,
            What::Echo { choice, .. } => choice / 2 == number,
        };
        let about: Vec<&ToldPrompt> = prompts.iter().filter(is_its).collect();
        assert_eq!(about.len(), 3, "the prompt, and its echo in each choice");
        let scores = |prompt: &ToldPrompt| prompt.scores.as_ref().unwrap().0.clone();
        assert!(about.iter().all(|prompt| Arc::ptr_eq(&scores(prompt), &scores(about[0]))), "no copies");
        assert_eq!((scores(about[0]).len(), about[0].ids.len()), (11, 12));
    }
}

#[tokio::test]
async fn many_names_are_the_same_as_few() {
    let bench = bench(fake(), |_| {});
    // 119 tokens with 20 others each are named off the I/O threads.
    let prompt = "x y".repeat(40);
    let call = Generate { prompt_logprobs: Some(20), max_tokens: Some(1), ..greedy(&prompt) };
    let raw = told(&bench, &call).await;
    assert!(raw.iter().any(|told| told.names() > 1000), "{raw:?}");
    let tokenizer = bench.engine.text.tokenizer().clone();
    let named: Vec<Event> = raw.into_iter().map(|told| told.into_event(&tokenizer)).collect();
    assert_eq!(bench.events(call).await.unwrap(), named);
    assert_eq!(prompt_events(&named)[0].logprobs.as_ref().unwrap().len(), 120);
}

#[tokio::test]
async fn a_long_echo_is_told_in_parts() {
    let bench = bench(fake(), |_| {});
    // 120 tokens with 20 others each: 47 of them have 987 names.
    let prompt = "x y".repeat(40);
    let call = Generate { echo: true, logprobs: Some(20), max_tokens: Some(1), ..greedy(&prompt) };
    let tokenizer = bench.engine.text.tokenizer().clone();
    let mut whole = None;
    for told in told(&bench, &call).await {
        if matches!(told, Told::Prompt(_)) {
            let Event::Delta(delta) = told.into_event(&tokenizer) else { panic!("an echo is a delta") };
            whole = Some(delta);
        }
    }
    let whole = whole.expect("there is an echo");
    let events = bench.events(call).await.unwrap();
    let echo = events.iter().filter_map(|event| match event {
        Event::Delta(delta) if delta.tokens == 0 && !delta.logprobs.is_empty() => Some(delta),
        _ => None,
    });
    let echo: Vec<&Delta> = echo.collect();
    assert_eq!(echo.iter().map(|part| part.logprobs.len()).collect::<Vec<_>>(), [47, 47, 26]);
    assert_eq!(echo.iter().map(|part| part.text.as_str()).collect::<Vec<_>>(), [&prompt, "", ""]);
    let joined: Vec<TokenLogprob> = echo.iter().flat_map(|part| part.logprobs.clone()).collect();
    assert_eq!(joined, whole.logprobs);
}
