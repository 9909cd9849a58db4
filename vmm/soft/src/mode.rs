//! What the CPU's mode means for executing instructions.
//!
//! Purpose: the derived facts every instruction needs, worked out when something they depend on changes rather than each time.
//! Invariants: equal to [`Mode::of`] the CPU state at every instruction boundary inside a run.
//! Source: Intel SDM vol. 1, 3.6; vol. 3A, 5.5 and 6.15.

use x86::regs::{Cr0, rflags};
use x86::{CpuMode, CpuState, SegmentRegister};

/// See the module.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Mode {
    /// The CPU's.
    pub(crate) cpu: CpuMode,
    /// 64-bit mode.
    pub(crate) long: bool,
    /// Long mode, compatibility mode included: EFER.LMA.
    pub(crate) lma: bool,
    /// Protected mode, not virtual-8086.
    pub(crate) protected: bool,
    /// Default operand and address size of code: 16, 32 or 64.
    pub(crate) bits: u8,
    /// Current privilege level.
    pub(crate) cpl: u8,
    /// All ones in the stack pointer's size.
    pub(crate) stack_mask: u64,
    /// Last offset that may be fetched.
    pub(crate) fetch_limit: u64,
    /// Tells code fetched in different modes apart: above the bits of a linear page number.
    pub(crate) fetch_key: u64,
    /// CR0.AM, RFLAGS.AC and CPL 3: misaligned accesses raise #AC.
    pub(crate) alignment_check: bool,
}

impl Mode {
    /// The mode of a CPU.
    pub(crate) fn of(cpu: &CpuState) -> Self {
        let mode = cpu.mode();
        let code = cpu.segment(SegmentRegister::Cs);
        let stack = cpu.segment(SegmentRegister::Ss).attributes;
        let long = mode == CpuMode::Long64;
        let lma = cpu.efer.contains(x86::regs::Efer::LMA) && mode != CpuMode::Real;
        let bits = match mode {
            CpuMode::Long64 => 64,
            CpuMode::Protected32 | CpuMode::Compatibility => 32,
            // Real mode has the cached descriptor's size, which outlives protected mode.
            CpuMode::Real if code.attributes.db() => 32,
            _ => 16,
        };
        let cpl = cpu.cpl();
        Self {
            cpu: mode,
            long,
            lma,
            protected: !matches!(mode, CpuMode::Real | CpuMode::Virtual8086),
            bits,
            cpl,
            stack_mask: if long {
                u64::MAX
            } else if stack.db() {
                0xffff_ffff
            } else {
                0xffff
            },
            fetch_limit: if long {
                u64::MAX
            } else {
                u64::from(code.limit)
            },
            fetch_key: u64::from(bits) << 56 | u64::from(cpl == 3) << 63,
            alignment_check: cpl == 3
                && cpu.cr0.contains(Cr0::AM)
                && cpu.regs.rflags & rflags::AC != 0,
        }
    }

    /// Where linear addresses wrap. In compatibility mode those of the processor's own accesses do not.
    pub(crate) fn linear_mask(&self) -> u64 {
        if self.lma { u64::MAX } else { 0xffff_ffff }
    }

    /// IOPL or better is what CPL must be for I/O and the interrupt flag.
    pub(crate) fn io_allowed(&self, flags: u64) -> bool {
        self.cpu == CpuMode::Real || u64::from(self.cpl) <= (flags & rflags::IOPL) >> 12
    }
}
