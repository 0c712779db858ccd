//! What the numbers were made on. No host name, no user, no path.

use std::process::Command;

use crate::shell;

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// One line: processor, cores, memory, instruction sets that matter here.
pub fn describe() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    render(&cpuinfo, &meminfo, cores(), std::env::consts::ARCH)
}

fn render(cpuinfo: &str, meminfo: &str, cores: usize, arch: &str) -> String {
    let model = field(cpuinfo, "model name").unwrap_or("unknown processor");
    let kib: f64 =
        field(meminfo, "MemTotal").and_then(|value| value.split(' ').next()?.parse().ok()).unwrap_or(0.0);
    let flags = field(cpuinfo, "flags").or_else(|| field(cpuinfo, "Features")).unwrap_or_default();
    let wanted = ["avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm", "sve"];
    let known: Vec<&str> = flags.split(' ').filter(|flag| wanted.contains(flag)).collect();
    let plural = if cores == 1 { "" } else { "s" };
    let sets = if known.is_empty() { String::new() } else { format!(", {}", known.join(" ")) };
    format!("{model} ({arch}{sets}), {cores} logical core{plural}, {:.0} GiB memory", kib / 1024.0 / 1024.0)
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

/// Cores that were in use, on average over `time`, whoever used them: this machine's whole, from the kernel's counters.
pub fn cores_in_use(time: std::time::Duration) -> Option<f64> {
    let read = || std::fs::read_to_string("/proc/stat").ok();
    let before = read()?;
    std::thread::sleep(time);
    in_use(&before, &read()?)
}

/// Of two readings of `/proc/stat`: jiffies that were neither idle nor waiting for a disk, as cores.
fn in_use(before: &str, after: &str) -> Option<f64> {
    let of = |text: &str| {
        let line = text.lines().next()?.strip_prefix("cpu ")?;
        // user, nice, system, idle, iowait, irq, softirq, steal; the guests' after them stand in the first two as well.
        let jiffies: Vec<u64> =
            line.split_whitespace().take(8).map(str::parse).collect::<Result<_, _>>().ok()?;
        let cores = text.lines().skip(1).take_while(|line| line.starts_with("cpu")).count();
        Some((jiffies.iter().sum::<u64>(), jiffies.get(3)? + jiffies.get(4)?, cores))
    };
    let ((all, idle, _), (all_later, idle_later, cores)) = (of(before)?, of(after)?);
    let (all, idle) = (all_later.checked_sub(all)?, idle_later.saturating_sub(idle));
    (all > 0).then(|| all.saturating_sub(idle) as f64 / all as f64 * cores as f64)
}

/// `2026-01-31`, UTC.
pub fn date() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    civil(now.map_or(0, |since| since.as_secs() / 86_400))
}

/// Days since 1970-01-01 to a date: Howard Hinnant's `civil_from_days`, for dates after 1970.
fn civil(days: u64) -> String {
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let (day, month) = (day_of_year - (153 * shifted + 2) / 5 + 1, (shifted + 2) % 12 + 1);
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02}")
}

/// Version of our program and the commit it was built from.
pub fn forebay_version(forebay: &std::path::Path) -> String {
    let version = output(Command::new(forebay).arg("--version"));
    of_commit(&version.unwrap_or_else(|| "forebay".into()))
}

/// `what`, and the commit that is checked out.
pub fn of_commit(what: &str) -> String {
    let git = |args: &[&str]| output(Command::new("git").args(args).current_dir(shell::root()));
    let Some(commit) = git(&["rev-parse", "--short", "HEAD"]) else { return what.to_owned() };
    // What the suites before this one have written is not of the program.
    let status = ["status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/BENCHMARKS.md"];
    let changed = git(&status).is_some_and(|text| !text.is_empty());
    format!("{what} (commit {commit}{})", if changed { " with changes" } else { "" })
}

/// What a command printed, where it succeeded.
fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let check = |days, expect| assert_eq!(civil(days), expect);
        check(0, "1970-01-01");
        check(11_016, "2000-02-29");
        check(11_017, "2000-03-01");
        check(20_453, "2025-12-31");
        check(20_454, "2026-01-01");
    }

    #[test]
    fn machines() {
        let cpuinfo = "processor\t: 0\nmodel name\t: A CPU @ 2GHz\nflags\t\t: sse avx2 avx512f avx512_vnni\n";
        let line = render(cpuinfo, "MemTotal:       16384000 kB\n", 2, "x86_64");
        assert_eq!(line, "A CPU @ 2GHz (x86_64, avx2 avx512f avx512_vnni), 2 logical cores, 16 GiB memory");
        assert_eq!(render("", "", 1, "arm64"), "unknown processor (arm64), 1 logical core, 0 GiB memory");
    }

    #[test]
    fn cores_that_others_use() {
        let before = "cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 50 0 50 400 0\ncpu1 50 0 50 400 0\nintr 1\n";
        let check = |after: &str, expect| assert_eq!(in_use(before, after), expect, "{after}");
        check("cpu  150 0 150 1000 100 0 0 0 50 0\ncpu0 1\ncpu1 1\nintr 1\n", Some(0.5));
        check("cpu  100 0 100 900 0 0 0 0 0 0\ncpu0 1\ncpu1 1\n", Some(0.0));
        check(before, None);
        check("cpu  1 2\n", None);
        check("nonsense", None);
    }
}
