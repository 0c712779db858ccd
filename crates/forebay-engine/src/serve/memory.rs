//! Is there memory for the model? Asked before it is loaded.

use std::path::Path;

use super::StartError;
use crate::model::ModelFile;

/// Refuses to start where the kernel would have to kill us later. Only where the system says what is available.
pub(super) fn check_memory(model: &ModelFile, kv: u64) -> Result<(), StartError> {
    check_room(packed_bytes(model), kv)
}

/// About what a model's weights take in memory.
pub(super) fn packed_bytes(model: &ModelFile) -> u64 {
    let file = model.bytes();
    // Packed weights are a little larger than the file's where these are quantised (scales are widened). A directory
    // has floats only; what is left are rows that fill up a tile.
    file + if model.gguf().is_some() { file / 4 } else { file / 64 }
}

/// As [`check_memory`], for packed weights of so many bytes.
pub(super) fn check_room(weights: u64, kv: u64) -> Result<(), StartError> {
    let Some(available) = available_memory() else { return Ok(()) };
    if weights + kv > available {
        let size = forebay_config::ByteSize::new;
        return Err(StartError::Memory { weights: size(weights), kv: size(kv), available: size(available) });
    }
    Ok(())
}

/// What this process may still take, in bytes: the machine's `MemAvailable`, or less where a container has a limit.
pub(super) fn available_memory() -> Option<u64> {
    let machine =
        std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| field(&text, "MemAvailable:"));
    let machine = machine.map(|kib| kib.saturating_mul(1024));
    let container = Path::new("/sys/fs/cgroup");
    let read = |file: &str| std::fs::read_to_string(container.join(file)).ok();
    let container = read("memory.max").and_then(|max| {
        left_in_container(&max, &read("memory.current")?, &read("memory.stat").unwrap_or_default())
    });
    match (machine, container) {
        (Some(machine), Some(container)) => Some(machine.min(container)),
        (one, other) => one.or(other),
    }
}

/// Bytes left below the limit of a control group (Linux cgroup v2, `memory.max`). The file cache in it is given back
/// on demand, so it counts as free. `None` where there is no limit.
fn left_in_container(max: &str, current: &str, stat: &str) -> Option<u64> {
    let max: u64 = max.trim().parse().ok()?;
    let current: u64 = current.trim().parse().ok()?;
    let cache = field(stat, "inactive_file ").unwrap_or(0) + field(stat, "active_file ").unwrap_or(0);
    Some(max.saturating_sub(current.saturating_sub(cache)))
}

/// The number after `name` at the start of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::left_in_container;

    #[test]
    fn a_containers_limit_counts() {
        let check = |max: &str, current: &str, stat: &str, expect: Option<u64>| {
            assert_eq!(left_in_container(max, current, stat), expect, "{max} {current} {stat}");
        };
        check("max\n", "1000\n", "", None);
        check("5000\n", "1000\n", "", Some(4000));
        check("5000\n", "3000\n", "anon 10\nactive_file 500\ninactive_file 1500\n", Some(4000));
        check("5000\n", "6000\n", "anon 6000\n", Some(0));
    }
}
