//! Token ids in and out, and how a prompt is cut.

use forebay_wire::TruncationSide;

use super::*;

/// What the reply says of its only prompt, and the ids of the output.
fn ids(events: &[Event]) -> (Vec<u32>, Vec<u32>) {
    let mut output = Vec::new();
    let mut prompt = Vec::new();
    for event in events {
        match event {
            Event::Prompt(told) => prompt.extend_from_slice(&told.ids),
            Event::Delta(delta) => output.extend_from_slice(&delta.token_ids),
            _ => {}
        }
    }
    (prompt, output)
}

fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

#[tokio::test]
async fn ids_are_those_of_all_tokens() {
    let bench = bench(says("hi", "yes, and more"), |_| {});
    let check = async |change: fn(&mut Generate), output: &[u32], said: &str| {
        let mut call = Generate { return_token_ids: true, ..greedy("hi") };
        change(&mut call);
        let events = bench.events(call).await.unwrap();
        assert_eq!(ids(&events), (bytes("hi"), output.to_vec()));
        assert_eq!(usage(&events).completion_tokens as usize, output.len());
        assert_eq!(text(&events, 0), said);
    };
    let whole = [bytes("yes, and more"), vec![EOS]].concat();
    check(|_| {}, &whole, "yes, and more").await;
    check(|c| c.stop = vec![", and".into()], &bytes("yes, and"), "yes").await;
    check(|c| c.echo = true, &whole, "hiyes, and more").await;
    check(|c| c.prompt = Prompt::Tokens(vec![bytes("hi")]), &whole, "yes, and more").await;
    let plain = bench.events(greedy("hi")).await.unwrap();
    assert_eq!(ids(&plain), (vec![], vec![]), "nobody asked");
}

#[tokio::test]
async fn a_prompt_is_cut_as_asked() {
    let bench = bench(fake(), |c| c.model_len_max = 20);
    let check = async |text: &str, keep: i32, side: TruncationSide, max: u32, expect: Result<&str, &str>| {
        let call = Generate {
            truncate_prompt_tokens: Some(keep),
            truncation_side: side,
            return_token_ids: true,
            echo: true,
            max_tokens: Some(max),
            ..greedy(text)
        };
        match (bench.events(call).await, expect) {
            (Ok(events), Ok(expect)) => {
                assert_eq!(ids(&events).0, bytes(expect));
                assert!(super::text(&events, 0).starts_with(expect), "the echo is what the model saw");
            }
            (Err(fault), Err(expect)) => {
                assert_eq!(fault.param.as_deref(), Some("truncate_prompt_tokens"));
                assert!(fault.message.contains(expect), "{}", fault.message);
            }
            (got, expect) => panic!("{keep}: {got:?} instead of {expect:?}"),
        }
    };
    use TruncationSide::{Left, Right};
    check("abcdef", 4, Left, 2, Ok("cdef")).await;
    check("abcdef", 4, Right, 2, Ok("abcd")).await;
    check("abcdef", 6, Left, 2, Ok("abcdef")).await;
    check("abcdef", 10, Left, 2, Ok("abcdef")).await;
    check("abcdefghijklmnopqrstuvwxyz", -1, Left, 4, Ok("klmnopqrstuvwxyz")).await;
    check("abcdefghijklmnopqrstuvwxyz", -1, Right, 4, Ok("abcdefghijklmnop")).await;
    check(
        "abc",
        17,
        Left,
        4,
        Err("truncate_prompt_tokens=17 cannot be greater than max_model_len - max_tokens = 16"),
    )
    .await;
}

#[tokio::test]
async fn a_chat_goes_on_in_its_last_message() {
    let continued = "<|im_start|>user\nName one.<|im_end|>\n<|im_start|>assistant\nThe Rh";
    let bench = bench(says(continued, "ine"), |c| c.model_len_max = 200);
    let message = |role: &str, content: &str| ChatMessage {
        role: role.into(),
        content: Content::Text(content.into()),
        extra: serde_json::Map::new(),
    };
    let call = |echo| Generate {
        api: Api::ChatCompletions,
        prompt: Prompt::Chat {
            messages: vec![message("user", "Name one."), message("assistant", "The Rh")],
            tools: None,
            add_generation_prompt: false,
            chat_template_kwargs: None,
        },
        continue_final_message: true,
        echo,
        ..greedy("")
    };
    assert_eq!(text(&bench.events(call(false)).await.unwrap(), 0), "ine");
    assert_eq!(text(&bench.events(call(true)).await.unwrap(), 0), "The Rhine");
}

#[tokio::test]
async fn deltas_wait_for_as_many_tokens_as_asked() {
    let bench = bench(says("hi", "eleven char"), |_| {});
    let check = async |interval: u32, stream: bool, expect: &[u32]| {
        let call = Generate { stream_interval: interval, stream, ..greedy("hi") };
        let events = bench.events(call).await.unwrap();
        let tokens =
            events.iter().filter_map(|e| if let Event::Delta(d) = e { Some(d.tokens) } else { None });
        assert_eq!(tokens.collect::<Vec<_>>(), expect);
        assert_eq!(text(&events, 0), "eleven char");
    };
    check(4, true, &[1, 4, 4, 3]).await;
    check(100, true, &[1, 11]).await;
    check(1, true, &[1; 12]).await;
    check(100, false, &[1; 12]).await;
}

#[tokio::test]
async fn control_tokens_are_text_on_request() {
    let bench = bench(says("hi", "ab"), |_| {});
    let call =
        |skip| Generate { skip_special_tokens: skip, ignore_eos: true, max_tokens: Some(3), ..greedy("hi") };
    assert_eq!(text(&bench.events(call(true)).await.unwrap(), 0), "ab");
    assert_eq!(text(&bench.events(call(false)).await.unwrap(), 0), "ab<|end|>");
}
