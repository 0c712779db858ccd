//! Batches of KV events as other engines send them.
//!
//! An input that is a JSON array is sent as the MessagePack of the same values; any other is sent as it is. What is
//! understood fits together, and what we would send for it is understood as the same.
#![no_main]

use forebay_kv::codec::{ReplicaEvent, decode_batch, encode_batch};
use forebay_kv::{CacheSalt, KvEvent, Lane, PrefixIndex, Renamer};
use forebay_types::BlockHash;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|data: &[u8]| {
    let mut payload = Vec::new();
    match serde_json::from_slice::<Value>(data) {
        Ok(value @ Value::Array(_)) => put(&mut payload, &value),
        _ => payload.extend_from_slice(data),
    }
    let Ok(batch) = decode_batch(&payload) else { return };
    index(&batch.events);
    let mut ours = Vec::new();
    let mut names_sent = Vec::new();
    for event in batch.events {
        let (names, event) = match event {
            ReplicaEvent::Stored { names, parent, tokens, block_size, cache_salt, .. } => {
                assert!(tokens.is_empty() || tokens.len() == names.len() * block_size as usize);
                assert!(cache_salt.is_none() || parent.is_none());
                if tokens.is_empty() {
                    continue;
                }
                let (hashes, parent) = (hashes(&names), parent.map(hash));
                (names, KvEvent::Stored { hashes, parent, tokens, block_size, cache_salt })
            }
            ReplicaEvent::Removed { names, .. } => (names.clone(), KvEvent::Removed { hashes: hashes(&names) }),
            ReplicaEvent::Cleared => (Vec::new(), KvEvent::Cleared),
        };
        names_sent.push(names);
        ours.push(event);
    }

    let rank = batch.data_parallel_rank.unwrap_or(0);
    let mut sent = Vec::new();
    encode_batch(batch.ts, &ours, rank, &mut sent);
    let received = decode_batch(&sent).expect("our own batch is understood");
    assert_eq!(received.ts.to_bits(), batch.ts.to_bits());
    assert_eq!((received.data_parallel_rank, received.ignored), (Some(rank), 0));
    assert_eq!(received.events.len(), ours.len());
    for ((received, ours), names_sent) in received.events.into_iter().zip(ours).zip(names_sent) {
        match (received, ours) {
            (
                ReplicaEvent::Stored { names, parent, tokens, block_size, cache_salt, .. },
                KvEvent::Stored {
                    parent: our_parent,
                    tokens: our_tokens,
                    block_size: our_size,
                    cache_salt: our_salt,
                    ..
                },
            ) => {
                assert_eq!((names, tokens, block_size), (names_sent, our_tokens, our_size));
                assert_eq!(parent, our_parent.map(|hash| hash.low_u64()));
                assert_eq!(
                    cache_salt.as_ref().map(CacheSalt::expose),
                    our_salt.as_ref().map(CacheSalt::expose)
                );
            }
            (ReplicaEvent::Removed { names, .. }, KvEvent::Removed { .. }) => assert_eq!(names, names_sent),
            (ReplicaEvent::Cleared, KvEvent::Cleared) => {}
            (received, ours) => panic!("{ours:?} is understood as {received:?}"),
        }
    }
});

/// As the router does with them.
fn index(events: &[ReplicaEvent]) {
    const BLOCKS_MAX: u32 = 8;
    const LANE: Lane = Lane(0);
    let mut renamer = Renamer::new(2, BLOCKS_MAX);
    let mut index = PrefixIndex::new(64);
    for event in events {
        let renamed = renamer.rename(event);
        if let Some(event) = &renamed {
            index.apply(LANE, event);
        }
        assert!(renamer.len() <= BLOCKS_MAX as usize && index.blocks_held(LANE) <= 64);
        if *event == ReplicaEvent::Cleared {
            assert!(renamer.is_empty() && index.blocks() == 0);
        }
    }
}

fn hash(name: u64) -> BlockHash {
    let mut bytes = [0; 32];
    bytes[24..].copy_from_slice(&name.to_be_bytes());
    BlockHash(bytes)
}

fn hashes(names: &[u64]) -> Vec<BlockHash> {
    names.iter().map(|name| hash(*name)).collect()
}

/// Appends the MessagePack of a JSON value; always in the longest form, as lengths are not what is tested here.
fn put(out: &mut Vec<u8>, value: &Value) {
    let sized = |out: &mut Vec<u8>, marker: u8, length: usize| {
        out.push(marker);
        out.extend((length as u32).to_be_bytes());
    };
    match value {
        Value::Null => out.push(0xc0),
        Value::Bool(yes) => out.push(0xc2 + u8::from(*yes)),
        Value::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
            (Some(number), _, _) => {
                out.push(0xcf);
                out.extend(number.to_be_bytes());
            }
            (None, Some(number), _) => {
                out.push(0xd3);
                out.extend(number.to_be_bytes());
            }
            (None, None, number) => {
                out.push(0xcb);
                out.extend(number.unwrap_or(0.0).to_be_bytes());
            }
        },
        // `\u0000` at the start makes it bytes, which JSON has not.
        Value::String(text) => match text.strip_prefix('\0') {
            Some(bytes) => {
                sized(out, 0xc6, bytes.len());
                out.extend(bytes.as_bytes());
            }
            None => {
                sized(out, 0xdb, text.len());
                out.extend(text.as_bytes());
            }
        },
        Value::Array(items) => {
            sized(out, 0xdd, items.len());
            items.iter().for_each(|item| put(out, item));
        }
        Value::Object(pairs) => {
            sized(out, 0xdf, pairs.len());
            for (key, value) in pairs {
                put(out, &Value::String(key.clone()));
                put(out, value);
            }
        }
    }
}
