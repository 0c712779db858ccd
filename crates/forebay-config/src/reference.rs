//! The reference page of a configuration, from its schema: one table for each mapping.

use std::collections::HashMap;
use std::fmt::Write as _;

use serde_json::Value;

use crate::schema_view::SchemaView;

/// Nesting of alternatives and lists within one value before giving up on a schema that runs in circles.
const DEPTH_MAX: usize = 16;

/// A Markdown section with a table (key, type, default, meaning) for the file and for each mapping in it, depth
/// first in the order of the fields. Headings begin at level two; the page's title is the caller's.
///
/// A mapping that occurs at several places is described at the first and linked from the others. Deterministic.
pub fn reference_markdown(schema: &Value) -> String {
    let mut page = Page { view: SchemaView { root: schema }, out: String::new(), described: HashMap::new() };
    page.section("", schema);
    page.out
}

struct Page<'a> {
    view: SchemaView<'a>,
    out: String,
    /// The title under which a mapping was described first, by its address in the schema.
    described: HashMap<*const Value, String>,
}

impl<'a> Page<'a> {
    fn section(&mut self, path: &str, schema: &'a Value) {
        let schema = self.view.resolve(schema);
        let fields = fields(schema);
        let title = match tag(&fields) {
            _ if path.is_empty() => "The file".to_owned(),
            Some((key, value)) => format!("`{path}` with `{key}: {value}`"),
            None => format!("`{path}`"),
        };
        if !self.out.is_empty() {
            self.out.push('\n');
        }
        self.write(format_args!("## {title}\n"));
        if let Some(first) = self.described.get(&std::ptr::from_ref(schema)) {
            let text = format!("\nThe same keys as [{first}](#{}).\n", anchor(first));
            self.out.push_str(&text);
            return;
        }
        self.described.insert(std::ptr::from_ref(schema), title);
        if let Some(doc) = description(schema) {
            self.write(format_args!("\n{doc}\n"));
        }
        if !fields.is_empty() {
            self.out.push_str("\n| key | type | default | meaning |\n|---|---|---|---|\n");
        }
        for field in &fields {
            let (kind, default, meaning) =
                (self.kind(field.schema, 0), default(field), self.meaning(field.schema));
            self.write(format_args!(
                "| `{}` | {} | {default} | {} |\n",
                field.name,
                cell(&kind),
                cell(&meaning)
            ));
        }
        for field in &fields {
            let child =
                if path.is_empty() { field.name.to_owned() } else { format!("{path}.{}", field.name) };
            self.sections_of(&child, field.schema, 0);
        }
    }

    /// Sections for the mappings that a value may be, through lists, maps and alternatives.
    fn sections_of(&mut self, path: &str, schema: &'a Value, depth: usize) {
        if depth > DEPTH_MAX {
            return;
        }
        let schema = self.view.resolve(schema);
        if schema.get("properties").is_some() {
            self.section(path, schema);
        } else if let Some(items) = schema.get("items") {
            self.sections_of(&format!("{path}[]"), items, depth + 1);
        } else if let Some(values) = schema.get("additionalProperties").filter(|values| values.is_object()) {
            self.sections_of(&format!("{path}.<name>"), values, depth + 1);
        } else {
            for part in parts(schema) {
                match choice(self.view.resolve(part)) {
                    Some(choice) => {
                        self.sections_of(&format!("{path}.{}", choice.name), choice.schema, depth + 1);
                    }
                    None => self.sections_of(path, part, depth + 1),
                }
            }
        }
    }

    /// The doc of the field, or of its type, and the docs of the values to choose from.
    fn meaning(&self, schema: &'a Value) -> String {
        let resolved = self.view.resolve(schema);
        let mut meaning = description(schema).or_else(|| description(resolved)).unwrap_or_default();
        for part in self.view.alternatives(schema).into_iter().skip(1) {
            let name = match (part.get("const"), choice(part)) {
                (Some(value), _) => code(value),
                (None, Some(choice)) => format!("`{}`", choice.name),
                (None, None) => continue,
            };
            if let Some(doc) = description(part) {
                let space = if meaning.is_empty() { "" } else { " " };
                meaning = format!("{meaning}{space}{name}: {doc}");
            }
        }
        meaning
    }

    /// The type of a value in a few words.
    fn kind(&self, schema: &'a Value, depth: usize) -> String {
        if depth > DEPTH_MAX {
            return "…".to_owned();
        }
        let schema = self.view.resolve(schema);
        if let Some(value) = schema.get("const") {
            return code(value);
        }
        if let Some(values) = schema.get("enum").and_then(Value::as_array) {
            let values: Vec<String> = values.iter().filter(|value| !value.is_null()).map(code).collect();
            return values.join(", ");
        }
        match schema.get("format").and_then(Value::as_str) {
            Some("duration") => return "duration (`30s`)".to_owned(),
            Some("byte-size") => return "size (`10MiB`)".to_owned(),
            Some("listen-addr") => return "address (`host:port`)".to_owned(),
            Some("secret") => return "secret (`env:NAME`, `file:PATH`)".to_owned(),
            _ => {}
        }
        let alternatives = parts(schema);
        if !alternatives.is_empty() && schema.get("properties").is_none() {
            return self.alternatives(&alternatives, depth);
        }
        match type_name(schema) {
            Some("string") => "text".to_owned(),
            Some("integer") => format!("whole number{}", range(schema)),
            Some("number") => format!("number{}", range(schema)),
            Some("boolean") => "`true` or `false`".to_owned(),
            Some("array") => self.list(schema, depth),
            Some("object") => match schema.get("additionalProperties").filter(|values| values.is_object()) {
                Some(values) if schema.get("properties").is_none() => {
                    format!("mapping of names to {}", plural(self.kind(values, depth + 1)))
                }
                _ => "mapping".to_owned(),
            },
            _ => "any".to_owned(),
        }
    }

    fn list(&self, schema: &'a Value, depth: usize) -> String {
        if let Some(items) = schema.get("items") {
            return format!("list of {}", plural(self.kind(items, depth + 1)));
        }
        let Some(items) = schema.get("prefixItems").and_then(Value::as_array) else {
            return "list".to_owned();
        };
        let kinds: Vec<String> = items.iter().map(|item| self.kind(item, depth + 1)).collect();
        format!("list of {}: {}", kinds.len(), kinds.join(", "))
    }

    fn alternatives(&self, parts: &[&'a Value], depth: usize) -> String {
        let mut kinds: Vec<String> = Vec::new();
        for part in parts {
            let part = self.view.resolve(part);
            // `Option`: not setting the key says the same.
            if type_name(part) == Some("null") {
                continue;
            }
            let kind = match choice(part) {
                Some(choice) => format!("`{}:` {}", choice.name, self.kind(choice.schema, depth + 1)),
                None => self.kind(part, depth + 1),
            };
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        // "X or a list of X" reads better short.
        if let [one, list] = kinds.as_slice()
            && *list == format!("list of {}", plural(one.clone()))
        {
            return format!("{one}, or a list");
        }
        let named = kinds.iter().all(|kind| kind.starts_with('`'));
        kinds.join(if named { ", " } else { " or " })
    }

    fn write(&mut self, text: std::fmt::Arguments<'_>) {
        // Writing to a String can't fail.
        let _ = self.out.write_fmt(text);
    }
}

struct Field<'a> {
    name: &'a str,
    schema: &'a Value,
    required: bool,
}

fn fields(schema: &Value) -> Vec<Field<'_>> {
    let required = |name: &str| {
        let names = schema.get("required").and_then(Value::as_array);
        names.is_some_and(|names| names.iter().any(|other| other == name))
    };
    let properties = schema.get("properties").and_then(Value::as_object);
    properties
        .into_iter()
        .flatten()
        .map(|(name, schema)| Field { name, schema, required: required(name) })
        .collect()
}

/// A variant that is written `{name: …}`: one key, which is required and is no tag.
fn choice(schema: &Value) -> Option<Field<'_>> {
    let mut fields = fields(schema);
    match fields.pop() {
        Some(only) if fields.is_empty() && only.required && only.schema.get("const").is_none() => Some(only),
        _ => None,
    }
}

/// The key that tells the variants of an enum apart, and its value in this one.
fn tag<'a>(fields: &[Field<'a>]) -> Option<(&'a str, &'a str)> {
    fields.iter().find_map(|field| Some((field.name, field.schema.get("const")?.as_str()?)))
}

fn parts(schema: &Value) -> Vec<&Value> {
    ["anyOf", "oneOf", "allOf"].iter().filter_map(|key| schema.get(key)?.as_array()).flatten().collect()
}

/// The type; of `["string", "null"]` the first, because not setting a key says the same as null.
fn type_name(schema: &Value) -> Option<&str> {
    match schema.get("type")? {
        Value::String(name) => Some(name),
        Value::Array(names) => names.iter().filter_map(Value::as_str).find(|name| *name != "null"),
        _ => None,
    }
}

/// Bounds that somebody set, not those of the Rust type.
fn range(schema: &Value) -> String {
    let bound = |key: &str| schema.get(key).filter(|bound| bound.is_number());
    let is_type_bound = |max: &Value| matches!(max.as_u64(), Some(255 | 65_535 | 4_294_967_295));
    let min = bound("minimum").filter(|min| min.as_f64() != Some(0.0));
    let max = bound("maximum").filter(|max| !is_type_bound(max));
    match (min, max) {
        (Some(min), Some(max)) => format!(", {min} to {max}"),
        (Some(min), None) => format!(", at least {min}"),
        (None, Some(max)) => format!(", at most {max}"),
        (None, None) => String::new(),
    }
}

fn description(schema: &Value) -> Option<String> {
    schema.get("description").and_then(Value::as_str).map(str::to_owned)
}

fn default(field: &Field<'_>) -> String {
    match field.schema.get("default") {
        None if field.required => "required".to_owned(),
        // A mapping's defaults stand in its own table; an empty list or mapping says little.
        None | Some(Value::Null | Value::Object(_)) => String::new(),
        Some(Value::Array(items)) if items.is_empty() => String::new(),
        Some(value) => cell(&code(value)),
    }
}

fn code(value: &Value) -> String {
    match value {
        Value::String(text) if text.is_empty() => "`\"\"`".to_owned(),
        Value::String(text) => format!("`{text}`"),
        other => format!("`{other}`"),
    }
}

fn plural(kind: String) -> String {
    if kind == "mapping" { "mappings".to_owned() } else { kind }
}

/// One line, and no `|` that would end the cell.
fn cell(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

/// GitHub's anchor for the heading: letters, digits, `-` and `_` stay, spaces become dashes, the rest goes.
fn anchor(title: &str) -> String {
    let kept = title.chars().filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_' | ' '));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect::<String>().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{OneOrMany, Secret};
    use schemars::JsonSchema;
    use serde::{Deserialize, Serialize};
    use std::collections::BTreeMap;

    /// The whole.
    #[derive(Default, Deserialize, Serialize, JsonSchema)]
    #[serde(rename_all = "kebab-case", default)]
    struct Whole {
        /// First line,
        /// second line with `a|b`.
        first_part: Part,
        second_part: Option<Part>,
        parts: BTreeMap<String, Vec<Part>>,
        backend: Option<Backend>,
    }

    #[derive(Default, Deserialize, Serialize, JsonSchema)]
    #[serde(rename_all = "kebab-case", default)]
    struct Part {
        keys: OneOrMany<Secret>,
        #[schemars(range(min = 1, max = 9))]
        count: u8,
        kind: Kind,
        inner: Option<Box<Part>>,
    }

    #[derive(Default, Deserialize, Serialize, JsonSchema)]
    #[serde(rename_all = "kebab-case")]
    enum Kind {
        #[default]
        Plain,
        /// Better.
        Fancy,
    }

    #[derive(Deserialize, Serialize, JsonSchema)]
    #[serde(tag = "type", rename_all = "kebab-case")]
    enum Backend {
        Http { url: String },
        Local { port: u16 },
    }

    #[test]
    fn describes_every_mapping_once() {
        assert_eq!(
            reference_markdown(&crate::schema::<Whole>()),
            "\
## The file

The whole.

| key | type | default | meaning |
|---|---|---|---|
| `first-part` | mapping |  | First line, second line with `a\\|b`. |
| `second-part` | mapping |  |  |
| `parts` | mapping of names to list of mappings |  |  |
| `backend` | mapping |  |  |

## `first-part`

| key | type | default | meaning |
|---|---|---|---|
| `keys` | secret (`env:NAME`, `file:PATH`), or a list |  |  |
| `count` | whole number, 1 to 9 | `0` |  |
| `kind` | `plain`, `fancy` | `plain` | `fancy`: Better. |
| `inner` | mapping |  |  |

## `first-part.inner`

The same keys as [`first-part`](#first-part).

## `second-part`

The same keys as [`first-part`](#first-part).

## `parts.<name>[]`

The same keys as [`first-part`](#first-part).

## `backend` with `type: http`

| key | type | default | meaning |
|---|---|---|---|
| `type` | `http` | required |  |
| `url` | text | required |  |

## `backend` with `type: local`

| key | type | default | meaning |
|---|---|---|---|
| `type` | `local` | required |  |
| `port` | whole number | required |  |
"
        );
    }

    #[test]
    fn is_deterministic_and_survives_odd_schemas() {
        let schema = crate::schema::<Whole>();
        assert_eq!(reference_markdown(&schema), reference_markdown(&crate::schema::<Whole>()));
        reference_markdown(&Value::Bool(true));
        reference_markdown(&serde_json::json!({"$ref": "#"}));
        reference_markdown(
            &serde_json::json!({"properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}]}}}),
        );
    }
}
