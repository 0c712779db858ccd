//! What the scheduler takes of a step, without a model: an example of the engine's crate, built for release, measures it.

use anyhow::{Context, bail};
use serde_json::Value;

use super::aim::{Aim, Judge, Section};
use super::begun::Begun;
use super::document::table;
use super::{Args, machine};
use crate::shell;

/// Steps that are measured of each size, and those of a quick look.
const STEPS: u32 = 20_000;
const STEPS_QUICK: u32 = 500;

/// The number of running sequences that has aims, and these: by key of the measurement, with a name.
const AIMED: u64 = 256;
const AIMS: [(&str, &str, Aim); 3] = [
    ("p50_us", "p50", Aim::AtMost(50.0)),
    ("mean_us", "mean", Aim::AtMost(50.0)),
    ("allocations_per_step", "allocations", Aim::AtMost(0.0)),
];

pub fn run(args: &Args) -> anyhow::Result<Section> {
    println!("scheduler: building");
    let steps = if args.quick { STEPS_QUICK } else { STEPS };
    let example = |verb: &str| {
        let mut cargo = shell::cargo();
        cargo.args([verb, "--release", "--quiet", "-p", "forebay-engine", "--example", "scheduler_step"]);
        cargo
    };
    shell::run("the build", &mut example("build"))?;
    let begun = Begun::now();
    println!("scheduler: measuring");
    let mut measured = example("run");
    measured.args(["--", &steps.to_string()]).stderr(std::process::Stdio::inherit());
    let output = measured.output().context("can't start cargo")?;
    if !output.status.success() {
        bail!("the measurement failed ({})", output.status);
    }
    let mut judge = Judge::default();
    let rows = rows(&String::from_utf8_lossy(&output.stdout), &mut judge)?;
    anyhow::ensure!(rows.iter().any(|row| row[0] == AIMED.to_string()), "{AIMED} running were not measured");
    let text = format!(
        "The scheduler alone, on one core, with the fake executor in the model's place: planning a step, learning what it\n\
         took, a token for each sequence, and the ends of those that are done; {steps} steps each, after a warm-up. 32 sequences of\n\
         four tenants always wait, prompts have 64 to 319 tokens, a tenth of them in common, and outputs 128. An arrival, which\n\
         is queued and whose blocks are hashed, is apart.\n\n{}\n{}",
        table(
            &["running", "step p50, µs", "p99", "mean", "allocations per step", "arrival p50, µs", "aim"],
            &rows
        ),
        begun.render(&[machine::of_commit("forebay-schedule")], args),
    );
    Ok(Section { text, missed: judge.missed })
}

/// One row per line of JSON.
fn rows(text: &str, judge: &mut Judge) -> anyhow::Result<Vec<Vec<String>>> {
    let row = |line: &str| {
        let found: Value = serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))?;
        let number = |key: &str, digits: usize| match found[key].as_f64() {
            Some(number) => Ok(format!("{number:.digits$}")),
            None => bail!("no `{key}` in {line}"),
        };
        Ok(vec![
            number("running", 0)?,
            number("p50_us", 1)?,
            number("p99_us", 1)?,
            number("mean_us", 1)?,
            number("allocations_per_step", 3)?,
            number("arrival_p50_us", 1)?,
            aims(&found, judge),
        ])
    };
    text.lines().filter(|line| !line.trim().is_empty()).map(row).collect()
}

/// The cell of the aims: with their names, as they stand in one column.
fn aims(found: &Value, judge: &mut Judge) -> String {
    if found["running"].as_u64() != Some(AIMED) {
        return String::new();
    }
    let aims = AIMS.map(|(key, name, aim)| {
        let value = found[key].as_f64().unwrap_or(f64::NAN);
        format!("{name} {}", judge.cell(&format!("{AIMED} running, {name}"), value, Some(aim)))
    });
    aims.join(", ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lines_become_rows() {
        let line = r#"{"running":8,"steps":5,"p50_us":1.26,"p99_us":2.0,"mean_us":1.5,"allocations_per_step":0.0,"arrival_p50_us":9.0}"#;
        let mut judge = Judge::default();
        let found = rows(&format!("{line}\n"), &mut judge).expect("it is complete");
        assert_eq!(found, [["8", "1.3", "2.0", "1.5", "0.000", "9.0", ""]]);
        assert!(rows("{}", &mut judge).is_err());
        assert!(rows("nonsense", &mut judge).is_err());
        assert!(judge.missed.is_empty());
    }

    #[test]
    fn one_row_has_aims() {
        let mut judge = Judge::default();
        let found = json!({"running": 256, "p50_us": 33.0, "mean_us": 51.0, "allocations_per_step": 0.0});
        assert_eq!(aims(&found, &mut judge), "p50 ≤ 50, mean **≤ 50 missed**, allocations ≤ 0");
        assert_eq!(judge.missed, ["256 running, mean: 51.000, to be ≤ 50"]);
        assert_eq!(aims(&json!({"running": 64, "p50_us": 99.0}), &mut judge), "");
    }
}
