//! What is wrong with a file, as data. [`crate::render`] turns it into text.

use std::fmt;
use std::sync::Arc;

use crate::render::{self, Style};
use crate::source::{Source, Span};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    Error,
    Warning,
}

impl Severity {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}

/// One mistake: what, where, and what to do about it.
///
/// Messages are one line, lower case, no full stop, names in backticks; never a secret's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic(Box<Parts>);

/// Boxed above, so that a diagnostic is a cheap `Err`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Parts {
    pub(crate) severity: Severity,
    pub(crate) message: String,
    /// `router.fleets[0].model`; empty for the whole file.
    pub(crate) path: String,
    pub(crate) span: Option<Span>,
    pub(crate) label: Option<String>,
    pub(crate) secondary: Option<(Span, String)>,
    pub(crate) help: Option<String>,
}

impl Diagnostic {
    /// An error about the file as a whole. To point at a place, use [`Loaded::error_at`](crate::Loaded::error_at).
    pub fn error(message: impl Into<String>) -> Self {
        Self::new(Severity::Error, message)
    }

    /// A warning about the file as a whole.
    pub fn warning(message: impl Into<String>) -> Self {
        Self::new(Severity::Warning, message)
    }

    fn new(severity: Severity, message: impl Into<String>) -> Self {
        Self(Box::new(Parts {
            severity,
            message: message.into(),
            path: String::new(),
            span: None,
            label: None,
            secondary: None,
            help: None,
        }))
    }

    pub(crate) fn parts(&self) -> &Parts {
        &self.0
    }

    /// A few words beside the underlined place.
    #[must_use]
    pub fn label(mut self, label: impl Into<String>) -> Self {
        self.0.label = Some(label.into());
        self
    }

    /// What to do about it, on a line of its own.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.0.help = Some(help.into());
        self
    }

    #[must_use]
    pub(crate) fn at_span(mut self, span: Span) -> Self {
        self.0.span = Some(span);
        self
    }

    #[must_use]
    pub(crate) fn at_path(mut self, path: impl Into<String>) -> Self {
        self.0.path = path.into();
        self
    }

    /// A second place that has to do with it.
    #[must_use]
    pub(crate) fn secondary(mut self, span: Span, label: impl Into<String>) -> Self {
        self.0.secondary = Some((span, label.into()));
        self
    }

    pub fn severity(&self) -> Severity {
        self.0.severity
    }

    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The configuration path, `router.fleets[0].model`; empty for the whole file.
    pub fn path(&self) -> &str {
        &self.0.path
    }

    pub fn span(&self) -> Option<Span> {
        self.0.span
    }
}

/// A source and the places in it that must not be shown.
#[derive(Debug, Clone)]
pub(crate) struct Shown {
    pub(crate) source: Source,
    /// Plain-text secrets. `None`: the file could not be parsed, so lines are searched for what looks like one.
    pub(crate) hidden: Option<Vec<Span>>,
}

/// All that was found in one file, in the order of the file. `Display` shows it without colour.
#[derive(Debug, Clone)]
pub struct Diagnostics {
    shown: Arc<Shown>,
    items: Vec<Diagnostic>,
}

impl Diagnostics {
    pub(crate) fn new(shown: Arc<Shown>, items: Vec<Diagnostic>) -> Self {
        let mut all = Self { shown, items };
        all.sort();
        all
    }

    /// Stable: what is at one place stays in the order it was found.
    fn sort(&mut self) {
        self.items.sort_by_key(|item| item.span().map(|span| span.start));
    }

    pub fn push(&mut self, diagnostic: Diagnostic) {
        self.items.push(diagnostic);
        self.sort();
    }

    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    pub fn len(&self) -> usize {
        self.items.len()
    }

    pub fn iter(&self) -> std::slice::Iter<'_, Diagnostic> {
        self.items.iter()
    }

    pub fn errors(&self) -> usize {
        self.items.iter().filter(|item| item.severity() == Severity::Error).count()
    }

    pub fn has_errors(&self) -> bool {
        self.errors() > 0
    }

    /// As for a terminal that understands ANSI colours.
    pub fn to_ansi(&self) -> String {
        render::text(&self.shown, &self.items, Style::Ansi)
    }

    /// For scripts: an array of `{severity, message, path, file, line, column, end-line, end-column, label, help}`.
    ///
    /// Lines and columns are from 1, the end is exclusive; what is not known is left out.
    pub fn to_json(&self) -> serde_json::Value {
        render::json(&self.shown, &self.items)
    }
}

impl Extend<Diagnostic> for Diagnostics {
    fn extend<I: IntoIterator<Item = Diagnostic>>(&mut self, items: I) {
        self.items.extend(items);
        self.sort();
    }
}

impl<'a> IntoIterator for &'a Diagnostics {
    type Item = &'a Diagnostic;
    type IntoIter = std::slice::Iter<'a, Diagnostic>;

    fn into_iter(self) -> Self::IntoIter {
        self.items.iter()
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&render::text(&self.shown, &self.items, Style::Plain))
    }
}

impl std::error::Error for Diagnostics {}
