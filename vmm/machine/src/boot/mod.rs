//! Boot protocols: putting a kernel into memory and the CPU at its entry.
//!
//! Purpose: ELF images by PVH entry (32-bit protected mode, as Xen and QEMU enter them), or, without the note, straight into long mode
//! (ELF64) or flat protected mode (ELF32); and flat real-mode images.
//! Invariants: the image is hostile input: everything is checked before the first byte of memory is written, nothing is
//! allocated in proportion to a number in the file, and each error names the offset it is about. What a
//! loader leaves in memory and registers depends on the image, the command line and the memory size alone.
//! Elsewhere: the layout of each part: the image ([`elf`]), the start info ([`start_info`]), page tables and registers ([`entry`]).
//! bzImage and Multiboot come later and are refused by name.
//! Source: the ELF specification; the PVH boot protocol (Xen, docs/misc/pvh.pandoc); the magic numbers of Linux's x86 boot protocol and the
//! Multiboot specifications 1 and 2.

mod elf;
mod entry;
mod start_info;
#[cfg(test)]
mod tests;

use crate::memory::{GuestMemory, NoMemoryError};
use elf::{Image, Protocol};
use start_info::StartInfo;
use x86::{CpuState, GuestPhysAddr, PAGE_SIZE};

/// The longest command line, in bytes, as Linux has it on x86.
pub const MAX_COMMAND_LINE: usize = 2047;

/// Where the monitor's own structures go unless the kernel wants the place: above the real-mode vectors and BIOS data.
const LOW_AREA: std::ops::Range<u64> = 0x1000..0x9_f000;
/// Else above the kernel, and above what the memory map reserves below 1 MiB.
const HIGH_AREA: u64 = 0x10_0000;

/// Why a kernel cannot be booted.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BootError {
    /// Not an ELF image, nor anything else that is known.
    #[error("not a kernel image: no ELF header at offset 0 (the file has {len} bytes)")]
    NotAKernel {
        /// Bytes in the file.
        len: usize,
    },
    /// A known format that cannot be booted yet.
    #[error(
        "{0} boot is not supported yet; use an ELF image (vmlinux), best with a PVH entry note"
    )]
    NotSupportedYet(&'static str),
    /// A damaged or unusable ELF image.
    #[error("kernel image, offset {offset:#x}: {reason}")]
    Elf {
        /// Offset in the file of the structure that is wrong.
        offset: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// The command line cannot be passed on.
    #[error("the kernel command line {0}")]
    CommandLine(&'static str),
    /// The kernel leaves no place for what the boot protocol wants in memory.
    #[error(
        "no room for {needed:#x} bytes of boot information beside the kernel in {memory:#x} bytes of memory"
    )]
    NoRoom {
        /// Bytes needed.
        needed: u64,
        /// Bytes of RAM.
        memory: u64,
    },
    /// A flat image at an address real mode cannot start at.
    #[error("a flat image cannot start at {0}: choose a multiple of 16 below 1 MiB")]
    FlatAddress(GuestPhysAddr),
    /// It does not fit.
    #[error("the image does not fit: {0}")]
    Memory(#[from] NoMemoryError),
}

/// Loads an ELF kernel and returns the state in which its CPU starts. See [`entry`] for that state.
pub fn load(kernel: &[u8], cmdline: &str, memory: &GuestMemory) -> Result<CpuState, BootError> {
    let image = parse(kernel, memory.size())?;
    if cmdline.len() > MAX_COMMAND_LINE {
        return Err(BootError::CommandLine("is longer than 2047 bytes"));
    }
    if cmdline.contains('\0') {
        return Err(BootError::CommandLine("contains a NUL character"));
    }
    let start_info = StartInfo::new(memory.size(), cmdline);
    let needed = entry::tables_size(image.protocol) + start_info.size();
    let base = place(&image, needed, memory.size())?;
    image.load(memory)?;
    let info_at = base.wrapping_add(entry::tables_size(image.protocol));
    start_info.write(memory, info_at)?;
    Ok(entry::prepare(image.protocol, memory, base, info_at)?)
}

/// Loads a flat image at `addr` and returns the state in which real mode starts it: CS = DS = ES = SS = `addr` / 16, IP = 0,
/// SP = 0 (the first push goes to the segment's end).
pub fn load_flat(
    image: &[u8],
    addr: GuestPhysAddr,
    memory: &GuestMemory,
) -> Result<CpuState, BootError> {
    let segment = u16::try_from(addr.get() >> 4)
        .ok()
        .filter(|_| addr.get() & 0xf == 0);
    let segment = segment.ok_or(BootError::FlatAddress(addr))?;
    memory.write(addr, image)?;
    Ok(entry::real_mode(segment))
}

fn parse(kernel: &[u8], memory: u64) -> Result<Image<'_>, BootError> {
    if !kernel.starts_with(b"\x7fELF") {
        return Err(match foreign_format(kernel) {
            Some(format) => BootError::NotSupportedYet(format),
            None => BootError::NotAKernel { len: kernel.len() },
        });
    }
    let image = Image::parse(kernel, memory)?;
    match multiboot(kernel) {
        // An ELF kernel that asks for Multiboot would be lost with any other entry state.
        Some(format) if !matches!(image.protocol, Protocol::Pvh { .. }) => {
            Err(BootError::NotSupportedYet(format))
        }
        _ => Ok(image),
    }
}

fn foreign_format(kernel: &[u8]) -> Option<&'static str> {
    let at = |offset: usize, magic: &[u8]| {
        kernel
            .get(offset..)
            .is_some_and(|rest| rest.starts_with(magic))
    };
    if at(0x1fe, b"\x55\xaa") && at(0x202, b"HdrS") {
        return Some("bzImage");
    }
    multiboot(kernel)
}

/// Whether the image carries a Multiboot header, by magic number and checksum.
fn multiboot(kernel: &[u8]) -> Option<&'static str> {
    let word = |bytes: &[u8], n: usize| {
        let (words, _) = bytes.as_chunks::<4>();
        words.get(n).map_or(0, |word| u32::from_le_bytes(*word))
    };
    let sum = |bytes: &[u8], words: usize| {
        (0..words).fold(0u32, |sum, n| sum.wrapping_add(word(bytes, n)))
    };
    let headers = |limit: usize, align: usize, size: usize, magic: u32, words: usize| {
        let searched = kernel.get(..limit).unwrap_or(kernel);
        (0..searched.len().saturating_sub(size - 1))
            .step_by(align)
            .any(|at| {
                let header = searched.get(at..).unwrap_or_default();
                word(header, 0) == magic && sum(header, words) == 0
            })
    };
    if headers(8192, 4, 12, 0x1bad_b002, 3) {
        Some("Multiboot")
    } else if headers(32_768, 8, 16, 0xe852_50d6, 4) {
        Some("Multiboot2")
    } else {
        None
    }
}

/// Finds `needed` bytes of RAM, page-aligned, that the kernel does not use: low, or else right above it.
fn place(image: &Image<'_>, needed: u64, memory: u64) -> Result<GuestPhysAddr, BootError> {
    let free = |base: u64| {
        base.checked_add(needed)
            .is_some_and(|end| end <= memory && !image.occupies(base..end))
    };
    let low = (LOW_AREA.start..LOW_AREA.end.saturating_sub(needed)).step_by(PAGE_SIZE as usize);
    let above = image
        .end()
        .max(HIGH_AREA)
        .checked_next_multiple_of(PAGE_SIZE);
    low.chain(above)
        .find(|&base| free(base))
        .map(GuestPhysAddr::new)
        .ok_or(BootError::NoRoom { needed, memory })
}
