//! YAML text to a tree: one document, plain-text keys, bounded size, depth and alias expansion.
//!
//! YAML itself is `saphyr-parser`'s business. Anchors, aliases and merge keys (`<<`) are filled in here, by copying,
//! within limits that make "a billion laughs" an error. Custom tags are refused.

use std::collections::HashMap;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, ScanError, Tag};

use crate::diagnostic::Diagnostic;
use crate::source::{FILE_BYTES_MAX, Position, Source, Span};
use crate::tree::{Entry, Node, Scalar, Value};

/// Containers in containers. The longest path of a real file is about eight.
const DEPTH_MAX: usize = 64;
/// Values in the tree, copies for aliases included.
const NODES_MAX: usize = 100_000;
/// Text in the tree, copies included: four times the largest file.
const TEXT_BYTES_MAX: usize = 4 * FILE_BYTES_MAX;

/// The tree of the file's one document; an empty file is an empty scalar.
pub(crate) fn parse(source: &Source) -> Result<Node, Diagnostic> {
    if source.text.len() > FILE_BYTES_MAX {
        let message = format!("the file is larger than {} KiB", FILE_BYTES_MAX / 1024);
        return Err(Diagnostic::error(message).at_span(Span::START));
    }
    let text = source.text.strip_prefix('\u{feff}').unwrap_or(&source.text);
    let mut parser = Parser::new_from_str(text);
    let mut builder = Builder::default();
    while let Some(event) = parser.next_event() {
        let (event, span) = event.map_err(|error| not_yaml(&error))?;
        builder.on_event(event, span_of(span))?;
    }
    let mut root = match builder.root {
        Some(root) => root,
        None => scalar_node(Span::START, String::new(), true),
    };
    root.assign_ids(&mut 0);
    Ok(root)
}

fn position(marker: Marker) -> Position {
    let clamp = |number: usize| u32::try_from(number).unwrap_or(u32::MAX - 1);
    Position { line: clamp(marker.line()).max(1), column: clamp(marker.col()) + 1 }
}

fn span_of(span: saphyr_parser::Span) -> Span {
    Span { start: position(span.start), end: position(span.end) }
}

fn scalar_node(span: Span, text: String, plain: bool) -> Node {
    Node::new(span, Value::Scalar(Scalar { text, plain }))
}

fn not_yaml(error: &ScanError) -> Diagnostic {
    let start = position(*error.marker());
    let info = error.info();
    // The parser's own limit, for containers that it opens before it tells us.
    if info.contains("recursion limit") {
        return too_deep(Span { start, end: start });
    }
    let diagnostic =
        Diagnostic::error("this is not YAML").at_span(Span { start, end: start }).label(info.to_owned());
    // The parser says what it could not do; here is what people did.
    let help = if info.contains("tab") {
        "indent with spaces: YAML does not allow tabs"
    } else if info.contains("mapping values are not allowed") {
        "put quotes around a value that contains `: `, or check the indentation"
    } else if info.contains("unknown anchor") {
        "define it with `&name` before using it; put quotes around text that begins with `*`"
    } else if info.contains("simple key") || info.contains("expected ':'") {
        "write `key: value`, with a space after the colon"
    } else if info.contains("quoted") {
        "a quote before this is not closed"
    } else if info.contains("block") || info.contains("indentation") || info.contains("document start") {
        "check that this line is indented like its neighbours"
    } else if info.contains("flow") || info.contains("','") {
        "check the brackets, braces and commas before this"
    } else {
        return diagnostic;
    };
    diagnostic.help(help)
}

fn too_deep(span: Span) -> Diagnostic {
    Diagnostic::error(format!("nested deeper than {DEPTH_MAX} levels")).at_span(span)
}

/// Containers that are still open, and what is known so far.
#[derive(Default)]
struct Builder {
    stack: Vec<Frame>,
    root: Option<Node>,
    anchors: HashMap<usize, (Node, Size)>,
    size: Size,
}

struct Frame {
    start: Span,
    anchor: usize,
    open: Open,
}

enum Open {
    Seq(Vec<Node>),
    Map { entries: Vec<Entry>, seen: HashMap<String, Span>, key: Option<(String, Span)>, merge: Vec<Node> },
}

#[derive(Debug, Clone, Copy, Default)]
struct Size {
    nodes: usize,
    text_bytes: usize,
    depth: usize,
}

impl Size {
    fn of(node: &Node) -> Self {
        let mut size = Self { nodes: 1, text_bytes: 0, depth: 0 };
        match &node.value {
            Value::Scalar(scalar) => size.text_bytes = scalar.text.len(),
            Value::Seq(items) => items.iter().for_each(|item| size.add_child(Self::of(item))),
            Value::Map(entries) => {
                for entry in entries {
                    size.text_bytes += entry.key.len();
                    size.add_child(Self::of(&entry.value));
                }
            }
        }
        size
    }

    fn add_child(&mut self, child: Self) {
        self.nodes += child.nodes;
        self.text_bytes += child.text_bytes;
        self.depth = self.depth.max(child.depth + 1);
    }
}

impl Builder {
    fn on_event(&mut self, event: Event<'_>, span: Span) -> Result<(), Diagnostic> {
        match event {
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => Ok(()),
            Event::DocumentStart(_) if self.root.is_some() => Err(Diagnostic::error("a second document")
                .at_span(span)
                .label("a configuration file is one document")
                .help("remove the `---`, or put the second document into its own file")),
            Event::DocumentStart(_) => Ok(()),
            Event::Alias(anchor) => {
                // An anchor that is known to the parser but not here is still open: it contains itself.
                let Some((node, size)) = self.anchors.get(&anchor).cloned() else {
                    return Err(Diagnostic::error("an anchor that contains itself").at_span(span));
                };
                self.grow(size, span)?;
                self.complete(node, 0, span)
            }
            Event::Scalar(text, style, anchor, tag) => {
                self.grow(Size { nodes: 1, text_bytes: text.len(), depth: 0 }, span)?;
                let plain = style == ScalarStyle::Plain;
                let plain = plain_after_tag(plain, tag.as_deref(), span)?;
                self.complete(scalar_node(span, text.into_owned(), plain), anchor, span)
            }
            Event::SequenceStart(anchor, tag) => {
                plain_after_tag(true, tag.as_deref(), span)?;
                self.open(span, anchor, Open::Seq(Vec::new()))
            }
            Event::MappingStart(anchor, tag) => {
                plain_after_tag(true, tag.as_deref(), span)?;
                let open =
                    Open::Map { entries: Vec::new(), seen: HashMap::new(), key: None, merge: Vec::new() };
                self.open(span, anchor, open)
            }
            Event::SequenceEnd | Event::MappingEnd => {
                let Some(frame) = self.stack.pop() else { return Ok(()) };
                let node = close(frame.start, frame.open, span)?;
                self.complete(node, frame.anchor, span)
            }
        }
    }

    fn open(&mut self, span: Span, anchor: usize, open: Open) -> Result<(), Diagnostic> {
        self.grow(Size { nodes: 1, text_bytes: 0, depth: 1 }, span)?;
        self.stack.push(Frame { start: span, anchor, open });
        Ok(())
    }

    /// Accounts for nodes about to be added here, or refuses them.
    fn grow(&mut self, added: Size, span: Span) -> Result<(), Diagnostic> {
        if self.stack.len() + added.depth > DEPTH_MAX {
            return Err(too_deep(span));
        }
        self.size.nodes += added.nodes;
        self.size.text_bytes += added.text_bytes;
        if self.size.nodes > NODES_MAX {
            return Err(Diagnostic::error(format!("more than {NODES_MAX} values, aliases filled in"))
                .at_span(span)
                .help("split the file, or use fewer aliases"));
        }
        if self.size.text_bytes > TEXT_BYTES_MAX {
            return Err(Diagnostic::error("too much text once aliases are filled in").at_span(span));
        }
        Ok(())
    }

    /// Puts a finished node where it belongs: as a key, a value, an item or the root.
    fn complete(&mut self, node: Node, anchor: usize, span: Span) -> Result<(), Diagnostic> {
        if anchor != 0 {
            let size = Size::of(&node);
            // The copy kept for later aliases costs memory as well.
            self.grow(size, span)?;
            self.anchors.insert(anchor, (node.clone(), size));
        }
        match self.stack.last_mut().map(|frame| &mut frame.open) {
            None => self.root = Some(node),
            Some(Open::Seq(items)) => items.push(node),
            Some(Open::Map { entries, seen, key, merge }) => match key.take() {
                None => *key = Some(as_key(&node, span, seen)?),
                Some((name, _)) if name == "<<" => merge.push(node),
                Some((name, key_span)) => entries.push(entry(name, key_span, node)),
            },
        }
        Ok(())
    }
}

fn entry(key: String, key_span: Span, mut value: Node) -> Entry {
    // `key:` with nothing after it has no place of its own: point at the key.
    if value.span.is_empty() && matches!(value.value, Value::Scalar(_)) {
        value.span = key_span;
    }
    Entry { key, key_span, value }
}

fn as_key(node: &Node, span: Span, seen: &mut HashMap<String, Span>) -> Result<(String, Span), Diagnostic> {
    let Value::Scalar(Scalar { text, .. }) = &node.value else {
        return Err(Diagnostic::error("a key must be plain text")
            .at_span(node.span)
            .help("put quotes around text that begins with `[` or `{`"));
    };
    // An alias used as a key stands here, not where its anchor is.
    if let Some(first) = seen.insert(text.clone(), span) {
        return Err(Diagnostic::error(format!("the key `{text}` is there twice"))
            .at_span(span)
            .label("set again here")
            .secondary(first, "first set here")
            .help("keep one of them"));
    }
    Ok((text.clone(), span))
}

fn close(start: Span, open: Open, end: Span) -> Result<Node, Diagnostic> {
    match open {
        Open::Seq(items) => {
            let last = items.last().map(|item| item.span);
            Ok(Node::new(container_span(start, last, end), Value::Seq(items)))
        }
        Open::Map { mut entries, mut seen, merge, .. } => {
            let last = entries.last().map(|entry| entry.value.span);
            for source in merge {
                merge_into(&mut entries, source, &mut seen)?;
            }
            Ok(Node::new(container_span(start, last, end), Value::Map(entries)))
        }
    }
}

/// A flow container ends with its bracket; a block container with its last value.
fn container_span(start: Span, last: Option<Span>, end: Span) -> Span {
    let end = if end.is_empty() { last.map_or(start.end, |last| last.end) } else { end.end };
    Span { start: start.start, end: end.max(start.end) }
}

/// `<<: *defaults` or `<<: [*a, *b]`: adds what is not set already; the earlier source wins.
fn merge_into(
    entries: &mut Vec<Entry>,
    source: Node,
    seen: &mut HashMap<String, Span>,
) -> Result<(), Diagnostic> {
    match source.value {
        Value::Map(added) => {
            for entry in added {
                if !seen.contains_key(&entry.key) {
                    seen.insert(entry.key.clone(), entry.key_span);
                    entries.push(entry);
                }
            }
            Ok(())
        }
        Value::Seq(sources) => sources.into_iter().try_for_each(|source| merge_into(entries, source, seen)),
        Value::Scalar(_) => Err(Diagnostic::error("`<<` merges mappings only")
            .at_span(source.span)
            .help("write `<<: *name`, where `&name` marks a mapping")),
    }
}

/// Whether a scalar can still be a number or a boolean after its tag; custom tags are refused.
fn plain_after_tag(plain: bool, tag: Option<&Tag>, span: Span) -> Result<bool, Diagnostic> {
    match tag {
        None => Ok(plain),
        // `!` alone means "no further resolution".
        Some(tag) if tag.handle.is_empty() && tag.suffix == "!" => Ok(false),
        Some(tag) if tag.is_yaml_core_schema() => match tag.suffix.as_str() {
            "str" => Ok(false),
            "int" | "float" | "bool" | "null" => Ok(true),
            "seq" | "map" => Ok(plain),
            _ => Err(unknown_tag(tag, span)),
        },
        Some(tag) => Err(unknown_tag(tag, span)),
    }
}

fn unknown_tag(tag: &Tag, span: Span) -> Diagnostic {
    Diagnostic::error(format!("the tag `{tag}` has no meaning here"))
        .at_span(span)
        .help("remove it; put quotes around text that begins with `!`")
}
