//! When and on what a suite began: the lines below every table.

use std::time::Duration;

use super::{Args, machine};

/// How long others are watched before a suite begins. Not the load average, which still counts the build before it.
const WATCHED: Duration = Duration::from_secs(2);
/// Cores that others may use and the numbers still be quoted.
const MAX_OTHERS: f64 = 0.25;

/// Date, and what others did on the machine, when a suite began.
pub struct Begun {
    date: String,
    others: Option<f64>,
}

impl Begun {
    /// Takes two seconds; nothing of the suite may run yet.
    pub fn now() -> Self {
        let others = machine::cores_in_use(WATCHED);
        if let Some(others) = others.filter(|others| *others > MAX_OTHERS) {
            eprintln!("warning: others use {others:.1} of the cores: the numbers will be of no use");
        }
        Self { date: machine::date(), others }
    }

    /// A list: machine, date, versions, and what makes the numbers less than they should be.
    pub fn render(&self, versions: &[String], args: &Args) -> String {
        let others = self.others.map_or("unknown".into(), |others| format!("{others:.2}"));
        let mut lines = vec![
            format!("- Machine: {}", machine::describe()),
            format!("- Date: {}; cores that others used when it began: {others}", self.date),
            format!("- Versions: {}", versions.join("; ")),
        ];
        if self.others.is_some_and(|others| others > MAX_OTHERS) {
            lines.push("- **Others used the machine: a smoke test, not a measurement.**".into());
        }
        if args.quick {
            lines.push("- **`--quick`: too few requests to be quoted.**".into());
        }
        if args.binary.is_some() {
            lines.push("- **`--binary`: not necessarily a release build of this commit.**".into());
        }
        lines.join("\n")
    }
}
