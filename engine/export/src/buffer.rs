//! Page-aligned payload buffers that go back to a pool when the last reference is dropped.
//!
//! Direct I/O wants memory aligned to the disk's block; one alignment of 4096 bytes suits every disk
//! we meet. Buffers are handed round as [`Bytes`], so a payload is placed once and never copied.

#![allow(unsafe_code)]

use bytes::Bytes;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Alignment in bytes of every [`AlignedBuf`].
pub const ALIGN: usize = 4096;

/// Smallest and largest pooled size, as powers of two: 4 KiB to 2 MiB.
const CLASS_MIN_LOG2: u32 = 12;
const CLASS_MAX_LOG2: u32 = 21;
const CLASSES: usize = (CLASS_MAX_LOG2 - CLASS_MIN_LOG2 + 1) as usize;

/// A pool of aligned buffers, cheap to clone and shared by all front ends of one engine.
///
/// It keeps at most the given number of unused bytes; beyond that, and above 2 MiB per buffer, memory
/// goes back to the allocator. It does not limit what is in use: front ends do that.
#[derive(Clone)]
pub struct BufferPool {
    shared: Arc<Mutex<Idle>>,
}

struct Idle {
    classes: [Vec<Memory>; CLASSES],
    bytes: usize,
    bytes_max: usize,
}

impl BufferPool {
    /// A pool that keeps at most `idle_bytes_max` unused bytes.
    #[must_use]
    pub fn new(idle_bytes_max: usize) -> Self {
        let classes = std::array::from_fn(|_| Vec::new());
        let idle = Idle { classes, bytes: 0, bytes_max: idle_bytes_max };
        Self { shared: Arc::new(Mutex::new(idle)) }
    }

    /// A buffer of exactly `len` bytes, aligned to [`ALIGN`]. The content is arbitrary (initialised,
    /// but possibly that of an earlier request): the caller fills all of what it passes on.
    #[must_use]
    pub fn alloc(&self, len: usize) -> AlignedBuf {
        let class = class_of(len);
        let reused = class.and_then(|class| {
            let mut idle = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
            let memory = idle.classes.get_mut(class)?.pop()?;
            idle.bytes -= memory.layout.size();
            Some(memory)
        });
        let size = class.map_or(len, |class| 1 << (class as u32 + CLASS_MIN_LOG2));
        let memory = reused.unwrap_or_else(|| Memory::new(size));
        AlignedBuf { memory: Some(memory), len, home: Arc::downgrade(&self.shared) }
    }

    /// A buffer with a copy of `bytes`.
    #[must_use]
    pub fn copy_from(&self, bytes: &[u8]) -> AlignedBuf {
        let mut buf = self.alloc(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let idle = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        f.debug_struct("BufferPool").field("idle_bytes", &idle.bytes).finish_non_exhaustive()
    }
}

/// The pool class for a length, or none when it is too large to keep.
fn class_of(len: usize) -> Option<usize> {
    let log2 = len.max(1).next_power_of_two().trailing_zeros().max(CLASS_MIN_LOG2);
    (log2 <= CLASS_MAX_LOG2).then_some((log2 - CLASS_MIN_LOG2) as usize)
}

/// One exclusively owned buffer, aligned to [`ALIGN`]; returns to its pool when dropped.
pub struct AlignedBuf {
    memory: Option<Memory>,
    len: usize,
    home: Weak<Mutex<Idle>>,
}

impl AlignedBuf {
    /// Shortens the buffer; longer lengths change nothing.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Makes it shared and read-only, without a copy.
    #[must_use]
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.memory {
            // SAFETY: the allocation has at least `len` initialised bytes (alloc_zeroed, and only
            // ever written through slices) and lives as long as `self`.
            Some(memory) => unsafe { std::slice::from_raw_parts(memory.ptr.as_ptr(), self.len) },
            None => &[],
        }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
            Some(memory) => unsafe { std::slice::from_raw_parts_mut(memory.ptr.as_ptr(), self.len) },
            None => &mut [],
        }
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuf").field("len", &self.len).finish_non_exhaustive()
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        let (Some(memory), Some(home)) = (self.memory.take(), self.home.upgrade()) else { return };
        let size = memory.layout.size();
        let mut idle = home.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.bytes + size > idle.bytes_max {
            return;
        }
        // A class holds exactly its power of two; larger buffers are not kept.
        if let Some(class) = class_of(size).and_then(|class| idle.classes.get_mut(class)) {
            class.push(memory);
            idle.bytes += size;
        }
    }
}

/// One allocation.
struct Memory {
    ptr: NonNull<u8>,
    layout: Layout,
}

// SAFETY: `Memory` owns its allocation exclusively; nothing in it is tied to a thread.
unsafe impl Send for Memory {}
// SAFETY: a shared `Memory` gives out only shared slices.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(size: usize) -> Self {
        // A length close to isize::MAX cannot be reached: front ends limit payloads to 32 MiB.
        let layout = Layout::from_size_align(size.max(ALIGN), ALIGN)
            .unwrap_or_else(|_| handle_alloc_error(Layout::new::<[u8; ALIGN]>()));
        // SAFETY: the size of the layout is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        let ptr = NonNull::new(ptr).unwrap_or_else(|| handle_alloc_error(layout));
        Self { ptr, layout }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new` and freed only here.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_come_back() {
        let pool = BufferPool::new(1 << 20);
        let buf = pool.copy_from(&[7; 5000]);
        let address = buf.as_ptr();
        assert_eq!(address as usize % ALIGN, 0);
        let bytes = buf.freeze();
        assert_eq!(bytes.as_ptr(), address, "freezing copies nothing");
        assert_eq!(bytes.len(), 5000);
        let part = bytes.slice(100..);
        drop(bytes);
        assert_ne!(pool.alloc(8192).as_ptr(), address, "still referenced");
        drop(part);
        assert_eq!(pool.alloc(8000).as_ptr(), address, "reused");
    }

    #[test]
    fn idle_memory_is_bounded() {
        let pool = BufferPool::new(10_000);
        drop([pool.alloc(4096), pool.alloc(4096), pool.alloc(4096), pool.alloc(3 << 20)]);
        let idle = pool.shared.lock().unwrap_or_else(PoisonError::into_inner);
        assert_eq!(idle.bytes, 8192);
    }
}
