//! CPU state to and from KVM's structs.
//!
//! Purpose: exact conversion between [`CpuState`] and `kvm_regs`, `kvm_sregs`, `kvm_xsave`, `kvm_debugregs` and
//! `kvm_vcpu_events`.
//! Invariants: converting there and back changes nothing that software can see. Hidden parts that KVMs fill differently are
//! normalised on the way in: a null selector in protected mode becomes an unusable segment (base 0; FS and GS keep theirs),
//! and a loaded code or data segment has its accessed bit set. x87 instruction and data pointers are dropped, because
//! they are addresses that differ between the engines.
//! Elsewhere: the ioctls ([`crate::vcpu`]).
//! Source: KVM API, sections 4.11-4.14, 4.31, 4.33, 4.42; Intel SDM vol. 1, 13.4 (XSAVE area); vol. 3A, 3.4.2 (null selectors).

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, kvm_debugregs, kvm_dtable,
    kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xsave,
};
use x86::regs::{Cr0, Cr4, Efer, rflags};
use x86::segment::SegmentAttributes;
use x86::{
    CpuState, DescriptorTable, Exception, FpuState, GuestVirtAddr, InterruptShadow, Registers,
    Segment, SegmentRegister, Vector,
};

/// `KVM_X86_SHADOW_INT_MOV_SS` and `KVM_X86_SHADOW_INT_STI`.
const SHADOW_MOV_SS: u8 = 1;
const SHADOW_STI: u8 = 2;

/// Byte offset of XSTATE_BV in an XSAVE area, and its bits for x87 and SSE.
const XSTATE_BV: usize = 512;
const XSTATE_X87_SSE: u32 = 3;

pub(crate) fn regs_to_kvm(regs: &Registers) -> kvm_regs {
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = regs.gpr;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: regs.rip,
        rflags: regs.rflags,
    }
}

pub(crate) fn regs_from_kvm(r: &kvm_regs) -> Registers {
    Registers {
        gpr: [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15,
        ],
        rip: r.rip,
        rflags: r.rflags | rflags::FIXED,
    }
}

fn segment_to_kvm(segment: &Segment) -> kvm_segment {
    let a = segment.attributes;
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: a.kind(),
        present: u8::from(a.present()),
        dpl: a.dpl(),
        db: u8::from(a.db()),
        s: u8::from(a.is_code_or_data()),
        l: u8::from(a.long()),
        g: u8::from(a.granularity()),
        avl: u8::from(a.bits() & 1 << 12 != 0),
        unusable: u8::from(a.unusable()),
        padding: 0,
    }
}

fn segment_from_kvm(s: &kvm_segment) -> Segment {
    let bit = |value: u8, at: u32| u32::from(value & 1) << at;
    let accessed = u32::from(s.s & 1 != 0 && s.unusable == 0);
    let bits = u32::from(s.type_ & 0xf)
        | accessed
        | bit(s.s, 4)
        | u32::from(s.dpl & 3) << 5
        | bit(s.present, 7)
        | bit(s.avl, 12)
        | bit(s.l, 13)
        | bit(s.db, 14)
        | bit(s.g, 15)
        | bit(s.unusable, 16);
    Segment {
        selector: s.selector,
        base: s.base,
        limit: s.limit,
        attributes: SegmentAttributes::from_bits(bits),
    }
}

/// What a segment register holds after a null selector was loaded. SS keeps the DPL, which is the CPL.
fn null_segment(which: SegmentRegister, segment: &Segment) -> Segment {
    let base = match which {
        SegmentRegister::Fs | SegmentRegister::Gs => segment.base,
        _ => 0,
    };
    let attributes = match which {
        SegmentRegister::Ss => SegmentAttributes::UNUSABLE.with_dpl(segment.attributes.dpl()),
        _ => SegmentAttributes::UNUSABLE,
    };
    Segment {
        selector: segment.selector,
        base,
        limit: 0,
        attributes,
    }
}

fn table_to_kvm(table: &DescriptorTable) -> kvm_dtable {
    kvm_dtable {
        base: table.base,
        limit: table.limit,
        padding: [0; 3],
    }
}

fn table_from_kvm(table: &kvm_dtable) -> DescriptorTable {
    DescriptorTable {
        base: table.base,
        limit: table.limit,
    }
}

/// The system registers of `cpu`, with `idtr` in place of its own.
pub(crate) fn sregs_to_kvm(cpu: &CpuState, idtr: &DescriptorTable) -> kvm_sregs {
    let segment = |which| segment_to_kvm(cpu.segment(which));
    kvm_sregs {
        cs: segment(SegmentRegister::Cs),
        ds: segment(SegmentRegister::Ds),
        es: segment(SegmentRegister::Es),
        fs: segment(SegmentRegister::Fs),
        gs: segment(SegmentRegister::Gs),
        ss: segment(SegmentRegister::Ss),
        tr: segment_to_kvm(&cpu.tr),
        ldt: segment_to_kvm(&cpu.ldtr),
        gdt: table_to_kvm(&cpu.gdtr),
        idt: table_to_kvm(idtr),
        cr0: cpu.cr0.bits(),
        cr2: cpu.cr2,
        cr3: cpu.cr3,
        cr4: cpu.cr4.bits(),
        cr8: u64::from(cpu.cr8),
        efer: cpu.efer.bits(),
        apic_base: cpu.apic_base,
        interrupt_bitmap: [0; 4],
    }
}

/// Everything in `kvm_sregs` into `cpu`. Wants [`Registers`] to be there already (RFLAGS.VM decides about null selectors).
pub(crate) fn sregs_from_kvm(s: &kvm_sregs, cpu: &mut CpuState) {
    cpu.segments = [&s.es, &s.cs, &s.ss, &s.ds, &s.fs, &s.gs].map(segment_from_kvm);
    cpu.tr = segment_from_kvm(&s.tr);
    cpu.ldtr = segment_from_kvm(&s.ldt);
    cpu.gdtr = table_from_kvm(&s.gdt);
    cpu.idtr = table_from_kvm(&s.idt);
    cpu.cr0 = Cr0::from_bits_retain(s.cr0);
    cpu.cr2 = s.cr2;
    cpu.cr3 = s.cr3;
    cpu.cr4 = Cr4::from_bits_retain(s.cr4);
    cpu.cr8 = (s.cr8 & 0xf) as u8;
    cpu.efer = Efer::from_bits_retain(s.efer);
    cpu.apic_base = s.apic_base;
    if cpu.cr0.contains(Cr0::PE) && cpu.regs.rflags & rflags::VM == 0 {
        for which in SegmentRegister::ALL {
            let segment = *cpu.segment(which);
            if which != SegmentRegister::Cs && segment.selector & !3 == 0 {
                *cpu.segment_mut(which) = null_segment(which, &segment);
            }
        }
    }
    if cpu.ldtr.attributes.unusable() {
        cpu.ldtr = Segment {
            base: 0,
            limit: 0,
            attributes: SegmentAttributes::UNUSABLE,
            ..cpu.ldtr
        };
    }
}

pub(crate) fn debug_to_kvm(cpu: &CpuState) -> kvm_debugregs {
    kvm_debugregs {
        db: cpu.dr,
        dr6: cpu.dr6,
        dr7: cpu.dr7,
        ..Default::default()
    }
}

pub(crate) fn debug_from_kvm(d: &kvm_debugregs, cpu: &mut CpuState) {
    cpu.dr = d.db;
    cpu.dr6 = d.dr6;
    cpu.dr7 = d.dr7;
}

/// Interrupt shadow and NMI blocking. A pending exception stays here: we deliver it ourselves.
pub(crate) fn events_to_kvm(cpu: &CpuState) -> kvm_vcpu_events {
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_NMI_PENDING,
        ..Default::default()
    };
    events.nmi.masked = u8::from(cpu.nmi_blocked);
    events.interrupt.shadow = match cpu.shadow {
        InterruptShadow::None => 0,
        InterruptShadow::MovSs => SHADOW_MOV_SS,
        InterruptShadow::Sti => SHADOW_STI,
    };
    events
}

/// Wants the system registers to be there already (CR2 belongs to a pending page fault).
pub(crate) fn events_from_kvm(events: &kvm_vcpu_events, cpu: &mut CpuState) {
    cpu.nmi_blocked = events.nmi.masked != 0;
    cpu.shadow = match events.interrupt.shadow {
        shadow if shadow & SHADOW_MOV_SS != 0 => InterruptShadow::MovSs,
        shadow if shadow & SHADOW_STI != 0 => InterruptShadow::Sti,
        _ => InterruptShadow::None,
    };
    let raised = events.exception.injected != 0 || events.exception.pending != 0;
    cpu.pending = raised.then(|| exception(events, cpu.cr2));
}

/// The exception that `kvm_vcpu_events` names, whether or not it says that one is raised.
pub(crate) fn exception(events: &kvm_vcpu_events, cr2: u64) -> Exception {
    let vector = Vector(events.exception.nr);
    Exception {
        vector,
        error_code: vector
            .pushes_error_code()
            .then_some(events.exception.error_code),
        cr2: (vector == Vector::PF).then(|| GuestVirtAddr::new(cr2)),
    }
}

/// Puts `fpu` into an XSAVE area whose other components stay as they are.
pub(crate) fn fpu_to_kvm(fpu: &FpuState, area: &mut kvm_xsave) {
    let image = fpu.to_fxsave();
    for (word, bytes) in area.region.iter_mut().zip(image.chunks_exact(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    area.region[XSTATE_BV / 4] |= XSTATE_X87_SSE;
}

pub(crate) fn fpu_from_kvm(area: &kvm_xsave) -> FpuState {
    let mut image = [0; 512];
    for (bytes, word) in image.chunks_exact_mut(4).zip(&area.region) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    let mut fpu = FpuState::default();
    fpu.set_fxsave(&image);
    FpuState {
        fop: 0,
        fip: 0,
        fdp: 0,
        ..fpu
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86::Gpr;

    /// A 64-bit kernel's state with a distinct value wherever there is room for one.
    pub(crate) fn long_mode() -> CpuState {
        let mut cpu = CpuState::default();
        for gpr in Gpr::ALL {
            cpu.regs[gpr] = 0x1000 + gpr as u64;
        }
        cpu.regs.rip = 0xffff_ffff_8100_0000;
        cpu.regs.rflags = rflags::FIXED | rflags::IF | rflags::ZF;
        cpu.cr0 = Cr0::PE | Cr0::PG | Cr0::WP | Cr0::NE | Cr0::ET;
        cpu.cr4 = Cr4::PAE | Cr4::OSFXSR;
        cpu.efer = Efer::LME | Efer::LMA | Efer::SCE;
        cpu.segments = [Segment::flat(0x18, 0xc093); 6];
        *cpu.segment_mut(SegmentRegister::Cs) = Segment::flat(0x10, 0xa09b);
        cpu.segment_mut(SegmentRegister::Gs).base = 0xffff_8880_0000_0000;
        cpu.tr = Segment {
            selector: 0x40,
            base: 0x1234,
            limit: 0x67,
            attributes: SegmentAttributes::from_bits(0x8b),
        };
        cpu.ldtr = Segment {
            attributes: SegmentAttributes::UNUSABLE,
            ..Segment::default()
        };
        cpu
    }

    fn round_trip(cpu: &CpuState) -> CpuState {
        let mut back = cpu.clone();
        back.regs = regs_from_kvm(&regs_to_kvm(&cpu.regs));
        back.segments = Default::default();
        sregs_from_kvm(&sregs_to_kvm(cpu, &cpu.idtr), &mut back);
        debug_from_kvm(&debug_to_kvm(cpu), &mut back);
        events_from_kvm(&events_to_kvm(cpu), &mut back);
        let mut area = kvm_xsave::default();
        fpu_to_kvm(&cpu.fpu, &mut area);
        back.fpu = fpu_from_kvm(&area);
        back
    }

    #[test]
    fn states_survive_the_round_trip() {
        let mut masked = long_mode();
        masked.nmi_blocked = true;
        masked.shadow = InterruptShadow::Sti;
        masked.fpu.xmm[7] = 0x0011_2233;
        masked.fpu.mxcsr = 0x1fa0;
        for cpu in [CpuState::default(), long_mode(), masked] {
            assert_eq!(round_trip(&cpu), cpu);
        }
    }

    #[test]
    fn a_null_selector_has_one_form() {
        let mut cpu = long_mode();
        let mut sregs = sregs_to_kvm(&cpu, &cpu.idtr);
        sregs.ss = kvm_segment {
            dpl: 0,
            present: 1,
            type_: 3,
            limit: 0xfff,
            s: 1,
            ..Default::default()
        };
        sregs.ds = kvm_segment {
            selector: 3,
            unusable: 1,
            ..Default::default()
        };
        sregs.gs = kvm_segment {
            base: 0x5000,
            ..Default::default()
        };
        sregs_from_kvm(&sregs, &mut cpu);
        for which in [
            SegmentRegister::Ss,
            SegmentRegister::Ds,
            SegmentRegister::Gs,
        ] {
            assert_eq!(
                cpu.segment(which).attributes,
                SegmentAttributes::UNUSABLE,
                "{which:?}"
            );
            assert_eq!(cpu.segment(which).limit, 0, "{which:?}");
        }
        assert_eq!(cpu.segment(SegmentRegister::Ds).selector, 3);
        assert_eq!(cpu.segment(SegmentRegister::Gs).base, 0x5000);
    }

    #[test]
    fn in_real_mode_selector_zero_is_a_segment() {
        let cpu = CpuState::default();
        assert_eq!(
            round_trip(&cpu).segment(SegmentRegister::Ds),
            cpu.segment(SegmentRegister::Ds)
        );
    }

    #[test]
    fn a_pending_page_fault_carries_its_address() {
        let mut cpu = long_mode();
        cpu.cr2 = 0x7000;
        let mut events = events_to_kvm(&cpu);
        events.exception.pending = 1;
        events.exception.nr = 14;
        events.exception.has_error_code = 1;
        events.exception.error_code = 6;
        events_from_kvm(&events, &mut cpu);
        let pending = cpu.pending.expect("pending");
        assert_eq!(pending.cr2, Some(GuestVirtAddr::new(0x7000)));
        assert_eq!(pending.error_code, Some(6));
    }
}
