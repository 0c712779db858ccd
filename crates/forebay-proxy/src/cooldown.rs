//! When a failing deployment is left out: a pure state machine, `now` is an argument.

use std::time::Duration;

use crate::config::CooldownConfig;

/// Closed (failures are counted), open (left out until a time), then half open: one failure opens it again, one
/// success closes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Cooldown {
    /// In a row.
    failures: u32,
    until: Option<Duration>,
}

impl Cooldown {
    pub(crate) fn is_cooling(&self, now: Duration) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    pub(crate) fn on_success(&mut self) {
        *self = Self::default();
    }

    /// An attempt failed. `retry_after` is what the upstream said about when to come back: it is taken at its word at
    /// once, up to `config.time`. True if it is left out from now on.
    pub(crate) fn on_failure(
        &mut self,
        now: Duration,
        retry_after: Option<Duration>,
        config: &CooldownConfig,
    ) -> bool {
        if config.failures == 0 {
            return false;
        }
        let was_cooling = self.is_cooling(now);
        self.failures = self.failures.saturating_add(1);
        let wait = if self.failures >= config.failures {
            Some(config.time.get())
        } else {
            retry_after.map(|after| after.min(config.time.get()))
        };
        if let Some(wait) = wait {
            // Requests that were under way when it opened don't make it shorter.
            self.until = self.until.max(Some(now + wait));
        }
        !was_cooling && self.is_cooling(now)
    }
}

#[cfg(test)]
mod tests {
    use forebay_config::HumanDuration;

    use super::*;

    const CONFIG: CooldownConfig = CooldownConfig { failures: 3, time: HumanDuration::from_secs(30) };

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn opens_after_failures_in_a_row_and_closes_with_a_success() {
        let mut cooldown = Cooldown::default();
        assert!(!cooldown.on_failure(s(0), None, &CONFIG));
        assert!(!cooldown.on_failure(s(1), None, &CONFIG));
        cooldown.on_success();
        assert!(!cooldown.on_failure(s(2), None, &CONFIG));
        assert!(!cooldown.on_failure(s(3), None, &CONFIG));
        assert!(!cooldown.is_cooling(s(3)));
        assert!(cooldown.on_failure(s(4), None, &CONFIG));
        assert!(cooldown.is_cooling(s(33)));
        assert!(!cooldown.is_cooling(s(34)));
        // Half open: one failure is enough.
        assert!(cooldown.on_failure(s(40), None, &CONFIG));
        assert!(cooldown.is_cooling(s(69)));
        assert!(!cooldown.is_cooling(s(70)));
        cooldown.on_success();
        assert!(!cooldown.on_failure(s(71), None, &CONFIG));
    }

    #[test]
    fn retry_after_is_believed_at_once_but_not_for_ever() {
        let check = |after: u64, cools_until: u64| {
            let mut cooldown = Cooldown::default();
            assert!(cooldown.on_failure(s(0), Some(s(after)), &CONFIG));
            assert!(cooldown.is_cooling(s(cools_until) - Duration::from_millis(1)));
            assert!(!cooldown.is_cooling(s(cools_until)));
        };
        check(2, 2);
        check(30, 30);
        check(86_400, 30);
        let mut cooldown = Cooldown::default();
        assert!(!cooldown.on_failure(s(0), Some(Duration::ZERO), &CONFIG));
    }

    #[test]
    fn late_failures_never_shorten_it() {
        let mut cooldown = Cooldown::default();
        assert!(cooldown.on_failure(s(0), Some(s(20)), &CONFIG));
        assert!(!cooldown.on_failure(s(1), Some(s(1)), &CONFIG));
        assert!(cooldown.is_cooling(s(19)));
    }

    #[test]
    fn off() {
        let config = CooldownConfig { failures: 0, ..CONFIG };
        let mut cooldown = Cooldown::default();
        for _ in 0..9 {
            assert!(!cooldown.on_failure(s(0), Some(s(9)), &config));
        }
        assert!(!cooldown.is_cooling(s(0)));
    }
}
