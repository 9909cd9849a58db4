//! Saving and loading x87 and SSE state: FXSAVE, FXRSTOR, LDMXCSR, STMXCSR, WAIT, MASKMOVQ, MASKMOVDQU.
//!
//! Invariants: FOP, FIP and FDP are zero, whatever an image says ([`crate::plain`]).
//! Elsewhere: the other x87 and SSE instructions are plain.
//! Source: Intel SDM vol. 2 (each instruction); vol. 1, 10.5 (FXSAVE area), 8.1.

use crate::guest::Guest;
use crate::op::{FpuChecks, Op};
use crate::plain::enter_mmx;
use crate::stop::{Exec, gp, plain};
use iced_x86::{OpKind, Register};
use x86::paging::AccessKind;
use x86::regs::Cr0;
use x86::{FpuState, Gpr, MXCSR_MASK, Vector};

/// What FXSAVE writes; the rest of its 512 bytes belongs to software.
const SAVED_LONG: usize = 416;
const SAVED_LEGACY: usize = 288;

impl Guest<'_> {
    /// The linear address of a 512-byte area, #GP(0) unless aligned.
    fn state_area(&mut self, op: &Op, write: bool) -> Exec<u64> {
        let offset = self.offset(op);
        let linear = self.linear(op.address.segment, offset, 512, write)?;
        if linear & 15 != 0 {
            Err(gp(0))
        } else {
            Ok(linear)
        }
    }

    fn saved_size(&self) -> usize {
        if self.mode.long {
            SAVED_LONG
        } else {
            SAVED_LEGACY
        }
    }

    /// FXSAVE.
    pub(crate) fn fxsave(&mut self, op: &Op) -> Exec {
        let linear = self.state_area(op, true)?;
        let image = self.cpu.fpu.to_fxsave();
        let size = self.saved_size();
        let user = self.mem.user;
        let span = self
            .mem
            .span(self.cpu, linear, size, AccessKind::Write, user)?;
        self.mem
            .stage_span(span, image.get(..size).unwrap_or_default())
    }

    /// FXRSTOR.
    pub(crate) fn fxrstor(&mut self, op: &Op) -> Exec {
        let linear = self.state_area(op, false)?;
        let size = self.saved_size();
        let user = self.mem.user;
        let span = self
            .mem
            .span(self.cpu, linear, size, AccessKind::Read, user)?;
        // What is not loaded keeps its value.
        let mut image = self.cpu.fpu.to_fxsave();
        self.mem.load(
            span,
            image.get_mut(..size).unwrap_or_default(),
            self.pending,
        )?;
        let mut fpu = FpuState::default();
        fpu.set_fxsave(&image);
        if fpu.mxcsr & !MXCSR_MASK != 0 {
            return Err(gp(0));
        }
        fpu.fcw = fpu.fcw & 0x1f3f | 0x40;
        let pending = fpu.fsw & !fpu.fcw & 0x3f != 0;
        fpu.fsw = fpu.fsw & !0x8080 | if pending { 0x8080 } else { 0 };
        (fpu.fop, fpu.fip, fpu.fdp) = (0, 0, 0);
        fpu.ymm_high = self.cpu.fpu.ymm_high;
        self.cpu.fpu = fpu;
        Ok(())
    }

    /// LDMXCSR.
    pub(crate) fn ldmxcsr(&mut self, op: &Op) -> Exec {
        let value = self.read_memory(op, 0, 4)? as u32;
        if value & !MXCSR_MASK != 0 {
            return Err(gp(0));
        }
        self.cpu.fpu.mxcsr = value;
        Ok(())
    }

    /// STMXCSR.
    pub(crate) fn stmxcsr(&mut self, op: &Op) -> Exec {
        self.write_memory(op, 0, 4, u64::from(self.cpu.fpu.mxcsr))
    }

    /// WAIT.
    pub(crate) fn wait(&mut self) -> Exec {
        if self.cpu.cr0.contains(Cr0::MP | Cr0::TS) {
            return Err(plain(Vector::NM));
        }
        if self.x87_pending() {
            Err(plain(Vector::MF))
        } else {
            Ok(())
        }
    }

    /// MASKMOVQ and MASKMOVDQU: stores the bytes whose mask byte has its top bit set.
    pub(crate) fn masked_move(&mut self, op: &Op) -> Exec {
        let (source, mask) = (op.instruction.op1_register(), op.instruction.op2_register());
        let len = if source.is_mm() { 8 } else { 16 };
        let mut fpu = self.cpu.fpu.clone();
        if source.is_mm() {
            enter_mmx(&mut fpu);
        }
        let value = vector(&fpu, source).to_le_bytes();
        let mask = vector(&fpu, mask).to_le_bytes();
        let rdi = self.cpu.regs[Gpr::Rdi];
        let base = match op.instruction.op0_kind() {
            OpKind::MemorySegDI => rdi & 0xffff,
            OpKind::MemorySegEDI => rdi & 0xffff_ffff,
            _ => rdi,
        };
        for n in (0..len).filter(|&n| mask[n] & 0x80 != 0) {
            let offset = base.wrapping_add(n as u64);
            self.write(op.address.segment, offset, 1, u64::from(value[n]))?;
        }
        self.cpu.fpu = fpu;
        Ok(())
    }

    /// CLFLUSH: checked like a load of one byte.
    pub(crate) fn clflush(&mut self, op: &Op) -> Exec {
        let linear = self.linear(op.address.segment, self.offset(op), 1, false)?;
        let user = self.mem.user;
        self.mem
            .translate(self.cpu, linear, AccessKind::Read, user)?;
        Ok(())
    }

    /// Runs the checks of an instruction that is not plain.
    pub(crate) fn check_state_instruction(&self, op: &Op) -> Exec {
        if op.checks == FpuChecks::None {
            Ok(())
        } else {
            self.check_fpu(op.checks)
        }
    }
}

/// An XMM register, or an MMX register of an x87 stack with its top at 0.
fn vector(fpu: &FpuState, register: Register) -> u128 {
    let number = register.number();
    if register.is_xmm() {
        return fpu.xmm.get(number).copied().unwrap_or(0);
    }
    let mut bytes = [0; 16];
    let st = fpu.st.get(number).copied().unwrap_or_default();
    bytes[..8].copy_from_slice(&st[..8]);
    u128::from_le_bytes(bytes)
}
