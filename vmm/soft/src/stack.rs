//! The stack: PUSH and POP in all forms, PUSHA, POPA, PUSHF, POPF, ENTER, LEAVE.
//!
//! Invariants: the stack pointer changes in the size that SS (or 64-bit mode) gives it; several pushes of one instruction
//! are staged and committed together.
//! Elsewhere: POP into segment registers loads them in [`crate::segments`].
//! Source: Intel SDM vol. 1, 6.2; vol. 2 (PUSH, POP, PUSHF, POPF, ENTER, LEAVE).

use crate::guest::{Guest, immediate};
use crate::op::Op;
use crate::segmentation::SS;
use crate::stop::{Exec, gp};
use iced_x86::{Mnemonic, OpKind};
use x86::regs::rflags;
use x86::{CpuMode, Gpr};

const RSP: u8 = Gpr::Rsp as u8;
const RBP: u8 = Gpr::Rbp as u8;

impl Guest<'_> {
    /// The stack pointer's offset in SS.
    #[inline]
    pub(crate) fn stack_pointer(&self) -> u64 {
        self.cpu.regs[Gpr::Rsp] & self.mode.stack_mask
    }

    /// The stack pointer after a push of `size` bytes.
    #[inline]
    pub(crate) fn stack_below(&self, size: u64) -> u64 {
        self.cpu.regs[Gpr::Rsp].wrapping_sub(size) & self.mode.stack_mask
    }

    /// Sets the stack pointer, keeping the bits beyond its size (a 32-bit one clears the upper half).
    #[inline]
    pub(crate) fn set_stack_pointer(&mut self, value: u64) {
        let size = match self.mode.stack_mask {
            0xffff => 2,
            0xffff_ffff => 4,
            _ => 8,
        };
        self.set_gpr(RSP, size, value);
    }

    /// Stages a push and moves the stack pointer.
    pub(crate) fn push(&mut self, size: usize, value: u64) -> Exec {
        let sp = self.stack_below(size as u64);
        self.write(SS, sp, size, value)?;
        self.set_stack_pointer(sp);
        Ok(())
    }

    /// Pops and moves the stack pointer.
    pub(crate) fn pop(&mut self, size: usize) -> Exec<u64> {
        let sp = self.stack_pointer();
        let value = self.read(SS, sp, size)?;
        self.set_stack_pointer(sp.wrapping_add(size as u64));
        Ok(value)
    }

    #[inline]
    pub(crate) fn push_register(&mut self, op: &Op) -> Exec {
        let size = usize::from(op.size);
        let value = self.gpr(op.register);
        let sp = self.stack_below(size as u64);
        self.write_last(SS, sp, size, value)?;
        self.set_stack_pointer(sp);
        Ok(())
    }

    #[inline]
    pub(crate) fn pop_register(&mut self, op: &Op) -> Exec {
        let size = usize::from(op.size);
        let value = self.pop(size)?;
        self.set_gpr(op.register, size, value);
        Ok(())
    }

    /// PUSH of an immediate, of memory or of a segment register.
    pub(crate) fn push_other(&mut self, op: &Op) -> Exec {
        let size = usize::from(op.size);
        let value = match op.instruction.op0_kind() {
            OpKind::Memory => self.read_memory(op, 0, size)?,
            OpKind::Register => self.register(op.instruction.op0_register()),
            _ => immediate(op, 0)?,
        };
        let segment = op.instruction.op0_kind() == OpKind::Register;
        if segment && size > 2 && !self.mode.long {
            // Only the selector is written (SDM vol. 2, PUSH); the stack pointer moves by the operand size.
            let sp = self.stack_below(size as u64);
            self.write(SS, sp, 2, value)?;
            self.set_stack_pointer(sp);
            return Ok(());
        }
        self.push(size, value)
    }

    /// POP into memory or a segment register. Runs with the state put back on failure.
    pub(crate) fn pop_other(&mut self, op: &Op) -> Exec {
        let size = usize::from(op.size);
        if op.instruction.op0_kind() == OpKind::Register {
            let sp = self.stack_pointer();
            let selector = self.read(SS, sp, if size > 2 { 2 } else { size })?;
            let number = op.instruction.op0_register().number() as u8;
            let mask = self.mode.stack_mask;
            self.load_segment(number, selector as u16)?;
            // The pop was made with the old stack's size.
            let size_of_sp = if mask == 0xffff {
                2
            } else if mask == 0xffff_ffff {
                4
            } else {
                8
            };
            self.set_gpr(RSP, size_of_sp, sp.wrapping_add(size as u64));
            if number == SS {
                self.cpu.shadow = x86::InterruptShadow::MovSs;
            }
            return Ok(());
        }
        // The address is computed with the stack pointer already moved (SDM vol. 2, POP).
        let value = self.pop(size)?;
        self.write_memory(op, 0, size, value)
    }

    /// PUSHA and PUSHAD.
    pub(crate) fn push_all(&mut self, op: &Op) -> Exec {
        let size = if op.instruction.mnemonic() == Mnemonic::Pushad {
            4
        } else {
            2
        };
        let sp = self.gpr(RSP);
        for number in 0..8 {
            let value = if number == RSP { sp } else { self.gpr(number) };
            self.push(size, value)?;
        }
        Ok(())
    }

    /// POPA and POPAD.
    pub(crate) fn pop_all(&mut self, op: &Op) -> Exec {
        let size = if op.instruction.mnemonic() == Mnemonic::Popad {
            4
        } else {
            2
        };
        for number in (0..8).rev() {
            let value = self.pop(size)?;
            if number != RSP {
                self.set_gpr(number, size, value);
            }
        }
        Ok(())
    }

    fn check_virtual_8086_flags(&self) -> Exec {
        let denied =
            self.mode.cpu == CpuMode::Virtual8086 && !self.mode.io_allowed(self.cpu.regs.rflags);
        if denied { Err(gp(0)) } else { Ok(()) }
    }

    /// PUSHF, PUSHFD, PUSHFQ.
    pub(crate) fn push_flags(&mut self, op: &Op) -> Exec {
        self.check_virtual_8086_flags()?;
        let image = self.cpu.regs.rflags & !(rflags::VM | rflags::RF);
        self.push(usize::from(op.size), image)
    }

    /// POPF, POPFD, POPFQ.
    pub(crate) fn pop_flags(&mut self, op: &Op) -> Exec {
        self.check_virtual_8086_flags()?;
        let size = usize::from(op.size);
        let image = self.pop(size)?;
        let mut writable = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
        if size > 2 {
            writable |= rflags::AC | rflags::ID;
        }
        writable |= self.interrupt_flags_writable();
        self.load_flags(image, writable);
        self.mode_changed();
        Ok(())
    }

    /// Which of IF and IOPL a pop of the flags may change at this privilege level.
    pub(crate) fn interrupt_flags_writable(&self) -> u64 {
        let mut writable = 0;
        if self.mode.cpu != CpuMode::Virtual8086 && self.mode.cpl == 0 {
            writable |= rflags::IOPL;
        }
        if self.mode.io_allowed(self.cpu.regs.rflags) {
            writable |= rflags::IF;
        }
        writable
    }

    /// Takes the writable flags from an image.
    pub(crate) fn load_flags(&mut self, image: u64, writable: u64) {
        let old = self.cpu.regs.rflags;
        self.cpu.regs.rflags = old & !writable | image & writable | rflags::FIXED;
    }

    /// ENTER.
    pub(crate) fn enter(&mut self, op: &Op) -> Exec {
        let size = usize::from(op.size_of_operand());
        let allocate = u64::from(op.instruction.immediate16());
        let level = op.instruction.immediate8_2nd() & 31;
        let mut frame = self.gpr(RBP);
        self.push(size, frame)?;
        let frame_pointer = self.gpr(RSP);
        for n in 1..=level {
            if n == level {
                self.push(size, frame_pointer)?;
            } else {
                frame = frame.wrapping_sub(size as u64);
                let value = self.read(SS, frame & self.mode.stack_mask, size)?;
                self.push(size, value)?;
            }
        }
        let sp = self.stack_below(allocate);
        // The new top must be writable (SDM vol. 2, ENTER).
        let linear = self.linear(SS, sp, size, true)?;
        let kind = x86::paging::AccessKind::Write;
        self.mem.span(self.cpu, linear, size, kind, self.mem.user)?;
        self.set_gpr(RBP, size, frame_pointer);
        self.set_stack_pointer(sp);
        Ok(())
    }

    /// LEAVE.
    pub(crate) fn leave(&mut self, op: &Op) -> Exec {
        let size = usize::from(op.size_of_operand());
        let frame = self.gpr(RBP) & self.mode.stack_mask;
        let value = self.read(SS, frame, size)?;
        self.set_stack_pointer(frame.wrapping_add(size as u64));
        self.set_gpr(RBP, size, value);
        Ok(())
    }
}

impl Op {
    /// Operand size of ENTER and LEAVE.
    fn size_of_operand(&self) -> u8 {
        use iced_x86::Code as C;
        match self.instruction.code() {
            C::Enterq_imm16_imm8 | C::Leaveq => 8,
            C::Enterd_imm16_imm8 | C::Leaved => 4,
            _ => 2,
        }
    }
}
