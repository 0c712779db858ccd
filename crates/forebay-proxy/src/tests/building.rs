use serde_json::json;

use super::{Bench, config};

#[tokio::test(start_paused = true)]
async fn mistakes_in_the_file() {
    let check = |link: serde_json::Value, at: &str, text: &str| {
        let yaml = json!({"models": [{"name": "m", "deployments": [{"fleet": "a"}, link]}]});
        let Err(error) = Bench::try_new(Some(&config(yaml))).map(|_| ()) else { panic!("{text}: built") };
        let at = format!("proxy.models[0].deployments[1]{at}");
        assert_eq!((error.at(), error.to_string().as_str()), (Some(at.as_str()), text));
    };
    check(json!({"fleet": "d"}), ".fleet", "no fleet `d` (there is `a`, `b`, `c`)");
    check(json!({"fleet": "A"}), ".fleet", "no fleet `A` (there is `a`, `b`, `c`; did you mean `a`?)");
    let either = "a deployment is either {fleet: NAME} or {provider: openai, model: NAME, api-key: env:NAME}";
    check(json!({}), "", either);
    check(json!({"model": "x"}), "", either);
    check(json!({"fleet": "a", "provider": "openai"}), "", either);
    let not_for_fleets = "`model` belongs to a provider, and this deployment is a fleet";
    check(json!({"fleet": "a", "model": "x"}), ".model", not_for_fleets);
    check(json!({"provider": "openai", "api-key": "env:KEY"}), "", "the provider needs `model`");
    check(json!({"provider": "openai", "model": "x"}), "", "the provider needs `api-key`");
    check(json!({"provider": "anthropic", "model": "x"}), "", "the provider needs `api-key`");
    check(json!({"provider": "openai-compatible", "model": "x"}), "", "the provider needs `base-url`");
    let url = "the provider's `base-url` can't be used";
    check(json!({"provider": "openai-compatible", "model": "x", "base-url": "ftp://x"}), ".base-url", url);
    check(
        json!({"provider": "openai", "model": "x", "api-key": "env:NOT_SET"}),
        ".api-key",
        "the provider's key can't be read",
    );
    check(json!({"provider": "openai", "model": "x", "api-key": "env:BAD"}), ".api-key", url);
    let label = "a deployment's name can't stand in a response header: only visible ASCII can";
    check(json!({"provider": "openai", "model": "ä", "api-key": "env:KEY"}), "", label);
}

#[tokio::test(start_paused = true)]
async fn mistakes_in_the_list() {
    let check = |models: serde_json::Value, at: &str, text: &str| {
        let Err(error) = Bench::try_new(Some(&config(json!({"models": models})))).map(|_| ()) else {
            panic!("{text}: built")
        };
        assert_eq!((error.at(), error.to_string().as_str()), (Some(at), text));
    };
    let m = json!({"name": "m", "deployments": [{"fleet": "a"}]});
    check(
        json!([m, m]),
        "proxy.models[1].name",
        "the model `m` stands here twice; list all its deployments in one",
    );
    check(
        json!([{"name": "m", "deployments": []}]),
        "proxy.models[0].deployments",
        "the model `m` has no deployments; add one like {fleet: NAME}",
    );
    check(
        json!([{"name": "", "deployments": [{"fleet": "a"}]}]),
        "proxy.models[0].name",
        "the model's name can't be empty",
    );
}
