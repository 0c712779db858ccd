//! Numbers as vLLM's command line takes them: `32k` is 32,000, `32K` is 32,768, `1.5k` is 1,500.

use std::num::ParseIntError;
use std::str::FromStr;

/// A number of something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Count(pub u64);

/// A number of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TokenCount(pub u32);

/// `--max-model-len`: `None` is whatever fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ModelLen(pub Option<u32>);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CountError {
    /// Neither digits nor digits with a suffix.
    Form,
    Number(ParseIntError),
    /// A fraction of a binary unit; with what was probably meant.
    Fraction {
        suffix: char,
        meant: String,
    },
    TooLarge,
}

impl std::error::Error for CountError {}

impl std::fmt::Display for CountError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Form => f.write_str("expected a number like 32768, 32k (32,000), 1.5k or 32K (32,768)"),
            Self::Number(error) => error.fmt(f),
            // vLLM's words.
            Self::Fraction { suffix, meant } => write!(
                f,
                "Decimals are not allowed with binary suffixes like {suffix}. Did you mean to use {meant} instead?"
            ),
            Self::TooLarge => f.write_str("the number is too large"),
        }
    }
}

impl FromStr for Count {
    type Err = CountError;

    /// vLLM's `human_readable_int`: k, m, g, t are powers of 1000, K, M, G, T of 1024, and the latter take no fractions.
    fn from_str(text: &str) -> Result<Self, CountError> {
        let text = text.trim();
        let Some(suffix) = text.chars().last().filter(char::is_ascii_alphabetic) else {
            return text.parse().map(Self).map_err(CountError::Number);
        };
        let number = &text[..text.len() - 1];
        let power = match suffix.to_ascii_lowercase() {
            'k' => 1,
            'm' => 2,
            'g' => 3,
            't' => 4,
            _ => return Err(CountError::Form),
        };
        let (whole, fraction) = number.split_once('.').map_or((number, None), |(w, f)| (w, Some(f)));
        let is_digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        if !is_digits(whole) || !fraction.is_none_or(is_digits) {
            return Err(CountError::Form);
        }
        let base: u64 = if suffix.is_ascii_lowercase() { 1000 } else { 1024 };
        let unit = base.pow(power);
        if fraction.is_none() {
            let number: u64 = number.parse().map_err(CountError::Number)?;
            return number.checked_mul(unit).map(Self).ok_or(CountError::TooLarge);
        }
        if suffix.is_ascii_uppercase() {
            return Err(CountError::Fraction { suffix, meant: text.to_ascii_lowercase() });
        }
        let number: f64 = number.parse().map_err(|_| CountError::Form)?;
        // As Python's `int(float(number) * unit)`.
        let count = number * unit as f64;
        if count < u64::MAX as f64 { Ok(Self(count as u64)) } else { Err(CountError::TooLarge) }
    }
}

impl FromStr for TokenCount {
    type Err = CountError;

    fn from_str(text: &str) -> Result<Self, CountError> {
        let Count(count) = text.parse()?;
        u32::try_from(count).map(Self).map_err(|_| CountError::TooLarge)
    }
}

impl FromStr for ModelLen {
    type Err = CountError;

    /// vLLM's `human_readable_int_or_auto`.
    fn from_str(text: &str) -> Result<Self, CountError> {
        match text.trim() {
            "-1" => Ok(Self(None)),
            auto if auto.eq_ignore_ascii_case("auto") => Ok(Self(None)),
            text => text.parse().map(|TokenCount(count)| Self(Some(count))),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_of_vllm() {
        let check = |text: &str, expect: u64| assert_eq!(text.parse(), Ok(Count(expect)), "{text}");
        check("8192", 8192);
        check(" 1k ", 1000);
        check("1K", 1024);
        check("25.6k", 25_600);
        check("1.5k", 1500);
        check("0.0015m", 1500);
        check("2M", 2 << 20);
        check("2m", 2_000_000);
        check("1G", 1 << 30);
        check("1t", 1_000_000_000_000);
        check("1T", 1 << 40);
    }

    #[test]
    fn what_is_none_is_told() {
        let check = |text: &str, expect: &str| {
            let error = text.parse::<Count>().expect_err("is wrong").to_string();
            assert!(error.contains(expect), "{text}: {error}");
        };
        check("1.5K", "Did you mean to use 1.5k instead?");
        check("1x", "expected a number like");
        check("k", "expected a number like");
        check("1.k", "expected a number like");
        check("-1k", "expected a number like");
        check("1e3k", "expected a number like");
        check("", "empty");
        check("1.5", "invalid digit");
        check("99999999999T", "too large");
        check("99999999999999999.5t", "too large");
        assert_eq!("5g".parse::<TokenCount>(), Err(CountError::TooLarge));
    }

    #[test]
    fn a_model_len_may_be_whatever_fits() {
        let check =
            |text: &str, expect: Option<u32>| assert_eq!(text.parse(), Ok(ModelLen(expect)), "{text}");
        check("auto", None);
        check("AUTO", None);
        check("-1", None);
        check("32k", Some(32_000));
        check("32K", Some(32_768));
        check("2048", Some(2048));
        assert!("-2".parse::<ModelLen>().is_err());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,12}", digits in "[0-9]{0,22}(\\.[0-9]{0,5})?[kKmMgGtT]?") {
            let _ = (text.parse::<Count>(), text.parse::<ModelLen>(), digits.parse::<Count>());
        }
    }
}
