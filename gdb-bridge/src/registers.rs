//! The registers gdb sees, by number.
//!
//! Purpose: one list of registers that target description, whole-file access (`g`, `G`) and single access (`p`, `P`) share; reading each
//! out of a [`CpuState`] and writing it into one.
//! Invariants:
//! - A written state is one that a CPU can be in: what a MOV, WRMSR or FXRSTOR would refuse is refused here ([`Refused`]).
//!   EFER.LMA follows CR0.PG and EFER.LME, as it does in hardware; it cannot be written.
//! - `rip` is the linear address of the next instruction, see [`CpuState::rip_linear`].
//! - Writing a segment selector in real or virtual-8086 mode also sets the base; in protected mode the hidden part stays as it is
//!   (no descriptor is loaded), as QEMU does it.
//!
//! Elsewhere: names and types for gdb (`description.rs`).
//! Source: gdb's features/i386/64bit-core.xml, 64bit-sse.xml and 64bit-segments.xml for order and sizes; QEMU's i386-64bit.xml for the system
//! registers; Intel SDM vol. 3A, 2.5 (control registers), vol. 1, 8.1.7 (tag word) and 10.5.1 (FXSAVE).

mod fpu;

use crate::registers::fpu::FpuControl;
use gdbstub::arch::{Arch, RegId, Registers};
use std::num::NonZeroUsize;
use x86::regs::{Cr0, Cr4, Efer, rflags};
use x86::{CpuMode, CpuState, Gpr, GuestVirtAddr, MXCSR_MASK, SegmentRegister};

/// One register. The order of [`Register::all`] is gdb's numbering.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Register {
    Gpr(Gpr),
    Rip,
    Eflags,
    Segment(SegmentRegister),
    St(u8),
    Fpu(FpuControl),
    Xmm(u8),
    Mxcsr,
    FsBase,
    GsBase,
    KernelGsBase,
    Cr0,
    Cr2,
    Cr3,
    Cr4,
    Cr8,
    Efer,
}

/// gdb's order of the first eight differs from the instruction encoding's.
const GPRS: [Gpr; 16] = [
    Gpr::Rax,
    Gpr::Rbx,
    Gpr::Rcx,
    Gpr::Rdx,
    Gpr::Rsi,
    Gpr::Rdi,
    Gpr::Rbp,
    Gpr::Rsp,
    Gpr::R8,
    Gpr::R9,
    Gpr::R10,
    Gpr::R11,
    Gpr::R12,
    Gpr::R13,
    Gpr::R14,
    Gpr::R15,
];

const SEGMENTS: [SegmentRegister; 6] = [
    SegmentRegister::Cs,
    SegmentRegister::Ss,
    SegmentRegister::Ds,
    SegmentRegister::Es,
    SegmentRegister::Fs,
    SegmentRegister::Gs,
];

const SYSTEM: [Register; 9] = [
    Register::FsBase,
    Register::GsBase,
    Register::KernelGsBase,
    Register::Cr0,
    Register::Cr2,
    Register::Cr3,
    Register::Cr4,
    Register::Cr8,
    Register::Efer,
];

/// The widest register, in bytes.
pub(crate) const MAX_SIZE: usize = 16;

impl Register {
    /// Every register, in the order of gdb's numbers.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let numbers = |n: u8| 0..n;
        GPRS.into_iter()
            .map(Self::Gpr)
            .chain([Self::Rip, Self::Eflags])
            .chain(SEGMENTS.into_iter().map(Self::Segment))
            .chain(numbers(8).map(Self::St))
            .chain(FpuControl::ALL.into_iter().map(Self::Fpu))
            .chain(numbers(16).map(Self::Xmm))
            .chain([Self::Mxcsr])
            .chain(SYSTEM)
    }

    /// Bytes gdb exchanges for it.
    pub(crate) const fn size(self) -> usize {
        match self {
            Self::Eflags | Self::Segment(_) | Self::Fpu(_) | Self::Mxcsr => 4,
            Self::St(_) => 10,
            Self::Xmm(_) => 16,
            _ => 8,
        }
    }

    /// gdb's name for it.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Gpr(gpr) => gpr.name().to_owned(),
            Self::Rip => "rip".to_owned(),
            Self::Eflags => "eflags".to_owned(),
            Self::Segment(segment) => format!("{segment:?}").to_lowercase(),
            Self::St(n) => format!("st{n}"),
            Self::Fpu(control) => control.name().to_owned(),
            Self::Xmm(n) => format!("xmm{n}"),
            Self::Mxcsr => "mxcsr".to_owned(),
            Self::FsBase => "fs_base".to_owned(),
            Self::GsBase => "gs_base".to_owned(),
            Self::KernelGsBase => "k_gs_base".to_owned(),
            Self::Cr0 => "cr0".to_owned(),
            Self::Cr2 => "cr2".to_owned(),
            Self::Cr3 => "cr3".to_owned(),
            Self::Cr4 => "cr4".to_owned(),
            Self::Cr8 => "cr8".to_owned(),
            Self::Efer => "efer".to_owned(),
        }
    }

    /// Its value, zero-extended; the low [`Register::size`] bytes count.
    pub(crate) fn get(self, cpu: &CpuState) -> u128 {
        let value = match self {
            Self::Gpr(gpr) => cpu.regs[gpr],
            Self::Rip => cpu.rip_linear().get(),
            Self::Eflags => cpu.regs.rflags & 0xffff_ffff,
            Self::Segment(segment) => u64::from(cpu.segment(segment).selector),
            Self::St(n) => return fpu::st(&cpu.fpu, n),
            Self::Fpu(control) => u64::from(control.get(&cpu.fpu)),
            Self::Xmm(n) => return cpu.fpu.xmm.get(usize::from(n)).copied().unwrap_or(0),
            Self::Mxcsr => u64::from(cpu.fpu.mxcsr),
            Self::FsBase => cpu.segment(SegmentRegister::Fs).base,
            Self::GsBase => cpu.segment(SegmentRegister::Gs).base,
            Self::KernelGsBase => cpu.msrs.kernel_gs_base,
            Self::Cr0 => cpu.cr0.bits(),
            Self::Cr2 => cpu.cr2,
            Self::Cr3 => cpu.cr3,
            Self::Cr4 => cpu.cr4.bits(),
            Self::Cr8 => u64::from(cpu.cr8),
            Self::Efer => cpu.efer.bits(),
        };
        u128::from(value)
    }

    /// Writes it. On refusal `cpu` may be half changed and must be thrown away.
    pub(crate) fn set(self, cpu: &mut CpuState, value: u128) -> Result<(), Refused> {
        // The mask of the register's size makes this lossless for all but ST and XMM.
        let word = value as u64;
        match self {
            Self::Gpr(gpr) => cpu.regs[gpr] = word,
            Self::Rip => set_rip(cpu, word)?,
            Self::Eflags => set_rflags(cpu, word)?,
            Self::Segment(segment) => set_selector(cpu, segment, word)?,
            Self::St(n) => fpu::set_st(&mut cpu.fpu, n, value),
            Self::Fpu(control) => control.set(&mut cpu.fpu, word as u32)?,
            Self::Xmm(n) => {
                if let Some(xmm) = cpu.fpu.xmm.get_mut(usize::from(n)) {
                    *xmm = value;
                }
            }
            Self::Mxcsr => cpu.fpu.mxcsr = within(word, u64::from(MXCSR_MASK))? as u32,
            Self::FsBase => cpu.segment_mut(SegmentRegister::Fs).base = canonical(word)?,
            Self::GsBase => cpu.segment_mut(SegmentRegister::Gs).base = canonical(word)?,
            Self::KernelGsBase => cpu.msrs.kernel_gs_base = canonical(word)?,
            Self::Cr0 => cpu.cr0 = Cr0::from_bits(word).ok_or(Refused)? | Cr0::ET,
            Self::Cr2 => cpu.cr2 = word,
            Self::Cr3 => cpu.cr3 = within(word, (1 << x86::paging::PHYS_ADDR_BITS) - 1)?,
            Self::Cr4 => cpu.cr4 = Cr4::from_bits(word).ok_or(Refused)?,
            Self::Cr8 => cpu.cr8 = within(word, 0xf)? as u8,
            Self::Efer => cpu.efer = Efer::from_bits(word).ok_or(Refused)?,
        }
        match self {
            Self::Cr0 | Self::Cr4 | Self::Efer => settle_mode(cpu),
            _ => Ok(()),
        }
    }
}

/// A value the register cannot hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Refused;

fn within(value: u64, mask: u64) -> Result<u64, Refused> {
    if value & !mask == 0 {
        Ok(value)
    } else {
        Err(Refused)
    }
}

fn canonical(value: u64) -> Result<u64, Refused> {
    if GuestVirtAddr::new(value).is_canonical() {
        Ok(value)
    } else {
        Err(Refused)
    }
}

fn set_rip(cpu: &mut CpuState, linear: u64) -> Result<(), Refused> {
    cpu.regs.rip = match cpu.mode() {
        CpuMode::Long64 => canonical(linear)?,
        _ => {
            let base = cpu.segment(SegmentRegister::Cs).base;
            within(linear, 0xffff_ffff)?.wrapping_sub(base) & 0xffff_ffff
        }
    };
    Ok(())
}

/// The bits of RFLAGS that exist; the others are as fixed as for POPF.
const RFLAGS: u64 = rflags::STATUS
    | rflags::TF
    | rflags::IF
    | rflags::DF
    | rflags::IOPL
    | rflags::NT
    | rflags::RF
    | rflags::VM
    | rflags::AC
    | rflags::VIF
    | rflags::VIP
    | rflags::ID;

fn set_rflags(cpu: &mut CpuState, value: u64) -> Result<(), Refused> {
    let value = value & RFLAGS | rflags::FIXED;
    if (value ^ cpu.regs.rflags) & rflags::VM != 0 {
        // The segments' hidden parts would not fit the mode.
        return Err(Refused);
    }
    cpu.regs.rflags = value;
    Ok(())
}

fn set_selector(cpu: &mut CpuState, which: SegmentRegister, value: u64) -> Result<(), Refused> {
    let selector = u16::try_from(value).map_err(|_| Refused)?;
    let mode = cpu.mode();
    let segment = cpu.segment_mut(which);
    if segment.selector != selector {
        segment.selector = selector;
        if matches!(mode, CpuMode::Real | CpuMode::Virtual8086) {
            segment.base = u64::from(selector) << 4;
        }
    }
    Ok(())
}

/// Lets EFER.LMA follow, and refuses combinations that MOV to CR and WRMSR refuse.
fn settle_mode(cpu: &mut CpuState) -> Result<(), Refused> {
    let paging = cpu.cr0.contains(Cr0::PG);
    let long = paging && cpu.efer.contains(Efer::LME);
    cpu.efer.set(Efer::LMA, long);
    let impossible = paging && !cpu.cr0.contains(Cr0::PE)
        || cpu.cr0.contains(Cr0::NW) && !cpu.cr0.contains(Cr0::CD)
        || long && !cpu.cr4.contains(Cr4::PAE)
        || cpu.cr4.contains(Cr4::PCIDE) && !long;
    if impossible { Err(Refused) } else { Ok(()) }
}

/// x86-64 as gdbstub is told about it.
pub(crate) enum X86_64 {}

impl Arch for X86_64 {
    type Usize = u64;
    type Registers = RegisterFile;
    type BreakpointKind = usize;
    type RegId = Register;

    fn target_description_xml() -> Option<&'static str> {
        Some(crate::description::target_xml())
    }
}

impl RegId for Register {
    fn from_raw_id(id: usize) -> Option<(Self, Option<NonZeroUsize>)> {
        let register = Self::all().nth(id)?;
        Some((register, NonZeroUsize::new(register.size())))
    }
}

/// All registers' bytes as `g` and `G` carry them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct RegisterFile {
    values: Vec<u128>,
}

impl RegisterFile {
    pub(crate) fn of(cpu: &CpuState) -> Self {
        Self {
            values: Register::all().map(|register| register.get(cpu)).collect(),
        }
    }

    /// Writes every register that differs.
    pub(crate) fn apply(&self, cpu: &mut CpuState) -> Result<(), Refused> {
        for (register, value) in Register::all().zip(&self.values) {
            if register.get(cpu) != *value {
                register.set(cpu, *value)?;
            }
        }
        Ok(())
    }
}

impl Registers for RegisterFile {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        Register::all()
            .position(|register| register == Register::Rip)
            .and_then(|at| self.values.get(at))
            .map_or(0, |value| *value as u64)
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        for (register, value) in Register::all().zip(&self.values) {
            for byte in value.to_le_bytes().iter().take(register.size()) {
                write_byte(Some(*byte));
            }
        }
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        let mut rest = bytes;
        self.values.clear();
        for register in Register::all() {
            let (value, later) = rest.split_at_checked(register.size()).ok_or(())?;
            self.values.push(from_le_bytes(value).ok_or(())?);
            rest = later;
        }
        if rest.is_empty() { Ok(()) } else { Err(()) }
    }
}

/// A little-endian value of at most [`MAX_SIZE`] bytes.
pub(crate) fn from_le_bytes(bytes: &[u8]) -> Option<u128> {
    let mut wide = [0; MAX_SIZE];
    wide.get_mut(..bytes.len())?.copy_from_slice(bytes);
    Some(u128::from_le_bytes(wide))
}

#[cfg(test)]
mod tests;
