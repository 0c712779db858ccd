//! KV events in vLLM's wire format: the MessagePack payload `[ts, [event…], data_parallel_rank]`.
//!
//! Format: vLLM 0.33 `vllm/distributed/kv_events.py`. Events are maps with a `type`; before 0.26 they were arrays that
//! begin with it. We write maps and read both. SGLang writes the same maps.
//!
//! Ours alone: heartbeats and snapshots, whose batches go on after the rank with an [`Epoch`] and, in heartbeats, the
//! milliseconds to the next one. vLLM's own classes read over both. And SGLang's pushed load ([`LoadStat`]).
//!
//! What it deliberately does not do: the frames around a payload (topic and sequence number are the sockets'), and
//! turning a replica's names of blocks into ours ([`crate::Renamer`]).

mod decode;
mod encode;
mod load;

use std::time::Duration;

use forebay_types::TokenId;

use crate::CacheSalt;

pub use decode::{DecodeError, decode_batch};
pub use encode::{encode_batch, encode_marked};
pub use load::{LOAD_TOPIC, LoadStat, decode_load, encode_load};

/// First frame of a heartbeat. Only subscribers that name it get any: what knows vLLM's protocol alone sees none.
pub const HEARTBEAT_TOPIC: &str = "forebay-heartbeat";
/// In the place of a sequence number, asks the replay socket for a snapshot. A publisher that knows none reads it as a
/// number so large that there is nothing to replay.
pub const SNAPSHOT_REQUEST: &[u8; 8] = b"snapshot";
/// In the place of a sequence number, ends a replay or a snapshot.
pub const END_SEQ: [u8; 8] = [0xff; 8];

/// A batch with more bytes is refused: about four million tokens.
pub const BATCH_BYTES_MAX: usize = 16 << 20;

/// What one engine step did to one replica's cache.
#[derive(Debug, Clone, PartialEq)]
pub struct EventBatch {
    /// Seconds since 1970 on the replica's clock.
    pub ts: f64,
    pub events: Vec<ReplicaEvent>,
    pub data_parallel_rank: Option<u32>,
    /// Events that say nothing that can be looked up by token ids: of adapters, images, unknown memories and other
    /// kinds of attention, of unknown types, and what does not fit together.
    pub ignored: u32,
    /// Only in heartbeats and snapshots.
    pub epoch: Option<Epoch>,
    /// Only in heartbeats: the time after which the next one comes.
    pub heartbeat: Option<Duration>,
}

/// One life of a replica's cache: random, and another one whenever a cache begins empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Epoch(pub [u8; 16]);

impl std::fmt::Display for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A [`crate::KvEvent`] as another process tells it.
///
/// A block is called by the low 64 bits of its hash, whatever hash the replica uses: a name to remember, not to
/// compute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplicaEvent {
    Stored {
        names: Vec<u64>,
        parent: Option<u64>,
        /// `block_size` tokens per name; or none, where known blocks were copied to another memory.
        tokens: Vec<TokenId>,
        block_size: u32,
        /// Only where `parent` is `None`.
        cache_salt: Option<CacheSalt>,
        medium: Medium,
        /// Which of a model's KV caches, where it has several; each has its own blocks under the same names.
        group: u32,
    },
    Removed {
        names: Vec<u64>,
        medium: Medium,
        group: u32,
    },
    Cleared,
}

/// Where a replica keeps a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Medium {
    /// Where the model computes: `GPU`, also for an engine on CPUs.
    Device,
    /// The host's memory, from which it is loaded back.
    Host,
    /// The replica's own disks.
    Disk,
}

impl Medium {
    /// `None` for what is shared between replicas, or not known: it says nothing about this one.
    fn parse(word: &[u8]) -> Option<Self> {
        match word {
            b"GPU" => Some(Self::Device),
            b"CPU" | b"CPU_PINNED" | b"CPU_TIER1" => Some(Self::Host),
            b"CPU_TIER2" | b"DISK" | b"NVME" => Some(Self::Disk),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
