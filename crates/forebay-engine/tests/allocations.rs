//! A pass allocates nothing once passes of its size have been seen.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;

use driver::supported_isas;
use forebay_engine::exec::{CpuExecutor, CpuOptions, Executor};
use forebay_engine::gguf::ElementType;
use forebay_engine::model::ModelFile;
use forebay_engine::model::tiny::TinyLlama;
use forebay_schedule::{SeqId, StepPlan};

mod driver;

/// Eight sequences of 20 tokens that each compute their last one.
fn decode() -> StepPlan {
    StepPlan {
        seqs: (0..8).map(SeqId).collect(),
        token_ids: (0..8).collect(),
        positions: vec![19; 8],
        row_starts: (0..=8).collect(),
        block_tables: (0..16).collect(),
        table_starts: (0..=8).map(|row| row * 2).collect(),
        logit_tokens: (0..8).collect(),
    }
}

/// One sequence of 40 tokens.
fn prefill() -> StepPlan {
    StepPlan {
        seqs: vec![SeqId(9)],
        token_ids: (0..40).collect(),
        positions: (0..40).collect(),
        row_starts: vec![0, 40],
        block_tables: vec![16, 17, 18],
        table_starts: vec![0, 3],
        logit_tokens: vec![39],
    }
}

#[test]
fn a_pass_allocates_nothing_after_the_first_of_its_kind() {
    for (weights, isa) in [ElementType::F32, ElementType::Q8_0]
        .into_iter()
        .flat_map(|weights| supported_isas().map(move |isa| (weights, isa)))
    {
        let model = TinyLlama { weights, ..TinyLlama::default() }.to_gguf();
        let model = Arc::new(ModelFile::from_bytes(model).unwrap());
        // One thread: the counter counts this one's.
        let options = CpuOptions { isa, threads: 1, block_size: 16, blocks: 20, positions_max: 64 };
        let mut executor = CpuExecutor::new(&model, &options).unwrap();
        let plans = [prefill(), decode()];
        let mut run = || plans.iter().for_each(|plan| assert!(executor.execute(plan).is_ok()));
        run();
        let counted = allocation_counter::measure(run);
        assert_eq!(counted.count_total, 0, "{isa}, {weights} weights");
    }
}
