//! Which texts are computed next. Pure: no clock, no model.

use std::collections::HashMap;
use std::sync::Arc;

use forebay_types::{ConsumerName, TokenId};

/// Requests whose texts wait, each with what its owner wants to keep beside it.
///
/// Texts are taken one by one: from the requests with the lowest priority number, there from the tenant whose turn was
/// longest ago, there from the request whose turn was longest ago. A large request so delays a small one by about a batch,
/// and a tenant with many requests takes no more than one with few.
#[derive(Debug)]
pub(super) struct Queue<T> {
    jobs: Vec<Job<T>>,
    /// Counts the texts that were taken.
    turn: u64,
    /// The last turn of each tenant that has a job.
    tenants: HashMap<ConsumerName, u64>,
}

#[derive(Debug)]
pub(super) struct Job<T> {
    pub inputs: Vec<Arc<[TokenId]>>,
    /// Inputs that are computed, or are in the batch that is computed now.
    pub taken: usize,
    pub priority: i32,
    pub tenant: ConsumerName,
    pub owner: T,
    last_turn: u64,
}

impl<T> Queue<T> {
    pub fn new() -> Self {
        Self { jobs: Vec::new(), turn: 0, tenants: HashMap::new() }
    }

    /// `inputs` are not empty and each has at least one token.
    pub fn push(&mut self, inputs: Vec<Arc<[TokenId]>>, priority: i32, tenant: ConsumerName, owner: T) {
        // After everybody who has waited longer.
        self.tenants.entry(tenant.clone()).or_insert(self.turn);
        self.jobs.push(Job { inputs, taken: 0, priority, tenant, owner, last_turn: self.turn });
    }

    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Requests, texts that are not taken, and their tokens.
    pub fn load(&self) -> Load {
        let waiting = || self.jobs.iter().flat_map(|job| &job.inputs[job.taken..]);
        Load {
            requests: self.jobs.len(),
            inputs: waiting().count(),
            tokens: waiting().map(|ids| ids.len() as u64).sum(),
        }
    }

    pub fn job_mut(&mut self, index: usize) -> &mut Job<T> {
        &mut self.jobs[index]
    }

    /// Takes out the jobs for which `gone` is true. Indices of a plan mean nothing after it.
    pub fn take(&mut self, mut gone: impl FnMut(&Job<T>) -> bool) -> Vec<Job<T>> {
        let taken: Vec<Job<T>> = self.jobs.extract_if(.., |job| gone(job)).collect();
        if !taken.is_empty() {
            let jobs = &self.jobs;
            self.tenants.retain(|tenant, _| jobs.iter().any(|job| job.tenant == *tenant));
        }
        taken
    }

    /// Takes the texts of the next batch: at most `inputs_max`, with at most `tokens_max` tokens unless the first alone
    /// has more. A job's texts are taken in their order.
    ///
    /// Holds on return: not empty unless nothing waits. O(jobs · batch).
    pub fn plan(&mut self, tokens_max: usize, inputs_max: usize) -> Vec<Place> {
        let mut batch = Vec::new();
        let mut tokens = 0;
        while batch.len() < inputs_max {
            let waiting = self.jobs.iter().enumerate().filter(|(_, job)| job.taken < job.inputs.len());
            let key = |job: &Job<T>| (job.priority, self.tenants[&job.tenant], job.last_turn);
            let Some((index, job)) = waiting.min_by_key(|(_, job)| key(job)) else { break };
            tokens += job.inputs[job.taken].len();
            // Nobody is passed over for being long: a short text behind it waits for the next batch.
            if tokens > tokens_max && !batch.is_empty() {
                break;
            }
            self.turn += 1;
            let job = &mut self.jobs[index];
            batch.push(Place { job: index, input: job.taken });
            job.taken += 1;
            job.last_turn = self.turn;
            self.tenants.insert(job.tenant.clone(), self.turn);
        }
        batch
    }
}

/// A text: which of a job's inputs it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub job: usize,
    pub input: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Load {
    pub requests: usize,
    pub inputs: usize,
    pub tokens: u64,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn inputs(lens: &[usize]) -> Vec<Arc<[TokenId]>> {
        lens.iter().map(|&len| vec![1; len].into()).collect()
    }

    fn queue(jobs: &[(&'static str, i32, &[usize])]) -> Queue<usize> {
        let mut queue = Queue::new();
        for (owner, (tenant, priority, lens)) in jobs.iter().enumerate() {
            queue.push(inputs(lens), *priority, (*tenant).into(), owner);
        }
        queue
    }

    fn jobs_of(batch: &[Place]) -> Vec<usize> {
        batch.iter().map(|place| place.job).collect()
    }

    #[test]
    fn texts_are_taken_by_priority_then_by_turns() {
        let check = |jobs: &[(&'static str, i32, &[usize])], tokens, count, expect: &[&[usize]]| {
            let mut queue = queue(jobs);
            for (nth, expect) in expect.iter().enumerate() {
                assert_eq!(jobs_of(&queue.plan(tokens, count)), *expect, "batch {nth} of {jobs:?}");
            }
        };
        check(&[("a", 0, &[3, 3, 3])], 6, 9, &[&[0, 0], &[0], &[]]);
        // A text longer than a batch goes alone.
        check(&[("a", 0, &[9, 1])], 6, 9, &[&[0], &[0], &[]]);
        // Requests of one tenant take turns, also from batch to batch.
        check(&[("a", 0, &[2; 4]), ("a", 0, &[2; 2])], 6, 9, &[&[0, 1, 0], &[1, 0, 0], &[]]);
        // Tenants take turns, whatever the number of their requests.
        check(
            &[("a", 0, &[1; 4]), ("a", 0, &[1; 4]), ("b", 0, &[1; 4])],
            4,
            9,
            &[&[0, 2, 1, 2], &[0, 2, 1, 2], &[0, 1, 0, 1], &[]],
        );
        check(&[("a", 1, &[1; 2]), ("b", 0, &[1; 2])], 9, 3, &[&[1, 1, 0], &[0], &[]]);
        // A long text is not passed over.
        check(&[("a", 0, &[4, 4]), ("b", 0, &[1; 3])], 6, 9, &[&[0, 1], &[0, 1, 1], &[]]);
    }

    #[test]
    fn who_leaves_is_forgotten() {
        let mut queue = queue(&[("a", 0, &[1, 1]), ("b", 0, &[5])]);
        assert_eq!(queue.load(), Load { requests: 2, inputs: 3, tokens: 7 });
        queue.plan(1, 1);
        assert_eq!(queue.load(), Load { requests: 2, inputs: 2, tokens: 6 });
        let gone = queue.take(|job| job.owner == 0);
        assert_eq!((gone.len(), gone[0].taken), (1, 1));
        assert_eq!(queue.tenants.len(), 1);
        assert_eq!(queue.plan(1, 1), [Place { job: 0, input: 0 }]);
        assert_eq!(queue.take(|_| true).len(), 1);
        assert!(queue.is_empty() && queue.tenants.is_empty());
    }

    proptest! {
        /// Every text is taken once, in its request's order, within the limits.
        #[test]
        fn everything_is_computed_once(
            jobs in prop::collection::vec((0..3u8, -1..2, prop::collection::vec(1..20usize, 1..8)), 1..8),
            tokens_max in 1..30usize,
            inputs_max in 1..6usize,
        ) {
            let mut queue = Queue::new();
            for (owner, (tenant, priority, lens)) in jobs.iter().enumerate() {
                queue.push(inputs(lens), *priority, tenant.to_string().into(), owner);
            }
            let mut done = vec![0; jobs.len()];
            loop {
                let batch = queue.plan(tokens_max, inputs_max);
                if batch.is_empty() {
                    break;
                }
                prop_assert!(batch.len() <= inputs_max);
                let mut tokens = 0;
                for place in &batch {
                    prop_assert_eq!(place.input, done[place.job]);
                    tokens += jobs[place.job].2[place.input];
                    done[place.job] += 1;
                }
                prop_assert!(tokens <= tokens_max || batch.len() == 1);
            }
            for (done, (_, _, lens)) in done.iter().zip(&jobs) {
                prop_assert_eq!(*done, lens.len());
            }
        }
    }
}
