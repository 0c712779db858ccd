//! Watches the raw bytes of an HTTP/1.1 connection, and passes on what hyper may see. Pure.
//!
//! hyper drops a repeated equal `content-length`, and the `content-length` beside a `transfer-encoding`, before a
//! service sees the head. A proxy behind or before us may read such a request differently, so they are refused; and
//! so are heads with bare line feeds. Others hyper refuses itself, without a word. So a head is held back until it is
//! whole and was judged ([`head::check`]); a refused one is replaced ([`head::stand_in`]), and nothing behind it is
//! passed on. The scan follows the framing of bodies only as far as it needs to find the next head. Where it loses
//! track, every later request is refused ([`Refusal::Unframed`]).

use std::collections::VecDeque;
use std::ops::Range;

use crate::guard::Refusal;
use crate::head::{self, Framing, HeadLimits};

/// Line breaks before a request that are skipped (RFC 9112, 2.2 wants one).
const BLANKS_MAX: u8 = 64;

/// One verdict per head, in order.
#[derive(Debug)]
pub(crate) struct HeadScan {
    limits: HeadLimits,
    at: At,
    /// Beginning of a head that came in pieces, held back.
    partial: Vec<u8>,
    /// How far `partial` was searched for its end.
    line_start: usize,
    blanks: u8,
    verdicts: VecDeque<Option<Refusal>>,
}

/// What hyper gets for one piece of input, in this order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Passed {
    /// A head that was held back, now whole.
    pub(crate) lead: Vec<u8>,
    /// Of the piece itself. Bytes behind it are held back, or dropped.
    pub(crate) through: Range<usize>,
    /// In place of a refused head.
    pub(crate) tail: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Head,
    Body {
        left: u64,
    },
    Chunked(Chunk),
    Lost,
    /// After a refused head: nothing is passed on any more.
    Refused,
}

/// What became of a head.
enum Head {
    /// Its end has not come yet; it is in `partial`.
    Held,
    /// It ends after so many bytes of the piece. The bytes before them, that were held back, are handed out.
    Ends { used: usize, held: Vec<u8> },
    /// It was refused; this stands in for it.
    Refused(Vec<u8>),
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
    pub(crate) fn new(limits: HeadLimits) -> Self {
        Self {
            limits,
            at: At::Head,
            partial: Vec::new(),
            line_start: 0,
            blanks: 0,
            verdicts: VecDeque::new(),
        }
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

    /// A head was refused: what comes after it is not wanted.
    pub(crate) fn is_refused(&self) -> bool {
        self.at == At::Refused
    }

    /// Takes bytes as they came from the socket, and says what of them goes on to hyper.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Passed {
        let mut passed = Passed::default();
        let mut done = 0;
        while done < bytes.len() {
            let rest = &bytes[done..];
            match self.at {
                At::Head => match self.push_head(rest) {
                    Head::Held => break,
                    Head::Ends { used, held } => {
                        done += used;
                        if !held.is_empty() {
                            // Only the first head of a piece has a part from before it.
                            passed.lead = held;
                            passed.lead.extend_from_slice(&bytes[..done]);
                            passed.through.start = done;
                        }
                    }
                    Head::Refused(stand_in) => {
                        passed.tail = stand_in;
                        break;
                    }
                },
                At::Body { left } => {
                    let used = left.min(rest.len() as u64);
                    done += used as usize;
                    self.at = if left == used { At::Head } else { At::Body { left: left - used } };
                }
                At::Chunked(Chunk::Data { left }) => {
                    let used = left.min(rest.len() as u64);
                    done += used as usize;
                    let chunk = if left == used { Chunk::DataCr } else { Chunk::Data { left: left - used } };
                    self.at = At::Chunked(chunk);
                }
                At::Chunked(chunk) => {
                    self.at = chunk.step(rest[0]);
                    done += 1;
                }
                // hyper finds the same mistake in the body, and ends it there.
                At::Lost => done = bytes.len(),
                At::Refused => break,
            }
        }
        passed.through.end = done;
        passed
    }

    fn push_head(&mut self, bytes: &[u8]) -> Head {
        if self.partial.is_empty() {
            let blank = bytes.iter().take_while(|b| **b == b'\n').count();
            if blank > 0 {
                return self.skip_blanks(&bytes[..blank], blank, Vec::new());
            }
            // Something else than HTTP, TLS for one, may never send the end of a line. A CR may begin an empty line;
            // alone it does not, and hyper must not see it before that is known.
            if !bytes[0].is_ascii_graphic() && bytes[0] != b'\r' {
                return self.refuse(Refusal::RequestLineInvalid, bytes);
            }
            // The usual head comes whole and is not copied.
            if let Some(end) = end_of_head(bytes, &mut 0) {
                return self.finish_head(&bytes[..end], end, Vec::new());
            }
        }
        let before = self.partial.len();
        self.partial.extend_from_slice(bytes);
        let mut head = std::mem::take(&mut self.partial);
        let end = end_of_head(&head, &mut self.line_start);
        if end.is_none() && head.len() <= self.limits.bytes_max {
            self.partial = head;
            return Head::Held;
        }
        self.line_start = 0;
        let Some(end) = end else { return self.refuse(Refusal::HeadersTooLarge, &head) };
        head.truncate(end);
        let held = head[..before].to_vec();
        self.finish_head(&head, end - before, held)
    }

    /// Passes on line breaks before a request.
    fn skip_blanks(&mut self, blanks: &[u8], used: usize, held: Vec<u8>) -> Head {
        self.blanks = self.blanks.saturating_add(blanks.len().try_into().unwrap_or(u8::MAX));
        if self.blanks > BLANKS_MAX {
            return self.refuse(Refusal::RequestLineInvalid, blanks);
        }
        Head::Ends { used, held }
    }

    fn finish_head(&mut self, head: &[u8], used: usize, held: Vec<u8>) -> Head {
        if head == b"\r\n" {
            return self.skip_blanks(head, used, held);
        }
        self.blanks = 0;
        self.at = match head::check(head, self.limits) {
            Ok(Framing::Empty) => At::Head,
            Ok(Framing::Length(left)) => At::Body { left },
            Ok(Framing::Chunked) => At::Chunked(Chunk::Size { value: 0, digits: 0 }),
            Err(refusal) => return self.refuse(refusal, head),
        };
        self.verdicts.push_back(None);
        Head::Ends { used, held }
    }

    fn refuse(&mut self, refusal: Refusal, head: &[u8]) -> Head {
        self.verdicts.push_back(Some(refusal));
        self.at = At::Refused;
        Head::Refused(head::stand_in(head))
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

    const LIMITS: HeadLimits = HeadLimits { bytes_max: 1000, headers_max: 10 };

    /// Verdicts, `Unframed` left out, and the bytes that hyper gets.
    fn scan_to(pieces: &[&[u8]]) -> (Vec<Option<Refusal>>, Vec<u8>) {
        let mut scan = HeadScan::new(LIMITS);
        let mut out = Vec::new();
        for piece in pieces {
            let passed = scan.push(piece);
            out.extend(passed.lead);
            out.extend_from_slice(&piece[passed.through]);
            out.extend(passed.tail);
        }
        (scan.verdicts.into_iter().collect(), out)
    }

    fn scan(pieces: &[&[u8]]) -> Vec<Option<Refusal>> {
        scan_to(pieces).0
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
    fn a_refused_head_never_reaches_hyper() {
        let check = |stream: &str, verdicts: &[Option<Refusal>], expect: &str| {
            let pieces: Vec<_> = stream.as_bytes().chunks(1).collect();
            for pieces in [&[stream.as_bytes()], pieces.as_slice()] {
                let (found, out) = scan_to(pieces);
                assert_eq!((found.as_slice(), String::from_utf8(out).unwrap().as_str()), (verdicts, expect));
            }
        };
        let ok = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
        let bad = "PUT /b HTTP/1.1\r\nhost : a\r\n\r\n";
        let instead = "PUT /b HTTP/1.1\r\nhost: -\r\n\r\n";
        check(&format!("{ok}{bad}{ok}"), &[None, Some(Refusal::HeaderInvalid)], &format!("{ok}{instead}"));
        let unknown = "GET / HTTP/1.1\r\nhost: -\r\n\r\n";
        check("\x16\x03\x01\0", &[Some(Refusal::RequestLineInvalid)], unknown);
        let long = format!("GET / HTTP/1.1\r\nhost: a\r\nx: {}", "y".repeat(1000));
        check(&long, &[Some(Refusal::HeadersTooLarge)], unknown);
        check(&format!("{long}\r\n\r\n"), &[Some(Refusal::HeadersTooLarge)], unknown);
        // A CR alone is no empty line, for hyper neither.
        check(&format!("\r{ok}"), &[Some(Refusal::HeaderInvalid)], unknown);
        check(&format!("\r\n\n{ok}"), &[None], &format!("\r\n\n{ok}"));
        // Half a head is held back.
        check(&format!("{ok}GET / HT"), &[None], ok);
        let mut scan = HeadScan::new(LIMITS);
        let endless: usize = (0..100).map(|_| scan.push(b"\r\n").through.len()).sum();
        assert!(endless <= usize::from(BLANKS_MAX) && scan.is_refused(), "{endless}");
    }

    #[test]
    fn a_request_without_verdict_is_refused() {
        let mut scan = HeadScan::new(LIMITS);
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
            let whole = scan_to(&[&stream]);
            prop_assert_eq!(scan_to(&pieces), whole.clone());
            prop_assert_eq!(scan_to(&stream.chunks(1).collect::<Vec<_>>()), whole.clone());
            if whole.0.iter().all(Option::is_none) {
                prop_assert_eq!(whole.1, stream, "good requests pass as they are");
            }
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            scan(&[&bytes]);
        }
    }
}
