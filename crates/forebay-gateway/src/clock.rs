//! The times that the gateway needs: one that only goes on, for quotas, and the calendar, for the audit log.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// Time since the gateway was built. Tokio's clock, so that tests can pause it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// A moment in UTC, to the millisecond. Displays as RFC 3339.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct UtcTime {
    unix_ms: u64,
}

impl UtcTime {
    /// A clock set before 1970 counts as 1970.
    pub(crate) fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { unix_ms: since.as_millis() as u64 }
    }

    #[cfg(test)]
    pub(crate) fn from_unix_ms(unix_ms: u64) -> Self {
        Self { unix_ms }
    }

    /// The day as `YYYYMMDD`.
    pub(crate) fn day(&self) -> u32 {
        let (year, month, day) = self.date();
        year * 10_000 + month * 100 + day
    }

    /// Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`, for days from 1970.
    fn date(&self) -> (u32, u32, u32) {
        let days = self.unix_ms / 86_400_000 + 719_468;
        let (era, day_of_era) = (days / 146_097, days % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        let year = year_of_era + era * 400 + u64::from(month <= 2);
        (year as u32, month as u32, day as u32)
    }
}

impl fmt::Display for UtcTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = self.date();
        let ms = self.unix_ms % 86_400_000;
        let (hour, minute, second) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", ms % 1000)
    }
}

impl serde::Serialize for UtcTime {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calendar() {
        let check = |unix_s: u64, expect: &str, day: u32| {
            let time = UtcTime { unix_ms: unix_s * 1000 + 7 };
            assert_eq!((time.to_string().as_str(), time.day()), (expect, day));
        };
        check(0, "1970-01-01T00:00:00.007Z", 19700101);
        check(951_782_400, "2000-02-29T00:00:00.007Z", 20000229);
        check(951_868_799, "2000-02-29T23:59:59.007Z", 20000229);
        check(951_868_800, "2000-03-01T00:00:00.007Z", 20000301);
        check(1_709_164_800, "2024-02-29T00:00:00.007Z", 20240229);
        check(1_767_225_599, "2025-12-31T23:59:59.007Z", 20251231);
        check(1_767_225_600, "2026-01-01T00:00:00.007Z", 20260101);
        check(4_107_542_400, "2100-03-01T00:00:00.007Z", 21000301);
    }
}
