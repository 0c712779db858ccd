//! Work that would hold up an I/O thread: tokenizing, compiling grammars, rendering long answers.

use std::sync::Arc;

use forebay_types::Fault;
use tokio::sync::Semaphore;

use super::layout::cores;

/// A few of the threads for blocking work: half of the cores, as the others compute meanwhile.
#[derive(Clone)]
pub(super) struct OffThread(Arc<Semaphore>);

impl OffThread {
    pub fn new() -> Self {
        Self(Arc::new(Semaphore::new((cores() / 2).max(1))))
    }

    /// Waits for a place and runs `work` there. A client that leaves while others are before it is forgotten.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        let permit = Arc::clone(&self.0).acquire_owned().await.expect("never closed");
        let done = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        });
        done.await.map_err(|error| Fault::internal(format!("the tokenizer task failed: {error}")))?
    }
}
