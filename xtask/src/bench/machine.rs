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

/// Processes that wanted a core, on average over the last minute.
pub fn load() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    text.split(' ').next()?.parse().ok()
}

/// A warning where others use the machine.
pub fn busy() -> Option<String> {
    let load = load().filter(|load| *load > 0.5 * cores() as f64)?;
    Some(format!("the load average is {load:.1} before anything was measured: the numbers will be of no use"))
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
    let text = |command: &mut Command| {
        let output = command.output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let version = text(Command::new(forebay).arg("--version")).unwrap_or_else(|| "forebay".into());
    let git = |args: &[&str]| text(Command::new("git").args(args).current_dir(shell::root()));
    let Some(commit) = git(&["rev-parse", "--short", "HEAD"]) else { return version };
    let changed =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|text| !text.is_empty());
    format!("{version} (commit {commit}{})", if changed { " with changes" } else { "" })
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
}
