//! Output that is held to a constraint, whatever the model would rather say.

use serde_json::json;

use super::*;

fn constrained(prompt: &str, constraint: Constraint) -> Generate {
    Generate { constraint: Some(constraint), max_tokens: Some(64), ..greedy(prompt) }
}

fn choices(of: &[&str]) -> Constraint {
    Constraint::Choice(of.iter().map(|&choice| choice.to_owned()).collect())
}

#[tokio::test]
async fn the_model_says_only_what_is_allowed() {
    let bench = bench(says("go", "whatever"), |_| {});
    let check = async |constraint: Constraint, matches: &dyn Fn(&str) -> bool| {
        for seed in 0..8 {
            let sampling = Sampling { temperature: 1.5, seed: Some(seed), ..Sampling::default() };
            let call = Generate { sampling, ..constrained("go", constraint.clone()) };
            let events = bench.events(call).await.unwrap();
            assert_eq!(reason(&events, 0), Some(FinishReason::Stop), "{constraint:?}");
            let said = text(&events, 0);
            assert!(matches(&said), "{constraint:?}: {said:?}");
        }
    };
    check(choices(&["yes", "no"]), &|said| said == "yes" || said == "no").await;
    check(Constraint::Regex("[0-9]{4}".into()), &|said| said.len() == 4 && said.parse::<u32>().is_ok()).await;
    let schema = json!({"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"], "additionalProperties": false});
    check(Constraint::JsonSchema(schema), &|said| {
        serde_json::from_str::<serde_json::Value>(said).is_ok_and(|value| value["n"] == 1 || value["n"] == 22)
    })
    .await;
    for grammar in [
        "start: \"<\" WORD \">\"\nWORD: /[a-c]{1,3}/",
        "root ::= \"<\" w-ord \">\" # as xgrammar has it\nw-ord ::= [a-c]{1,3}",
    ] {
        check(Constraint::Grammar(grammar.into()), &|said| {
            let word = said.strip_prefix('<').and_then(|said| said.strip_suffix('>'));
            word.is_some_and(|word| {
                (1..=3).contains(&word.len()) && word.bytes().all(|b| b"abc".contains(&b))
            })
        })
        .await;
    }
}

#[tokio::test]
async fn the_model_chooses_where_it_may() {
    let bench = bench(says("go", "no"), |_| {});
    let events = bench.events(constrained("go", choices(&["yes", "no"]))).await.unwrap();
    assert_eq!(text(&events, 0), "no");
}

#[tokio::test]
async fn an_end_comes_where_it_must_and_not_before() {
    let bench = bench(says("go", ""), |_| {});
    // It would end at once.
    let call = constrained("go", choices(&["ab"]));
    let events = bench.events(call.clone()).await.unwrap();
    assert_eq!((text(&events, 0).as_str(), reason(&events, 0)), ("ab", Some(FinishReason::Stop)));
    // Neither can make more of it than there is.
    for call in [Generate { ignore_eos: true, ..call.clone() }, Generate { min_tokens: 10, ..call.clone() }] {
        let events = bench.events(call).await.unwrap();
        assert_eq!((text(&events, 0).as_str(), reason(&events, 0)), ("ab", Some(FinishReason::Stop)));
    }
    let events = bench.events(Generate { max_tokens: Some(1), ..call }).await.unwrap();
    assert_eq!((text(&events, 0).as_str(), reason(&events, 0)), ("a", Some(FinishReason::Length)));
}

#[tokio::test]
async fn each_choice_has_a_constraint_of_its_own() {
    let bench = bench(says("go", "whatever"), |_| {});
    let sampling = Sampling { seed: Some(5), ..Sampling::default() };
    let of = ["red", "green", "blue", "cyan"];
    let call = Generate { n: 8, sampling, ..constrained("go", choices(&of)) };
    let events = bench.events(call).await.unwrap();
    let said: Vec<String> = (0..8).map(|n| text(&events, n)).collect();
    assert!(said.iter().all(|said| of.contains(&said.as_str())), "{said:?}");
    assert!(said.iter().any(|one| *one != said[0]), "not all the same: {said:?}");
}

#[tokio::test]
async fn a_free_request_is_not_touched_by_its_neighbours() {
    let bench = bench(says("go", "one two three"), |_| {});
    let sampling = Sampling { temperature: 0.9, seed: Some(3), ..Sampling::default() };
    let regex = Generate { sampling, ..constrained("go", Constraint::Regex("[a-f]{12}".into())) };
    let alone = text(&bench.events(regex.clone()).await.unwrap(), 0);
    let (free, one, two) = tokio::join!(
        bench.events(greedy("go")),
        bench.events(regex.clone()),
        bench.events(constrained("go", choices(&["a long one that takes a while"]))),
    );
    assert_eq!(text(&free.unwrap(), 0), "one two three");
    assert_eq!(text(&one.unwrap(), 0), alone, "the same in a batch");
    assert_eq!(text(&two.unwrap(), 0), "a long one that takes a while");
}

#[tokio::test]
async fn a_constraint_that_can_not_be_compiled_is_the_clients_mistake() {
    let bench = bench(says("go", "x"), |_| {});
    let check = async |constraint: Constraint, param: &str| {
        let fault = bench.start(constrained("go", constraint)).await.unwrap_err();
        assert_eq!((fault.class.code, fault.class.blame), (Code::BadRequest, Blame::Client));
        assert_eq!(fault.param.as_deref(), Some(param), "{fault:?}");
    };
    check(Constraint::JsonSchema(json!({"type": 7})), "response_format").await;
    check(Constraint::Regex("[".into()), "structured_outputs").await;
    check(Constraint::Grammar("start: (".into()), "structured_outputs").await;
    check(Constraint::Grammar("root ::= missing".into()), "structured_outputs").await;
    assert_eq!(text(&bench.events(greedy("go")).await.unwrap(), 0), "x");
}

#[tokio::test]
async fn bad_words_do_not_come() {
    let bench = bench(says("go", "one two three"), |_| {});
    let without = async |words: &[&str]| {
        let bad_words = words.iter().map(|&word| word.to_owned()).collect();
        text(&bench.events(Generate { bad_words, ..greedy("go") }).await.unwrap(), 0)
    };
    assert_eq!(without(&["four"]).await, "one two three");
    let said = without(&["two"]).await;
    assert!(said.starts_with("one tw") && !said.contains("two"), "{said:?}");
    assert!(!without(&["e"]).await.contains('e'));
}

#[tokio::test]
async fn only_allowed_tokens_come() {
    let bench = bench(says("go", "one two three"), |_| {});
    let call = |ids: &[u32]| {
        let sampling =
            Sampling { temperature: 0.0, allowed_token_ids: Some(ids.to_vec()), ..Sampling::default() };
        Generate { sampling, max_tokens: Some(12), ..greedy("go") }
    };
    let allowed = [b'o', b'n', b'x'].map(u32::from);
    let said = text(&bench.events(call(&allowed)).await.unwrap(), 0);
    assert!(said.starts_with("on") && said.bytes().all(|b| allowed.contains(&u32::from(b))), "{said:?}");
    // What is banned and the only one allowed comes all the same.
    let both = Generate { bad_words: vec!["x".into()], ..call(&[u32::from(b'x')]) };
    assert_eq!(text(&bench.events(both).await.unwrap(), 0), "x".repeat(12));
    let fault = bench.start(call(&[9999])).await.unwrap_err();
    assert_eq!(fault.param.as_deref(), Some("allowed_token_ids"));
    // A constraint in which none of them may come can't be followed.
    let none = Generate { constraint: Some(choices(&["yes"])), ..call(&[u32::from(b'x')]) };
    assert_eq!(bench.start(none).await.unwrap_err().class.code, Code::BadRequest);
}
