//! What is counted is right: requests go through the engine, and the numbers are compared with what they did.

use super::*;

impl Bench {
    /// The value of a series; `more` are its labels beside the engine's, as they are rendered before the model's name.
    fn value(&self, name: &str, more: &str) -> f64 {
        let text = self.registry.render();
        let found = text.lines().find_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (seen, labels) = series.split_once('{')?;
            (seen == name && labels.contains("\"fake\"") && labels.contains(more)).then(|| value.to_owned())
        });
        found.unwrap_or_else(|| panic!("no {name} with {more}\n{text}")).parse().expect("a number")
    }

    /// All that was sent is counted once nothing runs.
    async fn settled(&self, generated: usize) {
        self.wait_for(&format!(
            "vllm:generation_tokens_total{{engine=\"0\",model_name=\"fake\"}} {generated}"
        ))
        .await;
        self.wait_for("vllm:num_requests_running{engine=\"0\",model_name=\"fake\"} 0").await;
    }
}

#[tokio::test]
async fn requests_count_as_in_vllm() {
    let bench = bench(fake(), |_| {});
    let prompt = "a prompt of more than one block";
    let call = || Generate { n: 2, max_tokens: Some(3), ignore_eos: true, ..greedy(prompt) };
    bench.events(call()).await.unwrap();
    let second = bench.events(call()).await.unwrap();
    let one = Generate { max_tokens: Some(1), ignore_eos: true, ..greedy("another") };
    bench.events(one).await.unwrap();
    bench.settled(13).await;
    let check = |name: &str, expect: f64| assert_eq!(bench.value(name, ""), expect, "{name}");
    // Whole prompts, cached or not, once per sequence.
    let prompts = (prompt.len() * 4 + "another".len()) as f64;
    check("vllm:prompt_tokens_total", prompts);
    check("vllm:request_prompt_tokens_sum", prompts);
    check("vllm:time_to_first_token_seconds_count", 5.0);
    check("vllm:inter_token_latency_seconds_count", 8.0);
    for histogram in
        ["e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"]
    {
        check(&format!("vllm:{histogram}_seconds_count"), 5.0);
    }
    // Who has no second token is in it as 0.
    check("vllm:request_time_per_output_token_seconds_count", 5.0);
    check("vllm:request_generation_tokens_sum", 13.0);
    check("vllm:request_params_max_tokens_sum", 13.0);
    check("vllm:request_num_preemptions_count", 5.0);
    check("vllm:request_num_preemptions_sum", 0.0);
    // Choices of one prompt are one request: its `n`, and the most tokens of any of them.
    check("vllm:request_params_n_count", 3.0);
    check("vllm:request_params_n_sum", 5.0);
    check("vllm:request_max_num_generation_tokens_count", 3.0);
    check("vllm:request_max_num_generation_tokens_sum", 7.0);
    // Both choices of the second request found the prompt's whole blocks, and the second choice of the first may have.
    let cached = bench.value("vllm:prompt_tokens_cached_total", "");
    assert!(cached >= 2.0 * f64::from(usage(&second).cached_tokens) && cached > 0.0, "{cached}");
    assert_eq!(bench.value("vllm:prompt_tokens_by_source_total", "source=\"local_cache_hit\""), cached);
    assert_eq!(
        bench.value("vllm:prompt_tokens_by_source_total", "source=\"local_compute\""),
        prompts - cached
    );
    check("vllm:request_prefill_kv_computed_tokens_sum", prompts - cached);
    check("vllm:prefix_cache_hits_total", cached);
    assert_eq!(bench.value("vllm:prompt_tokens_cached_by_source_total", "source=\"device\""), cached);
    check("vllm:prefix_cache_queries_total", prompts);
    assert_eq!(bench.value("vllm:request_success_total", "finished_reason=\"length\""), 5.0);
}

#[tokio::test]
async fn preemptions_are_counted_for_the_requests_that_had_them() {
    // 12 blocks of 4: two sequences of 40 tokens don't fit beside each other, their first halves do.
    let bench = bench(fake(), |config| (config.blocks, config.model_len_max) = (12, 60));
    let prompt = Prompt::Text(vec!["abcd".into(), "efgh".into()]);
    let call = Generate { prompt, max_tokens: Some(36), ignore_eos: true, ..greedy("") };
    assert_eq!(usage(&bench.events(call).await.unwrap()).completion_tokens, 72);
    bench.settled(72).await;
    let all = bench.value("vllm:num_preemptions_total", "");
    assert!(all > 0.0, "nobody was preempted");
    assert_eq!(bench.value("vllm:request_num_preemptions_sum", ""), all);
    assert_eq!(bench.value("vllm:request_num_preemptions_count", ""), 2.0);
    // What was computed again is no prompt.
    assert_eq!(bench.value("vllm:prompt_tokens_total", ""), 8.0);
}

#[tokio::test]
async fn failures_are_counted_by_what_they_end() {
    let failures = |bench: &Bench, lost: &str| {
        bench.value("forebay_engine_failed_steps_total", &format!("lost=\"{lost}\""))
    };
    let hurt = bench(says("again", "fine").fail_at_step(0), |_| {});
    hurt.events(greedy("broken")).await.unwrap_err();
    hurt.events(greedy("again")).await.unwrap();
    assert_eq!((failures(&hurt, "step"), failures(&hurt, "executor")), (1.0, 0.0));
    assert_eq!(hurt.value("forebay_engine_alive", ""), 1.0);

    let dead = bench(says("a", "long answer").lose_at_step(3), |_| {});
    dead.events(greedy("a")).await.unwrap_err();
    dead.wait_for("forebay_engine_alive{engine=\"0\",model_name=\"fake\"} 0").await;
    assert_eq!((failures(&dead, "step"), failures(&dead, "executor")), (0.0, 1.0));
}

#[tokio::test]
async fn refused_constraints_are_counted_by_why() {
    let bench = bench(says("go", "x"), |_| {});
    let call = |constraint| Generate { constraint: Some(constraint), ..greedy("go") };
    bench.events(call(Constraint::Regex("[".into()))).await.unwrap_err();
    bench.events(call(Constraint::Grammar("start: (".into()))).await.unwrap_err();
    bench.events(call(Constraint::Choice(vec!["yes".into()]))).await.unwrap();
    // None of the allowed tokens may come.
    let sampling = Sampling { allowed_token_ids: Some(vec![u32::from(b'x')]), ..Sampling::default() };
    let choice = call(Constraint::Choice(vec!["yes".into()]));
    bench.events(Generate { sampling, ..choice }).await.unwrap_err();
    let refused =
        |why: &str| bench.value("forebay_engine_constraints_refused_total", &format!("reason=\"{why}\""));
    assert_eq!((refused("invalid"), refused("not_followed"), refused("vocabulary")), (2.0, 1.0, 0.0));
}
