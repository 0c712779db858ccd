//! `cargo xtask tidy`: what rots unless a tool checks it.
//!
//! - The dependency law: a crate may import only from tiers above its own, as listed in the root `Cargo.toml` under
//!   `workspace.metadata.tiers`. Development dependencies are held to it as well.
//! - `unsafe` stays in `forebay-kernels`.
//! - Every workspace crate inherits the workspace's lints.
//! - The repository names no machine path.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use serde_json::Value;

use crate::shell;

/// The only crate that may switch `unsafe_code` on.
const UNSAFE_CRATE: &str = "forebay-kernels";

pub fn run() -> anyhow::Result<()> {
    let output = shell::cargo().args(["metadata", "--format-version", "1", "--no-deps"]).output()?;
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    let mut problems = dependency_law(&metadata)?;
    problems.extend(tracked_files(&shell::root())?);
    if problems.is_empty() {
        println!("tidy: dependency law and conventions hold");
        return Ok(());
    }
    for problem in &problems {
        eprintln!("error: {problem}");
    }
    bail!("tidy: {} problem(s)", problems.len())
}

fn dependency_law(metadata: &Value) -> anyhow::Result<Vec<String>> {
    let order = metadata["metadata"]["tiers"]["order"]
        .as_array()
        .context("workspace.metadata.tiers.order is missing")?;
    let mut tier_of = HashMap::new();
    for (tier, crates) in order.iter().enumerate() {
        for name in crates.as_array().into_iter().flatten().filter_map(Value::as_str) {
            tier_of.insert(name.to_owned(), tier);
        }
    }
    let mut problems = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        let Some(&tier) = tier_of.get(name) else {
            problems.push(format!(
                "crate `{name}` is in no tier: add it to `workspace.metadata.tiers.order` in Cargo.toml"
            ));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let other = dependency["name"].as_str().unwrap_or_default();
            // A path makes it one of ours.
            if dependency["path"].is_null() {
                continue;
            }
            match tier_of.get(other) {
                Some(&above) if above < tier => {}
                Some(_) => problems.push(format!(
                    "`{name}` (tier {tier}) imports `{other}`, which is not in a tier above it: move the shared part up, \
                     or let `forebay-app` compose the two"
                )),
                None => problems.push(format!("`{name}` imports `{other}`, which is in no tier")),
            }
        }
    }
    Ok(problems)
}

fn tracked_files(root: &Path) -> anyhow::Result<Vec<String>> {
    let output = Command::new("git")
        .current_dir(root)
        .args(["ls-files", "-co", "--exclude-standard"])
        .output()
        .context("git ls-files")?;
    let mut problems = Vec::new();
    for file in String::from_utf8_lossy(&output.stdout).lines() {
        let path = root.join(file);
        let Ok(text) = fs::read_to_string(&path) else { continue };
        let in_unsafe_crate = file.starts_with(&format!("crates/{UNSAFE_CRATE}/"));
        // This file spells out what it looks for.
        if file.ends_with(".rs") && !in_unsafe_crate && file != "xtask/src/tidy.rs" {
            for (n, line) in text.lines().enumerate() {
                let code = line.split("//").next().unwrap_or_default();
                let mut marks = ["unsafe {", "unsafe fn", "unsafe impl", "(unsafe_code"].iter();
                if marks.any(|mark| code.contains(mark)) {
                    problems.push(format!("{file}:{}: `unsafe` belongs into {UNSAFE_CRATE}", n + 1));
                }
            }
        }
        if file.ends_with("Cargo.toml")
            && file != "Cargo.toml"
            && !file.contains("/fuzz/")
            && !text.contains("[lints]\nworkspace = true")
        {
            problems.push(format!("{file}: inherit the workspace's lints (`[lints]` `workspace = true`)"));
        }
        if file != "xtask/src/tidy.rs" {
            for (n, line) in text.lines().enumerate() {
                if ["/root/", "/work/main", "/work/shared"].iter().any(|p| line.contains(p)) {
                    problems.push(format!("{file}:{}: a path of one machine", n + 1));
                }
            }
        }
    }
    Ok(problems)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_law_is_enforced() {
        let check = |packages: Value, expect: &[&str]| {
            let metadata = json!({
                "metadata": {"tiers": {"order": [["types"], ["edge", "proxy"], ["app"]]}},
                "packages": packages,
            });
            let problems = dependency_law(&metadata).expect("tiers are given");
            assert_eq!(problems.len(), expect.len(), "{problems:?}");
            for (problem, expect) in problems.iter().zip(expect) {
                assert!(problem.contains(expect), "{problem}");
            }
        };
        let on = |name: &str, other: &str| json!([{"name": name, "dependencies": [{"name": other, "path": "/x"}]}]);
        check(on("edge", "types"), &[]);
        check(on("edge", "proxy"), &["`edge` (tier 1) imports `proxy`"]);
        check(on("types", "app"), &["imports `app`"]);
        check(on("stray", "types"), &["`stray` is in no tier"]);
        check(json!([{"name": "edge", "dependencies": [{"name": "proxy", "path": null}]}]), &[]);
    }
}
