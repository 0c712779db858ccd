//! What the engine has to do, for routers: SGLang's `LoadStat`, made of what the loop knows anyway.

use std::time::Duration;

use forebay_kv::codec::LoadStat;
use forebay_schedule::{Scheduler, SchedulerStats, StepPlan};
use tokio::sync::watch;

/// The load of one step loop, as it is told.
pub(crate) struct LoadReport {
    /// Whoever reads it copies it at once: the step thread never waits.
    sink: Option<watch::Sender<LoadStat>>,
    block_size: u64,
    running_max: u64,
    /// Prompt tokens in the present step.
    prefill_tokens: u64,
    prefill_tokens_total: u64,
    prefill_busy: Duration,
}

impl LoadReport {
    pub(crate) fn new(sink: Option<watch::Sender<LoadStat>>, scheduler: &Scheduler) -> Self {
        let config = scheduler.config();
        Self {
            sink,
            block_size: config.block_size.into(),
            running_max: config.running_max.into(),
            prefill_tokens: 0,
            prefill_tokens_total: 0,
            prefill_busy: Duration::ZERO,
        }
    }

    /// What is computed next. A row of one token counts as decoding.
    pub(crate) fn on_plan(&mut self, plan: &StepPlan) {
        let rows = (0..plan.rows()).map(|row| plan.row(row).len() as u64);
        self.prefill_tokens = rows.filter(|&tokens| tokens > 1).sum();
    }

    /// It was computed.
    pub(crate) fn on_step_done(&mut self, elapsed: Duration) {
        if self.prefill_tokens > 0 {
            self.prefill_tokens_total += self.prefill_tokens;
            self.prefill_busy += elapsed;
        }
    }

    pub(crate) fn publish(&self, stats: &SchedulerStats) {
        let Some(sink) = &self.sink else { return };
        let kv_tokens_used = u64::from(stats.blocks_held) * self.block_size;
        let load = LoadStat {
            running_requests: stats.running.into(),
            waiting_requests: stats.waiting.into(),
            kv_tokens_used,
            kv_tokens: u64::from(stats.blocks) * self.block_size,
            data_parallel_rank: 0,
            waiting_uncached_tokens: stats.waiting_tokens,
            total_tokens: kv_tokens_used + stats.waiting_tokens,
            running_requests_max: self.running_max,
            prefill_tokens_total: self.prefill_tokens_total,
            prefill_busy_us_total: self.prefill_busy.as_micros() as u64,
        };
        sink.send_if_modified(|seen| std::mem::replace(seen, load) != load);
    }
}

#[cfg(test)]
mod tests {
    use forebay_schedule::SchedulerConfig;

    use super::*;

    #[test]
    fn a_report_adds_up() {
        let config =
            SchedulerConfig { block_size: 4, blocks: 10, running_max: 7, ..SchedulerConfig::default() };
        let (sender, mut seen) = watch::channel(LoadStat::default());
        let mut report = LoadReport::new(Some(sender), &Scheduler::new(config));
        // A prompt of five beside a sequence that decodes, then one that decodes alone.
        for row_starts in [vec![0, 5, 6], vec![0, 1]] {
            let rows = row_starts.len() - 1;
            report.on_plan(&StepPlan {
                seqs: vec![forebay_schedule::SeqId(1); rows],
                row_starts,
                ..StepPlan::default()
            });
            report.on_step_done(Duration::from_micros(300));
        }
        let stats = SchedulerStats {
            running: 2,
            waiting: 3,
            waiting_tokens: 90,
            blocks: 10,
            blocks_held: 5,
            ..SchedulerStats::default()
        };
        report.publish(&stats);
        let expect = LoadStat {
            running_requests: 2,
            waiting_requests: 3,
            kv_tokens_used: 20,
            kv_tokens: 40,
            data_parallel_rank: 0,
            waiting_uncached_tokens: 90,
            total_tokens: 110,
            running_requests_max: 7,
            prefill_tokens_total: 5,
            prefill_busy_us_total: 300,
        };
        assert_eq!(*seen.borrow_and_update(), expect);
        // What has not changed is no news.
        report.publish(&stats);
        assert!(!seen.has_changed().expect("open"));
    }
}
