//! A server under test as a child process: started, waited for, and stopped when its value is dropped.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// A large model from a slow disk; the model of the benchmarks is there within seconds.
const READY_WITHIN: Duration = Duration::from_secs(180);

/// A running server on loopback.
pub struct Server {
    child: Child,
    pub url: String,
}

impl Server {
    /// Starts `command`, which listens on `port`, and waits until `GET /health` says 200. Its output goes to `log`.
    pub fn start(what: &str, mut command: Command, port: u16, log: &Path) -> anyhow::Result<Self> {
        let output = std::fs::File::create(log).with_context(|| format!("can't write {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = command.spawn().with_context(|| format!("can't start {what}: {command:?}"))?;
        let mut server = Self { child, url: format!("http://127.0.0.1:{port}") };
        let begin = Instant::now();
        loop {
            if let Some(status) = server.child.try_wait()? {
                bail!("{what} ended with {status} before it was ready:\n{}", tail(log));
            }
            if healthy(port) {
                return Ok(server);
            }
            if begin.elapsed() > READY_WITHIN {
                bail!("{what} was not ready within {} s:\n{}", READY_WITHIN.as_secs(), tail(log));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Server {
    /// What the process has used so far, and holds.
    pub fn usage(&self) -> anyhow::Result<Usage> {
        Usage::of(self.child.id())
    }
}

/// A process as Linux counts it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// Seconds of processor time, in user and kernel mode.
    pub cpu_seconds: f64,
    /// Resident memory in bytes.
    pub resident: u64,
}

/// `sysconf(_SC_CLK_TCK)`: 100 on every Linux that we know.
const TICKS_PER_SECOND: f64 = 100.0;

impl Usage {
    fn of(pid: u32) -> anyhow::Result<Self> {
        let read = |file: &str| {
            let path = format!("/proc/{pid}/{file}");
            std::fs::read_to_string(&path).with_context(|| format!("can't read {path}"))
        };
        Self::parse(&read("stat")?, &read("status")?).context("/proc has another form than expected")
    }

    fn parse(stat: &str, status: &str) -> Option<Self> {
        // The name in parentheses may hold anything; `utime` and `stime` are the 14th and 15th field of the line.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks: f64 =
            [11, 12].iter().map(|&at| fields.get(at)?.parse::<f64>().ok()).sum::<Option<f64>>()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
        Some(Self { cpu_seconds: ticks / TICKS_PER_SECOND, resident: kib * 1024 })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Killed, not asked: nothing it has is needed, and the next server must find the machine idle.
        let theirs = descendants(self.child.id());
        let _ = self.child.kill();
        let _ = self.child.wait();
        if !theirs.is_empty() {
            let _ = Command::new("kill").arg("-KILL").args(theirs).stderr(Stdio::null()).status();
        }
    }
}

/// The processes that a process has started, and theirs, as Linux knows them: vLLM's engine lives in some of its own, which
/// don't end with the server that is killed.
fn descendants(pid: u32) -> Vec<String> {
    let mut found = vec![pid.to_string()];
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let children =
            threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
        let children: Vec<String> = children
            .flat_map(|pids| pids.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
            .collect();
        found.extend(children);
        next += 1;
    }
    found.split_off(1)
}

/// A port that was free a moment ago.
pub fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free port on loopback")?;
    Ok(listener.local_addr()?.port())
}

fn healthy(port: u16) -> bool {
    let ask = || -> std::io::Result<bool> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let mut socket = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        socket.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
        let mut status = [0; 12];
        socket.read_exact(&mut status)?;
        Ok(&status == b"HTTP/1.1 200")
    };
    ask().unwrap_or(false)
}

fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// A directory for one run's configuration and logs, removed at its end.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("forebay-bench-{}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("can't create {}", path.display()))?;
        Ok(Self(path))
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_read_from_proc() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 100 0 0 0 150 50 0 0 20 0 4 0 100 1000 200";
        let usage = Usage::parse(stat, "Name:\ta\nVmRSS:\t    2048 kB\n");
        assert_eq!(usage, Some(Usage { cpu_seconds: 2.0, resident: 2 << 20 }));
        assert_eq!(Usage::parse("7 (a", ""), None);
        assert!(Usage::of(std::process::id()).is_ok_and(|usage| usage.resident > 0));
    }

    #[test]
    fn what_a_server_started_is_found() {
        let mut command = Command::new("sh");
        command.args(["-c", "sh -c 'sleep 1000 & echo up; wait' & wait"]).stdout(Stdio::piped());
        let mut server = Server { child: command.spawn().unwrap(), url: String::new() };
        let mut up = [0; 3];
        server.child.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();
        let theirs = descendants(server.child.id());
        assert!(!theirs.is_empty());
        drop(server);
        // A zombie, until somebody asks for it, has no memory.
        let running = |pid: &String| Usage::of(pid.parse().unwrap()).is_ok();
        while theirs.iter().any(running) {
            std::thread::yield_now();
        }
    }
}
