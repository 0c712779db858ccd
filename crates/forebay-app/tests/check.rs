//! `forebay check` finds what `serve` would stumble over, all at once, and explains a file that is right.

use forebay_app::check::check;
use forebay_config::{FixedEnvironment, Source};

/// Messages in the order of the file.
fn found(text: &str, env: &FixedEnvironment) -> Vec<String> {
    let report = check(&Source::new("forebay.yaml", text), env);
    report
        .diagnostics
        .iter()
        .map(|d| format!("{} {}: {}", d.severity().as_str(), d.path(), d.message()))
        .collect()
}

#[test]
fn mistakes_are_found_together() {
    let check = |text: &str, expect: &[&str]| {
        let found = found(text, &FixedEnvironment::new());
        assert_eq!(found.len(), expect.len(), "{text}\n{found:#?}");
        for (found, expect) in found.iter().zip(expect) {
            assert!(found.starts_with(expect), "{found}\n{expect}");
        }
    };
    check("engine: {}", &["error : nothing would listen"]);
    check("edge: {}", &["error : nothing would answer"]);
    check(
        "admin: {listen: 127.0.0.1:8080}\nedge: {}\nengine: {}",
        &["error admin.listen: `edge.listen` has the address 127.0.0.1:8080 too"],
    );
    check(
        "edge: {}\nengine: {model: gpt-5, block-size: 7}",
        &["error engine.model: unknown model `gpt-5`", "error engine.block-size: 7 is not a multiple of 16"],
    );
    check(
        "edge: {}\nengine: {}\ngateway: {consumers: [{name: a, keys: env:A}, {name: b, keys: [env:B, file:/no/b]}]}",
        &[
            "error gateway.consumers[0].keys: environment variable `A` is not set",
            "error gateway.consumers[1].keys[0]: environment variable `B` is not set",
            "error gateway.consumers[1].keys[1]: ",
        ],
    );
    check(
        "edge: {}\nengine: {}\nproxy: {models: [{name: m, deployments: [{fleet: other}]}]}",
        &["error proxy.models[0].deployments[0].fleet: no fleet `other`"],
    );
}

#[test]
fn what_works_but_is_hardly_meant_is_a_warning() {
    let env = FixedEnvironment::new();
    let unused = "edge: {}\nengine: {}\nrouter: {fleets: [{model: m, replicas: [\"http://127.0.0.1:1\"]}]}";
    assert_eq!(
        found(unused, &env),
        ["warning engine: no fleet uses this engine: it is loaded and never asked"]
    );
    let aliases = "edge: {}\nengine: {model: smollm2-135m-instruct, served-model-name: [m, also]}\n\
                   proxy: {models: [{name: x, deployments: [{fleet: m}]}]}";
    let lost = "clients can't ask by the further names: `proxy.models` lists all names there are";
    assert_eq!(found(aliases, &env), [format!("warning engine.served-model-name: {lost}")]);
    let plain = "edge: {}\nengine: {}\ngateway: {consumers: [{name: a, keys: sk-plain}]}";
    let found = found(plain, &env);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(
        found[0].starts_with("warning gateway.consumers[0].keys") && !found[0].contains("sk-plain"),
        "{found:?}"
    );
}

#[test]
fn a_right_file_is_explained_layer_by_layer() {
    let report = check(&Source::new("f.yaml", "edge: {}\nengine: {}\nrouter: {}"), &FixedEnvironment::new());
    assert!(report.diagnostics.is_empty(), "{}", report.diagnostics);
    let layers: Vec<(&str, bool)> = report.layers.iter().map(|layer| (layer.section, layer.runs)).collect();
    let expect = [("edge", true), ("gateway", false), ("proxy", false), ("router", true), ("engine", true)];
    assert_eq!(layers, expect);
    assert!(report.layers.iter().all(|layer| !layer.without_it.is_empty()));
}
