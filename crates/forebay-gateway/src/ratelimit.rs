//! Quotas as response headers, in OpenAI's format.

use std::time::Duration;

use forebay_quota::{Snapshot, Window};

/// `x-ratelimit-{limit,remaining,reset}-{requests,tokens}` of the limits that are set.
pub(crate) fn headers(snapshot: &Snapshot) -> Vec<(&'static str, String)> {
    let mut headers = Vec::with_capacity(6);
    let mut add = |window: Option<Window>, [limit, remaining, reset]: [&'static str; 3]| {
        if let Some(window) = window {
            headers.push((limit, window.limit.to_string()));
            headers.push((remaining, window.remaining.to_string()));
            headers.push((reset, short_duration(window.reset)));
        }
    };
    add(
        snapshot.requests,
        ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"],
    );
    add(
        snapshot.tokens,
        ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"],
    );
    headers
}

/// What is left, for a trace.
pub(crate) fn left(snapshot: &Snapshot) -> String {
    let of = |window: Option<Window>, what: &str| match window {
        Some(window) => format!("{} of {} {what} left", window.remaining, window.limit),
        None => format!("{what} unlimited"),
    };
    format!("{}, {}", of(snapshot.tokens, "tokens"), of(snapshot.requests, "requests"))
}

/// `0s`, `120ms`, `8.64s`, `6m0s`, `1h0m30s`: rounded up to the millisecond.
fn short_duration(duration: Duration) -> String {
    let ms = duration.as_nanos().div_ceil(1_000_000);
    match ms {
        0 => return "0s".into(),
        1..1000 => return format!("{ms}ms"),
        _ => {}
    }
    let (hours, minutes, seconds, ms) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60, ms % 1000);
    let fraction = format!(".{ms:03}");
    let seconds = format!("{seconds}{}s", fraction.trim_end_matches('0').trim_end_matches('.'));
    match (hours, minutes) {
        (0, 0) => seconds,
        (0, minutes) => format!("{minutes}m{seconds}"),
        (hours, minutes) => format!("{hours}h{minutes}m{seconds}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_like_openais() {
        let check = |ms: u64, expect: &str| assert_eq!(short_duration(Duration::from_millis(ms)), expect);
        check(0, "0s");
        check(120, "120ms");
        check(1000, "1s");
        check(8640, "8.64s");
        check(60_000, "1m0s");
        check(360_000, "6m0s");
        check(61_500, "1m1.5s");
        check(3_630_000, "1h0m30s");
        assert_eq!(short_duration(Duration::from_nanos(1)), "1ms");
    }
}
