//! Tells other processes what the KV cache holds: vLLM's KV events over ZMQ, for our router, llm-d, Dynamo or whoever
//! else routes by prefix.
//!
//! The step thread hands over its events and goes on; a task numbers them, keeps the last ones for replay and sends
//! them. **Invariant:** no subscriber, however slow, holds up a step.
//!
//! Source: vLLM 0.33 `vllm/distributed/kv_events.py` (`ZmqEventPublisher`): frames, sequence numbers, replay. Beyond it:
//! heartbeats, snapshots and an epoch (`docs/kv-events.md`), which who knows vLLM's protocol alone does not see.

mod metrics;
mod publish;

#[cfg(test)]
mod tests;

use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use forebay_config::HumanDuration;
use forebay_kv::codec::{Epoch, LoadStat};
use forebay_kv::{KvEvent, Publication};
use forebay_zmtp::Endpoint;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use crate::serve::KvSink;
pub(crate) use metrics::{KvEventFamilies, KvEventMetrics};

/// Steps whose events wait for the publishing task. It waits for nothing but a snapshot's copy, so more than a few is
/// trouble.
const QUEUE_MAX: usize = 1024;
/// Events beyond those steps, which then become one step: far more than any cache has blocks in a second.
const OVERFLOW_MAX: usize = 1 << 16;

/// Where KV events are published, in vLLM's format. They hold the token ids of prompts: open the ports to routers only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct KvEventsConfig {
    /// Where events go, like `tcp://*:5557`; with a `*` or `::` subscribers connect to us, else we connect to one.
    pub endpoint: Endpoint,
    /// Listen at the endpoint (true) or connect to it (false), whatever its host looks like.
    #[serde(default)]
    pub bind: Option<bool>,
    /// Where a subscriber can ask for events that it missed, or for all that is cached now, like `tcp://*:5558`; without it none can.
    #[serde(default)]
    pub replay_endpoint: Option<Endpoint>,
    /// First frame of every message, which subscribers filter by; llm-d wants `kv@POD_IP:PORT@MODEL`.
    #[serde(default)]
    pub topic: String,
    /// Steps with events kept for replay, 64 MiB of them at most; who missed more has to ask for a snapshot, as our router does.
    #[serde(default = "buffer_steps")]
    pub buffer_steps: u32,
    /// Time between two heartbeats, to subscribers that want them, from 100ms; lost events are found out so soon.
    #[serde(default = "heartbeat_interval")]
    pub heartbeat_interval: HumanDuration,
    /// Least time between two load reports (SGLang's `LoadStat`), which subscribers to `load` get when the load has changed.
    #[serde(default = "load_interval")]
    pub load_interval: HumanDuration,
}

fn buffer_steps() -> u32 {
    10_000
}

fn heartbeat_interval() -> HumanDuration {
    HumanDuration::from_secs(1)
}

fn load_interval() -> HumanDuration {
    HumanDuration::from_millis(50)
}

/// More often than this a heartbeat is load.
pub(crate) const HEARTBEAT_MIN: Duration = Duration::from_millis(100);
/// The same for load reports.
pub(crate) const LOAD_INTERVAL_MIN: Duration = Duration::from_millis(10);

/// Where one engine's events are to be had, as vLLM's `GET /kv_event_sources` lists it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KvEventSource {
    pub data_parallel_rank: u32,
    /// With the port that is open, also where the configuration left it to the system.
    pub endpoint: Endpoint,
    pub replay_endpoint: Option<Endpoint>,
    pub topic: String,
}

/// Why KV events can't be published.
#[derive(Debug, thiserror::Error)]
pub enum KvEventsError {
    #[error("can't listen on {endpoint} (`engine.kv-events.{key}`)")]
    Listen { key: &'static str, endpoint: Endpoint, source: std::io::Error },
    #[error("KV events are sent by a task, and there is no tokio runtime here")]
    NoRuntime,
    #[error("the system gives no random bytes, which tell this cache's events from another's")]
    NoRandomness,
}

/// The sockets, bound before the model is loaded: a port in use is found out at once.
pub(crate) struct Publisher {
    runtime: tokio::runtime::Handle,
    events: Way,
    replay: Option<tokio::net::TcpListener>,
    epoch: Epoch,
    config: KvEventsConfig,
}

/// How events get to subscribers.
enum Way {
    Listen(tokio::net::TcpListener),
    Connect(Endpoint),
}

/// The events of one step, on their way to the task.
struct Step {
    /// Seconds since 1970.
    ts: f64,
    events: Vec<KvEvent>,
}

impl Publisher {
    /// Binds what is to be bound. Needs a tokio runtime around it.
    pub(crate) fn bind(config: &KvEventsConfig) -> Result<Self, KvEventsError> {
        let runtime = tokio::runtime::Handle::try_current().map_err(|_| KvEventsError::NoRuntime)?;
        // Tokio's listeners are registered with the runtime that they are made in.
        let _in_runtime = runtime.enter();
        let events = match config.bind.unwrap_or_else(|| config.endpoint.is_to_bind()) {
            true => Way::Listen(listen("endpoint", &config.endpoint)?),
            false => Way::Connect(config.endpoint.clone()),
        };
        let replay = config.replay_endpoint.as_ref();
        let replay = replay.map(|endpoint| listen("replay-endpoint", endpoint)).transpose()?;
        let mut epoch = [0; 16];
        getrandom::fill(&mut epoch).map_err(|_| KvEventsError::NoRandomness)?;
        let (epoch, config) = (Epoch(epoch), config.clone());
        Ok(Self { runtime: runtime.clone(), events, replay, epoch, config })
    }

    /// Where the events are to be had.
    pub(crate) fn source(&self) -> KvEventSource {
        let bound = |listener: &tokio::net::TcpListener, configured: &Endpoint| {
            listener.local_addr().map_or_else(|_| configured.clone(), |at| configured.with_port(at.port()))
        };
        let KvEventsConfig { endpoint, replay_endpoint, topic, .. } = &self.config;
        KvEventSource {
            data_parallel_rank: 0,
            endpoint: match &self.events {
                Way::Listen(listener) => bound(listener, endpoint),
                Way::Connect(endpoint) => endpoint.clone(),
            },
            replay_endpoint: self
                .replay
                .as_ref()
                .zip(replay_endpoint.as_ref())
                .map(|(listener, at)| bound(listener, at)),
            topic: topic.clone(),
        }
    }

    /// Starts the tasks and returns what the step thread calls, for events and for its load. They end when the first is
    /// dropped.
    ///
    /// Where the task can't keep up, the events of several steps become one batch; where it stands still for long, that
    /// begins with `AllBlocksCleared`: a subscriber then knows too little rather than something wrong.
    pub(crate) fn start(self, metrics: KvEventMetrics) -> (KvSink, watch::Sender<LoadStat>) {
        let (steps, queue) = mpsc::channel(QUEUE_MAX);
        let (load, load_seen) = watch::channel(LoadStat::default());
        let Self { runtime, events, replay, epoch, config } = self;
        let publication = Publication::new(epoch, config.buffer_steps as usize);
        let publishing = publish::Publishing::new(publication, &config, metrics.clone());
        let overflow = Overflow::default();
        runtime.spawn(publishing.run(Inbox { queue, overflow: overflow.clone() }, load_seen, events, replay));
        (sink(steps, overflow, metrics), load)
    }
}

/// Events of steps that found the queue full. All that is in the queue comes before them.
type Overflow = Arc<Mutex<Vec<KvEvent>>>;

/// What the step thread has put down, in order.
struct Inbox {
    queue: mpsc::Receiver<Step>,
    overflow: Overflow,
}

impl Inbox {
    /// The next step's events; `None` when the engine has ended. Cancellation: nothing is lost.
    async fn recv(&mut self) -> Option<Step> {
        self.queue.recv().await
    }

    /// What has overflowed, once the queue is empty.
    fn overflowed(&mut self) -> Option<Step> {
        if !self.queue.is_empty() {
            return None;
        }
        let events = std::mem::take(&mut *self.overflow.lock().expect("nothing panics while it is held"));
        (!events.is_empty()).then(|| Step { ts: unix_seconds(), events })
    }
}

fn sink(steps: mpsc::Sender<Step>, overflow: Overflow, metrics: KvEventMetrics) -> KvSink {
    Arc::new(move |events| {
        // The task holds it for a `take` only.
        let mut overflow = overflow.lock().expect("nothing panics while it is held");
        if overflow.is_empty() {
            let step = Step { ts: unix_seconds(), events: events.to_vec() };
            // Otherwise the runtime is shutting down.
            if let Err(mpsc::error::TrySendError::Full(step)) = steps.try_send(step) {
                *overflow = step.events;
            }
            return;
        }
        overflow.extend_from_slice(events);
        if overflow.len() > OVERFLOW_MAX {
            metrics.dropped_queue.inc();
            *overflow = vec![KvEvent::Cleared];
        }
    })
}

fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

fn listen(key: &'static str, endpoint: &Endpoint) -> Result<tokio::net::TcpListener, KvEventsError> {
    let listen = || {
        let listener = TcpListener::bind(endpoint.bind_address())?;
        listener.set_nonblocking(true)?;
        tokio::net::TcpListener::from_std(listener)
    };
    listen().map_err(|source| KvEventsError::Listen { key, endpoint: endpoint.clone(), source })
}
