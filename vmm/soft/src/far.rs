//! Far control transfers: JMP, CALL and RET between segments, through call gates where they lead.
//!
//! Invariants: all checks come before CS, SS or RIP change; the caller puts registers and segments back on failure.
//!
//! Not implemented: task switches (JMP and CALL to a TSS or task gate).
//! Elsewhere: IRET ([`crate::iret`]); interrupts ([`crate::delivery`]).
//! Source: Intel SDM vol. 2 (JMP, CALL, RET); vol. 3A, 5.8.

use crate::descriptor::{Descriptor, is_null, selector_code};
use crate::guest::Guest;
use crate::op::Op;
use crate::segmentation::is_canonical;
use crate::segments::null_segment;
use crate::stop::{Exec, Stop, coded, gp};
use iced_x86::{Code, OpKind};
use x86::segment::SegmentAttributes;
use x86::{Gpr, Segment, SegmentRegister, Vector};

const TASK_SWITCH: Stop = Stop::Unimplemented("a hardware task switch");

impl Guest<'_> {
    /// The selector, offset and operand size of a far JMP or CALL.
    fn far_operand(&mut self, op: &Op) -> Exec<(u16, u64, usize)> {
        let instruction = &op.instruction;
        if instruction.op0_kind() == OpKind::FarBranch16 {
            let offset = u64::from(instruction.far_branch16());
            return Ok((instruction.far_branch_selector(), offset, 2));
        }
        if instruction.op0_kind() == OpKind::FarBranch32 {
            let offset = u64::from(instruction.far_branch32());
            return Ok((instruction.far_branch_selector(), offset, 4));
        }
        let size = match instruction.code() {
            Code::Jmp_m1616 | Code::Call_m1616 => 2,
            Code::Jmp_m1632 | Code::Call_m1632 => 4,
            _ => 8,
        };
        let offset = self.read_memory(op, 0, size)?;
        let selector = self.read_memory(op, size as u64, 2)?;
        Ok((selector as u16, offset, size))
    }

    /// Far JMP.
    pub(crate) fn far_jump(&mut self, op: &Op) -> Exec {
        let (selector, offset, _) = self.far_operand(op)?;
        if !self.mode.protected {
            return self.far_real(selector, offset);
        }
        let descriptor = self.target_descriptor(selector)?;
        if descriptor.attributes().is_code_or_data() {
            let cs = self.code_segment(descriptor, selector, false)?;
            return self.enter_segment(cs, offset);
        }
        let (gate, descriptor) = self.call_gate(descriptor, selector)?;
        let target = gate.gate_selector();
        let attributes = descriptor.attributes();
        let conforming = attributes.kind() & 4 != 0;
        if !conforming && attributes.dpl() != self.mode.cpl {
            return Err(gp(selector_code(target)));
        }
        let cs = self.accessed_code(descriptor, target, self.mode.cpl)?;
        self.enter_segment(cs, gate_offset(&gate))
    }

    /// Far CALL.
    pub(crate) fn far_call(&mut self, op: &Op) -> Exec {
        let (selector, offset, size) = self.far_operand(op)?;
        let back = self.next;
        let old_cs = u64::from(self.cpu.segment(SegmentRegister::Cs).selector);
        if !self.mode.protected {
            self.push(size, old_cs)?;
            self.push(size, back)?;
            return self.far_real(selector, offset);
        }
        let descriptor = self.target_descriptor(selector)?;
        if descriptor.attributes().is_code_or_data() {
            let cs = self.code_segment(descriptor, selector, false)?;
            self.push(size, old_cs)?;
            self.push(size, back)?;
            return self.enter_segment(cs, offset);
        }
        let (gate, descriptor) = self.call_gate(descriptor, selector)?;
        self.call_through(&gate, descriptor, old_cs, back)
    }

    fn far_real(&mut self, selector: u16, offset: u64) -> Exec {
        if offset > self.mode.fetch_limit {
            return Err(gp(0));
        }
        self.set_real_cs(selector);
        self.next = offset;
        Ok(())
    }

    /// CS as real and virtual-8086 mode load it.
    pub(crate) fn set_real_cs(&mut self, selector: u16) {
        let cs = self.cpu.segment_mut(SegmentRegister::Cs);
        cs.selector = selector;
        cs.base = u64::from(selector) << 4;
        self.mode_changed();
    }

    /// The descriptor a far transfer names: the selector must not be null.
    fn target_descriptor(&mut self, selector: u16) -> Exec<Descriptor> {
        if is_null(selector) {
            return Err(gp(0));
        }
        let code = selector_code(selector);
        let mut descriptor = self.descriptor(selector)?.ok_or_else(|| gp(code))?;
        if !descriptor.attributes().is_code_or_data() && self.mode.lma {
            descriptor = self.system_descriptor(selector)?.ok_or_else(|| gp(code))?;
        }
        Ok(descriptor)
    }

    /// Checks a code segment as the direct target of JMP or CALL, or of RET to its RPL (`returning`).
    pub(crate) fn code_segment(
        &mut self,
        descriptor: Descriptor,
        selector: u16,
        returning: bool,
    ) -> Exec<Segment> {
        let code = selector_code(selector);
        let attributes = descriptor.attributes();
        let rpl = (selector & 3) as u8;
        let cpl = self.mode.cpl;
        let conforming = attributes.kind() & 4 != 0;
        let privileged = match (returning, conforming) {
            (false, true) => attributes.dpl() <= cpl,
            (false, false) => rpl <= cpl && attributes.dpl() == cpl,
            (true, true) => attributes.dpl() <= rpl,
            (true, false) => attributes.dpl() == rpl,
        };
        if !attributes.is_code() || !privileged {
            return Err(gp(code));
        }
        if self.mode.lma && attributes.long() && attributes.db() {
            return Err(gp(code));
        }
        if !attributes.present() {
            return Err(coded(Vector::NP, code));
        }
        let level = if returning { rpl } else { cpl };
        self.accessed_code(descriptor, selector, level)
    }

    fn accessed_code(
        &mut self,
        mut descriptor: Descriptor,
        selector: u16,
        cpl: u8,
    ) -> Exec<Segment> {
        self.set_accessed(&mut descriptor)?;
        Ok(descriptor.segment(selector & !3 | u16::from(cpl)))
    }

    /// Goes to `offset` in a checked code segment, staying at this privilege level.
    fn enter_segment(&mut self, cs: Segment, offset: u64) -> Exec {
        check_target(&cs, offset, self.mode.lma)?;
        *self.cpu.segment_mut(SegmentRegister::Cs) = cs;
        self.next = offset;
        self.mode_changed();
        Ok(())
    }

    /// A call gate and the code segment it leads to, checked but for what JMP and CALL treat differently.
    fn call_gate(&mut self, gate: Descriptor, selector: u16) -> Exec<(Descriptor, Descriptor)> {
        let code = selector_code(selector);
        let attributes = gate.attributes();
        let known = match gate.kind() {
            0xc => true,
            4 => !self.mode.lma,
            1 | 5 | 9 if !self.mode.lma => return Err(TASK_SWITCH),
            _ => false,
        };
        let rpl = (selector & 3) as u8;
        if !known || attributes.dpl() < self.mode.cpl || attributes.dpl() < rpl {
            return Err(gp(code));
        }
        if !attributes.present() {
            return Err(coded(Vector::NP, code));
        }
        let target = gate.gate_selector();
        if is_null(target) {
            return Err(gp(0));
        }
        let code = selector_code(target);
        let descriptor = self.descriptor(target)?.ok_or_else(|| gp(code))?;
        let attributes = descriptor.attributes();
        let wide = !self.mode.lma || attributes.long() && !attributes.db();
        if !attributes.is_code() || attributes.dpl() > self.mode.cpl || !wide {
            return Err(gp(code));
        }
        if !attributes.present() {
            return Err(coded(Vector::NP, code));
        }
        Ok((gate, descriptor))
    }

    /// CALL through a call gate, to this or an inner privilege level.
    fn call_through(
        &mut self,
        gate: &Descriptor,
        descriptor: Descriptor,
        old_cs: u64,
        back: u64,
    ) -> Exec {
        let attributes = descriptor.attributes();
        let conforming = attributes.kind() & 4 != 0;
        let cpl = if conforming {
            self.mode.cpl
        } else {
            attributes.dpl()
        };
        let size = if self.mode.lma {
            8
        } else if gate.kind() == 4 {
            2
        } else {
            4
        };
        let cs = self.accessed_code(descriptor, gate.gate_selector(), cpl)?;
        let offset = gate_offset(gate);
        check_target(&cs, offset, self.mode.lma)?;
        if cpl < self.mode.cpl {
            self.call_inner(gate, cpl, size)?;
        }
        self.push_as(cpl, size, old_cs)?;
        self.push_as(cpl, size, back)?;
        *self.cpu.segment_mut(SegmentRegister::Cs) = cs;
        self.next = offset;
        self.mode_changed();
        Ok(())
    }

    /// The stack of the inner level, with the old one and the parameters pushed.
    fn call_inner(&mut self, gate: &Descriptor, cpl: u8, size: usize) -> Exec {
        let old_sp = self.cpu.regs[Gpr::Rsp];
        let old_ss = *self.cpu.segment(SegmentRegister::Ss);
        if self.mode.lma {
            let sp = self.task_stack_long(4 + 8 * u64::from(cpl), 0)?;
            *self.cpu.segment_mut(SegmentRegister::Ss) = null_segment(u16::from(cpl), cpl);
            self.cpu.regs[Gpr::Rsp] = sp;
            self.mode.long = true;
            self.mode.stack_mask = u64::MAX;
            self.push_as(cpl, size, u64::from(old_ss.selector))?;
            return self.push_as(cpl, size, old_sp);
        }
        let count = (gate.low >> 32 & 31) as usize;
        let mut parameters = [0; 31];
        let mask = self.mode.stack_mask;
        for (n, value) in parameters[..count].iter_mut().enumerate() {
            let at = old_sp.wrapping_add((n * size) as u64) & mask;
            *value = self.read(crate::segmentation::SS, at, size)?;
        }
        self.switch_stack(cpl, 0)?;
        self.push_as(cpl, size, u64::from(old_ss.selector))?;
        self.push_as(cpl, size, old_sp)?;
        for value in parameters[..count].iter().rev() {
            self.push_as(cpl, size, *value)?;
        }
        Ok(())
    }

    /// Far RET.
    pub(crate) fn far_return(&mut self, op: &Op) -> Exec {
        let size = match op.instruction.code() {
            Code::Retfw | Code::Retfw_imm16 => 2,
            Code::Retfd | Code::Retfd_imm16 => 4,
            _ => 8,
        };
        let release = match op.instruction.op_count() {
            0 => 0,
            _ => u64::from(op.instruction.immediate16()),
        };
        let offset = self.pop(size)?;
        let selector = self.pop(size)? as u16;
        if !self.mode.protected {
            self.far_real(selector, offset)?;
            let sp = self.stack_pointer().wrapping_add(release);
            self.set_stack_pointer(sp);
            return Ok(());
        }
        self.return_to(selector, offset, size, release)
    }

    fn return_to(&mut self, selector: u16, offset: u64, size: usize, release: u64) -> Exec {
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
        let sp = self.stack_pointer().wrapping_add(release);
        self.set_stack_pointer(sp);
        if rpl > self.mode.cpl {
            let sp = self.pop(size)?;
            let ss = self.pop(size)? as u16;
            self.return_outer(cs, ss, sp, size)?;
            let sp = self.stack_pointer().wrapping_add(release);
            self.set_stack_pointer(sp);
        } else {
            *self.cpu.segment_mut(SegmentRegister::Cs) = cs;
        }
        self.next = offset;
        self.mode_changed();
        Ok(())
    }

    /// Loads CS, SS and the stack pointer of an outer level, and drops the data segments it may not use.
    pub(crate) fn return_outer(
        &mut self,
        cs: Segment,
        selector: u16,
        sp: u64,
        size: usize,
    ) -> Exec {
        let cpl = (cs.selector & 3) as u8;
        // A null SS is allowed on the way to 64-bit mode; the check looks at where the CPU goes.
        self.mode.long = self.mode.lma && cs.attributes.long();
        let ss = self.stack_segment(selector, cpl, Vector::GP, 0)?;
        *self.cpu.segment_mut(SegmentRegister::Cs) = cs;
        *self.cpu.segment_mut(SegmentRegister::Ss) = ss;
        self.mode_changed();
        let sp_size = match self.mode.stack_mask {
            0xffff => 2,
            0xffff_ffff => 4,
            _ => size.max(4),
        };
        self.set_gpr(Gpr::Rsp as u8, sp_size, sp);
        self.drop_inner_segments(cpl);
        Ok(())
    }

    /// Nulls data segment registers whose descriptor is more privileged than `cpl`.
    pub(crate) fn drop_inner_segments(&mut self, cpl: u8) {
        for which in [
            SegmentRegister::Es,
            SegmentRegister::Ds,
            SegmentRegister::Fs,
            SegmentRegister::Gs,
        ] {
            let segment = self.cpu.segment_mut(which);
            let attributes = segment.attributes;
            let conforming = attributes.is_code() && attributes.kind() & 4 != 0;
            if !attributes.unusable() && !conforming && attributes.dpl() < cpl {
                *segment = Segment {
                    attributes: SegmentAttributes::UNUSABLE,
                    ..null_segment(0, 0)
                };
            }
        }
    }
}

/// A target must lie in its segment, or be canonical in a 64-bit one.
pub(crate) fn check_target(cs: &Segment, offset: u64, lma: bool) -> Exec {
    let inside = if lma && cs.attributes.long() {
        is_canonical(offset)
    } else {
        offset <= u64::from(cs.limit)
    };
    if inside { Ok(()) } else { Err(gp(0)) }
}

fn gate_offset(gate: &Descriptor) -> u64 {
    let offset = gate.gate_offset();
    if gate.kind() == 4 {
        offset & 0xffff
    } else {
        offset
    }
}
