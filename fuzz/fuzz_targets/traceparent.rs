//! The `traceparent` header: continued exactly where it is valid, and what goes upstream is always valid.
#![no_main]

use forebay_observe::TraceContext;
use libfuzzer_sys::fuzz_target;

const RANDOM: [u8; 24] = [7; 24];

fuzz_target!(|data: &[u8]| {
    let Ok(header) = std::str::from_utf8(data) else { return };
    let context = TraceContext::from_header(Some(header), RANDOM);
    assert_eq!(context.parent_id.is_some(), is_valid(header), "{header:?}");
    assert_ne!(context.trace_id, [0; 16]);
    if let Some(parent) = context.parent_id {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(header[3..35], hex(&context.trace_id));
        assert_eq!(header[36..52], hex(&parent));
    }
    let sent = context.header();
    assert!(is_valid(&sent) && sent.len() == 55);
    let next = TraceContext::from_header(Some(&sent), [9; 24]);
    assert_eq!((next.trace_id, next.sampled), (context.trace_id, context.sampled));
    assert_eq!(next.parent_id, Some(context.span_id));
});

/// The same rules, written down position by position (W3C Trace Context, 3.2).
fn is_valid(header: &str) -> bool {
    let bytes = header.as_bytes();
    if bytes.len() < 55 || (bytes.len() > 55 && bytes[55] != b'-') {
        return false;
    }
    let version = &bytes[..2];
    (0..55).all(|at| match at {
        2 | 35 | 52 => bytes[at] == b'-',
        _ => matches!(bytes[at], b'0'..=b'9' | b'a'..=b'f'),
    }) && version != b"ff"
        && (version != b"00" || bytes.len() == 55)
        && bytes[3..35].iter().any(|byte| *byte != b'0')
        && bytes[36..52].iter().any(|byte| *byte != b'0')
}
