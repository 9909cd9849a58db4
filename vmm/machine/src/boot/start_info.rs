//! The PVH start info.
//!
//! Purpose: hvm_start_info, its memory map and the command line, as one block of bytes at a page boundary.
//! Invariants: the memory map covers RAM without gaps or overlaps, below 1 MiB as a PC does: 640 KiB, then reserved.
//! Elsewhere: where the block goes ([`super::load`]).
//! Source: xen/include/public/arch-x86/hvm/start_info.h, version 1.

use crate::memory::{GuestMemory, NoMemoryError};
use x86::{GuestPhysAddr, PAGE_SIZE};

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const HEADER_SIZE: u64 = 56;
const ENTRY_SIZE: u64 = 24;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// Video memory and firmware start here on a PC.
const LOW_RAM_END: u64 = 0xa_0000;
const HIGH_RAM_START: u64 = 0x10_0000;

/// What a kernel is told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct StartInfo<'a> {
    memory: u64,
    cmdline: &'a str,
}

impl<'a> StartInfo<'a> {
    pub(super) fn new(memory: u64, cmdline: &'a str) -> Self {
        Self { memory, cmdline }
    }

    /// Start, size and type of each range.
    fn map(&self) -> impl Iterator<Item = (u64, u64, u32)> {
        let memory = self.memory;
        [
            (0, LOW_RAM_END.min(memory), E820_RAM),
            (LOW_RAM_END, HIGH_RAM_START, E820_RESERVED),
            (HIGH_RAM_START, memory, E820_RAM),
        ]
        .into_iter()
        .filter(|(start, end, _)| start < end)
        .map(|(start, end, kind)| (start, end - start, kind))
    }

    /// Bytes it takes, in whole pages.
    pub(super) fn size(&self) -> u64 {
        let bytes = self.cmdline_offset() + self.cmdline.len() as u64 + 1;
        bytes.next_multiple_of(PAGE_SIZE)
    }

    fn cmdline_offset(&self) -> u64 {
        HEADER_SIZE + ENTRY_SIZE * self.map().count() as u64
    }

    /// Writes the block to `at`, where the header then is.
    pub(super) fn write(
        &self,
        memory: &GuestMemory,
        at: GuestPhysAddr,
    ) -> Result<(), NoMemoryError> {
        let mut bytes = Vec::new();
        for word in [MAGIC, VERSION, 0, 0] {
            bytes.extend(word.to_le_bytes()); // magic, version, flags, nr_modules
        }
        let cmdline = at.wrapping_add(self.cmdline_offset());
        let map = at.wrapping_add(HEADER_SIZE);
        for address in [0, cmdline.get(), 0, map.get()] {
            bytes.extend(address.to_le_bytes()); // modlist, cmdline, rsdp, memmap
        }
        for word in [self.map().count() as u32, 0] {
            bytes.extend(word.to_le_bytes()); // memmap_entries, reserved
        }
        for (start, size, kind) in self.map() {
            bytes.extend(start.to_le_bytes());
            bytes.extend(size.to_le_bytes());
            bytes.extend(kind.to_le_bytes());
            bytes.extend(0u32.to_le_bytes());
        }
        bytes.extend(self.cmdline.as_bytes());
        bytes.push(0);
        memory.write(at, &bytes)
    }
}
