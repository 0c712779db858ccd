//! Names of KV blocks, what happens to them, and who holds them. Pure: no I/O, no clock, no randomness.
//!
//! - [`BlockHasher`], [`block_hash`]: a block's name is the hash of its tokens and of everything before them.
//! - [`KvEvent`]: a cache stored or dropped blocks.
//! - [`PrefixIndex`]: which replica holds how much of a prompt.
//! - [`Publication`], [`CacheMirror`]: what a publisher has told, and can tell again.
//! - [`codec`], [`Renamer`]: events on the wire, and what a replica's names for its blocks mean.
//! - [`BlockHashMap`], [`IndexList`]: the containers that router and block pool build on.
//!
//! **Invariant:** nobody else computes a block hash. The engine's pool and the router's index agree on a prompt's
//! blocks because both call this crate.
//!
//! **Invariant:** no sockets here. The ZMQ frames around a payload belong to who sends and receives them.

pub mod codec;
mod event;
mod hash;
mod index;
mod list;
mod map;
mod mirror;
mod publication;
mod rename;
mod salt;

pub use event::KvEvent;
pub use hash::{BlockHasher, DEFAULT_SEED, ExtraKey, block_hash, none_hash, none_hash_from_seed};
pub use index::{Lane, Matches, PrefixIndex};
pub use list::IndexList;
pub use map::{BlockHashMap, PassThroughHasher};
pub use mirror::CacheMirror;
pub use publication::{Publication, Snapshot};
pub use rename::Renamer;
pub use salt::CacheSalt;
