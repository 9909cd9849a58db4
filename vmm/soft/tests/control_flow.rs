//! Near and far control transfers, conditions, loops.

mod guest;

use guest::{CODE, Guest, KERNEL_CODE, SPARE, STACK, USER_CODE32, USER_CODE64, USER_DATA};
use iced_x86::code_asm::*;
use x86::regs::rflags::{CF, OF, PF, SF, ZF};
use x86::{CpuMode, Gpr, SegmentRegister, Vector};

#[test]
fn all_sixteen_conditions_follow_the_flags() {
    let expected: [fn(u64) -> bool; 8] = [
        |f| f & OF != 0,
        |f| f & CF != 0,
        |f| f & ZF != 0,
        |f| f & (CF | ZF) != 0,
        |f| f & SF != 0,
        |f| f & PF != 0,
        |f| (f & SF != 0) != (f & OF != 0),
        |f| f & ZF != 0 || (f & SF != 0) != (f & OF != 0),
    ];
    let mut guest = Guest::long();
    for condition in 0..16u8 {
        guest.cpu.regs.rip = CODE + 16 * u64::from(condition);
        guest.raw(&[0x70 | condition, 4]); // Jcc +4
        for bits in 0..32u64 {
            let flags = [CF, PF, ZF, SF, OF]
                .iter()
                .enumerate()
                .fold(
                    0,
                    |all, (n, flag)| if bits & 1 << n != 0 { all | flag } else { all },
                );
            guest.cpu.regs.rflags = 2 | flags;
            let start = CODE + 16 * u64::from(condition);
            guest.cpu.regs.rip = start;
            guest.retire(1);
            let holds = expected[usize::from(condition / 2)](flags) != (condition % 2 == 1);
            let target = start + if holds { 6 } else { 2 };
            assert_eq!(
                guest.cpu.regs.rip, target,
                "condition {condition}, flags {flags:#x}"
            );
        }
    }
}

#[test]
fn calls_return() {
    let mut guest = Guest::long();
    guest.code(64, |a| {
        let mut function = a.create_label();
        a.call(function)?;
        a.nop()?;
        a.set_label(&mut function)?;
        a.ret_1(16)
    });
    guest.retire(1);
    assert_eq!(guest.gpr(Gpr::Rsp), STACK - 8);
    assert_eq!(guest.stack(0), CODE + 5);
    guest.retire(1);
    assert_eq!(guest.cpu.regs.rip, CODE + 5);
    assert_eq!(guest.gpr(Gpr::Rsp), STACK + 16);
}

#[test]
fn indirect_branches_go_through_registers_and_memory() {
    let mut guest = Guest::long();
    guest.put(guest::DATA, &(CODE + 0x100).to_le_bytes());
    guest.set(Gpr::Rbx, guest::DATA).set(Gpr::Rax, CODE + 0x80);
    guest.code(64, |a| a.call(rax));
    guest.retire(1);
    assert_eq!(
        (guest.cpu.regs.rip, guest.stack(0)),
        (CODE + 0x80, CODE + 2)
    );
    guest.code(64, |a| a.jmp(qword_ptr(rbx)));
    guest.retire(1);
    assert_eq!(guest.cpu.regs.rip, CODE + 0x100);
    guest
        .set(Gpr::Rsp, STACK)
        .code(64, |a| a.call(qword_ptr(rbx)));
    guest.retire(1);
    assert_eq!(
        (guest.cpu.regs.rip, guest.stack(0)),
        (CODE + 0x100, CODE + 0x102)
    );
}

#[test]
fn a_non_canonical_target_faults_at_the_branch() {
    let mut guest = Guest::long();
    guest.set(Gpr::Rax, 1 << 47).code(64, |a| a.call(rax));
    guest.faults(Vector::GP);
    // Error code, RIP, CS, RFLAGS, RSP: nothing of the call was pushed.
    assert_eq!(
        (guest.stack(0), guest.stack(1), guest.stack(4)),
        (0, CODE, STACK)
    );
}

#[test]
fn a_branch_with_a_16_bit_operand_is_cut_to_16_bits() {
    let mut guest = Guest::protected();
    guest.raw(&[0x66, 0xe9, 0x10, 0x00]); // jmp rel16
    guest.retire(1);
    assert_eq!(guest.cpu.regs.rip, (CODE + 4 + 0x10) & 0xffff);
}

#[test]
fn a_jump_beyond_the_limit_faults() {
    let mut guest = Guest::protected();
    guest.cpu.segment_mut(SegmentRegister::Cs).limit = CODE as u32 + 0xfff;
    guest.set(Gpr::Rax, CODE + 0x1000).code(32, |a| a.jmp(eax));
    guest.faults(Vector::GP);
    assert_eq!(guest.stack32(1), CODE as u32);
    assert_eq!(
        guest.stack32(3) & 0x1_0000,
        0x1_0000,
        "RF in the pushed flags"
    );
}

#[test]
fn running_into_the_limit_faults_at_the_next_instruction() {
    let mut guest = Guest::protected();
    guest.cpu.segment_mut(SegmentRegister::Cs).limit = CODE as u32 + 2;
    guest.raw(&[0x90, 0x90, 0x66, 0x90]); // the third is two bytes, one of them inside
    guest.retire(2);
    guest.faults(Vector::GP);
    assert_eq!(guest.stack32(1), CODE as u32 + 2);
}

#[test]
fn loops_count_in_the_address_size() {
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rcx, 0xffff_ffff_0000_0001)
        .raw(&[0x67, 0xe2, 0x10]); // loop, ECX
    guest.retire(1);
    assert_eq!(guest.cpu.regs.rip, CODE + 3, "not taken");
    assert_eq!(
        guest.gpr(Gpr::Rcx),
        0,
        "a 32-bit write clears the upper half"
    );
    guest.raw(&[0xe2, 0x10]); // loop, RCX: wraps
    guest.retire(1);
    assert_eq!(
        (guest.cpu.regs.rip, guest.gpr(Gpr::Rcx)),
        (CODE + 5 + 0x10, u64::MAX)
    );
    guest.set(Gpr::Rcx, 5).raw(&[0xe1, 0x10]); // loope, ZF clear
    guest.retire(1);
    assert_eq!(
        (guest.cpu.regs.rip, guest.gpr(Gpr::Rcx)),
        (CODE + 5 + 0x12, 4)
    );
    guest.set(Gpr::Rcx, 1 << 32).raw(&[0x67, 0xe3, 0x10]); // jecxz
    guest.retire(1);
    assert_eq!(guest.cpu.regs.rip, CODE + 5 + 0x12 + 3 + 0x10);
}

#[test]
fn a_real_mode_far_call_comes_back() {
    let mut guest = Guest::real();
    // call 2000:0010; there: retf
    guest.raw(&[0x9a, 0x10, 0x00, 0x00, 0x20]);
    guest.put(0x2_0010, &[0xcb]);
    guest.retire(1);
    assert_eq!(guest.selector(SegmentRegister::Cs), 0x2000);
    assert_eq!(guest.cpu.rip_linear().get(), 0x2_0010);
    let top = STACK + guest.gpr(Gpr::Rsp);
    assert_eq!(
        (guest.get16(top), guest.get16(top + 2)),
        (5, (CODE >> 4) as u16)
    );
    guest.retire(1);
    assert_eq!(guest.cpu.rip_linear().get(), CODE + 5);
    assert_eq!(guest.gpr(Gpr::Rsp), 0x1000);
}

#[test]
fn far_jumps_switch_between_64_and_32_bits() {
    let mut guest = Guest::long();
    guest.descriptor(SPARE, 0x00cf_9a00_0000_ffff); // 32-bit code, not accessed yet
    guest.put(guest::DATA, &(CODE as u32 + 0x40).to_le_bytes());
    guest.put(guest::DATA + 4, &SPARE.to_le_bytes());
    guest.set(Gpr::Rbx, guest::DATA).raw(&[0xff, 0x2b]); // jmp far [rbx]
    guest.retire(1);
    assert_eq!(guest.cpu.mode(), CpuMode::Compatibility);
    assert_eq!(guest.cpu.regs.rip, CODE + 0x40);
    assert_eq!(
        guest.bytes(guest::GDT + 0x45, 1)[0],
        0x9b,
        "accessed, in memory"
    );
    assert_eq!(
        guest.cpu.segment(SegmentRegister::Cs).attributes.bits(),
        0xc09b
    );
    let target = CODE as u32 + 0x80;
    let mut jump = vec![0xea];
    jump.extend(target.to_le_bytes());
    jump.extend(KERNEL_CODE.to_le_bytes());
    guest.raw(&jump).retire(1);
    assert_eq!(
        (guest.cpu.mode(), guest.cpu.regs.rip),
        (CpuMode::Long64, CODE + 0x80)
    );
}

#[test]
fn far_transfers_check_the_descriptor() {
    let not_present = 0x00cf_1b00_0000_ffff;
    let user = 0x00cf_fb00_0000_ffff;
    let data = 0x00cf_9300_0000_ffff;
    for (descriptor, vector, code) in [
        (not_present, Vector::NP, u64::from(SPARE)),
        (user, Vector::GP, u64::from(SPARE)),
        (data, Vector::GP, u64::from(SPARE)),
    ] {
        let mut guest = Guest::protected();
        guest.descriptor(SPARE, descriptor);
        let mut jump = vec![0xea];
        jump.extend((CODE as u32).to_le_bytes());
        jump.extend(SPARE.to_le_bytes());
        guest.raw(&jump).faults(vector);
        assert_eq!(u64::from(guest.stack32(0)), code);
        assert_eq!(guest.stack32(1), CODE as u32);
    }
    let mut guest = Guest::protected();
    guest.raw(&[0xea, 0, 0, 0, 0, 0, 0]).faults(Vector::GP);
    assert_eq!(guest.stack32(0), 0, "null selector");
}

#[test]
fn a_call_gate_leads_to_an_inner_level_with_its_parameters() {
    let mut guest = Guest::protected().user32();
    // Gate: KERNEL_CODE:9_0000h, DPL 3, two parameters.
    guest.descriptor(SPARE, 0x0009_ec02_0008_0000);
    guest.set(Gpr::Rsp, 0x7_0000);
    guest.put(0x7_0000, &0x1111_1111u32.to_le_bytes());
    guest.put(0x7_0004, &0x2222_2222u32.to_le_bytes());
    guest.raw(&[0x9a, 0, 0, 0, 0, SPARE as u8 | 3, 0]).retire(1);
    assert_eq!((guest.cpu.cpl(), guest.cpu.regs.rip), (0, 0x9_0000));
    let frame: Vec<u32> = (0..6).map(|n| guest.stack32(n)).collect();
    let back = CODE as u32 + 7;
    let user_stack = [0x7_0000, u32::from(USER_DATA)];
    assert_eq!(frame[..2], [back, u32::from(USER_CODE32)]);
    assert_eq!(frame[2..4], [0x1111_1111, 0x2222_2222]);
    assert_eq!(frame[4..], user_stack);
    guest.raw(&[0xca, 8, 0]).retire(1); // retf 8
    assert_eq!((guest.cpu.cpl(), guest.cpu.regs.rip), (3, u64::from(back)));
    assert_eq!(guest.gpr(Gpr::Rsp), 0x7_0008);
    assert_eq!(guest.selector(SegmentRegister::Ss), USER_DATA);
}

#[test]
fn a_far_return_to_user_mode_drops_kernel_segments() {
    let mut guest = Guest::long();
    let frame = [
        CODE + 0x100,
        u64::from(USER_CODE64),
        0x7_0000,
        u64::from(USER_DATA),
    ];
    for (n, value) in frame.iter().enumerate() {
        guest.put(STACK + 8 * n as u64, &value.to_le_bytes());
    }
    guest.raw(&[0x48, 0xcb]).retire(1); // retfq
    assert_eq!(guest.cpu.cpl(), 3);
    assert_eq!(
        (guest.cpu.regs.rip, guest.gpr(Gpr::Rsp)),
        (CODE + 0x100, 0x7_0000)
    );
    assert!(guest.cpu.segment(SegmentRegister::Ds).attributes.unusable());
    assert_eq!(guest.selector(SegmentRegister::Ds), 0);
}
