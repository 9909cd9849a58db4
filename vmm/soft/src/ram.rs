//! Guest RAM as instructions access it: loads and stores of up to sixteen bytes at guest-physical addresses.
//!
//! Purpose: the quick door to [`GuestMemory`]'s host mapping, beside its checked slices.
//! Invariants: every access is bounds-checked against the one RAM range that starts at guest-physical 0; no reference into
//! guest memory is made, values are copied. Dirty pages and cached code are the caller's business ([`crate::memory`]).
#![allow(unsafe_code)] // Raw loads and stores through the host mapping of guest RAM; each is bounds-checked right before.

use machine::GuestMemory;

/// The host mapping of guest RAM.
pub(crate) struct Ram {
    host: *mut u8,
    size: u64,
    /// Keeps the mapping alive.
    memory: GuestMemory,
}

// SAFETY: the mapping is owned by `memory`, which is Send; the pointer is only used for copies in and out.
unsafe impl Send for Ram {}

impl std::fmt::Debug for Ram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ram({} bytes)", self.size)
    }
}

impl Ram {
    /// The RAM of `memory`; a machine without RAM at physical 0 has none here.
    pub(crate) fn new(memory: GuestMemory) -> Self {
        let range = memory
            .ranges()
            .into_iter()
            .find(|range| range.base.get() == 0);
        let (host, size) = range.map_or((std::ptr::null_mut(), 0), |r| (r.host, r.size));
        Self { host, size, memory }
    }

    /// The handle it was made from.
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Bytes of RAM.
    #[inline]
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Whether `len` bytes at `addr` are RAM.
    #[inline]
    pub(crate) fn contains(&self, addr: u64, len: u64) -> bool {
        addr < self.size && len <= self.size - addr
    }

    /// Loads one value; zero outside RAM.
    #[inline]
    pub(crate) fn load<T: Plain>(&self, addr: u64) -> T {
        if !self.contains(addr, size_of::<T>() as u64) {
            return T::default();
        }
        // SAFETY: in bounds of the mapping, as just checked; T is a plain integer, and the load allows any alignment.
        unsafe { self.host.add(addr as usize).cast::<T>().read_unaligned() }
    }

    /// Stores one value; nothing outside RAM.
    #[inline]
    pub(crate) fn store<T: Plain>(&self, addr: u64, value: T) {
        if self.contains(addr, size_of::<T>() as u64) {
            // SAFETY: in bounds of the mapping, as just checked; the store allows any alignment.
            unsafe {
                self.host
                    .add(addr as usize)
                    .cast::<T>()
                    .write_unaligned(value)
            }
        }
    }

    /// Copies out of RAM; zeros outside.
    #[inline]
    pub(crate) fn read(&self, addr: u64, out: &mut [u8]) {
        if !self.contains(addr, out.len() as u64) {
            out.fill(0);
            return;
        }
        // SAFETY: in bounds of the mapping, as just checked; `out` is host memory and cannot overlap it.
        unsafe {
            let from = self.host.add(addr as usize);
            std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len());
        }
    }

    /// Copies into RAM; nothing outside.
    #[inline]
    pub(crate) fn write(&self, addr: u64, data: &[u8]) {
        if self.contains(addr, data.len() as u64) {
            // SAFETY: in bounds of the mapping, as just checked; `data` is host memory and cannot overlap it.
            unsafe {
                let to = self.host.add(addr as usize);
                std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len());
            }
        }
    }

    /// Copies within RAM as if in one go; nothing unless both ranges are RAM.
    pub(crate) fn copy(&self, from: u64, to: u64, len: u64) {
        if self.contains(from, len) && self.contains(to, len) {
            // SAFETY: both in bounds of the mapping, as just checked; the copy allows overlap.
            unsafe {
                let (from, to) = (self.host.add(from as usize), self.host.add(to as usize));
                std::ptr::copy(from, to, len as usize);
            }
        }
    }

    /// Sets bits of a little-endian word, as the page walker does with accessed and dirty bits.
    pub(crate) fn set_bits(&self, addr: u64, bits: u8) {
        self.store::<u8>(addr, self.load::<u8>(addr) | bits);
    }
}

/// Integers that any bytes make.
pub(crate) trait Plain: Copy + Default {}
impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for u64 {}
impl Plain for u128 {}
