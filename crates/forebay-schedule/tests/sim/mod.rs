//! An executor without a model: KV is the token itself, so that a wrong block shows at once.

#![allow(dead_code, reason = "each test binary uses its part of this module")]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use forebay_kv::{CacheSalt, KvEvent, Lane, PrefixIndex};
use forebay_schedule::{
    AddError, Added, NewSeq, Scheduler, SchedulerConfig, SeqId, SeqInfo, StepPlan, TokenOutcome,
};
use forebay_types::TokenId;

pub const STEP: Duration = Duration::from_millis(20);

/// What a model would sample: depends on every token before, and on few values, so that sequences often agree.
pub fn next_token(tokens: &[TokenId]) -> TokenId {
    tokens.iter().fold(7u32, |sum, token| sum.wrapping_mul(31).wrapping_add(*token)) % 3
}

/// What a sequence must have generated in the end, however it was scheduled.
pub fn expected_output(prompt: &[TokenId], max_new: u32) -> Vec<TokenId> {
    let mut tokens = prompt.to_vec();
    for _ in 0..max_new {
        tokens.push(next_token(&tokens));
    }
    tokens.split_off(prompt.len())
}

pub struct Sim {
    pub scheduler: Scheduler,
    pub now: Duration,
    /// Every sequence that is queued or running, with all its tokens.
    pub alive: BTreeMap<SeqId, Vec<TokenId>>,
    /// What ended by itself: output and usage.
    pub done: HashMap<SeqId, (Vec<TokenId>, SeqInfo)>,
    pub steps: u64,
    prompts: HashMap<SeqId, usize>,
    /// Who wants the logits of its prompt: the next position to come.
    scored: HashMap<SeqId, u32>,
    /// `[block][offset]`: the token whose KV is there.
    kv: Vec<Vec<Option<TokenId>>>,
    index: PrefixIndex,
    events: Vec<KvEvent>,
}

impl Sim {
    pub fn new(config: SchedulerConfig) -> Self {
        let scheduler = Scheduler::new(SchedulerConfig { kv_events: true, ..config });
        let config = scheduler.config();
        Self {
            now: Duration::ZERO,
            alive: BTreeMap::new(),
            done: HashMap::new(),
            steps: 0,
            prompts: HashMap::new(),
            scored: HashMap::new(),
            kv: vec![vec![None; config.block_size as usize]; config.blocks as usize],
            index: PrefixIndex::new(config.blocks),
            events: Vec::new(),
            scheduler,
        }
    }

    pub fn try_add(&mut self, seq: NewSeq) -> Result<Added, AddError> {
        let (id, prompt, scores) = (seq.id, seq.prompt.clone(), seq.prompt_logits);
        let added = self.scheduler.try_add(self.now, seq)?;
        self.prompts.insert(id, prompt.len());
        if scores {
            self.scored.insert(id, 0);
        }
        self.alive.insert(id, prompt.to_vec());
        self.check();
        Ok(added)
    }

    pub fn abort(&mut self, id: SeqId) {
        assert_eq!(self.scheduler.abort(id).is_some(), self.alive.remove(&id).is_some());
        self.check();
    }

    /// Plans a step, checks it, runs it, and hands out its tokens.
    pub fn step(&mut self) -> StepPlan {
        let plan = self.plan();
        self.execute(&plan);
        plan
    }

    /// Plans a step and checks it.
    pub fn plan(&mut self) -> StepPlan {
        self.now += STEP;
        self.steps += 1;
        let plan = self.scheduler.plan_step(self.now).clone();
        self.check_plan(&plan);
        self.check();
        plan
    }

    pub fn execute(&mut self, plan: &StepPlan) {
        let block_size = self.scheduler.config().block_size;
        // Rows are written one after another, and each is read before any is written: a plan in which one row needs
        // what another writes fails here.
        for r in 0..plan.rows() {
            self.check_kv(plan, r, plan.positions[plan.row(r).start]);
        }
        for r in 0..plan.rows() {
            for t in plan.row(r) {
                let position = plan.positions[t];
                let block = plan.block_table(r)[(position / block_size) as usize];
                self.kv[block as usize][(position % block_size) as usize] = Some(plan.token_ids[t]);
            }
        }
        for r in 0..plan.rows() {
            self.check_kv(plan, r, plan.positions[plan.row(r).end - 1] + 1);
        }
        // A millisecond a token, so that bounds in time are sometimes kept and sometimes can't be.
        self.scheduler.on_step_done(Duration::from_millis(plan.tokens() as u64));
        for &t in &plan.logit_tokens {
            let r = plan.row_starts.partition_point(|start| *start <= t) - 1;
            let (id, next) = (plan.seqs[r], plan.positions[t as usize] + 1);
            match self.scored.get_mut(&id) {
                Some(scored) if (next as usize) < self.prompts[&id] => *scored = next,
                _ if self.alive.contains_key(&id) => self.sample(id),
                _ => {}
            }
        }
        self.check();
    }

    /// The plan was not executed.
    pub fn fail(&mut self) {
        self.scheduler.on_step_failed();
        self.check();
    }

    /// Ends a sequence whose output is complete before its limit.
    pub fn finish(&mut self, id: SeqId) {
        assert_eq!(self.scheduler.finish(id).is_some(), self.alive.remove(&id).is_some());
        self.check();
    }

    pub fn clear_cache(&mut self) {
        self.scheduler.clear_cache();
        self.check();
    }

    pub fn run(&mut self, steps_max: u64) {
        while !self.alive.is_empty() {
            assert!(self.steps < steps_max, "not done after {steps_max} steps: {:?}", self.scheduler.stats());
            assert!(!self.step().is_empty(), "nothing planned, although {:?}", self.scheduler.stats());
        }
    }

    fn sample(&mut self, id: SeqId) {
        let tokens = self.alive.get_mut(&id).expect("the plan names sequences that exist");
        let token = next_token(tokens);
        tokens.push(token);
        match self.scheduler.on_token(id, token) {
            TokenOutcome::Continue => {}
            TokenOutcome::LengthReached => {
                let info = self.scheduler.finish(id).expect("it exists");
                let mut tokens = self.alive.remove(&id).expect("it exists");
                let output = tokens.split_off(self.prompts[&id]);
                assert_eq!(info.generated_tokens as usize, output.len());
                let wanted = self.prompts[&id] as u32 - 1;
                assert!(self.scored.get(&id).is_none_or(|scored| *scored == wanted), "its prompt's logits");
                self.done.insert(id, (output, info));
            }
            TokenOutcome::Ignored => panic!("{id:?} was planned and not expected to have a token"),
        }
    }

    /// The first `tokens` of row `r`, read through its block table, are the sequence's.
    fn check_kv(&self, plan: &StepPlan, r: usize, tokens: u32) {
        let block_size = self.scheduler.config().block_size;
        // One that was aborted after planning is computed, and nobody cares.
        let Some(known) = self.alive.get(&plan.seqs[r]) else { return };
        for position in 0..tokens {
            let block = plan.block_table(r)[(position / block_size) as usize];
            let found = self.kv[block as usize][(position % block_size) as usize];
            assert_eq!(found, Some(known[position as usize]), "row {r}, position {position}, block {block}");
        }
    }

    fn check_plan(&self, plan: &StepPlan) {
        let config = self.scheduler.config();
        let block_size = config.block_size;
        assert!(plan.tokens() <= config.step_tokens_max as usize);
        assert_eq!(plan.positions.len(), plan.tokens());
        assert_eq!(plan.row_starts.len(), plan.rows() + 1);
        assert_eq!(plan.table_starts.len(), plan.rows() + 1);
        assert_eq!(plan.row_starts[plan.rows()] as usize, plan.tokens());
        assert_eq!(plan.table_starts[plan.rows()] as usize, plan.block_tables.len());
        let mut written = HashMap::new();
        let (mut logits, mut prompt_logits) = (Vec::new(), 0);
        for r in 0..plan.rows() {
            let tokens = &self.alive[&plan.seqs[r]];
            let positions = &plan.positions[plan.row(r)];
            let (first, end) = (positions[0], positions[positions.len() - 1] + 1);
            assert!(positions.iter().copied().eq(first..end), "row {r}: {positions:?}");
            assert_eq!(plan.token_ids[plan.row(r)], tokens[first as usize..end as usize]);
            assert_eq!(plan.block_table(r).len(), end.div_ceil(block_size) as usize);
            if let Some(&scored) = self.scored.get(&plan.seqs[r]) {
                let wanted = scored.max(first)..end.min(self.prompts[&plan.seqs[r]] as u32 - 1);
                assert!(wanted.is_empty() || scored >= first, "a token without its logits is not skipped");
                prompt_logits += wanted.len();
                logits.extend(wanted.map(|position| (plan.row(r).start as u32) + position - first));
            }
            if end as usize == tokens.len() {
                logits.push(plan.row(r).end as u32 - 1);
            }
            for block in &plan.block_table(r)[(first / block_size) as usize..] {
                assert_eq!(written.insert(*block, r), None, "block {block} is written by two rows");
            }
        }
        assert_eq!(plan.logit_tokens, logits);
        assert!(
            prompt_logits <= config.prompt_logits_max as usize + plan.rows(),
            "{prompt_logits} prompt logits"
        );
        for r in 0..plan.rows() {
            for block in plan.block_table(r) {
                assert!(written.get(block).is_none_or(|w| *w == r), "row {r} reads what another row writes");
            }
        }
        let stats = self.scheduler.stats();
        assert_eq!(stats.running as usize, plan.rows(), "everybody who runs has a row");
        assert_eq!((stats.running + stats.waiting) as usize, self.alive.len());
        assert!(stats.running <= config.running_max);
    }

    fn check(&mut self) {
        assert_eq!(self.scheduler.check_invariants(), Ok(()));
        self.scheduler.drain_events(&mut self.events);
        for event in self.events.drain(..) {
            self.index.apply(Lane(0), &event);
        }
        let pool = self.scheduler.pool();
        assert_eq!(self.index.blocks_held(Lane(0)) as usize, pool.cached_blocks());
        assert!(pool.cached_hashes().all(|hash| self.index.holds(Lane(0), hash)));
    }
}

/// Small enough to follow on paper, and strict.
pub fn small() -> SchedulerConfig {
    SchedulerConfig {
        block_size: 4,
        blocks: 100,
        step_tokens_max: 16,
        running_max: 8,
        unfinished_max: 100,
        model_len_max: 200,
        chunk_tokens_min: 1,
        watermark_permille: 0,
        ageing: None,
        ..SchedulerConfig::default()
    }
}

/// A prompt that shares no block with another `name`'s.
pub fn prompt(name: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|i| name * 1000 + i).collect()
}

/// Sequence and number of tokens of each row.
pub fn rows(plan: &StepPlan) -> Vec<(u64, usize)> {
    (0..plan.rows()).map(|r| (plan.seqs[r].0, plan.row(r).len())).collect()
}

/// The sequences that get a token from this plan.
pub fn sampled(plan: &StepPlan) -> Vec<SeqId> {
    let row = |t: &u32| plan.row_starts.partition_point(|start| start <= t) - 1;
    plan.logit_tokens.iter().map(|t| plan.seqs[row(t)]).collect()
}

pub fn seq(id: u64, prompt: impl Into<Arc<[TokenId]>>, max_new_tokens: u32) -> NewSeq {
    NewSeq {
        id: SeqId(id),
        prompt: prompt.into(),
        max_new_tokens,
        cache_salt: None,
        priority: 0,
        tenant: "tenant".into(),
        prompt_logits: false,
    }
}

pub fn salted(id: u64, prompt: impl Into<Arc<[TokenId]>>, max_new_tokens: u32, salt: &str) -> NewSeq {
    NewSeq { cache_salt: Some(CacheSalt::new(salt)), ..seq(id, prompt, max_new_tokens) }
}
