//! A step that does not come back is noticed, and its end too.

use std::sync::mpsc;

use forebay_config::HumanDuration;
use forebay_schedule::StepPlan;

use super::*;
use crate::exec::{ExecError, Executor};

/// Says that its first pass has begun, and waits in it until the test lets it go.
struct Held {
    inner: FakeExecutor,
    begun: mpsc::Sender<()>,
    gate: Option<mpsc::Receiver<()>>,
}

/// The executor, what hears that it has begun, and what lets it go.
fn held() -> (Held, mpsc::Receiver<()>, mpsc::Sender<()>) {
    let ((begun, has_begun), (open, gate)) = (mpsc::channel(), mpsc::channel());
    (Held { inner: says("hi", "yes"), begun, gate: Some(gate) }, has_begun, open)
}

impl Executor for Held {
    fn vocab_size(&self) -> usize {
        self.inner.vocab_size()
    }

    fn block_size(&self) -> usize {
        self.inner.block_size()
    }

    fn blocks(&self) -> usize {
        self.inner.blocks()
    }

    fn positions_max(&self) -> usize {
        self.inner.positions_max()
    }

    fn execute(&mut self, plan: &StepPlan) -> Result<&[f32], ExecError> {
        if let Some(gate) = self.gate.take() {
            let _ = self.begun.send(());
            let _ = gate.recv();
        }
        self.inner.execute(plan)
    }
}

#[tokio::test]
async fn a_step_that_hangs_is_noticed_and_so_is_its_end() {
    let (held, _begun, open) = held();
    let config = EngineConfig { watchdog: HumanDuration::from_millis(20), ..EngineConfig::default() };
    let bench = bench_with(held, |_| {}, config);
    assert!(!bench.engine.is_stuck());
    let watch = async {
        bench.wait_for("forebay_engine_stuck_steps_total{engine=\"0\",model_name=\"fake\"} 1").await;
        assert!(bench.engine.is_stuck());
        open.send(()).unwrap();
    };
    let (events, ()) = tokio::join!(bench.events(greedy("hi")), watch);
    assert_eq!(text(&events.unwrap(), 0), "yes");
    bench.wait_for("vllm:num_requests_running{engine=\"0\",model_name=\"fake\"} 0").await;
    assert!(!bench.engine.is_stuck(), "nothing is computed any more");
}

#[tokio::test]
async fn without_a_watchdog_nothing_is_stuck() {
    let (held, begun, open) = held();
    let config = EngineConfig { watchdog: HumanDuration::from_secs(0), ..EngineConfig::default() };
    let bench = bench_with(held, |_| {}, config);
    let watch = async {
        tokio::task::spawn_blocking(move || begun.recv()).await.expect("joins").expect("begun");
        assert!(!bench.engine.is_stuck(), "a limit of zero is none");
        bench.wait_for("forebay_engine_stuck_steps_total{engine=\"0\",model_name=\"fake\"} 0").await;
        open.send(()).unwrap();
    };
    let (events, ()) = tokio::join!(bench.events(greedy("hi")), watch);
    assert_eq!(text(&events.unwrap(), 0), "yes");
}
