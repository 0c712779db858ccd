//! Compiling on a stack that is deep enough: llguidance follows rules and `$ref`s by calling itself.

use std::io;

use forebay_wire::Constraint;
use serde_json::Value;

/// Rules, references and brackets that a constraint may have, each of which may be below the one before.
pub(crate) const LEVELS_MAX: usize = 10_000;
/// The most that was seen is 35 kB, without optimisation. Address space; memory is taken as the stack is used.
const LEVEL_BYTES: usize = 50 * 1024;
/// For what other limits bound: 250 levels at most.
const STACK_BYTES_MIN: usize = 16 << 20;

/// No fewer than a path through the constraint can have. 0 where other limits bound it: brackets in brackets are, by the
/// parsers of JSON, of regular expressions and of Lark.
///
/// `ours`: its rules are from here, so that only `$ref`s in it may lead far.
pub(crate) fn levels(constraint: &Constraint, ours: bool) -> usize {
    let count = |text: &str, of: &[u8]| text.bytes().filter(|b| of.contains(b)).count();
    match constraint {
        Constraint::Grammar(lark) if !ours => count(lark, b":{[("),
        Constraint::Grammar(lark) if lark.contains("$ref") => count(lark, b"{["),
        Constraint::JsonSchema(schema) if has_reference(schema) => count(&schema.to_string(), b"{["),
        _ => 0,
    }
}

fn has_reference(schema: &Value) -> bool {
    match schema {
        Value::Object(fields) => fields.iter().any(|(key, value)| key == "$ref" || has_reference(value)),
        Value::Array(items) => items.iter().any(has_reference),
        _ => false,
    }
}

/// Runs `work` on a thread of its own, whose stack is for so many levels, and waits for it.
pub(crate) fn run<T: Send>(levels: usize, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    let stack = STACK_BYTES_MIN + levels * LEVEL_BYTES;
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("forebay-compile".into()).stack_size(stack);
        let thread = builder.spawn_scoped(scope, work)?;
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}
