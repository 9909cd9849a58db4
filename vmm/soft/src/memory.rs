//! Guest memory through linear addresses.
//!
//! Purpose: translate with permission checks and accessed/dirty bits, load, stage and commit stores, keep track of written
//! pages.
//! Invariants:
//! - Nothing is stored before every access of the instruction has been checked: stores are staged and committed together at
//!   the end. An access that faults sets no accessed or dirty bit at any level.
//! - A cached translation never outlives the tables it came from: pages that were walked as tables are marked, and a store
//!   that changes a present entry in one empties the TLB. So table stores take effect at once, without INVLPG, as they do
//!   under KVM without hardware paging.
//! - A store to a page that holds decoded code is reported to the code cache before the next instruction.
//! - Accesses outside RAM become MMIO exits, in pieces of 8, 4, 2 or 1 bytes that do not cross a page.
//!
//! Deviation: PAE page-directory pointers are read from memory at each walk (as AMD's nested paging does), not cached at the
//! load of CR3.
//! Elsewhere: segmentation ([`crate::segmentation`]); the walk itself ([`x86::paging`]).
//! Source: Intel SDM vol. 3A, 4.6-4.8, 4.10.

use crate::Pending;
use crate::ram::{Plain, Ram};
use crate::stop::{Exec, Stop, data_of, gp, page_fault};
use crate::stores::Stores;
use crate::tlb::Tlb;
use machine::{GuestMemory, PageSet};
use x86::exit::AccessData;
use x86::paging::{
    Access, AccessKind, EntryFlags, PagingContext, WalkFault, check, walk, walk_fault_code,
};
use x86::{CpuState, Exit, GuestPhysAddr, GuestVirtAddr, PageFrame};

/// The page was written since the last [`Memory::take_dirty`].
const DIRTY: u8 = 1;
/// The page holds decoded code.
const CODE: u8 = 2;
/// The page was walked as a page table.
const TABLE: u8 = 4;

/// A checked linear range in physical pieces; at most one page boundary lies inside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Span {
    /// Guest-physical address of the first byte.
    pub(crate) first: u64,
    /// Bytes there.
    pub(crate) first_len: usize,
    /// Guest-physical address of the rest.
    pub(crate) second: u64,
    /// Bytes of the rest.
    pub(crate) second_len: usize,
}

impl Span {
    /// The pieces as (address, range of the buffer).
    pub(crate) fn pieces(&self) -> [(u64, std::ops::Range<usize>); 2] {
        let end = self.first_len + self.second_len;
        [
            (self.first, 0..self.first_len),
            (self.second, self.first_len..end),
        ]
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) ram: Ram,
    tlb: Tlb,
    pages: Box<[u8]>,
    dirty: Vec<u32>,
    /// Stores to pages with decoded code that the code cache has not heard of yet: address and length.
    pub(crate) code_writes: Vec<(u64, u32)>,
    /// Changes whenever cached fetch translations became invalid.
    pub(crate) epoch: u64,
    pub(crate) stores: Stores,
    /// Linear addresses wrap here: 2^32 - 1 outside 64-bit mode.
    pub(crate) linear_mask: u64,
    /// Whether the current privilege level is 3.
    pub(crate) user: bool,
}

impl Memory {
    pub(crate) fn new(memory: GuestMemory) -> Self {
        let ram = Ram::new(memory);
        let pages = (ram.size() >> 12) as usize;
        Self {
            ram,
            tlb: Tlb::new(),
            pages: vec![0; pages].into_boxed_slice(),
            dirty: Vec::with_capacity(pages),
            code_writes: Vec::with_capacity(16),
            epoch: 0,
            stores: Stores::default(),
            linear_mask: u64::MAX,
            user: false,
        }
    }

    /// Forgets all translations.
    pub(crate) fn flush(&mut self) {
        self.tlb.flush();
        self.epoch += 1;
    }

    /// The physical address of `linear` for an access of this kind, with its side effects on the page tables.
    #[inline]
    pub(crate) fn translate(
        &mut self,
        cpu: &CpuState,
        linear: u64,
        kind: AccessKind,
        user: bool,
    ) -> Exec<u64> {
        match self.tlb.lookup(linear, kind, user) {
            Some(addr) => Ok(addr),
            None => self.fill(cpu, linear, kind, user),
        }
    }

    #[cold]
    fn fill(&mut self, cpu: &CpuState, linear: u64, kind: AccessKind, user: bool) -> Exec<u64> {
        let context = PagingContext::of(cpu);
        let implicit = !user && self.user;
        let access = Access {
            kind,
            user,
            implicit,
        };
        let walk = walk(&context, self.ram.memory(), GuestVirtAddr::new(linear));
        let translation = match walk.outcome {
            Ok(translation) => translation,
            Err(WalkFault::NonCanonical) => return Err(gp(0)),
            Err(fault) => {
                let code = walk_fault_code(&context, fault, access);
                return Err(page_fault(linear, code).into());
            }
        };
        if let Err(code) = check(&context, &translation, access) {
            return Err(page_fault(linear, code).into());
        }
        for (n, step) in walk.steps().iter().enumerate() {
            let leaf = n + 1 == walk.steps().len();
            let mut wanted = EntryFlags::empty();
            if step.restricts {
                wanted |= EntryFlags::A;
            }
            if leaf && kind == AccessKind::Write {
                wanted |= EntryFlags::D;
            }
            let at = step.addr.get();
            if !step.flags().contains(wanted) {
                self.note_bits(at);
                self.ram.set_bits(at, wanted.bits() as u8);
            }
            self.mark(at, TABLE);
        }
        let addr = translation.addr.get();
        // Where SMAP depends on RFLAGS.AC a translation may not outlive the instruction.
        let lasting = !context.smap || user || kind == AccessKind::Execute;
        if self.ram.contains(addr & !0xfff, 0x1000) && lasting {
            self.tlb.insert(linear, addr & !0xfff, kind, user);
        }
        Ok(addr)
    }

    /// Checks a linear range of at most a page for an access of this kind.
    #[inline]
    pub(crate) fn span(
        &mut self,
        cpu: &CpuState,
        linear: u64,
        len: usize,
        kind: AccessKind,
        user: bool,
    ) -> Exec<Span> {
        let left = 0x1000 - (linear & 0xfff) as usize;
        let first = self.translate(cpu, linear, kind, user)?;
        if len <= left {
            return Ok(Span {
                first,
                first_len: len,
                second: 0,
                second_len: 0,
            });
        }
        let next = linear.wrapping_add(left as u64) & self.linear_mask;
        let second = self.translate(cpu, next, kind, user)?;
        Ok(Span {
            first,
            first_len: left,
            second,
            second_len: len - left,
        })
    }

    /// Loads a checked range.
    #[inline]
    pub(crate) fn load(&mut self, span: Span, out: &mut [u8], pending: &mut Pending) -> Exec {
        if span.second_len == 0
            && self.stores.is_empty()
            && self.ram.contains(span.first, span.first_len as u64)
        {
            self.ram.read(span.first, out);
            return Ok(());
        }
        self.load_slowly(span, out, pending)
    }

    fn load_slowly(&mut self, span: Span, out: &mut [u8], pending: &mut Pending) -> Exec {
        for (addr, range) in span.pieces() {
            let Some(part) = out.get_mut(range) else {
                continue;
            };
            if self.ram.contains(addr, part.len() as u64) {
                self.ram.read(addr, part);
                self.stores.overlay(addr, part);
            } else {
                mmio_read(addr, part, pending)?;
            }
        }
        Ok(())
    }

    /// Reads a value at a linear address with the given privilege.
    #[inline]
    pub(crate) fn read<T: Plain + Bytes>(
        &mut self,
        cpu: &CpuState,
        linear: u64,
        user: bool,
        pending: &mut Pending,
    ) -> Exec<T> {
        let len = size_of::<T>();
        if (linear & 0xfff) as usize + len <= 0x1000
            && self.stores.is_empty()
            && let Some(addr) = self.tlb.lookup(linear, AccessKind::Read, user)
        {
            return Ok(self.ram.load(addr));
        }
        let span = self.span(cpu, linear, len, AccessKind::Read, user)?;
        let mut bytes = [0; 16];
        self.load(span, &mut bytes[..len], pending)?;
        Ok(T::from_bytes(bytes))
    }

    /// Checks and stages a store of the low `len` bytes of `value`.
    #[inline]
    pub(crate) fn stage(
        &mut self,
        cpu: &CpuState,
        linear: u64,
        value: u128,
        len: usize,
        user: bool,
    ) -> Exec {
        let span = self.span(cpu, linear, len, AccessKind::Write, user)?;
        self.stage_span(span, &value.to_le_bytes()[..len])
    }

    /// Stages a store to a range checked for writing.
    pub(crate) fn stage_span(&mut self, span: Span, data: &[u8]) -> Exec {
        for (addr, range) in span.pieces() {
            for (n, part) in data.get(range).unwrap_or_default().chunks(16).enumerate() {
                if !self.stores.push(addr.wrapping_add(16 * n as u64), part) {
                    return Err(Stop::Unimplemented(
                        "more stores than one instruction can make",
                    ));
                }
            }
        }
        Ok(())
    }

    /// Checks and makes one store at once; for instructions whose only store this is and that cannot fail after it.
    #[inline]
    pub(crate) fn write<T: Plain + Bytes>(
        &mut self,
        cpu: &CpuState,
        linear: u64,
        value: T,
        user: bool,
        pending: &mut Pending,
    ) -> Exec {
        let len = size_of::<T>();
        if (linear & 0xfff) as usize + len <= 0x1000
            && let Some(addr) = self.tlb.lookup(linear, AccessKind::Write, user)
        {
            self.note_write(addr, len);
            self.ram.store(addr, value);
            return Ok(());
        }
        let span = self.span(cpu, linear, len, AccessKind::Write, user)?;
        self.store_span(span, &value.to_bytes()[..len], pending)
    }

    /// Makes a store to a range checked for writing, exiting first if part of it is MMIO.
    pub(crate) fn store_span(&mut self, span: Span, data: &[u8], pending: &mut Pending) -> Exec {
        for (addr, range) in span.pieces() {
            let part = data.get(range).unwrap_or_default();
            if !self.ram.contains(addr, part.len() as u64) {
                mmio_write(addr, part, pending)?;
            }
        }
        for (addr, range) in span.pieces() {
            let part = data.get(range).unwrap_or_default();
            if !part.is_empty() && self.ram.contains(addr, part.len() as u64) {
                self.note_write(addr, part.len());
                self.ram.write(addr, part);
            }
        }
        Ok(())
    }

    /// Makes the staged stores; exits first, with nothing stored, for those that are MMIO.
    #[inline]
    pub(crate) fn commit(&mut self, pending: &mut Pending) -> Exec {
        if self.stores.is_empty() {
            Ok(())
        } else {
            self.commit_stores(pending)
        }
    }

    fn commit_stores(&mut self, pending: &mut Pending) -> Exec {
        for n in 0..self.stores.len() {
            let (addr, data, size) = self.stores.get(n);
            if !self.ram.contains(addr, size as u64) {
                mmio_write(addr, &data[..size], pending)?;
            }
        }
        for n in 0..self.stores.len() {
            let (addr, data, size) = self.stores.get(n);
            if self.ram.contains(addr, size as u64) {
                self.note_write(addr, size);
                self.ram.write(addr, &data[..size]);
            }
        }
        self.stores.clear();
        Ok(())
    }

    /// Whether a store to this RAM page has no consequence but the page's contents.
    pub(crate) fn is_plain_page(&self, addr: u64) -> bool {
        let flags = self.pages.get((addr >> 12) as usize);
        flags.is_some_and(|flags| flags & (CODE | TABLE) == 0)
    }

    /// To be called before each store to RAM; the range lies in one page.
    #[inline]
    pub(crate) fn note_write(&mut self, addr: u64, len: usize) {
        if let Some(&flags) = self.pages.get((addr >> 12) as usize)
            && flags != DIRTY
        {
            self.note_special_write(addr, len, flags);
        }
    }

    /// The walker is about to set bits in the table entry at `addr`; translations stay good.
    fn note_bits(&mut self, addr: u64) {
        if let Some(&flags) = self.pages.get((addr >> 12) as usize) {
            self.note_special_write(addr, 1, flags & !TABLE);
        }
    }

    #[cold]
    fn note_special_write(&mut self, addr: u64, len: usize, flags: u8) {
        if flags & DIRTY == 0 {
            self.dirty.push((addr >> 12) as u32);
            self.mark(addr, DIRTY);
        }
        if flags & CODE != 0 {
            self.code_writes.push((addr, len as u32));
        }
        if flags & TABLE != 0 && self.present_entry(addr, len) {
            self.flush();
            if let Some(flags) = self.pages.get_mut((addr >> 12) as usize) {
                *flags &= !TABLE;
            }
        }
    }

    /// Whether the bytes may belong to an entry with its present bit set; only such entries can have been cached.
    fn present_entry(&self, addr: u64, len: usize) -> bool {
        let last = addr + (len as u64).saturating_sub(1);
        (addr >> 3..=last >> 3).any(|entry| self.ram.load::<u64>(entry << 3) & (1 | 1 << 32) != 0)
    }

    fn mark(&mut self, addr: u64, flag: u8) {
        if let Some(flags) = self.pages.get_mut((addr >> 12) as usize) {
            *flags |= flag;
        }
    }

    /// The page at `addr` holds decoded code from now on.
    pub(crate) fn mark_code(&mut self, addr: u64) {
        self.mark(addr, CODE);
    }

    /// The page at `addr` holds no decoded code any more.
    pub(crate) fn unmark_code(&mut self, addr: u64) {
        if let Some(flags) = self.pages.get_mut((addr >> 12) as usize) {
            *flags &= !CODE;
        }
    }

    /// The monitor is about to write, or has written, this range.
    pub(crate) fn written_outside(&mut self, addr: GuestPhysAddr, len: usize) {
        let end = addr.get().saturating_add(len as u64).min(self.ram.size());
        let mut at = addr.get();
        while at < end {
            let part = (end - at).min(0x1000 - (at & 0xfff));
            let flags = self.pages.get((at >> 12) as usize).copied().unwrap_or(0);
            if flags & CODE != 0 {
                self.code_writes.push((at, part as u32));
            }
            if flags & TABLE != 0 {
                self.flush();
            }
            at += part;
        }
    }

    /// The pages written since the last call, by guest and monitor.
    pub(crate) fn take_dirty(&mut self) -> PageSet {
        let mut pages = self.ram.memory().take_dirty();
        for page in self.dirty.drain(..) {
            if let Some(flags) = self.pages.get_mut(page as usize) {
                *flags &= !DIRTY;
            }
            pages.insert(PageFrame::new(u64::from(page)));
        }
        pages
    }
}

/// The size of the next MMIO piece of `len` bytes.
fn piece(len: usize) -> usize {
    match len {
        8.. => 8,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

fn mmio_read(addr: u64, out: &mut [u8], pending: &mut Pending) -> Exec {
    let mut at = 0;
    while at < out.len() {
        let size = piece(out.len() - at);
        let from = GuestPhysAddr::new(addr.wrapping_add(at as u64));
        let exit = Exit::MmioRead {
            addr: from,
            size: size as u8,
        };
        let value = data_of(pending.ask(exit)?, size).to_le_bytes();
        out[at..at + size].copy_from_slice(&value[..size]);
        at += size;
    }
    Ok(())
}

fn mmio_write(addr: u64, data: &[u8], pending: &mut Pending) -> Exec {
    let mut at = 0;
    while at < data.len() {
        let size = piece(data.len() - at);
        let mut value = [0; 8];
        value[..size].copy_from_slice(&data[at..at + size]);
        let data = AccessData {
            value: u64::from_le_bytes(value),
            size: size as u8,
        };
        pending.ask(Exit::MmioWrite {
            addr: GuestPhysAddr::new(addr.wrapping_add(at as u64)),
            data,
        })?;
        at += size;
    }
    Ok(())
}

/// Little-endian bytes of an integer, padded to sixteen.
pub(crate) trait Bytes: Sized {
    fn from_bytes(bytes: [u8; 16]) -> Self;
    fn to_bytes(self) -> [u8; 16];
}

macro_rules! bytes {
    ($($t:ty),*) => {$(
        impl Bytes for $t {
            #[inline]
            fn from_bytes(bytes: [u8; 16]) -> Self {
                u128::from_le_bytes(bytes) as $t
            }
            #[inline]
            fn to_bytes(self) -> [u8; 16] {
                (self as u128).to_le_bytes()
            }
        }
    )*};
}
bytes!(u8, u16, u32, u64, u128);
