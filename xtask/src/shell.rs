//! Running other programs: every failure says which command failed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

/// The repository's root. Asked of cargo at run time: with a target directory that several checkouts share, this
/// program may have been built in another one.
pub fn root() -> PathBuf {
    let xtask = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let xtask = Path::new(&xtask);
    xtask.parent().unwrap_or(xtask).to_path_buf()
}

/// The cargo that runs us, in the repository's root.
///
/// Without what it told us of our own package: the build scripts of some dependencies watch these variables, and would run
/// anew, with all that hangs on them, after every build that was not ours.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let ours = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(ours) {
            command.env_remove(name);
        }
    }
    command.current_dir(root());
    command
}

/// Where this project keeps what it downloads: models, a Python environment.
pub fn cache_dir() -> anyhow::Result<PathBuf> {
    if let Some(dir) = std::env::var_os("FOREBAY_CACHE_DIR") {
        return Ok(dir.into());
    }
    if let Some(dir) = std::env::var_os("XDG_CACHE_HOME") {
        return Ok(PathBuf::from(dir).join("forebay"));
    }
    let home = std::env::var_os("HOME").context("HOME is not set; set FOREBAY_CACHE_DIR")?;
    Ok(PathBuf::from(home).join(".cache/forebay"))
}

/// Runs a command with our output; an error where it fails.
pub fn run(what: &str, command: &mut Command) -> anyhow::Result<()> {
    let status =
        command.stdin(Stdio::null()).status().with_context(|| format!("{what}: can't start {command:?}"))?;
    if !status.success() {
        bail!("{what} failed ({status}): {command:?}");
    }
    Ok(())
}

/// Runs a command, passes its output through, and gives it back too.
pub fn run_tee(what: &str, command: &mut Command) -> anyhow::Result<(bool, String)> {
    use std::io::{BufRead, BufReader};
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{what}: can't start {command:?}"))?;
    let mut output = String::new();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            let line = line?;
            println!("{line}");
            output.push_str(&line);
            output.push('\n');
        }
    }
    Ok((child.wait()?.success(), output))
}

/// Whether a program answers.
pub fn works(program: &str, args: &[&str]) -> bool {
    let status = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|s| s.success())
}
