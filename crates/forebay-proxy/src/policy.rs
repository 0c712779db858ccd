//! What follows a failed attempt. Pure.

use std::time::Duration;

use forebay_types::{Code, Fault, Retry};
use forebay_upstream::FaultKind;

/// A wait longer than this is not worth it: the next deployment, or the client, decides.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// Where a failed attempt was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tried {
    /// The router has tried all that it can.
    Fleet,
    Provider(FaultKind),
}

/// What may follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The request itself is at fault: it fails everywhere.
    Stop,
    /// Only another deployment can help.
    Next,
    /// The same deployment may succeed, after the backoff and not before this long; else another one.
    Again { not_before: Duration },
}

/// What may follow a fault before the first byte of a reply.
///
/// | fault                                             | follows                                    |
/// |---------------------------------------------------|--------------------------------------------|
/// | the client's own (400, 413, …)                    | nothing                                    |
/// | the prompt is too long for this deployment        | the next one, whose context may be longer  |
/// | our engine lacks a feature that is asked for      | the next one, which may have it            |
/// | a fleet's, whatever it is                         | the next one: its router has retried       |
/// | a provider refuses with 4xx other than 408, 429   | the next one: it would refuse again        |
/// | a provider is at its limit for more than 5 s      | the next one                               |
/// | a provider's 5xx, 408, 429, a timeout, no connection | the same once more, then the next one   |
pub(crate) fn verdict(fault: &Fault, tried: Tried) -> Verdict {
    match fault.class.code {
        Code::NotSupported if fault.class.retry == Retry::Elsewhere => Verdict::Next,
        Code::BadRequest
        | Code::InvalidApiKey
        | Code::ModelDenied
        | Code::RouteNotFound
        | Code::MethodNotAllowed
        | Code::RequestTimeout
        | Code::BodyTooLarge
        | Code::HeadersTooLarge
        | Code::UnsupportedMediaType
        | Code::InsufficientQuota
        | Code::NotSupported => Verdict::Stop,
        Code::ContextLengthExceeded | Code::ModelNotFound | Code::ModelUnavailable => Verdict::Next,
        Code::RequestsRateLimited
        | Code::TokensRateLimited
        | Code::Overloaded
        | Code::ShuttingDown
        | Code::UpstreamFailed
        | Code::UpstreamTimeout
        | Code::Internal => match (tried, fault.class.retry) {
            (Tried::Fleet, _) => Verdict::Next,
            (Tried::Provider(FaultKind::Refused(status)), _) if refuses_again(status) => Verdict::Next,
            (Tried::Provider(_), Retry::After(after)) if after > WAIT_MAX => Verdict::Next,
            (Tried::Provider(_), Retry::After(after)) => Verdict::Again { not_before: after },
            (Tried::Provider(_), Retry::Elsewhere | Retry::Never) => {
                Verdict::Again { not_before: Duration::ZERO }
            }
        },
    }
}

fn refuses_again(status: http::StatusCode) -> bool {
    status.is_client_error() && !matches!(status.as_u16(), 408 | 429)
}

/// Whether a fault says that the deployment is broken, so that it may be left out for a while.
///
/// A fleet that is full or has nobody says so at once and knows better than a timer when that ends.
pub(crate) fn counts_against(fault: &Fault, tried: Tried) -> bool {
    match fault.class.code {
        Code::UpstreamFailed | Code::UpstreamTimeout | Code::Internal => true,
        Code::RequestsRateLimited
        | Code::TokensRateLimited
        | Code::Overloaded
        | Code::ShuttingDown
        | Code::ModelNotFound
        | Code::ModelUnavailable => matches!(tried, Tried::Provider(_)),
        Code::BadRequest
        | Code::ContextLengthExceeded
        | Code::InvalidApiKey
        | Code::ModelDenied
        | Code::RouteNotFound
        | Code::MethodNotAllowed
        | Code::RequestTimeout
        | Code::BodyTooLarge
        | Code::HeadersTooLarge
        | Code::UnsupportedMediaType
        | Code::InsufficientQuota
        | Code::NotSupported => false,
    }
}

/// The wait before retry `n` (from 0): `base · 2ⁿ`, at most 5 s, shortened by up to a half according to `random`.
///
/// Source: AWS Architecture Blog, "Exponential Backoff And Jitter", equal jitter: clients that failed together don't
/// come back together, and none comes back at once.
pub(crate) fn backoff(base: Duration, n: u32, random: u64) -> Duration {
    let full = base.saturating_mul(1u32.checked_shl(n).unwrap_or(u32::MAX)).min(WAIT_MAX);
    let share = (random >> 11) as f64 / (1u64 << 53) as f64;
    full / 2 + (full / 2).mul_f64(share)
}

#[cfg(test)]
mod tests {
    use forebay_types::{Blame, Class};
    use http::StatusCode;
    use proptest::prelude::*;

    use super::*;

    fn fault(code: Code, retry: Retry) -> Fault {
        Fault::new(Class::new(code, Blame::Upstream).retry(retry), "x")
    }

    #[test]
    fn what_follows() {
        let check = |tried: Tried, code: Code, retry: Retry, expect: Verdict, counts: bool| {
            let fault = fault(code, retry);
            assert_eq!(verdict(&fault, tried), expect, "{tried:?} {code:?} {retry:?}");
            assert_eq!(counts_against(&fault, tried), counts, "{tried:?} {code:?}");
        };
        use Retry::{After, Elsewhere, Never};
        use Tried::{Fleet, Provider};
        let status =
            |status: u16| Provider(FaultKind::Refused(StatusCode::from_u16(status).expect("status")));
        let again = Verdict::Again { not_before: Duration::ZERO };
        let s = Duration::from_secs;

        check(Fleet, Code::BadRequest, Never, Verdict::Stop, false);
        check(status(400), Code::BadRequest, Never, Verdict::Stop, false);
        check(status(413), Code::BodyTooLarge, Never, Verdict::Stop, false);
        check(Fleet, Code::ContextLengthExceeded, Never, Verdict::Next, false);
        check(status(400), Code::ContextLengthExceeded, Never, Verdict::Next, false);
        check(Fleet, Code::NotSupported, Elsewhere, Verdict::Next, false);
        check(Fleet, Code::NotSupported, Never, Verdict::Stop, false);
        check(Fleet, Code::Overloaded, After(s(1)), Verdict::Next, false);
        check(Fleet, Code::ModelUnavailable, Elsewhere, Verdict::Next, false);
        check(Fleet, Code::UpstreamTimeout, Elsewhere, Verdict::Next, true);
        check(Fleet, Code::Internal, Never, Verdict::Next, true);
        check(status(429), Code::Overloaded, Elsewhere, again, true);
        check(status(429), Code::Overloaded, After(s(2)), Verdict::Again { not_before: s(2) }, true);
        check(status(429), Code::Overloaded, After(s(6)), Verdict::Next, true);
        check(status(401), Code::UpstreamFailed, Elsewhere, Verdict::Next, true);
        check(status(404), Code::ModelUnavailable, Elsewhere, Verdict::Next, true);
        check(status(408), Code::UpstreamTimeout, Elsewhere, again, true);
        check(status(500), Code::UpstreamFailed, Elsewhere, again, true);
        check(Provider(FaultKind::Unreachable), Code::UpstreamFailed, Elsewhere, again, true);
        check(Provider(FaultKind::Broken), Code::UpstreamFailed, Never, again, true);
        check(Provider(FaultKind::TimedOut), Code::UpstreamTimeout, Elsewhere, again, true);
    }

    #[test]
    fn backoff_doubles() {
        let check = |n, random, expect_ms| {
            assert_eq!(backoff(Duration::from_millis(200), n, random), Duration::from_millis(expect_ms));
        };
        check(0, 0, 100);
        check(0, 1 << 63, 150);
        check(1, 0, 200);
        check(4, 0, 1600);
        check(5, 0, 2500);
        check(40, 0, 2500);
    }

    proptest! {
        #[test]
        fn backoff_is_bounded(base_ms in 0u64..10_000, n in 0u32..100, random: u64) {
            let base = Duration::from_millis(base_ms);
            let wait = backoff(base, n, random);
            prop_assert!(wait <= WAIT_MAX);
            prop_assert!(wait >= base.min(WAIT_MAX) / 2);
        }
    }
}
