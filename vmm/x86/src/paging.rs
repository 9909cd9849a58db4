//! Page tables: formats, and the walk.
//!
//! Purpose: translate a linear address by reading guest page tables, in every format up to four levels, reporting
//! each entry on the way; say whether an access is allowed and, if not, with which error code it faults.
//! Invariants: a walk reads memory and changes nothing (accessed and dirty bits are set by the engine that executes);
//! it is bounded by the number of levels whatever the tables contain. Addresses in entries are masked to 52 bits.
//! Elsewhere: the caches of translations (`vmm/soft`); display of tables (`introspect`).
//! Source: Intel SDM vol. 3A, 4.3 (32-bit), 4.4 (PAE), 4.5 (4-level), 4.6 (access rights), 4.7 (error code).

use crate::regs::{Cr0, Cr4, Efer, rflags};
use crate::{CpuState, GuestPhysAddr, GuestVirtAddr};
use bitflags::bitflags;
use serde::{Deserialize, Serialize};

/// Guest physical memory as a table walk sees it. `None`: no RAM there.
pub trait TableMemory {
    /// Eight little-endian bytes.
    fn read_u64(&self, addr: GuestPhysAddr) -> Option<u64>;
    /// Four little-endian bytes.
    fn read_u32(&self, addr: GuestPhysAddr) -> Option<u32>;
}

/// How linear addresses are translated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PagingMode {
    /// CR0.PG clear: linear is physical.
    None,
    /// 32-bit paging, two levels; `pse` allows 4 MiB pages.
    Bits32 {
        /// CR4.PSE.
        pse: bool,
    },
    /// PAE paging, three levels.
    Pae,
    /// 4-level paging.
    FourLevel,
}

/// All that decides a translation besides memory: mode, root and protection controls.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PagingContext {
    /// The format.
    pub mode: PagingMode,
    /// CR3 as loaded.
    pub cr3: u64,
    /// CR0.WP.
    pub wp: bool,
    /// EFER.NXE.
    pub nxe: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// RFLAGS.AC, which lifts SMAP for explicit accesses.
    pub ac: bool,
}

impl PagingContext {
    /// The context a CPU is in.
    pub fn of(cpu: &CpuState) -> Self {
        let mode = if !cpu.cr0.contains(Cr0::PG) {
            PagingMode::None
        } else if !cpu.cr4.contains(Cr4::PAE) {
            PagingMode::Bits32 {
                pse: cpu.cr4.contains(Cr4::PSE),
            }
        } else if cpu.efer.contains(Efer::LMA) {
            PagingMode::FourLevel
        } else {
            PagingMode::Pae
        };
        Self {
            mode,
            cr3: cpu.cr3,
            wp: cpu.cr0.contains(Cr0::WP),
            nxe: cpu.efer.contains(Efer::NXE),
            smep: cpu.cr4.contains(Cr4::SMEP),
            smap: cpu.cr4.contains(Cr4::SMAP),
            ac: cpu.regs.rflags & rflags::AC != 0,
        }
    }
}

#[allow(missing_docs)] // The names are the SDM's.
mod flags {
    use super::*;

    bitflags! {
        /// Bits of a paging-structure entry (the same in all formats; NX only in 64-bit entries).
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub struct EntryFlags: u64 {
            const P = 1 << 0;
            const RW = 1 << 1;
            const US = 1 << 2;
            const PWT = 1 << 3;
            const PCD = 1 << 4;
            const A = 1 << 5;
            const D = 1 << 6;
            /// Page size in a directory entry; PAT in a table entry.
            const PS = 1 << 7;
            const G = 1 << 8;
            const NX = 1 << 63;
        }

        /// The error code of #PF.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct PageFaultCode: u32 {
            const P = 1 << 0;
            const W = 1 << 1;
            const U = 1 << 2;
            const RSVD = 1 << 3;
            const I = 1 << 4;
        }
    }
}

pub use flags::{EntryFlags, PageFaultCode};

/// Read, write or instruction fetch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum AccessKind {
    Read,
    Write,
    Execute,
}

/// An access to be checked against a translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access {
    /// What is done.
    pub kind: AccessKind,
    /// A user-mode access: CPL 3 and explicit.
    pub user: bool,
    /// An implicit supervisor access (descriptor tables, TSS): SMAP holds whatever RFLAGS.AC says.
    pub implicit: bool,
}

/// One entry on the way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WalkStep {
    /// 4 = PML4E, 3 = PDPTE, 2 = PDE, 1 = PTE.
    pub level: u8,
    /// Where the entry lies.
    pub addr: GuestPhysAddr,
    /// Its value; 32-bit entries are zero-extended.
    pub entry: u64,
    /// Whether its bits 1 and 2 restrict access (not so in a PAE PDPTE).
    pub restricts: bool,
}

impl WalkStep {
    /// The entry's flag bits.
    pub const fn flags(&self) -> EntryFlags {
        EntryFlags::from_bits_truncate(self.entry)
    }
}

/// A finished translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// The physical address of the byte asked for.
    pub addr: GuestPhysAddr,
    /// Bytes in the page that maps it: 4 KiB, 2 MiB, 4 MiB or 1 GiB.
    pub page_size: u64,
    /// Writes allowed by every level.
    pub writable: bool,
    /// User accesses allowed by every level.
    pub user: bool,
    /// Fetches allowed by every level.
    pub executable: bool,
    /// Global bit of the leaf.
    pub global: bool,
}

/// Why a walk ended without a translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WalkFault {
    /// The last step's entry is not present.
    NotPresent,
    /// The last step's entry has reserved bits set.
    ReservedBit,
    /// The table at this address is not in RAM.
    NoMemory(GuestPhysAddr),
    /// The linear address is not canonical.
    NonCanonical,
}

/// A walk: the entries read, and how it ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Walk {
    steps: [WalkStep; 4],
    len: u8,
    /// The translation, or why there is none.
    pub outcome: Result<Translation, WalkFault>,
}

const ADDR_MASK: u64 = 0x000f_ffff_ffff_f000;

/// Guest-physical addresses have this many bits in every CPU model here (CPUID 8000_0008h).
pub const PHYS_ADDR_BITS: u32 = 40;

impl Walk {
    /// The entries read, root first.
    pub fn steps(&self) -> &[WalkStep] {
        &self.steps[..self.len as usize]
    }

    fn new() -> Self {
        let none = WalkStep {
            level: 0,
            addr: GuestPhysAddr::new(0),
            entry: 0,
            restricts: false,
        };
        Self {
            steps: [none; 4],
            len: 0,
            outcome: Err(WalkFault::NotPresent),
        }
    }

    fn push(&mut self, step: WalkStep) {
        self.steps[self.len as usize] = step;
        self.len += 1;
    }
}

/// Translates `addr` by reading the tables of `context` in `memory`.
pub fn walk(context: &PagingContext, memory: &impl TableMemory, addr: GuestVirtAddr) -> Walk {
    let mut walk = Walk::new();
    walk.outcome = match context.mode {
        PagingMode::None => Ok(Translation {
            addr: GuestPhysAddr::new(addr.get()),
            page_size: crate::PAGE_SIZE,
            writable: true,
            user: true,
            executable: true,
            global: false,
        }),
        PagingMode::Bits32 { pse } => walk_32(&mut walk, context, memory, addr, pse),
        PagingMode::Pae => walk_64(&mut walk, context, memory, addr, 3),
        PagingMode::FourLevel if !addr.is_canonical() => Err(WalkFault::NonCanonical),
        PagingMode::FourLevel => walk_64(&mut walk, context, memory, addr, 4),
    };
    walk
}

fn walk_64(
    walk: &mut Walk,
    context: &PagingContext,
    memory: &impl TableMemory,
    addr: GuestVirtAddr,
    top: u8,
) -> Result<Translation, WalkFault> {
    let pae = top == 3;
    let mut table = context.cr3 & if pae { 0xffff_ffe0 } else { ADDR_MASK };
    let mut rights = Rights::ALL;
    for level in (1..=top).rev() {
        let shift = 12 + 9 * u64::from(level - 1);
        let index = addr.get() >> shift & if pae && level == 3 { 3 } else { 0x1ff };
        let at = GuestPhysAddr::new(table + 8 * index);
        let entry = memory.read_u64(at).ok_or(WalkFault::NoMemory(at))?;
        let restricts = !(pae && level == 3);
        let step = WalkStep {
            level,
            addr: at,
            entry,
            restricts,
        };
        walk.push(step);
        let flags = step.flags();
        if !flags.contains(EntryFlags::P) {
            return Err(WalkFault::NotPresent);
        }
        let large = flags.contains(EntryFlags::PS) && (level == 2 || level == 3 && !pae);
        if reserved_bits_set(context, entry, level, pae, large) {
            return Err(WalkFault::ReservedBit);
        }
        if restricts {
            rights.restrict(flags);
        }
        if level == 1 || large {
            return Ok(rights.leaf(entry & ADDR_MASK, shift, addr, flags));
        }
        table = entry & ADDR_MASK;
    }
    unreachable_level()
}

/// The loops above end at level 1; this keeps the function total without a panic.
fn unreachable_level() -> Result<Translation, WalkFault> {
    Err(WalkFault::NotPresent)
}

fn reserved_bits_set(
    context: &PagingContext,
    entry: u64,
    level: u8,
    pae: bool,
    large: bool,
) -> bool {
    let mut reserved = ADDR_MASK & !((1 << PHYS_ADDR_BITS) - 1);
    if !context.nxe || pae && level == 3 {
        reserved |= EntryFlags::NX.bits();
    }
    if pae {
        reserved |= 0x7ff0_0000_0000_0000;
    }
    if pae && level == 3 {
        reserved |= 0x1e6;
    }
    if level == 4 {
        reserved |= EntryFlags::PS.bits();
    }
    if large {
        // Bits below the page's size, except 12 (PAT).
        reserved |= ((1u64 << (12 + 9 * u32::from(level - 1))) - 1) & !0x1fff;
    }
    entry & reserved != 0
}

fn walk_32(
    walk: &mut Walk,
    context: &PagingContext,
    memory: &impl TableMemory,
    addr: GuestVirtAddr,
    pse: bool,
) -> Result<Translation, WalkFault> {
    let mut rights = Rights::ALL;
    let mut table = context.cr3 & 0xffff_f000;
    for level in [2u8, 1] {
        let shift = 12 + 10 * u64::from(level - 1);
        let at = GuestPhysAddr::new(table + 4 * (addr.get() >> shift & 0x3ff));
        let entry = u64::from(memory.read_u32(at).ok_or(WalkFault::NoMemory(at))?);
        let step = WalkStep {
            level,
            addr: at,
            entry,
            restricts: true,
        };
        walk.push(step);
        let flags = step.flags();
        if !flags.contains(EntryFlags::P) {
            return Err(WalkFault::NotPresent);
        }
        rights.restrict(flags);
        if level == 2 && pse && flags.contains(EntryFlags::PS) {
            // PSE-36: bits 20:13 are address bits 39:32; bit 21 is reserved.
            if entry & 1 << 21 != 0 {
                return Err(WalkFault::ReservedBit);
            }
            let base = entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32;
            return Ok(rights.leaf(base, shift, addr, flags));
        }
        table = entry & 0xffff_f000;
        if level == 1 {
            return Ok(rights.leaf(table, shift, addr, flags));
        }
    }
    unreachable_level()
}

#[derive(Clone, Copy)]
struct Rights {
    writable: bool,
    user: bool,
    executable: bool,
}

impl Rights {
    const ALL: Self = Self {
        writable: true,
        user: true,
        executable: true,
    };

    fn restrict(&mut self, flags: EntryFlags) {
        self.writable &= flags.contains(EntryFlags::RW);
        self.user &= flags.contains(EntryFlags::US);
        self.executable &= !flags.contains(EntryFlags::NX);
    }

    fn leaf(self, base: u64, shift: u64, addr: GuestVirtAddr, flags: EntryFlags) -> Translation {
        let page_size = 1u64 << shift;
        let offset = page_size - 1;
        Translation {
            addr: GuestPhysAddr::new(base & !offset | addr.get() & offset),
            page_size,
            writable: self.writable,
            user: self.user,
            executable: self.executable,
            global: flags.contains(EntryFlags::G),
        }
    }
}

/// Whether `access` may use `translation`; if not, the error code of the page fault.
pub fn check(
    context: &PagingContext,
    translation: &Translation,
    access: Access,
) -> Result<(), PageFaultCode> {
    if context.mode == PagingMode::None {
        return Ok(());
    }
    let supervisor_denied = || {
        translation.user
            && match access.kind {
                AccessKind::Execute => context.smep,
                _ => context.smap && (access.implicit || !context.ac),
            }
    };
    let denied = match (access.user, access.kind) {
        (true, _) if !translation.user => true,
        (true, AccessKind::Write) => !translation.writable,
        (false, AccessKind::Write) => context.wp && !translation.writable || supervisor_denied(),
        (false, _) if supervisor_denied() => true,
        (_, AccessKind::Execute) => !translation.executable,
        (_, AccessKind::Read) => false,
    };
    if denied {
        Err(fault_code(context, access, PageFaultCode::P))
    } else {
        Ok(())
    }
}

/// The error code when the walk itself failed.
pub fn walk_fault_code(context: &PagingContext, fault: WalkFault, access: Access) -> PageFaultCode {
    let base = match fault {
        WalkFault::ReservedBit => PageFaultCode::P | PageFaultCode::RSVD,
        _ => PageFaultCode::empty(),
    };
    fault_code(context, access, base)
}

fn fault_code(context: &PagingContext, access: Access, base: PageFaultCode) -> PageFaultCode {
    let mut code = base;
    code.set(PageFaultCode::W, access.kind == AccessKind::Write);
    code.set(PageFaultCode::U, access.user);
    // The I bit is defined only where fetches can be told apart (SDM 4.7).
    let tells_fetches =
        context.nxe && !matches!(context.mode, PagingMode::Bits32 { .. }) || context.smep;
    code.set(
        PageFaultCode::I,
        access.kind == AccessKind::Execute && tells_fetches,
    );
    code
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// Every read answers with a value that depends only on the address: tables an adversary might write.
    struct Hostile(u64);

    impl TableMemory for Hostile {
        fn read_u64(&self, addr: GuestPhysAddr) -> Option<u64> {
            let mixed = (addr.get() ^ self.0).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (mixed & 0x1f != 0).then_some(mixed.rotate_left(17) | 1)
        }
        fn read_u32(&self, addr: GuestPhysAddr) -> Option<u32> {
            self.read_u64(addr).map(|value| value as u32)
        }
    }

    proptest! {
        #[test]
        fn any_tables_give_an_outcome_within_four_steps(seed: u64, cr3: u64, at: u64, mode in 0..4) {
            let mode = [
                PagingMode::Bits32 { pse: true },
                PagingMode::Bits32 { pse: false },
                PagingMode::Pae,
                PagingMode::FourLevel,
            ][mode as usize];
            let walk = walk(&PagingContext { cr3, ..context(mode) }, &Hostile(seed), GuestVirtAddr::new(at));
            prop_assert!(walk.steps().len() <= 4);
            if let Ok(translation) = walk.outcome {
                let offset = translation.page_size - 1;
                prop_assert_eq!(translation.addr.get() & offset, at & offset);
                prop_assert!(translation.addr.get() < 1 << 52);
            }
        }
    }

    struct Tables(BTreeMap<u64, u64>);

    impl TableMemory for Tables {
        fn read_u64(&self, addr: GuestPhysAddr) -> Option<u64> {
            Some(self.0.get(&addr.get()).copied().unwrap_or(0))
        }
        fn read_u32(&self, addr: GuestPhysAddr) -> Option<u32> {
            Some(self.0.get(&addr.get()).copied().unwrap_or(0) as u32)
        }
    }

    fn context(mode: PagingMode) -> PagingContext {
        PagingContext {
            mode,
            cr3: 0x1000,
            wp: true,
            nxe: true,
            smep: true,
            smap: true,
            ac: false,
        }
    }

    const READ: Access = Access {
        kind: AccessKind::Read,
        user: false,
        implicit: false,
    };
    const USER_WRITE: Access = Access {
        kind: AccessKind::Write,
        user: true,
        implicit: false,
    };
    const FETCH: Access = Access {
        kind: AccessKind::Execute,
        user: false,
        implicit: false,
    };

    #[test]
    fn four_levels_reach_a_4k_page() {
        let tables = Tables(BTreeMap::from([
            (0x1000, 0x2003),
            (0x2000, 0x3003),
            (0x3000, 0x4003),
            (0x4000 + 8 * 5, 0xabc000 | 3),
        ]));
        let walk = walk(
            &context(PagingMode::FourLevel),
            &tables,
            GuestVirtAddr::new(0x5123),
        );
        let translation = walk.outcome.expect("maps");
        assert_eq!(translation.addr, GuestPhysAddr::new(0xab_c123));
        assert_eq!(walk.steps().len(), 4);
        assert!(translation.writable && !translation.user && translation.executable);
    }

    #[test]
    fn large_page_keeps_the_low_bits_and_rejects_reserved_ones() {
        let mut map = BTreeMap::from([(0x1000, 0x2003), (0x2000, 0x3003), (0x3008, 0x60_0083)]);
        let at = GuestVirtAddr::new(0x23_4567);
        let ok = walk(&context(PagingMode::FourLevel), &Tables(map.clone()), at);
        assert_eq!(
            ok.outcome.expect("maps").addr,
            GuestPhysAddr::new(0x63_4567)
        );
        map.insert(0x3008, 0x60_2083);
        let bad = walk(&context(PagingMode::FourLevel), &Tables(map), at);
        assert_eq!(bad.outcome, Err(WalkFault::ReservedBit));
        assert_eq!(
            walk_fault_code(
                &context(PagingMode::FourLevel),
                WalkFault::ReservedBit,
                READ
            )
            .bits(),
            9
        );
    }

    #[test]
    fn access_rights_follow_the_table_of_4_6() {
        let context = context(PagingMode::FourLevel);
        let page = Translation {
            addr: GuestPhysAddr::new(0),
            page_size: 4096,
            writable: false,
            user: true,
            executable: true,
            global: false,
        };
        assert_eq!(check(&context, &page, USER_WRITE).unwrap_err().bits(), 7);
        assert_eq!(
            check(&context, &page, FETCH).unwrap_err().bits(),
            0x11,
            "SMEP"
        );
        assert_eq!(check(&context, &page, READ).unwrap_err().bits(), 1, "SMAP");
        let lifted = PagingContext {
            ac: true,
            ..context
        };
        assert_eq!(check(&lifted, &page, READ), Ok(()));
        let implicit = Access {
            implicit: true,
            ..READ
        };
        assert!(
            check(&lifted, &page, implicit).is_err(),
            "AC does not lift implicit accesses"
        );
    }

    #[test]
    fn two_levels_with_pse_pages() {
        let tables = Tables(BTreeMap::from([(0x1004, 0x0080_0083)]));
        let walk = walk(
            &context(PagingMode::Bits32 { pse: true }),
            &tables,
            GuestVirtAddr::new(0x0040_1234),
        );
        assert_eq!(
            walk.outcome.expect("maps").addr,
            GuestPhysAddr::new(0x0080_1234)
        );
        assert_eq!(walk.steps().len(), 1);
    }
}
