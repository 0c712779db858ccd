//! A number of bytes as a person writes it: `64KiB`, `10MiB`, `1GB`.

use std::fmt;
use std::str::FromStr;

use super::human_duration::scaled;
use super::written_as_text;

const UNITS: &[(&str, u64)] = &[
    ("B", 1),
    ("KB", 1_000),
    ("kB", 1_000),
    ("KiB", 1 << 10),
    ("MB", 1_000_000),
    ("MiB", 1 << 20),
    ("GB", 1_000_000_000),
    ("GiB", 1 << 30),
    ("TB", 1_000_000_000_000),
    ("TiB", 1 << 40),
];

/// A number of bytes, written with its unit: `512B`, `64KiB`, `10MiB`, `1GB`.
///
/// `KiB`, `MiB`, `GiB`, `TiB` are powers of 1024; `KB`, `MB`, `GB`, `TB` powers of 1000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize(u64);

/// Why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseByteSizeError {
    #[error("a size can't be empty; write it with a unit, like `10MiB`")]
    Empty,
    #[error("`{number}` has no unit; write `{number}B` for bytes, or use KiB, MiB or GiB")]
    NoUnit { number: String },
    #[error("`{unit}` is not a unit of size; did you mean `{meant}`?")]
    Misspelt { unit: String, meant: &'static str },
    #[error("`{unit}` is not a unit of size; use B, KiB, MiB, GiB, or KB, MB, GB")]
    UnknownUnit { unit: String },
    #[error("not a size; write a number and a unit, like `64KiB` or `10MiB`")]
    Malformed,
    #[error("more bytes than fit in 64 bits")]
    TooLarge,
}

impl ByteSize {
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    pub const fn kib(kib: u64) -> Self {
        Self(kib << 10)
    }

    pub const fn mib(mib: u64) -> Self {
        Self(mib << 20)
    }

    pub const fn gib(gib: u64) -> Self {
        Self(gib << 30)
    }

    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// As an in-memory size; saturates where `usize` has 32 bits.
    pub fn as_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl FromStr for ByteSize {
    type Err = ParseByteSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        if text.is_empty() {
            return Err(ParseByteSizeError::Empty);
        }
        let number_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(number_end);
        let unit = unit.trim_start();
        if number.is_empty() {
            return Err(ParseByteSizeError::Malformed);
        }
        if unit.is_empty() {
            return Err(ParseByteSizeError::NoUnit { number: number.to_owned() });
        }
        let Some((_, unit_bytes)) = UNITS.iter().find(|(name, _)| *name == unit) else {
            return Err(unknown_unit(unit));
        };
        let bytes = scaled(number, *unit_bytes).ok_or(ParseByteSizeError::Malformed)?;
        u64::try_from(bytes).map(Self).map_err(|_| ParseByteSizeError::TooLarge)
    }
}

/// `10M`, `10mb` and `10mib` are not guessed at: the two meanings differ by 5 to 10 %.
fn unknown_unit(unit: &str) -> ParseByteSizeError {
    let binary = format!("{unit}iB");
    let meant = UNITS
        .iter()
        .map(|(name, _)| *name)
        .find(|name| name.eq_ignore_ascii_case(unit))
        .or_else(|| UNITS.iter().map(|(name, _)| *name).find(|name| name.eq_ignore_ascii_case(&binary)));
    match meant {
        Some(meant) => ParseByteSizeError::Misspelt { unit: unit.to_owned(), meant },
        None => ParseByteSizeError::UnknownUnit { unit: unit.to_owned() },
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const WRITTEN: &[&str] = &["TiB", "GiB", "MiB", "KiB", "TB", "GB", "MB", "KB"];
        for name in WRITTEN {
            for (unit, unit_bytes) in UNITS {
                if unit == name && self.0 != 0 && self.0.is_multiple_of(*unit_bytes) {
                    return write!(f, "{}{unit}", self.0 / unit_bytes);
                }
            }
        }
        write!(f, "{}B", self.0)
    }
}

written_as_text!(ByteSize, "ByteSize", "byte-size", "a size with a unit, like `10MiB`", "10MiB");

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(text: &str, expect: Result<u64, &str>) {
        let got = text.parse::<ByteSize>().map(ByteSize::bytes).map_err(|e| e.to_string());
        assert_eq!(got, expect.map_err(str::to_owned), "{text:?}");
    }

    #[test]
    fn parses_what_people_write() {
        check("0B", Ok(0));
        check("512B", Ok(512));
        check("64KiB", Ok(65_536));
        check("10MiB", Ok(10 * 1024 * 1024));
        check("10 MiB", Ok(10 * 1024 * 1024));
        check("1GB", Ok(1_000_000_000));
        check("1.5GiB", Ok(1_610_612_736));
        check("2kB", Ok(2000));
    }

    #[test]
    fn says_what_to_write_instead() {
        check("64", Err("`64` has no unit; write `64B` for bytes, or use KiB, MiB or GiB"));
        check("10M", Err("`M` is not a unit of size; did you mean `MiB`?"));
        check("10mb", Err("`mb` is not a unit of size; did you mean `MB`?"));
        check("10k", Err("`k` is not a unit of size; did you mean `KiB`?"));
        check("3 files", Err("`files` is not a unit of size; use B, KiB, MiB, GiB, or KB, MB, GB"));
        check("big", Err("not a size; write a number and a unit, like `64KiB` or `10MiB`"));
        check("99999999TiB", Err("more bytes than fit in 64 bits"));
    }

    proptest! {
        #[test]
        fn prints_what_it_parses(bytes in any::<u64>(), shift in 0u32..40) {
            let size = ByteSize(bytes >> shift << shift);
            prop_assert_eq!(size.to_string().parse(), Ok(size));
        }
    }
}
