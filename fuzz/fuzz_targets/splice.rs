//! `splice` against `serde_json`. Lines of edits (`key=json` sets, `key` removes), an empty line, the body.
//!
//! Where the body is a JSON object, the result is that object with the edits made, and making them again changes
//! nothing.
#![no_main]

use std::collections::HashSet;

use bytes::Bytes;
use forebay_wire::{Edit, splice, with_model};
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value};

fuzz_target!(|data: &[u8]| {
    let Some(at) = data.windows(2).position(|pair| pair == b"\n\n") else { return };
    let Ok(lines) = std::str::from_utf8(&data[..at]) else { return };
    let body = Bytes::copy_from_slice(&data[at + 2..]);
    let mut edits = Vec::new();
    let mut values = Vec::new();
    for line in lines.lines().take(8) {
        match line.split_once('=') {
            None => {
                edits.push(Edit::remove(line));
                values.push((line, None));
            }
            Some((key, raw)) => {
                let raw = raw.trim_matches([' ', '\t', '\r']);
                let Ok(value) = serde_json::from_str::<Value>(raw) else { continue };
                edits.push(Edit::raw(key, raw));
                values.push((key, Some(value)));
            }
        }
    }

    let out = splice(&body, &edits);
    let _ = with_model(&body, "m");
    let Ok(mut expect) = serde_json::from_slice::<Map<String, Value>>(&body) else { return };
    let out = out.expect("a JSON object can be spliced");
    let mut seen = HashSet::new();
    for (key, value) in values {
        match value {
            _ if !seen.insert(key) => {}
            Some(value) => drop(expect.insert(key.to_owned(), value)),
            None => drop(expect.remove(key)),
        }
    }
    let got: Map<String, Value> = serde_json::from_slice(&out).expect("the result is JSON");
    assert_eq!(got, expect);
    assert_eq!(splice(&out, &edits).expect("the result can be spliced"), out);
    assert_eq!(splice(&body, &[]).expect("a JSON object can be spliced"), body);
});
