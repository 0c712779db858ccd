//! The file as a tree of values, each with its position.
//!
//! A scalar keeps its text, and its type is decided where it is used: `version: 1.10` read as text stays `1.10`.

use crate::path::Segment;
use crate::source::Span;

#[derive(Debug, Clone)]
pub(crate) struct Node {
    /// Numbers in document order. A node's descendants are `id + 1 ..= last`.
    pub(crate) id: u32,
    pub(crate) last: u32,
    pub(crate) span: Span,
    pub(crate) value: Value,
}

#[derive(Debug, Clone)]
pub(crate) enum Value {
    Scalar(Scalar),
    Seq(Vec<Node>),
    Map(Vec<Entry>),
}

#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) key_span: Span,
    pub(crate) value: Node,
}

#[derive(Debug, Clone)]
pub(crate) struct Scalar {
    pub(crate) text: String,
    /// Not quoted, no block scalar: only such a one can be a number, a boolean or null.
    pub(crate) plain: bool,
}

/// What a scalar is by itself, after YAML 1.2's core schema.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Plain {
    /// Nothing at all after the colon. Not the same as `null`: it is often an oversight.
    Empty,
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text,
}

impl Scalar {
    pub(crate) fn resolve(&self) -> Plain {
        if !self.plain {
            return Plain::Text;
        }
        match self.text.as_str() {
            "" => Plain::Empty,
            "~" | "null" | "Null" | "NULL" => Plain::Null,
            "true" | "True" | "TRUE" => Plain::Bool(true),
            "false" | "False" | "FALSE" => Plain::Bool(false),
            ".nan" | ".NaN" | ".NAN" => Plain::Float(f64::NAN),
            ".inf" | ".Inf" | ".INF" | "+.inf" | "+.Inf" | "+.INF" => Plain::Float(f64::INFINITY),
            "-.inf" | "-.Inf" | "-.INF" => Plain::Float(f64::NEG_INFINITY),
            text => number(text),
        }
    }

    /// A switch where a switch is asked for: also YAML 1.1's `on`, `off`, `yes` and `no`, which are text elsewhere.
    pub(crate) fn as_switch(&self) -> Option<bool> {
        match self.resolve() {
            Plain::Bool(value) => Some(value),
            Plain::Text if self.plain => match self.text.to_ascii_lowercase().as_str() {
                "on" | "yes" => Some(true),
                "off" | "no" => Some(false),
                _ => None,
            },
            _ => None,
        }
    }
}

fn number(text: &str) -> Plain {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    let digits = |text: &str, radix| !text.is_empty() && text.chars().all(|c| c.is_digit(radix));
    if let Some(hex) = text.strip_prefix("0x").filter(|hex| digits(hex, 16)) {
        return i128::from_str_radix(hex, 16).map_or(Plain::Text, Plain::Int);
    }
    if let Some(octal) = text.strip_prefix("0o").filter(|octal| digits(octal, 8)) {
        return i128::from_str_radix(octal, 8).map_or(Plain::Text, Plain::Int);
    }
    if digits(unsigned, 10) {
        // Beyond i128 it stays text: better refused as that than silently rounded.
        return text.parse().map_or(Plain::Text, Plain::Int);
    }
    // What Rust reads beyond the core schema (`inf`, `nan`, `infinity`) begins with a letter.
    let looks_like_float = unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        && unsigned.contains(|c: char| c.is_ascii_digit());
    if looks_like_float { text.parse().map_or(Plain::Text, Plain::Float) } else { Plain::Text }
}

impl Node {
    pub(crate) fn new(span: Span, value: Value) -> Self {
        Self { id: 0, last: 0, span, value }
    }

    /// Numbers the whole tree. Once, when it is complete.
    pub(crate) fn assign_ids(&mut self, next: &mut u32) {
        self.id = *next;
        *next += 1;
        match &mut self.value {
            Value::Scalar(_) => {}
            Value::Seq(items) => items.iter_mut().for_each(|item| item.assign_ids(next)),
            Value::Map(entries) => entries.iter_mut().for_each(|entry| entry.value.assign_ids(next)),
        }
        self.last = *next - 1;
    }

    pub(crate) fn contains(&self, id: u32) -> bool {
        (self.id..=self.last).contains(&id)
    }
}

/// A node together with how it was reached.
#[derive(Debug, Clone)]
pub(crate) struct Place<'a> {
    pub(crate) node: &'a Node,
    /// Where its key stands, if it is a value in a mapping.
    pub(crate) key_span: Option<Span>,
    pub(crate) path: Vec<Segment>,
}

impl<'a> Place<'a> {
    pub(crate) fn root(node: &'a Node) -> Self {
        Self { node, key_span: None, path: Vec::new() }
    }

    pub(crate) fn children(&self) -> Vec<Place<'a>> {
        let child = |node, key_span, segment| {
            let mut path = self.path.clone();
            path.push(segment);
            Place { node, key_span, path }
        };
        match &self.node.value {
            Value::Scalar(_) => Vec::new(),
            Value::Seq(items) => items
                .iter()
                .enumerate()
                .map(|(index, item)| child(item, None, Segment::Index(index)))
                .collect(),
            Value::Map(entries) => entries
                .iter()
                .map(|entry| child(&entry.value, Some(entry.key_span), Segment::Key(entry.key.clone())))
                .collect(),
        }
    }

    /// The node with this id, which must be in the tree below.
    pub(crate) fn find(&self, id: u32) -> Option<Place<'a>> {
        let mut place = self.clone();
        while place.node.id != id {
            place = place.children().into_iter().find(|child| child.node.contains(id))?;
        }
        Some(place)
    }

    /// Follows a path as far as it goes, and says whether that was all the way.
    pub(crate) fn follow(&self, path: &[Segment]) -> (Place<'a>, bool) {
        let mut place = self.clone();
        for segment in path {
            match place.children().into_iter().find(|child| child.path.last() == Some(segment)) {
                Some(child) => place = child,
                None => return (place, false),
            }
        }
        (place, true)
    }

    /// What to underline: a scalar itself; of a container its key, since it may run over many lines.
    pub(crate) fn pointer(&self) -> Span {
        match (&self.node.value, self.key_span) {
            (Value::Seq(_) | Value::Map(_), Some(key_span)) => key_span,
            (Value::Map(entries), None) => match entries.first() {
                // A block mapping in a list: its first key stands for it.
                Some(first) if first.key_span.start == self.node.span.start => first.key_span,
                _ => self.node.span,
            },
            (Value::Scalar(_), _) | (Value::Seq(_), None) => self.node.span,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolves_plain_scalars() {
        let check = |text: &str, expect: Plain| {
            assert_eq!(Scalar { text: text.into(), plain: true }.resolve(), expect, "{text:?}");
            assert_eq!(Scalar { text: text.into(), plain: false }.resolve(), Plain::Text, "{text:?} quoted");
        };
        check("", Plain::Empty);
        check("~", Plain::Null);
        check("null", Plain::Null);
        check("true", Plain::Bool(true));
        check("on", Plain::Text);
        check("12", Plain::Int(12));
        check("-12", Plain::Int(-12));
        check("+12", Plain::Int(12));
        check("007", Plain::Int(7));
        check("0x1F", Plain::Int(31));
        check("0o17", Plain::Int(15));
        check("0x-1", Plain::Text);
        check("1.5", Plain::Float(1.5));
        check("-1e3", Plain::Float(-1000.0));
        check(".5", Plain::Float(0.5));
        check(".inf", Plain::Float(f64::INFINITY));
        check("inf", Plain::Text);
        check("nan", Plain::Text);
        check(".", Plain::Text);
        check("-", Plain::Text);
        check("1.2.3", Plain::Text);
        check("1_000", Plain::Text);
        check(&"9".repeat(60), Plain::Text);
        check("30s", Plain::Text);
    }

    #[test]
    fn switches() {
        let check = |text: &str, plain, expect| {
            assert_eq!(Scalar { text: text.into(), plain }.as_switch(), expect, "{text:?}");
        };
        check("on", true, Some(true));
        check("Off", true, Some(false));
        check("yes", true, Some(true));
        check("true", true, Some(true));
        check("on", false, None);
        check("1", true, None);
    }
}
