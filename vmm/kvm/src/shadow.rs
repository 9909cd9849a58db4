//! Page tables that KVM has copied.
//!
//! Purpose: a KVM without nested paging runs ring 3 on shadow page tables, and keeps them in step with the guest's own tables only where
//! the guest wrote those through KVM. [`Tables`] tells whether what we wrote (single steps, a debugger) changed any.
//! Invariants: never misses a change of a table that user mappings are made from; accessed and dirty bits do not count as a change.
//! Elsewhere: dropping the shadows ([`crate::slots::Slots::drop_shadows`]).
//! Source: Linux `Documentation/virt/kvm/x86/mmu.rst`; Intel SDM vol. 3A, 4.5.

use machine::{GuestMemory, PageSet};
use std::collections::BTreeMap;
use x86::paging::{EntryFlags, PagingContext, PagingMode};
use x86::{CpuState, GuestPhysAddr, PAGE_SIZE, PageFrame};

const ENTRIES: usize = 512;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// A root, and three levels of tables below it.
const LEVELS: u32 = 4;

/// The tables that were in use when KVM last entered ring 3, with a digest of each.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    known: BTreeMap<PageFrame, u64>,
}

impl Tables {
    /// Whether writing the pages of `written` changed a table that `cpu`'s user mappings, or earlier ones, are made from.
    pub(crate) fn changed(
        &mut self,
        cpu: &CpuState,
        memory: &GuestMemory,
        written: &PageSet,
    ) -> bool {
        let context = PagingContext::of(cpu);
        if context.mode != PagingMode::FourLevel {
            return true;
        }
        let mut present = BTreeMap::new();
        let root = PageFrame::containing(GuestPhysAddr::new(context.cr3 & ADDRESS));
        collect(memory, root, LEVELS, &mut present);
        let mut changed = false;
        for &page in written {
            let now = present
                .get(&page)
                .copied()
                .or_else(|| Some(digest(&read(memory, page)?)));
            match self.known.get(&page) {
                Some(before) => changed |= now != Some(*before),
                None => changed |= present.contains_key(&page),
            }
        }
        if changed {
            self.known.clear();
        }
        self.known.append(&mut present);
        changed
    }
}

/// Adds the table `page` and those below it that user accesses can come by.
fn collect(
    memory: &GuestMemory,
    page: PageFrame,
    level: u32,
    found: &mut BTreeMap<PageFrame, u64>,
) {
    if found.contains_key(&page) {
        return;
    }
    let Some(entries) = read(memory, page) else {
        return;
    };
    found.insert(page, digest(&entries));
    if level == 1 {
        return;
    }
    for entry in entries {
        let flags = EntryFlags::from_bits_truncate(entry);
        if flags.contains(EntryFlags::P | EntryFlags::US) && !flags.contains(EntryFlags::PS) {
            let next = PageFrame::containing(GuestPhysAddr::new(entry & ADDRESS));
            collect(memory, next, level - 1, found);
        }
    }
}

fn read(memory: &GuestMemory, page: PageFrame) -> Option<[u64; ENTRIES]> {
    let mut bytes = [0; PAGE_SIZE as usize];
    memory.read(page.base(), &mut bytes).ok()?;
    let mut entries = [0; ENTRIES];
    for (entry, bytes) in entries.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *entry = u64::from_le_bytes(*bytes);
    }
    Some(entries)
}

/// A hash of what translation depends on.
fn digest(entries: &[u64; ENTRIES]) -> u64 {
    let volatile = (EntryFlags::A | EntryFlags::D).bits();
    entries
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, entry| {
            (hash ^ (entry & !volatile))
                .wrapping_mul(0x0000_0100_0000_01b3)
                .rotate_left(23)
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86::regs::{Cr0, Cr4, Efer};

    const PML4: u64 = 0x1000;
    const PDPT: u64 = 0x2000;
    const PD: u64 = 0x3000;
    const PT: u64 = 0x4000;

    fn put(memory: &GuestMemory, addr: u64, value: u64) -> PageSet {
        memory
            .write(GuestPhysAddr::new(addr), &value.to_le_bytes())
            .expect("RAM");
        [PageFrame::containing(GuestPhysAddr::new(addr))].into()
    }

    fn machine() -> (CpuState, GuestMemory) {
        let memory = GuestMemory::new(1 << 20).expect("memory");
        for (table, next) in [(PML4, PDPT), (PDPT, PD), (PD, PT)] {
            put(&memory, table, next | 7);
        }
        put(&memory, PT, 0x8007);
        let cpu = CpuState {
            cr0: Cr0::PE | Cr0::PG,
            cr3: PML4,
            cr4: Cr4::PAE,
            efer: Efer::LME | Efer::LMA,
            ..CpuState::default()
        };
        (cpu, memory)
    }

    #[test]
    fn a_changed_entry_counts_and_accessed_bits_do_not() {
        let (cpu, memory) = machine();
        let mut tables = Tables::default();
        assert!(!tables.changed(&cpu, &memory, &PageSet::new()));
        let written = put(&memory, PT, 0x8067);
        assert!(
            !tables.changed(&cpu, &memory, &written),
            "accessed and dirty"
        );
        let written = put(&memory, PT, 0x9067);
        assert!(tables.changed(&cpu, &memory, &written), "another page");
        assert!(!tables.changed(&cpu, &memory, &written), "seen now");
    }

    #[test]
    fn a_table_that_is_linked_later_counts_when_it_is_written() {
        let (cpu, memory) = machine();
        let mut tables = Tables::default();
        tables.changed(&cpu, &memory, &PageSet::new());
        // KVM itself links the table; then we write it.
        put(&memory, PD + 8, 0x5007);
        let written = put(&memory, 0x5000, 0x8007);
        assert!(tables.changed(&cpu, &memory, &written));
    }

    #[test]
    fn other_pages_and_supervisor_tables_do_not_count() {
        let (cpu, memory) = machine();
        put(&memory, PD + 8, 0x5003);
        let mut tables = Tables::default();
        tables.changed(&cpu, &memory, &PageSet::new());
        for addr in [0x8000, 0x5000] {
            let written = put(&memory, addr, 0x1234);
            assert!(!tables.changed(&cpu, &memory, &written), "{addr:#x}");
        }
    }

    #[test]
    fn tables_of_an_earlier_root_still_count() {
        let (mut cpu, memory) = machine();
        let mut tables = Tables::default();
        tables.changed(&cpu, &memory, &PageSet::new());
        put(&memory, 0x6000, 0);
        cpu.cr3 = 0x6000;
        tables.changed(&cpu, &memory, &PageSet::new());
        let written = put(&memory, PT, 0x9007);
        assert!(tables.changed(&cpu, &memory, &written));
    }
}
