//! From our events to a payload.

use std::io;
use std::time::Duration;

use rmp::encode::{write_array_len, write_bin, write_f64, write_map_len, write_nil, write_str, write_uint};

use super::Epoch;
use crate::{CacheSalt, KvEvent};

/// Appends the payload for `events` to `out`. `ts` is in seconds since 1970.
///
/// Hashes are written as integers, their low 64 bits, as vLLM does by default: the form that all known indexers take.
/// A cache salt is written as vLLM writes it, in the clear: who may listen may know it.
pub fn encode_batch(ts: f64, events: &[KvEvent], data_parallel_rank: u32, out: &mut Vec<u8>) {
    put_batch(3, ts, events, data_parallel_rank, out).expect("writing to memory does not fail");
}

/// [`encode_batch`] for a snapshot, or for a heartbeat after which the next one comes in `heartbeat`.
pub fn encode_marked(
    ts: f64,
    events: &[KvEvent],
    data_parallel_rank: u32,
    epoch: &Epoch,
    heartbeat: Option<Duration>,
    out: &mut Vec<u8>,
) {
    let mut put = || -> Put {
        put_batch(if heartbeat.is_some() { 5 } else { 4 }, ts, events, data_parallel_rank, out)?;
        write_bin(out, &epoch.0)?;
        if let Some(heartbeat) = heartbeat {
            write_uint(out, heartbeat.as_millis() as u64)?;
        }
        Ok(())
    };
    put().expect("writing to memory does not fail");
}

pub(super) type Put<T = ()> = Result<T, rmp::encode::ValueWriteError<io::Error>>;

/// The first three of `fields`.
fn put_batch(fields: u32, ts: f64, events: &[KvEvent], rank: u32, out: &mut Vec<u8>) -> Put {
    write_array_len(out, fields)?;
    write_f64(out, ts)?;
    write_array_len(out, events.len() as u32)?;
    events.iter().try_for_each(|event| put_event(event, out))?;
    write_uint(out, u64::from(rank))?;
    Ok(())
}

fn put_event(event: &KvEvent, out: &mut Vec<u8>) -> Put {
    match event {
        KvEvent::Stored { hashes, parent, tokens, block_size, cache_salt } => {
            write_map_len(out, if cache_salt.is_some() { 9 } else { 8 })?;
            put_type("BlockStored", out)?;
            put_integers("block_hashes", hashes.iter().map(|hash| hash.low_u64()), out)?;
            write_str(out, "parent_block_hash")?;
            match parent {
                Some(parent) => drop(write_uint(out, parent.low_u64())?),
                None => write_nil(out).map_err(rmp::encode::ValueWriteError::InvalidMarkerWrite)?,
            }
            put_integers("token_ids", tokens.iter().map(|&token| u64::from(token)), out)?;
            write_str(out, "block_size")?;
            write_uint(out, u64::from(*block_size))?;
            put_nil("lora_id", out)?;
            put_medium(out)?;
            put_nil("lora_name", out)?;
            if let Some(salt) = cache_salt {
                put_extra_keys(salt, hashes.len(), out)?;
            }
            Ok(())
        }
        KvEvent::Removed { hashes } => {
            write_map_len(out, 3)?;
            put_type("BlockRemoved", out)?;
            put_integers("block_hashes", hashes.iter().map(|hash| hash.low_u64()), out)?;
            put_medium(out)
        }
        KvEvent::Cleared => {
            write_map_len(out, 1)?;
            put_type("AllBlocksCleared", out)
        }
    }
}

fn put_type(name: &str, out: &mut Vec<u8>) -> Put {
    write_str(out, "type")?;
    write_str(out, name)
}

fn put_medium(out: &mut Vec<u8>) -> Put {
    write_str(out, "medium")?;
    // What indexers weigh as the best place; of CPU memory they would think that it has to be loaded back.
    write_str(out, "GPU")
}

fn put_nil(key: &str, out: &mut Vec<u8>) -> Put {
    write_str(out, key)?;
    write_nil(out).map_err(rmp::encode::ValueWriteError::InvalidMarkerWrite)
}

fn put_integers(key: &str, values: impl ExactSizeIterator<Item = u64>, out: &mut Vec<u8>) -> Put {
    write_str(out, key)?;
    write_array_len(out, values.len() as u32)?;
    for value in values {
        write_uint(out, value)?;
    }
    Ok(())
}

/// One entry per block: the salt on the first, nothing on the others, which carry it through the chain.
fn put_extra_keys(salt: &CacheSalt, blocks: usize, out: &mut Vec<u8>) -> Put {
    write_str(out, "extra_keys")?;
    write_array_len(out, blocks as u32)?;
    for block in 0..blocks {
        if block == 0 {
            write_array_len(out, 1)?;
            write_str(out, salt.expose())?;
        } else {
            write_nil(out).map_err(rmp::encode::ValueWriteError::InvalidMarkerWrite)?;
        }
    }
    Ok(())
}
