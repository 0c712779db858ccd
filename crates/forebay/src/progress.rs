//! Progress of a model pull: a bar on a terminal, a line per source elsewhere.

use std::sync::Mutex;

use forebay_models::Progress;
use indicatif::{ProgressBar, ProgressStyle};

#[derive(Default)]
pub(crate) struct PullProgress {
    bar: Mutex<Option<ProgressBar>>,
}

impl PullProgress {
    fn with_bar(&self, f: impl FnOnce(&mut Option<ProgressBar>)) {
        if let Ok(mut bar) = self.bar.lock() {
            f(&mut bar);
        }
    }

    /// Removes the bar.
    pub(crate) fn finish(&self) {
        self.with_bar(|bar| {
            if let Some(bar) = bar.take() {
                bar.finish_and_clear();
            }
        });
    }
}

impl Progress for PullProgress {
    fn waiting(&self) {
        eprintln!("waiting for another process that fetches into the same directory");
    }

    fn source(&self, source: &str) {
        self.finish();
        eprintln!("fetching the model from {source}");
    }

    fn begin(&self, total: Option<u64>, have: u64) {
        let bar = ProgressBar::new(total.unwrap_or(0));
        let style =
            ProgressStyle::with_template("  {bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta} {msg}");
        if let Ok(style) = style {
            bar.set_style(style);
        }
        bar.enable_steady_tick(std::time::Duration::from_millis(200));
        if have > 0 {
            bar.set_message("(resumed)");
        }
        bar.set_position(have);
        self.with_bar(|slot| *slot = Some(bar));
    }

    fn advance(&self, bytes: u64) {
        self.with_bar(|bar| {
            if let Some(bar) = bar {
                bar.inc(bytes);
            }
        });
    }

    fn verifying(&self) {
        self.with_bar(|bar| {
            if let Some(bar) = bar {
                bar.set_message("verifying SHA-256");
            }
        });
    }

    fn failed(&self, _: &str, why: &str) {
        self.finish();
        eprintln!("  failed: {why}");
    }
}
