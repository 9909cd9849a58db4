//! Small machines for this crate's tests.
//!
//! Purpose: page tables by hand, in one place. Elsewhere: whole guests (`fixtures`).

use machine::GuestMemory;
use x86::regs::{Cr0, Cr4, Efer};
use x86::segment::SegmentAttributes;
use x86::{CpuState, GuestPhysAddr, Segment, SegmentRegister};

/// A CPU in 64-bit mode whose tables (at 0x1000..0x5000) map the pages from `base` on, within one 2 MiB range, by `entries`.
pub(crate) fn long_mode(memory: &GuestMemory, base: u64, entries: &[u64]) -> CpuState {
    let put = |at: u64, value: u64| {
        memory
            .write(GuestPhysAddr::new(at), &value.to_le_bytes())
            .expect("table in RAM");
    };
    put(0x1000 + 8 * (base >> 39 & 0x1ff), 0x2003);
    put(0x2000 + 8 * (base >> 30 & 0x1ff), 0x3003);
    put(0x3000 + 8 * (base >> 21 & 0x1ff), 0x4003);
    for (index, entry) in entries.iter().enumerate() {
        put(0x4000 + 8 * ((base >> 12 & 0x1ff) + index as u64), *entry);
    }
    let mut cpu = CpuState {
        cr0: Cr0::PE | Cr0::PG | Cr0::WP | Cr0::NE | Cr0::ET,
        cr3: 0x1000,
        cr4: Cr4::PAE,
        efer: Efer::LME | Efer::LMA | Efer::NXE,
        ..CpuState::default()
    };
    *cpu.segment_mut(SegmentRegister::Cs) = Segment {
        selector: 8,
        base: 0,
        limit: u32::MAX,
        attributes: SegmentAttributes::from_bits(0xa09b),
    };
    cpu
}
