//! What gdb reads and writes, checked against the CPU's state.

use super::*;
use proptest::prelude::*;
use x86::segment::SegmentAttributes;

fn long_mode() -> CpuState {
    let mut cpu = CpuState {
        cr0: Cr0::PE | Cr0::PG | Cr0::WP | Cr0::NE | Cr0::ET,
        cr4: Cr4::PAE,
        efer: Efer::LME | Efer::LMA,
        ..CpuState::default()
    };
    let code = cpu.segment_mut(SegmentRegister::Cs);
    code.base = 0;
    code.attributes = SegmentAttributes::from_bits(0xa09b);
    cpu
}

/// A state in which every register gdb sees holds something of its own.
fn distinct() -> CpuState {
    let mut cpu = long_mode();
    cpu.regs.gpr = std::array::from_fn(|n| 0x1111_0000_0000_0000 + n as u64);
    cpu.regs.rip = 0xffff_ffff_8100_0042;
    cpu.regs.rflags = 0x246;
    for (n, segment) in cpu.segments.iter_mut().enumerate() {
        segment.selector = 8 * (n as u16 + 1);
    }
    cpu.segment_mut(SegmentRegister::Fs).base = 0xf5_0000;
    cpu.segment_mut(SegmentRegister::Gs).base = 0xffff_8880_0000_0000;
    cpu.msrs.kernel_gs_base = 0x6b65_726e;
    cpu.cr2 = 0xdead_beef_0000_0000;
    cpu.cr3 = 0x1000;
    cpu.cr8 = 9;
    cpu.fpu.fop = 0x123;
    cpu.fpu.fip = 0x1111_2222_3333_4444;
    cpu.fpu.fdp = 0x5555_6666_7777_8888;
    cpu.fpu.xmm = std::array::from_fn(|n| (n as u128 + 1) << 100);
    cpu.fpu.st = std::array::from_fn(|n| [n as u8 + 1; 10]);
    cpu
}

#[test]
fn numbers_are_those_of_gdb_and_qemu() {
    let numbered: Vec<String> = Register::all().map(Register::name).collect();
    for (number, name) in [
        (0, "rax"),
        (1, "rbx"),
        (7, "rsp"),
        (16, "rip"),
        (17, "eflags"),
        (18, "cs"),
        (19, "ss"),
        (24, "st0"),
        (32, "fctrl"),
        (39, "fop"),
        (40, "xmm0"),
        (56, "mxcsr"),
        (57, "fs_base"),
        (65, "efer"),
    ] {
        assert_eq!(numbered[number], name);
    }
    assert_eq!(numbered.len(), 66);
    assert!(Register::from_raw_id(66).is_none());
}

#[test]
fn the_whole_file_goes_out_and_comes_back() {
    let cpu = distinct();
    let mut bytes = Vec::new();
    RegisterFile::of(&cpu).gdb_serialize(|byte| bytes.push(byte.expect("known")));
    assert_eq!(
        bytes.len(),
        Register::all().map(Register::size).sum::<usize>()
    );
    let mut file = RegisterFile::default();
    file.gdb_deserialize(&bytes)
        .expect("as long as it should be");
    assert_eq!(file.pc(), cpu.regs.rip);
    let mut back = long_mode();
    back.segments = cpu.segments; // hidden parts are not gdb's
    back.fpu.ftw = cpu.fpu.ftw;
    file.apply(&mut back).expect("a state that was one");
    assert_eq!(back, cpu);
    assert!(file.gdb_deserialize(&bytes[1..]).is_err(), "too short");
    bytes.push(0);
    assert!(file.gdb_deserialize(&bytes).is_err(), "too long");
}

#[test]
fn rip_is_linear_outside_64_bit_mode() {
    let mut cpu = CpuState::default();
    assert_eq!(Register::Rip.get(&cpu), 0xffff_fff0);
    Register::Cs.set_for_test(&mut cpu, 0x1000);
    Register::Rip
        .set(&mut cpu, 0x1_0042)
        .expect("in the segment");
    assert_eq!(cpu.regs.rip, 0x42);
    assert_eq!(Register::Rip.get(&cpu), 0x1_0042);
    assert_eq!(Register::Rip.set(&mut cpu, 1 << 32), Err(Refused));
}

#[test]
fn states_no_cpu_can_be_in_are_refused() {
    let cpu = long_mode();
    for (register, value) in [
        (Register::Rip, 1 << 47),
        (Register::FsBase, 1 << 47),
        (Register::Cr0, u128::from(Cr0::PG.bits())),
        (Register::Cr0, 1 << 7),
        (Register::Cr3, 1 << 40),
        (Register::Cr4, 0),
        (Register::Cr8, 16),
        (Register::Efer, 1 << 1),
        (Register::Mxcsr, 1 << 16),
        (Register::Segment(SegmentRegister::Ds), 1 << 16),
        (Register::Eflags, 1 << 17),
    ] {
        assert_eq!(
            register.set(&mut cpu.clone(), value),
            Err(Refused),
            "{register:?}"
        );
    }
}

#[test]
fn lma_follows_paging_and_cannot_be_written() {
    let mut cpu = long_mode();
    Register::Efer
        .set(&mut cpu, u128::from((Efer::LME | Efer::SCE).bits()))
        .expect("valid");
    assert_eq!(cpu.efer, Efer::LME | Efer::LMA | Efer::SCE);
    let off = u128::from((cpu.cr0 - Cr0::PG).bits());
    Register::Cr0.set(&mut cpu, off).expect("valid");
    assert_eq!(cpu.efer, Efer::LME | Efer::SCE);
}

#[test]
fn reserved_flags_stay_as_they_are() {
    let mut cpu = long_mode();
    Register::Eflags
        .set(&mut cpu, 0xffdd_ffff & !(1 << 17))
        .expect("valid");
    assert_eq!(cpu.regs.rflags, 0x001d_7fd7);
}

impl Register {
    #[allow(non_upper_case_globals)]
    const Cs: Self = Self::Segment(SegmentRegister::Cs);

    fn set_for_test(self, cpu: &mut CpuState, value: u128) {
        self.set(cpu, value).expect("valid");
    }
}

proptest! {
    #[test]
    fn what_is_accepted_reads_back_and_touches_nothing_else(
        number in 0usize..66,
        value in any::<u128>(),
    ) {
        let register = Register::all().nth(number).expect("in range");
        let value = value & (u128::MAX >> (128 - 8 * register.size()));
        let mut cpu = distinct();
        if register.set(&mut cpu, value).is_ok() {
            match register {
                // These have bits of their own.
                Register::Eflags | Register::Cr0 | Register::Efer => {}
                Register::Fpu(FpuControl::Ftag) => {}
                _ => prop_assert_eq!(register.get(&cpu), value),
            }
            let before = distinct();
            for other in Register::all() {
                let same_thing = matches!(
                    (register, other),
                    (Register::Cr0 | Register::Efer, Register::Cr0 | Register::Efer)
                        | (Register::St(_) | Register::Fpu(FpuControl::Fstat), Register::Fpu(FpuControl::Ftag))
                );
                if other != register && !same_thing {
                    prop_assert_eq!(other.get(&cpu), other.get(&before), "{:?}", other);
                }
            }
        }
    }
}
