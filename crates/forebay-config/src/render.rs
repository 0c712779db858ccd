//! Diagnostics as text in rustc's layout, and as JSON.
//!
//! Source lines are shown as they are, except that secrets become stars, control characters spaces (a file must
//! not be able to write escape sequences to a terminal), and a long line is cut to the part that matters.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};
use unicode_width::{UnicodeWidthChar as _, UnicodeWidthStr as _};

use crate::diagnostic::{Diagnostic, Severity, Shown};
use crate::redact;
use crate::source::Span;

/// Characters of a source line that are shown, and how many of them stand before the place of the mistake.
const LINE_CHARS_MAX: usize = 140;
const LEAD_CHARS_MAX: usize = 60;
/// Longest real help line is about 150.
const MESSAGE_CHARS_MAX: usize = 400;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    Plain,
    Ansi,
}

#[derive(Clone, Copy)]
enum Ink {
    Error,
    Warning,
    Frame,
    Bold,
}

impl Style {
    fn paint(self, ink: Ink, text: &str) -> String {
        let code = match (self, ink) {
            (Self::Plain, _) => return text.to_owned(),
            _ if text.is_empty() => return String::new(),
            (Self::Ansi, Ink::Error) => "1;31",
            (Self::Ansi, Ink::Warning) => "1;33",
            (Self::Ansi, Ink::Frame) => "1;34",
            (Self::Ansi, Ink::Bold) => "1",
        };
        format!("\u{1b}[{code}m{text}\u{1b}[0m")
    }
}

/// One block per diagnostic, an empty line between two, a line break at the end.
pub(crate) fn text(shown: &Shown, items: &[Diagnostic], style: Style) -> String {
    let mut out = String::new();
    for (i, item) in items.iter().enumerate() {
        if i > 0 {
            out.push('\n');
        }
        block(&mut out, shown, item, style);
    }
    out
}

/// A line to underline.
struct Mark<'a> {
    span: Span,
    label: &'a str,
    underline: char,
    ink: Ink,
}

fn block(out: &mut String, shown: &Shown, item: &Diagnostic, style: Style) {
    let item = item.parts();
    let ink = match item.severity {
        Severity::Error => Ink::Error,
        Severity::Warning => Ink::Warning,
    };
    let head = style.paint(ink, item.severity.as_str());
    let message = style.paint(Ink::Bold, &format!(": {}", one_line(&item.message)));
    line(out, &format!("{head}{message}"));

    let Some(span) = item.span else {
        line(out, &format!(" {} {}", style.paint(Ink::Frame, "-->"), one_line(&shown.source.name)));
        if let Some(help) = &item.help {
            line(out, &format!("  {} {}", style.paint(Ink::Frame, "="), help_text(style, help)));
        }
        return;
    };

    let mut marks = vec![Mark { span, label: item.label.as_deref().unwrap_or(""), underline: '^', ink }];
    if let Some((span, label)) = &item.secondary {
        marks.push(Mark { span: *span, label, underline: '-', ink: Ink::Frame });
    }
    marks.sort_by_key(|mark| mark.span.start);

    let last_line = marks.iter().map(|mark| mark.span.start.line).max().unwrap_or(1);
    let width = last_line.to_string().len();
    let gutter = format!("{:width$} {}", "", style.paint(Ink::Frame, "|"));
    let place = format!("{}:{}:{}", one_line(&shown.source.name), span.start.line, span.start.column);
    line(out, &format!(" {} {place}", style.paint(Ink::Frame, "-->")));
    line(out, &gutter);

    let mut shown_line = 0;
    for mark in &marks {
        let number = mark.span.start.line;
        let excerpt = excerpt(shown, mark.span);
        if number != shown_line {
            if shown_line != 0 && number > shown_line + 1 {
                line(out, &style.paint(Ink::Frame, "..."));
            }
            let bar = style.paint(Ink::Frame, &format!("{number:width$} |"));
            line(out, &format!("{bar} {}", excerpt.text));
            shown_line = number;
        }
        let underline: String = std::iter::repeat_n(mark.underline, excerpt.width.max(1)).collect();
        let pointing = match mark.label {
            "" => underline,
            label => format!("{underline} {}", one_line(label)),
        };
        line(
            out,
            &format!("{gutter} {:indent$}{}", "", style.paint(mark.ink, &pointing), indent = excerpt.indent),
        );
    }
    if let Some(help) = &item.help {
        let equals = style.paint(Ink::Frame, "=");
        line(out, &format!("{:width$} {equals} {}", "", help_text(style, help)));
    }
}

fn help_text(style: Style, help: &str) -> String {
    format!("{}: {}", style.paint(Ink::Bold, "help"), one_line(help))
}

fn line(out: &mut String, text: &str) {
    // Writing to a String can't fail.
    let _ = writeln!(out, "{}", text.trim_end());
}

/// Part of a line, and where to underline it, in terminal columns.
struct Excerpt {
    text: String,
    indent: usize,
    width: usize,
}

fn excerpt(shown: &Shown, span: Span) -> Excerpt {
    let number = span.start.line;
    let text = redact::line(shown.source.line(number), number, shown.hidden.as_deref());
    let chars: Vec<char> = text.chars().map(printable).collect();
    let start = (span.start.column as usize - 1).min(chars.len());
    let end = match span.end.line > number {
        // More than one line: the rest of this one stands for all.
        true => text.trim_end().chars().count(),
        false => (span.end.column as usize - 1).min(chars.len()),
    };
    let end = end.max(start);

    let from = if chars.len() <= LINE_CHARS_MAX { 0 } else { start.saturating_sub(LEAD_CHARS_MAX) };
    let to = chars.len().min(from + LINE_CHARS_MAX);
    let cut: String = chars[from..to].iter().collect();
    let lead = if from > 0 { "…" } else { "" };
    let tail = if to < chars.len() { "…" } else { "" };
    let columns = |range: &[char]| -> usize { range.iter().map(|c| c.width().unwrap_or(0)).sum() };
    Excerpt {
        indent: lead.width() + columns(&chars[from..start]),
        width: columns(&chars[start..end.min(to).max(start)]),
        text: format!("{lead}{cut}{tail}"),
    }
}

/// Control characters and the marks that reorder text are shown as a space.
fn printable(c: char) -> char {
    let reorders = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    if c.is_control() || reorders { ' ' } else { c }
}

/// A message as one line of bounded length: it may quote the file.
fn one_line(text: &str) -> String {
    let mut line: String = text.chars().take(MESSAGE_CHARS_MAX).map(printable).collect();
    if text.chars().nth(MESSAGE_CHARS_MAX).is_some() {
        line.push('…');
    }
    line
}

pub(crate) fn json(shown: &Shown, items: &[Diagnostic]) -> Value {
    let one = |item: &Diagnostic| {
        let item = item.parts();
        let mut object = Map::new();
        let mut set = |key: &str, value: Value| object.insert(key.to_owned(), value);
        set("severity", json!(item.severity.as_str()));
        set("message", json!(item.message));
        set("path", json!(item.path));
        set("file", json!(shown.source.name));
        if let Some(span) = item.span {
            set("line", json!(span.start.line));
            set("column", json!(span.start.column));
            set("end-line", json!(span.end.line));
            set("end-column", json!(span.end.column));
        }
        if let Some(label) = &item.label {
            set("label", json!(label));
        }
        if let Some(help) = &item.help {
            set("help", json!(help));
        }
        Value::Object(object)
    };
    Value::Array(items.iter().map(one).collect())
}
