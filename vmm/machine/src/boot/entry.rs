//! The state a CPU starts in.
//!
//! Purpose: registers, descriptor table and page tables for each boot protocol.
//! Invariants: the tables are one block of whole pages. Common to all ELF entries: interrupts off, flat segments from a GDT in that
//! block (08h code, 10h data), an empty IDT (any exception is a triple fault until the kernel loads its own), and the start info's
//! address in EBX, also without PVH, where the first argument (RDI) has it too.
//! - PVH and ELF32: 32-bit protected mode, paging off. ESP is 0 under PVH (the protocol gives no stack), else the top of a stack.
//! - ELF64: long mode, 4 GiB mapped one to one by 2 MiB pages, writable and supervisor-only, SSE enabled, RSP at the top of a stack.
//! - Flat: real mode.
//!
//! Elsewhere: where the block goes ([`super::load`]).
//! Source: Xen, docs/misc/pvh.pandoc; Intel SDM vol. 3A, 3.4.5 (descriptors), 4.5 (4-level paging), 9.8.5 (long mode).

use super::elf::Protocol;
use crate::memory::{GuestMemory, NoMemoryError};
use x86::regs::{Cr0, Cr4, Efer};
use x86::segment::SegmentAttributes;
use x86::{CpuState, DescriptorTable, Gpr, GuestPhysAddr, PAGE_SIZE, Segment, SegmentRegister};

const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u16 = 0x10;
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const CODE_64: u64 = 0x00af_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const STACK_SIZE: u64 = 4 * PAGE_SIZE;
const LARGE_PAGE: u64 = 2 << 20;
/// 4 GiB of large pages: a page directory for each GiB.
const DIRECTORIES: u64 = 4;
const ENTRIES: u64 = 512;
/// Present and writable.
const TABLE: u64 = 0x03;
/// The same, and a large page.
const LEAF: u64 = 0x83;

/// Bytes of the block of tables, whole pages: GDT, then the stack, then page tables.
pub(super) fn tables_size(protocol: Protocol) -> u64 {
    PAGE_SIZE
        + match protocol {
            Protocol::Pvh { .. } => 0,
            Protocol::Protected { .. } => STACK_SIZE,
            Protocol::Long { .. } => STACK_SIZE + (2 + DIRECTORIES) * PAGE_SIZE,
        }
}

/// Writes the tables to `base` and returns the start state. The start info is at `info`.
pub(super) fn prepare(
    protocol: Protocol,
    memory: &GuestMemory,
    base: GuestPhysAddr,
    info: GuestPhysAddr,
) -> Result<CpuState, NoMemoryError> {
    let stack_top = base.wrapping_add(PAGE_SIZE + STACK_SIZE);
    let mut cpu = flat(base, info);
    match protocol {
        Protocol::Pvh { entry } => {
            write_gdt(memory, base, CODE_32)?;
            cpu.regs.rip = entry.into();
        }
        Protocol::Protected { entry } => {
            write_gdt(memory, base, CODE_32)?;
            cpu.regs.rip = entry.into();
            cpu.regs[Gpr::Rdi] = info.get();
            cpu.regs[Gpr::Rsp] = stack_top.get();
        }
        Protocol::Long { entry } => {
            write_gdt(memory, base, CODE_64)?;
            write_page_tables(memory, stack_top)?;
            cpu.regs.rip = entry;
            cpu.regs[Gpr::Rdi] = info.get();
            // As after a call: the psABI wants RSP + 8 to be a multiple of 16 at a function's entry.
            cpu.regs[Gpr::Rsp] = stack_top.get() - 8;
            *cpu.segment_mut(SegmentRegister::Cs) = segment(CODE_SELECTOR, CODE_64);
            cpu.cr0 |= Cr0::PG | Cr0::MP | Cr0::NE;
            cpu.cr3 = stack_top.get();
            cpu.cr4 = Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT;
            cpu.efer = Efer::LME | Efer::LMA;
        }
    }
    Ok(cpu)
}

/// 32-bit protected mode without paging.
fn flat(gdt: GuestPhysAddr, info: GuestPhysAddr) -> CpuState {
    let mut cpu = CpuState::default();
    cpu.regs.rip = 0;
    cpu.regs[Gpr::Rbx] = info.get();
    cpu.segments = [segment(DATA_SELECTOR, DATA); 6];
    *cpu.segment_mut(SegmentRegister::Cs) = segment(CODE_SELECTOR, CODE_32);
    cpu.tr.limit = 0x67;
    cpu.gdtr = DescriptorTable {
        base: gdt.get(),
        limit: 3 * 8 - 1,
    };
    cpu.idtr = DescriptorTable { base: 0, limit: 0 };
    cpu.cr0 = Cr0::PE | Cr0::ET;
    cpu
}

/// Real mode at the start of a segment.
pub(super) fn real_mode(selector: u16) -> CpuState {
    let mut cpu = CpuState {
        segments: [Segment::real_mode(selector, false); 6],
        idtr: DescriptorTable {
            base: 0,
            limit: 0x3ff,
        },
        cr0: Cr0::ET,
        ..CpuState::default()
    };
    *cpu.segment_mut(SegmentRegister::Cs) = Segment::real_mode(selector, true);
    cpu.regs.rip = 0;
    cpu
}

fn segment(selector: u16, descriptor: u64) -> Segment {
    Segment::flat(
        selector,
        SegmentAttributes::from_descriptor(descriptor).bits(),
    )
}

fn write_gdt(memory: &GuestMemory, at: GuestPhysAddr, code: u64) -> Result<(), NoMemoryError> {
    write_words(memory, at, [0, code, DATA])
}

/// PML4, page-directory-pointer table and directories, in that order from `at`.
fn write_page_tables(memory: &GuestMemory, at: GuestPhysAddr) -> Result<(), NoMemoryError> {
    let pointers = at.wrapping_add(PAGE_SIZE);
    let directories = pointers.wrapping_add(PAGE_SIZE);
    let zeros = [0; PAGE_SIZE as usize];
    memory.write(at, &zeros)?;
    memory.write(pointers, &zeros)?;
    write_words(memory, at, [pointers.get() | TABLE])?;
    write_words(
        memory,
        pointers,
        (0..DIRECTORIES).map(|n| (directories.get() + n * PAGE_SIZE) | TABLE),
    )?;
    write_words(
        memory,
        directories,
        (0..DIRECTORIES * ENTRIES).map(|n| (n * LARGE_PAGE) | LEAF),
    )
}

fn write_words(
    memory: &GuestMemory,
    at: GuestPhysAddr,
    words: impl IntoIterator<Item = u64>,
) -> Result<(), NoMemoryError> {
    let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
    memory.write(at, &bytes)
}
