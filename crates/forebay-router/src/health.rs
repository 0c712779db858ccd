//! Whether a replica is up and well: pure state machines over probes, refused connections and failed answers.

use std::time::Duration;

use forebay_types::{ModelName, ReplicaId};

use crate::config::HealthConfig;

/// Up until proved otherwise: a replica that can't be reached is found out by its first probe or its first request,
/// while one that is taken for down would refuse every request of the first seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Health {
    up: bool,
    /// Probes in a row that spoke against the present state.
    against: u32,
}

/// The state changed; worth a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    Up,
    Down,
}

impl Turn {
    pub(crate) fn log(self, model: &ModelName, replica: &ReplicaId, why: &str) {
        match self {
            Self::Up => tracing::info!(%model, %replica, "replica is up"),
            Self::Down => tracing::warn!(%model, %replica, why, "replica is down"),
        }
    }
}

impl Health {
    pub(crate) const UP: Self = Self { up: true, against: 0 };

    pub(crate) fn is_up(self) -> bool {
        self.up
    }

    pub(crate) fn on_probe(&mut self, good: bool, config: &HealthConfig) -> Option<Turn> {
        if good == self.up {
            self.against = 0;
            return None;
        }
        self.against += 1;
        let needed = if self.up { config.unhealthy_after } else { config.healthy_after };
        if self.against < needed.max(1) {
            return None;
        }
        *self = Self { up: good, against: 0 };
        Some(if good { Turn::Up } else { Turn::Down })
    }

    /// A request could not connect: proof enough. Only probes bring it back.
    pub(crate) fn on_connect_error(&mut self) -> Option<Turn> {
        let was_up = self.up;
        *self = Self { up: false, against: 0 };
        was_up.then_some(Turn::Down)
    }
}

/// A replica whose probes are fine may still fail every request. Failures in a row are counted; after `cool_off_after`
/// it is left out for `cool_off`, then half open: one failure leaves it out again, one success forgets them all.
///
/// As Envoy's outlier detection by consecutive failures, without its growing times: an ejection costs little here, as a
/// request that fails goes elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Outlier {
    failures: u32,
    until: Option<Duration>,
}

impl Outlier {
    pub(crate) fn is_cooling(self, now: Duration) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    pub(crate) fn on_success(&mut self) {
        *self = Self::default();
    }

    /// True if it is left out from now on. Requests that were under way when that began don't make it longer.
    pub(crate) fn on_failure(&mut self, now: Duration, config: &HealthConfig) -> bool {
        if config.cool_off_after == 0 || self.is_cooling(now) {
            return false;
        }
        self.failures = self.failures.saturating_add(1);
        if self.failures < config.cool_off_after {
            return false;
        }
        self.until = Some(now + config.cool_off.get());
        self.is_cooling(now)
    }
}

#[cfg(test)]
mod tests {
    use forebay_config::HumanDuration;

    use super::*;

    #[test]
    fn outliers_cool_off() {
        let cool_off = HumanDuration::from_secs(10);
        // At these seconds `-` is a failure and `+` a success; `C` is the failure with which a cool-off begins. The last
        // is whether it is cooling then.
        let check = |after: u32, events: &[(u64, char)], turns: &str, cools_at: &[(u64, bool)]| {
            let config = HealthConfig { cool_off_after: after, cool_off, ..HealthConfig::default() };
            let mut outlier = Outlier::default();
            let mut got = String::new();
            for &(second, event) in events {
                let begun = match event {
                    '+' => {
                        outlier.on_success();
                        false
                    }
                    _ => outlier.on_failure(Duration::from_secs(second), &config),
                };
                got.push(if begun { 'C' } else { '.' });
            }
            assert_eq!(got, turns, "{events:?}");
            for &(second, expect) in cools_at {
                assert_eq!(outlier.is_cooling(Duration::from_secs(second)), expect, "{events:?} at {second}");
            }
        };
        check(3, &[(0, '-'), (1, '-')], "..", &[(1, false)]);
        check(3, &[(0, '-'), (1, '-'), (2, '-')], "..C", &[(2, true), (11, true), (12, false)]);
        check(3, &[(0, '-'), (1, '-'), (2, '+'), (3, '-'), (4, '-')], ".....", &[(4, false)]);
        // Late failures don't make it longer; one after it is enough; a success ends it.
        check(2, &[(0, '-'), (1, '-'), (9, '-')], ".C.", &[(10, true), (11, false)]);
        check(2, &[(0, '-'), (1, '-'), (11, '-')], ".CC", &[(20, true), (21, false)]);
        check(2, &[(0, '-'), (1, '-'), (11, '+'), (12, '-')], ".C..", &[(12, false)]);
        check(2, &[(0, '-'), (1, '-'), (2, '+')], ".C.", &[(2, false)]);
        check(0, &[(0, '-'), (0, '-'), (0, '-')], "...", &[(0, false)]);
    }

    #[test]
    fn turns() {
        let config = HealthConfig { unhealthy_after: 3, healthy_after: 2, ..HealthConfig::default() };
        // `+` and `-` are probes, `x` is a refused connection; `U` and `D` are the turns they cause.
        let check = |events: &str, expect: &str| {
            let mut health = Health::UP;
            let got: String = events
                .chars()
                .map(|event| {
                    let turn = match event {
                        'x' => health.on_connect_error(),
                        probe => health.on_probe(probe == '+', &config),
                    };
                    match turn {
                        Some(Turn::Up) => 'U',
                        Some(Turn::Down) => 'D',
                        None => '.',
                    }
                })
                .collect();
            assert_eq!(got, expect, "{events}");
        };
        check("---", "..D");
        check("--+---", ".....D");
        check("---++", "..D.U");
        check("---+-++", "..D...U");
        check("x", "D");
        check("xx++", "D..U");
        // A refused connection takes back the good probe before it.
        check("x+x++", "D...U");
        check("-----", "..D..");
    }

    #[test]
    fn zero_counts_as_one() {
        let config = HealthConfig { unhealthy_after: 0, healthy_after: 0, ..HealthConfig::default() };
        let mut health = Health::UP;
        assert_eq!(health.on_probe(false, &config), Some(Turn::Down));
        assert_eq!(health.on_probe(true, &config), Some(Turn::Up));
    }
}
