//! Effective addresses and segments.

mod guest;

use guest::{CODE, DATA, Guest, STACK};
use iced_x86::code_asm::*;
use x86::segment::SegmentAttributes;
use x86::{Gpr, SegmentRegister, Vector};

#[test]
fn sixteen_bit_addresses_wrap_and_bp_means_the_stack() {
    let mut guest = Guest::real();
    guest.put(DATA + 0x10, &[0x11]);
    guest.put(STACK + 0x10, &[0x22]);
    guest
        .set(Gpr::Rbx, 0xfff0)
        .set(Gpr::Rsi, 0x18)
        .set(Gpr::Rbp, 0xfff0);
    guest.code(16, |a| {
        a.mov(al, byte_ptr(bx + si + 8))?; // fff0 + 18 + 8 = 10
        a.mov(cl, byte_ptr(bp + 0x20))?;
        a.mov(dl, byte_ptr(bp + 0x20).ds())
    });
    guest.retire(3);
    let byte = |gpr| guest.gpr(gpr) & 0xff;
    assert_eq!(
        (byte(Gpr::Rax), byte(Gpr::Rcx), byte(Gpr::Rdx)),
        (0x11, 0x22, 0x11)
    );
}

#[test]
fn an_address_size_prefix_cuts_addresses_to_32_bits() {
    let mut guest = Guest::long();
    guest.put(DATA, &[0x33]);
    guest.set(Gpr::Rbx, 0xffff_ffff_0000_0000 | DATA);
    guest.code(64, |a| {
        a.mov(al, byte_ptr(ebx))?;
        a.lea(rcx, dword_ptr(ebx + 1))
    });
    guest.retire(2);
    assert_eq!(
        (guest.gpr(Gpr::Rax) & 0xff, guest.gpr(Gpr::Rcx)),
        (0x33, DATA + 1)
    );
}

#[test]
fn lea_writes_the_operand_size() {
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rbx, 0x1_2345_6789)
        .set(Gpr::Rcx, u64::MAX)
        .set(Gpr::Rdx, u64::MAX);
    guest.raw(&[
        0x66, 0x8d, 0x4b, 0x01, // lea cx, [rbx+1]
        0x8d, 0x53, 0x01, // lea edx, [rbx+1]
        0x48, 0x8d, 0x35, 0xf0, 0xff, 0xff, 0xff, // lea rsi, [rip-16]
    ]);
    guest.retire(3);
    assert_eq!(guest.gpr(Gpr::Rcx), 0xffff_ffff_ffff_678a);
    assert_eq!(guest.gpr(Gpr::Rdx), 0x2345_678a);
    assert_eq!(guest.gpr(Gpr::Rsi), CODE + 14 - 16);
}

#[test]
fn absolute_addresses_of_every_size() {
    let mut guest = Guest::long();
    guest.put(DATA, &0x1122_3344_5566_7788u64.to_le_bytes());
    let mut code = vec![0x48, 0xa1]; // mov rax, moffs64
    code.extend(DATA.to_le_bytes());
    code.extend([0x48, 0x8b, 0x0c, 0x25]); // mov rcx, [disp32]
    code.extend((DATA as u32).to_le_bytes());
    guest.raw(&code).retire(2);
    assert_eq!(guest.gpr(Gpr::Rax), 0x1122_3344_5566_7788);
    assert_eq!(guest.gpr(Gpr::Rcx), 0x1122_3344_5566_7788);
    let mut guest = Guest::protected();
    guest.put(DATA, &[0x44]);
    let mut code = vec![0xa0]; // mov al, moffs32
    code.extend((DATA as u32).to_le_bytes());
    guest.raw(&code).retire(1);
    assert_eq!(guest.gpr(Gpr::Rax), 0x44);
}

#[test]
fn fs_and_gs_have_bases_in_long_mode_and_the_others_have_none() {
    let mut guest = Guest::long();
    guest.put(DATA + 8, &[0x55]);
    guest.cpu.segment_mut(SegmentRegister::Fs).base = DATA;
    guest.cpu.segment_mut(SegmentRegister::Ds).base = 0x1234_0000;
    guest.set(Gpr::Rbx, 8).set(Gpr::Rcx, DATA + 8);
    guest.code(64, |a| {
        a.mov(al, byte_ptr(rbx).fs())?;
        a.mov(dl, byte_ptr(rcx))?;
        a.lea(rsi, byte_ptr(rbx).fs())
    });
    guest.retire(3);
    assert_eq!(
        (guest.gpr(Gpr::Rax) & 0xff, guest.gpr(Gpr::Rdx) & 0xff),
        (0x55, 0x55)
    );
    assert_eq!(guest.gpr(Gpr::Rsi), 8, "LEA adds no base");
}

#[test]
fn non_canonical_addresses_fault_as_their_segment_says() {
    let bad = 1u64 << 47;
    for (register, vector) in [(Gpr::Rbx, Vector::GP), (Gpr::Rbp, Vector::SS)] {
        let mut guest = Guest::long();
        guest.set(register, bad);
        match register {
            Gpr::Rbx => guest.code(64, |a| a.mov(rax, qword_ptr(rbx))),
            _ => guest.code(64, |a| a.mov(rax, qword_ptr(rbp))),
        };
        guest.faults(vector);
        assert_eq!(guest.stack(0), 0);
    }
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rbx, bad - 4)
        .code(64, |a| a.mov(rax, qword_ptr(rbx)));
    guest.faults(Vector::GP); // its last byte is not canonical
}

#[test]
fn limits_are_checked_at_both_ends_and_downwards() {
    let mut guest = Guest::protected();
    guest.cpu.segment_mut(SegmentRegister::Fs).limit = 0xfff;
    guest.code(32, |a| {
        a.mov(eax, dword_ptr(0xffc).fs())?;
        a.mov(eax, dword_ptr(0xffd).fs())
    });
    guest.retire(1).faults(Vector::GP);
    // Expand-down: valid above the limit.
    let mut guest = Guest::protected();
    let down = SegmentAttributes::from_bits(0xc097);
    guest.cpu.segment_mut(SegmentRegister::Fs).attributes = down;
    guest.cpu.segment_mut(SegmentRegister::Fs).limit = 0xfff;
    guest.code(32, |a| {
        a.mov(eax, dword_ptr(0x1000).fs())?;
        a.mov(eax, dword_ptr(0xfff).fs())
    });
    guest.retire(1).faults(Vector::GP);
}

#[test]
fn segment_types_forbid_accesses() {
    let mut guest = Guest::protected();
    guest.cpu.segment_mut(SegmentRegister::Es).attributes = SegmentAttributes::from_bits(0xc091);
    guest.code(32, |a| {
        a.mov(eax, dword_ptr(0x2_0000).es())?;
        a.mov(dword_ptr(0x2_0000).es(), eax)
    });
    guest.retire(1).faults(Vector::GP);
    let mut guest = Guest::protected();
    guest
        .raw(&[0x2e, 0x89, 0x05, 0, 0, 2, 0])
        .faults(Vector::GP); // mov cs:[20000h], eax
}

#[test]
fn a_bit_offset_reaches_beyond_the_operand() {
    let mut guest = Guest::long();
    guest.put(DATA, &[0; 16]);
    guest
        .set(Gpr::Rbx, DATA + 8)
        .set(Gpr::Rcx, -3i64 as u64)
        .set(Gpr::Rdx, 67);
    guest.code(64, |a| {
        a.bts(qword_ptr(rbx), rcx)?; // bit 61 of the quadword before
        a.bts(dword_ptr(rbx), edx)
    });
    guest.retire(2);
    assert_eq!(guest.get(DATA), 1 << 61);
    assert_eq!(guest.bytes(DATA + 16, 1), [8]);
}
