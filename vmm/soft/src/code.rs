//! The decoded-instruction cache.
//!
//! Purpose: decode each instruction once, per physical page and code size.
//! Invariants: what is executed is what memory holds: a store to bytes that were decoded forgets the page's operations before
//! the next instruction; after code ran natively ([`Code::doubt`]) a page is compared with the bytes it was decoded from before
//! it is used again. Instructions that cross a page are kept by their bytes, which are fetched each time.
//! Operations hold stubs, so both are emptied together.
//! Elsewhere: translation of the fetch ([`crate::memory`]).

use crate::decode::{Decoded, MAX_LEN, decode};
use crate::memory::Memory;
use crate::op::Op;
use crate::stub::Stubs;
use std::collections::HashMap;

const PAGE: usize = 4096;
/// Granularity at which stores are told apart from code.
const CHUNK: usize = 64;
/// Decoded instructions held before everything is forgotten: some 200 MB.
const MAX_OPS: usize = 1 << 20;
/// Pages held: some 200 MB of indices.
const MAX_PAGES: usize = 1 << 14;
/// Instructions that cross pages held at once.
const MAX_CROSSING: usize = 1 << 14;

struct CodePage {
    /// Guest-physical address.
    addr: u64,
    /// 1 + index into `ops` by offset in the page; 0 where nothing is decoded.
    index: Box<[u16; PAGE]>,
    ops: Vec<Op>,
    /// Bit n: chunk n holds decoded bytes.
    chunks: u64,
    /// The decoded bytes, in the chunks that hold any.
    bytes: Box<[u8; PAGE]>,
    /// The doubt that was last settled.
    settled: u64,
}

/// Where an operation is: a page's number above the operation's in it. One small integer, so that it travels in a register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Slot(u32);

impl Slot {
    /// The instruction that crosses a page.
    const CROSSING: Self = Self(u32::MAX);

    fn new(page: u32, op: u16) -> Self {
        Self(page << 12 | u32::from(op) & 0xfff)
    }
}

/// Why there is no operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum NoOp {
    /// The instruction continues on the next page.
    Short,
}

/// See the module.
pub(crate) struct Code {
    stubs: Stubs,
    pages: Vec<CodePage>,
    by_address: HashMap<(u64, u8), u32>,
    crossing: HashMap<([u8; MAX_LEN], u8, u8), Op>,
    crossed: Option<Op>,
    ops: usize,
    doubt: u64,
}

impl std::fmt::Debug for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Code({} pages, {} instructions)",
            self.pages.len(),
            self.ops
        )
    }
}

impl Code {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self {
            stubs: Stubs::new()?,
            pages: Vec::new(),
            by_address: HashMap::new(),
            crossing: HashMap::new(),
            crossed: None,
            ops: 0,
            doubt: 0,
        })
    }

    /// The operation in a slot just found.
    #[inline]
    pub(crate) fn get(&self, slot: Slot) -> Option<&Op> {
        if slot == Slot::CROSSING {
            return self.crossed.as_ref();
        }
        let page = self.pages.get((slot.0 >> 12) as usize)?;
        page.ops.get((slot.0 & 0xfff) as usize)
    }

    /// The page's number, for [`Self::cached`] and [`Self::decode`].
    pub(crate) fn page(&mut self, mem: &mut Memory, addr: u64, bits: u8) -> u32 {
        let addr = addr & !0xfff;
        let number = match self.by_address.get(&(addr, bits)) {
            Some(&number) => number,
            None => {
                if self.pages.len() >= MAX_PAGES {
                    self.flush(mem);
                    self.pages.clear();
                    self.by_address.clear();
                    // Page numbers are given anew: windows on the old ones must close.
                    mem.epoch += 1;
                }
                let number = self.pages.len() as u32;
                self.pages.push(CodePage {
                    addr,
                    index: Box::new([0; PAGE]),
                    ops: Vec::new(),
                    chunks: 0,
                    bytes: Box::new([0; PAGE]),
                    settled: self.doubt,
                });
                self.by_address.insert((addr, bits), number);
                number
            }
        };
        self.settle(mem, number);
        number
    }

    /// The operation at an offset in a page, if it is decoded.
    #[inline]
    pub(crate) fn cached(&self, page: u32, offset: usize) -> Option<Slot> {
        let index = *self.pages.get(page as usize)?.index.get(offset)?;
        Some(Slot::new(page, index.checked_sub(1)?))
    }

    /// Decodes the instruction at an offset in a page.
    pub(crate) fn decode(
        &mut self,
        mem: &mut Memory,
        page: u32,
        bits: u8,
        offset: usize,
    ) -> Result<Slot, NoOp> {
        let Some(addr) = self.pages.get(page as usize).map(|page| page.addr) else {
            return Err(NoOp::Short);
        };
        let mut bytes = [0; MAX_LEN];
        let len = (PAGE - offset).min(MAX_LEN);
        mem.ram.read(addr + offset as u64, &mut bytes[..len]);
        let op = self.decode_bytes(&bytes[..len], bits).ok_or(NoOp::Short)?;
        if self.ops >= MAX_OPS {
            self.flush(mem);
        }
        mem.mark_code(addr);
        let Some(page_ref) = self.pages.get_mut(page as usize) else {
            return Err(NoOp::Short);
        };
        page_ref.ops.push(op);
        let index = page_ref.ops.len() as u16;
        page_ref.index[offset] = index;
        let end = offset + usize::from(op.len).max(1) - 1;
        for chunk in offset / CHUNK..=end.min(PAGE - 1) / CHUNK {
            if page_ref.chunks & 1 << chunk == 0 {
                page_ref.chunks |= 1 << chunk;
                let at = chunk * CHUNK;
                mem.ram
                    .read(addr + at as u64, &mut page_ref.bytes[at..at + CHUNK]);
            }
        }
        self.ops += 1;
        Ok(Slot::new(page, index - 1))
    }

    /// The operation of bytes fetched from two pages; `None` if even they are too few.
    pub(crate) fn decode_crossing(&mut self, bytes: &[u8], bits: u8) -> Option<Slot> {
        let mut key = [0; MAX_LEN];
        let len = bytes.len().min(MAX_LEN);
        key[..len].copy_from_slice(&bytes[..len]);
        let key = (key, len as u8, bits);
        if let Some(&op) = self.crossing.get(&key) {
            self.crossed = Some(op);
            return Some(Slot::CROSSING);
        }
        let op = self.decode_bytes(&bytes[..len], bits)?;
        if self.crossing.len() >= MAX_CROSSING {
            self.crossing.clear();
        }
        self.crossing.insert(key, op);
        self.crossed = Some(op);
        Some(Slot::CROSSING)
    }

    fn decode_bytes(&mut self, bytes: &[u8], bits: u8) -> Option<Op> {
        for _ in 0..2 {
            match decode(&mut self.stubs, u32::from(bits), bytes, 0) {
                Decoded::Op(op) => return Some(*op),
                Decoded::Short => return None,
                Decoded::Full => self.forget_all(),
            }
        }
        None
    }

    /// Memory was written: forgets what was decoded from those bytes.
    pub(crate) fn written(&mut self, mem: &mut Memory, addr: u64, len: u64) {
        let base = addr & !0xfff;
        let first = (addr & 0xfff) as usize / CHUNK;
        let last = ((addr & 0xfff) + len.max(1) - 1).min(0xfff) as usize / CHUNK;
        let mask = (first..=last).fold(0u64, |mask, chunk| mask | 1 << chunk);
        let mut left = false;
        for bits in [16, 32, 64] {
            let Some(&number) = self.by_address.get(&(base, bits)) else {
                continue;
            };
            let Some(page) = self.pages.get_mut(number as usize) else {
                continue;
            };
            if page.chunks & mask != 0 {
                self.ops -= page.ops.len();
                page.forget();
            }
            left |= page.chunks != 0;
        }
        if !left {
            mem.unmark_code(base);
        }
    }

    /// Any memory may have changed: pages are compared with what was decoded before they are used again.
    pub(crate) fn doubt(&mut self) {
        self.doubt += 1;
    }

    fn settle(&mut self, mem: &Memory, number: u32) {
        let doubt = self.doubt;
        let Some(page) = self.pages.get_mut(number as usize) else {
            return;
        };
        if page.settled == doubt {
            return;
        }
        page.settled = doubt;
        let mut now = [0; CHUNK];
        for chunk in (0..PAGE / CHUNK).filter(|chunk| page.chunks & 1 << chunk != 0) {
            let at = chunk * CHUNK;
            mem.ram.read(page.addr + at as u64, &mut now);
            if now != page.bytes[at..at + CHUNK] {
                self.ops -= page.ops.len();
                page.forget();
                return;
            }
        }
    }

    fn flush(&mut self, mem: &mut Memory) {
        for page in &mut self.pages {
            mem.unmark_code(page.addr);
        }
        self.forget_all();
    }

    /// Forgets every operation and stub. Pages keep their numbers and marks.
    fn forget_all(&mut self) {
        for page in &mut self.pages {
            page.forget();
        }
        self.crossing.clear();
        self.crossed = None;
        self.ops = 0;
        self.stubs.flush();
    }
}

impl CodePage {
    fn forget(&mut self) {
        self.index.fill(0);
        self.ops.clear();
        self.chunks = 0;
    }
}
