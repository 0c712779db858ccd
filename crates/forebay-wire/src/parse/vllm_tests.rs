//! Every field that vLLM has beyond OpenAI's: honoured, or refused by its name. None is passed over.

use bytes::Bytes;
use http::Method;
use serde_json::{Value, json};

use super::*;
use crate::{Constraint, Generate, Prompt, TruncationSide};

enum Expect {
    /// It reaches the call.
    Set(fn(&Generate) -> bool),
    /// The engine refuses the request with the field's name; others may have it.
    Need,
    /// Refused for everybody: the value can't be right.
    Bad,
    /// It changes nothing that a reply shows.
    Nothing,
}
use Expect::{Bad, Need, Nothing, Set};

/// Of what a field asks for, in chats and completions alike.
const BOTH: &[&str] = &["/v1/chat/completions", "/v1/completions"];
const CHAT: &[&str] = &["/v1/chat/completions"];
const COMPLETIONS: &[&str] = &["/v1/completions"];

fn call(path: &str, fields: &Value) -> Result<Generate, ParseError> {
    let mut body = match path {
        "/v1/completions" => json!({"model": "m", "prompt": "hi"}),
        _ => json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]}),
    };
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    match parse(&Method::POST, path, None, &Bytes::from(body.to_string()), None)? {
        Ask::Generate(call) => Ok(*call),
        other => panic!("{other:?}"),
    }
}

/// `name` is the field that an error has to name.
fn check(paths: &[&str], name: &str, fields: Value, expect: &Expect) {
    for path in paths {
        let got = call(path, &fields);
        match (expect, &got) {
            (Set(holds), Ok(call)) => {
                assert!(call.needs.is_empty() && holds(call), "{path} {fields}: {call:?}");
            }
            (Need, Ok(call)) => {
                let needs: Vec<&str> = call.needs.iter().map(|need| need.param.as_str()).collect();
                assert_eq!(needs, [name], "{path} {fields}");
            }
            (Bad, Err(error)) => {
                use forebay_types::Classify;
                assert_eq!(error.param(), Some(name), "{path} {fields}: {error}");
            }
            (Nothing, Ok(call)) => assert!(call.needs.is_empty(), "{path} {fields}"),
            (_, got) => panic!("{path} {fields}: {got:?}"),
        }
    }
}

/// The fields of vLLM 0.33's request classes, in their order.
#[test]
fn each_field_is_honoured_or_refused_by_name() {
    type Row = (&'static [&'static str], &'static str, Value, Expect);
    let rows: Vec<Row> = vec![
        // Sampling.
        (BOTH, "use_beam_search", json!(true), Need),
        (BOTH, "use_beam_search", json!(false), Nothing),
        (BOTH, "top_k", json!(7), Set(|c| c.sampling.top_k == 7)),
        (BOTH, "min_p", json!(0.5), Set(|c| c.sampling.min_p == 0.5)),
        (BOTH, "repetition_penalty", json!(1.5), Set(|c| c.sampling.repetition_penalty == 1.5)),
        (BOTH, "watermarking", json!(true), Need),
        (BOTH, "length_penalty", json!(0.5), Need),
        (BOTH, "length_penalty", json!(1.0), Nothing),
        (BOTH, "stop_token_ids", json!([3]), Set(|c| c.stop_token_ids == [3])),
        (BOTH, "include_stop_str_in_output", json!(true), Set(|c| c.include_stop_str_in_output)),
        (BOTH, "ignore_eos", json!(true), Set(|c| c.ignore_eos)),
        (BOTH, "min_tokens", json!(3), Set(|c| c.min_tokens == 3)),
        (BOTH, "skip_special_tokens", json!(false), Set(|c| !c.skip_special_tokens)),
        (BOTH, "spaces_between_special_tokens", json!(false), Nothing),
        (BOTH, "spaces_between_special_tokens", json!(1), Bad),
        (BOTH, "truncate_prompt_tokens", json!(8), Set(|c| c.truncate_prompt_tokens == Some(8))),
        (BOTH, "truncate_prompt_tokens", json!(-1), Set(|c| c.truncate_prompt_tokens == Some(-1))),
        (BOTH, "truncate_prompt_tokens", json!(0), Bad),
        (BOTH, "truncate_prompt_tokens", json!(-2), Bad),
        (BOTH, "truncation_side", json!("left"), Set(|c| c.truncation_side == TruncationSide::Left)),
        (BOTH, "truncation_side", json!("right"), Set(|c| c.truncation_side == TruncationSide::Right)),
        (BOTH, "truncation_side", json!("middle"), Bad),
        (BOTH, "prompt_logprobs", json!(0), Set(|c| c.prompt_logprobs == Some(0))),
        (BOTH, "prompt_logprobs", json!(20), Set(|c| c.prompt_logprobs == Some(20))),
        (BOTH, "prompt_logprobs", json!(1001), Bad),
        (BOTH, "prompt_logprobs", json!(-1), Bad),
        (BOTH, "logprob_token_ids", json!([1]), Bad), // without `logprobs`
        (BOTH, "logprob_token_ids", json!([]), Bad),
        (BOTH, "allowed_token_ids", json!([4]), Set(|c| c.sampling.allowed_token_ids == Some(vec![4]))),
        (BOTH, "bad_words", json!(["x"]), Set(|c| c.bad_words == ["x"])),
        (BOTH, "thinking_token_budget", json!(10), Need),
        (BOTH, "thinking_token_budget", json!(-1), Nothing),
        (BOTH, "repetition_detection", json!({"min_count": 3}), Need),
        // Prompts.
        (COMPLETIONS, "echo", json!(true), Set(|c| c.echo)),
        (CHAT, "echo", json!(true), Set(|c| c.echo)),
        (BOTH, "add_special_tokens", json!(true), Set(|c| c.add_special_tokens == Some(true))),
        (BOTH, "add_special_tokens", json!(false), Set(|c| c.add_special_tokens == Some(false))),
        (CHAT, "continue_final_message", json!(true), Bad), // beside the default of `add_generation_prompt`
        (CHAT, "documents", json!([{"text": "x"}]), Need),
        (CHAT, "documents", json!([]), Nothing),
        (CHAT, "chat_template", json!("{{ messages }}"), Need),
        (CHAT, "chat_template_kwargs", json!({"a": 1}), Set(|c| kwarg(c, "a") == Some(&json!(1)))),
        (
            CHAT,
            "reasoning_effort",
            json!("low"),
            Set(|c| kwarg(c, "reasoning_effort") == Some(&json!("low"))),
        ),
        (BOTH, "mm_processor_kwargs", json!({"a": 1}), Need),
        (CHAT, "media_io_kwargs", json!({"image": {}}), Need),
        (COMPLETIONS, "prompt_embeds", json!("AAAA"), Bad),
        (COMPLETIONS, "suffix", json!("x"), Need),
        (BOTH, "best_of", json!(3), Need),
        (BOTH, "best_of", json!(1), Nothing),
        // Constraints.
        (
            BOTH,
            "structured_outputs",
            json!({"regex": "a+"}),
            Set(|c| c.constraint == Some(Constraint::Regex("a+".into()))),
        ),
        (BOTH, "guided_json", json!({}), Need),
        (BOTH, "guided_regex", json!("a"), Need),
        (BOTH, "guided_choice", json!(["a"]), Need),
        (BOTH, "guided_grammar", json!("a"), Need),
        (BOTH, "guided_decoding_backend", json!("x"), Need),
        (BOTH, "guided_whitespace_pattern", json!("x"), Need),
        // Replies.
        (BOTH, "return_token_ids", json!(true), Set(|c| c.return_token_ids)),
        (BOTH, "return_tokens_as_token_ids", json!(true), Set(|c| c.tokens_as_ids == Some(true))),
        (BOTH, "return_tokens_as_token_ids", json!(false), Set(|c| c.tokens_as_ids == Some(false))),
        (CHAT, "return_prompt_text", json!(true), Need),
        (BOTH, "return_token_offsets", json!(true), Need),
        (BOTH, "routed_experts_prompt_start", json!(2), Need),
        (BOTH, "stream_interval", json!(5), Set(|c| c.stream_interval == 5)),
        (BOTH, "stream_interval", json!(0), Bad),
        // Whose request it is, and where it goes.
        (BOTH, "request_id", json!("mine"), Set(|c| c.request_id.as_deref() == Some("mine"))),
        (BOTH, "request_id", json!(""), Bad),
        (BOTH, "session_id", json!("s"), Nothing),
        (BOTH, "session_id", json!(1), Bad),
        (BOTH, "priority", json!(-4), Set(|c| c.priority == -4)),
        (BOTH, "cache_salt", json!("s"), Set(|c| c.cache_salt.as_deref() == Some("s"))),
        (BOTH, "cache_salt", json!(""), Bad),
        (BOTH, "kv_transfer_params", json!({"do_remote_decode": true}), Need),
        (BOTH, "ec_transfer_params", json!({"x": 1}), Need),
        (BOTH, "vllm_xargs", json!({"x": 1}), Need),
        (BOTH, "vllm_xargs", json!({}), Nothing),
    ];
    for (paths, name, value, expect) in rows {
        check(paths, name, json!({name: value}), &expect);
        check(paths, name, json!({name: null}), &Nothing);
    }
}

fn kwarg<'c>(call: &'c Generate, name: &str) -> Option<&'c Value> {
    match &call.prompt {
        Prompt::Chat { chat_template_kwargs, .. } => chat_template_kwargs.as_ref()?.get(name),
        _ => None,
    }
}

#[test]
fn fields_that_only_go_together_or_not_at_all() {
    let goes_on = json!({"continue_final_message": true, "add_generation_prompt": false});
    check(CHAT, "continue_final_message", goes_on, &Set(|c| c.continue_final_message));
    let both = json!({"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}});
    check(CHAT, "", both, &Set(|c| kwarg(c, "reasoning_effort") == Some(&json!("high"))));

    let streamed = json!({"prompt_logprobs": 1, "stream": true});
    check(BOTH, "prompt_logprobs", streamed, &Bad);

    let chosen = json!({"logprobs": 1, "logprob_token_ids": [5, 6]});
    check(COMPLETIONS, "", chosen, &Set(|c| c.logprob_token_ids == [5, 6]));
    let chosen = json!({"logprobs": true, "logprob_token_ids": [5]});
    check(CHAT, "", chosen, &Set(|c| c.logprob_token_ids == [5]));
    let nothing = json!({"logprobs": 1, "logprob_token_ids": [5], "echo": true, "max_tokens": 0});
    check(COMPLETIONS, "logprob_token_ids", nothing, &Bad);

    check(COMPLETIONS, "", json!({"max_tokens": 0, "echo": true}), &Set(|c| c.max_tokens == Some(0)));
    check(BOTH, "max_tokens", json!({"max_tokens": 0}), &Bad);
    check(CHAT, "max_tokens", json!({"max_tokens": 0, "echo": true}), &Bad);
    check(COMPLETIONS, "min_tokens", json!({"max_tokens": 0, "echo": true, "min_tokens": 1}), &Bad);
}
