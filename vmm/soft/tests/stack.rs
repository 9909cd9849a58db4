//! PUSH and POP in all their forms.

mod guest;

use guest::{CODE, DATA, Guest, STACK};
use iced_x86::code_asm::*;
use x86::regs::rflags;
use x86::{Gpr, InterruptShadow, SegmentRegister, Vector};

#[test]
fn pushes_and_pops_of_every_operand() {
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rax, 0x1122_3344_5566_7788)
        .set(Gpr::Rbx, DATA);
    guest.put(DATA, &0xaabb_ccdd_0011_2233u64.to_le_bytes());
    guest.code(64, |a| {
        a.push(rax)?;
        a.push(-2)?;
        a.push(qword_ptr(rbx))?;
        a.push(fs)?;
        a.push(ax)?;
        a.pop(dx)?;
        a.pop(rcx)?;
        a.pop(qword_ptr(rbx + 8))?;
        a.pop(rsi)?;
        a.pop(rsp)
    });
    guest.retire(5);
    assert_eq!(guest.gpr(Gpr::Rsp), STACK - 34);
    assert_eq!(guest.get(STACK - 8), 0x1122_3344_5566_7788);
    assert_eq!(guest.get(STACK - 16), -2i64 as u64);
    assert_eq!(
        guest.get(STACK - 32),
        u64::from(guest.selector(SegmentRegister::Fs))
    );
    guest.retire(5);
    assert_eq!(guest.gpr(Gpr::Rdx) & 0xffff, 0x7788);
    assert_eq!(guest.gpr(Gpr::Rcx), u64::from(guest::KERNEL_DATA));
    assert_eq!(guest.get(DATA + 8), 0xaabb_ccdd_0011_2233);
    assert_eq!(guest.gpr(Gpr::Rsi), -2i64 as u64);
    assert_eq!(
        guest.gpr(Gpr::Rsp),
        0x1122_3344_5566_7788,
        "POP RSP loads what was popped"
    );
}

#[test]
fn push_rsp_pushes_the_old_value_and_pop_to_rsp_relative_memory_uses_the_new() {
    let mut guest = Guest::long();
    guest.code(64, |a| {
        a.push(rsp)?;
        a.pop(qword_ptr(rsp + 16))
    });
    guest.retire(1);
    assert_eq!(guest.stack(0), STACK);
    guest.retire(1);
    assert_eq!(guest.get(STACK + 16), STACK);
}

#[test]
fn a_push_that_faults_changes_nothing() {
    let mut guest = Guest::long();
    guest.gate_long(14, guest::HANDLERS + 16 * 14, 0x8e, 1);
    guest.map(STACK - 8, (STACK - 0x1000) | 5); // read-only
    guest.code(64, |a| a.push(rax));
    let before = guest.bytes(STACK - 8, 8);
    guest.faults(Vector::PF);
    assert_eq!(guest.cpu.cr2, STACK - 8);
    assert_eq!(guest.stack(0), 3, "present, write");
    assert_eq!((guest.stack(1), guest.stack(4)), (CODE, STACK));
    assert_eq!(guest.bytes(STACK - 8, 8), before);
}

#[test]
fn pusha_that_faults_half_way_stores_nothing() {
    let mut guest = Guest::protected();
    // The fourth push crosses offset 0 of the segment; so does the frame of any fault, whence the shutdown.
    guest.cpu.segment_mut(SegmentRegister::Ss).base = 0x3_0000;
    guest.cpu.segment_mut(SegmentRegister::Ss).limit = 0xffff;
    guest.set(Gpr::Rsp, 12);
    guest.raw(&[0x60]);
    let before = guest.bytes(0x3_0000, 64);
    assert_eq!(guest.step(), soft::Step::Exit(x86::Exit::TripleFault));
    assert_eq!(guest.bytes(0x3_0000, 64), before);
    assert_eq!(guest.gpr(Gpr::Rsp), 12);
}

#[test]
fn pusha_and_popa_are_inverse() {
    let mut guest = Guest::protected();
    for (n, gpr) in Gpr::ALL[..8].iter().enumerate() {
        if *gpr != Gpr::Rsp {
            guest.set(*gpr, 0x1000_0001 * n as u64);
        }
    }
    let before = guest.cpu.regs.gpr;
    guest.code(32, |a| {
        a.pushad()?;
        a.popad()
    });
    guest.retire(1);
    assert_eq!(
        guest.stack32(3),
        STACK as u32,
        "the stack pointer from before"
    );
    assert_eq!(guest.stack32(7), before[0] as u32);
    guest.retire(1);
    assert_eq!(guest.cpu.regs.gpr, before);
}

#[test]
fn enter_builds_nested_frames_that_leave_undoes() {
    let mut guest = Guest::long();
    guest.set(Gpr::Rbp, DATA + 0x100);
    guest.put(DATA + 0x100 - 8, &0x77u64.to_le_bytes());
    guest.raw(&[0xc8, 0x20, 0x00, 0x02, 0xc9]).retire(1); // enter 32, 2
    let frame = STACK - 8;
    assert_eq!(guest.gpr(Gpr::Rbp), frame);
    assert_eq!(guest.get(frame), DATA + 0x100);
    assert_eq!(guest.get(frame - 8), 0x77, "the outer frame's pointer");
    assert_eq!(guest.get(frame - 16), frame);
    assert_eq!(guest.gpr(Gpr::Rsp), frame - 16 - 32);
    guest.retire(1);
    assert_eq!(
        (guest.gpr(Gpr::Rsp), guest.gpr(Gpr::Rbp)),
        (STACK, DATA + 0x100)
    );
}

#[test]
fn popf_changes_what_the_privilege_level_may() {
    let all = rflags::STATUS
        | rflags::TF
        | rflags::IF
        | rflags::DF
        | rflags::IOPL
        | rflags::NT
        | rflags::AC
        | rflags::ID;
    let mut guest = Guest::long();
    guest.put(STACK, &(all | rflags::RF | rflags::VM).to_le_bytes());
    guest.code(64, |a| a.popfq()).retire(1);
    assert_eq!(
        guest.cpu.regs.rflags,
        all | rflags::FIXED,
        "CPL 0: all but RF and VM"
    );
    let mut guest = Guest::long().user();
    guest.put(STACK, &all.to_le_bytes());
    guest.code(64, |a| a.popfq()).retire(1);
    let user = all & !(rflags::IF | rflags::IOPL);
    assert_eq!(guest.cpu.regs.rflags, user | rflags::FIXED, "CPL 3, IOPL 0");
    let mut guest = Guest::long().user();
    guest.set_flags(rflags::IOPL | rflags::IF);
    guest.put(STACK, &0u64.to_le_bytes());
    guest.code(64, |a| a.popfq()).retire(1);
    assert_eq!(
        guest.cpu.regs.rflags,
        rflags::IOPL | rflags::FIXED,
        "CPL 3, IOPL 3: IF too"
    );
}

#[test]
fn pushf_leaves_vm_and_rf_out() {
    let mut guest = Guest::long();
    guest
        .set_flags(rflags::RF | rflags::CF)
        .code(64, |a| a.pushfq())
        .retire(1);
    assert_eq!(guest.stack(0), rflags::CF | rflags::FIXED);
    assert_eq!(guest.flags(rflags::RF), 0, "cleared by the instruction");
}

#[test]
fn pop_ss_holds_off_interrupts_for_one_instruction() {
    let mut guest = Guest::protected();
    guest.put(STACK, &u32::from(guest::KERNEL_DATA).to_le_bytes());
    guest.raw(&[0x17, 0x90]).retire(1);
    assert_eq!(guest.cpu.shadow, InterruptShadow::MovSs);
    assert_eq!(guest.gpr(Gpr::Rsp), STACK + 4);
    guest.retire(1);
    assert_eq!(guest.cpu.shadow, InterruptShadow::None);
}

#[test]
fn a_16_bit_stack_wraps_and_keeps_the_upper_half() {
    let mut guest = Guest::real();
    guest.set(Gpr::Rsp, 0xabcd_0000).code(16, |a| a.push(ax));
    guest.retire(1);
    assert_eq!(guest.gpr(Gpr::Rsp), 0xabcd_fffe);
}

#[test]
fn pushing_a_selector_writes_only_its_16_bits() {
    let mut guest = Guest::protected();
    guest.put(STACK - 4, &[0xee; 4]);
    guest.raw(&[0x1e]).retire(1); // push ds
    assert_eq!(
        guest.stack32(0),
        0xeeee_0000 | u32::from(guest::KERNEL_DATA)
    );
}
