//! The limits of one consumer, and holds on them.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use forebay_types::{Blame, Class, Classify, Code, Retry};
use parking_lot::Mutex;

use crate::Window;
use crate::bucket::{Bucket, ClaimId};

/// Proof that quota was reserved for a request: nothing below the gateway can be called without one.
///
/// Only a hold makes it, so a composition that forgets the reservation does not compile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserved(());

/// What a consumer may have per window. `None` is unlimited; 0 counts as 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    pub requests: Option<u64>,
    pub tokens: Option<u64>,
}

/// Which limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Limited {
    Requests,
    Tokens,
}

impl Limited {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Tokens => "tokens",
        }
    }
}

/// A limit has no room. Nothing was taken from any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub struct Refused {
    /// The limit that takes longest to have room: whoever waits for it finds the others ready.
    pub limited: Limited,
    pub limit: u64,
    pub remaining: u64,
    pub requested: u64,
    /// `None`: more than the limit itself, so that waiting never helps.
    pub retry_after: Option<Duration>,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { limited, limit, remaining, requested, retry_after } = self;
        let what = limited.as_str();
        match retry_after {
            Some(after) => {
                let ms = after.as_nanos().div_ceil(1_000_000);
                write!(
                    f,
                    "Rate limit reached on {what} per minute: limit {limit}, remaining {remaining}, requested \
                     {requested}. Please try again in {}.{:03}s.",
                    ms / 1000,
                    ms % 1000
                )
            }
            None => write!(
                f,
                "Request too large: it needs {requested} {what}, the limit on {what} per minute is {limit}. Shorten \
                 the prompt or lower max_tokens."
            ),
        }
    }
}

impl Classify for Refused {
    fn class(&self) -> Class {
        let code = match self.limited {
            Limited::Requests => Code::RequestsRateLimited,
            Limited::Tokens => Code::TokensRateLimited,
        };
        Class::new(code, Blame::Client).retry(self.retry_after.map_or(Retry::Never, Retry::After))
    }
}

/// The limits and what is left of them. A limit that is not set is `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snapshot {
    pub requests: Option<Window>,
    pub tokens: Option<Window>,
}

#[derive(Debug)]
struct Buckets {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
}

impl Buckets {
    fn advance(&mut self, now: Duration) {
        self.requests.iter_mut().chain(&mut self.tokens).for_each(|bucket| bucket.advance(now));
    }
}

/// One consumer's account. Cheap to clone; clones are the same account.
///
/// `now` is the time since any fixed start, the same for all calls on one ledger.
#[derive(Debug, Clone)]
pub struct Ledger(Arc<Mutex<Buckets>>);

impl Ledger {
    /// Full buckets at `now`.
    pub fn new(limits: Limits, window: Duration, now: Duration) -> Self {
        let bucket = |limit: Option<u64>| limit.map(|limit| Bucket::new(limit, window, now));
        Self(Arc::new(Mutex::new(Buckets {
            requests: bucket(limits.requests),
            tokens: bucket(limits.tokens),
        })))
    }

    pub fn unlimited() -> Self {
        Self::new(Limits::default(), Duration::from_secs(60), Duration::ZERO)
    }

    /// Takes one request and `tokens`, both or neither.
    ///
    /// # Errors
    /// [`Refused`] names the limit and when there will be room.
    pub fn try_hold(&self, now: Duration, tokens: u64) -> Result<Hold, Refused> {
        let mut buckets = self.0.lock();
        buckets.advance(now);
        let refusals = [
            buckets.requests.as_ref().and_then(|bucket| refusal(bucket, Limited::Requests, 1)),
            buckets.tokens.as_ref().and_then(|bucket| refusal(bucket, Limited::Tokens, tokens)),
        ];
        let wait = |refused: &Refused| refused.retry_after.unwrap_or(Duration::MAX);
        if let Some(refused) = refusals.into_iter().flatten().max_by_key(wait) {
            return Err(refused);
        }
        if let Some(bucket) = &mut buckets.requests {
            let claim = bucket.take(1);
            bucket.settle(claim, 1, 1);
        }
        let claim = buckets.tokens.as_mut().map(|bucket| bucket.take(tokens));
        Ok(Hold { ledger: self.clone(), claim, held: tokens, spent: 0, now })
    }

    pub fn snapshot(&self, now: Duration) -> Snapshot {
        let mut buckets = self.0.lock();
        buckets.advance(now);
        Snapshot {
            requests: buckets.requests.as_ref().map(Bucket::window),
            tokens: buckets.tokens.as_ref().map(Bucket::window),
        }
    }

    fn settle(&self, now: Duration, claim: ClaimId, held: u64, used: u64) {
        let mut buckets = self.0.lock();
        buckets.advance(now);
        if let Some(bucket) = &mut buckets.tokens {
            bucket.settle(claim, held, used);
        }
    }
}

/// Why `units` can't be taken from a bucket, if so.
fn refusal(bucket: &Bucket, limited: Limited, requested: u64) -> Option<Refused> {
    let retry_after = bucket.check(requested).err()?;
    let Window { limit, remaining, .. } = bucket.window();
    Some(Refused { limited, limit, remaining, requested, retry_after })
}

/// Quota that was taken for one request and is not settled yet.
///
/// Dropped without a settlement, it charges what was noted as [`spent`](Hold::spent) and gives the rest back: nothing
/// before the request went on, at least its prompt after. The request itself is never given back: whoever sends many
/// that fail meets the limit on requests.
#[derive(Debug)]
#[must_use = "a dropped hold is given back"]
pub struct Hold {
    ledger: Ledger,
    /// Taken by the settlement; `None` also where tokens are unlimited.
    claim: Option<ClaimId>,
    held: u64,
    spent: u64,
    /// The latest time this hold heard of: `Drop` has none.
    now: Duration,
}

impl Hold {
    /// The proof that stages below ask for.
    pub fn proof(&self) -> Reserved {
        Reserved(())
    }

    /// Tokens taken.
    pub fn held(&self) -> u64 {
        self.held
    }

    /// Holds `tokens` from now on, instead of what was held so far; the request stays the one that was taken. For a call
    /// whose size is known only after work that a caller over quota must not get.
    ///
    /// # Errors
    /// [`Refused`] where there is no room for all of it. The hold is as it was then.
    pub fn try_resize(&mut self, now: Duration, tokens: u64) -> Result<(), Refused> {
        let mut buckets = self.ledger.0.lock();
        buckets.advance(now);
        self.now = self.now.max(now);
        if let (Some(bucket), Some(claim)) = (&mut buckets.tokens, self.claim) {
            bucket.settle(claim, self.held, 0);
            let refused = refusal(bucket, Limited::Tokens, tokens);
            self.claim = Some(bucket.take(if refused.is_some() { self.held } else { tokens }));
            if let Some(refused) = refused {
                return Err(refused);
            }
        }
        self.held = tokens;
        Ok(())
    }

    /// Notes that at least `tokens` of this call are certain to be charged. Never lowers an earlier note.
    pub fn spent(&mut self, now: Duration, tokens: u64) {
        self.spent = self.spent.max(tokens);
        self.now = self.now.max(now);
    }

    /// Charges `used` tokens instead of what was taken: the rest goes back, and more than was taken becomes debt, at
    /// most one full bucket.
    ///
    /// A refund never fills the bucket beyond its brim, nor makes up for refill that the hold itself made room for.
    pub fn settle(mut self, now: Duration, used: u64) {
        self.close(now, used);
    }

    fn close(&mut self, now: Duration, used: u64) {
        if let Some(claim) = self.claim.take() {
            self.ledger.settle(now, claim, self.held, used);
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // At the last time that is known: refill since then comes with the next call on the ledger.
        self.close(self.now, self.spent);
    }
}

#[cfg(test)]
mod tests;
