use std::io;
use std::sync::mpsc as sync_mpsc;

use forebay_observe::Registry;
use forebay_types::Fault;

use super::*;

fn metrics() -> Metrics {
    Metrics::register(&Registry::new()).unwrap()
}

fn record(id: &str, unix_ms: u64) -> AuditRecord {
    AuditRecord {
        at: UtcTime::from_unix_ms(unix_ms),
        request_id: id.into(),
        trace_id: "t".into(),
        peer: IpAddr::from([127, 0, 0, 1]),
        consumer: Some("a".into()),
        model: None,
        path: "/v1/models".into(),
        status: 200,
        outcome: "ok".into(),
        prompt_tokens: 1,
        completion_tokens: 2,
        cached_tokens: 0,
        estimated: false,
        duration_ms: 3,
        cut: false,
    }
}

/// Does with each append what the test says next, and tells it what came.
struct Scripted {
    results: sync_mpsc::Receiver<io::Result<()>>,
    came: tokio::sync::mpsc::UnboundedSender<(u32, String)>,
}

impl Sink for Scripted {
    fn append(&mut self, day: u32, lines: &[u8]) -> io::Result<()> {
        let _ = self.came.send((day, String::from_utf8(lines.to_vec()).unwrap()));
        self.results.recv().unwrap_or(Ok(()))
    }
}

struct Script {
    log: AuditLog,
    results: sync_mpsc::Sender<io::Result<()>>,
    came: tokio::sync::mpsc::UnboundedReceiver<(u32, String)>,
    metrics: Metrics,
}

fn scripted(pending_max: usize) -> Script {
    let (results, next) = sync_mpsc::channel();
    let (sender, came) = tokio::sync::mpsc::unbounded_channel();
    let metrics = metrics();
    let sink = Scripted { results: next, came: sender };
    let log = AuditLog::start_with(sink, pending_max, Duration::ZERO, &metrics).unwrap();
    Script { log, results, came, metrics }
}

async fn write(log: &AuditLog, id: &str, unix_ms: u64) {
    log.slot().await.unwrap().write(|| record(id, unix_ms));
}

#[tokio::test]
async fn lines_are_whole_records() {
    let mut script = scripted(8);
    write(&script.log, "r1", 1000).await;
    let (day, line) = script.came.recv().await.unwrap();
    assert_eq!(day, 19700101);
    assert_eq!(
        line,
        "{\"at\":\"1970-01-01T00:00:01.000Z\",\"request_id\":\"r1\",\"trace_id\":\"t\",\"peer\":\"127.0.0.1\",\
         \"consumer\":\"a\",\"model\":null,\"path\":\"/v1/models\",\"status\":200,\"outcome\":\"ok\",\
         \"prompt_tokens\":1,\"completion_tokens\":2,\"cached_tokens\":0,\"estimated\":false,\"duration_ms\":3,\
         \"cut\":false}\n"
    );
}

#[tokio::test]
async fn what_waits_is_written_together_but_not_over_midnight() {
    const DAY_MS: u64 = 86_400_000;
    let mut script = scripted(16);
    write(&script.log, "first", 0).await;
    let ids = |line: &str| line.matches("request_id").count();
    assert_eq!(ids(&script.came.recv().await.unwrap().1), 1);
    // The writer is busy with the first: these wait.
    for (i, at) in [0, 0, DAY_MS, DAY_MS, DAY_MS].into_iter().enumerate() {
        write(&script.log, &format!("r{i}"), at).await;
    }
    (0..3).for_each(|_| script.results.send(Ok(())).unwrap());
    let (day, lines) = script.came.recv().await.unwrap();
    assert_eq!((day, ids(&lines)), (19700101, 2));
    let (day, lines) = script.came.recv().await.unwrap();
    assert_eq!((day, ids(&lines)), (19700102, 3));
}

#[tokio::test]
async fn a_full_queue_refuses_and_names_its_limit() {
    let mut script = scripted(2);
    let one = script.log.slot().await.unwrap();
    let two = script.log.slot().await.unwrap();
    let error = script.log.slot().await.unwrap_err();
    assert_eq!(error, AuditError::Full { limit: 2 });
    let fault = Fault::from(error);
    assert_eq!(fault.class.code, Code::Overloaded);
    assert!(fault.message.contains("gateway.audit.pending-max"), "{fault}");
    // A slot that was not used goes back, as does one whose record was taken by the writer.
    drop(one);
    let one = script.log.slot().await.unwrap();
    two.write(|| record("r", 0));
    script.came.recv().await.unwrap();
    assert!(script.log.slot().await.is_ok());
    drop(one);
}

#[tokio::test]
async fn a_failed_write_is_repeated_and_closes_the_door_meanwhile() {
    let mut script = scripted(8);
    write(&script.log, "r1", 0).await;
    let first = script.came.recv().await.unwrap();
    script.results.send(Err(io::ErrorKind::StorageFull.into())).unwrap();
    let again = script.came.recv().await.unwrap();
    assert_eq!(again, first, "the same lines");
    // The second attempt has begun, so the failure of the first is known.
    assert_eq!(script.log.slot().await.unwrap_err(), AuditError::Unwritable);
    assert_eq!((script.metrics.audit_records.get(), script.metrics.audit_errors.get()), (0, 1));
    script.results.send(Ok(())).unwrap();
    script.log.flush().await;
    assert!(script.log.slot().await.is_ok());
    assert_eq!((script.metrics.audit_records.get(), script.metrics.audit_errors.get()), (1, 1));
}

#[tokio::test]
async fn flush_waits_for_what_was_handed_over() {
    let dir = tempfile::tempdir().unwrap();
    let config = AuditConfig { dir: dir.path().to_owned(), pending_max: 8 };
    let log = AuditLog::start(&config, &metrics()).unwrap();
    for i in 0..100 {
        write(&log, &format!("r{i}"), 0).await;
    }
    log.flush().await;
    let text = std::fs::read_to_string(dir.path().join("audit-19700101.jsonl")).unwrap();
    assert_eq!(text.lines().count(), 100);
    assert!(text.lines().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()));
}
