use bytes::Bytes;
use forebay_types::{Classify, Code, Fault};
use http::Method;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::{Content, Generate, LeftOpen, Prompt, TokenizeInput, VectorFormat};

fn post(path: &str, body: &str) -> Result<Ask, ParseError> {
    parse(&Method::POST, path, Some("application/json"), &Bytes::copy_from_slice(body.as_bytes()), None)
}

fn generate(path: &str, body: &str) -> Generate {
    match post(path, body) {
        Ok(Ask::Generate(call)) => *call,
        other => panic!("{body}: {other:?}"),
    }
}

/// Whom a body is for that names `model` like this, where there is a default and where there is none.
#[test]
fn a_body_that_names_no_model_is_for_the_default() {
    let asks = [
        (CHAT, r#""messages":[{"role":"user","content":"hi"}]"#),
        ("/v1/chat/completions/render", r#""messages":[{"role":"user","content":"hi"}]"#),
        (COMPLETIONS, r#""prompt":"hi""#),
        (EMBEDDINGS, r#""input":"hi""#),
        ("/inference/v1/generate", r#""token_ids":[1],"sampling_params":{"model":"inside"}"#),
        ("/tokenize", r#""prompt":"hi""#),
        ("/detokenize", r#""tokens":[1]"#),
    ];
    let default = ModelName::from("only \"one\"");
    for (path, rest) in asks {
        let ask = |model: &str, default: Option<&ModelName>| {
            parse(&Method::POST, path, None, &Bytes::from(format!("{{{model}{rest}}}")), default)
        };
        for none in ["", r#""model":null,"#, r#""model":"","#] {
            let ask = ask(none, Some(&default)).expect("is for the default");
            assert_eq!(ask.model(), Some(&default), "{path} {none}");
        }
        for default in [Some(&default), None] {
            let ask = ask(r#""model":"m","#, default).expect("names one");
            assert_eq!(ask.model().map(ModelName::as_str), Some("m"), "{path}");
        }
        match ask("", None) {
            Ok(ask) => assert!(path.ends_with("tokenize") && ask.model().is_none(), "{path}"),
            Err(error) => assert_eq!(error.to_string(), "Missing required parameter: 'model'.", "{path}"),
        }
        let error = ask(r#""model":1,"#, Some(&default)).expect_err("is no name");
        assert_eq!(error.param(), Some("model"), "{path}");
    }
}

/// A chat with these further fields.
fn chat(rest: &str) -> String {
    format!(r#"{{"model":"m","messages":[{{"role":"user","content":"hi"}}]{rest}}}"#)
}

fn completion(rest: &str) -> String {
    format!(r#"{{"model":"m","prompt":"hi"{rest}}}"#)
}

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const EMBEDDINGS: &str = "/v1/embeddings";

fn refused(path: &str, body: &str) -> (String, Option<String>) {
    match post(path, body) {
        Ok(_) => panic!("{body} was accepted"),
        Err(error) => (error.to_string(), error.param().map(str::to_owned)),
    }
}

#[test]
fn routes() {
    let check = |method: Method, path: &str, expect: Result<&str, Code>| {
        let got = parse(&method, path, None, &Bytes::from_static(b"{}"), None);
        let got = match &got {
            Ok(Ask::ListModels) => Ok("list".to_owned()),
            Ok(Ask::TokenizerInfo) => Ok("tokenizer".to_owned()),
            Ok(Ask::GetModel(model)) => Ok(model.to_string()),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.class().code),
        };
        assert_eq!(got, expect.map(str::to_owned), "{method} {path}");
    };
    check(Method::GET, "/v1/models", Ok("list"));
    check(Method::GET, "/v1/models?limit=3", Ok("list"));
    check(Method::GET, "/v1/models/m", Ok("m"));
    check(Method::GET, "/v1/models/org/m", Ok("org/m"));
    check(Method::GET, "/v1/models/org%2Fm%20%c3%a9+", Ok("org/m é+"));
    check(Method::GET, "/v1/models/%f", Err(Code::BadRequest));
    check(Method::GET, "/v1/models/%ff", Err(Code::BadRequest));
    check(Method::GET, &format!("/v1/models/{}", "x".repeat(257)), Err(Code::BadRequest));
    check(Method::GET, "/tokenizer_info", Ok("tokenizer"));
    check(Method::POST, "/tokenizer_info", Err(Code::MethodNotAllowed));
    check(Method::POST, "/v1/models", Err(Code::MethodNotAllowed));
    check(Method::GET, CHAT, Err(Code::MethodNotAllowed));
    check(Method::GET, EMBEDDINGS, Err(Code::MethodNotAllowed));
    check(Method::POST, "/v1/embedding", Err(Code::RouteNotFound));
    check(Method::GET, "/v1/modelsx", Err(Code::RouteNotFound));
    check(Method::POST, "/v1/chat/completions/", Err(Code::RouteNotFound));
    let fault: Fault = parse(&Method::GET, CHAT, None, &Bytes::new(), None).unwrap_err().into_fault();
    assert_eq!(fault.headers, [("allow", "POST".to_owned())]);
    assert_eq!(fault.message, "Not allowed to GET on /v1/chat/completions: only POST is.");
}

fn embed(body: &str) -> crate::Embed {
    match post(EMBEDDINGS, body) {
        Ok(Ask::Embed(call)) => (*call).clone(),
        other => panic!("{body}: {other:?}"),
    }
}

#[test]
fn embeddings_are_read() {
    let call = embed(r#"{"model":"m","input":"hi"}"#);
    assert_eq!((call.model.as_str(), call.format, call.dimensions), ("m", VectorFormat::Float, None));
    assert_eq!((call.normalize, call.truncate_prompt_tokens), (None, None));
    assert_eq!((call.add_special_tokens, call.priority, call.user, call.needs.len()), (true, 0, None, 0));
    assert!(matches!(&call.input, Prompt::Text(texts) if texts == &["hi"]), "{:?}", call.input);
    let call = embed(
        r#"{"model":"m","input":["a",""],"encoding_format":"base64","dimensions":8,"normalize":false,"user":"u",
            "truncate_prompt_tokens":-1,"add_special_tokens":false,"priority":-3,"embed_dtype":"float32",
            "endianness":"native","request_id":"mine","unknown":1}"#,
    );
    assert_eq!(call.request_id.as_deref(), Some("mine"));
    assert_eq!((call.format, call.dimensions, call.normalize), (VectorFormat::Base64, Some(8), Some(false)));
    assert_eq!((call.truncate_prompt_tokens, call.add_special_tokens), (Some(-1), false));
    assert_eq!((call.priority, call.user.as_deref(), call.needs.len()), (-3, Some("u"), 0));
    assert!(matches!(&call.input, Prompt::Text(texts) if texts == &["a", ""]), "{:?}", call.input);
    let ids = |body: &str| match embed(body).input {
        Prompt::Tokens(ids) => ids,
        other => panic!("{other:?}"),
    };
    assert_eq!(ids(r#"{"model":"m","input":[1,2]}"#), [[1, 2]]);
    assert_eq!(ids(r#"{"model":"m","input":[[1],[2,3]]}"#), [vec![1], vec![2, 3]]);
    assert_eq!(
        embed(r#"{"model":"m","input":"a","normalize":true,"use_activation":false}"#).normalize,
        Some(false)
    );
}

#[test]
fn embeddings_that_are_wrong() {
    let check = |rest: &str, param: &str, message: &str| {
        let (text, at) = refused(EMBEDDINGS, &format!(r#"{{"model":"m"{rest}}}"#));
        assert_eq!(at.as_deref(), Some(param), "{text}");
        assert!(text.contains(message), "{text}");
    };
    check("", "input", "Missing required parameter");
    check(r#","input":7"#, "input", "expected one of a string, array of strings");
    check(r#","input":[]"#, "input", "empty array. Expected at least one input");
    check(r#","input":[[]]"#, "input[0]", "empty array");
    check(r#","input":["a",1]"#, "input[1]", "expected one of a string");
    check(r#","input":[1,"a"]"#, "input", "token ids");
    check(r#","input":{"a":1}"#, "input", "expected one of a string");
    let many = vec!["\"x\""; 2049].join(",");
    check(&format!(r#","input":[{many}]"#), "input", "maximum length 2048");
    check(r#","input":"a","encoding_format":"hex""#, "encoding_format", "'hex' is not one of");
    check(r#","input":"a","dimensions":0"#, "dimensions", "below minimum");
    check(r#","input":"a","truncate_prompt_tokens":-2"#, "truncate_prompt_tokens", "below minimum");
    check(r#","input":"a","user":1"#, "user", "expected a string");
    let (text, at) = refused(EMBEDDINGS, r#"{"input":"a"}"#);
    assert_eq!(at.as_deref(), Some("model"), "{text}");
    let needs = |rest: &str| {
        let call = embed(&format!(r#"{{"model":"m","input":"a"{rest}}}"#));
        call.needs.into_iter().map(|need| need.param).collect::<Vec<_>>()
    };
    assert_eq!(needs(r#","encoding_format":"bytes""#), ["encoding_format"]);
    assert_eq!(
        needs(r#","messages":[],"embed_dtype":"float16","endianness":"big""#),
        ["messages", "embed_dtype", "endianness"]
    );
}

#[test]
fn content_types() {
    let check = |content_type: Option<&str>, ok: bool| {
        let result = parse(&Method::POST, CHAT, content_type, &Bytes::from(chat("")), None);
        assert_eq!(result.is_ok(), ok, "{content_type:?}");
    };
    check(None, true);
    check(Some("application/json"), true);
    check(Some("Application/JSON; charset=utf-8"), true);
    check(Some("application/vnd.x+json"), true);
    check(Some("application/x-www-form-urlencoded"), false);
    check(Some("text/plain"), false);
    check(Some(""), false);
}

#[test]
fn a_plain_chat_has_the_documented_defaults() {
    let body = chat("");
    let call = generate(CHAT, &body);
    assert_eq!((call.model.as_str(), call.n, call.max_tokens, call.min_tokens), ("m", 1, None, 0));
    assert_eq!(call.sampling, crate::Sampling { left_open: ALL_OPEN, ..crate::Sampling::default() });
    assert_eq!((call.stream, call.include_usage, call.logprobs, call.echo), (false, false, None, false));
    assert_eq!((call.priority, call.ignore_eos, call.cache_salt), (0, false, None));
    assert_eq!(call.body, body);
    let Prompt::Chat { messages, tools, add_generation_prompt, chat_template_kwargs } = call.prompt else {
        panic!()
    };
    assert_eq!((messages.len(), tools, add_generation_prompt, chat_template_kwargs), (1, None, true, None));
    assert_eq!((messages[0].role.as_str(), &messages[0].content), ("user", &Content::Text("hi".into())));
}

const ALL_OPEN: LeftOpen =
    LeftOpen { temperature: true, top_p: true, top_k: true, min_p: true, repetition_penalty: true };

#[test]
fn what_a_request_leaves_open_is_told_from_what_it_says() {
    let check = |fields: &str, expect: LeftOpen| {
        assert_eq!(generate(CHAT, &chat(fields)).sampling.left_open, expect, "{fields}");
    };
    let all = LeftOpen { temperature: true, top_p: true, top_k: true, min_p: true, repetition_penalty: true };
    check("", all);
    check(r#","temperature":null,"top_k":null"#, all);
    // At OpenAI's defaults all the same.
    check(r#","temperature":1,"top_k":-1"#, LeftOpen { temperature: false, top_k: false, ..all });
    check(
        r#","top_p":1,"min_p":0,"repetition_penalty":1"#,
        LeftOpen { temperature: true, top_k: true, ..LeftOpen::default() },
    );
}

#[test]
fn every_field_is_read() {
    let call = generate(
        CHAT,
        &chat(
            r#","n":2,"max_completion_tokens":9,"min_tokens":3,"temperature":0,"top_p":0.5,"top_k":40,"min_p":0.1,
            "seed":-2,"repetition_penalty":1.1,"presence_penalty":-2,"frequency_penalty":2,"logit_bias":{"5":-100,"7":1},
            "stop":["a","b"],"stop_token_ids":[1,2],"include_stop_str_in_output":true,"ignore_eos":true,
            "logprobs":true,"top_logprobs":3,"stream":true,"stream_options":{"include_usage":true},"user":"u",
            "cache_salt":"s","priority":-1,"add_generation_prompt":false,"chat_template_kwargs":{"enable_thinking":false},
            "tools":[{"type":"function","function":{"name":"f"}}],"tool_choice":"auto","response_format":{"type":"text"},"unknown":{"x":1},
            "store":false,"metadata":null"#,
        ),
    );
    let sampling = &call.sampling;
    assert_eq!((call.n, call.max_tokens, call.min_tokens, call.logprobs), (2, Some(9), 3, Some(3)));
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p), (0.0, 0.5, 40, 0.1));
    assert_eq!((sampling.seed, sampling.repetition_penalty), (Some(-2i64 as u64), 1.1));
    assert_eq!(sampling.left_open, LeftOpen::default());
    assert_eq!((sampling.presence_penalty, sampling.frequency_penalty), (-2.0, 2.0));
    assert_eq!(sampling.logit_bias, [(5, -100.0), (7, 1.0)]);
    assert_eq!(
        (call.stop.as_slice(), call.stop_token_ids.as_slice()),
        (&["a".into(), "b".into()][..], &[1, 2][..])
    );
    assert!(call.include_stop_str_in_output && call.ignore_eos && call.stream && call.include_usage);
    assert_eq!((call.user.as_deref(), call.cache_salt.as_deref(), call.priority), (Some("u"), Some("s"), -1));
    let Prompt::Chat { tools, add_generation_prompt, chat_template_kwargs, .. } = call.prompt else {
        panic!()
    };
    assert_eq!(tools, Some(json!([{"type": "function", "function": {"name": "f"}}])));
    assert!(!add_generation_prompt);
    assert_eq!(json!(chat_template_kwargs), json!({"enable_thinking": false}));
}

#[test]
fn null_is_absent() {
    let call = generate(
        CHAT,
        &chat(
            r#","n":null,"max_tokens":null,"temperature":null,"stop":null,"stream":null,"stream_options":null,"logprobs":null,"tools":null,"tool_choice":null,"response_format":null,"logit_bias":null,"guided_json":null"#,
        ),
    );
    assert_eq!(call.sampling, crate::Sampling { left_open: ALL_OPEN, ..crate::Sampling::default() });
}

#[test]
fn messages_keep_what_templates_want() {
    let body = r#"{"model":"m","messages":[
        {"role":"system","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
        {"role":"assistant","content":null,"tool_calls":[{"id":"1","function":{"name":"f"}}]},
        {"role":"assistant"},
        {"role":"tool","content":"42","tool_call_id":"1","name":"f"}]}"#;
    let Prompt::Chat { messages, .. } = generate(CHAT, body).prompt else { panic!() };
    assert_eq!(messages[0].content, Content::Parts(vec!["a".into(), "b".into()]));
    assert_eq!(messages[1].content, Content::None);
    assert_eq!(json!(messages[1].extra), json!({"tool_calls": [{"id": "1", "function": {"name": "f"}}]}));
    assert_eq!(messages[2].content, Content::None);
    assert_eq!(json!(messages[3].extra), json!({"tool_call_id": "1", "name": "f"}));
}

#[test]
fn completion_prompts() {
    let check = |prompt: &str, expect: &str| {
        let call = generate(COMPLETIONS, &format!(r#"{{"model":"m","prompt":{prompt}}}"#));
        assert_eq!(format!("{:?}", call.prompt), expect, "{prompt}");
    };
    check(r#""a""#, r#"Text(["a"])"#);
    check(r#"["a","b"]"#, r#"Text(["a", "b"])"#);
    check("[1,2]", "Tokens([[1, 2]])");
    check("[ 1 , 2 ]", "Tokens([[1, 2]])");
    check("[[1],[2,3]]", "Tokens([[1], [2, 3]])");
    let call = generate(COMPLETIONS, &completion(r#","logprobs":5,"echo":true,"best_of":1,"suffix":"""#));
    assert_eq!((call.logprobs, call.echo), (Some(5), true));
}

#[test]
fn mistakes_name_their_field() {
    let check = |path: &str, body: &str, message: &str, param: Option<&str>| {
        assert_eq!(refused(path, body), (message.to_owned(), param.map(str::to_owned)), "{body}");
    };
    let chat_check = |rest: &str, message: &str, param: &str| check(CHAT, &chat(rest), message, Some(param));
    let messages_check = |messages: &str, message: &str, param: &str| {
        check(CHAT, &format!(r#"{{"model":"m","messages":{messages}}}"#), message, Some(param));
    };
    check(CHAT, "", "The request body is empty: expected a JSON object.", None);
    check(
        CHAT,
        " [1] ",
        "Invalid type for the request body: expected a JSON object, but got an array instead.",
        None,
    );
    check(
        CHAT,
        "{\"model\": \"m\",\n \"n\": 1 1}",
        "We could not parse the JSON body of your request: expected `,` or `}` at line 2 column 9.",
        None,
    );
    check(
        CHAT,
        "{\"model\":\"\u{1}\"}",
        "We could not parse the JSON body of your request: control character (\\u0000-\\u001F) found while parsing a string at line 1 column 10.",
        None,
    );
    check(CHAT, r#"{"model":"m","model":"n"}"#, "Duplicate key 'model' in the request body.", None);
    check(
        CHAT,
        r#"{"messages":[{"role":"user","content":"x"}]}"#,
        "Missing required parameter: 'model'.",
        Some("model"),
    );
    check(CHAT, r#"{"model":"m"}"#, "Missing required parameter: 'messages'.", Some("messages"));
    check(COMPLETIONS, r#"{"model":"m"}"#, "Missing required parameter: 'prompt'.", Some("prompt"));
    chat_check(
        r#","temperature":"hot""#,
        "Invalid type for 'temperature': expected a number, but got a string instead.",
        "temperature",
    );
    chat_check(
        r#","temperature":2.5"#,
        "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 2.5 instead.",
        "temperature",
    );
    chat_check(
        r#","temperature":-1"#,
        "Invalid 'temperature': decimal below minimum value. Expected a value >= 0, but got -1 instead.",
        "temperature",
    );
    chat_check(r#","temperature":1e999"#, "Invalid 'temperature': number out of range.", "temperature");
    chat_check(
        r#","top_p":0"#,
        "Invalid 'top_p': Expected a value > 0 and <= 1; for greedy output set 'temperature' to 0.",
        "top_p",
    );
    chat_check(
        r#","max_tokens":0"#,
        "Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, but got 0 instead.",
        "max_tokens",
    );
    chat_check(
        r#","max_tokens":1.5"#,
        "Invalid type for 'max_tokens': expected an integer, but got a decimal number instead.",
        "max_tokens",
    );
    chat_check(
        r#","max_tokens":99999999999999999999"#,
        "Invalid 'max_tokens': integer above maximum value. Expected a value <= 2147483647, but got 99999999999999999999 instead.",
        "max_tokens",
    );
    chat_check(
        r#","max_tokens":1,"max_completion_tokens":2"#,
        "Invalid 'max_tokens': 1 contradicts 'max_completion_tokens' (2). Set one of them.",
        "max_tokens",
    );
    chat_check(
        r#","min_tokens":3,"max_tokens":2"#,
        "Invalid 'min_tokens': Expected a value <= 'max_tokens' (2), but got 3 instead.",
        "min_tokens",
    );
    chat_check(
        r#","n":129"#,
        "Invalid 'n': integer above maximum value. Expected a value <= 128, but got 129 instead.",
        "n",
    );
    chat_check(
        r#","stream":"yes""#,
        "Invalid type for 'stream': expected a boolean, but got a string instead.",
        "stream",
    );
    chat_check(
        r#","stream_options":{}"#,
        "Invalid 'stream_options': only allowed when 'stream' is enabled.",
        "stream_options",
    );
    chat_check(
        r#","stream":true,"stream_options":{"include_usage":1}"#,
        "Invalid type for 'stream_options.include_usage': expected a boolean, but got an integer instead.",
        "stream_options.include_usage",
    );
    chat_check(
        r#","stop":5"#,
        "Invalid type for 'stop': expected one of a string or an array of strings, but got an integer instead.",
        "stop",
    );
    chat_check(
        r#","stop":["a",5]"#,
        "Invalid type for 'stop[1]': expected a string, but got an integer instead.",
        "stop[1]",
    );
    chat_check(r#","stop":"""#, "Invalid 'stop': a stop sequence can't be an empty string.", "stop");
    chat_check(
        &format!(r#","stop":{}"#, json!(vec!["x"; 17])),
        "Invalid 'stop': array too long. Expected an array with maximum length 16, but got an array with length 17 instead.",
        "stop",
    );
    chat_check(
        r#","top_logprobs":2"#,
        "Invalid 'top_logprobs': only allowed when 'logprobs' is true.",
        "top_logprobs",
    );
    chat_check(
        r#","logprobs":2"#,
        "Invalid type for 'logprobs': expected a boolean, but got an integer instead.",
        "logprobs",
    );
    chat_check(
        r#","logit_bias":{"x":1}"#,
        "Invalid 'logit_bias': every key must be a token id, an integer from 0.",
        "logit_bias",
    );
    chat_check(
        r#","logit_bias":{"1":101}"#,
        "Invalid 'logit_bias': every value must be a number from -100 to 100.",
        "logit_bias",
    );
    chat_check(r#","cache_salt":"""#, "Invalid 'cache_salt': expected 1 to 1024 characters.", "cache_salt");
    chat_check(
        r#","tools":{}"#,
        "Invalid type for 'tools': expected an array of objects, but got an object instead.",
        "tools",
    );
    chat_check(
        r#","stop_token_ids":[-1]"#,
        "Invalid 'stop_token_ids': expected an array of token ids, integers from 0 to 4294967295.",
        "stop_token_ids",
    );
    messages_check(
        "[]",
        "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead.",
        "messages",
    );
    messages_check(
        r#""hi""#,
        "Invalid type for 'messages': expected an array, but got a string instead.",
        "messages",
    );
    messages_check(
        r#"["hi"]"#,
        "Invalid type for 'messages[0]': expected an object, but got a string instead.",
        "messages[0]",
    );
    messages_check(
        r#"[{"content":"x"}]"#,
        "Missing required parameter: 'messages[0].role'.",
        "messages[0].role",
    );
    messages_check(
        r#"[{"role":"king","content":"x"}]"#,
        "Invalid 'messages[0].role': Supported values are: 'system', 'developer', 'user', 'assistant', 'tool' and 'function'.",
        "messages[0].role",
    );
    messages_check(
        r#"[{"role":"user"}]"#,
        "Missing required parameter: 'messages[0].content'.",
        "messages[0].content",
    );
    messages_check(
        r#"[{"role":"user","content":7}]"#,
        "Invalid type for 'messages[0].content': expected one of a string or array of objects, but got an integer instead.",
        "messages[0].content",
    );
    messages_check(
        r#"[{"role":"user","content":[{"type":"text"}]}]"#,
        "Missing required parameter: 'messages[0].content[0].text'.",
        "messages[0].content[0].text",
    );
    check(
        COMPLETIONS,
        r#"{"model":"m","prompt":[]}"#,
        "Invalid 'prompt': empty array. Expected at least one prompt.",
        Some("prompt"),
    );
    check(
        COMPLETIONS,
        r#"{"model":"m","prompt":[[]]}"#,
        "Invalid 'prompt[0]': empty array. Expected token ids.",
        Some("prompt[0]"),
    );
    check(
        COMPLETIONS,
        r#"{"model":"m","prompt":["a",1]}"#,
        "Invalid type for 'prompt[1]': expected one of a string, array of strings, array of integers or array of integer arrays, but got an integer instead.",
        Some("prompt[1]"),
    );
    check(
        COMPLETIONS,
        r#"{"model":"m","prompt":[1,-1]}"#,
        "Invalid 'prompt': expected an array of token ids, integers from 0 to 4294967295.",
        Some("prompt"),
    );
    check(
        COMPLETIONS,
        &completion(r#","logprobs":true"#),
        "Invalid type for 'logprobs': expected an integer, but got a boolean instead.",
        Some("logprobs"),
    );
    check("/tokenize", r#"{"model":"m"}"#, "Missing required parameter: 'prompt'.", Some("prompt"));
    check("/detokenize", "{}", "Missing required parameter: 'tokens'.", Some("tokens"));
    let many = json!({"model": "m", "prompt": vec!["x"; 200], "n": 3}).to_string();
    check(
        COMPLETIONS,
        &many,
        "Invalid 'n': 200 prompts with 3 choices each are more than 512 choices.",
        Some("n"),
    );
}

#[test]
fn usage_of_streams() {
    let check = |options: &str, expect: (bool, bool)| {
        let body = chat(&format!(r#","stream":true,"stream_options":{options}"#));
        let Ok(Ask::Generate(call)) = post(CHAT, &body) else { panic!("{options}") };
        assert_eq!((call.include_usage, call.continuous_usage), expect, "{options}");
        let spec = crate::RenderSpec::new(&call);
        assert_eq!(spec.continuous_usage, expect == (true, true), "nothing without `include_usage`");
    };
    check("{}", (false, false));
    check(r#"{"include_usage":true}"#, (true, false));
    check(r#"{"include_usage":true,"continuous_usage_stats":true}"#, (true, true));
    check(r#"{"continuous_usage_stats":true}"#, (false, true));
}

#[test]
fn what_is_beyond_text_is_noted_not_ignored() {
    let check = |path: &str, body: &str, params: &[&str]| {
        let call = generate(path, body);
        let noted: Vec<&str> = call.needs.iter().map(|need| need.param.as_str()).collect();
        assert_eq!(noted, params, "{body}");
        assert_eq!(call.body, body, "an upstream gets it as it came");
        for need in &call.needs {
            assert_eq!((need.class().code, need.param()), (Code::NotSupported, Some(need.param.as_str())));
            let says = format!("'{}' is not supported here: ", need.param);
            assert!(need.to_string().starts_with(&says), "{need}");
        }
    };
    let part = |part: &str| {
        format!(
            r#"{{"model":"m","messages":[{{"role":"user","content":[{{"type":"text","text":"a"}},{part},{part}]}}]}}"#
        )
    };
    check(CHAT, &part(r#"{"type":"image_url","image_url":{"url":"x"}}"#), &["messages[0].content[1]"]);
    check(CHAT, &part(r#"{"type":"input_audio"}"#), &["messages[0].content[1]"]);
    check(CHAT, &part(r#"{"type":"refusal","refusal":"no"}"#), &["messages[0].content[1]"]);
    let Prompt::Chat { messages, .. } = generate(CHAT, &part(r#"{"type":"image_url"}"#)).prompt else {
        panic!()
    };
    assert_eq!(messages[0].content, Content::Parts(vec!["a".into()]));
    for (rest, params) in [
        ("", &[][..]),
        (r#","response_format":{"type":"json_object"}"#, &[]),
        (r#","response_format":{"type":"structural_tag"}"#, &["response_format"]),
        (r#","tools":[{"function":{"name":"f"}}],"tool_choice":"required""#, &[]),
        (r#","tools":[],"tool_choice":"auto""#, &[]),
        (r#","tools":[{"type":"custom"}]"#, &["tools[0].type"]),
        (r#","prediction":{"type":"content","content":"x"}"#, &["prediction"]),
        (r#","web_search_options":{}"#, &["web_search_options"]),
        (r#","audio":{"voice":"x"}"#, &["audio"]),
        (r#","modalities":["text","audio"]"#, &["modalities"]),
        (r#","modalities":["text"]"#, &[]),
        (r#","guided_json":{}"#, &["guided_json"]),
        (r#","structured_outputs":{"json":{}}"#, &[]),
        (r#","structured_outputs":{"structural_tag":"{}"}"#, &["structured_outputs.structural_tag"]),
        (r#","bad_words":["x"],"allowed_token_ids":[1]"#, &[]),
        (r#","use_beam_search":true"#, &["use_beam_search"]),
        (r#","use_beam_search":false"#, &[]),
        (r#","functions":[{}],"function_call":"auto""#, &["functions"]),
    ] {
        check(CHAT, &chat(rest), params);
    }
    check(COMPLETIONS, &completion(r#","suffix":"x""#), &["suffix"]);
    check(COMPLETIONS, &completion(r#","best_of":3"#), &["best_of"]);
    check(COMPLETIONS, &completion(r#","best_of":1,"suffix":"""#), &[]);
}

#[test]
fn what_nobody_could_count_is_refused() {
    let check = |path: &str, body: &str, param: &str| {
        let error = post(path, body).map(|ask| format!("{ask:?}")).expect_err(body);
        assert_eq!((error.class().code, error.param()), (Code::NotSupported, Some(param)), "{error}");
        assert!(error.to_string().starts_with(&format!("'{param}' is not supported here: ")), "{error}");
    };
    check(COMPLETIONS, r#"{"model":"m","prompt_embeds":"x"}"#, "prompt_embeds");
    let image = r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#;
    check("/tokenize", image, "messages[0].content[0]");
}

#[test]
fn compressed_bodies_are_refused() {
    let check = |given: Option<&str>, ok: bool| assert_eq!(check_encoding(given).is_ok(), ok, "{given:?}");
    check(None, true);
    check(Some(""), true);
    check(Some("identity"), true);
    check(Some(" Identity "), true);
    check(Some("gzip"), false);
    check(Some("identity, br"), false);
    let fault = check_encoding(Some("gzip")).unwrap_err().into_fault();
    assert_eq!(fault.class.code, Code::UnsupportedMediaType);
    assert_eq!(
        fault.message,
        "Unsupported content-encoding 'gzip': send the body as it is, uncompressed and without this header."
    );
    assert_eq!(fault.headers, [("accept-encoding", "identity".to_owned())]);
}

#[test]
fn the_longest_prompt_counts() {
    let check = |path: &str, body: &str, expect: usize| {
        assert_eq!(generate(path, body).prompt.bytes_max(), expect, "{body}");
    };
    check(COMPLETIONS, r#"{"model":"m","prompt":"abc"}"#, 3);
    check(COMPLETIONS, r#"{"model":"m","prompt":["abc","é","12345"]}"#, 5);
    check(COMPLETIONS, r#"{"model":"m","prompt":[1,2,3]}"#, 0);
    check(CHAT, &chat(""), 2);
    // Whatever a template could write: 2 of content, and the strings and keys of the rest.
    check(
        CHAT,
        &chat(r#","tools":[{"function":{"name":"ab"}}],"chat_template_kwargs":{"x":"abc"}"#),
        2 + 8 + 4 + 2 + 3,
    );
    let calls = r#"{"model":"m","messages":[{"role":"assistant","content":null,"tool_calls":[{"function":{"name":"f"}}]}]}"#;
    check(CHAT, calls, 8 + 4 + 1);
}

#[test]
fn tokenize_shapes() {
    let Ok(Ask::Tokenize(call)) = post("/tokenize", r#"{"prompt":"a","add_special_tokens":false}"#) else {
        panic!()
    };
    assert!(matches!(call.input, TokenizeInput::Prompt(prompt) if prompt == "a"));
    assert_eq!((call.model, call.add_special_tokens, call.return_token_strs), (None, Some(false), false));
    let Ok(Ask::Tokenize(call)) = post("/tokenize", &chat("")) else { panic!() };
    assert!(matches!(
        call.input,
        TokenizeInput::Messages {
            add_generation_prompt: true,
            continue_final_message: false,
            tools: None,
            chat_template_kwargs: None,
            ..
        }
    ));
    assert_eq!(call.add_special_tokens, None);
    let rest = r#","add_generation_prompt":false,"continue_final_message":true,"add_special_tokens":true,
        "chat_template_kwargs":{"x":"abc"},"tools":[{"type":"function","function":{"name":"f"}}]"#;
    let Ok(Ask::Tokenize(call)) = post("/tokenize", &chat(rest)) else { panic!() };
    assert_eq!(call.input.bytes_max(), generate(CHAT, &chat(rest)).prompt.bytes_max());
    assert_eq!(call.add_special_tokens, Some(true));
    let TokenizeInput::Messages {
        continue_final_message: true, tools: Some(_), chat_template_kwargs, ..
    } = call.input
    else {
        panic!()
    };
    assert_eq!(chat_template_kwargs.and_then(|mut kwargs| kwargs.remove("x")), Some("abc".into()));
    let refused_for = |rest: &str, param: &str| {
        assert_eq!(refused("/tokenize", &chat(rest)).1.as_deref(), Some(param), "{rest}");
    };
    refused_for(r#","continue_final_message":true,"add_generation_prompt":true"#, "continue_final_message");
    // As with chat: a generation prompt is the default.
    refused_for(r#","continue_final_message":true"#, "continue_final_message");
    refused_for(r#","chat_template_kwargs":[1]"#, "chat_template_kwargs");
    refused_for(r#","chat_template":"x""#, "chat_template");
    refused_for(r#","mm_processor_kwargs":{"a":1}"#, "mm_processor_kwargs");
    let Ok(Ask::Detokenize(call)) = post("/detokenize", r#"{"tokens":[1,2],"model":"m"}"#) else { panic!() };
    assert_eq!((call.tokens, call.model.map(|m| m.to_string())), (vec![1, 2], Some("m".into())));
    assert!(post("/tokenize", r#"{"prompt":"a","messages":[{"role":"user","content":"x"}]}"#).is_err());
}

#[test]
fn depth_and_width_are_bounded() {
    let deep = format!(r#"{{"model":"m","messages":[{}{}]}}"#, "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(refused(CHAT, &deep).1.as_deref(), Some("messages[0]"));
    let wide: String = (0..1025).map(|i| format!("\"k{i}\":0,")).collect();
    let wide = format!("{{{wide}\"model\":\"m\"}}");
    assert_eq!(refused(CHAT, &wide).0, "Too many keys in the request body: expected at most 1024.");
}

fn fragment() -> impl Strategy<Value = String> {
    prop_oneof![
        "\"(model|messages|role|content|prompt|stop|n|tools|user|text|type|logit_bias|stream_options)\"",
        "[{}\\[\\],:\"\\\\ ]",
        "(null|true|-?[0-9]{1,3}(\\.5)?|1e999|\"\\\\u[0-9a-f]{4}\")",
    ]
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        for path in [CHAT, COMPLETIONS, "/tokenize", "/detokenize"] {
            let _ = parse(&Method::POST, path, None, &Bytes::copy_from_slice(&bytes), Some(&"m".into()));
        }
    }

    #[test]
    fn no_json_like_text_panics(parts in prop::collection::vec(fragment(), 0..40)) {
        let text = parts.concat();
        let wrapped = format!("{{\"model\":\"m\",\"messages\":{text},\"prompt\":{text}}}");
        for body in [text, wrapped] {
            for path in [CHAT, COMPLETIONS, "/tokenize", "/detokenize"] {
                let _ = post(path, &body);
            }
        }
    }

    #[test]
    fn no_field_value_panics(
        field in "(n|stop|temperature|messages|prompt|tools|tool_choice|logit_bias|response_format|stream_options|seed|modalities)",
        value in "(null|true|1|-1|1\\.5|\"x\"|\\[\\]|\\[1\\]|\\[\"x\"\\]|\\[\\[1\\]\\]|\\[\\{\\}\\]|\\{\\}|\\{\"type\":\"text\"\\})",
    ) {
        let _ = post(CHAT, &chat(&format!(",\"{field}\":{value}")));
        let _ = post(COMPLETIONS, &completion(&format!(",\"{field}\":{value}")));
        let _ = post(CHAT, &format!("{{\"model\":\"m\",\"{field}\":{value}}}"));
    }

    #[test]
    fn paths_never_panic(path in ".{0,40}") {
        let _ = parse(&Method::GET, &path, None, &Bytes::new(), None);
        let _ = parse(&Method::GET, &format!("/v1/models/{path}"), None, &Bytes::new(), None);
    }
}

#[test]
fn words_and_ids_that_hold_the_output() {
    let call = generate(COMPLETIONS, &completion(r#","bad_words":["x y","z"],"allowed_token_ids":[7,9]"#));
    assert_eq!(call.bad_words, ["x y", "z"]);
    assert_eq!(call.sampling.allowed_token_ids, Some(vec![7, 9]));
    let check = |rest: &str, param: &str| {
        let error = post(COMPLETIONS, &completion(rest)).expect_err("is refused");
        assert_eq!(error.param(), Some(param), "{rest}");
    };
    check(r#","allowed_token_ids":[]"#, "allowed_token_ids");
    check(r#","allowed_token_ids":7"#, "allowed_token_ids");
    check(r#","bad_words":"x""#, "bad_words");
    check(r#","bad_words":["a"," "]"#, "bad_words[1]");
    check(r#","bad_words":[7]"#, "bad_words[0]");
}

#[test]
fn routes_are_named_by_their_paths() {
    for path in [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/chat/completions/render",
        "/v1/completions/render",
        "/inference/v1/generate",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/v1/models",
    ] {
        assert_eq!(route_name(path), Some(path));
    }
    assert_eq!(route_name("/v1/models/a/b"), Some("/v1/models/{model}"));
    assert_eq!(route_name("/v1/chat"), None);
}
