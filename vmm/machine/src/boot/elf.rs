//! The ELF image of a kernel.
//!
//! Purpose: which bytes go where, and how to enter.
//! Invariants: an [`Image`] was checked whole: every segment's bytes are in the file, every segment lies in RAM, no two overlap, the
//! entry is inside one. It borrows the file and allocates only its list of segments, of which there are at most [`MAX_HEADERS`].
//! Elsewhere: what is in memory besides the image ([`super`]).
//! Source: the ELF specification; note type 18 (XEN_ELFNOTE_PHYS32_ENTRY) from Xen's public/elfnote.h. Segments go to their
//! physical addresses.

use super::BootError;
use crate::memory::{GuestMemory, NoMemoryError};
use object::Endianness;
use object::elf;
use object::read::elf::{FileHeader, NoteIterator, ProgramHeader};
use std::ops::Range;
use x86::{GuestPhysAddr, PAGE_SIZE};

/// More program headers than any kernel has.
const MAX_HEADERS: u32 = 1024;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// How a kernel is entered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Protocol {
    /// 32-bit protected mode with a start info, at the address in the PVH note.
    Pvh { entry: u32 },
    /// Long mode.
    Long { entry: u64 },
    /// Flat protected mode.
    Protected { entry: u32 },
}

/// A part of the image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Segment<'a> {
    addr: u64,
    linear: u64,
    data: &'a [u8],
    /// Bytes in memory; what `data` does not fill is zero.
    size: u64,
    /// Where its program header is in the file, for errors.
    header: u64,
}

impl Segment<'_> {
    /// Cannot overflow: it was checked against the size of RAM.
    fn range(&self) -> Range<u64> {
        self.addr..self.addr + self.size
    }
}

/// A checked image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Image<'a> {
    /// In the order of their addresses.
    segments: Vec<Segment<'a>>,
    pub(super) protocol: Protocol,
}

fn error(offset: u64, reason: impl Into<String>) -> BootError {
    BootError::Elf {
        offset,
        reason: reason.into(),
    }
}

impl<'a> Image<'a> {
    /// Checks an image for a machine with `memory` bytes of RAM.
    pub(super) fn parse(file: &'a [u8], memory: u64) -> Result<Self, BootError> {
        match file.get(4) {
            Some(2) => Self::parse_class::<elf::FileHeader64<Endianness>>(file, memory),
            Some(1) => Self::parse_class::<elf::FileHeader32<Endianness>>(file, memory),
            Some(class) => Err(error(4, format!("unknown ELF class {class}"))),
            None => Err(error(4, "the ELF header is cut off")),
        }
    }

    fn parse_class<H: FileHeader<Endian = Endianness>>(
        file: &'a [u8],
        memory: u64,
    ) -> Result<Self, BootError> {
        let header = H::parse(file).map_err(|e| error(0, e.to_string()))?;
        let endian = header.endian().map_err(|e| error(5, e.to_string()))?;
        check_header(header, endian)?;
        let phoff: u64 = header.e_phoff(endian).into();
        let count = header
            .phnum(endian, file)
            .map_err(|e| error(0, e.to_string()))?;
        if count > MAX_HEADERS {
            return Err(error(
                phoff,
                format!("{count} program headers; {MAX_HEADERS} are allowed"),
            ));
        }
        let headers = header
            .program_headers(endian, file)
            .map_err(|e| error(phoff, e.to_string()))?;
        let mut segments = Vec::new();
        let mut pvh = None;
        let stride = std::mem::size_of::<H::ProgramHeader>() as u64;
        for (n, program) in (0u64..).zip(headers) {
            let at = phoff.saturating_add(n * stride);
            if program.p_type(endian) == elf::PT_LOAD {
                segments.extend(load_segment(program, endian, file, at, memory)?);
            } else if program.p_type(endian) == elf::PT_NOTE && pvh.is_none() {
                let notes = program
                    .notes(endian, file)
                    .map_err(|e| error(at, e.to_string()))?;
                pvh = notes
                    .map(|notes| pvh_entry(notes, endian, at))
                    .transpose()?
                    .flatten();
            }
        }
        segments.sort_by_key(|segment| (segment.addr, segment.header));
        check_overlaps(&segments)?;
        if segments.is_empty() {
            return Err(error(
                phoff,
                "nothing to load: there is no PT_LOAD program header",
            ));
        }
        let protocol = protocol(header, endian, pvh, &segments)?;
        Ok(Self { segments, protocol })
    }

    /// Whether any segment uses part of `range`.
    pub(super) fn occupies(&self, range: Range<u64>) -> bool {
        self.segments.iter().any(|segment| {
            let used = segment.range();
            used.start < range.end && range.start < used.end
        })
    }

    /// The first address above all segments.
    pub(super) fn end(&self) -> u64 {
        self.segments
            .iter()
            .map(|segment| segment.range().end)
            .max()
            .unwrap_or(0)
    }

    /// Copies the segments into memory and zeroes what they leave open.
    pub(super) fn load(&self, memory: &GuestMemory) -> Result<(), NoMemoryError> {
        for segment in &self.segments {
            memory.write(GuestPhysAddr::new(segment.addr), segment.data)?;
            zero(
                memory,
                segment.addr + segment.data.len() as u64..segment.range().end,
            )?;
        }
        Ok(())
    }
}

/// Zeroes a range, page by page; leaves pages alone that are zero, as all of fresh RAM is, so that the host need not back them.
fn zero(memory: &GuestMemory, range: Range<u64>) -> Result<(), NoMemoryError> {
    let mut bytes = [0; PAGE_SIZE as usize];
    let mut at = range.start;
    while at < range.end {
        let addr = GuestPhysAddr::new(at);
        let len = addr.bytes_left_in_page().min(range.end - at);
        let part = bytes.get_mut(..len as usize).unwrap_or_default();
        memory.read(addr, part)?;
        if part.iter().any(|&byte| byte != 0) {
            part.fill(0);
            memory.write(addr, part)?;
        }
        at += len;
    }
    Ok(())
}

fn check_header<H: FileHeader<Endian = Endianness>>(
    header: &H,
    endian: Endianness,
) -> Result<(), BootError> {
    if header.is_big_endian() {
        return Err(error(5, "big-endian; an x86 kernel is little-endian"));
    }
    let machine = header.e_machine(endian);
    if machine != elf::EM_X86_64 && machine != elf::EM_386 {
        return Err(error(
            18,
            format!("built for another processor ({machine:?})"),
        ));
    }
    if header.is_class_64() && machine != elf::EM_X86_64 {
        return Err(error(18, "a 64-bit image for a 32-bit processor"));
    }
    let kind = header.e_type(endian);
    if kind == elf::ET_DYN {
        return Err(error(
            16,
            "position-independent (ET_DYN); link the kernel at a fixed address",
        ));
    }
    if kind != elf::ET_EXEC {
        return Err(error(16, format!("not an executable image ({kind:?})")));
    }
    Ok(())
}

fn load_segment<'a, P: ProgramHeader<Endian = Endianness>>(
    program: &P,
    endian: Endianness,
    file: &'a [u8],
    header: u64,
    memory: u64,
) -> Result<Option<Segment<'a>>, BootError> {
    let offset: u64 = program.p_offset(endian).into();
    let in_file: u64 = program.p_filesz(endian).into();
    let size: u64 = program.p_memsz(endian).into();
    let addr: u64 = program.p_paddr(endian).into();
    let linear: u64 = program.p_vaddr(endian).into();
    if in_file > size {
        return Err(error(
            header,
            format!("segment has {in_file:#x} bytes in the file but only {size:#x} in memory"),
        ));
    }
    if size == 0 {
        return Ok(None);
    }
    let range = usize::try_from(offset)
        .ok()
        .zip(offset.checked_add(in_file));
    let data = range
        .and_then(|(start, end)| file.get(start..usize::try_from(end).ok()?))
        .ok_or_else(|| {
            error(
                header,
                format!(
                    "segment's bytes {offset:#x}+{in_file:#x} lie outside the file of {:#x} bytes",
                    file.len()
                ),
            )
        })?;
    if addr.checked_add(size).is_none_or(|end| end > memory) {
        return Err(error(
            header,
            format!("segment at {addr:#x}+{size:#x} does not fit in {memory:#x} bytes of memory"),
        ));
    }
    Ok(Some(Segment {
        addr,
        linear,
        data,
        size,
        header,
    }))
}

fn check_overlaps(segments: &[Segment<'_>]) -> Result<(), BootError> {
    for pair in segments.windows(2) {
        let [low, high] = pair else { continue };
        if low.range().end > high.addr {
            return Err(error(
                high.header,
                format!(
                    "segment at {:#x} overlaps the one at {:#x} (program header at {:#x})",
                    high.addr, low.addr, low.header
                ),
            ));
        }
    }
    Ok(())
}

/// The physical entry address in a note segment, if it has the PVH note.
fn pvh_entry<H: FileHeader<Endian = Endianness>>(
    mut notes: NoteIterator<'_, H>,
    endian: Endianness,
    at: u64,
) -> Result<Option<u64>, BootError> {
    while let Some(note) = notes.next().map_err(|e| error(at, e.to_string()))? {
        if note.name() != b"Xen" || note.n_type(endian).0 != XEN_ELFNOTE_PHYS32_ENTRY {
            continue;
        }
        return match note.desc() {
            &[a, b, c, d] => Ok(Some(u32::from_le_bytes([a, b, c, d]).into())),
            &[a, b, c, d, e, f, g, h] => Ok(Some(u64::from_le_bytes([a, b, c, d, e, f, g, h]))),
            desc => Err(error(
                at,
                format!("the PVH entry note has {} bytes", desc.len()),
            )),
        };
    }
    Ok(None)
}

fn protocol<H: FileHeader<Endian = Endianness>>(
    header: &H,
    endian: Endianness,
    pvh: Option<u64>,
    segments: &[Segment<'_>],
) -> Result<Protocol, BootError> {
    let inside = |addr: u64| {
        segments
            .iter()
            .any(|segment| segment.range().contains(&addr))
    };
    let narrow = |addr: u64| u32::try_from(addr).ok().filter(|_| inside(addr));
    if let Some(entry) = pvh {
        let entry = narrow(entry).ok_or_else(|| {
            error(
                0,
                format!("the PVH entry {entry:#x} is outside every segment"),
            )
        })?;
        return Ok(Protocol::Pvh { entry });
    }
    let declared: u64 = header.e_entry(endian).into();
    // Entered with linear = physical, so an entry given as a linear address is taken to where it was loaded.
    let entry = segments
        .iter()
        .find_map(|segment| {
            let offset = declared.checked_sub(segment.linear)?;
            (offset < segment.size).then_some(segment.addr + offset)
        })
        .or(Some(declared).filter(|&entry| inside(entry)))
        .ok_or_else(|| {
            error(
                24,
                format!("the entry {declared:#x} is outside every segment"),
            )
        })?;
    if header.is_class_64() {
        return Ok(Protocol::Long { entry });
    }
    let entry =
        narrow(entry).ok_or_else(|| error(24, format!("the entry {entry:#x} is above 4 GiB")))?;
    Ok(Protocol::Protected { entry })
}
