//! One replica's cache as far as its events tell, and how it gets to know what it missed. Knows no sockets: who can be
//! asked is a [`History`].

use std::time::Duration;

use bytes::Bytes;
use forebay_kv::codec::{EventBatch, ReplicaEvent, decode_batch};
use forebay_kv::{KvEvent, Renamer};

use super::Subscription;
use super::follow::{Beat, Follower, Live};
use super::history::{Answer, History, HistoryError, Wanted};
use super::view::{By, Resync, Why};

/// Larger blocks than any engine has; a first event must not be able to make the index useless.
const BLOCK_TOKENS_MAX: u32 = 1024;

pub(super) struct Cache<H> {
    at: Subscription,
    history: Option<H>,
    follower: Follower,
    renamer: Option<Renamer>,
    unknown_seen: u64,
    /// Whether the publisher makes snapshots, once it was asked.
    snapshots: Option<bool>,
    /// What can't be had was said already, and is tried again with every heartbeat.
    said: bool,
}

impl<H: History> Cache<H> {
    pub(super) fn new(at: Subscription, history: Option<H>) -> Self {
        Self {
            at,
            history,
            follower: Follower::default(),
            renamer: None,
            unknown_seen: 0,
            snapshots: None,
            said: false,
        }
    }

    /// A new connection: nothing is known, and what was cached before is asked for.
    pub(super) async fn on_connected(&mut self) {
        self.forget(Follower::default());
        (self.snapshots, self.said) = (None, false);
        self.at.view.change(|status| status.connected = true);
        self.at.metrics.connected.set(1);
        let (model, replica) = (&self.at.model, &self.at.replica);
        tracing::info!(%model, %replica, endpoint = %self.at.source.events, "listening to KV events");
        self.resync(Why::Joined, None).await;
    }

    /// The connection is lost. False if there was none.
    pub(super) fn on_lost(&mut self) -> bool {
        let was_connected = self.at.view.change(|status| std::mem::take(&mut status.connected));
        if was_connected {
            self.forget(Follower::default());
            self.at.metrics.connected.set(0);
        }
        was_connected
    }

    pub(super) async fn on_batch(&mut self, seq: u64, payload: &Bytes) {
        let mut live = self.follower.on_live(seq);
        if live == Live::Restarted {
            let (model, replica) = (&self.at.model, &self.at.replica);
            tracing::info!(%model, %replica, seq, "the replica's KV events began anew");
            self.forget(Follower::default());
            live = self.follower.on_live(seq);
        }
        match live {
            Live::Next => {}
            Live::Seen | Live::Restarted => return,
            Live::Gap { from } => {
                self.at.metrics.lost.inc_by(seq - from);
                let epoch = self.follower.epoch();
                self.resync(Why::Gap, Some(seq)).await;
                // Only now it is known whose batches are to be expected; this one may be of a life before. If it is not,
                // it counts as lost, and comes with the next heartbeat.
                if epoch != self.follower.epoch() {
                    return;
                }
            }
        }
        // What was asked for may have brought this one as well.
        if self.follower.expects() <= seq {
            self.follower.on_applied_live(seq);
            self.apply(seq, payload);
        }
    }

    /// Returns the time to the next one, where the publisher says it.
    pub(super) async fn on_heartbeat(&mut self, next: u64, payload: &[u8]) -> Option<Duration> {
        let Ok(EventBatch { epoch: Some(epoch), heartbeat, .. }) = decode_batch(payload) else {
            self.at.metrics.ignored.inc();
            return None;
        };
        let lag = next.saturating_sub(self.follower.expects());
        match self.follower.on_heartbeat(epoch, next) {
            Beat::Fine => self.publish_state(),
            // Nobody can be asked, and that is known.
            Beat::Incomplete if lag == 0 && self.history.is_none() => {}
            Beat::Incomplete => {
                self.at.metrics.lag.set(i64::try_from(lag).unwrap_or(i64::MAX));
                self.at.metrics.lost.inc_by(lag);
                let why = if lag > 0 { Why::Gap } else { Why::Incomplete };
                self.resync(why, Some(next)).await;
            }
            Beat::OtherEpoch => {
                let (model, replica) = (&self.at.model, &self.at.replica);
                tracing::info!(%model, %replica, %epoch, "the replica's KV cache began anew");
                self.forget(Follower::of_epoch(epoch));
                self.resync(Why::Restarted, Some(next)).await;
            }
        }
        self.at.metrics.lag.set(0);
        heartbeat
    }

    /// Gets what is missing, up to batch `until` where one is known to be. What can't be had is noted as missing.
    async fn resync(&mut self, why: Why, until: Option<u64>) {
        let by = self.fetch(why, until).await;
        match (by, until) {
            (By::Nothing, Some(until)) => self.follower.skip_to(until),
            (By::Nothing, None) => {}
            _ => self.said = false,
        }
        self.at.metrics.on_resync(why, by);
        self.at.view.change(|status| status.last_resync = Some(Resync { why, by }));
        self.publish_state();
        let (model, replica) = (&self.at.model, &self.at.replica);
        tracing::debug!(%model, %replica, why = why.as_str(), by = by.as_str(), "KV events were asked for again");
    }

    async fn fetch(&mut self, why: Why, until: Option<u64>) -> By {
        let Some(history) = self.history.take() else { return By::Nothing };
        let by = self.fetch_from(&history, why, until).await;
        self.history = Some(history);
        by
    }

    /// A few lost batches by their numbers; else the whole cache, where the publisher makes snapshots; else all that
    /// it still has.
    async fn fetch_from(&mut self, history: &H, why: Why, until: Option<u64>) -> By {
        if why == Why::Gap && self.replay(history, until).await {
            return By::Replay;
        }
        if self.snapshots != Some(false) {
            match self.snapshot(history).await {
                Ok(true) => {
                    self.snapshots = Some(true);
                    return By::Snapshot;
                }
                Ok(false) => self.snapshots = Some(false),
                Err(error) => self.say(&error, "a snapshot of the KV cache can't be had"),
            }
        }
        if why != Why::Gap && self.replay(history, until).await {
            return By::Replay;
        }
        By::Nothing
    }

    /// Whether now all is here that a replay can bring, up to `until`.
    async fn replay(&mut self, history: &H, until: Option<u64>) -> bool {
        let missed_before = self.follower.is_missing();
        match self.try_replay(history).await {
            Ok(()) => {
                until.is_none_or(|until| self.follower.expects() >= until)
                    && self.follower.is_missing() == missed_before
            }
            Err(error) => {
                self.say(&error, "KV events can't be replayed");
                false
            }
        }
    }

    async fn try_replay(&mut self, history: &H) -> Result<(), HistoryError> {
        let mut answer = history.ask(Wanted::Since(self.follower.expects())).await?;
        while let Some((seq, payload)) = answer.next().await? {
            // A batch may have come twice; older ones than asked for don't come.
            if seq >= self.follower.expects() {
                self.follower.on_applied(seq);
                self.apply(seq, &payload);
            }
        }
        self.follower.on_replayed();
        Ok(())
    }

    /// False where the publisher knows no snapshots.
    async fn snapshot(&mut self, history: &H) -> Result<bool, HistoryError> {
        let mut answer = history.ask(Wanted::Snapshot).await?;
        let mut begun = false;
        while let Some((next, payload)) = answer.next().await? {
            let batch = decode_batch(&payload).map_err(|_| HistoryError::Unreadable)?;
            if let (Some(mine), Some(theirs)) = (self.follower.epoch(), batch.epoch)
                && mine != theirs
            {
                return Err(HistoryError::OtherEpoch);
            }
            if !std::mem::replace(&mut begun, true) {
                if batch.events.first() != Some(&ReplicaEvent::Cleared) {
                    return Err(HistoryError::NotEvents);
                }
                self.follower.on_snapshot(batch.epoch, next);
            }
            if batch.ignored > 0 {
                return Err(HistoryError::Unreadable);
            }
            self.take_in(&batch);
        }
        if begun {
            self.follower.on_snapshot_end();
        }
        Ok(begun)
    }

    fn say(&mut self, error: &HistoryError, what: &str) {
        if std::mem::replace(&mut self.said, true) {
            return;
        }
        let (model, replica) = (&self.at.model, &self.at.replica);
        let endpoint = self.at.source.replay.as_ref().map(ToString::to_string);
        tracing::warn!(%model, %replica, endpoint, error = error as &dyn std::error::Error, "{what}");
    }

    /// Puts one batch into the index.
    fn apply(&mut self, seq: u64, payload: &[u8]) {
        self.at.metrics.batches.inc();
        match decode_batch(payload) {
            Ok(batch) => {
                if batch.events.contains(&ReplicaEvent::Cleared) {
                    self.follower.on_cleared();
                }
                self.take_in(&batch);
            }
            Err(error) => {
                let (model, replica) = (&self.at.model, &self.at.replica);
                tracing::warn!(%model, %replica, seq, %error, "a batch of KV events can't be read");
                self.at.metrics.ignored.inc();
                self.follower.on_unreadable();
            }
        }
        self.publish_state();
    }

    fn take_in(&mut self, batch: &EventBatch) {
        self.at.metrics.ignored.inc_by(batch.ignored.into());
        let events: Vec<KvEvent> = batch.events.iter().filter_map(|event| self.rename(event)).collect();
        self.at.prefixes.apply(self.at.lane, &events);
    }

    fn rename(&mut self, event: &ReplicaEvent) -> Option<KvEvent> {
        let theirs = match event {
            ReplicaEvent::Stored { block_size, .. } if *block_size > 0 => Some(*block_size),
            _ => None,
        };
        let ours = theirs
            .filter(|&size| size <= BLOCK_TOKENS_MAX)
            .map(|size| self.at.prefixes.adopt_block_tokens(size));
        if let Some(ours) = ours
            && self.renamer.as_ref().is_none_or(|renamer| renamer.block_size() != ours)
        {
            if self.renamer.is_some() {
                // An engine in this process has its own block size, and came later.
                self.at.prefixes.forget(self.at.lane);
                self.follower.on_unreadable();
            }
            self.renamer = Some(Renamer::new(ours, self.at.blocks_max));
            self.unknown_seen = 0;
        }
        let Some(renamer) = &mut self.renamer else {
            return (*event == ReplicaEvent::Cleared).then_some(KvEvent::Cleared);
        };
        let renamed = renamer.rename(event);
        self.at.metrics.ignored.inc_by(renamer.unknown() - self.unknown_seen);
        self.unknown_seen = renamer.unknown();
        renamed
    }

    fn publish_state(&self) {
        let complete = self.follower.is_complete();
        self.at.metrics.in_sync.set(i64::from(complete));
        self.at.view.change(|status| {
            status.in_sync = complete;
            status.next_batch = self.follower.expects();
            if status.epoch.is_some() != self.follower.epoch().is_some() {
                status.epoch = self.follower.epoch().map(|epoch| epoch.to_string());
            }
        });
    }

    /// Nothing is known any more but what `follower` knows.
    fn forget(&mut self, follower: Follower) {
        self.follower = follower;
        if let Some(renamer) = &mut self.renamer {
            renamer.clear();
        }
        self.at.prefixes.forget(self.at.lane);
        self.at.view.change(|status| status.epoch = None);
        self.publish_state();
    }
}
