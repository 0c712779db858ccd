//! Who is admitted next.
//!
//! Between tenants: priority, then who was served least (VTC: "Fairness in Serving Large Language Models", Sheng et al.
//! 2024), then arrival. Within a tenant: priority and arrival, an order that is fixed when a sequence arrives; among the next of equal
//! priority, admission prefers who finds most in the cache.
//!
//! Ageing, twice: within a tenant, waiting `ageing` longer weighs as much as one level of priority. Between tenants, a
//! first in line gains a level per `ageing`, but only up to the highest that any tenant's first has: from there on
//! service decides, so that a tenant with a long queue gets nothing from its age. Whoever has been served least is
//! next, so no tenant starves.

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use forebay_types::ConsumerName;

use crate::{NewSeq, SchedulerConfig};

/// What a generated token weighs against a computed prompt token, as in the paper.
pub(crate) const OUTPUT_WEIGHT: u64 = 2;

/// Tenants whose service is remembered while they have no sequence; beyond, the least served are forgotten, which is
/// what they lose least by.
const REMEMBERED_MAX: usize = 1024;

/// A waiting sequence's place in its tenant's queue: smaller is earlier. Fixed when the sequence arrives, so a preempted
/// one comes back to where it stood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    level: i64,
    arrival_us: i64,
    /// Arrivals are numbered, so no two ranks are equal.
    number: u64,
}

/// The order within a tenant. Priority, then arrival; with ageing, waiting `ageing` longer weighs as much as one level.
pub(crate) fn rank(config: &SchedulerConfig, seq: &NewSeq, now: Duration, number: u64) -> Rank {
    let now_us = micros(now);
    match config.ageing {
        None => Rank { level: -i64::from(seq.priority), arrival_us: now_us, number },
        Some(ageing) => {
            let lead_us = i64::from(seq.priority).saturating_mul(micros(ageing));
            Rank { level: 0, arrival_us: now_us.saturating_sub(lead_us), number }
        }
    }
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// What a sequence's turn depends on, apart from its rank.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Standing {
    pub(crate) priority: i32,
    pub(crate) waited: Duration,
}

impl Standing {
    /// Its level between tenants, where `top` is the highest priority.
    fn level(self, ageing: Option<Duration>, top: i32) -> i32 {
        let Some(ageing) = ageing else {
            return self.priority;
        };
        let gained = self.waited.as_nanos().checked_div(ageing.as_nanos()).unwrap_or(u128::MAX);
        self.priority.saturating_add(i32::try_from(gained).unwrap_or(i32::MAX)).min(top)
    }
}

/// One tenant: what waits, and what it was given.
#[derive(Debug, Clone)]
struct Tenant {
    name: ConsumerName,
    /// Virtual token counter: prompt tokens computed plus [`OUTPUT_WEIGHT`] for each generated one.
    served: u64,
    /// Its sequences, waiting or running. At 0 it may be forgotten.
    alive: u32,
    /// Sorted: arrivals go to the back and preempted ones near the front, both of which move little.
    ring: VecDeque<(Rank, u32)>,
    /// Sequences from the front that this step has passed over.
    passed: usize,
}

/// Waiting sequences' slots, a queue per tenant.
#[derive(Debug, Clone, Default)]
pub(crate) struct WaitingQueue {
    tenants: Vec<Tenant>,
    by_name: HashMap<ConsumerName, u32>,
    /// Tenants with somebody waiting, in no order.
    active: Vec<u32>,
    /// Service of the last tenant of which nobody waited any more.
    last_served: u64,
    len: usize,
    /// Tokens to prefill of all that wait.
    tokens: u64,
}

impl WaitingQueue {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }

    /// One sequence of this tenant more. Returns the tenant's number, good until the matching
    /// [`WaitingQueue::leave`].
    pub(crate) fn enter(&mut self, name: &ConsumerName) -> u32 {
        let tenant = match self.by_name.get(name) {
            Some(&tenant) => tenant,
            None => self.new_tenant(name),
        };
        let state = &mut self.tenants[tenant as usize];
        state.alive += 1;
        // Preemption may bring all of them back, in the middle of a step.
        state.ring.reserve(state.alive as usize - state.ring.len());
        self.active.reserve(self.tenants.len() - self.active.len());
        tenant
    }

    pub(crate) fn leave(&mut self, tenant: u32) {
        self.tenants[tenant as usize].alive -= 1;
    }

    fn new_tenant(&mut self, name: &ConsumerName) -> u32 {
        let fresh = Tenant { name: name.clone(), served: 0, alive: 0, ring: VecDeque::new(), passed: 0 };
        let idle = (0..self.tenants.len())
            .filter(|_| self.tenants.len() >= REMEMBERED_MAX)
            .filter(|&i| self.tenants[i].alive == 0)
            .min_by_key(|&i| self.tenants[i].served);
        let tenant = match idle {
            Some(idle) => {
                let forgotten = std::mem::replace(&mut self.tenants[idle], fresh);
                self.by_name.remove(&forgotten.name);
                idle as u32
            }
            None => {
                self.tenants.push(fresh);
                self.tenants.len() as u32 - 1
            }
        };
        self.by_name.insert(name.clone(), tenant);
        tenant
    }

    /// The tenant was given this much.
    pub(crate) fn charge(&mut self, tenant: u32, service: u64) {
        let served = &mut self.tenants[tenant as usize].served;
        *served = served.saturating_add(service);
    }

    /// `None` for a tenant that is not known, or not any more.
    pub(crate) fn served(&self, name: &ConsumerName) -> Option<u64> {
        self.by_name.get(name).map(|&tenant| self.tenants[tenant as usize].served)
    }

    /// Returns how many of its tenant are before it.
    pub(crate) fn insert(&mut self, tenant: u32, rank: Rank, slot: u32, tokens: u32) -> usize {
        if self.tenants[tenant as usize].ring.is_empty() {
            self.lift(tenant);
            self.active.push(tenant);
        }
        let ring = &mut self.tenants[tenant as usize].ring;
        let at = ring.partition_point(|(other, _)| *other < rank);
        ring.insert(at, (rank, slot));
        self.len += 1;
        self.tokens += u64::from(tokens);
        at
    }

    /// Who comes to the queue starts level with the least served in it: not asking saves nothing up.
    fn lift(&mut self, tenant: u32) {
        let least = self.active.iter().map(|&t| self.tenants[t as usize].served).min();
        let served = &mut self.tenants[tenant as usize].served;
        *served = (*served).max(least.unwrap_or(self.last_served));
    }

    /// `tokens` as at its insertion.
    pub(crate) fn remove(&mut self, tenant: u32, rank: Rank, tokens: u32) {
        let state = &mut self.tenants[tenant as usize];
        let at = state.ring.partition_point(|(other, _)| *other < rank);
        if state.ring.get(at).is_none_or(|(other, _)| *other != rank) {
            return;
        }
        state.ring.remove(at);
        self.len -= 1;
        self.tokens -= u64::from(tokens);
        if state.ring.is_empty() {
            self.last_served = state.served;
            self.active.retain(|t| *t != tenant);
        }
    }

    /// Nobody is passed over yet.
    pub(crate) fn begin_step(&mut self) {
        for &tenant in &self.active {
            self.tenants[tenant as usize].passed = 0;
        }
    }

    /// Slot of the next in order that was not passed over in this step. O(tenants that wait).
    pub(crate) fn next(&self, ageing: Option<Duration>, standing: impl Fn(u32) -> Standing) -> Option<u32> {
        let firsts = || {
            self.active.iter().filter_map(|&t| {
                let tenant = &self.tenants[t as usize];
                let &(rank, slot) = tenant.ring.get(tenant.passed)?;
                Some((tenant.served, rank, slot))
            })
        };
        let top = firsts().map(|(_, _, slot)| standing(slot).priority).max()?;
        firsts()
            .min_by_key(|&(served, rank, slot)| (Reverse(standing(slot).level(ageing, top)), served, rank))
            .map(|(_, _, slot)| slot)
    }

    /// Slot of this tenant's `n`th behind those that were passed over in this step; 0 is its next.
    pub(crate) fn nth(&self, tenant: u32, n: usize) -> Option<u32> {
        let tenant = &self.tenants[tenant as usize];
        tenant.ring.get(tenant.passed + n).map(|&(_, slot)| slot)
    }

    /// This tenant's next waits for something: the one behind it may go first, in this step.
    pub(crate) fn pass_over(&mut self, tenant: u32) {
        self.tenants[tenant as usize].passed += 1;
    }

    /// Each tenant's queue, by its number.
    pub(crate) fn rings(&self) -> impl Iterator<Item = (u32, &VecDeque<(Rank, u32)>)> {
        (0..).zip(&self.tenants).map(|(number, tenant)| (number, &tenant.ring))
    }

    /// Whether the counts and lists beside the queues say what the queues say.
    pub(crate) fn is_consistent(&self) -> bool {
        let len: usize = self.tenants.iter().map(|tenant| tenant.ring.len()).sum();
        let active = self.tenants.iter().filter(|tenant| !tenant.ring.is_empty()).count();
        let sorted =
            |ring: &VecDeque<(Rank, u32)>| ring.iter().zip(ring.iter().skip(1)).all(|(a, b)| a.0 < b.0);
        len == self.len
            && active == self.active.len()
            && self.active.iter().all(|t| !self.tenants[*t as usize].ring.is_empty())
            && self.tenants.iter().all(|tenant| sorted(&tenant.ring))
            && self.by_name.len() == self.tenants.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_tenants_are_forgotten_the_least_served_first() {
        let mut queue = WaitingQueue::default();
        let busy = queue.enter(&"busy".into());
        for i in 0..REMEMBERED_MAX as u64 * 3 {
            let tenant = queue.enter(&format!("t{i}").as_str().into());
            queue.charge(tenant, i % 1000 + 1);
            queue.leave(tenant);
        }
        assert_eq!(queue.tenants.len(), REMEMBERED_MAX);
        assert_eq!(queue.served(&"busy".into()), Some(0), "it has a sequence");
        assert_eq!(queue.served(&"t999".into()), Some(1000), "it was served most");
        assert!(queue.is_consistent());
        queue.leave(busy);
    }
}
