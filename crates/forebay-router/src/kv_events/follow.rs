//! Sequence numbers: what a replica's batch number says. Pure.
//!
//! A publisher counts its batches from 0. Of one that sends heartbeats it is known whether it is still the same; for
//! others the rules for one that began anew are those of SGLang's model gateway.

use forebay_kv::codec::Epoch;

/// Where we are in one replica's sequence of batches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Follower {
    /// The number of the next batch.
    next: u64,
    /// The last one that came live, applied or not.
    live_last: Option<u64>,
    /// Some batch before `next` was never seen.
    missing: bool,
    /// The sequence is known to begin where we began.
    proved: bool,
    /// Whose numbers these are, where the publisher says so.
    epoch: Option<Epoch>,
    /// A heartbeat has said so on the stream of batches: what comes after it is not of a life before.
    heard: bool,
    /// A batch was applied from the stream before that. It says nothing of whose it is, and a snapshot, which comes another
    /// way, can overtake those of the life before.
    doubtful: bool,
}

/// What to do about a batch that came live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Live {
    /// It is the next one.
    Next,
    /// A replay brought it already.
    Seen,
    /// Batches from `from` on are not here yet.
    Gap { from: u64 },
    /// Numbers went back: it is another process, with an empty cache.
    Restarted,
}

/// What to do about a heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beat {
    /// Nothing: all is here.
    Fine,
    /// The batches up to the heartbeat's number are not here, or some before them.
    Incomplete,
    /// It is another cache, which began empty.
    OtherEpoch,
}

impl Follower {
    /// A follower of the cache that a heartbeat has just told of.
    pub(crate) fn of_epoch(epoch: Epoch) -> Self {
        Self { epoch: Some(epoch), heard: true, ..Self::default() }
    }

    pub(crate) fn epoch(&self) -> Option<Epoch> {
        self.epoch
    }

    /// All batches before `next` have been sent, in this epoch.
    pub(crate) fn on_heartbeat(&mut self, epoch: Epoch, next: u64) -> Beat {
        match self.epoch {
            Some(mine) if mine != epoch => return Beat::OtherEpoch,
            Some(_) => {}
            // Whose that was which is known already, nobody has said.
            None if self.proved => return Beat::OtherEpoch,
            None => self.epoch = Some(epoch),
        }
        self.missing |= std::mem::take(&mut self.doubtful);
        self.heard = true;
        // It comes after all that it counts: what has come and is not counted is of another life.
        let counted = self.live_last.is_none_or(|last| last < next);
        match self.is_complete() && next <= self.next && counted {
            true => Beat::Fine,
            false => Beat::Incomplete,
        }
    }

    /// A snapshot begins, of all batches before `next`. Until it has ended, something is missing.
    pub(crate) fn on_snapshot(&mut self, epoch: Option<Epoch>, next: u64) {
        let live_last = self.live_last.filter(|&last| last < next);
        let (heard, epoch) = (self.heard && self.epoch == epoch, epoch.or(self.epoch));
        *self = Self { next, live_last, missing: true, proved: true, epoch, heard, doubtful: false };
    }

    pub(crate) fn on_snapshot_end(&mut self) {
        self.missing = false;
    }

    pub(crate) fn on_live(&mut self, seq: u64) -> Live {
        // Who says which cache it is need not be guessed about: then an old number is one that came twice.
        if self.epoch.is_none() && self.live_last.is_some_and(|last| seq <= last) {
            return Live::Restarted;
        }
        self.live_last = self.live_last.max(Some(seq));
        match seq.cmp(&self.next) {
            std::cmp::Ordering::Less => Live::Seen,
            std::cmp::Ordering::Equal => Live::Next,
            std::cmp::Ordering::Greater => Live::Gap { from: self.next },
        }
    }

    /// The lowest number that has not been applied.
    pub(crate) fn expects(&self) -> u64 {
        self.next
    }

    /// `seq`, which came live, is applied now.
    pub(crate) fn on_applied_live(&mut self, seq: u64) {
        self.doubtful |= self.epoch.is_some() && !self.heard;
        self.on_applied(seq);
    }

    /// `seq` was applied, live or from a replay. Those between it and what was expected are gone.
    pub(crate) fn on_applied(&mut self, seq: u64) {
        self.missing |= seq > self.next;
        self.proved = true;
        self.next = seq.saturating_add(1);
    }

    /// A replay came to its end: what there was before now is here.
    pub(crate) fn on_replayed(&mut self) {
        self.proved = true;
    }

    /// Batches before `seq` can't be had.
    pub(crate) fn skip_to(&mut self, seq: u64) {
        self.missing |= seq > self.next;
        self.next = self.next.max(seq);
    }

    /// A batch came, but its content was lost.
    pub(crate) fn on_unreadable(&mut self) {
        self.missing = true;
    }

    /// The cache is empty: what was missed no longer matters.
    pub(crate) fn on_cleared(&mut self) {
        self.missing = false;
    }

    pub(crate) fn is_missing(&self) -> bool {
        self.missing
    }

    /// Everything that is cached there is known.
    pub(crate) fn is_complete(&self) -> bool {
        self.proved && !self.missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Batches that come live. After each: `=` applied, `.` seen, `!` after a gap that stays, `R` after a restart; and
    /// in the end whether all is known.
    fn check(replayed: std::ops::Range<u64>, live: &[u64], expect: &str, complete: bool) {
        let mut follower = Follower::default();
        replayed.clone().for_each(|seq| follower.on_applied(seq));
        if !replayed.is_empty() {
            follower.on_replayed();
        }
        let mut got = String::new();
        for &seq in live {
            let mut step = follower.on_live(seq);
            if step == Live::Restarted {
                got.push('R');
                follower = Follower::default();
                step = follower.on_live(seq);
            }
            match step {
                Live::Next => got.push('='),
                Live::Seen => {
                    got.push('.');
                    continue;
                }
                Live::Gap { from } => {
                    assert!(from < seq);
                    got.push('!');
                    follower.skip_to(seq);
                }
                Live::Restarted => panic!("twice"),
            }
            follower.on_applied(seq);
        }
        assert_eq!((got.as_str(), follower.is_complete()), (expect, complete), "{replayed:?} {live:?}");
    }

    #[test]
    fn sequences() {
        check(0..0, &[], "", false);
        check(0..0, &[0, 1, 2], "===", true);
        check(0..0, &[7, 8], "!=", false);
        check(0..0, &[0, 2, 3], "=!=", false);
        // The live stream and the replay overlap.
        check(0..5, &[3, 4, 5, 6], "..==", true);
        check(0..5, &[], "", true);
        check(0..5, &[6], "!", false);
        // The buffer there was too short.
        check(3..5, &[5], "=", false);
        // Another process.
        check(0..0, &[0, 1, 2, 0, 1], "===R==", true);
        check(0..0, &[7, 8, 1], "!=R!", false);
        check(0..0, &[0, 0], "=R=", true);
        check(0..5, &[5, 0, 1], "=R==", true);
        check(0..0, &[u64::MAX], "!", false);
    }

    #[test]
    fn with_an_epoch_old_numbers_are_old_batches() {
        let (mine, other) = (Epoch([1; 16]), Epoch([2; 16]));
        let mut follower = Follower::default();
        assert_eq!(follower.on_heartbeat(mine, 0), Beat::Incomplete);
        follower.on_snapshot(Some(mine), 7);
        assert!(!follower.is_complete());
        assert_eq!(follower.on_heartbeat(mine, 7), Beat::Incomplete);
        follower.on_snapshot_end();
        assert_eq!(follower.on_heartbeat(mine, 7), Beat::Fine);
        for (seq, expect) in [(5, Live::Seen), (7, Live::Next), (6, Live::Seen), (10, Live::Gap { from: 8 })]
        {
            assert_eq!(follower.on_live(seq), expect, "{seq}");
            if expect == Live::Next {
                follower.on_applied(seq);
            }
        }
        assert_eq!(follower.on_heartbeat(mine, 11), Beat::Incomplete);
        follower.on_snapshot(Some(mine), 11);
        follower.on_snapshot_end();
        assert_eq!(follower.on_heartbeat(mine, 11), Beat::Fine);
        assert_eq!(follower.on_heartbeat(mine, 9), Beat::Incomplete, "10 came already");
        assert_eq!(follower.on_heartbeat(other, 0), Beat::OtherEpoch);
        assert_eq!(Follower::of_epoch(other).on_heartbeat(other, 0), Beat::Incomplete);
        // A snapshot came before the stream has said whose batches it brings: those applied meanwhile may be of a life before.
        let mut follower = Follower::default();
        follower.on_snapshot(Some(mine), 7);
        follower.on_snapshot_end();
        follower.on_applied_live(7);
        assert_eq!(follower.on_heartbeat(mine, 8), Beat::Incomplete);
        follower.on_snapshot(Some(mine), 8);
        follower.on_snapshot_end();
        follower.on_applied_live(8);
        assert_eq!(follower.on_heartbeat(mine, 9), Beat::Fine, "and now it has");
        // A replay does not say from whom it came.
        let mut follower = Follower::default();
        follower.on_applied(0);
        follower.on_replayed();
        assert_eq!(follower.on_heartbeat(mine, 1), Beat::OtherEpoch);
    }

    #[test]
    fn a_cleared_cache_forgives() {
        let mut follower = Follower::default();
        follower.skip_to(5);
        follower.on_applied(5);
        assert!(!follower.is_complete());
        follower.on_cleared();
        assert!(follower.is_complete());
        follower.on_unreadable();
        assert!(!follower.is_complete());
    }
}
