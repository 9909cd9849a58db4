//! The software TLB.
//!
//! Purpose: remember which linear pages map to which RAM pages, for which kinds of access.
//! Invariants: an entry exists for a kind of access only if that access needs no check and no accessed or dirty bit any
//! more. Only RAM is held. One table for user accesses, one for supervisor accesses; both belong to one root and one
//! setting of the protection bits, and are emptied when those change.
//! Elsewhere: filling ([`crate::memory`]).

use x86::paging::AccessKind;

const ENTRIES: usize = 1024;
/// No tag is this: page numbers have 52 bits, and the last generation is not used.
const NONE: u64 = u64::MAX;
/// A tag is a linear page number with the generation above it, so that emptying the table is counting on.
const GENERATION: u64 = 1 << 52;

#[derive(Clone, Copy)]
struct Entry {
    /// The tag if loads may use it.
    read: u64,
    /// The same for stores.
    write: u64,
    /// The same for fetches.
    fetch: u64,
    /// Guest-physical address of the page.
    page: u64,
}

const EMPTY: Entry = Entry {
    read: NONE,
    write: NONE,
    fetch: NONE,
    page: 0,
};

/// See the module.
pub(crate) struct Tlb {
    entries: [Box<[Entry; ENTRIES]>; 2],
    generation: u64,
    used: bool,
}

impl std::fmt::Debug for Tlb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tlb")
    }
}

#[inline]
fn index(page: u64) -> usize {
    (page ^ page >> 10) as usize % ENTRIES
}

impl Tlb {
    pub(crate) fn new() -> Self {
        Self {
            entries: std::array::from_fn(|_| Box::new([EMPTY; ENTRIES])),
            generation: 0,
            used: false,
        }
    }

    /// The guest-physical address of `linear`, if an access of this kind is known to be allowed.
    #[inline]
    pub(crate) fn lookup(&self, linear: u64, kind: AccessKind, user: bool) -> Option<u64> {
        let page = linear >> 12;
        let entry = &self.entries[usize::from(user)][index(page)];
        let tag = match kind {
            AccessKind::Read => entry.read,
            AccessKind::Write => entry.write,
            AccessKind::Execute => entry.fetch,
        };
        (tag == page | self.generation).then_some(entry.page | linear & 0xfff)
    }

    /// Remembers that the page at `linear` is the RAM page at `page`, and that accesses of this kind are allowed.
    pub(crate) fn insert(&mut self, linear: u64, page: u64, kind: AccessKind, user: bool) {
        self.used = true;
        let number = linear >> 12;
        let tag = number | self.generation;
        let entry = &mut self.entries[usize::from(user)][index(number)];
        let known = [entry.read, entry.write, entry.fetch].contains(&tag);
        if !known || entry.page != page {
            *entry = Entry { page, ..EMPTY };
        }
        match kind {
            AccessKind::Read => entry.read = tag,
            AccessKind::Write => {
                // A page that may be written may be read (SDM vol. 3A, 4.6).
                entry.write = tag;
                entry.read = tag;
            }
            AccessKind::Execute => entry.fetch = tag,
        }
    }

    /// Forgets everything.
    pub(crate) fn flush(&mut self) {
        if !self.used {
            return;
        }
        self.used = false;
        self.generation = self.generation.wrapping_add(GENERATION);
        if self.generation.wrapping_add(GENERATION) == 0 {
            self.entries[0].fill(EMPTY);
            self.entries[1].fill(EMPTY);
            self.generation = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_access_are_apart_and_a_flush_forgets_all() {
        let mut tlb = Tlb::new();
        for round in 0..10_000u64 {
            let linear = 0xffff_8000_0000_0000 | round << 12;
            tlb.insert(linear, 0x5000, AccessKind::Read, false);
            assert_eq!(
                tlb.lookup(linear | 0x123, AccessKind::Read, false),
                Some(0x5123)
            );
            assert_eq!(tlb.lookup(linear, AccessKind::Write, false), None);
            assert_eq!(tlb.lookup(linear, AccessKind::Read, true), None);
            tlb.insert(linear, 0x5000, AccessKind::Write, false);
            assert_eq!(tlb.lookup(linear, AccessKind::Read, false), Some(0x5000));
            tlb.insert(linear, 0x6000, AccessKind::Execute, false);
            assert_eq!(
                tlb.lookup(linear, AccessKind::Read, false),
                None,
                "another page"
            );
            tlb.flush();
            assert_eq!(tlb.lookup(linear, AccessKind::Execute, false), None);
        }
    }
}
