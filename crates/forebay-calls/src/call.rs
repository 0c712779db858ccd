//! JSON of calls.

use std::collections::BTreeMap;

use serde_json::Deserializer;
use serde_json::value::RawValue;

/// A call of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    pub name: String,
    /// A JSON object, as the model wrote it.
    pub arguments: String,
}

/// `{"name": NAME, "arguments": {…}}`, with `parameters` for `arguments` where that is missing, other keys ignored.
/// `None` without a name, or where the arguments are no object.
pub(crate) fn one(text: &str) -> Option<Call> {
    let fields: BTreeMap<String, &RawValue> = serde_json::from_str(text).ok()?;
    let name: String = serde_json::from_str(fields.get("name")?.get()).ok()?;
    let arguments = fields.get("arguments").or_else(|| fields.get("parameters"))?.get();
    (!name.is_empty() && arguments.starts_with('{')).then(|| Call { name, arguments: arguments.to_owned() })
}

/// A call, or an array of them, at least one.
pub(crate) fn one_or_array(text: &str) -> Option<Vec<Call>> {
    if !text.trim_start().starts_with('[') {
        return Some(vec![one(text)?]);
    }
    let items: Vec<&RawValue> = serde_json::from_str(text).ok()?;
    let calls: Vec<_> = items.iter().map(|item| one(item.get())).collect::<Option<_>>()?;
    (!calls.is_empty()).then_some(calls)
}

/// Calls with `;` between them, at least one.
pub(crate) fn separated(text: &str) -> Option<Vec<Call>> {
    let mut calls = Vec::new();
    let mut rest = text;
    loop {
        let mut values = Deserializer::from_str(rest).into_iter::<&RawValue>();
        calls.push(one(values.next()?.ok()?.get())?);
        rest = rest[values.byte_offset()..].trim_start();
        if rest.is_empty() {
            return Some(calls);
        }
        rest = rest.strip_prefix(';')?;
    }
}
