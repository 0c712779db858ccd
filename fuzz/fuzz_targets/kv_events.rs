//! KV events of another process: any payload is refused or read, and what is read can be put into an index. Heartbeats
//! and snapshots too.
#![no_main]

use forebay_kv::codec::decode_batch;
use forebay_kv::{Lane, PrefixIndex, Renamer};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|payload: &[u8]| {
    let Ok(batch) = decode_batch(payload) else { return };
    let (mut renamer, mut index) = (Renamer::new(2, 64), PrefixIndex::new(64));
    for event in batch.events.iter().chain(&batch.events) {
        if let Some(event) = renamer.rename(event) {
            index.apply(Lane(0), &event);
        }
        assert!(renamer.len() <= 64 && index.blocks_held(Lane(0)) <= 64);
    }
});
