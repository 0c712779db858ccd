//! Requests that can be ended from outside, by their id.

use std::collections::HashMap;
use std::sync::Arc;

use forebay_types::{Blame, Class, Code, Fault, RequestId};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::serve::Aborted;

/// The requests of an engine that are not answered yet.
#[derive(Default)]
pub(super) struct Open(Arc<Mutex<Entries>>);

#[derive(Default)]
struct Entries {
    /// Of the next entry.
    key: u64,
    open: HashMap<u64, Entry>,
}

struct Entry {
    id: RequestId,
    /// The `request_id` of its body.
    own_id: Option<RequestId>,
    end: oneshot::Sender<Fault>,
}

/// A request's place in the list; dropped, it is out of it.
pub(super) struct Listed {
    list: Arc<Mutex<Entries>>,
    key: u64,
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.list.lock().open.remove(&self.key);
    }
}

impl Open {
    /// Lists a request. Ready with what its client is told, once it is ended; else never.
    pub fn enter(&self, id: RequestId, own_id: Option<RequestId>) -> (Listed, oneshot::Receiver<Fault>) {
        let (end, ended) = oneshot::channel();
        let mut entries = self.0.lock();
        let key = entries.key;
        entries.key += 1;
        entries.open.insert(key, Entry { id, own_id, end });
        (Listed { list: Arc::clone(&self.0), key }, ended)
    }

    pub fn end(&self, which: &Aborted) {
        let mut entries = self.0.lock();
        for (_, entry) in entries.open.extract_if(|_, entry| which.has(&entry.id, entry.own_id.as_ref())) {
            // It may be answered just now.
            let _ = entry.end.send(aborted(which));
        }
    }
}

fn aborted(which: &Aborted) -> Fault {
    match which {
        Aborted::All => Fault::new(
            Class::new(Code::ShuttingDown, Blame::Us),
            "the server stopped before the request was done",
        ),
        // Not one of 5xx: SDKs would send the request again that somebody wanted to end.
        Aborted::Ids(_) => Fault::bad_request("the request was aborted by its id"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_listed_until_it_is_dropped_and_ended_by_either_id() {
        let open = Open::default();
        let by = |id: &str| Aborted::ids([id.into()]);
        let check = |which: Aborted, expect: Option<Code>| {
            let (listed, mut ended) = open.enter("r1".into(), Some("mine".into()));
            open.end(&which);
            assert_eq!(ended.try_recv().ok().map(|fault| fault.class.code), expect, "{which:?}");
            drop(listed);
            assert!(open.0.lock().open.is_empty());
        };
        check(by("r1"), Some(Code::BadRequest));
        check(by("embd-mine"), Some(Code::BadRequest));
        check(by("mine"), Some(Code::BadRequest));
        check(by("other"), None);
        check(Aborted::All, Some(Code::ShuttingDown));
    }
}
