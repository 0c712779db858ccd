//! The date and time that a template may print.

use std::time::SystemTime;

const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// A moment in UTC. Hugging Face prints local time; servers of one fleet must make the same prompt, so here it is
/// UTC wherever they stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CivilTime {
    /// Seconds since 1970-01-01T00:00:00Z.
    seconds: i64,
}

impl From<SystemTime> for CivilTime {
    fn from(time: SystemTime) -> Self {
        let seconds = time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        // Up to the year 9999; `strftime` has no more digits.
        Self { seconds: i64::try_from(seconds).unwrap_or(i64::MAX).min(253_402_300_799) }
    }
}

impl CivilTime {
    pub const EPOCH: Self = Self { seconds: 0 };

    /// Year, month 1..=12, day 1..=31. Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms",
    /// `civil_from_days`.
    fn date(self) -> (i64, usize, i64) {
        let z = self.seconds.div_euclid(86_400) + 719_468;
        let era = z.div_euclid(146_097);
        let day_of_era = z.rem_euclid(146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted + 2) / 5 + 1;
        let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        (year, usize::try_from(month).unwrap_or(1), day)
    }

    /// Python's `strftime` in the C locale, the directives that dates are written with; others stay as they are.
    pub(super) fn format(self, format: &str) -> String {
        let (year, month, day) = self.date();
        let days = self.seconds.div_euclid(86_400);
        // 1970-01-01 was a Thursday.
        let weekday = usize::try_from((days + 3).rem_euclid(7)).unwrap_or(0);
        let of_day = self.seconds.rem_euclid(86_400);
        let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
        let hour12 = if hour % 12 == 0 { 12 } else { hour % 12 };
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let day_of_year: i64 = day
            + [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30]
                .iter()
                .take(month - 1)
                .sum::<i64>();
        let month_number = i64::try_from(month).unwrap_or(1);

        let mut out = String::with_capacity(format.len() + 16);
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let mut directive = chars.next();
            // `%-d`: without leading zeros.
            let padded = directive != Some('-');
            if !padded {
                directive = chars.next();
            }
            let number = |value: i64, width: usize| {
                if padded { format!("{value:0width$}") } else { value.to_string() }
            };
            let text = match directive {
                Some('Y') => number(year, 4),
                Some('y') => number(year % 100, 2),
                Some('m') => number(month_number, 2),
                Some('d') => number(day, 2),
                Some('e') if padded => format!("{day:2}"),
                Some('j') => number(day_of_year, 3),
                Some('H') => number(hour, 2),
                Some('I') => number(hour12, 2),
                Some('M') => number(minute, 2),
                Some('S') => number(second, 2),
                Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
                Some('B') => MONTHS[month - 1].to_owned(),
                Some('b' | 'h') => MONTHS[month - 1][..3].to_owned(),
                Some('A') => DAYS[weekday].to_owned(),
                Some('a') => DAYS[weekday][..3].to_owned(),
                Some('F') => format!("{year:04}-{month:02}-{day:02}"),
                Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
                Some('Z') => "UTC".to_owned(),
                Some('z') => "+0000".to_owned(),
                Some('%') => "%".to_owned(),
                Some(other) => format!("%{}{other}", if padded { "" } else { "-" }),
                None => "%".to_owned(),
            };
            out.push_str(&text);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_as_python() {
        // python3: datetime.fromtimestamp(s, UTC).strftime("%a %A %d %b %B %Y %m %j %H %I %p %M %S %-d")
        for (seconds, expect) in [
            (0, "Thu Thursday 01 Jan January 1970 01 001 00 12 AM 00 00 1"),
            (951_782_399, "Mon Monday 28 Feb February 2000 02 059 23 11 PM 59 59 28"),
            (951_782_400, "Tue Tuesday 29 Feb February 2000 02 060 00 12 AM 00 00 29"),
            (1_735_646_400, "Tue Tuesday 31 Dec December 2024 12 366 12 12 PM 00 00 31"),
            (4_107_542_400, "Mon Monday 01 Mar March 2100 03 060 00 12 AM 00 00 1"),
        ] {
            let format = "%a %A %d %b %B %Y %m %j %H %I %p %M %S %-d";
            assert_eq!(CivilTime { seconds }.format(format), expect);
        }
        assert_eq!(CivilTime::EPOCH.format("100%% %F %q %-"), "100% 1970-01-01 %q %");
    }
}
