//! Instructions that 64-bit mode gave up or hardly anything uses: decimal adjustment, BOUND, ARPL, XLAT, SALC.
//!
//! Invariants: flags that the SDM leaves undefined keep their value.
//! Source: Intel SDM vol. 2 (AAA, AAD, AAM, AAS, DAA, DAS, BOUND, ARPL, XLAT).

use crate::guest::{Guest, sign_extend};
use crate::op::Op;
use crate::stop::{Exec, plain, ud};
use iced_x86::Mnemonic;
use x86::regs::rflags;
use x86::{Gpr, Vector};

const RAX: u8 = Gpr::Rax as u8;

impl Guest<'_> {
    fn result_flags(&mut self, al: u8) {
        self.set_flags(rflags::ZF, al == 0);
        self.set_flags(rflags::SF, al & 0x80 != 0);
        self.set_flags(rflags::PF, al.count_ones().is_multiple_of(2));
    }

    /// AAA, AAS, AAM, AAD, DAA, DAS.
    pub(crate) fn decimal(&mut self, op: &Op) -> Exec {
        let ax = self.rax() as u16;
        let [al, ah] = ax.to_le_bytes();
        let base = op.instruction.immediate8();
        match op.instruction.mnemonic() {
            Mnemonic::Aam => {
                if base == 0 {
                    return Err(plain(Vector::DE));
                }
                let (high, low) = (al / base, al % base);
                self.set_gpr(RAX, 2, u64::from(u16::from_le_bytes([low, high])));
                self.result_flags(low);
            }
            Mnemonic::Aad => {
                let low = al.wrapping_add(ah.wrapping_mul(base));
                self.set_gpr(RAX, 2, u64::from(low));
                self.result_flags(low);
            }
            Mnemonic::Aaa => self.ascii_adjust(ax, u16::wrapping_add),
            Mnemonic::Aas => self.ascii_adjust(ax, u16::wrapping_sub),
            Mnemonic::Daa => self.packed_adjust(al, u8::wrapping_add, false),
            _ => self.packed_adjust(al, u8::wrapping_sub, al < 6),
        }
        Ok(())
    }

    fn ascii_adjust(&mut self, ax: u16, adjust: fn(u16, u16) -> u16) {
        let needed = ax & 0xf > 9 || self.flag(rflags::AF);
        let adjusted = if needed { adjust(ax, 0x106) } else { ax };
        self.set_gpr(RAX, 2, u64::from(adjusted & 0xff0f));
        self.set_flags(rflags::AF | rflags::CF, needed);
    }

    fn packed_adjust(&mut self, al: u8, adjust: fn(u8, u8) -> u8, borrows: bool) {
        let low = al & 0xf > 9 || self.flag(rflags::AF);
        let high = al > 0x99 || self.flag(rflags::CF);
        let mut result = al;
        if low {
            result = adjust(result, 6);
        }
        if high {
            result = adjust(result, 0x60);
        }
        self.set_flags(rflags::AF, low);
        self.set_flags(rflags::CF, high || low && borrows);
        self.set_gpr(RAX, 1, u64::from(result));
        self.result_flags(result);
    }

    /// BOUND.
    pub(crate) fn bound(&mut self, op: &Op) -> Exec {
        let register = op.instruction.op0_register();
        let size = register.size();
        let index = sign_extend(self.register(register), size) as i64;
        let low = sign_extend(self.read_memory(op, 0, size)?, size) as i64;
        let high = sign_extend(self.read_memory(op, size as u64, size)?, size) as i64;
        if (low..=high).contains(&index) {
            Ok(())
        } else {
            Err(plain(Vector::BR))
        }
    }

    /// ARPL.
    pub(crate) fn arpl(&mut self, op: &Op) -> Exec {
        if !self.mode.protected {
            return Err(ud());
        }
        let selector = self.operand(op, 0, 2)?;
        let rpl = self.register(op.instruction.op1_register()) & 3;
        let raise = selector & 3 < rpl;
        if raise {
            self.set_operand(op, 0, 2, selector & !3 | rpl)?;
        }
        self.set_flags(rflags::ZF, raise);
        Ok(())
    }

    /// XLAT.
    pub(crate) fn xlat(&mut self, op: &Op) -> Exec {
        let table = self.cpu.regs[Gpr::Rbx];
        let offset = table.wrapping_add(self.rax() & 0xff) & op.address.mask;
        let value = self.read(op.address.segment, offset, 1)?;
        self.set_gpr(RAX, 1, value);
        Ok(())
    }

    /// SALC.
    pub(crate) fn salc(&mut self) {
        let value = if self.flag(rflags::CF) { 0xff } else { 0 };
        self.set_gpr(RAX, 1, value);
    }
}
