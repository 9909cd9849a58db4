//! Translation in the formats besides four levels: 32-bit, 4 MiB pages, PAE; CR0.WP; accessed and dirty bits in each.

mod guest;

use guest::{CODE, DATA, Guest};
use iced_x86::code_asm::*;
use x86::regs::{Cr0, Cr4, Efer};
use x86::{Gpr, Vector};

const A: u32 = 1 << 5;
const D: u32 = 1 << 6;
const DIRECTORY: u64 = 0x10_0000;
const TABLE: u64 = 0x10_1000;

/// 32-bit paging: the first 4 MiB in 4 KiB pages, supervisor and user, writable.
fn two_levels() -> Guest {
    let mut guest = Guest::protected();
    guest.put(DIRECTORY, &(TABLE as u32 | 7).to_le_bytes());
    for page in 0..1024u32 {
        guest.put(TABLE + 4 * u64::from(page), &(page << 12 | 7).to_le_bytes());
    }
    guest.cpu.cr3 = DIRECTORY;
    guest.cpu.cr0 |= Cr0::PG | Cr0::WP;
    guest
}

fn entry(guest: &Guest, linear: u64) -> u32 {
    guest.get32(TABLE + 4 * (linear >> 12))
}

#[test]
fn two_levels_get_their_bits() {
    let mut guest = two_levels();
    guest.set(Gpr::Rbx, DATA).code(32, |a| {
        a.mov(eax, dword_ptr(ebx))?;
        a.mov(dword_ptr(ebx), eax)
    });
    guest.retire(1);
    assert_eq!(entry(&guest, DATA) & (A | D), A);
    assert_eq!(guest.get32(DIRECTORY) & (A | D), A);
    guest.retire(1);
    assert_eq!(entry(&guest, DATA) & (A | D), A | D);
    assert_eq!(guest.get32(DIRECTORY) & D, 0, "not in the directory");
}

#[test]
fn large_pages_get_theirs_in_the_directory() {
    let mut guest = two_levels();
    guest.cpu.cr4 |= Cr4::PSE;
    guest.put(DIRECTORY + 4, &0x87u32.to_le_bytes()); // 4 MiB at 0
    guest.put(DATA, &[0x5a]);
    guest.set(Gpr::Rbx, 0x40_0000 + DATA).code(32, |a| {
        a.mov(al, byte_ptr(ebx))?;
        a.mov(byte_ptr(ebx + 1), al)
    });
    guest.retire(1);
    assert_eq!(guest.gpr(Gpr::Rax) & 0xff, 0x5a);
    assert_eq!(guest.get32(DIRECTORY + 4) & (A | D), A);
    guest.retire(1);
    assert_eq!(guest.get32(DIRECTORY + 4) & (A | D), A | D);
    assert_eq!(guest.bytes(DATA + 1, 1), [0x5a]);
}

#[test]
fn without_write_protect_the_supervisor_writes_everywhere() {
    let read_only = DATA as u32 | 5;
    let mut guest = two_levels();
    guest.put(TABLE + 4 * (DATA >> 12), &read_only.to_le_bytes());
    guest
        .set(Gpr::Rbx, DATA)
        .code(32, |a| a.mov(dword_ptr(ebx), eax));
    guest.faults(Vector::PF);
    assert_eq!(guest.stack32(0), 3);
    let mut guest = two_levels();
    guest.cpu.cr0.remove(Cr0::WP);
    guest.put(TABLE + 4 * (DATA >> 12), &read_only.to_le_bytes());
    guest
        .set(Gpr::Rbx, DATA)
        .code(32, |a| a.mov(dword_ptr(ebx), eax));
    guest.retire(1);
    assert_eq!(entry(&guest, DATA) & D, D);
}

#[test]
fn pae_sets_no_bits_in_its_pointers() {
    let mut guest = Guest::protected();
    // Pointers at DIRECTORY, a directory at TABLE with one 2 MiB page at 0.
    guest.put(DIRECTORY, &(TABLE | 1).to_le_bytes());
    guest.put(TABLE, &0x87u64.to_le_bytes());
    guest.cpu.cr3 = DIRECTORY;
    guest.cpu.cr4 |= Cr4::PAE;
    guest.cpu.efer |= Efer::NXE;
    guest.cpu.cr0 |= Cr0::PG | Cr0::WP;
    guest.set(Gpr::Rbx, DATA).code(32, |a| {
        a.mov(dword_ptr(ebx), eax)?;
        a.mov(ecx, cr3)?;
        a.mov(cr3, ecx)
    });
    guest.retire(1);
    assert_eq!(guest.get(DIRECTORY), TABLE | 1);
    assert_eq!(guest.get32(TABLE) & (A | D), A | D);
    // A reserved bit in a pointer is found when CR3 is loaded.
    guest.put(DIRECTORY + 8, &0x1e7u64.to_le_bytes());
    guest.retire(1).faults(Vector::GP);
    assert_eq!(guest.cpu.cr3, DIRECTORY);
}

#[test]
fn a_fetch_from_a_page_that_forbids_it_faults() {
    let mut guest = Guest::long();
    guest.map(DATA, DATA | 7 | 1 << 63);
    guest.set(Gpr::Rax, DATA).code(64, |a| a.jmp(rax));
    guest.retire(1).faults(Vector::PF);
    assert_eq!((guest.stack(0), guest.cpu.cr2), (0x11, DATA));
    let mut guest = Guest::long().user();
    guest.map(CODE, CODE | 3);
    guest.raw(&[0x90]).faults(Vector::PF);
    assert_eq!(guest.stack(0), 0x15, "a supervisor page");
}
