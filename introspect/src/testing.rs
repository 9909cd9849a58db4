//! Small machines for this crate's tests.
//!
//! Purpose: page tables by hand, in one place. Elsewhere: whole guests (`fixtures`).

use crate::symbols::Symbols;
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

/// Where [`code_machine`] puts its code.
pub(crate) const TEXT: u64 = 0x40_0000;

/// A CPU in 64-bit mode at the start of `code`, at [`TEXT`] (physical 0x8000) in two mapped pages.
pub(crate) fn code_machine(code: &[u8]) -> (CpuState, GuestMemory) {
    let memory = GuestMemory::new(1 << 20).expect("1 MiB");
    let mut cpu = long_mode(&memory, TEXT, &[0x8003, 0x9003]);
    memory
        .write(GuestPhysAddr::new(0x8000), code)
        .expect("code in RAM");
    cpu.regs.rip = TEXT;
    (cpu, memory)
}

/// A CPU in real mode at `selector`:0, where `code` stands.
pub(crate) fn real_mode_machine(selector: u16, code: &[u8]) -> (CpuState, GuestMemory) {
    let memory = GuestMemory::new(1 << 20).expect("1 MiB");
    memory
        .write(GuestPhysAddr::new(u64::from(selector) << 4), code)
        .expect("code in RAM");
    let mut cpu = CpuState::default();
    cpu.regs.rip = 0;
    *cpu.segment_mut(SegmentRegister::Cs) = Segment::real_mode(selector, true);
    (cpu, memory)
}

/// `main` (0x20 bytes) and `callee` (0x10 bytes) at [`TEXT`], and `TABLE` (0x40 bytes) 0x100 behind.
pub(crate) fn symbols() -> Symbols {
    Symbols::from_elf(&elf(&[
        sym("main", FUNC, TEXT, 0x20),
        sym("callee", FUNC, TEXT + 0x20, 0x10),
        sym("TABLE", OBJECT, TEXT + 0x100, 0x40),
    ]))
    .expect("well-formed")
}

/// `STT_FUNC`.
pub(crate) const FUNC: u8 = 2;
/// `STT_OBJECT`.
pub(crate) const OBJECT: u8 = 1;
/// `STT_NOTYPE`.
pub(crate) const NOTYPE: u8 = 0;

/// A symbol to write.
pub(crate) struct Sym {
    name: &'static str,
    kind: u8,
    global: bool,
    value: u64,
    size: u64,
}

/// A global symbol.
pub(crate) const fn sym(name: &'static str, kind: u8, value: u64, size: u64) -> Sym {
    Sym {
        name,
        kind,
        global: true,
        value,
        size,
    }
}

const ELF_TEXT: u64 = 0x10_0000;

/// A minimal ELF64 file: null, .text (4 KiB at [`ELF_TEXT`]), .symtab, .strtab, .shstrtab.
pub(crate) fn elf(symbols: &[Sym]) -> Vec<u8> {
    let mut strings = vec![0];
    let mut table = vec![0u8; 24];
    for symbol in symbols {
        let name = strings.len() as u32;
        strings.extend_from_slice(symbol.name.as_bytes());
        strings.push(0);
        table.extend_from_slice(&name.to_le_bytes());
        table.push(u8::from(symbol.global) << 4 | symbol.kind);
        table.push(0);
        table.extend_from_slice(&1u16.to_le_bytes());
        table.extend_from_slice(&symbol.value.to_le_bytes());
        table.extend_from_slice(&symbol.size.to_le_bytes());
    }
    let names = b"\0.text\0.symtab\0.strtab\0.shstrtab\0";
    let table_at = 64u64;
    let strings_at = table_at + table.len() as u64;
    let names_at = strings_at + strings.len() as u64;
    let sections_at = names_at + names.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend_from_slice(&2u16.to_le_bytes());
    file.extend_from_slice(&62u16.to_le_bytes());
    file.extend_from_slice(&1u32.to_le_bytes());
    for word in [ELF_TEXT, 0, sections_at] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(&0u32.to_le_bytes());
    for half in [64u16, 56, 0, 64, 5, 4] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    file.extend_from_slice(&table);
    file.extend_from_slice(&strings);
    file.extend_from_slice(names);
    // name, type, flags, addr, offset, size, link, info, align, entsize
    let sections: [[u64; 10]; 5] = [
        [0; 10],
        [1, 8, 6, ELF_TEXT, 0, 0x1000, 0, 0, 16, 0],
        [7, 2, 0, 0, table_at, table.len() as u64, 3, 1, 8, 24],
        [15, 3, 0, 0, strings_at, strings.len() as u64, 0, 0, 1, 0],
        [23, 3, 0, 0, names_at, names.len() as u64, 0, 0, 1, 0],
    ];
    for section in sections {
        for (index, value) in section.into_iter().enumerate() {
            if matches!(index, 0 | 1 | 6 | 7) {
                file.extend_from_slice(&(value as u32).to_le_bytes());
            } else {
                file.extend_from_slice(&value.to_le_bytes());
            }
        }
    }
    file
}
