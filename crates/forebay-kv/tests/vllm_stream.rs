//! The events of a real vLLM, recorded by `reference/record_vllm_events.py` with the prompts that made them: what our index
//! knows by them is what vLLM said it had cached, and our hashes are its hashes.

use std::collections::HashSet;

use forebay_kv::codec::{ReplicaEvent, decode_batch};
use forebay_kv::{BlockHasher, CacheSalt, Lane, PrefixIndex, Renamer};
use forebay_types::TokenId;
use serde::Deserialize;

const RECORDING: &str = include_str!("fixtures/vllm-events.json");

#[derive(Deserialize)]
struct Recording {
    block_size: u32,
    steps: Vec<Step>,
}

/// A prompt, or the command to forget all, and what was heard after it.
#[derive(Deserialize)]
struct Step {
    #[serde(default)]
    reset: bool,
    #[serde(default)]
    prompt: Vec<TokenId>,
    salt: Option<String>,
    /// What vLLM found of the prompt.
    #[serde(default)]
    cached_tokens: u32,
    frames: Vec<Frame>,
}

#[derive(Deserialize)]
struct Frame {
    topic: String,
    seq: u64,
    /// Hex.
    payload: String,
}

impl Frame {
    fn events(&self) -> Vec<ReplicaEvent> {
        let digit = |n| u8::from_str_radix(&self.payload[n..n + 2], 16).expect("hex");
        let payload: Vec<u8> = (0..self.payload.len()).step_by(2).map(digit).collect();
        let batch = decode_batch(&payload).expect("a batch");
        assert_eq!((batch.ignored, batch.data_parallel_rank, batch.epoch), (0, Some(0), None));
        batch.events
    }
}

impl Step {
    fn hasher(&self, block_size: u32) -> BlockHasher {
        let mut hasher = BlockHasher::new(block_size as usize, self.salt.as_deref().map(CacheSalt::new));
        hasher.extend(&self.prompt);
        hasher
    }
}

fn recording() -> Recording {
    serde_json::from_str(RECORDING).expect("a recording")
}

#[test]
fn the_index_knows_what_vllm_has_cached() {
    let Recording { block_size, steps } = recording();
    // Its blocks, and two of ours for each of its.
    for ours in [block_size, block_size / 2] {
        let (mut index, lane) = (PrefixIndex::new(1000), Lane(0));
        let mut renamer = Renamer::new(ours, 1000);
        let mut evicted = false;
        for (n, step) in steps.iter().enumerate() {
            let matched = index.matched_blocks(step.hasher(ours).hashes()).blocks(lane) * ours;
            // One token at least is always computed.
            let most = (step.prompt.len() as u32).saturating_sub(1) / block_size * block_size;
            let events: Vec<ReplicaEvent> = step.frames.iter().flat_map(Frame::events).collect();
            if n.checked_sub(1).is_some_and(|before| steps[before].reset) {
                // That all is forgotten, vLLM says with the next step that it computes.
                assert!(matched > 0 && events.first() == Some(&ReplicaEvent::Cleared), "step {n}");
            } else {
                assert_eq!(matched.min(most), step.cached_tokens, "step {n}, blocks of {ours}");
            }
            for event in events {
                evicted |= matches!(event, ReplicaEvent::Removed { .. });
                if let Some(event) = renamer.rename(&event) {
                    index.apply(lane, &event);
                }
            }
        }
        assert_eq!(renamer.unknown(), 0);
        assert!(evicted, "the recording shows evictions");
    }
}

#[test]
fn our_hashes_are_vllms() {
    let Recording { block_size, steps } = recording();
    let mut told = HashSet::new();
    for step in &steps {
        let hasher = step.hasher(block_size);
        let chain: Vec<u64> = hasher.hashes().iter().map(|hash| hash.low_u64()).collect();
        for event in step.frames.iter().flat_map(Frame::events) {
            let ReplicaEvent::Stored { names, parent, tokens, cache_salt, .. } = event else { continue };
            let first = parent.map_or(0, |parent| {
                1 + chain.iter().position(|&name| name == parent).expect("a block of this prompt")
            });
            assert_eq!(names, chain[first..][..names.len()]);
            assert_eq!(tokens, step.prompt[first * block_size as usize..][..tokens.len()]);
            let salt = step.salt.as_deref().filter(|_| first == 0);
            assert_eq!(cache_salt.as_ref().map(CacheSalt::expose), salt);
            told.extend(names);
        }
    }
    assert!(told.len() > 15, "{}", told.len());
}

#[test]
fn batches_are_counted_without_gaps() {
    let frames: Vec<Frame> = recording().steps.into_iter().flat_map(|step| step.frames).collect();
    assert!(frames.iter().all(|frame| frame.topic == "kv"));
    assert!(frames.windows(2).all(|pair| pair[1].seq == pair[0].seq + 1));
}
