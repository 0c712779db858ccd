//! A doubly linked list over small integers, held in two arrays.

const NIL: u32 = u32::MAX;
const UNLINKED: u32 = u32::MAX - 1;

/// An ordered set of ids `0..ids()`: push and pop at both ends and removal from the middle are O(1) and allocate
/// nothing. Used as LRU order: front is oldest.
#[derive(Debug, Clone)]
pub struct IndexList {
    prev: Vec<u32>,
    next: Vec<u32>,
    head: u32,
    tail: u32,
    len: u32,
}

impl Default for IndexList {
    fn default() -> Self {
        Self::new(0)
    }
}

impl IndexList {
    /// An empty list that can hold the ids `0..ids`.
    pub fn new(ids: u32) -> Self {
        let ids = ids as usize;
        Self { prev: vec![UNLINKED; ids], next: vec![UNLINKED; ids], head: NIL, tail: NIL, len: 0 }
    }

    /// Ids that the list has room for, linked or not.
    pub fn ids(&self) -> u32 {
        self.prev.len() as u32
    }

    /// Makes room for one more id and returns it, not linked.
    pub fn add_id(&mut self) -> u32 {
        let id = self.ids();
        self.prev.push(UNLINKED);
        self.next.push(UNLINKED);
        id
    }

    pub fn len(&self) -> u32 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn contains(&self, id: u32) -> bool {
        self.prev[id as usize] != UNLINKED
    }

    pub fn push_back(&mut self, id: u32) {
        debug_assert!(!self.contains(id), "{id} is linked already");
        self.prev[id as usize] = self.tail;
        self.next[id as usize] = NIL;
        match self.tail {
            NIL => self.head = id,
            tail => self.next[tail as usize] = id,
        }
        self.tail = id;
        self.len += 1;
    }

    pub fn push_front(&mut self, id: u32) {
        debug_assert!(!self.contains(id), "{id} is linked already");
        self.prev[id as usize] = NIL;
        self.next[id as usize] = self.head;
        match self.head {
            NIL => self.tail = id,
            head => self.prev[head as usize] = id,
        }
        self.head = id;
        self.len += 1;
    }

    /// Unlinks `id`, which must be linked.
    pub fn remove(&mut self, id: u32) {
        debug_assert!(self.contains(id), "{id} is not linked");
        let (prev, next) = (self.prev[id as usize], self.next[id as usize]);
        match prev {
            NIL => self.head = next,
            prev => self.next[prev as usize] = next,
        }
        match next {
            NIL => self.tail = prev,
            next => self.prev[next as usize] = prev,
        }
        self.prev[id as usize] = UNLINKED;
        self.next[id as usize] = UNLINKED;
        self.len -= 1;
    }

    pub fn pop_front(&mut self) -> Option<u32> {
        if self.head == NIL {
            return None;
        }
        let id = self.head;
        self.remove(id);
        Some(id)
    }

    /// Front to back.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let mut at = self.head;
        std::iter::from_fn(move || {
            if at == NIL {
                return None;
            }
            let id = at;
            at = self.next[id as usize];
            Some(id)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    proptest! {
        #[test]
        fn behaves_like_a_deque(ops in prop::collection::vec((0u8..4, 0u32..12), 0..200)) {
            let mut list = IndexList::new(12);
            let mut model = VecDeque::new();
            for (op, id) in ops {
                match op {
                    0 if !list.contains(id) => { list.push_back(id); model.push_back(id); }
                    1 if !list.contains(id) => { list.push_front(id); model.push_front(id); }
                    2 if list.contains(id) => { list.remove(id); model.retain(|x| *x != id); }
                    3 => prop_assert_eq!(list.pop_front(), model.pop_front()),
                    _ => {}
                }
                prop_assert_eq!(list.len() as usize, model.len());
                prop_assert_eq!(list.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
                for id in 0..12 {
                    prop_assert_eq!(list.contains(id), model.contains(&id));
                }
            }
        }
    }
}
