//! Keeps plain-text secrets out of the source lines that a diagnostic shows.
//!
//! Two nets: fields whose schema says `secret`, and, where the schema knows no scalar, keys that sound like one
//! (`api-key`, `password`; not `tokens`: those are counted). The second catches a secret under a misspelt key or
//! in a wrong shape. Where the file could not be parsed it is the only one, and works on the text of the line.

use crate::path::{Path, Segment};
use crate::schema_view::SchemaView;
use crate::source::Span;
use crate::suggest::closest;
use crate::tree::{Node, Place, Plain, Scalar, Value};

const SECRET_WORDS: &[&str] = &[
    "key",
    "keys",
    "apikey",
    "secret",
    "secrets",
    "password",
    "passwd",
    "token",
    "credential",
    "credentials",
    "bearer",
    "authorization",
];

/// `api-key`, `apiKey`, `ADMIN_PASSWORD`; not `tokens-per-minute`, not `keyword`.
fn sounds_secret(key: &str) -> bool {
    let mut words = vec![String::new()];
    let mut before = '-';
    for c in key.chars() {
        if !c.is_alphanumeric() || c.is_uppercase() && before.is_lowercase() {
            words.push(String::new());
        }
        if let Some(word) = words.last_mut().filter(|_| c.is_alphanumeric()) {
            word.extend(c.to_lowercase());
        }
        before = c;
    }
    words.iter().any(|word| SECRET_WORDS.contains(&word.as_str()))
}

fn is_reference(text: &str) -> bool {
    text.starts_with("env:") || text.starts_with("file:")
}

/// Where plain-text secrets stand in the file, with their paths, in the order of the file.
pub(crate) fn secrets(root: &Node, schema: SchemaView<'_>) -> Vec<(Span, String)> {
    let mut found = Vec::new();
    collect(&Place::root(root), false, schema, &mut |place, text| {
        if !is_reference(text) {
            found.push((place.node.span, Path(&place.path).to_string()));
        }
    });
    found
}

/// Path and text (`env:NAME`, `file:PATH`) of each secret that is a reference.
pub(crate) fn references(root: &Node, schema: SchemaView<'_>) -> Vec<(String, String)> {
    let mut found = Vec::new();
    collect(&Place::root(root), false, schema, &mut |place, text| {
        if is_reference(text) {
            found.push((Path(&place.path).to_string(), text.to_owned()));
        }
    });
    found
}

fn collect(place: &Place<'_>, sounds: bool, schema: SchemaView<'_>, found: &mut dyn FnMut(&Place<'_>, &str)) {
    match &place.node.value {
        Value::Scalar(scalar) => {
            if is_secret(place, scalar, sounds, schema) {
                found(place, &scalar.text);
            }
        }
        Value::Seq(_) => place.children().iter().for_each(|child| collect(child, sounds, schema, found)),
        Value::Map(entries) => {
            let known = schema.keys(&place.path);
            for (entry, child) in entries.iter().zip(place.children()) {
                let here = sounds_secret(&entry.key) || meant_secret(place, &entry.key, &known, schema);
                collect(&child, sounds || here, schema, found);
            }
        }
    }
}

/// A misspelt key of a secret: `api-kye`.
fn meant_secret(place: &Place<'_>, key: &str, known: &[&str], schema: SchemaView<'_>) -> bool {
    if known.contains(&key) {
        return false;
    }
    closest(key, known).is_some_and(|meant| {
        let mut path = place.path.clone();
        path.push(Segment::Key(meant.to_owned()));
        sounds_secret(meant) || schema.scalar_at(&path) == Some(true)
    })
}

fn is_secret(place: &Place<'_>, scalar: &Scalar, sounds: bool, schema: SchemaView<'_>) -> bool {
    let plain = scalar.resolve();
    match schema.scalar_at(&place.path) {
        Some(is_secret) => is_secret && !matches!(plain, Plain::Empty | Plain::Null),
        // Numbers and switches are no secrets: `max-token: 10`.
        None => sounds && plain == Plain::Text,
    }
}

/// The line with its secrets as stars, as many as there were characters, so that columns stay true.
pub(crate) fn line(text: &str, number: u32, hidden: Option<&[Span]>) -> String {
    let mut chars: Vec<char> = text.chars().collect();
    match hidden {
        Some(spans) => {
            for span in spans.iter().filter(|span| (span.start.line..=span.end.line).contains(&number)) {
                let from = if span.start.line == number { span.start.column as usize - 1 } else { 0 };
                let to = if span.end.line == number { span.end.column as usize - 1 } else { chars.len() };
                star(&mut chars, from, to);
            }
        }
        None => star_by_looks(&mut chars),
    }
    chars.into_iter().collect()
}

fn star(chars: &mut [char], from: usize, to: usize) {
    let to = to.min(chars.len());
    for c in chars.iter_mut().take(to).skip(from).filter(|c| !c.is_whitespace()) {
        *c = '*';
    }
}

/// After a key that sounds secret, everything up to the next `,` or `}` (or `]` of a list).
fn star_by_looks(chars: &mut [char]) {
    let mut at = 0;
    while let Some(colon) = (at..chars.len()).find(|&i| chars[i] == ':') {
        at = colon + 1;
        let key: String = chars[..colon]
            .iter()
            .rev()
            .skip_while(|c| matches!(c, '"' | '\'' | ' '))
            .take_while(|c| c.is_alphanumeric() || matches!(c, '-' | '_'))
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
            .collect();
        if !sounds_secret(&key) || chars.get(at).is_some_and(|c| !c.is_whitespace()) {
            continue;
        }
        let value = (at..chars.len()).find(|&i| !chars[i].is_whitespace()).unwrap_or(chars.len());
        let is_list = chars.get(value) == Some(&'[');
        let ends = |c: char| if is_list { c == ']' } else { matches!(c, ',' | '}') };
        let end = (value..chars.len()).find(|&i| ends(chars[i])).unwrap_or(chars.len());
        let text: String = chars[value..end].iter().collect();
        if is_list || !is_reference(text.trim_start_matches(['"', '\''])) {
            star(chars, value, end);
        }
        at = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_secret_names() {
        let check = |key: &str, expect| assert_eq!(sounds_secret(key), expect, "{key}");
        check("api-key", true);
        check("api_key", true);
        check("apiKey", true);
        check("apikey", true);
        check("ADMIN_PASSWORD", true);
        check("keys", true);
        check("tokens-per-minute", false);
        check("keyword", false);
        check("model", false);
        check("", false);
    }

    #[test]
    fn hides_what_looks_like_a_secret() {
        let check = |text: &str, expect: &str| assert_eq!(line(text, 1, None), expect);
        check("  api-key: sk-1", "  api-key: ****");
        check("  api-key: env:X", "  api-key: env:X");
        check("{provider: x, api-key: \"sk-1\", model: y}", "{provider: x, api-key: ******, model: y}");
        check("keys: [sk-1, sk-2]", "keys: ****** ****]");
        check("\"password\" : hunter2", "\"password\" : *******");
        check("max-tokens: 12", "max-tokens: 12");
        check("key:", "key:");
        check("url: http://x/", "url: http://x/");
    }
}
