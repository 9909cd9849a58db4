//! Delivering interrupts and exceptions.
//!
//! Purpose: from a vector to the first instruction of its handler, through the real-mode vector table, 16- and 32-bit gates, or
//! 64-bit gates.
//! Invariants: an event is delivered whole or not at all: pushes are staged, registers are put back by the caller
//! ([`crate::raise`]) when something on the way faults.
//!
//! Not implemented: task gates.
//! Elsewhere: what happens when delivery itself faults ([`crate::raise`]).
//! Source: Intel SDM vol. 3A, 6.10-6.14 and 20.1.4 (real mode); vol. 2, INT n; vol. 3A, 20.3 (virtual-8086).

use crate::descriptor::{Descriptor, is_null, selector_code};
use crate::guest::Guest;
use crate::segmentation::{SS, is_canonical};
use crate::segments::null_segment;
use crate::stop::{Exec, Stop, coded, gp};
use x86::regs::rflags;
use x86::{Activity, CpuMode, Exception, Gpr, InterruptShadow, SegmentRegister, Vector};

/// What is being delivered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Event {
    /// An exception the processor raised.
    Exception(Exception),
    /// An external interrupt.
    External(Vector),
    /// A non-maskable interrupt.
    Nmi,
    /// INT n; the gate's DPL counts.
    Software(Vector),
    /// INT3 and INTO, whose gate's DPL counts too.
    SoftwareException(Vector),
    /// INT1, whose gate's DPL does not.
    PrivilegedException(Vector),
}

impl Event {
    pub(crate) fn vector(self) -> Vector {
        match self {
            Self::Exception(exception) => exception.vector,
            Self::External(vector)
            | Self::Software(vector)
            | Self::SoftwareException(vector)
            | Self::PrivilegedException(vector) => vector,
            Self::Nmi => Vector::NMI,
        }
    }

    /// The EXT bit of error codes raised on the way: the event came from outside the program.
    fn ext(self) -> u32 {
        match self {
            Self::Software(_) | Self::SoftwareException(_) => 0,
            _ => 1,
        }
    }

    fn checks_gate_privilege(self) -> bool {
        matches!(self, Self::Software(_) | Self::SoftwareException(_))
    }

    fn error_code(self) -> Option<u32> {
        match self {
            Self::Exception(exception) => exception.error_code,
            _ => None,
        }
    }

    /// RF is set in the image a fault pushes, so that an instruction breakpoint does not fire again.
    fn sets_rf(self) -> bool {
        match self {
            Self::Exception(exception) => !matches!(
                exception.vector,
                Vector::DB | Vector::BP | Vector::OF | Vector::DF | Vector::MC
            ),
            _ => false,
        }
    }
}

/// What virtual-8086 mode leaves on the stack and null in the registers, in the order of the pushes.
const VIRTUAL_8086_DATA: [SegmentRegister; 4] = [
    SegmentRegister::Gs,
    SegmentRegister::Fs,
    SegmentRegister::Ds,
    SegmentRegister::Es,
];

/// Where the handler runs, and with which stack.
struct Handler {
    cs: x86::Segment,
    offset: u64,
    cpl: u8,
}

impl Guest<'_> {
    /// Delivers an event that returns to `back`.
    pub(crate) fn deliver_event(&mut self, event: Event, back: u64) -> Exec {
        if let Event::Exception(Exception {
            cr2: Some(addr), ..
        }) = event
        {
            self.cpu.cr2 = addr.get();
        }
        match self.mode.cpu {
            CpuMode::Real => self.deliver_real(event, back)?,
            _ => self.deliver_protected(event, back)?,
        }
        self.cpu.shadow = InterruptShadow::None;
        self.cpu.activity = Activity::Active;
        self.no_trap = true;
        if event == Event::Nmi {
            self.cpu.nmi_blocked = true;
        }
        self.mode_changed();
        Ok(())
    }

    fn deliver_real(&mut self, event: Event, back: u64) -> Exec {
        let offset = 4 * u64::from(event.vector().0);
        if offset + 3 > u64::from(self.cpu.idtr.limit) {
            return Err(gp(idt_code(event)));
        }
        let entry = self.read_system(self.cpu.idtr.base.wrapping_add(offset), 4)?;
        let flags = self.cpu.regs.rflags;
        self.push(2, flags)?;
        self.push(2, u64::from(self.cpu.segment(SegmentRegister::Cs).selector))?;
        self.push(2, back)?;
        self.set_flags(rflags::IF | rflags::TF | rflags::AC | rflags::RF, false);
        let selector = (entry >> 16) as u16;
        let cs = self.cpu.segment_mut(SegmentRegister::Cs);
        cs.selector = selector;
        cs.base = u64::from(selector) << 4;
        self.next = entry & 0xffff;
        Ok(())
    }

    fn deliver_protected(&mut self, event: Event, back: u64) -> Exec {
        let gate = self.gate(event)?;
        let ext = event.ext();
        let handler = self.handler(&gate, ext)?;
        let mut image = self.cpu.regs.rflags;
        if event.sets_rf() {
            image |= rflags::RF;
        }
        if self.mode.lma {
            self.enter_long(event, &gate, handler, image, back)?;
        } else {
            self.enter_legacy(event, &gate, handler, image, back)?;
        }
        let mut cleared = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
        if gate.kind() & 1 == 0 {
            cleared |= rflags::IF;
        }
        self.set_flags(cleared, false);
        Ok(())
    }

    /// The gate for an event, checked.
    fn gate(&mut self, event: Event) -> Exec<Descriptor> {
        let size = if self.mode.lma { 16 } else { 8 };
        let offset = size * u64::from(event.vector().0);
        let code = idt_code(event);
        if offset + size - 1 > u64::from(self.cpu.idtr.limit) {
            return Err(gp(code));
        }
        let at = self.cpu.idtr.base.wrapping_add(offset);
        let low = self.read_system(at, 8)?;
        let high = if size == 16 {
            self.read_system(at.wrapping_add(8), 8)? & 0xffff_ffff
        } else {
            0
        };
        let gate = Descriptor { low, high, at };
        let attributes = gate.attributes();
        let known = match gate.kind() {
            0xe | 0xf => true,
            5..=7 => !self.mode.lma,
            _ => false,
        };
        if !known || attributes.is_code_or_data() {
            return Err(gp(code));
        }
        if event.checks_gate_privilege() && attributes.dpl() < self.mode.cpl {
            return Err(gp(code));
        }
        if !attributes.present() {
            return Err(coded(Vector::NP, code));
        }
        if gate.kind() == 5 {
            return Err(Stop::Unimplemented("an interrupt through a task gate"));
        }
        Ok(gate)
    }

    /// The code segment a gate leads to, checked.
    fn handler(&mut self, gate: &Descriptor, ext: u32) -> Exec<Handler> {
        let selector = gate.gate_selector();
        if is_null(selector) {
            return Err(gp(ext));
        }
        let code = selector_code(selector) | ext;
        let mut descriptor = self.descriptor(selector)?.ok_or_else(|| gp(code))?;
        let attributes = descriptor.attributes();
        if !attributes.is_code() || attributes.dpl() > self.mode.cpl {
            return Err(gp(code));
        }
        if self.mode.lma && (!attributes.long() || attributes.db()) {
            return Err(gp(code));
        }
        if !attributes.present() {
            return Err(coded(Vector::NP, code));
        }
        let conforming = attributes.kind() & 4 != 0;
        let cpl = if conforming {
            self.mode.cpl
        } else {
            attributes.dpl()
        };
        if self.mode.cpu == CpuMode::Virtual8086 && cpl != 0 {
            return Err(gp(code));
        }
        self.set_accessed(&mut descriptor)?;
        let offset = gate.gate_offset();
        let offset = if gate.kind() < 8 {
            offset & 0xffff
        } else {
            offset
        };
        let cs = descriptor.segment(selector & !3 | u16::from(cpl));
        Ok(Handler { cs, offset, cpl })
    }

    fn enter_long(
        &mut self,
        event: Event,
        gate: &Descriptor,
        handler: Handler,
        image: u64,
        back: u64,
    ) -> Exec {
        let ext = event.ext();
        if !is_canonical(handler.offset) {
            return Err(gp(ext));
        }
        let ist = gate.low >> 32 & 7;
        let inner = handler.cpl != self.mode.cpl;
        let old_sp = self.cpu.regs[Gpr::Rsp];
        let old_ss = self.cpu.segment(SegmentRegister::Ss).selector;
        let top = match ist {
            0 if !inner => old_sp,
            0 => self.task_stack_long(4 + 8 * u64::from(handler.cpl), ext)?,
            n => self.task_stack_long(0x1c + 8 * n, ext)?,
        };
        let code = event.error_code().map(u64::from);
        let mut words = [u64::from(old_ss), old_sp, image, 0, back, 0];
        words[3] = u64::from(self.cpu.segment(SegmentRegister::Cs).selector);
        words[5] = code.unwrap_or(0);
        let count = if code.is_some() { 6 } else { 5 };
        let mut sp = top & !15;
        let user = handler.cpl == 3;
        for word in &words[..count] {
            sp = sp.wrapping_sub(8);
            if !is_canonical(sp) {
                return Err(coded(Vector::SS, ext));
            }
            self.mem.stage(self.cpu, sp, u128::from(*word), 8, user)?;
        }
        self.cpu.regs[Gpr::Rsp] = sp;
        if inner {
            let ss = null_segment(u16::from(handler.cpl), handler.cpl);
            *self.cpu.segment_mut(SegmentRegister::Ss) = ss;
        }
        *self.cpu.segment_mut(SegmentRegister::Cs) = handler.cs;
        self.next = handler.offset;
        Ok(())
    }

    /// A stack pointer from the 64-bit TSS.
    pub(crate) fn task_stack_long(&mut self, offset: u64, ext: u32) -> Exec<u64> {
        let tr = self.cpu.tr;
        if offset + 7 > u64::from(tr.limit) {
            return Err(coded(Vector::TS, selector_code(tr.selector) | ext));
        }
        let pointer = self.read_system(tr.base.wrapping_add(offset), 8)?;
        if is_canonical(pointer) {
            Ok(pointer)
        } else {
            Err(coded(Vector::SS, ext))
        }
    }

    fn enter_legacy(
        &mut self,
        event: Event,
        gate: &Descriptor,
        handler: Handler,
        image: u64,
        back: u64,
    ) -> Exec {
        let size = if gate.kind() >= 8 { 4 } else { 2 };
        let old = self.cpu.segments;
        let selector = |which: SegmentRegister| u64::from(old[which as usize].selector);
        let old_sp = self.cpu.regs[Gpr::Rsp];
        let mut words = [0; 10];
        let mut count = 0;
        let mut add = |word: u64| {
            words[count] = word;
            count += 1;
        };
        let from_virtual = self.mode.cpu == CpuMode::Virtual8086;
        let mut stack = event.ext();
        if handler.cpl != self.mode.cpl {
            self.switch_stack(handler.cpl, event.ext())?;
            stack |= selector_code(self.cpu.segment(SegmentRegister::Ss).selector);
            if from_virtual {
                for which in VIRTUAL_8086_DATA {
                    add(selector(which));
                    *self.cpu.segment_mut(which) = null_segment(0, 0);
                }
            }
            add(selector(SegmentRegister::Ss));
            add(old_sp);
        }
        add(image);
        add(selector(SegmentRegister::Cs));
        add(back);
        if let Some(code) = event.error_code() {
            add(u64::from(code));
        }
        for word in &words[..count] {
            let pushed = self.push_as(handler.cpl, size, *word);
            pushed.map_err(|stop| frame_fault(stop, stack))?;
        }
        if handler.offset > u64::from(handler.cs.limit) {
            return Err(gp(event.ext()));
        }
        *self.cpu.segment_mut(SegmentRegister::Cs) = handler.cs;
        self.next = handler.offset;
        Ok(())
    }

    /// Loads SS:ESP for `cpl` from the 16- or 32-bit TSS.
    pub(crate) fn switch_stack(&mut self, cpl: u8, ext: u32) -> Exec {
        let tr = self.cpu.tr;
        let wide = tr.attributes.kind() & 8 != 0;
        let (at, size) = if wide {
            (4 + 8 * u64::from(cpl), 4)
        } else {
            (2 + 4 * u64::from(cpl), 2)
        };
        if at + size as u64 + 1 > u64::from(tr.limit) {
            return Err(coded(Vector::TS, selector_code(tr.selector) | ext));
        }
        let sp = self.read_system(tr.base.wrapping_add(at), size)?;
        let selector = self.read_system(tr.base.wrapping_add(at + size as u64), 2)? as u16;
        let ss = self.stack_segment(selector, cpl, Vector::TS, ext)?;
        *self.cpu.segment_mut(SegmentRegister::Ss) = ss;
        self.mode.stack_mask = if ss.attributes.db() {
            0xffff_ffff
        } else {
            0xffff
        };
        self.mode.protected = true;
        self.cpu.regs[Gpr::Rsp] = sp;
        Ok(())
    }

    /// Pushes with the rights of a privilege level about to be entered.
    pub(crate) fn push_as(&mut self, cpl: u8, size: usize, value: u64) -> Exec {
        let sp = self.stack_below(size as u64);
        let linear = self.linear(SS, sp, size, true)?;
        self.mem
            .stage(self.cpu, linear, u128::from(value), size, cpl == 3)?;
        self.set_stack_pointer(sp);
        Ok(())
    }
}

/// A stack without room for a frame is #SS with the stack's selector if it was switched to, and the EXT bit.
fn frame_fault(stop: Stop, code: u32) -> Stop {
    match stop {
        Stop::Fault(exception) if exception.vector == Vector::SS => coded(Vector::SS, code),
        other => other,
    }
}

/// The error code that names an IDT entry.
fn idt_code(event: Event) -> u32 {
    (8 * u32::from(event.vector().0)) | 2 | event.ext()
}
