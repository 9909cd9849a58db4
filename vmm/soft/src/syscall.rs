//! SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS.
//!
//! Invariants: the segments these load are flat and fixed; the descriptor tables are not read. The CPU model names Intel as its
//! vendor, so SYSCALL outside 64-bit mode is #UD, and SYSRET to a non-canonical address faults before it leaves CPL 0.
//! Source: Intel SDM vol. 2 (SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS).

use crate::guest::Guest;
use crate::op::Op;
use crate::segmentation::is_canonical;
use crate::stop::{Exec, gp, ud};
use iced_x86::Mnemonic;
use x86::regs::{Cr0, Efer, rflags};
use x86::{Gpr, Segment, SegmentRegister};

/// Flat code and data segments: present, accessed, 4 GiB.
const CODE_64: u32 = 0xa09b;
const CODE_32: u32 = 0xc09b;
const DATA: u32 = 0xc093;

fn flat(selector: u16, attributes: u32) -> Segment {
    let dpl = u32::from(selector & 3);
    Segment::flat(selector, attributes | dpl << 5)
}

impl Guest<'_> {
    fn load_flat(&mut self, code: u16, stack: u16, attributes: u32) {
        *self.cpu.segment_mut(SegmentRegister::Cs) = flat(code, attributes);
        *self.cpu.segment_mut(SegmentRegister::Ss) = flat(stack, DATA);
    }

    /// SYSCALL.
    pub(crate) fn syscall(&mut self) -> Exec {
        if !self.mode.long || !self.cpu.efer.contains(Efer::SCE) {
            return Err(ud());
        }
        let selector = (self.cpu.msrs.star >> 32) as u16 & !3;
        self.cpu.regs[Gpr::Rcx] = self.next;
        self.cpu.regs[Gpr::R11] = self.cpu.regs.rflags & !rflags::RF;
        self.set_flags(self.cpu.msrs.fmask | rflags::RF, false);
        self.cpu.regs.rflags |= rflags::FIXED;
        self.load_flat(selector, selector.wrapping_add(8), CODE_64);
        self.next = self.cpu.msrs.lstar;
        self.no_trap = !self.flag(rflags::TF);
        self.mode_changed();
        Ok(())
    }

    /// SYSRET.
    pub(crate) fn sysret(&mut self, op: &Op) -> Exec {
        if !self.mode.long || !self.cpu.efer.contains(Efer::SCE) {
            return Err(ud());
        }
        if self.mode.cpl != 0 {
            return Err(gp(0));
        }
        let base = (self.cpu.msrs.star >> 48) as u16;
        let rcx = self.cpu.regs[Gpr::Rcx];
        let wide = op.instruction.mnemonic() == Mnemonic::Sysretq;
        if wide && !is_canonical(rcx) {
            return Err(gp(0));
        }
        let (code, attributes) = if wide {
            (base.wrapping_add(16), CODE_64)
        } else {
            (base, CODE_32)
        };
        self.load_flat(code | 3, base.wrapping_add(8) | 3, attributes);
        self.cpu.regs.rflags = self.cpu.regs[Gpr::R11] & 0x3c_7fd7 | rflags::FIXED;
        self.next = if wide { rcx } else { rcx & 0xffff_ffff };
        self.mode_changed();
        Ok(())
    }

    /// SYSENTER.
    pub(crate) fn sysenter(&mut self) -> Exec {
        let selector = self.cpu.msrs.sysenter_cs as u16 & !3;
        if !self.cpu.cr0.contains(Cr0::PE) || selector == 0 {
            return Err(gp(0));
        }
        self.set_flags(rflags::VM | rflags::IF | rflags::RF, false);
        let long = self.mode.lma;
        self.load_flat(
            selector,
            selector.wrapping_add(8),
            if long { CODE_64 } else { CODE_32 },
        );
        let mask = if long { u64::MAX } else { 0xffff_ffff };
        self.cpu.regs[Gpr::Rsp] = self.cpu.msrs.sysenter_esp & mask;
        self.next = self.cpu.msrs.sysenter_eip & mask;
        self.mode_changed();
        Ok(())
    }

    /// SYSEXIT.
    pub(crate) fn sysexit(&mut self, op: &Op) -> Exec {
        let selector = self.cpu.msrs.sysenter_cs as u16 & !3;
        if !self.mode.protected || selector == 0 || self.mode.cpl != 0 {
            return Err(gp(0));
        }
        let (rcx, rdx) = (self.cpu.regs[Gpr::Rcx], self.cpu.regs[Gpr::Rdx]);
        let wide = op.instruction.mnemonic() == Mnemonic::Sysexitq;
        if wide && !(is_canonical(rcx) && is_canonical(rdx)) {
            return Err(gp(0));
        }
        let (offset, attributes) = if wide { (32, CODE_64) } else { (16, CODE_32) };
        let code = selector.wrapping_add(offset) | 3;
        self.load_flat(code, code.wrapping_add(8), attributes);
        let mask = if wide { u64::MAX } else { 0xffff_ffff };
        self.cpu.regs[Gpr::Rsp] = rcx & mask;
        self.next = rdx & mask;
        self.mode_changed();
        Ok(())
    }

    /// SWAPGS.
    pub(crate) fn swapgs(&mut self) -> Exec {
        if !self.mode.long {
            return Err(ud());
        }
        self.require_cpl0()?;
        let gs = &mut self.cpu.segments[SegmentRegister::Gs as usize].base;
        std::mem::swap(gs, &mut self.cpu.msrs.kernel_gs_base);
        Ok(())
    }
}
