//! System instructions: mode switches, descriptor tables, segments, system calls.

mod guest;

use guest::{CODE, DATA, GDT, Guest, KERNEL_DATA, SPARE, STACK, TSS_SELECTOR};
use iced_x86::code_asm::*;
use x86::regs::{Cr0, Cr4, Efer, rflags};
use x86::{CpuMode, CpuModel, Gpr, InterruptShadow, SegmentRegister, Vector};

#[test]
fn long_mode_is_entered_through_cr0() {
    let mut guest = Guest::protected();
    let long = Guest::long();
    for page in [guest::PML4, 0x9000, 0xa000, guest::PAGE_TABLE, guest::IDT] {
        let bytes = long.bytes(page, 4096);
        guest.put(page, &bytes);
    }
    guest.descriptor(SPARE, 0x00af_9b00_0000_ffff);
    guest.set(Gpr::Rcx, 0xc000_0080).set(Gpr::Rbx, guest::PML4);
    guest.code(32, |a| {
        a.mov(cr3, ebx)?;
        a.mov(eax, 0x20)?;
        a.mov(cr4, eax)?;
        a.mov(eax, 0x100)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(eax, cr0)?;
        a.or(eax, 0x8000_0000u32 as i32)?;
        a.mov(cr0, eax)
    });
    guest.retire(9);
    assert_eq!(guest.cpu.efer, Efer::LME | Efer::LMA);
    assert_eq!(guest.cpu.mode(), CpuMode::Compatibility);
    let mut jump = vec![0xea];
    jump.extend((CODE as u32).to_le_bytes());
    jump.extend(SPARE.to_le_bytes());
    guest.raw(&jump).retire(1);
    assert_eq!(guest.cpu.mode(), CpuMode::Long64);
    guest.raw(&[0x48, 0xff, 0xc0]).retire(1); // inc rax
    // And LME may not be cleared now.
    guest.descriptor(guest::KERNEL_CODE, 0x00af_9b00_0000_ffff);
    guest
        .set(Gpr::Rax, 0)
        .code(64, |a| a.wrmsr())
        .faults(Vector::GP);
}

#[test]
fn real_mode_is_left_and_entered() {
    let mut guest = Guest::real();
    guest.put(GDT + 8, &0x00cf_9b00_0000_ffffu64.to_le_bytes());
    guest.put(DATA, &0x0fu16.to_le_bytes());
    guest.put(DATA + 2, &(GDT as u32).to_le_bytes());
    guest.raw(&[
        0x66, 0x0f, 0x01, 0x16, 0x00, 0x00, // lgdt [0], 32-bit
        0x0f, 0x20, 0xc0, // mov eax, cr0
        0x0c, 0x01, // or al, 1
        0x0f, 0x22, 0xc0, // mov cr0, eax
        0x66, 0xea, 0x00, 0x02, 0x01, 0x00, 0x08, 0x00, // jmp 8:1_0200h
    ]);
    guest.retire(1);
    assert_eq!((guest.cpu.gdtr.base, guest.cpu.gdtr.limit), (GDT, 0xf));
    guest.retire(3);
    assert_eq!(guest.cpu.mode(), CpuMode::Protected16);
    guest.retire(1);
    assert_eq!(
        (guest.cpu.mode(), guest.cpu.regs.rip),
        (CpuMode::Protected32, CODE + 0x200)
    );
    guest.code(32, |a| {
        a.mov(eax, cr0)?;
        a.and(al, 0xfe)?;
        a.mov(cr0, eax)
    });
    guest.retire(3);
    assert_eq!(guest.cpu.mode(), CpuMode::Real);
    assert_eq!(
        guest.cpu.segment(SegmentRegister::Ds).base,
        DATA,
        "kept from real mode"
    );
}

#[test]
fn control_registers_refuse_what_the_model_has_not() {
    type Program = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;
    let refused: [(u64, Program); 7] = [
        (0x8000_0000, |a| a.mov(cr0, rax)), // PG without PE
        (0x2000_0001, |a| a.mov(cr0, rax)), // NW without CD
        (1 << 32 | 0x11, |a| a.mov(cr0, rax)),
        (1 << 45, |a| a.mov(cr3, rax)),
        (0x20 | 1 << 20, |a| a.mov(cr4, rax)), // SMEP
        (0, |a| a.mov(cr4, rax)),              // PAE off in long mode
        (16, |a| a.mov(cr8, rax)),
    ];
    for (value, program) in refused {
        let mut guest = Guest::long();
        guest
            .set(Gpr::Rax, value)
            .code(64, program)
            .faults(Vector::GP);
    }
    let mut guest = Guest::long();
    guest.raw(&[0x0f, 0x22, 0xc8]).faults(Vector::UD); // cr1
    let mut guest = Guest::long().user();
    guest.code(64, |a| a.mov(rax, cr0)).faults(Vector::GP);
}

#[test]
fn descriptor_tables_are_stored_as_loaded() {
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rbx, DATA)
        .raw(&[0x0f, 0x01, 0x03, 0x0f, 0x01, 0x1b]); // sgdt [rbx]; lidt [rbx]
    guest.retire(2);
    assert_eq!(guest.cpu.idtr, guest.cpu.gdtr);
    assert_eq!(guest.get(DATA + 2), GDT);
    let mut guest = Guest::long();
    guest.set(Gpr::Rbx, DATA);
    guest.put(DATA + 2, &(1u64 << 50).to_le_bytes());
    guest.raw(&[0x0f, 0x01, 0x13]).faults(Vector::GP);
}

#[test]
fn segment_loads_check_what_they_load() {
    let cases = [
        (0x00cf_1300_0000_ffffu64, 0u16, Vector::NP), // not present
        (0x00cf_9900_0000_ffff, 0, Vector::GP),       // execute-only
        (0x0000_8900_0000_0067, 0, Vector::GP),       // a TSS
        (0x00cf_9300_0000_ffff, 3, Vector::GP),       // RPL above DPL
    ];
    for (descriptor, rpl, vector) in cases {
        let mut guest = Guest::long();
        guest.descriptor(SPARE, descriptor);
        guest
            .set(Gpr::Rax, u64::from(SPARE | rpl))
            .code(64, |a| a.mov(ds, ax))
            .faults(vector);
        assert_eq!(guest.stack(0), u64::from(SPARE));
        assert_eq!(guest.selector(SegmentRegister::Ds), KERNEL_DATA);
    }
    let mut guest = Guest::long();
    guest.descriptor(SPARE, 0x12cf_9234_5678_0fff);
    guest
        .set(Gpr::Rax, u64::from(SPARE))
        .code(64, |a| a.mov(ds, ax))
        .retire(1);
    let loaded = *guest.cpu.segment(SegmentRegister::Ds);
    assert_eq!((loaded.base, loaded.limit), (0x1234_5678, 0xf0ff_ffff));
    assert_eq!(
        guest.bytes(GDT + u64::from(SPARE) + 5, 1),
        [0x93],
        "accessed in memory"
    );
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rax, 0x1000)
        .code(64, |a| a.mov(gs, ax))
        .faults(Vector::GP);
}

#[test]
fn null_selectors_load_except_into_ss_of_user_mode() {
    let mut guest = Guest::long();
    guest.cpu.segment_mut(SegmentRegister::Gs).base = 0x1234;
    guest.set(Gpr::Rax, 0);
    guest.code(64, |a| {
        a.mov(gs, ax)?;
        a.mov(ss, ax)?;
        a.nop()
    });
    guest.retire(2);
    assert!(guest.cpu.segment(SegmentRegister::Gs).attributes.unusable());
    assert_eq!(guest.cpu.segment(SegmentRegister::Gs).base, 0);
    assert_eq!(guest.cpu.shadow, InterruptShadow::MovSs);
    assert_eq!(guest.cpu.cpl(), 0);
    let mut guest = Guest::long().user();
    guest
        .set(Gpr::Rax, 3)
        .code(64, |a| a.mov(ss, ax))
        .faults(Vector::GP);
    let mut guest = Guest::protected();
    guest.set(Gpr::Rax, 0).code(32, |a| {
        a.mov(ds, ax)?;
        a.mov(al, byte_ptr(0x2_0000))
    });
    guest.retire(1).faults(Vector::GP); // used through the null selector
}

#[test]
fn ltr_marks_the_task_busy() {
    let mut guest = Guest::long();
    guest.descriptor(
        TSS_SELECTOR,
        0x0000_8900_0000_0000 | guest::TSS << 16 | 0x67,
    );
    guest
        .set(Gpr::Rax, u64::from(TSS_SELECTOR))
        .raw(&[0x0f, 0x00, 0xd8, 0x0f, 0x00, 0xc9]);
    guest.retire(1);
    assert_eq!(guest.bytes(GDT + 0x35, 1), [0x8b]);
    guest.raw(&[0x0f, 0x00, 0xd8]).faults(Vector::GP); // busy now
    assert_eq!(guest.stack(0), u64::from(TSS_SELECTOR));
}

#[test]
fn syscall_and_sysret_cross_the_rings() {
    let mut guest = Guest::long().user();
    guest.cpu.msrs.star = 0x0013_0008 << 32;
    guest.cpu.msrs.lstar = CODE + 0x800;
    guest.cpu.msrs.fmask = rflags::IF | rflags::DF;
    guest
        .set_flags(rflags::IF | rflags::CF)
        .raw(&[0x0f, 0x05])
        .retire(1);
    assert_eq!((guest.cpu.cpl(), guest.cpu.regs.rip), (0, CODE + 0x800));
    assert_eq!(guest.gpr(Gpr::Rcx), CODE + 2);
    assert_eq!(guest.gpr(Gpr::R11), rflags::IF | rflags::CF | rflags::FIXED);
    assert_eq!(guest.cpu.regs.rflags, rflags::CF | rflags::FIXED);
    assert_eq!(
        guest.gpr(Gpr::Rsp),
        STACK,
        "the stack is the kernel's to switch"
    );
    assert_eq!(guest.selector(SegmentRegister::Cs), 8);
    guest.raw(&[0x48, 0x0f, 0x07]).retire(1);
    assert_eq!((guest.cpu.cpl(), guest.cpu.regs.rip), (3, CODE + 2));
    assert_eq!(guest.selector(SegmentRegister::Cs), 0x23);
    assert_eq!(guest.selector(SegmentRegister::Ss), 0x1b);
    assert_eq!(guest.flags(rflags::IF), rflags::IF);
    guest.cpu.efer.remove(Efer::SCE);
    guest.raw(&[0x0f, 0x05]).faults(Vector::UD);
}

#[test]
fn sysret_faults_before_it_leaves_cpl_0() {
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rcx, 1 << 47)
        .raw(&[0x48, 0x0f, 0x07])
        .faults(Vector::GP);
    assert_eq!(guest.stack(2), u64::from(guest::KERNEL_CODE), "at CPL 0");
}

#[test]
fn sysenter_and_sysexit_cross_the_rings() {
    let mut guest = Guest::long().user32();
    guest.cpu.msrs.sysenter_cs = 8;
    guest.cpu.msrs.sysenter_esp = guest::KERNEL_STACK;
    guest.cpu.msrs.sysenter_eip = CODE + 0x400;
    guest.set_flags(rflags::IF).raw(&[0x0f, 0x34]).retire(1);
    assert_eq!(guest.cpu.mode(), CpuMode::Long64);
    assert_eq!(
        (guest.cpu.cpl(), guest.gpr(Gpr::Rsp)),
        (0, guest::KERNEL_STACK)
    );
    assert_eq!(guest.flags(rflags::IF), 0);
    guest
        .set(Gpr::Rcx, 0x7_0000)
        .set(Gpr::Rdx, CODE + 2)
        .raw(&[0x0f, 0x35])
        .retire(1);
    assert_eq!(guest.cpu.mode(), CpuMode::Compatibility);
    assert_eq!((guest.cpu.cpl(), guest.gpr(Gpr::Rsp)), (3, 0x7_0000));
    assert_eq!(guest.cpu.regs.rip, CODE + 2);
}

#[test]
fn swapgs_exchanges_the_bases() {
    let mut guest = Guest::long();
    guest.cpu.segment_mut(SegmentRegister::Gs).base = 1;
    guest.cpu.msrs.kernel_gs_base = 2;
    guest.raw(&[0x0f, 0x01, 0xf8]).retire(1);
    assert_eq!(guest.cpu.segment(SegmentRegister::Gs).base, 2);
    assert_eq!(guest.cpu.msrs.kernel_gs_base, 1);
}

#[test]
fn cpuid_shows_the_model() {
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rax, 0xffff_ffff_0000_0001)
        .code(64, |a| a.cpuid())
        .retire(1);
    let expected = CpuModel::V2.cpuid(1, 0);
    assert_eq!(guest.gpr(Gpr::Rax), u64::from(expected.eax));
    assert_eq!(guest.gpr(Gpr::Rdx), u64::from(expected.edx));
}

#[test]
fn sti_holds_off_interrupts_for_one_instruction() {
    let mut guest = Guest::long();
    guest.raw(&[0xfb, 0xfb, 0x90]).retire(1);
    assert_eq!(guest.cpu.shadow, InterruptShadow::Sti);
    assert!(!guest.cpu.interruptible());
    guest.retire(1);
    assert_eq!(
        guest.cpu.shadow,
        InterruptShadow::None,
        "IF was set already"
    );
    assert!(guest.cpu.interruptible());
    let mut guest = Guest::long().user();
    guest.raw(&[0xfa]).faults(Vector::GP);
}

#[test]
fn status_words_are_stored_in_every_size() {
    let mut guest = Guest::long();
    guest.set(Gpr::Rax, u64::MAX).set(Gpr::Rcx, u64::MAX).raw(&[
        0x0f, 0x01, 0xe0, // smsw eax
        0x66, 0x0f, 0x00, 0xc9, // str cx
        0x0f, 0x06, // clts
    ]);
    guest.cpu.cr0.insert(Cr0::TS);
    let status = guest.cpu.cr0.bits();
    guest.retire(3);
    assert_eq!(guest.gpr(Gpr::Rax), status);
    assert_eq!(
        guest.gpr(Gpr::Rcx),
        u64::MAX << 16 | u64::from(TSS_SELECTOR)
    );
    assert!(!guest.cpu.cr0.contains(Cr0::TS));
    guest.set(Gpr::Rax, 8).raw(&[0x0f, 0x01, 0xf0]).retire(1); // lmsw ax: PE stays, TS set
    assert!(guest.cpu.cr0.contains(Cr0::PE | Cr0::TS));
}

#[test]
fn descriptors_can_be_asked_about() {
    let mut guest = Guest::long();
    guest.descriptor(SPARE, 0x00cf_9100_0000_0fff);
    guest.set(Gpr::Rax, u64::from(SPARE)).raw(&[
        0x0f, 0x02, 0xc8, // lar ecx, eax
        0x0f, 0x03, 0xd0, // lsl edx, eax
        0x0f, 0x00, 0xe0, // verr ax
        0x0f, 0x00, 0xe8, // verw ax
    ]);
    guest.retire(3);
    assert_eq!(guest.gpr(Gpr::Rcx) & 0xff00, 0x9100);
    assert_eq!(guest.gpr(Gpr::Rdx), 0xf0ff_ffff);
    assert_eq!(guest.flags(rflags::ZF), rflags::ZF);
    guest.retire(1);
    assert_eq!(guest.flags(rflags::ZF), 0, "not writable");
}

#[test]
fn debug_registers_keep_their_fixed_bits() {
    let mut guest = Guest::long();
    guest.set(Gpr::Rax, 0).code(64, |a| {
        a.mov(dr7, rax)?;
        a.mov(dr6, rax)?;
        a.mov(rcx, dr6)?;
        a.mov(rdx, dr7)
    });
    guest.retire(4);
    assert_eq!(
        (guest.gpr(Gpr::Rcx), guest.gpr(Gpr::Rdx)),
        (0xffff_0ff0, 0x400)
    );
    guest.cpu.dr7 |= 1 << 13;
    guest.code(64, |a| a.mov(rax, dr0)).faults(Vector::DB);
    assert_eq!(guest.cpu.dr6 & 1 << 13, 1 << 13);
    let mut guest = Guest::long();
    guest.cpu.cr4 |= Cr4::DE;
    guest.raw(&[0x0f, 0x21, 0xe0]).faults(Vector::UD); // dr4
}

#[test]
fn decimal_adjustments_follow_the_manual() {
    let cases: [(&[u8], u64, u64, u64, u64); 8] = [
        (&[0x27], 0x79 + 0x35, 0, 0x14, rflags::CF | rflags::AF), // daa
        (&[0x27], 0x2e, 0, 0x34, rflags::AF),
        (
            &[0x2f],
            0x35u64.wrapping_sub(0x47) & 0xff,
            rflags::CF | rflags::AF,
            0x88,
            rflags::CF | rflags::AF,
        ),
        (&[0x37], 0x0f, 0, 0x0105, rflags::CF | rflags::AF), // aaa
        (&[0x3f], 0x02ff, rflags::AF, 0x0109, rflags::CF | rflags::AF), // aas
        (&[0xd4, 0x0a], 0x3f, 0, 0x0603, 0),                 // aam
        (&[0xd5, 0x0a], 0x0603, 0, 0x3f, 0),                 // aad
        (&[0xd6], 0, rflags::CF, 0xff, rflags::CF),          // salc
    ];
    for (bytes, before, flags, after, expected) in cases {
        let mut guest = Guest::protected();
        guest
            .set(Gpr::Rax, before)
            .set_flags(flags)
            .raw(bytes)
            .retire(1);
        assert_eq!(guest.gpr(Gpr::Rax), after, "{bytes:02x?} of {before:#x}");
        assert_eq!(
            guest.flags(rflags::CF | rflags::AF),
            expected,
            "{bytes:02x?} of {before:#x}"
        );
    }
    let mut guest = Guest::protected();
    guest.raw(&[0xd4, 0x00]).faults(Vector::DE);
}

#[test]
fn xlat_and_bound_use_their_operands() {
    let mut guest = Guest::protected();
    guest.put(DATA + 0x85, &[0x42]);
    guest
        .set(Gpr::Rax, 0x1185)
        .set(Gpr::Rbx, DATA)
        .raw(&[0xd7])
        .retire(1);
    assert_eq!(guest.gpr(Gpr::Rax), 0x1142);
    guest.put(DATA, &(-5i32).to_le_bytes());
    guest.put(DATA + 4, &5i32.to_le_bytes());
    guest
        .set(Gpr::Rax, 0xffff_fffb)
        .raw(&[0x62, 0x03])
        .retire(1);
    guest.set(Gpr::Rax, 6).raw(&[0x62, 0x03]).faults(Vector::BR);
}

#[test]
fn virtual_8086_mode_is_entered_and_left() {
    let mut guest = Guest::protected();
    let frame = [0x10, 0x1800, 0x2_3202, 0x1000, 0x3000, 0x2000, 0x2000, 0, 0];
    for (n, value) in frame.iter().enumerate() {
        guest.put(STACK + 4 * n as u64, &(*value as u32).to_le_bytes());
    }
    guest.raw(&[0xcf]).retire(1);
    assert_eq!(guest.cpu.mode(), CpuMode::Virtual8086);
    assert_eq!(guest.cpu.rip_linear().get(), 0x1_8010);
    guest.put(0x2_0004, &[0x77]);
    guest.raw(&[0xa0, 0x04, 0x00, 0x0f, 0x0b]).retire(1); // mov al, [4]; ud2
    assert_eq!(guest.gpr(Gpr::Rax) & 0xff, 0x77);
    guest.faults(Vector::UD);
    assert_eq!(
        (guest.cpu.mode(), guest.cpu.cpl()),
        (CpuMode::Protected32, 0)
    );
    let words: Vec<u32> = (0..9).map(|n| guest.stack32(n)).collect();
    assert_eq!(words[..2], [0x13, 0x1800]);
    assert_eq!(words[2] & 0x2_0000, 0x2_0000);
    assert_eq!(words[3..], [0x1000, 0x3000, 0x2000, 0x2000, 0, 0]);
}
