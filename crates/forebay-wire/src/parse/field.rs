//! Fields of a JSON object, read one by one, so that each mistake names its field.
//!
//! The object is scanned once into raw members; a field is parsed when it is asked for. `null` counts as absent.

use std::borrow::Cow;
use std::fmt;
use std::ops::RangeInclusive;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;

use super::{ParseError, shown};
use crate::Need;

/// Keys that a body may have. The APIs know about a hundred.
const KEYS_MAX: usize = 1024;

/// What a JSON value is, in OpenAI's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Null,
    Boolean,
    Integer,
    Decimal,
    String,
    Array,
    Object,
}

impl Kind {
    /// Of one valid JSON value.
    fn of(raw: &str) -> Self {
        match raw.trim_start().as_bytes().first() {
            Some(b'"') => Self::String,
            Some(b'[') => Self::Array,
            Some(b'{') => Self::Object,
            Some(b't' | b'f') => Self::Boolean,
            Some(b'n') => Self::Null,
            _ if raw.contains(['.', 'e', 'E']) => Self::Decimal,
            _ => Self::Integer,
        }
    }

    pub(super) fn of_value(value: &Value) -> Self {
        match value {
            Value::Null => Self::Null,
            Value::Bool(_) => Self::Boolean,
            Value::Number(n) if n.is_f64() => Self::Decimal,
            Value::Number(_) => Self::Integer,
            Value::String(_) => Self::String,
            Value::Array(_) => Self::Array,
            Value::Object(_) => Self::Object,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Null => "null",
            Self::Boolean => "a boolean",
            Self::Integer => "an integer",
            Self::Decimal => "a decimal number",
            Self::String => "a string",
            Self::Array => "an array",
            Self::Object => "an object",
        })
    }
}

/// An object's members in the order of their keys.
pub(super) struct Fields<'a> {
    members: Vec<(Cow<'a, str>, &'a RawValue)>,
    /// `stream_options.` for an inner object.
    prefix: &'static str,
}

struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

/// A key that borrows where nothing is escaped: `Cow`'s own `Deserialize` never does.
#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                // One more than allowed is kept as the sign of too many; the rest is read and let go.
                while let Some((key, value)) = map.next_entry::<Key<'de>, &'de RawValue>()? {
                    if members.len() <= KEYS_MAX {
                        members.push((key.0, value));
                    }
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

impl<'a> Fields<'a> {
    pub(super) fn of_body(body: &'a [u8]) -> Result<Self, ParseError> {
        let first = body.iter().find(|b| !b.is_ascii_whitespace()).ok_or(ParseError::Empty)?;
        if *first != b'{' {
            // Other valid JSON gets a better answer than a position.
            let raw = serde_json::from_slice::<&RawValue>(body).map_err(|e| bad_json(&e))?;
            return Err(ParseError::NotAnObject { got: Kind::of(raw.get()) });
        }
        let Members(mut members) = serde_json::from_slice(body).map_err(|e| bad_json(&e))?;
        if members.len() > KEYS_MAX {
            return Err(ParseError::TooManyKeys { limit: KEYS_MAX });
        }
        members.sort_by(|(a, _), (b, _)| a.cmp(b));
        // Parsers differ on which of two equal keys counts: whoever checks one and uses the other is fooled.
        if let Some(pair) = members.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(ParseError::DuplicateKey { key: shown(&pair[0].0) });
        }
        Ok(Self { members, prefix: "" })
    }

    /// The fields of an inner object. `prefix` is its name and a dot.
    pub(super) fn inner(
        &self,
        name: &'static str,
        prefix: &'static str,
    ) -> Result<Option<Fields<'a>>, ParseError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        if Kind::of(raw) != Kind::Object {
            return Err(self.mistyped(name, "an object", raw));
        }
        let inner = Fields::of_body(raw.as_bytes())?;
        Ok(Some(Fields { prefix, ..inner }))
    }

    /// These fields without those named `names`, which are taken from `other`.
    pub(super) fn with(mut self, other: &Fields<'a>, names: &[&str]) -> Self {
        self.members.retain(|(key, _)| !names.contains(&&**key));
        let taken = other.members.iter().filter(|(key, _)| names.contains(&&**key));
        self.members.extend(taken.cloned());
        self.members.sort_by(|(a, _), (b, _)| a.cmp(b));
        self
    }

    /// Gives a field its value where it has none: where it is absent, null, or an empty string.
    pub(super) fn set_default(&mut self, name: &'static str, value: &'a RawValue) {
        match self.members.binary_search_by(|(key, _)| (**key).cmp(name)) {
            Ok(at) if matches!(self.members[at].1.get(), "null" | "\"\"") => self.members[at].1 = value,
            Ok(_) => {}
            Err(at) => self.members.insert(at, (name.into(), value)),
        }
    }

    /// The raw JSON of a field that is there and not null.
    pub(super) fn raw(&self, name: &str) -> Option<&'a str> {
        let at = self.members.binary_search_by(|(key, _)| (**key).cmp(name)).ok()?;
        Some(self.members[at].1.get()).filter(|raw| *raw != "null")
    }

    pub(super) fn name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn mistyped(&self, name: &str, expected: &'static str, raw: &str) -> ParseError {
        ParseError::Type { param: self.name(name), expected, got: Kind::of(raw) }
    }

    pub(super) fn kind(&self, name: &str) -> Option<Kind> {
        self.raw(name).map(Kind::of)
    }

    pub(super) fn string(&self, name: &str) -> Result<Option<String>, ParseError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        if Kind::of(raw) != Kind::String {
            return Err(self.mistyped(name, "a string", raw));
        }
        self.read(name, raw).map(Some)
    }

    pub(super) fn boolean(&self, name: &str) -> Result<Option<bool>, ParseError> {
        match self.raw(name) {
            None => Ok(None),
            Some("true") => Ok(Some(true)),
            Some("false") => Ok(Some(false)),
            Some(raw) => Err(self.mistyped(name, "a boolean", raw)),
        }
    }

    pub(super) fn integer(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ParseError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        if Kind::of(raw) != Kind::Integer {
            return Err(self.mistyped(name, "an integer", raw));
        }
        // An integer beyond 64 bits is beyond every range there is.
        let out_of_range = if raw.starts_with('-') { i64::MIN } else { i64::MAX };
        let value = raw.parse::<i64>().unwrap_or(out_of_range);
        let what = |bound: &str, sign: &str, limit: i64| {
            format!("integer {bound} value. Expected a value {sign} {limit}, but got {} instead", shown(raw))
        };
        if value < *range.start() {
            return Err(ParseError::value(self.name(name), what("below minimum", ">=", *range.start())));
        }
        if value > *range.end() {
            return Err(ParseError::value(self.name(name), what("above maximum", "<=", *range.end())));
        }
        Ok(Some(value))
    }

    pub(super) fn number(&self, name: &str, range: RangeInclusive<f32>) -> Result<Option<f32>, ParseError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        if !matches!(Kind::of(raw), Kind::Integer | Kind::Decimal) {
            return Err(self.mistyped(name, "a number", raw));
        }
        let value: f64 = self.read(name, raw)?;
        let what = |bound: &str, sign: &str, limit: f32| {
            format!("decimal {bound} value. Expected a value {sign} {limit}, but got {} instead", shown(raw))
        };
        if value < f64::from(*range.start()) {
            return Err(ParseError::value(self.name(name), what("below minimum", ">=", *range.start())));
        }
        if value > f64::from(*range.end()) {
            return Err(ParseError::value(self.name(name), what("above maximum", "<=", *range.end())));
        }
        Ok(Some(value as f32))
    }

    /// An array, its items still raw.
    pub(super) fn array(
        &self,
        name: &str,
        items_max: usize,
    ) -> Result<Option<Vec<&'a RawValue>>, ParseError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        if Kind::of(raw) != Kind::Array {
            return Err(self.mistyped(name, "an array", raw));
        }
        let items: Vec<&RawValue> = self.read(name, raw)?;
        self.check_length(name, items.len(), items_max)?;
        Ok(Some(items))
    }

    pub(super) fn check_length(&self, name: &str, length: usize, max: usize) -> Result<(), ParseError> {
        if length <= max {
            return Ok(());
        }
        let what = format!(
            "array too long. Expected an array with maximum length {max}, but got an array with length {length} instead"
        );
        Err(ParseError::value(self.name(name), what))
    }

    /// An array of token ids.
    pub(super) fn token_ids(&self, name: &str, items_max: usize) -> Result<Option<Vec<u32>>, ParseError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        if Kind::of(raw) != Kind::Array {
            return Err(self.mistyped(name, "an array of integers", raw));
        }
        let ids = ids(&self.name(name), raw)?;
        self.check_length(name, ids.len(), items_max)?;
        Ok(Some(ids))
    }

    /// A value that was seen to be of the right kind. It can still be too deep, or hold a number out of range.
    pub(super) fn read<T: Deserialize<'a>>(&self, name: &str, raw: &'a str) -> Result<T, ParseError> {
        read(&self.name(name), raw)
    }

    /// A field that is there with a value other than those that change nothing. `what` is said where nobody has it.
    pub(super) fn need(&self, name: &str, harmless: &[&str], what: &'static str) -> Option<Need> {
        self.raw(name).filter(|raw| !harmless.contains(raw)).map(|_| Need { param: self.name(name), what })
    }

    /// Refuses what [`Fields::need`] notes.
    pub(super) fn refuse(&self, name: &str, harmless: &[&str], what: &'static str) -> Result<(), ParseError> {
        self.need(name, harmless, what).map_or(Ok(()), |need| Err(ParseError::NotSupported(need)))
    }
}

pub(super) fn kind_of(raw: &RawValue) -> Kind {
    Kind::of(raw.get())
}

/// A valid JSON value that has to be of type `T`.
pub(super) fn read<'a, T: Deserialize<'a>>(param: &str, raw: &'a str) -> Result<T, ParseError> {
    serde_json::from_str(raw).map_err(|error| ParseError::value(param, reason(&error)))
}

/// A raw array as token ids.
pub(super) fn ids(param: &str, raw: &str) -> Result<Vec<u32>, ParseError> {
    serde_json::from_str(raw).map_err(|_| {
        ParseError::value(param, format!("expected an array of token ids, integers from 0 to {}", u32::MAX))
    })
}

fn bad_json(error: &serde_json::Error) -> ParseError {
    ParseError::BadJson { what: reason(error), line: error.line(), column: error.column() }
}

/// The error without its position, which is said apart.
fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let what = text.rsplit_once(" at line ").map_or(text.as_str(), |(what, _)| what);
    shown(what)
}
