//! Guest virtual memory, as a debugger reads it.
//!
//! Purpose: the one place where a debugger's virtual address becomes guest-physical bytes: page by page through the guest's own
//! tables, for reading, and as a list of physical pieces for writing.
//! Invariants: nothing is changed, neither memory nor accessed and dirty bits. Access rights are not checked: a debugger may
//! look at what the guest's code may not. A piece never crosses a 4 KiB page; device memory is never touched.
//! Elsewhere: the walk ([`x86::paging`]); writing, which the machine does (`Debuggable::write_memory`).
//! Source: Intel SDM vol. 3A, 4.1; vol. 1, 3.3.1 (linear addresses have 32 bits outside IA-32e mode).

use machine::GuestMemory;
use x86::paging::{PagingContext, Translation, WalkFault, walk};
use x86::regs::Efer;
use x86::{CpuState, GuestPhysAddr, GuestVirtAddr, PAGE_SIZE};

/// A virtual address that stands for no readable byte.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("cannot access guest virtual address {addr:#x}: {why}")]
pub struct ReadVirtualError {
    /// The first byte that cannot be accessed.
    pub addr: GuestVirtAddr,
    /// How many bytes before it could be (and, when reading, have been read).
    pub done: usize,
    /// Why.
    pub why: Inaccessible,
}

/// Why a virtual address stands for no readable byte.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Inaccessible {
    /// No translation.
    #[error("not mapped (the {} is not present)", entry_name(*.level))]
    NotPresent {
        /// The level of the entry that is not present: 4 = PML4E, 3 = PDPTE, 2 = PDE, 1 = PTE.
        level: u8,
    },
    /// A table entry is malformed.
    #[error("not mapped (reserved bits are set in the {})", entry_name(*.level))]
    ReservedBit {
        /// The entry's level, as in [`Inaccessible::NotPresent`].
        level: u8,
    },
    /// A page table lies outside RAM.
    #[error("the page table at physical address {0:#x} is not in guest memory")]
    TableNotInMemory(GuestPhysAddr),
    /// Bits 63..47 differ.
    #[error("not a canonical address")]
    NonCanonical,
    /// It is mapped, but to a device or to nothing.
    #[error("it maps physical address {0:#x}, which is not guest memory")]
    NotMemory(GuestPhysAddr),
}

/// The name of a paging-structure entry of this level (SDM vol. 3A, table 4-2).
pub const fn entry_name(level: u8) -> &'static str {
    match level {
        5 => "PML5E",
        4 => "PML4E",
        3 => "PDPTE",
        2 => "PDE",
        _ => "PTE",
    }
}

/// Bytes that lie together in one 4 KiB page, virtually and physically.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Where the guest sees them.
    pub linear: GuestVirtAddr,
    /// Where they are.
    pub physical: GuestPhysAddr,
    /// How many, 1..=4096.
    pub len: usize,
}

/// Where virtual address `addr` lies in guest memory under `cpu`'s tables.
pub fn translate(
    cpu: &CpuState,
    memory: &GuestMemory,
    addr: GuestVirtAddr,
) -> Result<Translation, ReadVirtualError> {
    let addr = linear(cpu, addr);
    let walk = walk(&PagingContext::of(cpu), memory, addr);
    let level = walk.steps().last().map_or(0, |step| step.level);
    let refuse = |why| ReadVirtualError { addr, done: 0, why };
    let translation = walk.outcome.map_err(|fault| {
        refuse(match fault {
            WalkFault::NotPresent => Inaccessible::NotPresent { level },
            WalkFault::ReservedBit => Inaccessible::ReservedBit { level },
            WalkFault::NoMemory(table) => Inaccessible::TableNotInMemory(table),
            WalkFault::NonCanonical => Inaccessible::NonCanonical,
        })
    })?;
    if !memory.contains(translation.addr, 1) {
        return Err(refuse(Inaccessible::NotMemory(translation.addr)));
    }
    Ok(translation)
}

/// The pieces that `len` bytes at `addr` consist of, in order. An inaccessible one ends the iteration as an error.
pub fn pieces<'a>(
    cpu: &'a CpuState,
    memory: &'a GuestMemory,
    addr: GuestVirtAddr,
    len: usize,
) -> impl Iterator<Item = Result<Piece, ReadVirtualError>> + 'a {
    let mut done = 0;
    let mut failed = false;
    std::iter::from_fn(move || {
        if failed || done >= len {
            return None;
        }
        let at = linear(cpu, addr.wrapping_add(done as u64));
        match translate(cpu, memory, at) {
            Ok(translation) => {
                let len = (len - done).min(at.bytes_left_in_page() as usize);
                done += len;
                Some(Ok(Piece {
                    linear: at,
                    physical: translation.addr,
                    len,
                }))
            }
            Err(error) => {
                failed = true;
                Some(Err(ReadVirtualError { done, ..error }))
            }
        }
    })
}

/// Fills `out` from virtual address `addr` on, as seen under `cpu`'s page tables.
///
/// After an error the bytes before [`ReadVirtualError::addr`] have been read ([`ReadVirtualError::done`] of them) and the rest
/// of `out` is as it was.
pub fn read_virtual(
    cpu: &CpuState,
    memory: &GuestMemory,
    addr: GuestVirtAddr,
    out: &mut [u8],
) -> Result<(), ReadVirtualError> {
    let mut rest = &mut *out;
    let mut done = 0;
    for piece in pieces(cpu, memory, addr, rest.len()) {
        let piece = piece?;
        let (now, later) = rest.split_at_mut(piece.len);
        memory
            .read(piece.physical, now)
            .map_err(|_| ReadVirtualError {
                addr: piece.linear,
                done,
                why: Inaccessible::NotMemory(piece.physical),
            })?;
        done += piece.len;
        rest = later;
    }
    Ok(())
}

/// As many of the `len` bytes at `addr` as can be read, from the first on. `len` is cut to 1 MiB.
pub fn read_available(
    cpu: &CpuState,
    memory: &GuestMemory,
    addr: GuestVirtAddr,
    len: usize,
) -> Vec<u8> {
    let mut bytes = vec![0; len.min(1 << 20)];
    if let Err(error) = read_virtual(cpu, memory, addr, &mut bytes) {
        bytes.truncate(error.done);
    }
    bytes
}

/// Where a debugger's write of `len` bytes at `addr` goes: physical pieces in order, to be written one by one.
///
/// All of them or an error, so that nothing is written halfway. The list has one piece per page of `len`, which the caller
/// bounds.
pub fn write_targets(
    cpu: &CpuState,
    memory: &GuestMemory,
    addr: GuestVirtAddr,
    len: usize,
) -> Result<Vec<Piece>, ReadVirtualError> {
    pieces(cpu, memory, addr, len).collect()
}

/// Eight little-endian bytes at `addr`.
pub fn read_u64(
    cpu: &CpuState,
    memory: &GuestMemory,
    addr: GuestVirtAddr,
) -> Result<u64, ReadVirtualError> {
    let mut bytes = [0; 8];
    read_virtual(cpu, memory, addr, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Four little-endian bytes at `addr`.
pub fn read_u32(
    cpu: &CpuState,
    memory: &GuestMemory,
    addr: GuestVirtAddr,
) -> Result<u32, ReadVirtualError> {
    let mut bytes = [0; 4];
    read_virtual(cpu, memory, addr, &mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

/// The address the processor's adders would yield: 32 bits outside IA-32e mode.
fn linear(cpu: &CpuState, addr: GuestVirtAddr) -> GuestVirtAddr {
    if cpu.efer.contains(Efer::LMA) {
        addr
    } else {
        GuestVirtAddr::new(addr.get() & 0xffff_ffff)
    }
}

const _: () = assert!(
    PAGE_SIZE as usize as u64 == PAGE_SIZE,
    "a piece's length fits usize"
);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::long_mode;

    const PAGE: u64 = 0x40_0000;

    /// Long mode with virtual pages [`PAGE`] and the next mapped to physical 0x9000 and 0x7000, then one to a device, then nothing.
    fn machine() -> (CpuState, GuestMemory) {
        let memory = GuestMemory::new(1 << 20).expect("1 MiB");
        let cpu = long_mode(&memory, PAGE, &[0x9000 | 3, 0x7000 | 3, 0xfee0_0000 | 3]);
        (cpu, memory)
    }

    fn at(addr: u64) -> GuestVirtAddr {
        GuestVirtAddr::new(addr)
    }

    #[test]
    fn a_read_across_pages_follows_each_page() {
        let (cpu, memory) = machine();
        memory
            .write(GuestPhysAddr::new(0x9ffe), b"ab")
            .expect("write");
        memory
            .write(GuestPhysAddr::new(0x7000), b"cd")
            .expect("write");
        let mut bytes = [0; 4];
        read_virtual(&cpu, &memory, at(PAGE + 0xffe), &mut bytes).expect("mapped");
        assert_eq!(&bytes, b"abcd");
    }

    #[test]
    fn an_error_names_the_first_bad_byte_and_keeps_what_was_read() {
        let (cpu, memory) = machine();
        memory
            .write(GuestPhysAddr::new(0x7ffe), b"xy")
            .expect("write");
        let mut bytes = *b"....";
        let error = read_virtual(&cpu, &memory, at(PAGE + 0x1ffe), &mut bytes).unwrap_err();
        assert_eq!(&bytes, b"xy..");
        assert_eq!(error.addr, at(PAGE + 0x2000));
        assert_eq!(error.done, 2);
        assert_eq!(
            error.why,
            Inaccessible::NotMemory(GuestPhysAddr::new(0xfee0_0000))
        );
        assert_eq!(read_available(&cpu, &memory, at(PAGE + 0x1ffe), 64), b"xy");
    }

    #[test]
    fn each_kind_of_unmapped_address_says_why() {
        let (cpu, memory) = machine();
        let why = |addr| {
            read_virtual(&cpu, &memory, at(addr), &mut [0])
                .unwrap_err()
                .why
        };
        assert_eq!(why(PAGE + 0x3000), Inaccessible::NotPresent { level: 1 });
        assert_eq!(why(1 << 40), Inaccessible::NotPresent { level: 4 });
        assert_eq!(why(1 << 47), Inaccessible::NonCanonical);
        memory
            .write(GuestPhysAddr::new(0x1000), &0x8000_0003u64.to_le_bytes())
            .expect("root");
        assert_eq!(
            why(PAGE),
            Inaccessible::TableNotInMemory(GuestPhysAddr::new(0x8000_0000)),
            "a table outside RAM"
        );
    }

    #[test]
    fn write_targets_are_all_or_nothing() {
        let (cpu, memory) = machine();
        let targets = write_targets(&cpu, &memory, at(PAGE + 0xff0), 0x20).expect("mapped");
        let physical: Vec<_> = targets.iter().map(|p| (p.physical.get(), p.len)).collect();
        assert_eq!(physical, [(0x9ff0, 0x10), (0x7000, 0x10)]);
        let error = write_targets(&cpu, &memory, at(PAGE + 0xff0), 0x1020).unwrap_err();
        assert_eq!((error.addr, error.done), (at(PAGE + 0x2000), 0x1010));
    }

    #[test]
    fn without_paging_addresses_are_physical_and_wrap_at_4_gib() {
        let memory = GuestMemory::new(1 << 20).expect("1 MiB");
        memory.write(GuestPhysAddr::new(0), b"low").expect("write");
        let cpu = CpuState::default();
        let error = read_virtual(&cpu, &memory, at(0xffff_ffff), &mut [0; 4]).unwrap_err();
        assert_eq!(error.done, 0, "the top of the address space is no RAM");
        assert_eq!(
            read_available(&cpu, &memory, at(1 << 32), 3),
            b"low",
            "bit 32 is not there"
        );
        assert!(read_available(&cpu, &memory, at(0x10_0000), 1).is_empty());
    }

    #[test]
    fn the_whole_address_space_can_be_asked_for() {
        let (cpu, memory) = machine();
        let count = pieces(&cpu, &memory, at(PAGE), usize::MAX).count();
        assert_eq!(count, 3, "two pages and the error");
    }
}
