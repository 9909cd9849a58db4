//! Executing a plain instruction by its stub.
//!
//! Purpose: everything around the native instruction: the checks that come first, the memory operand, #DE and #XM, which
//! must not happen to the host.
//! Invariants: after the stub has run nothing can fail but a store to MMIO, for which the registers are put back.
//! x87 instructions leave FOP, FIP and FDP zero: hosts differ in what they keep there, and a trace must not.
//!
//! Deviation: an x87 store that an unmasked exception suppresses still writes the bytes that were there (and sets the
//! dirty bit). Where an unmasked SIMD overflow or underflow is raised, MXCSR.PE says whether the masked result would be
//! inexact, not whether the result with unlimited exponent is: it may be set where hardware leaves it clear. So may the
//! overflow, underflow and precision flags when DPPS or DPPD raise an exception between two of their roundings.
//! Elsewhere: [`crate::stub`].
//! Source: Intel SDM vol. 2 (DIV, IDIV); vol. 1, 11.5 (SIMD floating-point exceptions), 8.7 (x87 exceptions).

use crate::guest::{Guest, truncate};
use crate::memory::Span;
use crate::op::{FpuChecks, Op, Special};
use crate::stop::{Exec, gp, plain, ud};
use crate::stub::MemoryUse;
use iced_x86::Mnemonic;
use x86::paging::AccessKind;
use x86::regs::{Cr0, Cr4, rflags};
use x86::{FpuState, Gpr, Vector};

/// All six exceptions masked.
const MXCSR_MASKED: u32 = 0x1f80;
/// Denormals-are-zero does not matter here; flush-to-zero makes every tiny result raise underflow.
const MXCSR_FZ: u32 = 1 << 15;
const MXCSR_FLAGS: u32 = 0x3f;
const UNDERFLOW: u32 = 1 << 4;
/// Invalid, denormal, divide by zero: found before the result is computed.
const BEFORE_COMPUTING: u32 = 0x07;

impl Guest<'_> {
    /// Executes it.
    #[inline]
    pub(crate) fn plain(&mut self, op: &Op) -> Exec {
        if op.checks != FpuChecks::None {
            self.check_fpu(op.checks)?;
        }
        match op.traits.memory {
            MemoryUse::None => {
                if op.special != Special::None {
                    self.check_register_division(op)?;
                }
                self.run(op)
            }
            MemoryUse::Read => {
                let span = self.operand_span(op, AccessKind::Read)?;
                self.load_operand(op, span)?;
                self.check_memory_division(op)?;
                self.run(op)
            }
            MemoryUse::Write | MemoryUse::ReadWrite => self.plain_store(op),
        }
    }

    #[inline]
    fn plain_store(&mut self, op: &Op) -> Exec {
        let span = self.operand_span(op, AccessKind::Write)?;
        if op.traits.memory == MemoryUse::ReadWrite {
            self.load_operand(op, span)?;
        }
        let len = usize::from(op.traits.memory_len);
        if span.second_len == 0 && self.mem.ram.contains(span.first, len as u64) {
            self.run(op)?;
            self.mem.note_write(span.first, len);
            let (ram, scratch) = (&self.mem.ram, &self.frame.scratch);
            match len {
                8 => ram.store(span.first, scratch_u64(scratch)),
                4 => ram.store(span.first, scratch_u64(scratch) as u32),
                1 => ram.store(span.first, scratch[0]),
                _ => ram.write(span.first, scratch.get(..len).unwrap_or_default()),
            }
            return Ok(());
        }
        self.plain_store_slowly(op, span)
    }

    /// A store that crosses a page or goes to a device.
    fn plain_store_slowly(&mut self, op: &Op, span: Span) -> Exec {
        let registers = self.cpu.regs.clone();
        let fpu = self.cpu.fpu.clone();
        self.run(op)?;
        let len = usize::from(op.traits.memory_len);
        let data = self.frame.scratch.get(..len).unwrap_or_default();
        let stored = self.mem.store_span(span, data, self.pending);
        if stored.is_err() {
            self.cpu.regs = registers;
            self.cpu.fpu = fpu;
        }
        stored
    }

    /// Where the memory operand is.
    #[inline]
    fn operand_span(&mut self, op: &Op, kind: AccessKind) -> Exec<Span> {
        let mut offset = self.offset(op);
        if let Special::BitOffset(register) = op.special {
            offset = offset.wrapping_add(self.bit_distance(op, register)) & op.address.mask;
            self.frame.bit = self.gpr(register) & (8 * u64::from(op.size) - 1);
        }
        let len = usize::from(op.traits.memory_len);
        let write = kind == AccessKind::Write;
        let linear = self.linear(op.address.segment, offset, len, write)?;
        if op.aligned && linear & 15 != 0 {
            return Err(gp(0));
        }
        self.mem.span(self.cpu, linear, len, kind, self.mem.user)
    }

    /// How far a register bit offset moves the operand, in bytes (SDM vol. 2, BT).
    fn bit_distance(&self, op: &Op, register: u8) -> u64 {
        let size = u64::from(op.size);
        let bit = crate::guest::sign_extend(self.gpr(register), usize::from(op.size)) as i64;
        (bit.div_euclid(8 * size as i64) * size as i64) as u64
    }

    #[inline]
    fn load_operand(&mut self, op: &Op, span: Span) -> Exec {
        let len = usize::from(op.traits.memory_len);
        if span.second_len == 0 && self.mem.ram.contains(span.first, len as u64) {
            let (ram, scratch) = (&self.mem.ram, &mut self.frame.scratch);
            match len {
                8 => scratch[..8].copy_from_slice(&ram.load::<u64>(span.first).to_le_bytes()),
                4 => scratch[..4].copy_from_slice(&ram.load::<u32>(span.first).to_le_bytes()),
                1 => scratch[0] = ram.load(span.first),
                _ => ram.read(span.first, scratch.get_mut(..len).unwrap_or_default()),
            }
            return Ok(());
        }
        let out = self.frame.scratch.get_mut(..len).unwrap_or_default();
        self.mem.load(span, out, self.pending)
    }

    /// Runs the stub and takes over what it returns.
    #[inline]
    fn run(&mut self, op: &Op) -> Exec {
        if op.traits.x87 || op.traits.mxcsr {
            return self.run_float(op);
        }
        self.call_stub(op);
        Ok(())
    }

    #[inline]
    fn call_stub(&mut self, op: &Op) {
        let flags = op
            .stub
            .call(self.frame, &mut self.cpu.regs, &mut self.cpu.fpu);
        if op.traits.writes_flags {
            // LAHF left SF ZF AF PF CF in AH, SETO OF in AL.
            let status = flags >> 8 & 0xd5 | (flags & 1) << 11;
            self.cpu.regs.rflags = self.cpu.regs.rflags & !rflags::STATUS | status;
        }
    }

    fn run_float(&mut self, op: &Op) -> Exec {
        if op.traits.x87 {
            self.frame.image = self.cpu.fpu.to_fxsave();
            // The instruction's pointers are kept zero, and MXCSR is not the stub's to change this way.
            self.frame.image[6..24].fill(0);
            self.frame.image[24..28].copy_from_slice(&MXCSR_MASKED.to_le_bytes());
            self.frame.image[28..32].fill(0);
        }
        if op.traits.mxcsr {
            self.run_simd(op)?;
        } else {
            self.call_stub(op);
        }
        if op.traits.x87 {
            self.take_x87();
        }
        Ok(())
    }

    /// The x87 part of the image a stub left.
    fn take_x87(&mut self) {
        let image = &self.frame.image;
        let fpu = &mut self.cpu.fpu;
        fpu.fcw = u16::from_le_bytes([image[0], image[1]]);
        fpu.fsw = u16::from_le_bytes([image[2], image[3]]);
        fpu.ftw = image[4];
        for (n, st) in fpu.st.iter_mut().enumerate() {
            st.copy_from_slice(&image[32 + 16 * n..42 + 16 * n]);
        }
        (fpu.fop, fpu.fip, fpu.fdp) = (0, 0, 0);
    }

    /// Runs a stub under the guest's MXCSR.
    fn run_simd(&mut self, op: &Op) -> Exec {
        let mxcsr = self.cpu.fpu.mxcsr;
        if mxcsr & MXCSR_MASKED == MXCSR_MASKED {
            self.frame.mxcsr = mxcsr;
            self.call_stub(op);
            self.cpu.fpu.mxcsr = self.frame.mxcsr;
            return Ok(());
        }
        self.run_unmasked(op, mxcsr)
    }

    /// The same with unmasked exceptions: runs masked, looks at the flags raised, and undoes it if one of them is unmasked.
    fn run_unmasked(&mut self, op: &Op, mxcsr: u32) -> Exec {
        let registers = self.cpu.regs.clone();
        let fpu = self.cpu.fpu.clone();
        let image = self.frame.image;
        let unmasked = !(mxcsr >> 7) & MXCSR_FLAGS;
        let mut raised = 0;
        // Masked underflow is flagged only if the result is also inexact, unmasked underflow always: flushing to zero tells.
        let controls = (mxcsr | MXCSR_MASKED) & !MXCSR_FLAGS;
        if unmasked & UNDERFLOW != 0 {
            self.frame.mxcsr = controls | MXCSR_FZ;
            self.call_stub(op);
            raised |= self.frame.mxcsr & UNDERFLOW;
            self.cpu.regs = registers.clone();
            self.cpu.fpu = fpu.clone();
            self.frame.image = image;
        }
        self.frame.mxcsr = controls & !MXCSR_FZ
            | if unmasked & UNDERFLOW == 0 {
                mxcsr & MXCSR_FZ
            } else {
                0
            };
        self.call_stub(op);
        raised |= self.frame.mxcsr & MXCSR_FLAGS;
        let rounds_once = !matches!(op.instruction.mnemonic(), Mnemonic::Dpps | Mnemonic::Dppd);
        if raised & unmasked & BEFORE_COMPUTING != 0 && rounds_once {
            raised &= BEFORE_COMPUTING;
        }
        self.cpu.fpu.mxcsr = mxcsr | raised;
        if raised & unmasked == 0 {
            return Ok(());
        }
        self.cpu.regs = registers;
        self.cpu.fpu = fpu;
        self.cpu.fpu.mxcsr = mxcsr | raised;
        if op.traits.x87 {
            enter_mmx(&mut self.cpu.fpu);
        }
        if self.cpu.cr4.contains(Cr4::OSXMMEXCPT) {
            Err(plain(Vector::XM))
        } else {
            Err(ud())
        }
    }

    /// What must hold before an x87, MMX or SSE instruction executes (SDM vol. 3A, tables 2-4 and 13-1).
    pub(crate) fn check_fpu(&self, checks: FpuChecks) -> Exec {
        let cr0 = self.cpu.cr0;
        let uses_xmm = matches!(checks, FpuChecks::Sse | FpuChecks::SseMmx);
        match checks {
            FpuChecks::None => return Ok(()),
            FpuChecks::X87 | FpuChecks::X87Control => {
                if cr0.intersects(Cr0::EM | Cr0::TS) {
                    return Err(plain(Vector::NM));
                }
            }
            FpuChecks::Mmx | FpuChecks::Sse | FpuChecks::SseMmx => {
                if cr0.contains(Cr0::EM) || uses_xmm && !self.cpu.cr4.contains(Cr4::OSFXSR) {
                    return Err(ud());
                }
                if cr0.contains(Cr0::TS) {
                    return Err(plain(Vector::NM));
                }
            }
        }
        let waits = matches!(checks, FpuChecks::X87 | FpuChecks::Mmx | FpuChecks::SseMmx);
        if waits && self.x87_pending() {
            Err(plain(Vector::MF))
        } else {
            Ok(())
        }
    }

    /// An unmasked x87 exception waits to be reported. With CR0.NE clear a PC would raise IRQ 13; here it is #MF as well.
    pub(crate) fn x87_pending(&self) -> bool {
        self.cpu.fpu.fsw & !self.cpu.fpu.fcw & 0x3f != 0
    }

    fn check_register_division(&self, op: &Op) -> Exec {
        if matches!(op.special, Special::Divide | Special::DivideSigned) {
            let register = op.instruction.op0_register();
            self.check_division(op.special, self.register(register), register.size())?;
        }
        Ok(())
    }

    #[inline]
    fn check_memory_division(&self, op: &Op) -> Exec {
        if matches!(op.special, Special::Divide | Special::DivideSigned) {
            let size = usize::from(op.traits.memory_len);
            let divisor = truncate(scratch_u64(&self.frame.scratch), size);
            self.check_division(op.special, divisor, size)?;
        }
        Ok(())
    }

    /// #DE if the divisor is zero or the quotient does not fit.
    fn check_division(&self, kind: Special, divisor: u64, size: usize) -> Exec {
        let bits = 8 * size as u32;
        let (rax, rdx) = (self.rax(), self.cpu.regs[Gpr::Rdx]);
        let dividend = match size {
            1 => u128::from(rax & 0xffff),
            _ => u128::from(truncate(rdx, size)) << bits | u128::from(truncate(rax, size)),
        };
        let fits = if kind == Special::Divide {
            divisor != 0 && (dividend / u128::from(divisor)) >> bits == 0
        } else {
            let extend = 128 - 2 * bits;
            let dividend = (dividend << extend) as i128 >> extend;
            let divisor = i128::from(crate::guest::sign_extend(divisor, size) as i64);
            dividend.checked_div(divisor).is_some_and(|quotient| {
                let limit = 1i128 << (bits - 1);
                (-limit..limit).contains(&quotient)
            })
        };
        if fits { Ok(()) } else { Err(plain(Vector::DE)) }
    }
}

/// What every MMX instruction does to the x87 stack: its top becomes 0 and all of it is in use. Conversions between MMX and SSE
/// registers do it even if they raise #XM. ST0..ST7 are held relative to the top, so they move.
pub(crate) fn enter_mmx(fpu: &mut FpuState) {
    let top = usize::from(fpu.fsw >> 11 & 7);
    fpu.st.rotate_right(top);
    fpu.fsw &= !0x3800;
    fpu.ftw = 0xff;
}

#[inline]
fn scratch_u64(scratch: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&scratch[..8]);
    u64::from_le_bytes(bytes)
}
