use forebay_flow::Stage;
use forebay_types::Code;
use serde_json::{Value, json};

use super::script::{completion, request, request_from, text};
use super::{Bench, FleetCard, config};

fn aliases() -> crate::ProxyConfig {
    config(json!({"models": [
        {"name": "gpt-4o", "deployments": [{"fleet": "b"}, {"fleet": "a"}]},
        {"name": "org/coder", "deployments": [
            {"provider": "openai", "model": "gpt-4o-mini", "api-key": "env:KEY"}]},
    ]}))
}

async fn listed(bench: &Bench, models: Option<&[&str]>) -> Vec<String> {
    let reply = bench.proxy.call(request_from(models, "/v1/models", "")).await.expect("a list");
    let list: Value = serde_json::from_str(&text(reply).await).expect("JSON");
    let data = list["data"].as_array().expect("data");
    data.iter().map(|card| card["id"].as_str().expect("id").to_owned()).collect()
}

#[tokio::test(start_paused = true)]
async fn fleets_are_models_unless_models_are_listed() {
    let bench = Bench::new(None);
    assert_eq!(listed(&bench, None).await, ["a", "b", "c"]);
    let reply = bench.proxy.call(completion("b")).await.expect("answered");
    assert_eq!(reply.headers["x-forebay-deployment"], "fleet/b");
    assert_eq!(text(reply).await, "from b");

    let bench = Bench::new(Some(&aliases()));
    assert_eq!(listed(&bench, None).await, ["gpt-4o", "org/coder"]);
    let reply = bench.proxy.call(completion("gpt-4o")).await.expect("answered");
    assert_eq!(text(reply).await, "from b");
    let fault = bench.proxy.call(completion("b")).await.expect_err("hidden");
    assert_eq!(fault.class.code, Code::ModelNotFound);
    assert_eq!(fault.message, "The model `b` does not exist or you do not have access to it.");
    assert_eq!(bench.metric("forebay_proxy_unknown_model_total"), [" 1"]);
    let names: Vec<_> = bench.proxy.models().map(|name| name.to_string()).collect();
    assert_eq!(names, ["gpt-4o", "org/coder"]);
    let first = |model: &str| bench.proxy.first_fleet(&model.into()).map(|fleet| fleet.to_string());
    assert_eq!((first("gpt-4o").as_deref(), first("org/coder"), first("b")), (Some("b"), None, None));
}

#[tokio::test(start_paused = true)]
async fn a_fleet_has_aliases_unless_models_are_listed() {
    // The name of another fleet is that fleet's.
    let bench = Bench::with_aliases(None, &["b-too", "c"]).expect("a proxy");
    assert_eq!(listed(&bench, None).await, ["a", "b", "b-too", "c"]);
    assert_eq!(listed(&bench, Some(&["b-too"])).await, ["b-too"]);
    for (name, from) in [("b-too", "from b"), ("c", "from c")] {
        let reply = bench.proxy.call(completion(name)).await.expect("answered");
        assert_eq!(text(reply).await, from);
    }
    let reply = bench.proxy.call(request("/v1/models/b-too", "")).await.expect("known");
    let card: Value = serde_json::from_str(&text(reply).await).expect("JSON");
    assert_eq!((&card["id"], &card["root"]), (&json!("b-too"), &json!("b")));
    let hidden = bench.proxy.call(request_from(Some(&["b"]), "/v1/models/b-too", "")).await;
    assert_eq!(hidden.expect_err("it may not").class.code, Code::ModelNotFound);

    let bench = Bench::with_aliases(Some(&aliases()), &["b-too"]).expect("a proxy");
    assert_eq!(listed(&bench, None).await, ["gpt-4o", "org/coder"]);
    assert!(bench.proxy.call(completion("b-too")).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn the_only_model_has_all_its_names() {
    let only = |bench: Bench| bench.proxy.only_model().map(ToString::to_string).collect::<Vec<_>>();
    let one = json!({"models": [{"name": "m", "deployments": [{"fleet": "a"}, {"fleet": "b"}]}]});
    assert_eq!(only(Bench::new(Some(&config(one)))), ["m"]);
    assert_eq!(only(Bench::new(Some(&aliases()))), [""; 0]);
    assert_eq!(only(Bench::new(None)), [""; 0], "three fleets");
    let one = FleetCard { model: "a".into(), aliases: vec!["too".into()], max_model_len: None, created: 1 };
    assert_eq!(only(Bench::with_fleets(None, vec![one]).expect("a proxy")), ["a", "too"]);
}

#[tokio::test(start_paused = true)]
async fn a_caller_sees_what_it_may_use() {
    let bench = Bench::new(None);
    let only: Option<&[&str]> = Some(&["c", "elsewhere"]);
    assert_eq!(listed(&bench, only).await, ["c"]);
    let card = async |model: &str| {
        bench.proxy.call(request_from(only, &format!("/v1/models/{model}"), "")).await.map(|_| ())
    };
    card("c").await.expect("it may");
    let fault = card("a").await.expect_err("it may not");
    assert_eq!(fault.class.code, Code::ModelNotFound, "not 403: that would tell that it exists");
}

#[tokio::test(start_paused = true)]
async fn a_model_card() {
    let bench = Bench::new(Some(&aliases()));
    let get = async |path: &str| {
        let reply = bench.proxy.call(request(path, "")).await.expect("known");
        serde_json::from_str::<Value>(&text(reply).await).expect("JSON")
    };
    let mut card = get("/v1/models/gpt-4o").await;
    let permission = card.as_object_mut().and_then(|card| card.remove("permission"));
    assert_eq!(permission.expect("vLLM's field")[0]["allow_sampling"], true);
    assert_eq!(
        card,
        json!({
            "id": "gpt-4o", "object": "model", "created": 2, "owned_by": "forebay", "root": "b",
            "parent": null, "max_model_len": 2000,
        })
    );
    let coder = get("/v1/models/org/coder").await;
    assert_eq!((&coder["root"], &coder["max_model_len"]), (&json!("gpt-4o-mini"), &Value::Null));
}

#[tokio::test(start_paused = true)]
async fn tokenize_finds_the_only_model_and_never_goes_to_a_provider() {
    let tokenize = |model: &str| request("/tokenize", &format!(r#"{{{model}"prompt": "p"}}"#));
    let bench = Bench::new(None);
    let fault = bench.proxy.call(tokenize("")).await.expect_err("which?");
    assert_eq!((fault.class.code, fault.param.as_deref()), (Code::BadRequest, Some("model")));

    let one = config(json!({"models": [{"name": "m", "deployments": [
        {"provider": "openai", "model": "x", "api-key": "env:KEY"}, {"fleet": "c"}]}]}));
    let bench = Bench::new(Some(&one));
    let reply = bench.proxy.call(tokenize("")).await.expect("the only one");
    assert_eq!(text(reply).await, "from c");

    let bench = Bench::new(Some(&aliases()));
    let fault = bench.proxy.call(tokenize(r#""model": "org/coder", "#)).await.expect_err("a provider");
    assert_eq!(fault.class.code, Code::NotSupported);
}
