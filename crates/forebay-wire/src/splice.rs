//! Changes top-level members of a JSON object and leaves every other byte as it was.
//!
//! A request that goes on to an upstream in the same dialect keeps its fields, known to us or not, in their order and
//! spelling. Only the top level is understood: what is inside a member is skipped, so the cost is one pass.

use std::borrow::Cow;
use std::ops::Range;

use bytes::{Bytes, BytesMut};
use forebay_types::{Blame, Class, Classify, Code};

use crate::Generate;

/// Why bytes can't be spliced: they are not a JSON object. The byte at fault is named.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpliceError {
    #[error("the body is not a JSON object (byte {at})")]
    NotAnObject { at: usize },
    #[error("the body is not valid JSON (byte {at})")]
    Malformed { at: usize },
}

impl Classify for SpliceError {
    fn class(&self) -> Class {
        match self {
            Self::NotAnObject { .. } | Self::Malformed { .. } => Class::new(Code::BadRequest, Blame::Client),
        }
    }
}

/// What to do with one member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change<'a> {
    /// This raw JSON becomes its value; a member that is not there is added at the end.
    Set(Cow<'a, str>),
    /// As `Set`, but only where the member is there.
    Replace(Cow<'a, str>),
    Remove,
}

/// One change of one top-level member. Of several edits of one key the first counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edit<'a> {
    pub key: &'a str,
    pub change: Change<'a>,
}

impl<'a> Edit<'a> {
    /// `raw` is JSON as it is to stand there. The caller answers for it.
    pub fn raw(key: &'a str, raw: impl Into<Cow<'a, str>>) -> Self {
        Self { key, change: Change::Set(raw.into()) }
    }

    /// A string value, quoted and escaped here.
    pub fn string(key: &'a str, text: &str) -> Self {
        Self::raw(key, serde_json::to_string(text).expect("a string serializes"))
    }

    pub fn remove(key: &'a str) -> Self {
        Self { key, change: Change::Remove }
    }
}

/// Applies the edits. Nothing is copied where nothing changes.
///
/// Where a key stands twice, the first is changed and the others are removed, so that no two readers can disagree
/// about which one counts.
pub fn splice(body: &Bytes, edits: &[Edit<'_>]) -> Result<Bytes, SpliceError> {
    let object = Object::scan(body)?;
    let mut applied = vec![false; edits.len()];
    let mut changed = false;
    // Per kept member: what stands before its value, its value, what stands after it up to the comma.
    let mut kept: Vec<[&[u8]; 3]> = Vec::with_capacity(object.members.len() + edits.len());
    for member in &object.members {
        let [lead, value, trail] = member.parts(body);
        let edit = edits.iter().position(|edit| member.is(body, edit.key));
        let Some(at) = edit else {
            kept.push([lead, value, trail]);
            continue;
        };
        match &edits[at].change {
            Change::Set(new) | Change::Replace(new) if !applied[at] => {
                changed |= value != new.as_bytes();
                kept.push([lead, new.as_bytes(), trail]);
            }
            Change::Set(_) | Change::Replace(_) | Change::Remove => changed = true,
        }
        applied[at] = true;
    }
    let mut added: Vec<(usize, String)> = Vec::new();
    for (at, edit) in edits.iter().enumerate() {
        let first = edits[..at].iter().all(|earlier| earlier.key != edit.key);
        if matches!(edit.change, Change::Set(_)) && !applied[at] && first {
            added.push((at, serde_json::to_string(edit.key).expect("a string serializes")));
        }
    }
    if !changed && added.is_empty() {
        return Ok(body.clone());
    }

    let mut out = BytesMut::with_capacity(body.len() + 64);
    out.extend_from_slice(&body[..object.open + 1]);
    let mut first = true;
    let mut comma = |out: &mut BytesMut| {
        if !std::mem::take(&mut first) {
            out.extend_from_slice(b",");
        }
    };
    for parts in &kept {
        comma(&mut out);
        parts.iter().for_each(|part| out.extend_from_slice(part));
    }
    for (at, key) in &added {
        if let Change::Set(raw) = &edits[*at].change {
            comma(&mut out);
            out.extend_from_slice(key.as_bytes());
            out.extend_from_slice(b":");
            out.extend_from_slice(raw.as_bytes());
        }
    }
    out.extend_from_slice(&body[object.close..]);
    Ok(out.freeze())
}

/// The body with another model name.
pub fn with_model(body: &Bytes, model: &str) -> Result<Bytes, SpliceError> {
    splice(body, &[Edit::string("model", model)])
}

/// The body of a call for an upstream in the same dialect: its model's name there and, for a stream, a request for
/// usage, which the accounting needs whether or not the client wants to see it. Other stream options are kept.
pub fn for_upstream(call: &Generate, model: &str) -> Result<Bytes, SpliceError> {
    for_server(call, vec![Edit::string("model", model)], &["include_usage"])
}

/// As [`for_upstream`], for a server that knows vLLM's fields: with the call's cache salt, which need not be the body's.
/// `counting` asks for usage in every frame (`continuous_usage_stats`), so that a stream that is cut is accounted exactly.
pub fn for_replica(call: &Generate, model: &str, counting: bool) -> Result<Bytes, SpliceError> {
    let mut edits = vec![Edit::string("model", model)];
    edits.extend(call.cache_salt.as_deref().map(|salt| Edit::string("cache_salt", salt)));
    let options = ["include_usage", "continuous_usage_stats"];
    for_server(call, edits, if counting { &options } else { &options[..1] })
}

fn for_server(call: &Generate, mut edits: Vec<Edit<'_>>, options_on: &[&str]) -> Result<Bytes, SpliceError> {
    if call.stream {
        let object = Object::scan(&call.body)?;
        let options = object.members.iter().find(|m| m.is(&call.body, "stream_options"));
        let options = options.map(|m| call.body.slice(m.value.clone())).filter(|v| v.first() == Some(&b'{'));
        let on: Vec<Edit<'_>> = options_on.iter().map(|option| Edit::raw(option, "true")).collect();
        let options = splice(&options.unwrap_or(Bytes::from_static(b"{}")), &on)?;
        let at = call.body.len();
        let options = String::from_utf8(options.into()).map_err(|_| SpliceError::Malformed { at })?;
        edits.push(Edit::raw("stream_options", options));
    }
    splice(&call.body, &edits)
}

/// Positions of an object's members.
struct Object {
    /// Of `{`.
    open: usize,
    /// Of `}`.
    close: usize,
    members: Vec<Member>,
}

pub(crate) struct Member {
    /// Behind `{` or the comma.
    pub(crate) start: usize,
    /// With its quotes.
    key: Range<usize>,
    pub(crate) value: Range<usize>,
    /// Of the comma or `}`.
    pub(crate) end: usize,
}

impl Member {
    fn parts<'b>(&self, body: &'b [u8]) -> [&'b [u8]; 3] {
        [&body[self.start..self.value.start], &body[self.value.clone()], &body[self.value.end..self.end]]
    }

    pub(crate) fn is(&self, body: &[u8], name: &str) -> bool {
        let raw = &body[self.key.clone()];
        if raw.contains(&b'\\') {
            return serde_json::from_slice::<String>(raw).is_ok_and(|key| key == name);
        }
        &raw[1..raw.len() - 1] == name.as_bytes()
    }
}

/// Walks an object's members, each once; whoever stops early has not paid for the rest.
pub(crate) struct Members<'b> {
    body: &'b [u8],
    /// Of `{`.
    open: usize,
    /// Behind `{` or the last comma; `None` at the end.
    start: Option<usize>,
    /// Of `}`, once it was met.
    close: usize,
}

impl<'b> Members<'b> {
    pub(crate) fn of(body: &'b [u8]) -> Result<Self, SpliceError> {
        let open = skip_space(body, 0);
        if body.get(open) != Some(&b'{') {
            return Err(SpliceError::NotAnObject { at: open });
        }
        let first = skip_space(body, open + 1);
        let start = (body.get(first) != Some(&b'}')).then_some(open + 1);
        Ok(Self { body, open, start, close: first })
    }

    pub(crate) fn next(&mut self) -> Result<Option<Member>, SpliceError> {
        let Some(start) = self.start.take() else { return Ok(None) };
        let at = skip_space(self.body, start);
        let key = at..skip_string(self.body, at)?;
        let at = skip_space(self.body, key.end);
        expect(self.body, at, b':')?;
        let at = skip_space(self.body, at + 1);
        let value = at..skip_value(self.body, at)?;
        let end = skip_space(self.body, value.end);
        match self.body.get(end) {
            Some(b',') => self.start = Some(end + 1),
            Some(b'}') => self.close = end,
            _ => return Err(SpliceError::Malformed { at: end }),
        }
        Ok(Some(Member { start, key, value, end }))
    }
}

impl Object {
    fn scan(body: &[u8]) -> Result<Self, SpliceError> {
        let mut walk = Members::of(body)?;
        let mut members = Vec::new();
        while let Some(member) = walk.next()? {
            members.push(member);
        }
        let end = skip_space(body, walk.close + 1);
        if end != body.len() {
            return Err(SpliceError::Malformed { at: end });
        }
        Ok(Self { open: walk.open, close: walk.close, members })
    }
}

fn expect(body: &[u8], at: usize, byte: u8) -> Result<(), SpliceError> {
    if body.get(at) == Some(&byte) { Ok(()) } else { Err(SpliceError::Malformed { at }) }
}

fn skip_space(body: &[u8], at: usize) -> usize {
    let space = |b: &u8| matches!(b, b' ' | b'\t' | b'\n' | b'\r');
    body[at.min(body.len())..].iter().position(|b| !space(b)).map_or(body.len(), |n| at + n)
}

/// Behind the closing quote.
fn skip_string(body: &[u8], at: usize) -> Result<usize, SpliceError> {
    expect(body, at, b'"')?;
    let mut at = at + 1;
    loop {
        let next = memchr::memchr2(b'"', b'\\', &body[at.min(body.len())..]);
        let next = at + next.ok_or(SpliceError::Malformed { at: body.len() })?;
        if body[next] == b'"' {
            return Ok(next + 1);
        }
        at = next + 2;
    }
}

/// Behind the value. Brackets are counted, not matched by kind: the body was parsed before, and a value that is not
/// well formed inside is passed on as it came.
fn skip_value(body: &[u8], at: usize) -> Result<usize, SpliceError> {
    match body.get(at) {
        Some(b'"') => skip_string(body, at),
        Some(b'{' | b'[') => {
            let mut depth = 0usize;
            let mut at = at;
            loop {
                match body.get(at) {
                    Some(b'"') => {
                        at = skip_string(body, at)?;
                        continue;
                    }
                    Some(b'{' | b'[') => depth += 1,
                    Some(b'}' | b']') => depth -= 1,
                    Some(_) => {}
                    None => return Err(SpliceError::Malformed { at }),
                }
                at += 1;
                if depth == 0 {
                    return Ok(at);
                }
            }
        }
        Some(b',' | b'}' | b']' | b':') | None => Err(SpliceError::Malformed { at }),
        Some(_) => {
            let end = |b: &u8| matches!(b, b',' | b'}' | b']' | b' ' | b'\t' | b'\n' | b'\r');
            Ok(body[at..].iter().position(end).map_or(body.len(), |n| at + n))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    #[test]
    fn only_the_member_changes() {
        let check = |body: &str, edits: &[Edit<'_>], expect: &str| {
            let out = splice(&Bytes::copy_from_slice(body.as_bytes()), edits).unwrap();
            assert_eq!(out, expect, "{body}");
        };
        let model = || Edit::string("model", "m");
        check(r#"{"model":"x","n":1.0e0}"#, &[model()], r#"{"model":"m","n":1.0e0}"#);
        check(
            " { \"a\" : [1, {\"model\":2}] ,\n \"model\" : \"x\" } ",
            &[model()],
            " { \"a\" : [1, {\"model\":2}] ,\n \"model\" : \"m\" } ",
        );
        check(r#"{"a":"}\",{\\"}"#, &[model()], r#"{"a":"}\",{\\","model":"m"}"#);
        check("{}", &[model()], r#"{"model":"m"}"#);
        check("{ }", &[Edit::remove("x")], "{ }");
        check(r#"{"a":1,"b":2,"c":3}"#, &[Edit::remove("a")], r#"{"b":2,"c":3}"#);
        check(r#"{"a":1,"b":2,"c":3}"#, &[Edit::remove("c")], r#"{"a":1,"b":2}"#);
        check(r#"{"a":1,"b":2,"c":3}"#, &[Edit::remove("a"), Edit::remove("c")], r#"{"b":2}"#);
        check(r#"{"a":1}"#, &[Edit::remove("a"), model()], r#"{"model":"m"}"#);
        // Both spellings of one key, and the second of a double.
        check(r#"{"mod\u0065l":"x"}"#, &[model()], r#"{"mod\u0065l":"m"}"#);
        check(r#"{"model":"x","a":1,"model":"y"}"#, &[model()], r#"{"model":"m","a":1}"#);
        check(r#"{"a":1}"#, &[Edit::string("k\"", "v\n")], r#"{"a":1,"k\"":"v\n"}"#);
    }

    #[test]
    fn an_equal_value_copies_nothing() {
        let body = Bytes::from_static(br#"{"model":"m"}"#);
        let out = splice(&body, &[Edit::string("model", "m"), Edit::remove("x")]).unwrap();
        assert_eq!(out.as_ptr(), body.as_ptr());
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for body in [
            "",
            "[]",
            "1",
            "{",
            "{\"a\"",
            "{\"a\":",
            "{\"a\":1",
            "{\"a\":1,}",
            "{\"a\":[}",
            "{} x",
            "{a:1}",
            "{\"a\\",
        ] {
            assert!(splice(&Bytes::from(body), &[Edit::remove("x")]).is_err(), "{body}");
        }
    }

    fn call(body: &str) -> Generate {
        let path = "/v1/chat/completions";
        match crate::parse(&http::Method::POST, path, None, &Bytes::copy_from_slice(body.as_bytes()), None) {
            Ok(crate::Ask::Generate(call)) => *call,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn upstream_body_asks_for_usage_of_streams() {
        let check = |rest: &str, expect: &str| {
            let body = format!(r#"{{"messages":[{{"role":"user","content":"hi"}}],"model":"x"{rest}}}"#);
            let out = for_upstream(&call(&body), "m").unwrap();
            let expect = format!(r#"{{"messages":[{{"role":"user","content":"hi"}}],"model":"m"{expect}}}"#);
            assert_eq!(out, expect);
        };
        check("", "");
        check(r#","stream":false"#, r#","stream":false"#);
        check(r#","stream":true"#, r#","stream":true,"stream_options":{"include_usage":true}"#);
        check(
            r#","stream":true,"stream_options":null"#,
            r#","stream":true,"stream_options":{"include_usage":true}"#,
        );
        check(
            r#","stream":true,"stream_options":{"include_usage":false,"x":1}"#,
            r#","stream":true,"stream_options":{"include_usage":true,"x":1}"#,
        );
        check(
            r#","stream":true,"stream_options":{"include_usage":true}"#,
            r#","stream":true,"stream_options":{"include_usage":true}"#,
        );
    }

    #[test]
    fn replicas_are_asked_to_count_as_they_go() {
        let check = |rest: &str, expect: &str| {
            let body = format!(r#"{{"messages":[{{"role":"user","content":"hi"}}],"model":"x"{rest}}}"#);
            let out = for_replica(&call(&body), "m", true).unwrap();
            let expect = format!(r#"{{"messages":[{{"role":"user","content":"hi"}}],"model":"m"{expect}}}"#);
            assert_eq!(out, expect);
        };
        let both = r#""stream_options":{"include_usage":true,"continuous_usage_stats":true}"#;
        check("", "");
        check(r#","stream":true"#, &format!(r#","stream":true,{both}"#));
        check(
            r#","stream_options":{"include_usage":true},"stream":true"#,
            &format!(r#",{both},"stream":true"#),
        );
        check(
            r#","stream":true,"stream_options":{"continuous_usage_stats":false}"#,
            r#","stream":true,"stream_options":{"continuous_usage_stats":true,"include_usage":true}"#,
        );
    }

    #[test]
    fn replicas_get_the_salt_of_the_call() {
        let check = |rest: &str, salt: Option<&str>, expect: &str| {
            let body = format!(r#"{{"messages":[{{"role":"user","content":"hi"}}],"model":"m"{rest}}}"#);
            let mut call = call(&body);
            if salt.is_some() {
                call.cache_salt = salt.map(str::to_owned);
            }
            let expect = format!(r#"{{"messages":[{{"role":"user","content":"hi"}}],"model":"m"{expect}}}"#);
            assert_eq!(for_replica(&call, "m", false).unwrap(), expect);
            // Others don't know the field, and what is ours is none of theirs.
            assert_eq!(for_upstream(&call, "m").unwrap(), body);
        };
        check("", None, "");
        check(r#","cache_salt":"own""#, None, r#","cache_salt":"own""#);
        check(r#","cache_salt":null"#, None, r#","cache_salt":null"#);
        check("", Some("d\"e"), r#","cache_salt":"d\"e""#);
        check(r#","cache_salt":"own","n":1"#, Some("derived"), r#","cache_salt":"derived","n":1"#);
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            "[a-z\"\\\\{}\\[\\],:é\n]{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec(("[a-c\"\\\\]{0,2}", inner), 0..4)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn agrees_with_serde(
            members in prop::collection::vec(("[a-d\"\\\\é]{0,2}", value()), 0..6),
            edits in prop::collection::vec(("[a-d\"\\\\é]{0,2}", prop::option::of(value())), 0..4),
            pretty in any::<bool>(),
        ) {
            let object: Map<String, Value> = members.into_iter().collect();
            let mut expect = object.clone();
            let mut seen = std::collections::HashSet::new();
            for (key, change) in &edits {
                if seen.insert(key.clone()) {
                    match change {
                        Some(value) => { expect.insert(key.clone(), value.clone()); }
                        None => { expect.shift_remove(key); }
                    }
                }
            }
            let edits: Vec<_> = edits.iter().map(|(key, change)| match change {
                Some(value) => Edit::raw(key, value.to_string()),
                None => Edit::remove(key),
            }).collect();
            let text = if pretty { format!("{:#}", json!(object)) } else { json!(object).to_string() };
            let out = splice(&Bytes::from(text), &edits).unwrap();
            let got: Map<String, Value> = serde_json::from_slice(&out).unwrap();
            prop_assert_eq!(got.iter().collect::<Vec<_>>(), expect.iter().collect::<Vec<_>>());
        }

        #[test]
        fn no_bytes_panic(bytes in "[{}\\[\\]\":,a\\\\ ]{0,24}") {
            let _ = splice(&Bytes::from(bytes), &[Edit::string("a", "b"), Edit::remove("\\")]);
        }
    }
}
