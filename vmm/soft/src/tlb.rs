//! The software TLB.
//!
//! Purpose: remember which linear pages map to which RAM pages, for which kinds of access.
//! Invariants: an entry exists for a kind of access only if that access needs no check and no accessed or dirty bit any
//! more. Only RAM is held. One table for user accesses, one for supervisor accesses; both belong to one root and one
//! setting of the protection bits, and are emptied when those change.
//! Elsewhere: filling ([`crate::memory`]).

use x86::paging::AccessKind;

const ENTRIES: usize = 1024;
/// No linear page has this number.
const NONE: u64 = u64::MAX;

#[derive(Clone, Copy)]
struct Entry {
    /// Linear page number if loads may use it.
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
        (tag == page).then_some(entry.page | linear & 0xfff)
    }

    /// Remembers that the page at `linear` is the RAM page at `page`, and that accesses of this kind are allowed.
    pub(crate) fn insert(&mut self, linear: u64, page: u64, kind: AccessKind, user: bool) {
        self.used = true;
        let number = linear >> 12;
        let entry = &mut self.entries[usize::from(user)][index(number)];
        let known = [entry.read, entry.write, entry.fetch].contains(&number);
        if !known || entry.page != page {
            *entry = Entry { page, ..EMPTY };
        }
        match kind {
            AccessKind::Read => entry.read = number,
            AccessKind::Write => {
                // A page that may be written may be read (SDM vol. 3A, 4.6).
                entry.write = number;
                entry.read = number;
            }
            AccessKind::Execute => entry.fetch = number,
        }
    }

    /// Forgets everything.
    pub(crate) fn flush(&mut self) {
        if self.used {
            self.entries[0].fill(EMPTY);
            self.entries[1].fill(EMPTY);
            self.used = false;
        }
    }
}
