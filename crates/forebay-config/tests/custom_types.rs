//! Types beyond plain structs: own validation, maps with typed keys, arrays, untagged enums.

use std::collections::BTreeMap;

use forebay_config::{Source, load};
use schemars::JsonSchema;
use serde::Deserialize;

#[derive(Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct Config {
    targets: Vec<Target>,
    by_port: BTreeMap<u16, String>,
    by_color: BTreeMap<Color, bool>,
    pair: [i64; 2],
    big: u64,
    ratio: f32,
    letter: Option<char>,
    either: Option<Either>,
}

/// Exactly one of two keys, which serde alone can't say.
#[derive(Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(try_from = "TargetKeys")]
enum Target {
    Fleet(String),
    Url(String),
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct TargetKeys {
    fleet: Option<String>,
    url: Option<String>,
}

#[derive(Debug, thiserror::Error)]
#[error("needs either `fleet` or `url`")]
struct EitherFleetOrUrl;

impl TryFrom<TargetKeys> for Target {
    type Error = EitherFleetOrUrl;

    fn try_from(keys: TargetKeys) -> Result<Self, EitherFleetOrUrl> {
        match (keys.fleet, keys.url) {
            (Some(fleet), None) => Ok(Self::Fleet(fleet)),
            (None, Some(url)) => Ok(Self::Url(url)),
            _ => Err(EitherFleetOrUrl),
        }
    }
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Color {
    Red,
    DarkBlue,
}

#[derive(Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(untagged)]
enum Either {
    Number(u32),
    Names { first: String },
}

fn check(text: &str, expect: &[&str]) {
    let brief: Vec<String> = match load::<Config>(&Source::new("x", text)) {
        Ok(loaded) => vec![format!("{:?}", loaded.config)],
        Err(diagnostics) => diagnostics
            .to_json()
            .as_array()
            .into_iter()
            .flatten()
            .map(|one| {
                let text = |key: &str| one[key].as_str().unwrap_or("-").to_owned();
                format!("{}:{} {}: {}", one["line"], one["column"], text("message"), text("label"))
            })
            .collect(),
    };
    assert_eq!(brief, expect, "{text}");
}

#[test]
fn reads_them() {
    let text = "
targets: [{fleet: a}, {url: b}]
by-port: {80: x, 443: y}
by-color: {red: on, dark-blue: false}
pair: [-1, +2]
big: 18446744073709551615
ratio: 0x10
letter: 7
either: {first: z}
";
    let config = load::<Config>(&Source::new("x", text)).unwrap_or_else(|d| panic!("{d}")).config;
    assert_eq!(
        config,
        Config {
            targets: vec![Target::Fleet("a".into()), Target::Url("b".into())],
            by_port: BTreeMap::from([(80, "x".into()), (443, "y".into())]),
            by_color: BTreeMap::from([(Color::Red, true), (Color::DarkBlue, false)]),
            pair: [-1, 2],
            big: u64::MAX,
            ratio: 16.0,
            letter: Some('7'),
            either: Some(Either::Names { first: "z".into() }),
        }
    );
}

#[test]
fn points_at_the_value_that_failed_its_own_check() {
    check(
        "targets:\n  - {fleet: a}\n  - {fleet: a, url: b}\n  - {flet: a}\n  - fleet: [a]\n    url: b\n",
        &[
            "3:5 wrong value for `targets[1]`: needs either `fleet` or `url`",
            "4:6 unknown key `flet` in `targets[2]`: did you mean `fleet`?",
            "5:5 wrong value for `targets[3].fleet`: expected text, found a list",
        ],
    );
}

#[test]
fn points_at_typed_keys_and_items() {
    check(
        "by-port: {http: x}\nby-color: {rde: on}\npair: [1, x]\nbig: 18446744073709551616\nratio: {}\nletter: ab\n",
        &[
            "1:11 wrong value for `by-port.http`: expected a whole number from 0 to 65535, found text",
            "2:12 unknown choice `rde` in `by-color`: did you mean `red`?",
            "3:11 wrong value for `pair[1]`: expected a whole number, found text",
            "4:6 wrong value for `big`: expected a whole number, not negative, found `18446744073709551616`",
            "5:1 wrong value for `ratio`: expected a number, found a mapping",
            "6:9 wrong value for `letter`: expected a single character, found text",
        ],
    );
    check("pair: [1, 2, 3]", &["1:1 wrong value for `pair`: expected a list of 2, found 3 values"]);
}

#[test]
fn untagged_enums_are_pointed_at_as_a_whole() {
    check("either: {frist: z}", &["1:1 wrong value for `either`: none of the forms that are allowed here"]);
}
