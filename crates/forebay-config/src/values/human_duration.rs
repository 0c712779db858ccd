//! A length of time as a person writes it: `250ms`, `30s`, `1h30m`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::written_as_text;

/// Longest duration a file may name: a thousand years is a slip, and sums with it would overflow an `Instant`.
const SECONDS_MAX: u64 = 10 * 366 * 86_400;

const UNITS: &[(&str, u64)] = &[
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("min", 60_000_000_000),
    ("h", 3_600_000_000_000),
    ("d", 86_400_000_000_000),
];

/// A length of time, written with its unit: `250ms`, `30s`, `5m`, `1h30m`, `1.5s`, at most ten years.
///
/// Units: `ns`, `us`, `ms`, `s`, `m` (minutes), `h`, `d`. A number without a unit is refused: half of all
/// configuration files count in seconds and the other half in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct HumanDuration(Duration);

/// Why a text is not a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseHumanDurationError {
    #[error("a duration can't be empty; write it with a unit, like `30s`")]
    Empty,
    #[error("`{number}` has no unit; write `{number}s` for seconds or `{number}ms` for milliseconds")]
    NoUnit { number: String },
    #[error("`{unit}` is not a unit of time; use ms, s, m (minutes), h or d")]
    UnknownUnit { unit: String },
    #[error("not a duration; write a number and a unit, like `250ms`, `30s` or `1h30m`")]
    Malformed,
    #[error("longer than ten years")]
    TooLong,
}

impl HumanDuration {
    pub const fn new(duration: Duration) -> Self {
        Self(duration)
    }

    pub const fn from_millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }

    pub const fn from_secs(secs: u64) -> Self {
        Self(Duration::from_secs(secs))
    }

    pub const fn get(self) -> Duration {
        self.0
    }
}

impl From<Duration> for HumanDuration {
    fn from(duration: Duration) -> Self {
        Self(duration)
    }
}

impl From<HumanDuration> for Duration {
    fn from(duration: HumanDuration) -> Self {
        duration.0
    }
}

impl FromStr for HumanDuration {
    type Err = ParseHumanDurationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut rest = text.trim();
        if rest.is_empty() {
            return Err(ParseHumanDurationError::Empty);
        }
        let mut nanos_sum: u128 = 0;
        while !rest.is_empty() {
            let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
            let (number, after) = rest.split_at(number_end);
            if number.is_empty() {
                return Err(ParseHumanDurationError::Malformed);
            }
            let after = after.trim_start();
            let unit_end =
                after.find(|c: char| c.is_ascii_digit() || c.is_whitespace()).unwrap_or(after.len());
            let (unit, next) = after.split_at(unit_end);
            if unit.is_empty() {
                return Err(ParseHumanDurationError::NoUnit { number: number.to_owned() });
            }
            let unit_nanos = UNITS
                .iter()
                .find(|(name, _)| *name == unit)
                .map(|(_, nanos)| *nanos)
                .ok_or_else(|| ParseHumanDurationError::UnknownUnit { unit: unit.to_owned() })?;
            let part = scaled(number, unit_nanos).ok_or(ParseHumanDurationError::Malformed)?;
            nanos_sum = nanos_sum.saturating_add(part);
            rest = next.trim_start();
        }
        if nanos_sum > u128::from(SECONDS_MAX) * 1_000_000_000 {
            return Err(ParseHumanDurationError::TooLong);
        }
        let (secs, nanos) = (nanos_sum / 1_000_000_000, nanos_sum % 1_000_000_000);
        // Both fit: seconds were just bounded, and the remainder is below 1e9.
        Ok(Self(Duration::new(secs as u64, nanos as u32)))
    }
}

/// `number * scale`, exact for decimals up to nine places and cut below one; `None` if `number` is not a decimal.
/// Saturates instead of overflowing: a number that large is over every limit anyway.
pub(super) fn scaled(number: &str, scale: u64) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) || number.ends_with('.') {
        return None;
    }
    let scale = u128::from(scale);
    let mut sum = whole.parse::<u128>().unwrap_or(u128::MAX).saturating_mul(scale);
    let mut place = 10;
    for digit in fraction.bytes().take(9) {
        sum = sum.saturating_add(u128::from(digit - b'0') * scale / place);
        place *= 10;
    }
    Some(sum)
}

impl fmt::Display for HumanDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut nanos = self.0.as_nanos();
        if nanos == 0 {
            return f.write_str("0s");
        }
        // Largest unit first; `min` and `µs` are only read, never written.
        for (unit, unit_nanos) in UNITS.iter().rev().filter(|(unit, _)| !matches!(*unit, "min" | "µs")) {
            let count = nanos / u128::from(*unit_nanos);
            if count > 0 {
                write!(f, "{count}{unit}")?;
                nanos %= u128::from(*unit_nanos);
            }
        }
        Ok(())
    }
}

written_as_text!(HumanDuration, "HumanDuration", "duration", "a duration with a unit, like `30s`", "30s");

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(text: &str, expect: Result<Duration, &str>) {
        let got = text.parse::<HumanDuration>().map(HumanDuration::get).map_err(|e| e.to_string());
        assert_eq!(got, expect.map_err(str::to_owned), "{text:?}");
    }

    #[test]
    fn parses_what_people_write() {
        check("30s", Ok(Duration::from_secs(30)));
        check("5m", Ok(Duration::from_secs(300)));
        check("5min", Ok(Duration::from_secs(300)));
        check("250ms", Ok(Duration::from_millis(250)));
        check("1h30m", Ok(Duration::from_secs(5400)));
        check(" 1h 30m ", Ok(Duration::from_secs(5400)));
        check("1.5s", Ok(Duration::from_millis(1500)));
        check("0.25ms", Ok(Duration::from_micros(250)));
        check("2 s", Ok(Duration::from_secs(2)));
        check("0s", Ok(Duration::ZERO));
        check("7d", Ok(Duration::from_secs(7 * 86_400)));
    }

    #[test]
    fn says_what_to_write_instead() {
        check("30", Err("`30` has no unit; write `30s` for seconds or `30ms` for milliseconds"));
        check("", Err("a duration can't be empty; write it with a unit, like `30s`"));
        check("5 parsecs", Err("`parsecs` is not a unit of time; use ms, s, m (minutes), h or d"));
        let malformed = "not a duration; write a number and a unit, like `250ms`, `30s` or `1h30m`";
        check("soon", Err(malformed));
        check("-5s", Err(malformed));
        check("1..5s", Err(malformed));
        check("1.s", Err(malformed));
        check("9999999d", Err("longer than ten years"));
        check("99999999999999999999999999999999999999999999d", Err("longer than ten years"));
    }

    proptest! {
        #[test]
        fn prints_what_it_parses(secs in 0..SECONDS_MAX, nanos in 0u32..1_000_000_000) {
            let duration = HumanDuration(Duration::new(secs, nanos));
            prop_assert_eq!(duration.to_string().parse(), Ok(duration));
        }

        #[test]
        fn never_panics(text in "[0-9.smhdµ -]{0,40}|.{0,20}") {
            let _ = text.parse::<HumanDuration>();
        }
    }
}
