//! What the rest of the router wants to know about a replica's events.

use parking_lot::Mutex;

/// How far a replica's cache is known from its own words.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize)]
pub struct KvEventsStatus {
    /// The connection stands: that the cache is gone will be heard on it.
    pub connected: bool,
    /// All that is cached is known.
    pub in_sync: bool,
    /// Which life of the replica's cache this is, where the replica says so.
    pub epoch: Option<String>,
    /// Number of the next batch.
    pub next_batch: u64,
    /// Blocks that the replica is known to have cached.
    pub cached_blocks: u32,
    /// Why the cache was asked for last, and what brought it: `snapshot`, `replay` or `nothing`.
    pub last_resync: Option<Resync>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Resync {
    pub why: Why,
    pub by: By,
}

/// Why a replica was asked for what it has told before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// There was a cache before we listened.
    Joined,
    /// Batches were lost.
    Gap,
    /// It is another cache, by its epoch or because numbers went back.
    Restarted,
    /// An earlier try did not bring all.
    Incomplete,
}

/// What brought it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    Snapshot,
    Replay,
    Nothing,
}

impl Why {
    /// As a metric label.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Joined => "joined",
            Self::Gap => "gap",
            Self::Restarted => "restarted",
            Self::Incomplete => "incomplete",
        }
    }
}

impl By {
    /// As a metric label.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Replay => "replay",
            Self::Nothing => "nothing",
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct EventsView(Mutex<KvEventsStatus>);

impl EventsView {
    pub(crate) fn is_connected(&self) -> bool {
        self.0.lock().connected
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.0.lock().in_sync
    }

    pub(crate) fn status(&self) -> KvEventsStatus {
        self.0.lock().clone()
    }

    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut KvEventsStatus) -> T) -> T {
        change(&mut self.0.lock())
    }
}
