//! Guest RAM.
//!
//! Purpose: one host mapping per RAM range, read and written only by copying; a log of the pages the monitor itself wrote.
//! Invariants: no reference into guest memory is ever made (the guest, a device or another thread may change it at any time);
//! every address and length is checked; a write through this type marks its pages dirty. What an engine's guest code writes
//! directly is logged by the engine ([`crate::engine::Engine::take_dirty`]).
//! Elsewhere: MMIO and ports ([`crate::board`]); memory slots (`vmm/kvm`).
//! Source: vm-memory does the mapping.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use x86::paging::TableMemory;
use x86::{GuestPhysAddr, PAGE_SIZE, PageFrame};

/// A set of guest pages, ordered by number.
pub type PageSet = std::collections::BTreeSet<PageFrame>;

/// Why RAM could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateMemoryError {
    /// A size that no machine can have.
    #[error("guest memory of {0} bytes: choose a multiple of 4 KiB between 1 MiB and 3 GiB")]
    Size(u64),
    /// The host refused.
    #[error("cannot map {size} bytes of guest memory: {reason}")]
    Map {
        /// Bytes asked for.
        size: u64,
        /// The host's words.
        reason: String,
    },
}

/// An access that is not wholly inside RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no guest memory at {addr} ({len} bytes)")]
pub struct NoMemoryError {
    /// First byte.
    pub addr: GuestPhysAddr,
    /// Length in bytes.
    pub len: usize,
}

/// A range of guest-physical addresses that is RAM, and where the host has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RamRange {
    /// First byte.
    pub base: GuestPhysAddr,
    /// Bytes.
    pub size: u64,
    /// Where it is mapped in this process; valid as long as a [`GuestMemory`] handle lives.
    pub host: *mut u8,
}

/// Guest RAM; a cheap handle to shared memory.
#[derive(Clone)]
pub struct GuestMemory {
    map: GuestMemoryMmap,
    size: u64,
    dirty: Arc<[AtomicU64]>,
}

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GuestMemory({} bytes)", self.size)
    }
}

/// RAM ends here; above lie the I/O APIC, the local APIC and the firmware window.
const MAX_SIZE: u64 = 3 << 30;

impl GuestMemory {
    /// Zeroed RAM of `size` bytes from physical address 0.
    pub fn new(size: u64) -> Result<Self, CreateMemoryError> {
        if !(1 << 20..=MAX_SIZE).contains(&size) || !size.is_multiple_of(PAGE_SIZE) {
            return Err(CreateMemoryError::Size(size));
        }
        let map_error = |e: &dyn std::fmt::Display| CreateMemoryError::Map {
            size,
            reason: e.to_string(),
        };
        let len = usize::try_from(size).map_err(|e| map_error(&e))?;
        let map =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)]).map_err(|e| map_error(&e))?;
        let words = (size / PAGE_SIZE).div_ceil(64);
        Ok(Self {
            map,
            size,
            dirty: (0..words).map(|_| AtomicU64::new(0)).collect(),
        })
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Pages of RAM.
    pub fn pages(&self) -> u64 {
        self.size / PAGE_SIZE
    }

    /// The RAM ranges, for engines to map.
    pub fn ranges(&self) -> Vec<RamRange> {
        self.map
            .iter()
            .filter_map(|region| {
                let slice = region.as_volatile_slice().ok()?;
                Some(RamRange {
                    base: GuestPhysAddr::new(region.start_addr().0),
                    size: region.len(),
                    host: slice.ptr_guard_mut().as_ptr(),
                })
            })
            .collect()
    }

    /// Whether all of `len` bytes at `addr` are RAM.
    pub fn contains(&self, addr: GuestPhysAddr, len: usize) -> bool {
        addr.checked_add(len as u64)
            .is_some_and(|end| end.get() <= self.size)
    }

    /// Copies out of guest memory.
    pub fn read(&self, addr: GuestPhysAddr, out: &mut [u8]) -> Result<(), NoMemoryError> {
        if !self.contains(addr, out.len()) {
            return Err(NoMemoryError {
                addr,
                len: out.len(),
            });
        }
        self.map
            .read_slice(out, GuestAddress(addr.get()))
            .map_err(|_| NoMemoryError {
                addr,
                len: out.len(),
            })
    }

    /// Copies into guest memory and marks the pages dirty.
    pub fn write(&self, addr: GuestPhysAddr, data: &[u8]) -> Result<(), NoMemoryError> {
        if !self.contains(addr, data.len()) {
            return Err(NoMemoryError {
                addr,
                len: data.len(),
            });
        }
        self.map
            .write_slice(data, GuestAddress(addr.get()))
            .map_err(|_| NoMemoryError {
                addr,
                len: data.len(),
            })?;
        self.mark_dirty(addr, data.len());
        Ok(())
    }

    /// Marks pages as written, for writers that go through [`RamRange::host`].
    pub fn mark_dirty(&self, addr: GuestPhysAddr, len: usize) {
        if len == 0 {
            return;
        }
        let first = addr.get() / PAGE_SIZE;
        let last = addr.get().saturating_add(len as u64 - 1) / PAGE_SIZE;
        for page in first..=last {
            if let Some(word) = self.dirty.get((page / 64) as usize) {
                word.fetch_or(1 << (page % 64), Ordering::Relaxed);
            }
        }
    }

    /// The pages written through this type since the last call, which it forgets.
    pub fn take_dirty(&self) -> PageSet {
        let mut pages = PageSet::new();
        for (index, word) in self.dirty.iter().enumerate() {
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut bits = word.swap(0, Ordering::Relaxed);
            while bits != 0 {
                let bit = u64::from(bits.trailing_zeros());
                pages.insert(PageFrame::new(index as u64 * 64 + bit));
                bits &= bits - 1;
            }
        }
        pages
    }

    /// A hash of one page's bytes; `None` when it is not RAM.
    pub fn page_digest(&self, page: PageFrame) -> Option<u64> {
        let mut bytes = [0; PAGE_SIZE as usize];
        self.read(page.base(), &mut bytes).ok()?;
        Some(xxhash_rust::xxh3::xxh3_64(&bytes))
    }

    /// A hash of all of RAM.
    pub fn digest(&self) -> u64 {
        let mut hash = xxhash_rust::xxh3::Xxh3::new();
        let mut bytes = [0; PAGE_SIZE as usize];
        for page in 0..self.pages() {
            if self.read(PageFrame::new(page).base(), &mut bytes).is_ok() {
                hash.update(&bytes);
            }
        }
        hash.digest()
    }
}

impl TableMemory for GuestMemory {
    fn read_u64(&self, addr: GuestPhysAddr) -> Option<u64> {
        let mut bytes = [0; 8];
        self.read(addr, &mut bytes).ok()?;
        Some(u64::from_le_bytes(bytes))
    }

    fn read_u32(&self, addr: GuestPhysAddr) -> Option<u32> {
        let mut bytes = [0; 4];
        self.read(addr, &mut bytes).ok()?;
        Some(u32::from_le_bytes(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_past_the_end_are_refused_whole() {
        let memory = GuestMemory::new(1 << 20).expect("1 MiB");
        let last = GuestPhysAddr::new((1 << 20) - 4);
        assert!(memory.write(last, &[1; 4]).is_ok());
        assert!(memory.write(last, &[2; 5]).is_err());
        assert!(
            memory
                .read(GuestPhysAddr::new(u64::MAX), &mut [0; 2])
                .is_err()
        );
        let mut bytes = [0; 4];
        memory.read(last, &mut bytes).expect("in range");
        assert_eq!(bytes, [1; 4], "a refused write changes nothing");
    }

    #[test]
    fn writes_mark_every_page_they_touch_once() {
        let memory = GuestMemory::new(1 << 20).expect("1 MiB");
        memory
            .write(GuestPhysAddr::new(0x1fff), &[0; 2])
            .expect("write");
        let expected = [PageFrame::new(1), PageFrame::new(2)].into();
        assert_eq!(memory.take_dirty(), expected);
        assert!(memory.take_dirty().is_empty());
    }

    #[test]
    fn sizes_no_machine_has_are_errors() {
        for size in [0, 4096, (1 << 20) + 1, u64::MAX] {
            assert!(GuestMemory::new(size).is_err(), "{size}");
        }
    }
}
