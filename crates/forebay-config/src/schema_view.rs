//! Looks things up in a JSON schema: the doc of a field, whether it is a secret, where else a key exists.
//!
//! The schema only ever adds help to a mistake; whether something *is* a mistake, `Deserialize` alone decides.

use serde_json::Value;

use crate::path::Segment;

/// References followed in a row, and nesting searched, before giving up on a schema that runs in circles.
const STEPS_MAX: usize = 16;

#[derive(Debug, Clone, Copy)]
pub(crate) struct SchemaView<'a> {
    pub(crate) root: &'a Value,
}

impl<'a> SchemaView<'a> {
    /// Follows `$ref`, which is always into this document.
    pub(crate) fn resolve(&self, schema: &'a Value) -> &'a Value {
        let mut schema = schema;
        for _ in 0..STEPS_MAX {
            let Some(target) = schema
                .get("$ref")
                .and_then(Value::as_str)
                .and_then(|pointer| self.root.pointer(pointer.strip_prefix('#').unwrap_or(pointer)))
            else {
                break;
            };
            schema = target;
        }
        schema
    }

    /// The schema and all that it may stand for: alternatives and parts, references followed.
    pub(crate) fn alternatives(&self, schema: &'a Value) -> Vec<&'a Value> {
        let mut all = Vec::new();
        self.collect_alternatives(schema, 0, &mut all);
        all
    }

    fn collect_alternatives(&self, schema: &'a Value, depth: usize, all: &mut Vec<&'a Value>) {
        if depth > STEPS_MAX {
            return;
        }
        let schema = self.resolve(schema);
        all.push(schema);
        for parts in ["anyOf", "oneOf", "allOf"].iter().filter_map(|key| schema.get(key)?.as_array()) {
            parts.iter().for_each(|part| self.collect_alternatives(part, depth + 1, all));
        }
    }

    /// Every schema that may describe the value at a path.
    pub(crate) fn at(&self, path: &[Segment]) -> Vec<&'a Value> {
        let mut here = self.alternatives(self.root);
        for segment in path {
            here = here
                .iter()
                .filter_map(|schema| step(schema, segment))
                .flat_map(|schema| self.alternatives(schema))
                .collect();
        }
        here
    }

    /// The schema of a key as it is written there, with the doc of the field and not of its type.
    fn property(&self, path: &[Segment], key: &str) -> Option<&'a Value> {
        self.at(path).into_iter().find_map(|schema| schema.get("properties")?.get(key))
    }

    /// The first sentence of a field's doc, without its full stop, in lower case: ready for a `help:` line.
    pub(crate) fn field_doc(&self, path: &[Segment], key: &str) -> Option<String> {
        let field = self.property(path, key)?;
        let doc = field.get("description").or_else(|| self.resolve(field).get("description"))?;
        first_sentence(doc.as_str()?)
    }

    /// Keys that the schema knows at a path, in its order.
    pub(crate) fn keys(&self, path: &[Segment]) -> Vec<&'a str> {
        let mut keys = Vec::new();
        for properties in self.at(path).into_iter().filter_map(|schema| schema.get("properties")?.as_object())
        {
            for key in properties.keys().map(String::as_str) {
                if !keys.contains(&key) {
                    keys.push(key);
                }
            }
        }
        keys
    }

    /// Whether the scalar at a path is a secret; `None` if the schema knows no scalar there.
    pub(crate) fn scalar_at(&self, path: &[Segment]) -> Option<bool> {
        let mut known = None;
        for schema in self.at(path) {
            let is_secret = schema.get("format").and_then(Value::as_str) == Some("secret");
            let types = schema.get("type").map_or(&[][..], |types| match types {
                Value::Array(types) => types,
                one => std::slice::from_ref(one),
            });
            let is_scalar = types
                .iter()
                .filter_map(Value::as_str)
                .any(|name| matches!(name, "string" | "integer" | "number" | "boolean"));
            if is_scalar {
                // One variant of an enum that takes a secret there is enough.
                known = Some(known == Some(true) || is_secret);
            }
        }
        known
    }

    /// Where else in the configuration a key of this name exists: `edge.tls`, `proxy.models[]`. Shortest first.
    pub(crate) fn owners_of(&self, key: &str) -> Vec<String> {
        let mut owners = Vec::new();
        let mut level = vec![(String::new(), self.root)];
        // Breadth first, three levels of mappings: deeper ones are too particular to be a hint.
        for _ in 0..3 {
            let mut next = Vec::new();
            for (path, schema) in level {
                let alternatives = self.alternatives(schema);
                let objects =
                    || alternatives.iter().filter_map(|schema| schema.get("properties")?.as_object());
                if !path.is_empty() && objects().any(|properties| properties.contains_key(key)) {
                    owners.push(path.clone());
                }
                for (name, schema) in objects().flatten() {
                    let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                    let items = self.alternatives(schema).into_iter().find_map(|schema| schema.get("items"));
                    next.push(match items {
                        Some(items) => (format!("{path}[]"), items),
                        None => (path, schema),
                    });
                }
            }
            level = next;
        }
        owners
    }
}

fn step<'a>(schema: &'a Value, segment: &Segment) -> Option<&'a Value> {
    match segment {
        Segment::Key(key) => schema
            .get("properties")
            .and_then(|properties| properties.get(key))
            .or_else(|| schema.get("additionalProperties").filter(|schema| schema.is_object())),
        Segment::Index(_) => schema.get("items").filter(|schema| schema.is_object()),
    }
}

/// "Uncached tokens. More text." becomes "uncached tokens"; "TTFT above which…" keeps its capitals.
pub(crate) fn first_sentence(doc: &str) -> Option<String> {
    let paragraph = doc.split("\n\n").next().unwrap_or(doc).split_whitespace().collect::<Vec<_>>().join(" ");
    let sentence = paragraph.split(". ").next().unwrap_or(&paragraph).trim_end_matches(['.', ':']);
    let mut chars = sentence.chars();
    let first = chars.next()?;
    let acronym = chars.clone().next().is_some_and(|second| second.is_uppercase() || second.is_ascii_digit());
    if acronym { Some(sentence.to_owned()) } else { Some(first.to_lowercase().chain(chars).collect()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_first_sentence() {
        let check = |doc: &str, expect: Option<&str>| assert_eq!(first_sentence(doc).as_deref(), expect);
        check("Uncached prompt\ntokens. Higher is slower.", Some("uncached prompt tokens"));
        check(
            "TTFT above which a replica is skipped.\n\nMore.",
            Some("TTFT above which a replica is skipped"),
        );
        check("a 1.5 factor", Some("a 1.5 factor"));
        check("", None);
    }
}
