//! Memory for weights and KV: zeroed, aligned to cache lines, in huge pages where the system gives them.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::MmapMut;

/// Buffers smaller than this share maps of this size.
const MAP_BYTES: usize = 32 << 20;
/// Cache lines, and the vectors of AVX-512.
const ALIGN: usize = 64;

/// Zeroed bytes outside the heap, aligned to cache lines. Untouched pages take no memory.
///
/// Huge pages matter for decoding: one token reads all weights, and with 4 KiB pages that is a TLB miss for
/// every 64 cache lines (8 % of the time on a 135M model). A huge page is 2 MiB and matrices of small models are
/// less, therefore they share maps. A map is given back when the last buffer in it is dropped.
pub(crate) struct Buffer {
    start: NonNull<u8>,
    len: usize,
    /// Keeps the bytes mapped.
    _map: Option<Arc<Map>>,
}

// SAFETY: a buffer is the only one that reaches its bytes, like a `Vec<u8>`.
unsafe impl Send for Buffer {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for Buffer {}

struct Map {
    /// Of `map`; taken once, so that no `&mut` of the whole is made while parts are in use.
    start: NonNull<u8>,
    _map: MmapMut,
}

// SAFETY: the pointer is to memory that the map owns; nothing is tied to a thread.
unsafe impl Send for Map {}
// SAFETY: nothing is read or written through a shared `Map`; buffers reach their own parts.
unsafe impl Sync for Map {}

impl Map {
    fn new(bytes: usize) -> Option<Arc<Self>> {
        let mut map = MmapMut::map_anon(bytes).ok()?;
        #[cfg(target_os = "linux")]
        {
            // Advice only: without it the buffer is just slower.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        let start = NonNull::new(map.as_mut_ptr())?;
        Some(Arc::new(Self { start, _map: map }))
    }
}

/// The map that small buffers are cut from, and how much of it is taken. Bytes are never given out twice.
static SHARED: Mutex<Option<(Arc<Map>, usize)>> = Mutex::new(None);

impl Buffer {
    /// `None` if the system has no such memory.
    pub(crate) fn zeroed(len: usize) -> Option<Self> {
        if len == 0 {
            return Some(Self { start: NonNull::dangling(), len, _map: None });
        }
        if len >= MAP_BYTES / 4 {
            let map = Map::new(len)?;
            return Some(Self { start: map.start, len, _map: Some(map) });
        }
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        let (map, taken) = match shared.take() {
            Some((map, taken)) if taken + len <= MAP_BYTES => (map, taken),
            _ => (Map::new(MAP_BYTES)?, 0),
        };
        // SAFETY: `taken + len <= MAP_BYTES`: inside the map.
        let start = unsafe { map.start.add(taken) };
        *shared = Some((Arc::clone(&map), (taken + len).next_multiple_of(ALIGN)));
        Some(Self { start, len, _map: Some(map) })
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes of a map that we keep alive, reached by this buffer only (or none).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// A pointer into a slice that several threads write, each its own part.
///
/// Whoever makes one keeps the `&mut` borrow alive for as long as copies of it are used.
pub(crate) struct SharedMut<T>(*mut T);

impl<T> Clone for SharedMut<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedMut<T> {}

// SAFETY: a pointer, used only through `slice`, whose callers promise disjoint parts of a `T: Send` slice.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr())
    }

    /// # Safety
    /// `start..start + len` lies in the slice that this was made from, whose borrow is still alive, and no
    /// other thread uses any of it meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn slice<'a>(self, start: usize, len: usize) -> &'a mut [T] {
        // SAFETY: by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zero_aligned_and_apart() {
        let mut buffers: Vec<Buffer> =
            [0, 1, 63, 65, 5 << 20, 9 << 20, 7 << 20, 7 << 20, 7 << 20, 7 << 20, 7 << 20, 3]
                .into_iter()
                .map(|len| Buffer::zeroed(len).unwrap())
                .collect();
        for (i, buffer) in buffers.iter_mut().enumerate() {
            assert!(buffer.iter().all(|&b| b == 0));
            assert!(buffer.is_empty() || buffer.as_ptr().addr().is_multiple_of(ALIGN));
            buffer.fill(i as u8);
        }
        for (i, buffer) in buffers.iter().enumerate() {
            assert!(buffer.iter().all(|&b| b == i as u8));
        }
        assert!(Buffer::zeroed(usize::MAX / 2).is_none());
    }
}
