//! Loading segment registers: MOV and POP to them, LDS to LGS, LLDT, LTR, and the stack segments of far transfers.
//!
//! Invariants: every check of the SDM is made before a register changes; a null selector leaves the register unusable with base 0
//! and limit 0.
//! Elsewhere: CS is only loaded by far transfers ([`crate::far`], [`crate::delivery`]).
//! Source: Intel SDM vol. 2 (MOV, LDS, LLDT, LTR); vol. 3A, 5.4 and 5.6-5.7.

use crate::descriptor::{Descriptor, is_null, selector_code};
use crate::guest::Guest;
use crate::op::Op;
use crate::segmentation::SS;
use crate::stop::{Exec, coded, gp, ud};
use iced_x86::{Mnemonic, OpKind};
use x86::segment::SegmentAttributes;
use x86::{CpuMode, InterruptShadow, Segment, SegmentRegister, Vector};

/// A segment register that holds a null selector.
pub(crate) fn null_segment(selector: u16, cpl: u8) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: 0,
        attributes: SegmentAttributes::UNUSABLE.with_dpl(cpl),
    }
}

impl Guest<'_> {
    /// Loads a segment register other than CS.
    pub(crate) fn load_segment(&mut self, number: u8, selector: u16) -> Exec {
        let segment = match self.mode.cpu {
            CpuMode::Real => {
                let old = self.cpu.segments[usize::from(number % 6)];
                Segment {
                    selector,
                    base: u64::from(selector) << 4,
                    ..old
                }
            }
            CpuMode::Virtual8086 => virtual_8086_segment(selector),
            _ if number == SS => {
                let cpl = self.mode.cpl;
                self.stack_segment(selector, cpl, Vector::GP, 0)?
            }
            _ => self.data_segment(selector)?,
        };
        self.cpu.segments[usize::from(number % 6)] = segment;
        if number == SS {
            self.mode_changed();
        }
        Ok(())
    }

    /// What a data segment register is loaded with.
    fn data_segment(&mut self, selector: u16) -> Exec<Segment> {
        if is_null(selector) {
            return Ok(null_segment(selector, 0));
        }
        let code = selector_code(selector);
        let mut descriptor = self.descriptor(selector)?.ok_or_else(|| gp(code))?;
        let attributes = descriptor.attributes();
        let readable = !attributes.is_code() || attributes.kind() & 2 != 0;
        if !attributes.is_code_or_data() || !readable {
            return Err(gp(code));
        }
        let conforming = attributes.is_code() && attributes.kind() & 4 != 0;
        let rpl = (selector & 3) as u8;
        if !conforming && (rpl > attributes.dpl() || self.mode.cpl > attributes.dpl()) {
            return Err(gp(code));
        }
        if !attributes.present() {
            return Err(coded(Vector::NP, code));
        }
        self.set_accessed(&mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// What SS is loaded with for use at `cpl`. Faults are `vector` with the selector, `ext` added to the code; a segment that is
    /// not present is #SS.
    pub(crate) fn stack_segment(
        &mut self,
        selector: u16,
        cpl: u8,
        vector: Vector,
        ext: u32,
    ) -> Exec<Segment> {
        let rpl = (selector & 3) as u8;
        if is_null(selector) {
            if self.mode.long && cpl < 3 && rpl == cpl {
                return Ok(null_segment(selector, cpl));
            }
            return Err(coded(vector, ext));
        }
        let code = selector_code(selector) | ext;
        let mut descriptor = self
            .descriptor(selector)?
            .ok_or_else(|| coded(vector, code))?;
        let attributes = descriptor.attributes();
        let writable =
            attributes.is_code_or_data() && !attributes.is_code() && attributes.kind() & 2 != 0;
        if rpl != cpl || attributes.dpl() != cpl || !writable {
            return Err(coded(vector, code));
        }
        if !attributes.present() {
            return Err(coded(Vector::SS, code));
        }
        self.set_accessed(&mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// MOV to and from segment registers.
    pub(crate) fn mov_segment(&mut self, op: &Op) -> Exec {
        let instruction = &op.instruction;
        let to = instruction.op0_register();
        if instruction.op0_kind() == OpKind::Register && to.is_segment_register() {
            let number = to.number() as u8;
            if number == SegmentRegister::Cs as u8 {
                return Err(ud());
            }
            let selector = self.operand(op, 1, 2)? as u16;
            self.load_segment(number, selector)?;
            if number == SS {
                self.cpu.shadow = InterruptShadow::MovSs;
            }
            return Ok(());
        }
        let selector = self.register(instruction.op1_register());
        match instruction.op0_kind() {
            OpKind::Register => {
                self.set_register(to, selector);
                Ok(())
            }
            _ => self.write_memory(op, 0, 2, selector),
        }
    }

    /// LDS, LES, LFS, LGS, LSS.
    pub(crate) fn load_far_pointer(&mut self, op: &Op) -> Exec {
        let number = match op.instruction.mnemonic() {
            Mnemonic::Les => SegmentRegister::Es,
            Mnemonic::Lss => SegmentRegister::Ss,
            Mnemonic::Lds => SegmentRegister::Ds,
            Mnemonic::Lfs => SegmentRegister::Fs,
            _ => SegmentRegister::Gs,
        } as u8;
        let register = op.instruction.op0_register();
        let size = register.size();
        let offset = self.read_memory(op, 0, size)?;
        let selector = self.read_memory(op, size as u64, 2)? as u16;
        self.load_segment(number, selector)?;
        self.set_register(register, offset);
        Ok(())
    }

    /// LLDT.
    pub(crate) fn lldt(&mut self, op: &Op) -> Exec {
        self.check_system_instruction()?;
        let selector = self.operand(op, 0, 2)? as u16;
        if is_null(selector) {
            self.cpu.ldtr = null_segment(selector, 0);
            return Ok(());
        }
        let descriptor = self.local_system_descriptor(selector)?;
        if descriptor.kind() != 2 || descriptor.attributes().is_code_or_data() {
            return Err(gp(selector_code(selector)));
        }
        if !descriptor.attributes().present() {
            return Err(coded(Vector::NP, selector_code(selector)));
        }
        self.cpu.ldtr = descriptor.segment(selector);
        Ok(())
    }

    /// LTR.
    pub(crate) fn ltr(&mut self, op: &Op) -> Exec {
        self.check_system_instruction()?;
        let selector = self.operand(op, 0, 2)? as u16;
        if is_null(selector) {
            return Err(gp(0));
        }
        let mut descriptor = self.local_system_descriptor(selector)?;
        let available = match descriptor.kind() {
            1 => !self.mode.lma,
            9 => true,
            _ => false,
        };
        if !available || descriptor.attributes().is_code_or_data() {
            return Err(gp(selector_code(selector)));
        }
        if !descriptor.attributes().present() {
            return Err(coded(Vector::NP, selector_code(selector)));
        }
        let busy = descriptor.kind() | 2;
        self.set_kind(&descriptor, busy)?;
        descriptor.low |= 2 << 40;
        self.cpu.tr = descriptor.segment(selector);
        Ok(())
    }

    /// A system descriptor that must lie in the GDT.
    fn local_system_descriptor(&mut self, selector: u16) -> Exec<Descriptor> {
        let code = selector_code(selector);
        if selector & 4 != 0 {
            return Err(gp(code));
        }
        self.system_descriptor(selector)?.ok_or_else(|| gp(code))
    }

    /// LLDT and LTR: protected mode at CPL 0.
    pub(crate) fn check_system_instruction(&self) -> Exec {
        if !self.mode.protected {
            return Err(ud());
        }
        if self.mode.cpl != 0 {
            Err(gp(0))
        } else {
            Ok(())
        }
    }
}

/// A segment register as virtual-8086 mode loads it.
pub(crate) fn virtual_8086_segment(selector: u16) -> Segment {
    Segment {
        selector,
        base: u64::from(selector) << 4,
        limit: 0xffff,
        attributes: SegmentAttributes::from_bits(0xf3),
    }
}
