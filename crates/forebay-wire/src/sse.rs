//! Splits a stream of bytes into whole SSE frames, wherever the network cut it.
//!
//! A frame is everything up to and with its blank line, comments and blank lines before it included: frames put
//! together again are the stream, byte for byte. Lines end in LF or CRLF. The lone CR that the format also allows is
//! not taken as a line end: no LLM server writes it, and it would force a wait for one more byte after each frame.

use bytes::{Bytes, BytesMut};

/// Bytes that one frame may have.
pub const FRAME_BYTES_MAX: usize = 1 << 20;

/// A frame longer than the splitter's limit. The stream can't be read any further.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an event of the upstream's stream is longer than {limit} bytes")]
pub struct FrameTooLong {
    pub limit: usize,
}

/// What the current line holds so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    Empty,
    /// One CR: still empty if LF follows.
    Cr,
    Text,
}

/// Incremental splitter: `push` what came, take frames until there is none.
///
/// A frame that lies within one pushed buffer is a slice of it; one that was cut is copied once.
#[derive(Debug)]
pub struct SseSplitter {
    /// Beginning of a frame, from earlier buffers.
    partial: BytesMut,
    /// Not looked at yet.
    fresh: Bytes,
    line: Line,
    /// The current frame has a line that is not blank.
    has_text: bool,
    limit: usize,
}

impl Default for SseSplitter {
    fn default() -> Self {
        Self::new()
    }
}

impl SseSplitter {
    pub fn new() -> Self {
        Self::with_limit(FRAME_BYTES_MAX)
    }

    pub fn with_limit(limit: usize) -> Self {
        Self { partial: BytesMut::new(), fresh: Bytes::new(), line: Line::Empty, has_text: false, limit }
    }

    /// Adds bytes. Frames of the bytes before should have been taken; what is left is kept, at the cost of a copy.
    pub fn push(&mut self, bytes: Bytes) {
        if self.fresh.is_empty() {
            self.fresh = bytes;
        } else {
            let mut joined = BytesMut::from(&self.fresh[..]);
            joined.extend_from_slice(&bytes);
            self.fresh = joined.freeze();
        }
    }

    /// The next whole frame, or `None` until more is pushed.
    ///
    /// # Errors
    /// [`FrameTooLong`], and again at every further call.
    pub fn next_frame(&mut self) -> Result<Option<Bytes>, FrameTooLong> {
        let end = self.scan();
        let length = self.partial.len() + end.unwrap_or(self.fresh.len());
        if length > self.limit {
            self.has_text = true;
            self.partial.extend_from_slice(&self.fresh);
            self.fresh.clear();
            self.partial.truncate(self.limit + 1);
            return Err(FrameTooLong { limit: self.limit });
        }
        let Some(end) = end else {
            self.partial.extend_from_slice(&self.fresh);
            self.fresh.clear();
            return Ok(None);
        };
        self.has_text = false;
        let head = self.fresh.split_to(end);
        if self.partial.is_empty() {
            return Ok(Some(head));
        }
        self.partial.extend_from_slice(&head);
        Ok(Some(self.partial.split().freeze()))
    }

    /// Whatever is left when the stream ended: a last frame without its blank line. `None` where nothing but blank
    /// lines is left.
    pub fn finish(mut self) -> Option<Bytes> {
        self.partial.extend_from_slice(&self.fresh);
        let blank = self.partial.iter().all(|b| matches!(b, b'\r' | b'\n'));
        (!blank).then(|| self.partial.freeze())
    }

    /// Where the current frame ends in `fresh`. Reads each byte once.
    fn scan(&mut self) -> Option<usize> {
        let mut at = 0;
        while let Some(length) = memchr::memchr(b'\n', &self.fresh[at..]) {
            self.line = grow(self.line, &self.fresh[at..at + length]);
            at += length + 1;
            let blank = self.line != Line::Text;
            self.line = Line::Empty;
            if !blank {
                self.has_text = true;
            } else if self.has_text {
                return Some(at);
            }
        }
        self.line = grow(self.line, &self.fresh[at..]);
        None
    }
}

fn grow(line: Line, more: &[u8]) -> Line {
    match (line, more) {
        (line, []) => line,
        (Line::Empty, [b'\r']) => Line::Cr,
        _ => Line::Text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(pieces: &[&[u8]]) -> (Vec<Bytes>, Option<Bytes>) {
        let mut splitter = SseSplitter::new();
        let mut frames = Vec::new();
        for piece in pieces {
            splitter.push(Bytes::copy_from_slice(piece));
            while let Some(frame) = splitter.next_frame().unwrap() {
                frames.push(frame);
            }
        }
        (frames, splitter.finish())
    }

    #[test]
    fn frames_end_at_blank_lines() {
        let check = |stream: &str, expect: &[&str], rest: Option<&str>| {
            let (frames, left) = split(&[stream.as_bytes()]);
            assert_eq!(frames, expect, "{stream:?}");
            assert_eq!(left.as_deref(), rest.map(str::as_bytes), "{stream:?}");
        };
        check("data: a\n\ndata: b\n\n", &["data: a\n\n", "data: b\n\n"], None);
        check("data: a\r\n\r\ndata: b\r\n\r\n", &["data: a\r\n\r\n", "data: b\r\n\r\n"], None);
        check("data: a\n\r\ndata: b\r\n\n", &["data: a\n\r\n", "data: b\r\n\n"], None);
        check(": ping\n\n", &[": ping\n\n"], None);
        check("event: x\ndata: 1\ndata: 2\n\n", &["event: x\ndata: 1\ndata: 2\n\n"], None);
        check("\n\n\ndata: a\n\n\n", &["\n\n\ndata: a\n\n"], None);
        check("data: a\n\ndata: [DONE]", &["data: a\n\n"], Some("data: [DONE]"));
        check("data: a\rb\n\n", &["data: a\rb\n\n"], None);
        check("", &[], None);
    }

    #[test]
    fn whole_frames_are_not_copied() {
        let stream = Bytes::from_static(b"data: a\n\ndata: b\n\n");
        let mut splitter = SseSplitter::new();
        splitter.push(stream.clone());
        let first = splitter.next_frame().unwrap().unwrap();
        let second = splitter.next_frame().unwrap().unwrap();
        assert_eq!(first.as_ptr(), stream.as_ptr());
        assert_eq!(second.as_ptr(), stream[9..].as_ptr());
    }

    #[test]
    fn a_frame_has_a_limit() {
        let mut splitter = SseSplitter::with_limit(8);
        splitter.push(Bytes::from_static(b"data:1\n\n"));
        assert_eq!(splitter.next_frame().unwrap().unwrap(), "data:1\n\n");
        splitter.push(Bytes::from_static(b"data:12\n\n"));
        assert_eq!(splitter.next_frame(), Err(FrameTooLong { limit: 8 }));
        assert_eq!(splitter.next_frame(), Err(FrameTooLong { limit: 8 }));
        let mut splitter = SseSplitter::with_limit(8);
        for _ in 0..8 {
            splitter.push(Bytes::from_static(b"x"));
            assert_eq!(splitter.next_frame(), Ok(None));
        }
        splitter.push(Bytes::from_static(b"x"));
        assert!(splitter.next_frame().is_err());
    }

    proptest! {
        #[test]
        fn split_anywhere_gives_the_same_frames(
            lines in prop::collection::vec("(data: ?[a-zé]{0,6}|: c|\r|)(\n|\r\n)", 0..24),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let stream = lines.concat().into_bytes();
            let whole = split(&[&stream]);
            let mut cuts: Vec<_> = cuts.iter().map(|c| c.index(stream.len() + 1)).collect();
            cuts.sort_unstable();
            let mut pieces = Vec::new();
            let mut from = 0;
            for cut in cuts.into_iter().chain([stream.len()]) {
                pieces.push(&stream[from..cut]);
                from = cut;
            }
            prop_assert_eq!(split(&pieces), whole.clone());
            let bytes: Vec<_> = stream.chunks(1).collect();
            prop_assert_eq!(split(&bytes), whole.clone());
            let joined = whole.0.concat();
            prop_assert_eq!(&joined[..], &stream[..joined.len()]);
        }
    }
}
