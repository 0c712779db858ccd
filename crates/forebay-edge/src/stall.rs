//! Ends HTTP/2 streams whose client takes nothing, while their connection goes on.
//!
//! hyper asks an answer's body for the next frame only when the one before has room in the stream's window. While it
//! does not ask, nothing of the body can run, so the time is watched by the task that hyper spawns per stream.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::service::Shared;

tokio::task_local! {
    static STREAM: Arc<StreamWatch>;
}

/// Whether one HTTP/2 stream's client takes its answer.
#[derive(Debug, Default)]
pub(crate) struct StreamWatch(Mutex<Progress>);

#[derive(Debug, Default)]
struct Progress {
    /// When hyper got the frame that it has not yet sent.
    waits_since: Option<Instant>,
    timed_out: bool,
}

impl StreamWatch {
    /// That of the stream whose task is running; `None` on HTTP/1.1.
    pub(crate) fn current() -> Option<Arc<Self>> {
        STREAM.try_with(Arc::clone).ok()
    }

    /// hyper has sent what it had and wants more.
    pub(crate) fn asked(&self) {
        self.0.lock().waits_since = None;
    }

    /// hyper got a frame.
    pub(crate) fn gave(&self) {
        self.0.lock().waits_since = Some(Instant::now());
    }

    pub(crate) fn has_timed_out(&self) -> bool {
        self.0.lock().timed_out
    }
}

/// Spawns the tasks of HTTP/2 streams, each with its [`StreamWatch`].
#[derive(Clone)]
pub(crate) struct StreamExecutor {
    shared: Arc<Shared>,
}

impl StreamExecutor {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

impl<F> hyper::rt::Executor<F> for StreamExecutor
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        let shared = self.shared.clone();
        tokio::spawn(async move {
            let watch = Arc::new(StreamWatch::default());
            let limit = shared.limits.write_timeout.get();
            if run(STREAM.scope(watch.clone(), stream), &watch, limit).await.is_err() {
                shared.metrics.refuse("write-timeout");
            }
        });
    }
}

/// A stream was given up.
struct TimedOut;

/// Runs a stream's task to its end, or until its client has taken nothing for `limit`. Dropping it resets the stream.
async fn run(stream: impl Future<Output = ()>, watch: &StreamWatch, limit: Duration) -> Result<(), TimedOut> {
    let mut stream = pin!(stream);
    let mut timer = pin!(tokio::time::sleep(limit));
    std::future::poll_fn(|cx| {
        if stream.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        loop {
            let Some(since) = watch.0.lock().waits_since else { return Poll::Pending };
            if since + limit <= Instant::now() {
                watch.0.lock().timed_out = true;
                return Poll::Ready(Err(TimedOut));
            }
            if timer.deadline() != since + limit {
                timer.as_mut().reset(since + limit);
            }
            ready!(timer.as_mut().poll(cx));
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_an_untaken_frame_is_timed() {
        let limit = Duration::from_secs(60);
        let check = async |script: &[(u64, bool)], expect: Option<u64>| {
            let watch = StreamWatch::default();
            let begun = Instant::now();
            let stream = async {
                for (pause, gives) in script {
                    tokio::time::sleep(Duration::from_secs(*pause)).await;
                    if *gives { watch.gave() } else { watch.asked() }
                }
                tokio::time::sleep(Duration::from_secs(1000)).await;
            };
            let ended = run(stream, &watch, limit).await;
            assert_eq!((ended.is_err(), watch.has_timed_out()), (expect.is_some(), expect.is_some()));
            if let Some(after) = expect {
                assert_eq!(begun.elapsed(), Duration::from_secs(after), "{script:?}");
            }
        };
        // Waiting for the engine, however long.
        check(&[], None).await;
        check(&[(1, true), (1, false)], None).await;
        check(&[(5, true)], Some(65)).await;
        // Each frame has its own time.
        check(&[(5, true), (59, false), (0, true), (59, false), (100, true)], Some(283)).await;
        check(&[(5, true), (61, false)], Some(65)).await;
    }
}
