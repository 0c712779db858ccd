//! What a person sees for each kind of mistake, character by character.

mod sample;

use forebay_config::{Diagnostic, Loaded, Source, load};
use sample::Sample;

fn loaded(text: &str) -> Loaded<Sample> {
    load(&Source::new("forebay.yaml", text)).unwrap_or_else(|diagnostics| panic!("{diagnostics}"))
}

fn shown(text: &str) -> String {
    match load::<Sample>(&Source::new("forebay.yaml", text)) {
        Ok(loaded) => panic!("no mistake found: {loaded:?}"),
        Err(diagnostics) => diagnostics.to_string(),
    }
}

/// The whole text, `expect` without its first line break.
fn check(text: &str, expect: &str) {
    let got = shown(text);
    assert_eq!(got, expect.strip_prefix('\n').unwrap_or(expect), "\n{got}");
}

/// The title and label of each mistake, one line each.
fn check_brief(text: &str, expect: &[&str]) {
    let diagnostics = load::<Sample>(&Source::new("forebay.yaml", text)).expect_err("no mistake found");
    let json = diagnostics.to_json();
    let brief: Vec<String> = json
        .as_array()
        .expect("an array")
        .iter()
        .map(|one| {
            let text = |key: &str| one[key].as_str().unwrap_or("-").to_owned();
            format!("{}:{} {}: {}", one["line"], one["column"], text("message"), text("label"))
        })
        .collect();
    assert_eq!(brief, expect, "\n{diagnostics}");
}

#[test]
fn reads_the_shape_of_the_real_file() {
    let loaded = loaded(
        r#"
edge:
  listen: 0.0.0.0:8443
  tls: {cert: server.pem, key: file:server.key}
  routes:
    - &llm {path: /v1/, to: llm}
    - {path: /api/v1/users/, to: "http://127.0.0.1:9000", waf: on}
    - {<<: *llm, path: /api/v1/chat/}
gateway:
  consumers:
    - name: 007
      keys: [env:TEAM_A_KEY]
      limits: {requests-per-minute: 500}
router:
  fleets:
    - {model: smollm2, replicas: engine}
    - {model: other, replicas: [engine, "http://127.0.0.1:8001"], ports: [1, 2]}
  canary: 1
proxy: null
store: {dir: data}
"#,
    );
    let config = &loaded.config;
    let edge = config.edge.as_ref().expect("is set");
    assert_eq!(edge.listen.to_string(), "0.0.0.0:8443");
    assert!(edge.routes[1].waf && !edge.routes[0].waf);
    assert_eq!((edge.routes[2].path.as_str(), edge.routes[2].to.as_str()), ("/api/v1/chat/", "llm"));
    assert_eq!(edge.body_max.to_string(), "10MiB");
    let consumer = &config.gateway.as_ref().expect("is set").consumers[0];
    assert_eq!((consumer.name.as_str(), consumer.limits["requests-per-minute"].get()), ("007", 500));
    let router = config.router.as_ref().expect("is set");
    assert_eq!(router.fleets[0].replicas.as_slice(), ["engine"]);
    assert_eq!((router.fleets[1].replicas.len(), router.fleets[1].ports), (2, Some((1, 2))));
    assert!(config.proxy.is_none());
}

#[test]
fn empty_is_an_empty_mapping_but_an_empty_section_is_there() {
    assert!(loaded("").config.edge.is_none());
    assert!(loaded("# nothing\n---\n").config.edge.is_none());
    assert!(loaded("\u{feff}edge:\n").config.edge.is_some());
    assert!(loaded("edge: ~\n").config.edge.is_none());
}

#[test]
fn unknown_key() {
    check(
        "edge: {}\nrouter:\n\n\n\n\n\n\n\n\n\n\n\n  queued-token-max: 10\n",
        "
error: unknown key `queued-token-max` in `router`
 --> forebay.yaml:14:3
   |
14 |   queued-token-max: 10
   |   ^^^^^^^^^^^^^^^^ did you mean `queued-tokens-max`?
   = help: uncached prompt tokens a worker may have waiting before it is skipped
",
    );
    check(
        "fleets: []\n",
        "
error: unknown key `fleets`
 --> forebay.yaml:1:1
  |
1 | fleets: []
  | ^^^^^^ not a key of this
  = help: `fleets` is a key of `router`
",
    );
    check(
        "edge:\n  routes:\n    - {path: /, to: llm, colour: red}\n",
        "
error: unknown key `colour` in `edge.routes[0]`
 --> forebay.yaml:3:26
  |
3 |     - {path: /, to: llm, colour: red}
  |                          ^^^^^^ no such key
  = help: expected `path`, `to` or `waf`
",
    );
}

#[test]
fn missing_key() {
    check(
        "edge:\n  tls: {cert: server.pem}\n",
        "
error: missing key `key` in `edge.tls`
 --> forebay.yaml:2:3
  |
2 |   tls: {cert: server.pem}
  |   ^^^ `key` is needed here
  = help: `key`: the private key in PEM
",
    );
    check(
        "edge:\n  routes:\n    - to: llm\n",
        "
error: missing key `path` in `edge.routes[0]`
 --> forebay.yaml:3:7
  |
3 |     - to: llm
  |       ^^ `path` is needed here
",
    );
}

#[test]
fn wrong_value() {
    check(
        "edge:\n  idle-timeout: 30\n",
        "
error: wrong value for `edge.idle-timeout`
 --> forebay.yaml:2:17
  |
2 |   idle-timeout: 30
  |                 ^^ `30` has no unit; write `30s` for seconds or `30ms` for milliseconds
",
    );
    check(
        "edge:\n  routes:\n",
        "
error: wrong value for `edge.routes`
 --> forebay.yaml:2:3
  |
2 |   routes:
  |   ^^^^^^ expected a list, found no value
  = help: write `[]` for an empty list, or remove the key
",
    );
    check(
        "router:\n  policy: prefix-cash\n",
        "
error: unknown value for `router.policy`
 --> forebay.yaml:2:11
  |
2 |   policy: prefix-cash
  |           ^^^^^^^^^^^ did you mean `prefix-cache`?
",
    );
    check_brief(
        "router:
  queued-tokens-max: -4
  policy: 3
  canary: lots
  fleets:
    - {model: , replicas: {a: b}}
    - {model: x, ports: [1, 2, 3]}
    - {model: x, ports: [1]}
    - {model: x, ports: [1, 70000]}
    - {model: x, ports: 12}
    - just-text
    - [a, b]
edge: {listen: [a:1, 8080], routes: [{path: /, to: x, waf: maybe}]}
gateway: {consumers: [{name: a, keys: [], limits: {rpm: 0}}]}
",
        &[
            "2:22 wrong value for `router.queued-tokens-max`: expected a whole number from 0 to 4294967295, found `-4`",
            "3:11 unknown value for `router.policy`: expected `prefix-cache` or `round-robin`",
            "4:11 wrong value for `router.canary`: expected a number, found text",
            "6:8 wrong value for `router.fleets[0].model`: expected text, found no value",
            "6:17 wrong value for `router.fleets[0].replicas`: expected text, found a mapping",
            "7:18 wrong value for `router.fleets[1].ports`: expected a list of 2, found 3 values",
            "8:18 wrong value for `router.fleets[2].ports`: expected a list of 2, found 1 value",
            "9:29 wrong value for `router.fleets[3].ports[1]`: expected a whole number from 0 to 65535, found `70000`",
            "10:25 wrong value for `router.fleets[4].ports`: expected a list of 2, found `12`",
            "11:7 wrong value for `router.fleets[5]`: expected a mapping, found text",
            "12:7 wrong value for `router.fleets[6]`: expected a mapping, found a list",
            "13:22 wrong value for `edge.listen[1]`: the host is missing; write `127.0.0.1:8080` for this machine \
             only or `0.0.0.0:8080` for all interfaces",
            "13:60 wrong value for `edge.routes[0].waf`: expected `true` or `false`, found text",
            "14:57 wrong value for `gateway.consumers[0].limits.rpm`: expected a whole number above 0, found `0`",
        ],
    );
    check_brief("- a\n", &["1:1 wrong value for the whole file: expected a mapping, found a list"]);
    check_brief("text\n", &["1:1 wrong value for the whole file: expected a mapping, found text"]);
}

#[test]
fn wrong_choice() {
    check_brief("store: redi", &["1:8 unknown value for `store`: did you mean `redis`?"]);
    check_brief("store: redis", &["1:8 wrong value for `store`: `redis` needs a value: write `{redis: …}`"]);
    check_brief(
        "store:",
        &["1:1 wrong value for `store`: expected `dir`, `redis` or `memory`, found no value"],
    );
    check_brief(
        "store: {disk: x}",
        &["1:9 unknown choice `disk` in `store`: expected `dir`, `redis` or `memory`"],
    );
    check_brief(
        "store: {dir: x, redis: env:R}",
        &["1:1 wrong value for `store`: expected one key, `dir`, `redis` or `memory`, found several keys"],
    );
    check_brief(
        "store: {memory: 1}",
        &["1:17 wrong value for `store.memory`: expected `memory` alone, found a value"],
    );
    check_brief("store: {dir: [a]}", &["1:9 wrong value for `store.dir`: expected text, found a list"]);
    assert!(matches!(loaded("store: memory").config.store, Some(sample::Store::Memory)));
    assert!(matches!(loaded("store: {memory: }").config.store, Some(sample::Store::Memory)));
}

#[test]
fn points_into_tagged_enums() {
    check_brief(
        "proxy:
  backends:
    - {provider: openai, model: x, api-kye: env:K}
    - {provider: openay, model: x, api-key: env:K}
    - {provider: anthropic, model: x, retries: 300}
    - {provider: anthropic, model: 12}
    - {model: x}
    - {provider: openai, model: x}
",
        &[
            "3:36 unknown key `api-kye` in `proxy.backends[0]`: did you mean `api-key`?",
            "4:18 unknown value for `proxy.backends[1].provider`: did you mean `openai`?",
            "5:48 wrong value for `proxy.backends[2].retries`: expected a whole number from 0 to 255, found `300`",
            "6:36 wrong value for `proxy.backends[3].model`: expected text, found `12`",
            "7:7 missing key `provider` in `proxy.backends[4]`: `provider` is needed here",
            "8:7 missing key `api-key` in `proxy.backends[5]`: `api-key` is needed here",
        ],
    );
}

#[test]
fn what_follows_from_a_mistake_is_not_another() {
    // `modell` was meant as `model`, so `model` is not missing; the fleet is not reported again as a whole.
    check_brief(
        "router: {fleets: [{modell: x}]}",
        &["1:20 unknown key `modell` in `router.fleets[0]`: did you mean `model`?"],
    );
    // But two independent mistakes in one mapping are two.
    check_brief(
        "router: {fleets: [{colour: x}]}",
        &[
            "1:19 missing key `model` in `router.fleets[0]`: `model` is needed here",
            "1:20 unknown key `colour` in `router.fleets[0]`: no such key",
        ],
    );
    // A mistake behind an anchor is one mistake.
    check_brief(
        "router: {fleets: [&f {model: x, port: 1}, *f, *f]}",
        &["1:33 unknown key `port` in `router.fleets[0]`: did you mean `ports`?"],
    );
}

#[test]
fn reports_at_most_fifty() {
    let text: String = (0..200).map(|i| format!("k{i}: 1\n")).collect();
    let diagnostics = load::<Sample>(&Source::new("x", text)).expect_err("no mistake found");
    assert_eq!(diagnostics.errors(), 50);
}

#[test]
fn duplicate_key() {
    check(
        "edge:\n  listen: a:1\n  tls: ~\n  listen: b:1\n",
        "
error: the key `listen` is there twice
 --> forebay.yaml:4:3
  |
2 |   listen: a:1
  |   ------ first set here
...
4 |   listen: b:1
  |   ^^^^^^ set again here
  = help: keep one of them
",
    );
    check(
        "edge: {tls: ~, tls: ~}\n",
        "
error: the key `tls` is there twice
 --> forebay.yaml:1:16
  |
1 | edge: {tls: ~, tls: ~}
  |        --- first set here
  |                ^^^ set again here
  = help: keep one of them
",
    );
}

#[test]
fn not_yaml() {
    check(
        "edge:\n\tlisten: a:1\n",
        "
error: this is not YAML
 --> forebay.yaml:2:2
  |
2 |  listen: a:1
  |  ^ tabs disallowed within this context (block indentation)
  = help: indent with spaces: YAML does not allow tabs
",
    );
    check(
        "edge: {listen: [a:1, b:2}\n",
        "
error: this is not YAML
 --> forebay.yaml:1:25
  |
1 | edge: {listen: [a:1, b:2}
  |                         ^ while parsing a flow sequence, expected ',' or ']'
  = help: check the brackets, braces and commas before this
",
    );
    let brief = |text: &str, place: &str, help: &str| {
        let shown = shown(text);
        assert!(shown.contains(place) && shown.contains(help), "{shown}");
    };
    brief("edge:\n  listen: \"a:1\n  tls: x\n", "yaml:2:11", "a quote before this is not closed");
    brief("edge:\n  listen: \"a:1\n", "yaml:2:11", "a quote before this is not closed");
    brief("a: b: c", "yaml:1:5", "put quotes around a value that contains `: `");
    brief("x: *nope", "yaml:1:4", "put quotes around text that begins with `*`");
    brief("   key: api\n bad", "yaml:2:2", "indented like its neighbours");
    brief("edge: &e\n  x: *e\n", "yaml:2:6", "an anchor that contains itself");
    brief("---\nedge: {}\n---\nedge: {}\n", "yaml:3:1", "a second document");
    brief("edge: !custom {}\n", "yaml:1:7", "the tag `!custom` has no meaning here");
    brief("? [a, b]\n: c\n", "yaml:1:3", "a key must be plain text");
    brief("<<: 3\n", "yaml:1:5", "`<<` merges mappings only");
}

#[test]
fn never_shows_a_secret() {
    let check = |text: &str| {
        let diagnostics = load::<Sample>(&Source::new("x", text)).expect_err("no mistake found");
        let shown = format!("{diagnostics}{}{}{diagnostics:?}", diagnostics.to_ansi(), diagnostics.to_json());
        assert!(!shown.contains("sk-"), "{shown}");
        assert!(shown.contains("***"), "{shown}");
    };
    // In its place, beside a mistake.
    check("proxy: {backends: [{provider: openay, model: x, api-key: sk-1}]}");
    check("gateway: {consumers: [{nam: x, keys: [env:A, \"sk-1\", sk-2]}]}");
    check("store: {redis: sk-1, x: 1}");
    // Misspelt, misplaced, in the wrong shape, or where the file can't be parsed.
    check("proxy: {backends: [{provider: openai, model: x, api-kye: sk-1}]}");
    check("api-key: sk-1");
    check("gateway: {consumers: [{name: x, keys: sk-1}]}");
    check("gateway: {consumers: [{name: x, keys: [{a: sk-1}]}]}");
    check("proxy: {backends: [{api-key: \"sk-1\", model: x]");
    check("gateway: {consumers: [{name: x, keys: [\"sk-1\n  sk-2\", env:], bad: 1}]}");
    // References are shown: the name is what the reader needs.
    assert!(shown("api-key: env:OPENAI_KEY").contains("env:OPENAI_KEY"));
    assert!(
        shown("edge: {tls: {cert: my-cert, kee: file:my-key}}").contains("cert: my-cert, kee: file:my-key")
    );

    let loaded = loaded("store: {redis: sk-1}\ngateway: {consumers: [{name: x, keys: [env:A, sk-2]}]}");
    assert!(!format!("{loaded:?}{:?}", loaded.source()).contains("sk-"));
    let warnings = loaded.diagnostics(loaded.plain_secret_warnings());
    assert!(!warnings.has_errors());
    assert_eq!(
        warnings.to_string(),
        "\
warning: the secret `store.redis` is in plain text
 --> forebay.yaml:1:16
  |
1 | store: {redis: ****}
  |                ^^^^ whoever can read this file has it
  = help: write `env:NAME` for an environment variable, or `file:PATH` for a file

warning: the secret `gateway.consumers[0].keys[1]` is in plain text
 --> forebay.yaml:2:47
  |
2 | gateway: {consumers: [{name: x, keys: [env:A, ****]}]}
  |                                               ^^^^ whoever can read this file has it
  = help: write `env:NAME` for an environment variable, or `file:PATH` for a file
"
    );
}

#[test]
fn later_checks_point_into_the_file() {
    let loaded = loaded("router:\n  fleets:\n    - model: a\n    - model: b\n      replicas: [x]\n");
    let mut all = loaded.diagnostics([
        loaded.error_at("router.fleets[1].replicas[0]", "no replica `x`").help("write `engine` or a URL"),
        loaded.warning_at("router.fleets[0].replicas", "this fleet has no replicas").label("none here"),
        Diagnostic::warning("no `edge`: nothing listens"),
    ]);
    all.push(loaded.error_at("router.fleets", "two fleets"));
    assert_eq!(
        all.to_string(),
        "\
warning: no `edge`: nothing listens
 --> forebay.yaml

error: two fleets
 --> forebay.yaml:2:3
  |
2 |   fleets:
  |   ^^^^^^

warning: this fleet has no replicas
 --> forebay.yaml:3:7
  |
3 |     - model: a
  |       ^^^^^ none here

error: no replica `x`
 --> forebay.yaml:5:18
  |
5 |       replicas: [x]
  |                  ^
  = help: write `engine` or a URL
"
    );
    assert_eq!((all.len(), all.errors()), (4, 2));
    assert!(loaded.is_set("router.fleets[1].replicas") && !loaded.is_set("router.fleets[0].replicas"));
}

#[test]
fn json_for_scripts_and_colour_for_people() {
    let diagnostics =
        load::<Sample>(&Source::new("f.yaml", "edge: {lisen: a:1}")).expect_err("no mistake found");
    assert_eq!(
        diagnostics.to_json(),
        serde_json::json!([{
            "severity": "error",
            "message": "unknown key `lisen` in `edge`",
            "path": "edge.lisen",
            "file": "f.yaml",
            "line": 1, "column": 8, "end-line": 1, "end-column": 13,
            "label": "did you mean `listen`?",
            "help": "addresses to listen on",
        }])
    );
    let ansi = diagnostics.to_ansi();
    assert!(ansi.starts_with("\u{1b}[1;31merror\u{1b}[0m\u{1b}[1m: unknown key"), "{ansi:?}");
    // The same text, and nothing but colour added.
    let mut plain = String::new();
    let mut rest = ansi.as_str();
    while let Some((before, after)) = rest.split_once("\u{1b}[") {
        plain.push_str(before);
        rest = after.split_once('m').expect("an escape sequence ends with m").1;
    }
    assert_eq!(plain + rest, diagnostics.to_string());
}

#[test]
fn odd_lines_stay_readable() {
    // Wide characters take two columns.
    check(
        "edge: {tls: {cert: \"日本\", kee: x}}\n",
        "
error: unknown key `kee` in `edge.tls`
 --> forebay.yaml:1:26
  |
1 | edge: {tls: {cert: \"日本\", kee: *}}
  |                            ^^^ did you mean `key`?
  = help: the private key in PEM
",
    );
    // A long line is cut, and escape sequences in it don't reach the terminal.
    let long = format!("edge: {{listen: ['{}'], \u{9b}x: 1, lisen: 1, tls: ~}}", "a, ".repeat(2000));
    let shown = shown(&long);
    let widest = shown.lines().map(|line| line.chars().count()).max().unwrap_or(0);
    assert!(widest < 600 && shown.contains("…"), "{widest}\n{shown}");
    assert!(!shown.contains('\u{9b}') && !shown.contains('\u{1b}'), "{shown:?}");
}
