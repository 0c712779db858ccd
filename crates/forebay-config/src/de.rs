//! A serde `Deserializer` over the tree, whose errors know the value or the key at fault.
//!
//! Typed by what is asked for: text may be written without quotes even if it looks like a number, a switch may be
//! written `on`. It skips masked nodes, which is how the loader goes on after a mistake.

use std::collections::HashSet;
use std::fmt;

use serde::de::{
    self, DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, MapAccess, SeqAccess, VariantAccess,
    Visitor,
};

use crate::tree::{Entry, Node, Plain, Scalar, Value};
use crate::values::ONE_OR_MANY;

/// Why a value does not fit, and at which node. Boxed: it travels up through every level.
#[derive(Debug)]
pub(crate) struct DeError(Box<Parts>);

#[derive(Debug)]
struct Parts {
    mistake: Mistake,
    at: Option<At>,
}

/// The node's id; the value itself or the key it stands under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum At {
    Value(u32),
    Key(u32),
}

#[derive(Debug)]
pub(crate) enum Mistake {
    UnknownKey {
        key: String,
        expected: &'static [&'static str],
    },
    UnknownValue {
        value: String,
        expected: &'static [&'static str],
    },
    MissingKey {
        key: &'static str,
    },
    /// `text` is the scalar at fault as far as serde tells, to find it again below a tagged enum.
    Unfit {
        found: String,
        expected: String,
        text: Option<String>,
    },
    /// Said by a custom `Deserialize`.
    Custom(String),
}

impl DeError {
    fn new(mistake: Mistake) -> Self {
        Self(Box::new(Parts { mistake, at: None }))
    }

    /// The innermost place wins: whoever knows it first.
    fn or_at(mut self, at: At) -> Self {
        self.0.at.get_or_insert(at);
        self
    }

    pub(crate) fn into_parts(self) -> (Mistake, Option<At>) {
        (self.0.mistake, self.0.at)
    }
}

impl fmt::Display for DeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.mistake {
            Mistake::UnknownKey { key, .. } => write!(f, "unknown key `{key}`"),
            Mistake::UnknownValue { value, .. } => write!(f, "unknown value `{value}`"),
            Mistake::MissingKey { key } => write!(f, "missing key `{key}`"),
            Mistake::Unfit { found, expected, .. } => write!(f, "expected {expected}, found {found}"),
            Mistake::Custom(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for DeError {}

impl de::Error for DeError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        let message = message.to_string();
        match message.starts_with("data did not match any variant of untagged enum") {
            true => Self::new(Mistake::Custom("none of the forms that are allowed here".to_owned())),
            false => Self::new(Mistake::Custom(message)),
        }
    }

    fn invalid_type(found: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        let (found, text) = describe(found);
        Self::new(Mistake::Unfit { found, expected: plainly(&expected.to_string()), text })
    }

    fn invalid_value(found: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::invalid_type(found, expected)
    }

    fn invalid_length(len: usize, expected: &dyn de::Expected) -> Self {
        let found = count(len);
        Self::new(Mistake::Unfit { found, expected: plainly(&expected.to_string()), text: None })
    }

    fn unknown_variant(value: &str, expected: &'static [&'static str]) -> Self {
        Self::new(Mistake::UnknownValue { value: value.to_owned(), expected })
    }

    fn unknown_field(key: &str, expected: &'static [&'static str]) -> Self {
        Self::new(Mistake::UnknownKey { key: key.to_owned(), expected })
    }

    fn missing_field(key: &'static str) -> Self {
        Self::new(Mistake::MissingKey { key })
    }

    fn duplicate_field(key: &'static str) -> Self {
        Self::custom(format!("`{key}` is set twice under different names"))
    }
}

/// What was found, in the file's words. Text is not quoted: it might be a secret, and the line shows it anyway.
fn describe(found: de::Unexpected<'_>) -> (String, Option<String>) {
    use de::Unexpected as U;
    match found {
        U::Bool(value) => (format!("`{value}`"), Some(value.to_string())),
        U::Unsigned(value) => (format!("`{value}`"), Some(value.to_string())),
        U::Signed(value) => (format!("`{value}`"), Some(value.to_string())),
        U::Float(value) => (format!("`{value}`"), Some(value.to_string())),
        U::Str("") => ("empty text".to_owned(), None),
        U::Str(value) => ("text".to_owned(), Some(value.to_owned())),
        U::Unit | U::Option => ("no value".to_owned(), None),
        U::Seq => ("a list".to_owned(), None),
        U::Map => ("a mapping".to_owned(), None),
        U::UnitVariant => ("a name alone".to_owned(), None),
        U::NewtypeVariant | U::TupleVariant | U::StructVariant => ("a name with a value".to_owned(), None),
        // "integer `18446744073709551616` as i128": the number is enough.
        other => {
            let text = other.to_string();
            let number = text.strip_prefix("integer ").and_then(|text| text.strip_suffix(" as i128"));
            (number.unwrap_or(&text).to_owned(), None)
        }
    }
}

fn count(values: usize) -> String {
    if values == 1 { "1 value".to_owned() } else { format!("{values} values") }
}

/// Rust's names of what was expected, in the file's words.
fn plainly(expected: &str) -> String {
    match expected {
        "u8" => "a whole number from 0 to 255".to_owned(),
        "u16" => "a whole number from 0 to 65535".to_owned(),
        "u32" => format!("a whole number from 0 to {}", u32::MAX),
        "u64" | "usize" | "u128" => "a whole number, not negative".to_owned(),
        "i8" | "i16" | "i32" | "i64" | "isize" | "i128" => "a whole number".to_owned(),
        "f32" | "f64" => "a number".to_owned(),
        "a nonzero u8" | "a nonzero u16" | "a nonzero u32" | "a nonzero u64" | "a nonzero usize" => {
            "a whole number above 0".to_owned()
        }
        "a string" | "a borrowed string" => "text".to_owned(),
        "a character" => "a single character".to_owned(),
        "a boolean" => "`true` or `false`".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a map" => "a mapping".to_owned(),
        "unit" => "no value".to_owned(),
        other if other.starts_with("struct ") || other.starts_with("internally tagged enum ") => {
            "a mapping".to_owned()
        }
        other if other.starts_with("a tuple of size ") => other.replace("a tuple of size", "a list of"),
        other if other.starts_with("an array of length ") => other.replace("an array of length", "a list of"),
        other if other.starts_with("tuple ") || other.starts_with("tuple struct ") => "a list".to_owned(),
        other if other.starts_with("enum ") => "one of the known values".to_owned(),
        other => other.to_owned(),
    }
}

/// One node to deserialize, among which some are masked. Pure; recursion is bounded by the parser's depth limit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NodeDe<'de> {
    node: &'de Node,
    masked: &'de HashSet<u32>,
}

impl<'de> NodeDe<'de> {
    pub(crate) fn new(node: &'de Node, masked: &'de HashSet<u32>) -> Self {
        Self { node, masked }
    }

    fn child(self, node: &'de Node) -> Self {
        Self { node, ..self }
    }

    fn scalar(self) -> Option<&'de Scalar> {
        match &self.node.value {
            Value::Scalar(scalar) => Some(scalar),
            Value::Seq(_) | Value::Map(_) => None,
        }
    }

    fn here<T>(self, result: Result<T, DeError>) -> Result<T, DeError> {
        result.map_err(|error| error.or_at(At::Value(self.node.id)))
    }

    /// Deserializes this node, and makes sure that an error from after that (`try_from`, a buffering enum) knows it.
    fn fill<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, DeError> {
        self.here(seed.deserialize(self))
    }

    fn fail<T>(self, found: &str, expected: &str) -> Result<T, DeError> {
        let mistake = Mistake::Unfit { found: found.to_owned(), expected: plainly(expected), text: None };
        self.here(Err(DeError::new(mistake)))
    }

    fn seq<V: Visitor<'de>>(self, items: &'de [Node], visitor: V) -> Result<V::Value, DeError> {
        let mut access = Items { de: self, items: items.iter(), taken: 0 };
        let value = self.here(visitor.visit_seq(&mut access))?;
        let taken = access.taken;
        let left = access.items.filter(|item| !self.masked.contains(&item.id)).count();
        if left > 0 {
            return self.fail(&count(taken + left), &format!("a list of {taken}"));
        }
        Ok(value)
    }

    fn map<V: Visitor<'de>>(self, entries: &'de [Entry], visitor: V) -> Result<V::Value, DeError> {
        self.here(visitor.visit_map(Entries { de: self, entries: entries.iter(), value: None }))
    }
}

macro_rules! as_any {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
            self.deserialize_any(visitor)
        }
    )*};
}

macro_rules! as_text {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
            match self.scalar() {
                Some(scalar) if !matches!(scalar.resolve(), Plain::Empty | Plain::Null) => {
                    self.here(visitor.visit_borrowed_str(&scalar.text))
                }
                _ => self.deserialize_any(visitor),
            }
        }
    )*};
}

impl<'de> Deserializer<'de> for NodeDe<'de> {
    type Error = DeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        let scalar = match &self.node.value {
            Value::Seq(items) => return self.seq(items, visitor),
            Value::Map(entries) => return self.map(entries, visitor),
            Value::Scalar(scalar) => scalar,
        };
        self.here(match scalar.resolve() {
            Plain::Empty | Plain::Null => visitor.visit_unit(),
            Plain::Bool(value) => visitor.visit_bool(value),
            Plain::Float(value) => visitor.visit_f64(value),
            Plain::Text => visitor.visit_borrowed_str(&scalar.text),
            Plain::Int(value) => match (u64::try_from(value), i64::try_from(value)) {
                (Ok(value), _) => visitor.visit_u64(value),
                (_, Ok(value)) => visitor.visit_i64(value),
                _ => visitor.visit_i128(value),
            },
        })
    }

    as_any! {
        deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_i128
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_u128
        deserialize_f32 deserialize_f64 deserialize_seq deserialize_map
    }

    as_text! {
        deserialize_char deserialize_str deserialize_string deserialize_identifier
        deserialize_bytes deserialize_byte_buf
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        match self.scalar().and_then(Scalar::as_switch) {
            Some(value) => self.here(visitor.visit_bool(value)),
            None => self.deserialize_any(visitor),
        }
    }

    /// `key: null` is "not set". `key:` with nothing is not: a section whose lines are all commented out would
    /// else silently be gone, the gateway's keys for one.
    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        match self.scalar().map(Scalar::resolve) {
            Some(Plain::Null) => self.here(visitor.visit_none()),
            _ => self.here(visitor.visit_some(self)),
        }
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        self.deserialize_any(visitor)
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, DeError> {
        self.deserialize_any(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, DeError> {
        match &self.node.value {
            Value::Seq(items) if name == ONE_OR_MANY => self.seq(items, visitor),
            _ if name == ONE_OR_MANY => self.here(visitor.visit_some(self)),
            _ => self.here(visitor.visit_newtype_struct(self)),
        }
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, DeError> {
        self.deserialize_any(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: usize,
        visitor: V,
    ) -> Result<V::Value, DeError> {
        self.deserialize_any(visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DeError> {
        match &self.node.value {
            // A struct from a list would be positional, which no one means.
            Value::Seq(_) => self.fail("a list", "a map"),
            Value::Scalar(scalar) if scalar.resolve() == Plain::Empty => self.map(&[], visitor),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DeError> {
        let choice = match &self.node.value {
            Value::Scalar(scalar) => match scalar.resolve() {
                Plain::Empty | Plain::Null => return self.fail("no value", &one_of(variants)),
                _ => Choice { de: self, name: &scalar.text, content: None },
            },
            Value::Map(entries) => {
                let mut live = entries.iter().filter(|entry| !self.masked.contains(&entry.value.id));
                match (live.next(), live.next()) {
                    (Some(entry), None) => Choice { de: self, name: &entry.key, content: Some(&entry.value) },
                    (None, _) => return self.fail("an empty mapping", &one_of(variants)),
                    _ => return self.fail("several keys", &format!("one key, {}", one_of(variants))),
                }
            }
            Value::Seq(_) => return self.fail("a list", &one_of(variants)),
        };
        self.here(visitor.visit_enum(choice))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        self.here(visitor.visit_unit())
    }
}

/// "`a`, `b` or `c`".
pub(crate) fn one_of(names: &[&str]) -> String {
    match names {
        [] => "nothing".to_owned(),
        [only] => format!("`{only}`"),
        [init @ .., last] => {
            let init: Vec<String> = init.iter().map(|name| format!("`{name}`")).collect();
            format!("{} or `{last}`", init.join(", "))
        }
    }
}

struct Items<'de> {
    de: NodeDe<'de>,
    items: std::slice::Iter<'de, Node>,
    taken: usize,
}

impl<'de> SeqAccess<'de> for &mut Items<'de> {
    type Error = DeError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, DeError> {
        match self.items.find(|item| !self.de.masked.contains(&item.id)) {
            None => Ok(None),
            Some(item) => {
                self.taken += 1;
                self.de.child(item).fill(seed).map(Some)
            }
        }
    }
}

struct Entries<'de> {
    de: NodeDe<'de>,
    entries: std::slice::Iter<'de, Entry>,
    value: Option<&'de Node>,
}

impl<'de> MapAccess<'de> for Entries<'de> {
    type Error = DeError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, DeError> {
        let Some(entry) = self.entries.find(|entry| !self.de.masked.contains(&entry.value.id)) else {
            return Ok(None);
        };
        self.value = Some(&entry.value);
        let key = Key(&entry.key);
        seed.deserialize(key).map(Some).map_err(|error| error.or_at(At::Key(entry.value.id)))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, DeError> {
        let node = self.value.take().expect("serde asks for a value only after its key");
        self.de.child(node).fill(seed)
    }
}

/// A key. Text, unless a map has numbers or switches as keys.
struct Key<'de>(&'de str);

macro_rules! key_as_number {
    ($($method:ident $visit:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
            match self.0.parse() {
                Ok(number) => visitor.$visit(number),
                Err(_) => visitor.visit_borrowed_str(self.0),
            }
        }
    )*};
}

impl<'de> Deserializer<'de> for Key<'de> {
    type Error = DeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        visitor.visit_borrowed_str(self.0)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, DeError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DeError> {
        visitor.visit_enum(self.0.into_deserializer())
    }

    key_as_number! {
        deserialize_bool visit_bool
        deserialize_i8 visit_i8 deserialize_i16 visit_i16 deserialize_i32 visit_i32 deserialize_i64 visit_i64
        deserialize_u8 visit_u8 deserialize_u16 visit_u16 deserialize_u32 visit_u32 deserialize_u64 visit_u64
    }

    serde::forward_to_deserialize_any! {
        i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map struct
        identifier ignored_any
    }
}

/// `name` alone, or `{name: content}`.
struct Choice<'de> {
    de: NodeDe<'de>,
    name: &'de str,
    content: Option<&'de Node>,
}

impl<'de> EnumAccess<'de> for Choice<'de> {
    type Error = DeError;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), DeError> {
        let at = match self.content {
            Some(content) => At::Key(content.id),
            None => At::Value(self.de.node.id),
        };
        let variant = seed.deserialize(Key(self.name)).map_err(|error| error.or_at(at))?;
        Ok((variant, self))
    }
}

impl<'de> Choice<'de> {
    fn content(&self) -> Result<NodeDe<'de>, DeError> {
        match self.content {
            Some(content) => Ok(self.de.child(content)),
            None => {
                let message = format!("`{0}` needs a value: write `{{{0}: …}}`", self.name);
                Err(<DeError as de::Error>::custom(message).or_at(At::Value(self.de.node.id)))
            }
        }
    }
}

impl<'de> VariantAccess<'de> for Choice<'de> {
    type Error = DeError;

    fn unit_variant(self) -> Result<(), DeError> {
        match self.content.map(|content| (self.de.child(content), &content.value)) {
            None => Ok(()),
            Some((_, Value::Scalar(scalar))) if matches!(scalar.resolve(), Plain::Empty | Plain::Null) => {
                Ok(())
            }
            Some((content, _)) => content.fail("a value", &format!("`{}` alone", self.name)),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, DeError> {
        self.content()?.fill(seed)
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, DeError> {
        self.content()?.deserialize_tuple(len, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DeError> {
        self.content()?.deserialize_struct("", fields, visitor)
    }
}
