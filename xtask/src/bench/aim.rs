//! What figures are to be, and which were not.

use std::fmt;

/// The bound of a figure, itself allowed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Aim {
    AtLeast(f64),
    AtMost(f64),
}

impl Aim {
    /// A figure that is missing (`NaN`) reaches nothing.
    fn is_reached_by(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }
}

impl fmt::Display for Aim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(bound) => write!(f, "≥ {bound}"),
            Self::AtMost(bound) => write!(f, "≤ {bound}"),
        }
    }
}

/// A suite's part of the document, and the figures in it that missed their aim.
pub struct Section {
    pub text: String,
    pub missed: Vec<String>,
}

impl From<String> for Section {
    /// Of a suite without aims.
    fn from(text: String) -> Self {
        Self { text, missed: Vec::new() }
    }
}

/// Judges the figures of a suite and keeps those that missed.
#[derive(Default)]
pub struct Judge {
    pub missed: Vec<String>,
}

impl Judge {
    /// What stands in the column `aim` beside `figure`: the aim, marked where `value` misses it.
    pub fn cell(&mut self, figure: &str, value: f64, aim: Option<Aim>) -> String {
        match aim {
            None => String::new(),
            Some(aim) if aim.is_reached_by(value) => aim.to_string(),
            Some(aim) => {
                self.missed.push(format!("{figure}: {value:.3}, to be {aim}"));
                format!("**{aim} missed**")
            }
        }
    }
}

/// The end of a run: an error that lists what was missed, but for a quick look, whose numbers say too little.
pub fn verdict(missed: &[String], quick: bool) -> anyhow::Result<()> {
    if missed.is_empty() || quick {
        return Ok(());
    }
    anyhow::bail!("aims were missed:\n  {}", missed.join("\n  "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_is_reached_by_itself_and_by_what_is_better() {
        let check = |aim: Aim, value: f64, expect: &str| {
            let mut judge = Judge::default();
            assert_eq!(judge.cell("x", value, Some(aim)), expect, "{value}");
            assert_eq!(judge.missed.is_empty(), !expect.contains("missed"), "{value}");
        };
        check(Aim::AtLeast(2.5), 2.5, "≥ 2.5");
        check(Aim::AtLeast(2.5), 7.0, "≥ 2.5");
        check(Aim::AtLeast(2.5), 2.499, "**≥ 2.5 missed**");
        check(Aim::AtLeast(2.5), f64::NAN, "**≥ 2.5 missed**");
        check(Aim::AtMost(0.0), 0.0, "≤ 0");
        check(Aim::AtMost(0.5), 0.4, "≤ 0.5");
        check(Aim::AtMost(0.5), 0.501, "**≤ 0.5 missed**");
        check(Aim::AtMost(0.5), f64::NAN, "**≤ 0.5 missed**");
    }

    #[test]
    fn a_figure_without_an_aim_can_not_miss() {
        let mut judge = Judge::default();
        assert_eq!(judge.cell("x", f64::NAN, None), "");
        assert!(judge.missed.is_empty());
    }

    #[test]
    fn a_run_ends_with_what_it_missed() {
        let mut judge = Judge::default();
        judge.cell("start, ms", 1200.0, Some(Aim::AtMost(1000.0)));
        judge.cell("share, %", 95.0, Some(Aim::AtLeast(80.0)));
        assert_eq!(judge.missed, ["start, ms: 1200.000, to be ≤ 1000"]);
        let error = verdict(&judge.missed, false).expect_err("one was missed");
        assert_eq!(error.to_string(), "aims were missed:\n  start, ms: 1200.000, to be ≤ 1000");
        assert!(verdict(&judge.missed, true).is_ok(), "a quick look judges nothing");
        assert!(verdict(&[], false).is_ok());
    }
}
