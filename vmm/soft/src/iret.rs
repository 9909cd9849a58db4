//! IRET in every mode.
//!
//! Invariants: as in [`crate::far`]: checks first; the caller puts registers and segments back on failure.
//!
//! Not implemented: the return from a nested task (NT set outside long mode).
//! Source: Intel SDM vol. 2, IRET.

use crate::descriptor::{is_null, selector_code};
use crate::far::check_target;
use crate::guest::Guest;
use crate::op::Op;
use crate::segments::virtual_8086_segment;
use crate::stop::{Exec, Stop, gp};
use iced_x86::Mnemonic;
use x86::regs::rflags;
use x86::{CpuMode, Gpr, SegmentRegister};

impl Guest<'_> {
    /// IRET, IRETD, IRETQ.
    pub(crate) fn iret(&mut self, op: &Op) -> Exec {
        let size = match op.instruction.mnemonic() {
            Mnemonic::Iretq => 8,
            Mnemonic::Iretd => 4,
            _ => 2,
        };
        match self.mode.cpu {
            CpuMode::Real => self.iret_real(size)?,
            CpuMode::Virtual8086 => {
                if self.cpu.regs.rflags & rflags::IOPL != rflags::IOPL {
                    return Err(gp(0));
                }
                self.iret_real(size)?;
            }
            _ => self.iret_protected(size)?,
        }
        self.cpu.nmi_blocked = false;
        self.mode_changed();
        Ok(())
    }

    fn iret_real(&mut self, size: usize) -> Exec {
        let offset = self.pop(size)?;
        let selector = self.pop(size)? as u16;
        let image = self.pop(size)?;
        if offset > self.mode.fetch_limit {
            return Err(gp(0));
        }
        let mut writable =
            rflags::STATUS | rflags::TF | rflags::IF | rflags::DF | rflags::NT | rflags::IOPL;
        if self.mode.cpu == CpuMode::Virtual8086 {
            writable &= !rflags::IOPL;
        }
        if size > 2 {
            writable |= rflags::AC | rflags::ID | rflags::RF;
        }
        self.load_flags(image, writable);
        self.set_real_cs(selector);
        self.next = offset;
        Ok(())
    }

    fn iret_protected(&mut self, size: usize) -> Exec {
        if self.flag(rflags::NT) {
            if self.mode.lma {
                return Err(gp(0));
            }
            return Err(Stop::Unimplemented("a return from a nested hardware task"));
        }
        let offset = self.pop(size)?;
        let selector = self.pop(size)? as u16;
        let image = self.pop(size)?;
        if image & rflags::VM != 0 && self.mode.cpl == 0 && !self.mode.lma && size == 4 {
            return self.iret_to_virtual_8086(offset, selector, image);
        }
        let rpl = (selector & 3) as u8;
        if is_null(selector) {
            return Err(gp(0));
        }
        if rpl < self.mode.cpl {
            return Err(gp(selector_code(selector)));
        }
        let descriptor = self
            .descriptor(selector)?
            .ok_or_else(|| gp(selector_code(selector)))?;
        let cs = self.code_segment(descriptor, selector, true)?;
        check_target(&cs, offset, self.mode.lma)?;
        let writable = self.iret_flags(size);
        // In 64-bit mode SS:RSP are popped whatever the level.
        if self.mode.long || rpl > self.mode.cpl {
            let sp = self.pop(size)?;
            let ss = self.pop(size)? as u16;
            self.return_outer(cs, ss, sp, size)?;
        } else {
            *self.cpu.segment_mut(SegmentRegister::Cs) = cs;
        }
        self.load_flags(image, writable);
        self.next = offset;
        Ok(())
    }

    /// Which flags an IRET at the present level may change.
    fn iret_flags(&self, size: usize) -> u64 {
        let mut writable = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
        if size > 2 {
            writable |= rflags::RF | rflags::AC | rflags::ID;
        }
        if self.mode.cpl == 0 && size > 2 {
            writable |= rflags::VIF | rflags::VIP;
        }
        writable | self.interrupt_flags_writable()
    }

    fn iret_to_virtual_8086(&mut self, offset: u64, selector: u16, image: u64) -> Exec {
        let sp = self.pop(4)?;
        let mut selectors = [0; 5]; // SS, ES, DS, FS, GS
        for value in &mut selectors {
            *value = self.pop(4)? as u16;
        }
        let order = [
            SegmentRegister::Ss,
            SegmentRegister::Es,
            SegmentRegister::Ds,
            SegmentRegister::Fs,
            SegmentRegister::Gs,
        ];
        for (which, value) in order.into_iter().zip(selectors) {
            *self.cpu.segment_mut(which) = virtual_8086_segment(value);
        }
        *self.cpu.segment_mut(SegmentRegister::Cs) = virtual_8086_segment(selector);
        self.cpu.regs.rflags = image & 0x3f_7fd5 | rflags::FIXED;
        self.cpu.regs[Gpr::Rsp] = sp;
        self.next = offset & 0xffff;
        Ok(())
    }
}
