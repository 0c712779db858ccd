//! Memory for weights and KV: zeroed, aligned to cache lines, in huge pages where the system gives them.

use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

/// Zeroed bytes outside the heap, page-aligned. Untouched pages take no memory.
///
/// Huge pages matter for decoding: one token reads all weights, and with 4 KiB pages that is a TLB miss for
/// every 64 cache lines.
pub(crate) struct Buffer {
    map: Option<MmapMut>,
    len: usize,
}

impl Buffer {
    /// `None` if the system has no such memory.
    pub(crate) fn zeroed(len: usize) -> Option<Self> {
        if len == 0 {
            return Some(Self { map: None, len });
        }
        let map = MmapMut::map_anon(len).ok()?;
        #[cfg(target_os = "linux")]
        if len >= 4 << 20 {
            // Advice only: without it the buffer is just slower.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Some(Self { map: Some(map), len })
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.map.as_ref().map_or(&[], |map| &map[..self.len])
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.map.as_mut().map_or(&mut [], |map| &mut map[..self.len])
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
