//! Faults and their delivery: frames, error codes, stacks, double and triple faults, accessed and dirty bits.

mod guest;

use guest::{CODE, DATA, Guest, HANDLERS, IST_STACK, KERNEL_CODE, KERNEL_STACK, STACK};
use iced_x86::code_asm::*;
use soft::{Delivery, Step};
use x86::exit::Injection;
use x86::regs::rflags;
use x86::{Activity, Exception, Exit, Gpr, SegmentRegister, Vector};

/// Accessed and dirty bits.
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;

#[test]
fn a_fault_in_long_mode_pushes_an_aligned_frame_with_rf() {
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rsp, STACK - 3)
        .set_flags(rflags::IF | rflags::CF);
    guest.raw(&[0x0f, 0x0b]).faults(Vector::UD);
    let frame: Vec<u64> = (0..5).map(|n| guest.stack(n)).collect();
    let flags = rflags::RF | rflags::IF | rflags::CF | rflags::FIXED;
    assert_eq!(
        frame,
        [CODE, u64::from(KERNEL_CODE), flags, STACK - 3, 0x10]
    );
    assert_eq!(guest.gpr(Gpr::Rsp), (STACK & !15) - 16 - 40);
    assert_eq!(guest.cpu.regs.rip, HANDLERS + 16 * 6);
    assert_eq!(guest.flags(rflags::IF | rflags::RF), 0, "interrupt gate");
}

#[test]
fn a_trap_gate_leaves_interrupts_on() {
    let mut guest = Guest::long();
    guest.gate_long(6, HANDLERS, 0x8f, 0);
    guest
        .set_flags(rflags::IF)
        .raw(&[0x0f, 0x0b])
        .faults(Vector::UD);
    assert_eq!(guest.flags(rflags::IF), rflags::IF);
}

#[test]
fn a_fault_at_cpl_3_goes_to_the_stack_of_the_tss_and_back() {
    let mut guest = Guest::long().user();
    guest.raw(&[0x0f, 0x0b]).faults(Vector::UD);
    assert_eq!(guest.gpr(Gpr::Rsp), KERNEL_STACK - 40);
    assert_eq!(guest.cpu.cpl(), 0);
    assert_eq!(guest.selector(SegmentRegister::Ss), 0, "null SS");
    assert!(guest.cpu.segment(SegmentRegister::Ss).attributes.unusable());
    assert_eq!(
        (guest.stack(3), guest.stack(4)),
        (STACK, u64::from(guest::USER_DATA))
    );
    guest.raw(&[0x48, 0xcf]).retire(1); // iretq
    assert_eq!((guest.cpu.cpl(), guest.cpu.regs.rip), (3, CODE));
    assert_eq!(guest.gpr(Gpr::Rsp), STACK);
    assert_eq!(guest.flags(rflags::RF), rflags::RF, "loaded by IRET");
}

#[test]
fn an_interrupt_stack_table_entry_wins_over_the_present_stack() {
    let mut guest = Guest::long();
    guest.gate_long(6, HANDLERS, 0x8e, 1);
    guest.raw(&[0x0f, 0x0b]).faults(Vector::UD);
    assert_eq!(guest.gpr(Gpr::Rsp), IST_STACK - 40);
}

#[test]
fn protected_mode_switches_stacks_by_the_tss() {
    let mut guest = Guest::protected().user32();
    guest.raw(&[0x0f, 0x0b]).faults(Vector::UD);
    assert_eq!(guest.gpr(Gpr::Rsp), KERNEL_STACK - 20);
    assert_eq!(guest.selector(SegmentRegister::Ss), guest::KERNEL_DATA);
    assert_eq!(guest.stack32(3), STACK as u32);
    guest.raw(&[0xcf]).retire(1);
    assert_eq!((guest.cpu.cpl(), guest.gpr(Gpr::Rsp)), (3, STACK));
    assert_eq!(guest.selector(SegmentRegister::Ds), guest::USER_DATA);
}

#[test]
fn real_mode_uses_the_vector_table() {
    let mut guest = Guest::real();
    guest.set_flags(rflags::IF | rflags::CF).raw(&[0xcd, 0x20]); // int 20h
    guest.retire(1);
    assert_eq!(guest.cpu.rip_linear().get(), HANDLERS + 16 * 0x20);
    let top = STACK + guest.gpr(Gpr::Rsp);
    assert_eq!(guest.get16(top), 2);
    assert_eq!(guest.get16(top + 2), (CODE >> 4) as u16);
    assert_eq!(
        u64::from(guest.get16(top + 4)),
        rflags::IF | rflags::CF | rflags::FIXED
    );
    assert_eq!(guest.flags(rflags::IF), 0);
    guest.raw(&[0xcf]).retire(1);
    assert_eq!(guest.cpu.rip_linear().get(), CODE + 2);
    assert_eq!(
        guest.flags(rflags::IF | rflags::CF),
        rflags::IF | rflags::CF
    );
}

#[test]
fn divide_errors_are_foreseen_and_change_nothing() {
    let divide: [(&[u8], u64, u64, u64); 5] = [
        (&[0xf7, 0xf1], 1, 0, 0),                           // div ecx by zero
        (&[0xf7, 0xf1], 0, 1, 1),                           // quotient 2^32
        (&[0x48, 0xf7, 0xf9], 1 << 63, u64::MAX, u64::MAX), // -2^63 / -1
        (&[0xf6, 0xf1], 0x1000, 0, 1),                      // div cl: quotient 1000h
        (&[0x66, 0xf7, 0xf9], 0x8000, 0xffff, 0xffff),      // -8000h / -1
    ];
    for (bytes, low, high, divisor) in divide {
        let mut guest = Guest::long();
        guest
            .set(Gpr::Rax, low)
            .set(Gpr::Rdx, high)
            .set(Gpr::Rcx, divisor);
        guest.raw(bytes).faults(Vector::DE);
        assert_eq!(
            (guest.gpr(Gpr::Rax), guest.gpr(Gpr::Rdx)),
            (low, high),
            "{bytes:02x?}"
        );
    }
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rax, -7i64 as u64)
        .set(Gpr::Rdx, u64::MAX)
        .set(Gpr::Rcx, 2);
    guest.raw(&[0x48, 0xf7, 0xf9]).retire(1);
    assert_eq!(guest.gpr(Gpr::Rax) as i64, -3);
    assert_eq!(guest.gpr(Gpr::Rdx) as i64, -1);
}

#[test]
fn a_misaligned_vector_operand_faults() {
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rbx, DATA + 8)
        .code(64, |a| a.movaps(xmm0, xmmword_ptr(rbx)));
    guest.faults(Vector::GP);
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rbx, DATA + 8)
        .code(64, |a| a.movups(xmm0, xmmword_ptr(rbx)));
    guest.retire(1);
}

#[test]
fn page_fault_codes_name_the_access() {
    let page = DATA + 0x1000;
    let cases: [(bool, u64, &[u8], u64); 7] = [
        (false, 0, &[0x8b, 0x03], 0),        // read, absent
        (false, 0, &[0x89, 0x03], 2),        // write, absent
        (false, page | 5, &[0x89, 0x03], 3), // write, read-only, CR0.WP
        (false, page | 5, &[0x01, 0x03], 3), // read-modify-write counts as a write
        (true, page | 3, &[0x8b, 0x03], 5),  // user read of a supervisor page
        (true, 0, &[0x89, 0x03], 6),
        (false, page | 7 | 1 << 45, &[0x8b, 0x03], 9), // reserved bit
    ];
    for (user, entry, bytes, code) in cases {
        let mut guest = if user {
            Guest::long().user()
        } else {
            Guest::long()
        };
        guest.map(page, entry);
        guest
            .set(Gpr::Rbx, page + 0x123)
            .raw(bytes)
            .faults(Vector::PF);
        assert_eq!(
            (guest.stack(0), guest.cpu.cr2),
            (code, page + 0x123),
            "{bytes:02x?}"
        );
        assert_eq!(guest.entry(page), entry, "no accessed bit");
    }
}

#[test]
fn a_fetch_fault_names_the_page_that_is_missing() {
    let mut guest = Guest::long();
    guest.map(CODE + 0x1000, (CODE + 0x1000) | 7 | 1 << 63); // not executable
    guest.cpu.regs.rip = CODE + 0x1000 - 1;
    guest.raw(&[0x48, 0x89, 0xc3]); // crosses the page
    guest.faults(Vector::PF);
    assert_eq!((guest.stack(0), guest.cpu.cr2), (0x11, CODE + 0x1000));
    assert_eq!(guest.stack(1), CODE + 0x1000 - 1);
}

#[test]
fn accessed_and_dirty_bits_are_set_by_what_succeeds() {
    let mut guest = Guest::long();
    guest.set(Gpr::Rbx, DATA);
    guest.code(64, |a| {
        a.mov(rax, qword_ptr(rbx))?;
        a.mov(qword_ptr(rbx), rax)?;
        a.lock().cmpxchg(qword_ptr(rbx + 0x1000), rcx)
    });
    assert_eq!(guest.entry(DATA) & (A | D), 0);
    guest.retire(1);
    assert_eq!(guest.entry(CODE) & (A | D), A, "fetched");
    assert_eq!(guest.entry(DATA) & (A | D), A, "read");
    assert_eq!(guest.get(guest::PML4) & A, A, "every level");
    guest.retire(1);
    assert_eq!(guest.entry(DATA) & (A | D), A | D, "written");
    guest.set(Gpr::Rax, 77).retire(1);
    assert_eq!(
        guest.entry(DATA + 0x1000) & (A | D),
        A | D,
        "a failing CMPXCHG writes too"
    );
    assert_eq!(guest.flags(rflags::ZF), 0);
}

#[test]
fn a_store_across_a_page_is_made_whole_or_not_at_all() {
    let mut guest = Guest::long();
    guest.map(DATA + 0x1000, 0);
    let at = DATA + 0x1000 - 4;
    let before = guest.bytes(at, 4);
    guest
        .set(Gpr::Rbx, at)
        .set(Gpr::Rax, u64::MAX)
        .code(64, |a| a.mov(qword_ptr(rbx), rax));
    guest.faults(Vector::PF);
    assert_eq!(guest.bytes(at, 4), before);
    assert_eq!(guest.cpu.cr2, DATA + 0x1000);
    // Mapped elsewhere, both pieces land where they belong.
    guest.cpu.regs.rip = CODE;
    guest.map(DATA + 0x1000, 0x8_0000 | 7);
    guest.retire(1);
    assert_eq!(guest.bytes(at, 4), [0xff; 4]);
    assert_eq!(guest.bytes(0x8_0000, 5), [0xff, 0xff, 0xff, 0xff, 0]);
}

#[test]
fn double_fault_then_triple_fault() {
    let mut guest = Guest::long();
    guest.gate_long(6, HANDLERS, 0x0e, 0); // #UD's gate is not present: #NP
    guest.gate_long(11, HANDLERS, 0x0e, 0); // and neither is #NP's: contributory twice
    guest.raw(&[0x0f, 0x0b]).faults(Vector::DF);
    assert_eq!((guest.stack(0), guest.stack(1)), (0, CODE));
    guest.cpu.regs.rip = CODE;
    guest.gate_long(8, HANDLERS, 0x0e, 0);
    assert_eq!(guest.step(), Step::Exit(Exit::TripleFault));
    assert_eq!(guest.cpu.activity, Activity::Shutdown);
    assert_eq!(guest.cpu.regs.rip, CODE);
}

#[test]
fn a_gate_that_is_not_present_is_named_in_the_error_code() {
    let mut guest = Guest::long();
    guest.gate_long(6, HANDLERS, 0x0e, 0);
    guest.raw(&[0x0f, 0x0b]).faults(Vector::NP);
    assert_eq!(
        guest.stack(0),
        6 * 8 + 2 + 1,
        "IDT, external to the program"
    );
    let mut guest = Guest::long();
    guest.gate_long(0x30, HANDLERS, 0x0e, 0);
    guest.raw(&[0xcd, 0x30]).faults(Vector::NP);
    assert_eq!(guest.stack(0), 0x30 * 8 + 2, "INT n is the program's own");
    assert_eq!(guest.stack(1), CODE, "a fault of the INT instruction");
}

#[test]
fn int_n_needs_the_gates_privilege_and_exceptions_do_not() {
    let mut guest = Guest::long().user();
    guest.raw(&[0xcd, 0x30]).faults(Vector::GP);
    assert_eq!(guest.stack(0), 0x30 * 8 + 2);
    let mut guest = Guest::long().user();
    guest.gate_long(0x30, HANDLERS, 0xee, 0);
    guest.raw(&[0xcd, 0x30]).retire(1);
    assert_eq!((guest.cpu.regs.rip, guest.stack(0)), (HANDLERS, CODE + 2));
    assert_eq!(guest.stack(2) & rflags::RF, 0, "a trap");
    let mut guest = Guest::long().user();
    guest.raw(&[0xcc]).faults(Vector::GP); // int3 through a DPL 0 gate
    let mut guest = Guest::long();
    guest.raw(&[0xcc]).retire(1);
    assert_eq!(
        (guest.cpu.regs.rip, guest.stack(0)),
        (HANDLERS + 16 * 3, CODE + 1)
    );
}

#[test]
fn an_external_interrupt_wakes_a_halted_cpu() {
    let mut guest = Guest::long();
    guest.raw(&[0xfb, 0xf4]).retire(1);
    assert_eq!(guest.step(), Step::RetiredExit(Exit::Hlt));
    assert_eq!(guest.cpu.activity, Activity::Halted);
    assert!(guest.cpu.interruptible());
    let interrupt = Injection::ExternalInterrupt(Vector(0x21));
    let delivery = guest
        .stepper
        .inject(&mut guest.cpu, interrupt)
        .expect("delivers");
    assert_eq!(delivery, Delivery::Delivered(Vector(0x21)));
    assert_eq!(guest.cpu.activity, Activity::Active);
    assert_eq!(guest.cpu.regs.rip, HANDLERS + 16 * 0x21);
    assert_eq!(
        (guest.stack(0), guest.stack(2)),
        (CODE + 2, rflags::IF | rflags::FIXED)
    );
}

#[test]
fn nmis_are_blocked_until_iret() {
    let mut guest = Guest::long();
    guest
        .stepper
        .inject(&mut guest.cpu, Injection::Nmi)
        .expect("delivers");
    assert!(guest.cpu.nmi_blocked);
    guest.raw(&[0x48, 0xcf]).retire(1);
    assert!(!guest.cpu.nmi_blocked);
    assert_eq!(guest.cpu.regs.rip, CODE);
}

#[test]
fn deliver_is_a_fault_at_the_present_instruction() {
    let mut guest = Guest::long();
    let delivery = guest
        .stepper
        .deliver(&mut guest.cpu, Exception::gp(0x18))
        .expect("delivers");
    assert_eq!(delivery, Delivery::Delivered(Vector::GP));
    assert_eq!((guest.stack(0), guest.stack(1)), (0x18, CODE));
    assert_eq!(guest.stack(3) & rflags::RF, rflags::RF);
}

#[test]
fn an_exception_pending_in_the_state_comes_first() {
    let mut guest = Guest::long();
    guest.cpu.pending = Some(Exception::plain(Vector::DB));
    guest.raw(&[0x90]).faults(Vector::DB);
    assert_eq!(guest.cpu.pending, None);
    assert_eq!(guest.stack(2) & rflags::RF, 0, "#DB is a trap here");
}

#[test]
fn the_trap_flag_traps_after_the_instruction() {
    let mut guest = Guest::long();
    guest.set_flags(rflags::TF).raw(&[0x90, 0x90]);
    guest.retire(1);
    guest.faults(Vector::DB);
    assert_eq!(guest.stack(0), CODE + 1);
    assert_eq!(guest.stack(2) & rflags::TF, rflags::TF);
    assert_eq!(guest.flags(rflags::TF), 0);
    assert_eq!(guest.cpu.dr6 & 1 << 14, 1 << 14);
    guest.raw(&[0x48, 0xcf]).retire(1);
    assert_eq!(guest.cpu.pending, None, "IRET itself was not stepped");
    guest.retire(1).faults(Vector::DB);
}

#[test]
fn undefined_instructions_of_the_model_fault() {
    let undefined: [&[u8]; 10] = [
        &[0x0f, 0xc7, 0xf0],             // rdrand
        &[0x0f, 0x01, 0xf9],             // rdtscp
        &[0xc5, 0xf8, 0x28, 0xc1],       // vmovaps
        &[0x66, 0x0f, 0x38, 0xdc, 0xc1], // aesenc
        &[0x0f, 0x01, 0xc8],             // monitor
        &[0x0f, 0x01, 0xd0],             // xgetbv
        &[0xf3, 0x0f, 0xae, 0xc0],       // rdfsbase
        &[0x0f, 0x38, 0xf0, 0x03],       // movbe
        &[0xf0, 0x90],                   // lock nop
        &[0x0f, 0xff, 0xc0],             // ud0
    ];
    for bytes in undefined {
        let mut guest = Guest::long();
        guest.set(Gpr::Rbx, DATA);
        guest.raw(bytes).faults(Vector::UD);
        assert_eq!(guest.stack(0), CODE, "{bytes:02x?}");
    }
    let mut guest = Guest::long();
    guest.raw(&[0x66; 15]).faults(Vector::GP); // longer than 15 bytes
}

#[test]
fn encodings_that_mean_something_else_on_newer_processors_keep_their_old_meaning() {
    let mut guest = Guest::long();
    guest.set(Gpr::Rcx, 0x1000);
    guest.raw(&[
        0xf3, 0x48, 0x0f, 0xbd, 0xc1, // lzcnt rax, rcx: BSR
        0xf3, 0x48, 0x0f, 0xbc, 0xd1, // tzcnt rdx, rcx: BSF
        0xf3, 0x0f, 0x1e, 0xfa, // endbr64: NOP
    ]);
    guest.retire(3);
    assert_eq!((guest.gpr(Gpr::Rax), guest.gpr(Gpr::Rdx)), (12, 12));
}

#[test]
fn alignment_checks_hold_at_cpl_3() {
    let mut guest = Guest::long().user();
    guest.cpu.cr0 |= x86::regs::Cr0::AM;
    guest.set_flags(rflags::AC).set(Gpr::Rbx, DATA + 2);
    guest
        .code(64, |a| a.mov(eax, dword_ptr(rbx)))
        .faults(Vector::AC);
    assert_eq!(guest.stack(0), 0);
}

#[test]
fn a_stack_without_room_for_the_frame_is_named_in_the_error_code() {
    // The stack of level 0 ends below ESP0; #SS is handled at level 3, where there is room.
    let mut guest = Guest::protected().user32();
    guest.descriptor(guest::SPARE, 0x0040_9300_0000_ffff);
    guest.put(guest::TSS + 8, &u32::from(guest::SPARE).to_le_bytes());
    let gate = (HANDLERS + 16 * 12) & 0xffff
        | u64::from(guest::USER_CODE32) << 16
        | 0xee << 40
        | (HANDLERS >> 16) << 48;
    guest.put(guest::IDT + 8 * 12, &gate.to_le_bytes());
    guest.raw(&[0x0f, 0x0b]).faults(Vector::SS);
    assert_eq!(
        guest.stack32(0),
        u32::from(guest::SPARE) | 1,
        "selector and EXT"
    );
    assert_eq!((guest.stack32(1), guest.cpu.cpl()), (CODE as u32, 3));
}
