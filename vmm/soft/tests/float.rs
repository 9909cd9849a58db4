//! x87, MMX and SSE: what must hold before they run, exceptions, saved state.

mod guest;

use guest::{CODE, DATA, Guest};
use iced_x86::code_asm::*;
use x86::regs::{Cr0, Cr4};
use x86::{FpuState, Gpr, Vector};

const FADD: &[u8] = &[0xd8, 0xc1]; // fadd st, st(1)
const PADDB: &[u8] = &[0x0f, 0xfc, 0xc1]; // paddb mm0, mm1
const ADDPS: &[u8] = &[0x0f, 0x58, 0xc1]; // addps xmm0, xmm1
const FWAIT: &[u8] = &[0x9b];

#[test]
fn control_bits_decide_what_faults() {
    let ts = Cr0::TS;
    let em = Cr0::EM;
    let cases: [(&[u8], Cr0, Vector); 7] = [
        (FADD, ts, Vector::NM),
        (FADD, em, Vector::NM),
        (PADDB, ts, Vector::NM),
        (PADDB, em, Vector::UD),
        (ADDPS, ts, Vector::NM),
        (ADDPS, em, Vector::UD),
        (FWAIT, ts, Vector::NM),
    ];
    for (bytes, bit, vector) in cases {
        let mut guest = Guest::long();
        guest.cpu.cr0 |= bit;
        guest.raw(bytes).faults(vector);
    }
    let mut guest = Guest::long();
    guest.cpu.cr4.remove(Cr4::OSFXSR);
    guest.raw(ADDPS).faults(Vector::UD);
    let mut guest = Guest::long();
    guest.cpu.cr0 |= em;
    guest.raw(FWAIT).retire(1);
    let mut guest = Guest::long();
    guest.cpu.cr0 |= ts;
    guest.cpu.cr4.remove(Cr4::OSFXSR);
    // Not on XMM registers: crc32, movnti, lfence, popcnt.
    guest.set(Gpr::Rbx, DATA).raw(&[
        0xf2, 0x0f, 0x38, 0xf1, 0xc1, 0x0f, 0xc3, 0x03, 0x0f, 0xae, 0xe8, 0xf3, 0x0f, 0xb8, 0xc1,
    ]);
    guest.retire(4);
}

#[test]
fn an_unmasked_x87_exception_is_reported_by_the_next_waiting_instruction() {
    let mut guest = Guest::long();
    guest.set(Gpr::Rbx, DATA);
    guest.put(DATA, &0x37bu16.to_le_bytes()); // zero divide unmasked
    guest.code(64, |a| {
        a.fninit()?;
        a.fldcw(word_ptr(rbx))?;
        a.fld1()?;
        a.fldz()?;
        a.fdiv_2(st1, st0)?;
        a.fnstsw(ax)?;
        a.fld1()
    });
    guest.retire(6);
    assert_eq!(guest.gpr(Gpr::Rax) & 0x8084, 0x8084, "ZE, ES, B");
    guest.faults(Vector::MF);
    let rip = guest.stack(0);
    // FNCLEX does not wait.
    guest.cpu.regs.rip = CODE;
    guest.raw(&[0xdb, 0xe2, 0xd9, 0xe8]).retire(2);
    assert_eq!(guest.cpu.fpu.fsw & 0x80ff, 0);
    assert_eq!(rip, CODE + 2 + 2 + 2 + 2 + 2 + 2);
}

#[test]
fn the_instruction_pointers_of_x87_are_kept_zero() {
    let mut guest = Guest::long();
    guest.cpu.fpu.fip = 0x1234;
    guest.cpu.fpu.fdp = 0x5678;
    guest.set(Gpr::Rbx, DATA).code(64, |a| {
        a.fld(qword_ptr(rbx))?;
        a.fnsave(ptr(rbx + 64))
    });
    guest.put(DATA, &2.5f64.to_bits().to_le_bytes());
    guest.retire(1);
    let fpu = &guest.cpu.fpu;
    assert_eq!((fpu.fop, fpu.fip, fpu.fdp), (0, 0, 0));
    assert_eq!((fpu.fsw >> 11 & 7, fpu.ftw), (7, 0x80));
    guest.retire(1);
    assert_eq!(
        guest.bytes(DATA + 64 + 12, 12),
        [0; 12],
        "FIP, FCS, FOP and FDP in the image"
    );
    assert_eq!(
        guest.cpu.fpu,
        FpuState {
            st: guest.cpu.fpu.st,
            ..FpuState::default()
        }
    );
}

#[test]
fn mmx_marks_the_whole_x87_stack_used() {
    let mut guest = Guest::long();
    guest.cpu.fpu.fsw = 3 << 11;
    guest
        .set(Gpr::Rax, 0x1122_3344_5566_7788)
        .code(64, |a| a.movq(mm2, rax))
        .retire(1);
    assert_eq!((guest.cpu.fpu.fsw, guest.cpu.fpu.ftw), (0, 0xff));
    assert_eq!(
        guest.cpu.fpu.st[2],
        [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0xff, 0xff]
    );
    guest.raw(&[0x0f, 0x77]).retire(1); // emms
    assert_eq!(guest.cpu.fpu.ftw, 0);
}

/// MXCSR with everything masked but the exceptions in `unmasked` (bit numbers as in the flags).
fn mxcsr(unmasked: u32) -> u32 {
    0x1f80 & !(unmasked << 7)
}

#[test]
fn an_unmasked_simd_exception_leaves_the_destination_alone() {
    let one = u128::from(1f64.to_bits());
    let zero = 0u128;
    let tiny = u128::from(f64::MIN_POSITIVE.to_bits());
    let half = u128::from(0.5f64.to_bits());
    let third = u128::from((1f64 / 3.0).to_bits());
    let big = u128::from(f64::MAX.to_bits());
    let divsd: &[u8] = &[0xf2, 0x0f, 0x5e, 0xc1];
    let mulsd: &[u8] = &[0xf2, 0x0f, 0x59, 0xc1];
    let (ze, oe, ue, pe) = (1 << 2, 1 << 3, 1 << 4, 1 << 5);
    // Operands, exceptions unmasked, whether it faults, flags raised.
    type Case<'a> = (&'a [u8], u128, u128, u32, bool, u32);
    let cases: [Case<'_>; 8] = [
        (divsd, one, zero, ze, true, ze),
        (divsd, one, zero, 0, false, ze),
        (divsd, one, zero, oe, false, ze),
        (mulsd, tiny, half, ue, true, ue), // tiny but exact: underflows only when unmasked
        (mulsd, tiny, half, 0, false, 0),
        (mulsd, tiny, third, ue, true, ue | pe),
        (mulsd, big, big, oe, true, oe | pe),
        (mulsd, third, third, pe, true, pe),
    ];
    for (n, (bytes, a, b, unmasked, faults, flags)) in cases.into_iter().enumerate() {
        let mut guest = Guest::long();
        guest.cpu.fpu.mxcsr = mxcsr(unmasked);
        guest.cpu.fpu.xmm[0] = a;
        guest.cpu.fpu.xmm[1] = b;
        guest.raw(bytes);
        if faults {
            guest.faults(Vector::XM);
            assert_eq!(guest.cpu.fpu.xmm[0], a, "case {n}");
        } else {
            guest.retire(1);
        }
        assert_eq!(guest.cpu.fpu.mxcsr, mxcsr(unmasked) | flags, "case {n}");
    }
    let mut guest = Guest::long();
    guest.cpu.cr4.remove(Cr4::OSXMMEXCPT);
    guest.cpu.fpu.mxcsr = mxcsr(ze);
    guest.cpu.fpu.xmm[0] = one;
    guest.raw(divsd).faults(Vector::UD);
}

#[test]
fn a_flag_that_was_set_before_is_no_new_exception() {
    let mut guest = Guest::long();
    guest.cpu.fpu.mxcsr = mxcsr(1 << 2) | 1 << 2;
    guest.cpu.fpu.xmm[0] = u128::from(1f64.to_bits());
    guest.cpu.fpu.xmm[1] = u128::from(2f64.to_bits());
    guest.raw(&[0xf2, 0x0f, 0x5e, 0xc1]).retire(1);
    assert_eq!(guest.cpu.fpu.xmm[0], u128::from(0.5f64.to_bits()));
}

#[test]
fn rounding_follows_mxcsr() {
    for (mode, expected) in [(0u32, 2i64), (1, 2), (2, 3), (3, 2)] {
        let mut guest = Guest::long();
        guest.cpu.fpu.mxcsr = 0x1f80 | mode << 13;
        guest.cpu.fpu.xmm[1] = u128::from(2.5f64.to_bits());
        guest.code(64, |a| a.cvtsd2si(rax, xmm1)).retire(1);
        assert_eq!(guest.gpr(Gpr::Rax) as i64, expected);
        assert_eq!(guest.cpu.fpu.mxcsr & 0x3f, 0x20, "inexact");
    }
}

#[test]
fn fxsave_and_fxrstor_are_inverse_and_leave_softwares_bytes_alone() {
    let mut guest = Guest::long();
    guest.cpu.fpu.fcw = 0x27f;
    guest.cpu.fpu.ftw = 0x81;
    guest.cpu.fpu.st[7][3] = 9;
    guest.cpu.fpu.xmm = std::array::from_fn(|n| n as u128 * 0x0101_0101);
    let saved = guest.cpu.fpu.clone();
    guest.put(DATA, &[0xee; 512]);
    guest.set(Gpr::Rbx, DATA);
    guest.raw(&[0x48, 0x0f, 0xae, 0x03]).retire(1); // fxsave64 [rbx]
    assert_eq!(guest.bytes(DATA, 416), saved.to_fxsave()[..416]);
    assert_eq!(guest.bytes(DATA + 416, 96), [0xee; 96]);
    guest.cpu.fpu = FpuState::default();
    guest.raw(&[0x48, 0x0f, 0xae, 0x0b]).retire(1); // fxrstor64 [rbx]
    assert_eq!(guest.cpu.fpu, saved);
    guest.put(DATA + 24, &0x1_0000u32.to_le_bytes());
    guest.raw(&[0x0f, 0xae, 0x0b]).faults(Vector::GP);
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rbx, DATA + 8)
        .raw(&[0x0f, 0xae, 0x03])
        .faults(Vector::GP);
}

#[test]
fn fxsave_across_a_page_faults_before_it_stores() {
    let mut guest = Guest::long();
    guest.map(DATA + 0x1000, 0);
    guest.put(DATA + 0xf00, &[0xee; 256]);
    guest
        .set(Gpr::Rbx, DATA + 0xf00)
        .raw(&[0x0f, 0xae, 0x03])
        .faults(Vector::PF);
    assert_eq!(guest.bytes(DATA + 0xf00, 256), [0xee; 256]);
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rbx, DATA + 0xf00)
        .raw(&[0x0f, 0xae, 0x03])
        .retire(1);
    assert_eq!(
        guest.bytes(DATA + 0xf00, 416),
        FpuState::default().to_fxsave()[..416]
    );
}

#[test]
fn mxcsr_refuses_reserved_bits() {
    let mut guest = Guest::long();
    guest.set(Gpr::Rbx, DATA);
    guest.put(DATA, &0x1fbfu32.to_le_bytes());
    guest
        .raw(&[0x0f, 0xae, 0x13, 0x0f, 0xae, 0x5b, 0x08])
        .retire(2); // ldmxcsr; stmxcsr
    assert_eq!(guest.get32(DATA + 8), 0x1fbf);
    guest.put(DATA, &0x1_1f80u32.to_le_bytes());
    guest.raw(&[0x0f, 0xae, 0x13]).faults(Vector::GP);
}

#[test]
fn masked_moves_store_only_the_chosen_bytes() {
    let mut guest = Guest::long();
    guest.map(DATA + 0x1000, 0);
    guest.cpu.fpu.xmm[1] = 0x0f0e_0d0c_0b0a_0908_0706_0504_0302_0100;
    guest.cpu.fpu.xmm[2] = 0x80_0080;
    guest.put(DATA + 0xffc, &[0xee; 4]);
    guest
        .set(Gpr::Rdi, DATA + 0xffc)
        .raw(&[0x66, 0x0f, 0xf7, 0xca])
        .retire(1);
    assert_eq!(guest.bytes(DATA + 0xffc, 4), [0, 0xee, 2, 0xee]);
    guest.cpu.fpu.xmm[2] = 0x80 << 32;
    guest.raw(&[0x66, 0x0f, 0xf7, 0xca]).faults(Vector::PF);
    assert_eq!(guest.cpu.cr2, DATA + 0x1000);
}
