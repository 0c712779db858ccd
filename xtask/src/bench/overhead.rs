//! What the layers in front of an engine add to a request, with everything on: keys, quotas, audit, metrics, routing.

use std::path::Path;
use std::process::Command;

use anyhow::Context;

use super::Bench;
use super::aim::Section;
use super::begun::Begun;
use super::contest::{self, Contestant, Running, Turns};
use super::document::{details, table};
use super::generator::{self, KEY, KEY_VARIABLE, Work};
use super::machine;
use super::null;
use super::server::{Scratch, Server, free_port};

/// What every configuration has above the part that differs. The limits are there, and far away: what is measured is
/// that they are checked.
const LAYERS_ABOVE: &str = "\
gateway:
  consumers:
    - name: bench
      keys: [env:FOREBAY_BENCH_KEY]
      limits: {requests-per-minute: 1000000000, tokens-per-minute: 1000000000000}
  audit: {dir: AUDIT}
";

const TO_PROVIDER: &str = "\
proxy:
  models:
    - name: alias
      deployments:
        - {provider: openai-compatible, model: \"null\", base-url: \"UPSTREAM/v1\"}
";

const TO_REPLICA: &str = "\
proxy:
  models:
    - name: alias
      deployments:
        - {fleet: \"null\"}
router:
  fleets:
    - {model: \"null\", replicas: [\"UPSTREAM\"]}
";

const TO_ENGINE: &str = "\
proxy:
  models:
    - name: alias
      deployments:
        - {fleet: bench}
router:
  fleets:
    - {model: bench, replicas: [engine]}
engine:
  model: MODEL
  served-model-name: bench
  threads: THREADS
";

pub fn run(bench: &Bench<'_>) -> anyhow::Result<Section> {
    let scratch = Scratch::new()?;
    let upstream = null::start()?;
    let begun = Begun::now();
    let work = |name, requests| Work {
        name,
        concurrency: 1,
        requests: bench.requests(requests),
        warmup: 20,
        prompt_tokens: 8,
        shared_prefix_tokens: 0,
        output_tokens: 1,
        temperature: 0.0,
    };

    // A quoted YAML string is JSON's: a path with a space or a quote in it stays one.
    let model = serde_json::to_string(&bench.models[0].to_string_lossy())?;
    let fill = |template: &str| {
        template
            .replace("UPSTREAM", &upstream)
            .replace("MODEL", &model)
            .replace("THREADS", &bench.threads.to_string())
    };
    let through = |name: &'static str, below: &'static str| Contestant {
        name,
        model: Some("alias"),
        start: Box::new({
            let (scratch, below) = (&scratch, fill(below));
            move || serve(&bench.forebay, scratch, &below)
        }),
    };
    let direct_null = Contestant {
        name: "direct to the null upstream",
        model: Some("null"),
        start: Box::new(|| Ok(Running { url: upstream.clone(), server: None })),
    };
    let nulls = [
        direct_null,
        through("through L1 to L3, to a provider", TO_PROVIDER),
        through("through L1 to L4, to a replica", TO_REPLICA),
    ];
    // Microseconds are looked for: many short turns, so that a slow moment of the machine hits all sides.
    let rounds = bench.args.rounds * 3;
    let null_work = [work("null upstream", 2000)];
    let null_turns = contest::run(&bench.own(), rounds, &nulls, &null_work)?;

    let worker = Contestant {
        name: "engine behind L1 only",
        model: Some("bench"),
        start: Box::new(|| {
            let port = free_port()?;
            let mut command = Command::new(&bench.forebay);
            command.args(["worker", "--served-model-name", "bench", "--model"]).arg(&bench.models[0]);
            command.args(["--threads", &bench.threads.to_string(), "--port", &port.to_string()]);
            let server = Server::start("forebay worker", command, port, &scratch.file("worker.log"))?;
            Ok(Running { url: server.url.clone(), server: Some(server) })
        }),
    };
    let engines = [worker, through("engine behind L1 to L4", TO_ENGINE)];
    let engine_work = [work("engine", 150)];
    let engine_turns = contest::run(&bench.own(), rounds, &engines, &engine_work)?;

    let inside = inside(bench, &scratch, &fill(TO_ENGINE))?;

    let config = format!("# edge and admin on free ports\n{LAYERS_ABOVE}{TO_REPLICA}");
    let flags = null_work[0].flags().join(" ");
    let text = format!(
        "Time that Forebay adds to one streamed request with a key to look up, two quotas to reserve and settle, an\n\
         audit record, metrics, a model alias and a placement decision: one request in flight, prompt of 8 tokens, 1\n\
         token of output, {} turns each, medians of the rounds. E2E is from sending the request to reading\n\
         `[DONE]`; *added* is the difference to the first row.\n\n\
         **In front of an upstream that answers at once**, as a second process (one more HTTP hop than without):\n\n{}\n\
         **In front of the engine in the same process**, against the same engine without keys, quotas, audit and \
         alias:\n\n{}\n\
         **Against calling the engine directly**: time of a request from its first byte to its last that was not spent in \
         the call of the engine's stage, from the waterfalls of {} requests with all layers on: **p50 {:.0} µs, p99 {:.0} µs**. \
         It has parsing, key, quotas, tokenizing, placement, rendering and writing in it, and no second process.\n\n{}\n\n\
         ```text\nforebay serve --config FILE\nforebay bench URL {flags}\n```\n\n```yaml\n{config}```\n\n{}",
        rounds,
        rendered(&null_turns, &nulls),
        rendered(&engine_turns, &engines),
        inside.len(),
        percentile(&inside, 0.50),
        percentile(&inside, 0.99),
        begun.render(&[machine::forebay_version(&bench.forebay)], bench.args),
        details(
            "Every single run",
            &format!("{}\n{}", raw(&null_turns, &nulls), raw(&engine_turns, &engines))
        ),
    );
    Ok(text.into())
}

/// Microseconds that each request spent outside the engine, ascending.
fn inside(bench: &Bench<'_>, scratch: &Scratch, below: &str) -> anyhow::Result<Vec<f64>> {
    let (running, admin) = serve_with_admin(&bench.forebay, scratch, below)?;
    println!("time outside the engine");
    let requests = bench.requests(WATERFALLS);
    let work = Work {
        name: "inside",
        concurrency: 1,
        requests,
        warmup: 20,
        prompt_tokens: 8,
        shared_prefix_tokens: 0,
        output_tokens: 1,
        temperature: 0.0,
    };
    generator::run(&bench.forebay, &running.url, Some("alias"), &work, 9000)?;
    let listed = get_json(&admin, &format!("/api/requests?n={requests}"))?;
    let records = listed["requests"].as_array().context("the admin API lists no requests")?;
    let mut outside: Vec<f64> = records.iter().filter_map(outside_the_engine).collect();
    anyhow::ensure!(outside.len() == requests as usize, "{} waterfalls of {requests}", outside.len());
    outside.sort_by(f64::total_cmp);
    Ok(outside)
}

/// Requests whose waterfalls are read; the admin API keeps as many.
const WATERFALLS: u32 = 400;

/// `None` for a request that the engine had no part in.
fn outside_the_engine(record: &serde_json::Value) -> Option<f64> {
    let spans = record["spans"].as_array()?;
    let engine: Vec<f64> = spans
        .iter()
        .filter(|span| span["layer"] == "engine")
        .filter_map(|span| span["duration_us"].as_f64())
        .collect();
    (!engine.is_empty()).then_some(record["duration_us"].as_f64()? - engine.iter().sum::<f64>())
}

/// `values` ascending, not empty.
fn percentile(values: &[f64], p: f64) -> f64 {
    values[((values.len() - 1) as f64 * p).round() as usize]
}

/// A small HTTP/1.1 request to a loopback address.
fn get_json(address: &str, path: &str) -> anyhow::Result<serde_json::Value> {
    use std::io::{Read, Write};
    let mut socket =
        std::net::TcpStream::connect(address).with_context(|| format!("can't connect to {address}"))?;
    write!(socket, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body).context("no HTTP answer")?;
    serde_json::from_str(body).with_context(|| format!("{path} is not JSON"))
}

/// A whole stack with `below` under its gateway.
fn serve(forebay: &Path, scratch: &Scratch, below: &str) -> anyhow::Result<Running> {
    serve_with_admin(forebay, scratch, below).map(|(running, _)| running)
}

/// The same, with the address of its admin API.
fn serve_with_admin(forebay: &Path, scratch: &Scratch, below: &str) -> anyhow::Result<(Running, String)> {
    let (port, admin) = (free_port()?, free_port()?);
    let audit = serde_json::to_string(&scratch.file("audit").to_string_lossy())?;
    let above = LAYERS_ABOVE.replace("AUDIT", &audit);
    let listen = format!(
        "admin:\n  listen: 127.0.0.1:{admin}\n  recent-requests: {WATERFALLS}\nedge:\n  listen: 127.0.0.1:{port}\n"
    );
    let file = scratch.file("forebay.yaml");
    std::fs::write(&file, format!("{listen}{above}{below}"))
        .with_context(|| format!("can't write {}", file.display()))?;
    let mut command = Command::new(forebay);
    command.args(["serve", "--config"]).arg(&file).env(KEY_VARIABLE, KEY);
    let server = Server::start("forebay serve", command, port, &scratch.file("serve.log"))?;
    let running = Running { url: server.url.clone(), server: Some(server) };
    Ok((running, format!("127.0.0.1:{admin}")))
}

const COLUMNS: [(&str, &str); 4] = [
    ("TTFT p50", "median_ttft_ms"),
    ("TTFT p99", "p99_ttft_ms"),
    ("E2E p50", "median_e2el_ms"),
    ("E2E p99", "p99_e2el_ms"),
];

/// In microseconds.
fn micros(ms: f64) -> String {
    format!("{:.0}", ms * 1000.0)
}

fn rendered(turns: &Turns, contestants: &[Contestant<'_>]) -> String {
    let rows: Vec<Vec<String>> = contestants
        .iter()
        .enumerate()
        .map(|(side, contestant)| {
            let mut row = vec![contestant.name.to_owned()];
            row.extend(COLUMNS.map(|(_, key)| micros(turns.median(side, 0, key))));
            for key in ["median_e2el_ms", "p99_e2el_ms"] {
                let added = turns.median(side, 0, key) - turns.median(0, 0, key);
                row.push(if side == 0 { String::new() } else { micros(added) });
            }
            row
        })
        .collect();
    table(&["µs", "TTFT p50", "TTFT p99", "E2E p50", "E2E p99", "added p50", "added p99"], &rows)
}

fn raw(turns: &Turns, contestants: &[Contestant<'_>]) -> String {
    let mut head = vec!["round, path (µs)"];
    head.extend(COLUMNS.map(|(name, _)| name));
    head.extend(["E2E max", "requests/s"]);
    let rows: Vec<Vec<String>> = turns
        .0
        .iter()
        .map(|turn| {
            let mut row = vec![format!("{}, {}", turn.round, contestants[turn.contestant].name)];
            row.extend(COLUMNS.map(|(_, key)| micros(turn.found.number(key))));
            row.push(micros(turn.found.number("max_e2el_ms")));
            row.push(format!("{:.0}", turn.found.number("request_throughput")));
            row
        })
        .collect();
    table(&head, &rows)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::bench::contest::Turn;
    use crate::bench::generator::Found;

    #[test]
    fn time_outside_the_engine_is_what_its_spans_leave() {
        let record = json!({"duration_us": 100, "spans": [
            {"layer": "edge", "duration_us": 100}, {"layer": "engine", "duration_us": 60}, {"layer": "engine", "duration_us": 15},
        ]});
        assert_eq!(outside_the_engine(&record), Some(25.0));
        assert_eq!(outside_the_engine(&json!({"duration_us": 9, "spans": []})), None);
        assert_eq!(percentile(&[1.0, 2.0, 3.0], 0.5), 2.0);
        assert_eq!(percentile(&[1.0, 2.0, 3.0], 0.99), 3.0);
    }

    #[test]
    fn what_is_added_is_the_difference_to_the_first() {
        let turn = |contestant, ms: f64| {
            let found = json!({"median_ttft_ms": ms, "p99_ttft_ms": ms, "median_e2el_ms": ms, "p99_e2el_ms": 2.0 * ms});
            Turn { round: 1, contestant, work: 0, found: Found(found) }
        };
        let contestant = |name| Contestant {
            name,
            model: None,
            start: Box::new(|| Ok(Running { url: String::new(), server: None })),
        };
        let table = rendered(&Turns(vec![turn(0, 0.1), turn(1, 0.25)]), &[contestant("a"), contestant("b")]);
        let expect = "| a | 100 | 100 | 100 | 200 |  |  |\n| b | 250 | 250 | 250 | 500 | 150 | 300 |\n";
        assert!(table.ends_with(expect), "{table}");
    }
}
