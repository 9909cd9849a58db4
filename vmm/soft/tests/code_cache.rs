//! What is executed is what memory holds.

mod guest;

use guest::{CODE, DATA, Guest};
use iced_x86::code_asm::*;
use x86::{Gpr, GuestPhysAddr, PageFrame};

#[test]
fn a_store_to_the_next_instruction_takes_effect_at_once() {
    let mut guest = Guest::long();
    guest.set(Gpr::Rbx, CODE).code(64, |a| {
        a.mov(byte_ptr(rbx + 8), 0x22)?; // 4 bytes
        a.nop()?;
        a.nop()?;
        a.mov(eax, 0x11)?;
        a.nop()
    });
    // Decode it before it is changed.
    guest.cpu.regs.rip = CODE + 4;
    guest.retire(3);
    assert_eq!(guest.gpr(Gpr::Rax), 0x11);
    guest.cpu.regs.rip = CODE;
    guest.retire(4);
    assert_eq!(guest.gpr(Gpr::Rax), 0x2211);
}

#[test]
fn data_beside_code_does_not_disturb_it() {
    let mut guest = Guest::long();
    guest.set(Gpr::Rbx, CODE + 0x800).code(64, |a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.inc(dword_ptr(rbx))?;
        a.jmp(top)
    });
    guest.retire(200);
    assert_eq!(guest.get32(CODE + 0x800), 100);
}

#[test]
fn an_instruction_across_pages_follows_both() {
    let mut guest = Guest::long();
    let at = CODE + 0x1000 - 2;
    guest.cpu.regs.rip = at;
    guest.raw(&[0xb8, 0x11, 0x22, 0x33, 0x44]).retire(1); // mov eax, 44332211h
    assert_eq!(guest.gpr(Gpr::Rax), 0x4433_2211);
    guest.put(CODE + 0x1000, &[0x99]);
    guest.cpu.regs.rip = at;
    guest.retire(1);
    assert_eq!(guest.gpr(Gpr::Rax), 0x4433_9911);
    // The second page is another one now.
    guest.put(0x9_0000, &[0x01, 0x02, 0x03]);
    guest.map(CODE + 0x1000, 0x9_0000 | 7);
    guest.cpu.regs.rip = at;
    guest.retire(1);
    assert_eq!(guest.gpr(Gpr::Rax), 0x0302_0111);
}

#[test]
fn remapping_a_page_by_a_guest_store_takes_effect_without_invlpg() {
    let mut guest = Guest::long();
    guest.put(DATA, &1u64.to_le_bytes());
    guest.put(DATA + 0x1000, &2u64.to_le_bytes());
    guest
        .set(Gpr::Rbx, DATA)
        .set(Gpr::Rcx, guest::PAGE_TABLE + 8 * (DATA >> 12));
    guest.set(Gpr::Rdx, (DATA + 0x1000) | 7);
    guest.code(64, |a| {
        a.mov(rax, qword_ptr(rbx))?;
        a.mov(qword_ptr(rcx), rdx)?;
        a.mov(rsi, qword_ptr(rbx))
    });
    guest.retire(3);
    assert_eq!((guest.gpr(Gpr::Rax), guest.gpr(Gpr::Rsi)), (1, 2));
}

#[test]
fn code_is_remapped_with_its_page() {
    let mut guest = Guest::long();
    guest.put(0x9_0000, &[0xb8, 2, 0, 0, 0]);
    guest.raw(&[0xb8, 1, 0, 0, 0]).retire(1);
    assert_eq!(guest.gpr(Gpr::Rax), 1);
    guest.map(CODE, 0x9_0000 | 7);
    guest.cpu.regs.rip = CODE;
    guest.retire(1);
    assert_eq!(guest.gpr(Gpr::Rax), 2);
}

#[test]
fn one_page_at_two_addresses_shares_code_but_not_addresses() {
    let mut guest = Guest::long();
    guest.map(0x10_0000, CODE | 7);
    // lea rax, [rip + 1]; call next; next:
    guest.raw(&[0x48, 0x8d, 0x05, 1, 0, 0, 0, 0xe8, 0, 0, 0, 0]);
    guest.retire(2);
    assert_eq!((guest.gpr(Gpr::Rax), guest.stack(0)), (CODE + 8, CODE + 12));
    guest.cpu.regs.rip = 0x10_0000;
    guest.retire(2);
    assert_eq!(
        (guest.gpr(Gpr::Rax), guest.stack(0)),
        (0x10_0008, 0x10_000c)
    );
}

#[test]
fn code_written_behind_the_steppers_back_is_noticed_when_it_is_told() {
    let mut guest = Guest::long();
    guest.raw(&[0xb8, 1, 0, 0, 0]).retire(1);
    let at = GuestPhysAddr::new(CODE + 1);
    guest.memory.write(at, &[2]).expect("in RAM");
    guest.stepper.memory_written(at, 1);
    guest.cpu.regs.rip = CODE;
    guest.retire(1);
    assert_eq!(guest.gpr(Gpr::Rax), 2);
    guest.memory.write(at, &[3]).expect("in RAM");
    guest.stepper.native_code_ran();
    guest.cpu.regs.rip = CODE;
    guest.retire(1);
    assert_eq!(guest.gpr(Gpr::Rax), 3);
}

#[test]
fn changed_roots_and_modes_are_noticed_between_steps() {
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rbx, DATA)
        .code(64, |a| a.mov(rax, qword_ptr(rbx)));
    guest.put(DATA, &1u64.to_le_bytes());
    guest.retire(1);
    // Another root, which maps DATA elsewhere.
    let tables: Vec<Vec<u8>> = [guest::PML4, 0x9000, 0xa000, guest::PAGE_TABLE]
        .iter()
        .map(|at| guest.bytes(*at, 4096))
        .collect();
    for (n, table) in tables.iter().enumerate() {
        guest.put(0x20_0000 + 0x1000 * n as u64, table);
    }
    for (at, value) in [
        (0x20_0000u64, 0x20_1007u64),
        (0x20_1000, 0x20_2007),
        (0x20_2000, 0x20_3007),
    ] {
        guest.put(at, &value.to_le_bytes());
    }
    guest.put(
        0x20_3000 + 8 * (DATA >> 12),
        &(0x8_0000u64 | 7).to_le_bytes(),
    );
    guest.put(0x8_0000, &2u64.to_le_bytes());
    guest.cpu.cr3 = 0x20_0000;
    guest.cpu.regs.rip = CODE;
    guest.retire(1);
    assert_eq!(guest.gpr(Gpr::Rax), 2);
}

#[test]
fn dirty_pages_are_those_written_by_guest_and_monitor() {
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rbx, DATA)
        .code(64, |a| a.mov(qword_ptr(rbx), rax));
    guest.stepper.take_dirty();
    guest.retire(1);
    let dirty = guest.stepper.take_dirty();
    let page = |at: u64| PageFrame::containing(GuestPhysAddr::new(at));
    assert!(dirty.contains(&page(DATA)));
    assert!(
        dirty.contains(&page(guest::PAGE_TABLE)),
        "accessed and dirty bits"
    );
    assert!(!dirty.contains(&page(CODE)));
    guest.cpu.regs.rip = CODE;
    guest.retire(1);
    assert_eq!(
        guest.stepper.take_dirty(),
        [page(DATA)].into(),
        "again, and only that"
    );
    guest.put(0x8_0000, &[1]);
    assert_eq!(guest.stepper.take_dirty(), [page(0x8_0000)].into());
}
