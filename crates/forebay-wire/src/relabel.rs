//! An upstream's answer in the client's terms: the model's name that it asked for, and usage only where it asked.
//!
//! What is changed is spliced into the bytes, everything else passes as it came. Bytes that can't be read that far pass
//! too: a client sees what the upstream sent, not an error of ours.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use memchr::memmem;

use crate::SpliceError;
use crate::splice::{Change, Edit, Members, splice};

/// What becomes of a frame's `usage`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameUsage {
    Keep,
    /// `null` in its place, as it stands in all frames but the last of a stream with usage.
    Null,
    Remove,
}

/// Writes one model name into everything that an upstream says.
#[derive(Debug, Clone)]
pub struct Relabel {
    /// As JSON.
    model: String,
}

impl Relabel {
    /// `model` is the name that the client used.
    pub fn new(model: &str) -> Self {
        Self { model: serde_json::to_string(model).expect("a string serializes") }
    }

    /// One SSE frame. Reads up to the last member of interest, and copies only where something changes.
    pub fn frame(&self, frame: Bytes, usage: FrameUsage) -> Bytes {
        self.edit(&frame, |key| match key {
            Key::Model => Some(Some(self.model.as_str())),
            Key::Usage => match usage {
                FrameUsage::Keep => None,
                FrameUsage::Null => Some(Some("null")),
                FrameUsage::Remove => Some(None),
            },
            Key::Choices => None,
        })
        .unwrap_or(frame)
    }

    /// The usage frame that is made of any frame with usage: its choices are left out.
    pub fn usage_frame(&self, frame: &Bytes) -> Bytes {
        let edited = self.edit(frame, |key| match key {
            Key::Model => Some(Some(self.model.as_str())),
            Key::Choices => Some(Some("[]")),
            Key::Usage => None,
        });
        edited.unwrap_or_else(|| frame.clone())
    }

    /// A JSON body. A body without `model` gets none.
    pub fn body(&self, body: Bytes) -> Bytes {
        let edit = Edit { key: "model", change: Change::Replace(self.model.as_str().into()) };
        splice(&body, &[edit]).unwrap_or(body)
    }

    /// `None` where nothing changes, or where the frame is not understood.
    fn edit<'a>(&'a self, frame: &Bytes, change: impl Fn(Key) -> Option<Option<&'a str>>) -> Option<Bytes> {
        let joined;
        let (frame, data) = match data_line(frame)? {
            Data::Line(range) => (frame, range),
            Data::Lines => {
                let (bytes, range) = join_data(frame);
                joined = bytes;
                (&joined, range)
            }
        };
        let edits = edits(&frame[data.clone()], change).ok()?;
        if edits.is_empty() {
            return None;
        }
        let mut out = BytesMut::with_capacity(frame.len() + self.model.len());
        let mut at = 0;
        for (range, new) in edits {
            out.extend_from_slice(&frame[at..data.start + range.start]);
            out.extend_from_slice(new.as_bytes());
            at = data.start + range.end;
        }
        out.extend_from_slice(&frame[at..]);
        Some(out.freeze())
    }
}

#[derive(Debug, Clone, Copy)]
enum Key {
    Model,
    Usage,
    Choices,
}

const KEYS: [(Key, &str, &[u8]); 3] = [
    (Key::Model, "model", b"\"model\""),
    (Key::Usage, "usage", b"\"usage\""),
    (Key::Choices, "choices", b"\"choices\""),
];

/// Ascending and apart. `change` gives the new value of a member, `Some(None)` to take it out.
fn edits<'a>(
    json: &[u8],
    change: impl Fn(Key) -> Option<Option<&'a str>>,
) -> Result<Vec<(Range<usize>, &'a str)>, SpliceError> {
    // A quote within a JSON string is escaped, so a key with both quotes is never found in text.
    let wanted = |(key, _, quoted): &(Key, &str, &[u8]), from: usize| {
        change(*key).is_some() && memmem::find(&json[from..], quoted).is_some()
    };
    let mut edits = Vec::new();
    let mut walk = Members::of(json)?;
    let mut at = 0;
    let mut is_first = true;
    while KEYS.iter().any(|key| wanted(key, at)) {
        let Some(member) = walk.next()? else { break };
        at = member.end;
        let key = KEYS.iter().find(|(_, name, _)| member.is(json, name));
        match key.and_then(|(key, _, _)| change(*key)) {
            Some(Some(new)) if json[member.value.clone()] != *new.as_bytes() => {
                edits.push((member.value.clone(), new));
            }
            // With the comma before it; the first that stays has none.
            Some(None) if is_first => {
                let comma = usize::from(json.get(member.end) == Some(&b','));
                edits.push((member.start..member.end + comma, ""));
                continue;
            }
            Some(None) => edits.push((member.start - 1..member.end, "")),
            Some(Some(_)) | None => {}
        }
        is_first = false;
    }
    Ok(edits)
}

enum Data {
    /// Where the only data line has its JSON.
    Line(Range<usize>),
    /// More than one data line.
    Lines,
}

/// `None` where there is no data.
fn data_line(frame: &[u8]) -> Option<Data> {
    let mut found = None;
    let mut at = 0;
    while at < frame.len() {
        let end = memchr::memchr(b'\n', &frame[at..]).map_or(frame.len(), |length| at + length);
        if frame[at..end].starts_with(b"data:") {
            if found.is_some() {
                return Some(Data::Lines);
            }
            // A CR at the end is white space to JSON.
            found = Some(at + b"data:".len()..end);
        }
        at = end + 1;
    }
    found.map(Data::Line)
}

/// The frame with its data in one line, and where that is. A line break between two data lines can only be white space
/// of the JSON: within a string it would be escaped.
fn join_data(frame: &[u8]) -> (Bytes, Range<usize>) {
    let mut out = BytesMut::with_capacity(frame.len());
    let mut data = BytesMut::new();
    for line in frame.split_inclusive(|byte| *byte == b'\n') {
        let text = line.trim_ascii_end();
        match text.strip_prefix(b"data:") {
            Some(more) => {
                data.extend_from_slice(b" ");
                data.extend_from_slice(more);
            }
            None if text.is_empty() => {}
            None => out.extend_from_slice(line),
        }
    }
    out.extend_from_slice(b"data:");
    let start = out.len();
    out.extend_from_slice(&data);
    let range = start..out.len();
    out.extend_from_slice(b"\n\n");
    (out.freeze(), range)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn frame(text: &str, usage: FrameUsage) -> String {
        let out = Relabel::new("al\"ias").frame(Bytes::copy_from_slice(text.as_bytes()), usage);
        String::from_utf8(out.to_vec()).unwrap()
    }

    #[test]
    fn a_frame_says_the_clients_model() {
        let check = |text: &str, expect: &str| assert_eq!(frame(text, FrameUsage::Keep), expect);
        check(
            "data: {\"id\":\"1\",\"model\":\"served\",\"choices\":[]}\n\n",
            "data: {\"id\":\"1\",\"model\":\"al\\\"ias\",\"choices\":[]}\n\n",
        );
        check("data: {\"model\" : \"served\"}\r\n\r\n", "data: {\"model\" : \"al\\\"ias\"}\r\n\r\n");
        // Text, and members of members, are not the model.
        for same in [
            "data: [DONE]\n\n",
            ": ping\n\n",
            "",
            "data: {}\n\n",
            "data: {\"a\":{\"model\":\"x\"},\"b\":\"\\\"model\\\":\\\"y\\\"\"}\n\n",
            "data: {\"a\":\"model\"}\n\n",
            "data: {\"model\"\n\n",
        ] {
            check(same, same);
        }
        check(
            "data: {\"choices\":[{\"text\":\"{\\\"model\\\":1}\"}],\"model\":\"s\"}\n\n",
            "data: {\"choices\":[{\"text\":\"{\\\"model\\\":1}\"}],\"model\":\"al\\\"ias\"}\n\n",
        );
        // Other lines stay, and data in several lines is read as one.
        check(
            ": ping\nevent: x\ndata: {\"model\":\"s\"}\n\n",
            ": ping\nevent: x\ndata: {\"model\":\"al\\\"ias\"}\n\n",
        );
        check(
            "event: x\ndata: {\"model\":\ndata: \"s\"}\n\n",
            "event: x\ndata:  {\"model\":  \"al\\\"ias\"}\n\n",
        );
        // A second one can't contradict the first.
        check(
            "data: {\"model\":\"s\",\"model\":\"t\"}\n\n",
            "data: {\"model\":\"al\\\"ias\",\"model\":\"al\\\"ias\"}\n\n",
        );
    }

    #[test]
    fn usage_is_kept_nulled_or_removed() {
        let check = |text: &str, nulled: &str, removed: &str| {
            let line = |json: &str| format!("data: {json}\n\n");
            assert_eq!(frame(&line(text), FrameUsage::Keep), line(text));
            assert_eq!(frame(&line(text), FrameUsage::Null), line(nulled));
            assert_eq!(frame(&line(text), FrameUsage::Remove), line(removed));
        };
        check(r#"{"a":1,"usage":null}"#, r#"{"a":1,"usage":null}"#, r#"{"a":1}"#);
        check(r#"{"a":1,"usage":{"b":[1,"}"]},"c":2}"#, r#"{"a":1,"usage":null,"c":2}"#, r#"{"a":1,"c":2}"#);
        check(r#"{"usage":{},"a":1}"#, r#"{"usage":null,"a":1}"#, r#"{"a":1}"#);
        check(r#"{"usage":1}"#, r#"{"usage":null}"#, "{}");
        check(r#"{ "a": 1 , "usage": {} }"#, r#"{ "a": 1 , "usage": null }"#, r#"{ "a": 1 }"#);
        check(r#"{"usage":1,"usage":2,"a":3}"#, r#"{"usage":null,"usage":null,"a":3}"#, r#"{"a":3}"#);
        check(r#"{"x":{"usage":1}}"#, r#"{"x":{"usage":1}}"#, r#"{"x":{"usage":1}}"#);
    }

    #[test]
    fn a_usage_frame_is_made_of_one_with_text() {
        let with_text = "data: {\"model\":\"s\",\"choices\":[{\"text\":\"a\"}],\"usage\":{\"n\":1}}\n\n";
        let made = Relabel::new("m").usage_frame(&Bytes::from(with_text));
        assert_eq!(made, "data: {\"model\":\"m\",\"choices\":[],\"usage\":{\"n\":1}}\n\n");
    }

    #[test]
    fn bodies() {
        let check =
            |body: &'static str, expect: &str| assert_eq!(Relabel::new("m").body(Bytes::from(body)), expect);
        check(r#"{"model":"s","usage":{"n":1}}"#, r#"{"model":"m","usage":{"n":1}}"#);
        check(r#"{"data":[{"model":"s"}]}"#, r#"{"data":[{"model":"s"}]}"#);
        check("<html>", "<html>");
        check("[]", "[]");
    }

    #[test]
    fn what_does_not_change_is_not_copied() {
        let frame = Bytes::from_static(b"data: {\"model\":\"m\",\"choices\":[]}\n\n");
        assert_eq!(Relabel::new("m").frame(frame.clone(), FrameUsage::Remove).as_ptr(), frame.as_ptr());
    }

    proptest! {
        /// Agrees with a parser, wherever the members stand and whatever their values hold.
        #[test]
        fn agrees_with_serde(
            members in prop::collection::vec(("(a|b|model|usage|choices)", "[a-z\"\\\\{}\\[\\],:]{0,6}"), 0..6),
            pretty in any::<bool>(),
            to_null in any::<bool>(),
        ) {
            let object: serde_json::Map<String, Value> =
                members.into_iter().map(|(key, text)| (key, json!({"usage": text, "model": [text]}))).collect();
            let mut expect = object.clone();
            if expect.contains_key("model") {
                expect["model"] = json!("m");
            }
            if to_null && expect.contains_key("usage") {
                expect["usage"] = Value::Null;
            } else {
                expect.shift_remove("usage");
            }
            let text = if pretty { format!("{:#}", json!(object)) } else { json!(object).to_string() };
            let lines: String = text.lines().map(|line| format!("data: {line}\n")).collect();
            let usage = if to_null { FrameUsage::Null } else { FrameUsage::Remove };
            let out = Relabel::new("m").frame(Bytes::from(format!("{lines}\n")), usage);
            let data: String = std::str::from_utf8(&out).unwrap().lines().filter_map(|l| l.strip_prefix("data:")).collect();
            let got: Value = serde_json::from_str(&data).unwrap();
            prop_assert_eq!(got, Value::Object(expect));
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..100), text in "(data: ?)?[{}\\[\\]\":,a\\\\ \nmodel]{0,24}") {
            for bytes in [Bytes::from(bytes.clone()), Bytes::from(text.clone())] {
                let relabel = Relabel::new("m");
                relabel.frame(bytes.clone(), FrameUsage::Remove);
                relabel.usage_frame(&bytes);
                relabel.body(bytes);
            }
        }
    }
}
