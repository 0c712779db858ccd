use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use forebay_engine::EngineMetrics;
use forebay_observe::Registry;
use tokio::sync::Notify;

use super::*;

/// Stands for an engine: says when it is settled, and when it is stopped.
struct Fake {
    settled: Arc<Notify>,
    stopped: Arc<AtomicU32>,
}

impl Loaded for Fake {
    fn summary(&self) -> String {
        "a fake".into()
    }

    fn model_len(&self) -> u32 {
        8
    }

    fn is_alive(&self) -> bool {
        true
    }

    async fn settle(&self) {
        self.settled.notify_one();
    }

    fn stop(self) {
        self.stopped.fetch_add(1, Ordering::SeqCst);
    }
}

struct Bench {
    slot: Arc<Slot<Fake>>,
    settled: Arc<Notify>,
    stopped: Arc<AtomicU32>,
    forgotten: Arc<AtomicU32>,
    broken: Arc<AtomicBool>,
    registry: Registry,
}

fn bench() -> Bench {
    let (stopped, forgotten) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let (settled, broken) = (Arc::new(Notify::new()), Arc::new(AtomicBool::new(false)));
    let loader: Loader<Fake> = {
        let (settled, stopped, broken) = (settled.clone(), stopped.clone(), broken.clone());
        Box::new(move || {
            let (settled, stopped, broken) = (settled.clone(), stopped.clone(), broken.clone());
            Box::pin(async move {
                tokio::task::yield_now().await;
                match broken.load(Ordering::SeqCst) {
                    true => Err(crate::model::ModelError::NoDirectory.into()),
                    false => Ok(Fake { settled, stopped }),
                }
            })
        })
    };
    let count = forgotten.clone();
    let forget = Box::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
    });
    let registry = Registry::new();
    let metrics = EngineMetrics::register(&registry).expect("registers once");
    let slot = Arc::new(Slot::new("m".into(), loader, forget, metrics.loads().clone()));
    Bench { slot, settled, stopped, forgotten, broken, registry }
}

#[tokio::test]
async fn a_model_comes_and_goes() {
    let Bench { slot, stopped, forgotten, .. } = bench();
    assert_eq!(slot.status().state, "unloaded");
    assert!(slot.engine().is_none());
    slot.load().await.expect("loads");
    let status = slot.status();
    assert_eq!((status.state, status.max_model_len), ("loaded", Some(8)));
    // Again changes nothing.
    slot.try_load().await.expect("is loaded");
    slot.try_unload().await.expect("unloads");
    assert_eq!(slot.status().state, "unloaded");
    assert_eq!((stopped.load(Ordering::SeqCst), forgotten.load(Ordering::SeqCst)), (1, 1));
    slot.try_unload().await.expect("is not loaded");
    assert_eq!(stopped.load(Ordering::SeqCst), 1);
    slot.load().await.expect("loads again");
    assert_eq!(slot.status().state, "loaded");
}

#[tokio::test]
async fn an_unload_waits_for_those_who_use_it() {
    let Bench { slot, stopped, .. } = bench();
    slot.load().await.expect("loads");
    let held = slot.engine().expect("is loaded");
    let unload = tokio::spawn({
        let slot = slot.clone();
        async move { slot.try_unload().await }
    });
    while slot.status().state != "draining" {
        tokio::task::yield_now().await;
    }
    // Nobody new gets it, nobody else may change it, and it is not stopped under whoever has it.
    assert!(slot.engine().is_none());
    assert!(matches!(slot.try_load().await, Err(SlotError::Busy { .. })));
    assert!(slot.refusal().message.contains("is being unloaded"));
    assert_eq!(stopped.load(Ordering::SeqCst), 0);
    drop(held);
    unload.await.expect("no panic").expect("unloads");
    assert_eq!((slot.status().state, stopped.load(Ordering::SeqCst)), ("unloaded", 1));
}

#[tokio::test]
async fn an_unload_lets_those_go_on_who_wait_for_an_operator() {
    let Bench { slot, settled, stopped, .. } = bench();
    slot.load().await.expect("loads");
    let held = slot.engine().expect("is loaded");
    let call = async {
        settled.notified().await;
        drop(held);
    };
    let both = async { tokio::join!(call, slot.try_unload()) };
    let ((), unloaded) = tokio::time::timeout(Duration::from_secs(20), both).await.expect("it ends");
    unloaded.expect("unloads");
    assert_eq!((slot.status().state, stopped.load(Ordering::SeqCst)), ("unloaded", 1));
}

#[tokio::test]
async fn a_load_that_fails_says_why_and_can_be_tried_again() {
    let Bench { slot, broken, .. } = bench();
    broken.store(true, Ordering::SeqCst);
    assert!(
        matches!(slot.try_load().await, Err(SlotError::Failed { why, .. }) if why.contains("no directory"))
    );
    let status = slot.status();
    assert_eq!(status.state, "failed");
    assert!(status.error.is_some_and(|why| why.contains("FOREBAY_CACHE_DIR")));
    broken.store(false, Ordering::SeqCst);
    slot.try_load().await.expect("loads");
    assert_eq!(slot.status().state, "loaded");
}

#[tokio::test]
async fn a_load_that_is_given_up_leaves_nothing_behind() {
    let Bench { slot, .. } = bench();
    {
        let load = slot.load();
        tokio::pin!(load);
        assert!(futures_util::poll!(load.as_mut()).is_pending());
        assert_eq!(slot.status().state, "loading");
    }
    assert_eq!(slot.status().state, "unloaded");
    slot.load().await.expect("the turn is free");
}

#[tokio::test]
async fn loads_are_counted() {
    let Bench { slot, broken, registry, .. } = bench();
    let check = |loaded: u32, ok: u32, failed: u32| {
        let text = registry.render();
        for line in [
            format!("forebay_engine_loaded{{model_name=\"m\"}} {loaded}"),
            format!("forebay_engine_loads_total{{model_name=\"m\",outcome=\"ok\"}} {ok}"),
            format!("forebay_engine_loads_total{{model_name=\"m\",outcome=\"failed\"}} {failed}"),
        ] {
            assert!(text.lines().any(|seen| seen == line), "no {line} in\n{text}");
        }
        assert_eq!(text.contains("forebay_engine_load_seconds{"), ok > 0);
    };
    check(0, 0, 0);
    broken.store(true, Ordering::SeqCst);
    assert!(slot.load().await.is_err());
    check(0, 0, 1);
    broken.store(false, Ordering::SeqCst);
    slot.load().await.expect("loads");
    // It is there already: no load.
    slot.load().await.expect("is loaded");
    check(1, 1, 1);
    slot.try_unload().await.expect("unloads");
    check(0, 1, 1);
}
