//! A page walk, explained.
//!
//! Purpose: how one virtual address is translated, entry by entry, with every bit named, and what the whole allows; or where and why
//! it ends.
//! Invariants: as many lines as entries read, plus a heading and the outcome; nothing is changed.
//! Elsewhere: the walk itself ([`x86::paging`]); bytes behind addresses ([`crate::virtual_memory`]).
//! Source: Intel SDM vol. 3A, tables 4-5 and 4-6 (32-bit), 4-8 to 4-11 (PAE), 4-15 to 4-20 (4-level), section 4.6.

use crate::virtual_memory::entry_name;
use std::fmt;
use x86::paging::{
    EntryFlags, PagingContext, PagingMode, TableMemory, Translation, Walk, WalkFault, WalkStep,
    walk,
};
use x86::{CpuState, GuestVirtAddr};

/// How an address is translated. Display it, or look at the parts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Explanation {
    /// The virtual address.
    pub addr: GuestVirtAddr,
    /// Mode and root.
    pub context: PagingContext,
    /// The walk.
    pub walk: Walk,
}

/// Explains how `addr` is translated on `cpu`.
pub fn explain(cpu: &CpuState, memory: &impl TableMemory, addr: GuestVirtAddr) -> Explanation {
    let context = PagingContext::of(cpu);
    Explanation {
        addr,
        context,
        walk: walk(&context, memory, addr),
    }
}

impl Explanation {
    /// The explanation line by line.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![self.heading()];
        lines.extend(self.walk.steps().iter().map(|step| self.step(step)));
        lines.push(match &self.walk.outcome {
            Ok(translation) => self.success(translation),
            Err(fault) => self.failure(*fault),
        });
        lines
    }

    fn heading(&self) -> String {
        let mode = match self.context.mode {
            PagingMode::None => return format!("{:#x}: paging is off (CR0.PG)", self.addr),
            PagingMode::Bits32 { pse: true } => "32-bit paging with 4 MiB pages (CR4.PSE)",
            PagingMode::Bits32 { pse: false } => "32-bit paging",
            PagingMode::Pae => "PAE paging",
            PagingMode::FourLevel => "4-level paging",
        };
        format!("{:#x}: {mode}, CR3 {:#x}", self.addr, self.context.cr3)
    }

    fn step(&self, step: &WalkStep) -> String {
        let index = step.addr.get() & 0xfff;
        let wide = !matches!(self.context.mode, PagingMode::Bits32 { .. });
        let (index, digits) = if wide {
            (index / 8, 16)
        } else {
            (index / 4, 8)
        };
        format!(
            "{:<5} [{index:>4}] at {:#x}: {:0digits$x} {}",
            entry_name(step.level),
            step.addr,
            step.entry,
            entry_bits(step, self.is_leaf(step)),
        )
    }

    fn is_leaf(&self, step: &WalkStep) -> bool {
        step.level == 1 || self.walk.outcome.is_ok() && self.walk.steps().last() == Some(step)
    }

    fn success(&self, translation: &Translation) -> String {
        if self.context.mode == PagingMode::None {
            return format!("-> physical {:#x}", translation.addr);
        }
        let rights = [
            if translation.writable {
                "writable"
            } else {
                "read-only"
            },
            if translation.user {
                "user"
            } else {
                "supervisor"
            },
            if translation.executable {
                "executable"
            } else {
                "no execute"
            },
        ];
        let global = if translation.global { ", global" } else { "" };
        format!(
            "-> physical {:#x} in a {} page: {}{global}",
            translation.addr,
            page_size(translation.page_size),
            rights.join(", ")
        )
    }

    fn failure(&self, fault: WalkFault) -> String {
        let entry = self
            .walk
            .steps()
            .last()
            .map_or("entry", |step| entry_name(step.level));
        match fault {
            WalkFault::NotPresent => format!("-> not mapped: the {entry} is not present"),
            WalkFault::ReservedBit => {
                format!("-> not mapped: the {entry} has reserved bits set (#PF with RSVD)")
            }
            WalkFault::NoMemory(at) => {
                format!("-> not mapped: the next table, at {at:#x}, is not in guest memory")
            }
            WalkFault::NonCanonical => {
                "-> not mapped: bits 63..47 differ, the address is not canonical".to_owned()
            }
        }
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines()
            .iter()
            .try_for_each(|line| writeln!(f, "{line}"))
    }
}

/// The bits of an entry by name; without P nothing else has a meaning to the processor.
fn entry_bits(step: &WalkStep, leaf: bool) -> String {
    let flags = step.flags();
    if !flags.contains(EntryFlags::P) {
        return if step.entry == 0 {
            "empty"
        } else {
            "not present"
        }
        .to_owned();
    }
    let mut names = vec!["P"];
    if step.restricts {
        names.push(if flags.contains(EntryFlags::RW) {
            "RW"
        } else {
            "R-"
        });
        names.push(if flags.contains(EntryFlags::US) {
            "US"
        } else {
            "S"
        });
    }
    for (flag, name, where_defined) in [
        (EntryFlags::PWT, "PWT", true),
        (EntryFlags::PCD, "PCD", true),
        (EntryFlags::A, "A", true),
        (EntryFlags::D, "D", leaf),
        (EntryFlags::PS, "PS", step.level > 1),
        (EntryFlags::PS, "PAT", step.level == 1),
        (EntryFlags::G, "G", leaf),
        (EntryFlags::NX, "NX", true),
    ] {
        if where_defined && flags.contains(flag) {
            names.push(name);
        }
    }
    names.join(" ")
}

fn page_size(bytes: u64) -> String {
    match bytes {
        0x4000_0000.. => format!("{} GiB", bytes >> 30),
        0x10_0000.. => format!("{} MiB", bytes >> 20),
        _ => format!("{} KiB", bytes >> 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TEXT, code_machine};
    use x86::GuestPhysAddr;

    fn explained(addr: u64) -> String {
        let (cpu, memory) = code_machine(&[]);
        // A 2 MiB page next to the 4 KiB ones: NX, global, dirty, accessed.
        let large: u64 = 1 << 63 | 0x1e3;
        memory
            .write(GuestPhysAddr::new(0x3000 + 8 * 3), &large.to_le_bytes())
            .expect("table");
        explain(&cpu, &memory, GuestVirtAddr::new(addr)).to_string()
    }

    #[test]
    fn a_4k_page() {
        let expected = "\
0x401123: 4-level paging, CR3 0x1000
PML4E [   0] at 0x1000: 0000000000002003 P RW S
PDPTE [   0] at 0x2000: 0000000000003003 P RW S
PDE   [   2] at 0x3010: 0000000000004003 P RW S
PTE   [   1] at 0x4008: 0000000000009003 P RW S
-> physical 0x9123 in a 4 KiB page: writable, supervisor, executable
";
        assert_eq!(explained(TEXT + 0x1123), expected);
    }

    #[test]
    fn a_2m_page() {
        let text = explained(0x60_0042);
        let tail: Vec<_> = text.lines().skip(3).collect();
        assert_eq!(
            tail,
            [
                "PDE   [   3] at 0x3018: 80000000000001e3 P RW S A D PS G NX",
                "-> physical 0x42 in a 2 MiB page: writable, supervisor, no execute, global",
            ]
        );
    }

    #[test]
    fn walks_that_end_early() {
        let last = |addr| explained(addr).lines().last().map(str::to_owned);
        assert_eq!(
            last(TEXT + 0x2000).as_deref(),
            Some("-> not mapped: the PTE is not present")
        );
        assert_eq!(
            last(1 << 47).as_deref(),
            Some("-> not mapped: bits 63..47 differ, the address is not canonical")
        );
        let (_, memory) = code_machine(&[]);
        let flat = explain(&CpuState::default(), &memory, GuestVirtAddr::new(0x1234));
        assert_eq!(
            flat.lines(),
            ["0x1234: paging is off (CR0.PG)", "-> physical 0x1234"]
        );
    }
}
