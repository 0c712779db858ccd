//! Whether a replica is up: a pure state machine over probes and refused connections.

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

#[cfg(test)]
mod tests {
    use super::*;

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
