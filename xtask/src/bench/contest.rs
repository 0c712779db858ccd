//! Contestants in turns: A B A B, each started anew, alone on the machine, given the same work.

use crate::bench::document::median;
use crate::bench::generator::{Found, Generator, Work};
use crate::bench::server::Server;

/// Something that answers at a URL for as long as this value lives.
pub struct Running {
    pub url: String,
    /// `None` where nothing was started for it.
    pub server: Option<Server>,
}

/// One side of a comparison.
pub struct Contestant<'a> {
    pub name: &'static str,
    /// Name in requests; the server's first where absent.
    pub model: Option<&'static str>,
    /// Starts it anew.
    pub start: Box<dyn Fn() -> anyhow::Result<Running> + 'a>,
}

/// One load on one contestant.
pub struct Turn {
    pub round: u32,
    pub contestant: usize,
    pub work: usize,
    pub found: Found,
}

pub struct Turns(pub Vec<Turn>);

/// Runs all turns. The seed differs per round and work, so that no prompt comes twice to a server, and is the same for
/// every contestant.
pub fn run(
    generator: &dyn Generator,
    rounds: u32,
    contestants: &[Contestant<'_>],
    works: &[Work],
) -> anyhow::Result<Turns> {
    let mut turns = Vec::new();
    for round in 1..=rounds {
        for (contestant, side) in contestants.iter().enumerate() {
            let running = (side.start)()?;
            for (work, load) in works.iter().enumerate() {
                println!("round {round} of {rounds}: {}, {}", side.name, load.name);
                let seed = u64::from(round) * 100 + work as u64;
                let found = generator.run(&running.url, side.model, load, seed)?;
                turns.push(Turn { round, contestant, work, found });
            }
            drop(running.server);
        }
    }
    Ok(Turns(turns))
}

impl Turns {
    /// The median over the rounds of one number.
    pub fn median(&self, contestant: usize, work: usize, key: &str) -> f64 {
        let of = |turn: &&Turn| turn.contestant == contestant && turn.work == work;
        let values: Vec<f64> = self.0.iter().filter(of).map(|turn| turn.found.number(key)).collect();
        median(&values)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_median_is_of_one_contestant_and_one_work() {
        let turn =
            |round, contestant, work, x: f64| Turn { round, contestant, work, found: Found(json!({"x": x})) };
        let turns =
            Turns(vec![turn(1, 0, 0, 1.0), turn(2, 0, 0, 3.0), turn(1, 1, 0, 50.0), turn(1, 0, 1, 60.0)]);
        assert_eq!(turns.median(0, 0, "x"), 2.0);
        assert_eq!(turns.median(1, 0, "x"), 50.0);
        assert!(turns.median(0, 0, "y").is_nan());
        assert!(turns.median(1, 1, "x").is_nan());
    }
}
