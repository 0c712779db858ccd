//! Watches the raw bytes of an HTTP/1.1 connection for what hyper's parser forgives and then hides. Pure.
//!
//! hyper drops a repeated equal `content-length`, and the `content-length` beside a `transfer-encoding`, before a
//! service sees the head. A proxy behind or before us may read such a request differently, so they are refused; and
//! so are heads with bare line feeds. The scan follows the framing of bodies only as far as it needs to find the next
//! head. Where it loses track, every later request is refused ([`Refusal::Unframed`]).

use std::collections::VecDeque;

use crate::guard::Refusal;

/// Longest head that is followed. hyper refuses longer ones itself (its limit is at most the configured one).
const HEAD_BYTES_MAX: usize = 1 << 20;

/// One verdict per head, in order.
#[derive(Debug)]
pub(crate) struct HeadScan {
    at: At,
    /// Beginning of a head that came in pieces.
    partial: Vec<u8>,
    /// How far `partial` was searched for its end.
    line_start: usize,
    verdicts: VecDeque<Option<Refusal>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Head,
    Body { left: u64 },
    Chunked(Chunk),
    Lost,
}

/// Where in a chunked body (RFC 9112, 7.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunk {
    Size {
        value: u64,
        digits: u8,
    },
    /// Blanks or an extension, up to the CR.
    Extension {
        value: u64,
    },
    SizeLf {
        value: u64,
    },
    Data {
        left: u64,
    },
    DataCr,
    DataLf,
    /// At the beginning of a trailer line.
    Trailer,
    TrailerText,
    /// CR of the empty line that ends the message.
    EndLf,
    TrailerLf,
}

impl HeadScan {
    pub(crate) fn new() -> Self {
        Self { at: At::Head, partial: Vec::new(), line_start: 0, verdicts: VecDeque::new() }
    }

    /// The verdict on the next request; a request without one is not let in.
    pub(crate) fn next_verdict(&mut self) -> Result<(), Refusal> {
        match self.verdicts.pop_front() {
            Some(None) => Ok(()),
            Some(Some(refusal)) => Err(refusal),
            None => Err(Refusal::Unframed),
        }
    }

    /// Some of a head has come, but not all.
    pub(crate) fn is_mid_head(&self) -> bool {
        !self.partial.is_empty()
    }

    /// Takes bytes as they came from the socket, in the order in which hyper gets them.
    pub(crate) fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match self.at {
                At::Head => match self.push_head(bytes) {
                    Some(used) => bytes = &bytes[used..],
                    None => return,
                },
                At::Body { left } => {
                    let used = left.min(bytes.len() as u64);
                    bytes = &bytes[used as usize..];
                    self.at = if left == used { At::Head } else { At::Body { left: left - used } };
                }
                At::Chunked(Chunk::Data { left }) => {
                    let used = left.min(bytes.len() as u64);
                    bytes = &bytes[used as usize..];
                    let chunk = if left == used { Chunk::DataCr } else { Chunk::Data { left: left - used } };
                    self.at = At::Chunked(chunk);
                }
                At::Chunked(chunk) => {
                    self.at = chunk.step(bytes[0]);
                    bytes = &bytes[1..];
                }
                At::Lost => return,
            }
        }
    }

    /// Bytes used if the head ends within `bytes`.
    fn push_head(&mut self, bytes: &[u8]) -> Option<usize> {
        if self.partial.is_empty() {
            // Blank lines before a request are skipped (RFC 9112, 2.2).
            let blank = bytes.iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
            if blank > 0 {
                return Some(blank);
            }
            // The usual head comes whole and is not copied.
            if let Some(end) = end_of_head(bytes, &mut 0) {
                self.finish_head(&bytes[..end]);
                return Some(end);
            }
        }
        let before = self.partial.len();
        self.partial.extend_from_slice(bytes);
        let mut partial = std::mem::take(&mut self.partial);
        let end = end_of_head(&partial, &mut self.line_start);
        if end.is_none() && partial.len() <= HEAD_BYTES_MAX {
            self.partial = partial;
            return None;
        }
        self.line_start = 0;
        let Some(end) = end else {
            self.at = At::Lost;
            return None;
        };
        partial.truncate(end);
        self.finish_head(&partial);
        Some(end - before)
    }

    fn finish_head(&mut self, head: &[u8]) {
        match read_framing(head) {
            Ok(at) => {
                self.verdicts.push_back(None);
                self.at = at;
            }
            // The connection is closed after a refusal: what follows is of no interest.
            Err(refusal) => {
                self.verdicts.push_back(Some(refusal));
                self.at = At::Lost;
            }
        }
    }
}

/// The index after the first empty line. `line_start` is where the current line begins, kept between calls.
fn end_of_head(bytes: &[u8], line_start: &mut usize) -> Option<usize> {
    while let Some(length) = memchr::memchr(b'\n', &bytes[*line_start..]) {
        let line = &bytes[*line_start..*line_start + length];
        *line_start += length + 1;
        if matches!(line, b"" | b"\r") {
            return Some(*line_start);
        }
    }
    None
}

/// How the body of a whole head is framed.
fn read_framing(head: &[u8]) -> Result<At, Refusal> {
    let (mut length, mut encoding) = (None, false);
    for line in head.split_inclusive(|b| *b == b'\n') {
        let Some(line) = line.strip_suffix(b"\r\n") else { return Err(Refusal::BareLineFeed) };
        let Some(colon) = memchr::memchr(b':', line) else { continue };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.eq_ignore_ascii_case(b"content-length") {
            if length.is_some() {
                return Err(Refusal::LengthRepeated);
            }
            let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
            let number = std::str::from_utf8(value).ok().filter(|_| digits).and_then(|v| v.parse().ok());
            length = Some(number.ok_or(Refusal::LengthInvalid)?);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if encoding || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(Refusal::EncodingUnsupported);
            }
            encoding = true;
        }
    }
    match (length, encoding) {
        (Some(_), true) => Err(Refusal::LengthAndEncoding),
        (None, true) => Ok(At::Chunked(Chunk::Size { value: 0, digits: 0 })),
        (None | Some(0), false) => Ok(At::Head),
        (Some(left), false) => Ok(At::Body { left }),
    }
}

impl Chunk {
    /// The state after one byte that is not chunk data.
    fn step(self, byte: u8) -> At {
        let hex = (byte as char).to_digit(16);
        let next = match (self, byte) {
            (Self::Size { value, digits }, _) if hex.is_some() && digits < 15 => {
                let value = value * 16 + u64::from(hex.unwrap_or(0));
                Self::Size { value, digits: digits + 1 }
            }
            (Self::Size { value, digits: 1.. }, b'\r') => Self::SizeLf { value },
            (Self::Size { value, digits: 1.. }, b';' | b' ' | b'\t') => Self::Extension { value },
            (Self::Extension { value }, b'\r') => Self::SizeLf { value },
            (Self::Extension { value }, b) if b != b'\n' => Self::Extension { value },
            (Self::SizeLf { value: 0 }, b'\n') => Self::Trailer,
            (Self::SizeLf { value }, b'\n') => Self::Data { left: value },
            (Self::DataCr, b'\r') => Self::DataLf,
            (Self::DataLf, b'\n') => Self::Size { value: 0, digits: 0 },
            (Self::Trailer, b'\r') => Self::EndLf,
            (Self::EndLf, b'\n') => return At::Head,
            (Self::TrailerText, b'\r') => Self::TrailerLf,
            (Self::TrailerLf, b'\n') => Self::Trailer,
            (Self::Trailer | Self::TrailerText, b) if b != b'\n' => Self::TrailerText,
            _ => return At::Lost,
        };
        At::Chunked(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Verdicts, `Unframed` left out.
    fn scan(pieces: &[&[u8]]) -> Vec<Option<Refusal>> {
        let mut scan = HeadScan::new();
        pieces.iter().for_each(|piece| scan.push(piece));
        scan.verdicts.into_iter().collect()
    }

    #[test]
    fn heads_are_judged() {
        let check = |stream: &str, expect: &[Option<Refusal>]| {
            assert_eq!(scan(&[stream.as_bytes()]), expect, "{stream:?}");
        };
        let ok = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
        check(ok, &[None]);
        check(&ok.repeat(3), &[None; 3]);
        check(&format!("\r\n{ok}"), &[None]);
        check("GET / HTTP/1.1\r\nhost: a\r\n", &[]);
        let head = |lines: &str| format!("POST / HTTP/1.1\r\nhost: a\r\n{lines}\r\n");
        check(&(head("content-length: 4\r\n") + "\r\n\r\n" + ok), &[None, None]);
        check(&(head("Content-Length:0\r\n") + ok), &[None, None]);
        let chunks = "4\r\nabcd\r\nA;x=\"y\"\r\n0123456789\r\n0\r\nT: v\r\n\r\n";
        check(&(head("Transfer-Encoding: chunked\r\n") + chunks + ok), &[None, None]);
        check(&(head("transfer-encoding: chunked\r\n") + "0\r\n\r\n" + ok), &[None, None]);
        let refused = |lines: &str, refusal| check(&(head(lines) + ok), &[Some(refusal)]);
        refused("content-length: 4\r\ncontent-length: 4\r\n", Refusal::LengthRepeated);
        refused("content-length: +4\r\n", Refusal::LengthInvalid);
        refused("content-length: 99999999999999999999\r\n", Refusal::LengthInvalid);
        refused("content-length: 4\r\ntransfer-encoding: chunked\r\n", Refusal::LengthAndEncoding);
        refused("transfer-encoding: chunked\r\ncontent-length: 4\r\n", Refusal::LengthAndEncoding);
        refused("transfer-encoding: identity, chunked\r\n", Refusal::EncodingUnsupported);
        refused("transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", Refusal::EncodingUnsupported);
        refused("transfer-encoding:\x0bchunked\r\n", Refusal::EncodingUnsupported);
        check("GET / HTTP/1.1\nhost: a\n\n", &[Some(Refusal::BareLineFeed)]);
        check("GET / HTTP/1.1\r\nhost: a\r\n\n", &[Some(Refusal::BareLineFeed)]);
        // After a chunk that can't be read, no request is let in.
        check(&(head("transfer-encoding: chunked\r\n") + "4\nabcd\r\n0\r\n\r\n" + ok), &[None]);
        check(&(head("transfer-encoding: chunked\r\n") + "0x4\r\nabcd\r\n0\r\n\r\n" + ok), &[None]);
        check(&(head("transfer-encoding: chunked\r\n") + "fffffffffffffffff\r\n" + ok), &[None]);
    }

    #[test]
    fn a_request_without_verdict_is_refused() {
        let mut scan = HeadScan::new();
        assert_eq!(scan.next_verdict(), Err(Refusal::Unframed));
        scan.push(b"GET / HT");
        assert!(scan.is_mid_head());
        scan.push(b"TP/1.1\r\nhost: a\r\n\r\n");
        assert!(!scan.is_mid_head());
        assert_eq!(scan.next_verdict(), Ok(()));
    }

    proptest! {
        #[test]
        fn split_anywhere_gives_the_same_verdicts(
            parts in prop::collection::vec(prop_oneof![
                Just("GET / HTTP/1.1\r\nhost: a\r\n\r\n"),
                Just("POST / HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc"),
                Just("POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3;e\r\nabc\r\n0\r\n\r\n"),
                Just("\r\n"),
                Just("GET / HTTP/1.1\nhost: a\n\n"),
            ], 0..6),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        ) {
            let stream = parts.concat().into_bytes();
            let mut cuts: Vec<_> = cuts.iter().map(|c| c.index(stream.len() + 1)).collect();
            cuts.sort_unstable();
            let mut from = 0;
            let mut pieces = Vec::new();
            for cut in cuts.into_iter().chain([stream.len()]) {
                pieces.push(&stream[from..cut]);
                from = cut;
            }
            let whole = scan(&[&stream]);
            prop_assert_eq!(scan(&pieces), whole.clone());
            prop_assert_eq!(scan(&stream.chunks(1).collect::<Vec<_>>()), whole);
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            scan(&[&bytes]);
        }
    }
}
