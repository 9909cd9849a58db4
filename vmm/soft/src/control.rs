//! Near control transfers: Jcc, JMP, CALL, RET, LOOP, JCXZ.
//!
//! Invariants: a target outside the code segment's limit, or not canonical, is #GP(0) at the branch, before anything changed.
//! Elsewhere: far transfers ([`crate::far`]).
//! Source: Intel SDM vol. 2 (Jcc, JMP, CALL, RET, LOOP); vol. 1, 6.4.

use crate::guest::{Guest, truncate};
use crate::op::Op;
use crate::segmentation::{SS, is_canonical};
use crate::stop::{Exec, gp};
use iced_x86::Mnemonic;
use x86::Gpr;
use x86::regs::rflags::{CF, OF, PF, SF, ZF};

/// Whether condition `tttn` of Jcc, SETcc and CMOVcc holds (SDM vol. 1, appendix B).
#[inline]
pub(crate) fn condition(tttn: u8, flags: u64) -> bool {
    let holds = match tttn >> 1 {
        0 => flags & OF != 0,
        1 => flags & CF != 0,
        2 => flags & ZF != 0,
        3 => flags & (CF | ZF) != 0,
        4 => flags & SF != 0,
        5 => flags & PF != 0,
        6 => (flags & SF != 0) != (flags & OF != 0),
        _ => flags & ZF != 0 || (flags & SF != 0) != (flags & OF != 0),
    };
    holds != (tttn & 1 != 0)
}

impl Guest<'_> {
    /// Makes `target` the next instruction.
    #[inline]
    pub(crate) fn jump(&mut self, target: u64) -> Exec {
        if self.mode.long {
            if !is_canonical(target) {
                return Err(gp(0));
            }
        } else if target > self.mode.fetch_limit {
            return Err(gp(0));
        }
        self.next = target;
        Ok(())
    }

    #[inline]
    fn relative(&self, op: &Op) -> u64 {
        self.next.wrapping_add(op.branch) & op.branch_mask
    }

    #[inline]
    pub(crate) fn jcc(&mut self, op: &Op) -> Exec {
        if condition(op.register, self.cpu.regs.rflags) {
            self.jump(self.relative(op))
        } else {
            Ok(())
        }
    }

    #[inline]
    pub(crate) fn jmp(&mut self, op: &Op) -> Exec {
        self.jump(self.relative(op))
    }

    #[inline]
    pub(crate) fn call(&mut self, op: &Op) -> Exec {
        self.call_to(self.relative(op), usize::from(op.size))
    }

    fn call_to(&mut self, target: u64, size: usize) -> Exec {
        let back = self.next;
        self.jump(target)?;
        let sp = self.stack_below(size as u64);
        self.write_last(SS, sp, size, back)?;
        self.set_stack_pointer(sp);
        Ok(())
    }

    #[inline]
    pub(crate) fn ret(&mut self, op: &Op) -> Exec {
        let size = usize::from(op.size);
        let sp = self.stack_pointer();
        let target = self.read(SS, sp, size)?;
        self.jump(target)?;
        let release = match op.instruction.op_count() {
            0 => 0,
            _ => u64::from(op.instruction.immediate16()),
        };
        self.set_stack_pointer(sp.wrapping_add(size as u64).wrapping_add(release));
        Ok(())
    }

    /// JMP and CALL through a register or memory.
    pub(crate) fn indirect(&mut self, op: &Op) -> Exec {
        let size = match op.instruction.op0_kind() {
            iced_x86::OpKind::Register => op.instruction.op0_register().size(),
            _ => op.instruction.memory_size().size(),
        };
        let target = self.operand(op, 0, size)?;
        match op.instruction.mnemonic() {
            Mnemonic::Call => self.call_to(target, size),
            _ => self.jump(target),
        }
    }

    /// LOOP, LOOPE, LOOPNE, JCXZ, JECXZ, JRCXZ.
    pub(crate) fn loops(&mut self, op: &Op) -> Exec {
        use iced_x86::Code as C;
        let code = op.instruction.code();
        let size = match code {
            C::Jcxz_rel8_16 | C::Jcxz_rel8_32 => 2,
            C::Jecxz_rel8_16 | C::Jecxz_rel8_32 | C::Jecxz_rel8_64 => 4,
            C::Jrcxz_rel8_16 | C::Jrcxz_rel8_64 => 8,
            C::Loop_rel8_16_CX | C::Loope_rel8_16_CX | C::Loopne_rel8_16_CX => 2,
            C::Loop_rel8_32_CX | C::Loope_rel8_32_CX | C::Loopne_rel8_32_CX => 2,
            C::Loop_rel8_16_RCX | C::Loope_rel8_16_RCX | C::Loopne_rel8_16_RCX => 8,
            C::Loop_rel8_64_RCX | C::Loope_rel8_64_RCX | C::Loopne_rel8_64_RCX => 8,
            _ => 4,
        };
        let rcx = Gpr::Rcx as u8;
        let count = truncate(self.gpr(rcx), size);
        let (count, counted) = match op.instruction.mnemonic() {
            Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => (count, false),
            _ => (truncate(count.wrapping_sub(1), size), true),
        };
        let taken = match op.instruction.mnemonic() {
            Mnemonic::Loop => count != 0,
            Mnemonic::Loope => count != 0 && self.flag(ZF),
            Mnemonic::Loopne => count != 0 && !self.flag(ZF),
            _ => count == 0,
        };
        if taken {
            self.jump(self.relative(op))?;
        }
        if counted {
            self.set_gpr(rcx, size, count);
        }
        Ok(())
    }
}
