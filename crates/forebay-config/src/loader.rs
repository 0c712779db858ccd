//! From text to typed configuration, with every independent mistake at once.
//!
//! `Deserialize` stops at its first mistake. So the loader writes that one down, masks the value at fault, and
//! deserializes again, until nothing is left or what is left only follows from what was masked.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use crate::de::{At, DeError, Mistake, NodeDe, one_of};
use crate::diagnostic::{Diagnostic, Diagnostics, Shown};
use crate::environment::Environment;
use crate::parse;
use crate::path::{Path, Segment, parse_path};
use crate::redact;
use crate::schema;
use crate::schema_view::SchemaView;
use crate::source::Source;
use crate::suggest::closest;
use crate::tree::{Node, Place, Value};
use crate::values::Secret;

/// Mistakes after which a file is rather the wrong file.
const MISTAKES_MAX: usize = 50;
/// Names listed in a help line.
const NAMES_LISTED_MAX: usize = 16;

/// A configuration together with the file it came from, so that later checks can point into it.
#[derive(Clone)]
pub struct Loaded<T> {
    pub config: T,
    tree: Arc<Node>,
    shown: Arc<Shown>,
    /// Paths of the secrets in plain text.
    plain_secrets: Arc<[String]>,
    /// Path and text of the secrets that are references.
    secret_references: Arc<[(String, String)]>,
}

/// Without tree and text, which may hold plain secrets.
impl<T: fmt::Debug> fmt::Debug for Loaded<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loaded").field("config", &self.config).field("source", self.source()).finish()
    }
}

/// Parses and deserializes one file. Pure: opens no files and resolves no secrets.
///
/// `T` should be `#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]`. Mistakes inside `untagged`
/// enums and `flatten` are found, but point at the whole value: serde copies it before looking inside.
/// An empty file is an empty mapping.
///
/// Errors: all independent mistakes, at most 50, in the order of the file.
pub fn load<T: DeserializeOwned + JsonSchema>(source: &Source) -> Result<Loaded<T>, Diagnostics> {
    let tree = parse::parse(source).map_err(|diagnostic| {
        let shown = Shown { source: source.clone(), hidden: None };
        Diagnostics::new(Arc::new(shown), vec![diagnostic])
    })?;
    let schema = schema::schema::<T>();
    let view = SchemaView { root: &schema };
    let secrets = redact::secrets(&tree, view);
    let hidden = Some(secrets.iter().map(|(span, _)| *span).collect());
    let shown = Arc::new(Shown { source: source.clone(), hidden });
    match Collector::new(&tree, view).run() {
        Ok(config) => {
            let plain_secrets = secrets.into_iter().map(|(_, path)| path).collect();
            let secret_references = redact::references(&tree, view).into();
            Ok(Loaded { config, tree: Arc::new(tree), shown, plain_secrets, secret_references })
        }
        Err(mistakes) => Err(Diagnostics::new(shown, mistakes)),
    }
}

impl<T> Loaded<T> {
    /// An error at a configuration path, `proxy.models[0].deployments[1].fleet`, to be completed with
    /// [`Diagnostic::label`] and [`Diagnostic::help`].
    ///
    /// A path that the file does not have (a default) points at the closest container that is there.
    pub fn error_at(&self, path: &str, message: impl Into<String>) -> Diagnostic {
        self.place(path, Diagnostic::error(message))
    }

    /// A warning at a configuration path; see [`error_at`](Self::error_at).
    pub fn warning_at(&self, path: &str, message: impl Into<String>) -> Diagnostic {
        self.place(path, Diagnostic::warning(message))
    }

    fn place(&self, path: &str, diagnostic: Diagnostic) -> Diagnostic {
        let (place, _) = Place::root(&self.tree).follow(&parse_path(path));
        // The whole file is not a place to point at.
        let diagnostic = if place.path.is_empty() { diagnostic } else { diagnostic.at_span(place.pointer()) };
        diagnostic.at_path(path)
    }

    /// Whether the file itself sets this path, as opposed to a default.
    pub fn is_set(&self, path: &str) -> bool {
        Place::root(&self.tree).follow(&parse_path(path)).1
    }

    /// Diagnostics about this file, to be shown with its lines.
    pub fn diagnostics(&self, items: impl IntoIterator<Item = Diagnostic>) -> Diagnostics {
        Diagnostics::new(Arc::clone(&self.shown), items.into_iter().collect())
    }

    /// A warning for each secret that is written in plain text.
    pub fn plain_secret_warnings(&self) -> Vec<Diagnostic> {
        let warning = |path: &String| {
            self.warning_at(path, format!("the secret `{path}` is in plain text"))
                .label("whoever can read this file has it")
                .help("write `env:NAME` for an environment variable, or `file:PATH` for a file")
        };
        self.plain_secrets.iter().map(warning).collect()
    }

    /// An error for each secret whose variable or file is not there: all of them at once, not one per start.
    pub fn secret_problems(&self, env: &dyn Environment) -> Vec<Diagnostic> {
        let problem = |(path, text): &(String, String)| {
            let error = match text.parse::<Secret>() {
                Ok(secret) => secret.resolve(env).err()?.to_string(),
                Err(error) => error.to_string(),
            };
            Some(self.error_at(path, error))
        };
        self.secret_references.iter().filter_map(problem).collect()
    }

    pub fn source(&self) -> &Source {
        &self.shown.source
    }

    /// The same file, with a configuration made from it.
    pub fn map<U>(self, map: impl FnOnce(T) -> U) -> Loaded<U> {
        Loaded {
            config: map(self.config),
            tree: self.tree,
            shown: self.shown,
            plain_secrets: self.plain_secrets,
            secret_references: self.secret_references,
        }
    }
}

/// Deserializes again and again, masking one mistake each time.
struct Collector<'a> {
    root: Place<'a>,
    schema: SchemaView<'a>,
    masked: HashSet<u32>,
    /// Masked unknown keys that were meant as another one: what they were meant as.
    meant: HashMap<u32, String>,
    found: Vec<Diagnostic>,
}

impl<'a> Collector<'a> {
    fn new(tree: &'a Node, schema: SchemaView<'a>) -> Self {
        Self {
            root: Place::root(tree),
            schema,
            masked: HashSet::new(),
            meant: HashMap::new(),
            found: Vec::new(),
        }
    }

    fn run<T: DeserializeOwned>(mut self) -> Result<T, Vec<Diagnostic>> {
        // Each round masks one node more; masking what only follows costs rounds too, at most the depth for each.
        for _ in 0..MISTAKES_MAX * 8 {
            let error = match T::deserialize(NodeDe::new(self.root.node, &self.masked)) {
                Ok(config) if self.found.is_empty() => return Ok(config),
                Ok(_) => return Err(self.found),
                Err(error) => error,
            };
            let progress = self.on_mistake(error);
            if !progress || self.found.len() >= MISTAKES_MAX {
                break;
            }
        }
        Err(self.found)
    }

    /// Writes down one mistake and masks its value. False when there is nothing left to mask.
    fn on_mistake(&mut self, error: DeError) -> bool {
        let (mistake, at) = error.into_parts();
        let (mut at_key, id) = match at {
            Some(At::Key(id)) => (true, id),
            Some(At::Value(id)) => (false, id),
            None => (false, self.root.node.id),
        };
        let mut place = self.root.find(id).unwrap_or_else(|| self.root.clone());
        if !at_key && let Some((inner, is_key)) = find_again(&place, &mistake) {
            (place, at_key) = (inner, is_key);
        }
        let id = place.node.id;
        if !self.follows(&place, &mistake) {
            let diagnostic = self.diagnostic(&place, at_key, &mistake);
            // One mistake behind an anchor is one mistake, however often it is used.
            let place_and_label = |one: &Diagnostic| (one.span(), one.parts().label.clone());
            let same = |other: &Diagnostic| place_and_label(other) == place_and_label(&diagnostic);
            if !self.found.iter().any(same) {
                self.found.push(diagnostic);
            }
        } else if self.found.is_empty() {
            // Can't be: something was masked, so something was found. Don't lose the error if it is.
            let diagnostic = self.diagnostic(&place, at_key, &mistake);
            self.found.push(diagnostic);
        }
        let new = self.masked.insert(id);
        new && id != self.root.node.id
    }

    /// Whether this only came up because an earlier mistake was masked.
    fn follows(&self, place: &Place<'_>, mistake: &Mistake) -> bool {
        match mistake {
            Mistake::UnknownKey { .. } | Mistake::UnknownValue { .. } => false,
            Mistake::MissingKey { key } => match &place.node.value {
                Value::Map(entries) => entries.iter().any(|entry| {
                    let id = entry.value.id;
                    self.masked.contains(&id)
                        && (entry.key == *key || self.meant.get(&id).is_some_and(|meant| meant == key))
                }),
                Value::Scalar(_) | Value::Seq(_) => false,
            },
            Mistake::Unfit { .. } | Mistake::Custom(_) => {
                self.masked.iter().any(|id| place.node.contains(*id))
            }
        }
    }

    fn diagnostic(&mut self, place: &Place<'_>, at_key: bool, mistake: &Mistake) -> Diagnostic {
        let path = Path(&place.path).to_string();
        let diagnostic = match mistake {
            Mistake::UnknownKey { key, expected } => self.unknown_key(place, key, expected),
            Mistake::UnknownValue { value, expected } => {
                // As a key it is `{name: content}`, as text it might be anything, and the line shows it.
                let title = match at_key {
                    true => {
                        format!("unknown choice `{value}`{}", within(&place.path[..place.path.len() - 1]))
                    }
                    false => format!("unknown value{}", of(&path)),
                };
                match closest(value, expected) {
                    Some(meant) => Diagnostic::error(title).label(format!("did you mean `{meant}`?")),
                    None => Diagnostic::error(title).label(expected_names(expected)),
                }
            }
            Mistake::MissingKey { key } => {
                let title = format!("missing key `{key}`{}", within(&place.path));
                self.with_doc(Diagnostic::error(title).label(format!("`{key}` is needed here")), place, key)
            }
            Mistake::Unfit { found, expected, .. } => {
                let label = format!("expected {expected}, found {found}");
                let diagnostic = Diagnostic::error(format!("wrong value{}", of(&path))).label(label);
                match found.as_str() {
                    "no value" if expected.starts_with("a list") => {
                        diagnostic.help("write `[]` for an empty list, or remove the key")
                    }
                    _ if expected == "text" && found.starts_with('`') => {
                        diagnostic.help("put quotes around it")
                    }
                    "no value" => diagnostic.help("give it a value, or remove the key"),
                    _ => diagnostic,
                }
            }
            Mistake::Custom(message) => {
                Diagnostic::error(format!("wrong value{}", of(&path))).label(message.clone())
            }
        };
        let span = match (at_key, place.key_span) {
            (true, Some(key_span)) => key_span,
            _ => place.pointer(),
        };
        diagnostic.at_span(span).at_path(path)
    }

    fn unknown_key(&mut self, place: &Place<'_>, key: &str, expected: &[&str]) -> Diagnostic {
        let owner = &place.path[..place.path.len().saturating_sub(1)];
        // Names that serde reports include aliases; the schema's are those to be shown.
        let known = self.schema.keys(owner);
        let names = if known.is_empty() { expected.to_vec() } else { known };
        let names: Vec<&str> = names.into_iter().filter(|name| expected.contains(name)).collect();
        let names = if names.is_empty() { expected } else { &names };
        let diagnostic = Diagnostic::error(format!("unknown key `{key}`{}", within(owner)));
        if let Some(meant) = closest(key, names) {
            self.meant.insert(place.node.id, meant.to_owned());
            let diagnostic = diagnostic.label(format!("did you mean `{meant}`?"));
            return match self.schema.field_doc(owner, meant) {
                Some(doc) => diagnostic.help(doc),
                None => diagnostic,
            };
        }
        let here = Path(owner).to_string();
        match self.schema.owners_of(key).into_iter().find(|path| *path != here) {
            Some(path) => diagnostic.label("not a key of this").help(format!("`{key}` is a key of `{path}`")),
            None => diagnostic.label("no such key").help(expected_names(names)),
        }
    }

    fn with_doc(&self, diagnostic: Diagnostic, place: &Place<'_>, key: &str) -> Diagnostic {
        match self.schema.field_doc(&place.path, key) {
            Some(doc) => diagnostic.help(format!("`{key}`: {doc}")),
            None => diagnostic,
        }
    }
}

fn expected_names(names: &[&str]) -> String {
    match names.len() {
        0 => "no keys are expected here".to_owned(),
        1..=NAMES_LISTED_MAX => format!("expected {}", one_of(names)),
        more => {
            let listed: Vec<String> =
                names[..NAMES_LISTED_MAX].iter().map(|name| format!("`{name}`")).collect();
            format!("expected one of {} and {} more", listed.join(", "), more - NAMES_LISTED_MAX)
        }
    }
}

fn within(path: &[Segment]) -> String {
    if path.is_empty() { String::new() } else { format!(" in `{}`", Path(path)) }
}

fn of(path: &str) -> String {
    if path.is_empty() { " for the whole file".to_owned() } else { format!(" for `{path}`") }
}

/// Below a tagged enum serde looks at a copy, and the place is lost. If only one key or scalar below can be meant,
/// it is that one. True: the key, false: the value.
fn find_again<'a>(place: &Place<'a>, mistake: &Mistake) -> Option<(Place<'a>, bool)> {
    let mut hits = Vec::new();
    let (wanted, is_key) = match mistake {
        Mistake::UnknownKey { key, .. } => (key.as_str(), true),
        Mistake::UnknownValue { value, .. } => (value.as_str(), false),
        Mistake::Unfit { text: Some(text), .. } => (text.as_str(), false),
        _ => return None,
    };
    if matches!(place.node.value, Value::Scalar(_)) {
        return None;
    }
    search(place, wanted, is_key, &mut hits);
    match hits.len() {
        1 => hits.pop().map(|hit| (hit, is_key)),
        _ => None,
    }
}

fn search<'a>(place: &Place<'a>, wanted: &str, is_key: bool, hits: &mut Vec<Place<'a>>) {
    for child in place.children() {
        let hit = match (&child.node.value, child.path.last()) {
            (_, Some(Segment::Key(key))) if is_key => key == wanted,
            (Value::Scalar(scalar), _) if !is_key => scalar.text == wanted,
            _ => false,
        };
        if hit {
            hits.push(child.clone());
        }
        search(&child, wanted, is_key, hits);
    }
}
