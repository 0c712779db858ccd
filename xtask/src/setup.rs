//! Installs what the tests need, where it is missing.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, bail};

use crate::shell;

/// Python packages of the end-to-end tests. The SDK's major version is pinned: its behaviour is what we test against.
const PYTHON_PACKAGES: &[&str] =
    &["openai>=3,<4", "httpx>=0.27", "pytest>=8", "PyYAML>=6", "pyzmq>=26", "msgspec>=0.19"];

/// A Python environment with the real OpenAI SDK; made once, kept in the cache.
pub fn python() -> anyhow::Result<PathBuf> {
    // One directory per list of packages: a run with another list never pulls it from under this one's feet.
    let venv = shell::cache_dir()?.join(format!("test-venv-{:016x}", fingerprint(PYTHON_PACKAGES)));
    let python = venv.join("bin/python");
    let ready = venv.join(".ready");
    if ready.exists()
        && shell::works(
            &python.to_string_lossy(),
            &["-c", "import openai, httpx, pytest, yaml, zmq, msgspec"],
        )
    {
        return Ok(python);
    }
    println!("installing the Python environment of the tests into {}", venv.display());
    std::fs::create_dir_all(&venv).with_context(|| format!("can't create {}", venv.display()))?;
    let base = ["python3", "python"].into_iter().find(|p| shell::works(p, &["-c", "import venv, ensurepip"]));
    let Some(base) = base else {
        bail!("python3 with the venv module is needed (Debian: apt-get install python3-venv)");
    };
    shell::run("create a Python environment", Command::new(base).args(["-m", "venv", "--clear"]).arg(&venv))?;
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]);
    shell::run("install Python packages", pip.args(PYTHON_PACKAGES))?;
    std::fs::write(&ready, "")?;
    Ok(python)
}

/// System programs that the end-to-end tests drive.
pub fn programs() -> anyhow::Result<()> {
    for (program, package) in [("curl", "curl"), ("openssl", "openssl")] {
        if !shell::works(program, &["version"]) && !shell::works(program, &["--version"]) {
            println!("installing {package}");
            let install = format!("apt-get update -qq && apt-get install -y -qq {package}");
            shell::run(&format!("install {package}"), Command::new("sh").args(["-c", &install]))
                .with_context(|| format!("`{program}` is needed; install it by hand"))?;
        }
    }
    Ok(())
}

/// FNV-1a: the environment is made anew where the list of packages changed.
fn fingerprint(items: &[&str]) -> u64 {
    items.iter().flat_map(|item| item.bytes().chain([b'\n'])).fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
