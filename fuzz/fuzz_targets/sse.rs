//! The SSE splitter and what looks into its frames. The first line says how the rest is cut: each of its bytes is the
//! length of a piece, in turns.
//!
//! However a stream is cut, the frames are the same, and put together they are the stream.
#![no_main]

use bytes::Bytes;
use forebay_wire::{FrameTooLong, SseSplitter, parse_error, scan_body, scan_frame};
use libfuzzer_sys::fuzz_target;

type Split = (Vec<Bytes>, Result<Option<Bytes>, FrameTooLong>);

fn split<'a>(mut splitter: SseSplitter, pieces: impl Iterator<Item = &'a [u8]>) -> Split {
    let mut frames = Vec::new();
    for piece in pieces {
        splitter.push(Bytes::copy_from_slice(piece));
        loop {
            match splitter.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(splitter.next_frame(), Err(error.clone()), "an error stays");
                    return (frames, Err(error));
                }
            }
        }
    }
    (frames, Ok(splitter.finish()))
}

fuzz_target!(|data: &[u8]| {
    let Some(end) = data.iter().position(|byte| *byte == b'\n') else { return };
    let (lengths, stream) = (&data[..end], &data[end + 1..]);
    let pieces = || {
        let mut lengths = lengths.iter().map(|byte| usize::from(byte % 32) + 1).cycle();
        let mut rest = stream;
        std::iter::from_fn(move || {
            let length = lengths.next().unwrap_or(1).min(rest.len());
            let (piece, after) = rest.split_at(length);
            rest = after;
            (!piece.is_empty()).then_some(piece)
        })
    };

    let (frames, rest) = split(SseSplitter::new(), std::iter::once(stream));
    assert_eq!(split(SseSplitter::new(), pieces()), (frames.clone(), rest.clone()));
    let joined = frames.concat();
    assert!(stream.starts_with(&joined));
    match rest.expect("the stream is shorter than the limit") {
        Some(rest) => assert_eq!(rest, stream[joined.len()..]),
        None => assert!(stream[joined.len()..].iter().all(|byte| matches!(byte, b'\r' | b'\n'))),
    }

    // A limit is hit at the same frame, whatever the pieces, and frames before it come out.
    const LIMIT: usize = 24;
    let limited = split(SseSplitter::with_limit(LIMIT), std::iter::once(stream));
    assert_eq!(split(SseSplitter::with_limit(LIMIT), pieces()), limited);
    assert!(limited.0.iter().all(|frame| frame.len() <= LIMIT));
    assert_eq!(limited.0, frames[..limited.0.len()]);

    for frame in frames {
        let info = scan_frame(&frame);
        assert!(!info.usage_only || info.usage.is_some());
        assert!(!info.done || info.usage.is_none());
    }
    let _ = (scan_body(stream), parse_error(stream));
});
