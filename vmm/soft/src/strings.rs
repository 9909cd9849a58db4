//! String instructions: MOVS, CMPS, STOS, LODS, SCAS, INS, OUTS, with and without REP.
//!
//! Purpose: one call makes one iteration, or as many as it is allowed to, one after the other.
//! Invariants: between iterations the registers are exactly what a processor shows there, so an interrupt, a page fault or a
//! stop can come between any two. The last iteration, and a REP with a count of zero, retire the instruction.
//! Elsewhere: ports ([`crate::io`]).
//! Source: Intel SDM vol. 2 (REP and each instruction); vol. 1, 7.3.9.

use crate::dispatch::Done;
use crate::guest::{Guest, truncate};
use crate::op::Op;
use crate::segmentation::ES;
use crate::stop::Exec;
use iced_x86::{Mnemonic, OpKind};
use x86::Gpr;
use x86::paging::AccessKind;
use x86::regs::rflags;

const RCX: u8 = Gpr::Rcx as u8;
const RSI: u8 = Gpr::Rsi as u8;
const RDI: u8 = Gpr::Rdi as u8;

/// The flags of `a - b` (SDM vol. 1, appendix A; CMPS and SCAS define all six).
fn compare_flags(a: u64, b: u64, size: usize) -> u64 {
    let (a, b) = (truncate(a, size), truncate(b, size));
    let result = truncate(a.wrapping_sub(b), size);
    let sign = 1 << (8 * size - 1);
    let mut flags = 0;
    for (flag, set) in [
        (rflags::CF, a < b),
        (rflags::PF, (result as u8).count_ones().is_multiple_of(2)),
        (rflags::AF, (a ^ b ^ result) & 0x10 != 0),
        (rflags::ZF, result == 0),
        (rflags::SF, result & sign != 0),
        (rflags::OF, (a ^ b) & (a ^ result) & sign != 0),
    ] {
        flags |= if set { flag } else { 0 };
    }
    flags
}

impl Guest<'_> {
    /// One iteration.
    pub(crate) fn string(&mut self, op: &Op) -> Exec<Done> {
        let instruction = &op.instruction;
        let address = address_size(op);
        let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
        let count = truncate(self.gpr(RCX), address);
        if repeated && count == 0 {
            return Ok(Done::Retired);
        }
        let allowed = if repeated {
            self.iterations.min(count)
        } else {
            1
        };
        self.iterations = 1;
        match self.bulk(op, address, allowed) {
            Some(made) => self.iterations = made,
            None => self.element(op, address)?,
        }
        if !repeated {
            return Ok(Done::Retired);
        }
        let left = truncate(count.wrapping_sub(self.iterations), address);
        self.set_gpr(RCX, address, left);
        let compares = matches!(
            instruction.mnemonic(),
            Mnemonic::Cmpsb
                | Mnemonic::Cmpsw
                | Mnemonic::Cmpsd
                | Mnemonic::Cmpsq
                | Mnemonic::Scasb
                | Mnemonic::Scasw
                | Mnemonic::Scasd
                | Mnemonic::Scasq
        );
        let stops = compares && self.flag(rflags::ZF) == instruction.has_repne_prefix();
        Ok(if left == 0 || stops {
            Done::Retired
        } else {
            Done::Within
        })
    }

    /// Makes several iterations of MOVS or STOS at once, where nothing can come between them: upwards, within a page each of
    /// RAM that is neither code nor page table. `None`: do one by one.
    fn bulk(&mut self, op: &Op, address: usize, allowed: u64) -> Option<u64> {
        use Mnemonic as M;
        if allowed < 2 || self.flag(rflags::DF) {
            return None;
        }
        let (size, moves) = match op.instruction.mnemonic() {
            M::Movsb => (1, true),
            M::Movsw => (2, true),
            M::Movsd => (4, true),
            M::Movsq => (8, true),
            M::Stosb => (1, false),
            M::Stosw => (2, false),
            M::Stosd => (4, false),
            M::Stosq => (8, false),
            _ => return None,
        };
        let di = truncate(self.gpr(RDI), address);
        let si = truncate(self.gpr(RSI), address);
        let room = |linear: u64| (0x1000 - (linear & 0xfff)) / size;
        let to = self.linear(ES, di, size as usize, true).ok()?;
        let mut count = allowed.min(room(to));
        let mut from = 0;
        if moves {
            from = self
                .linear(op.address.segment, si, size as usize, false)
                .ok()?;
            count = count.min(room(from));
        }
        let len = count * size;
        let wraps = |offset: u64| {
            offset
                .checked_add(len)
                .is_none_or(|end| end > last_offset(address))
        };
        if count < 2 || wraps(di) || moves && wraps(si) || self.mode.alignment_check {
            return None;
        }
        // The last byte lies within the segment as well.
        self.linear(ES, di, len as usize, true).ok()?;
        let user = self.mem.user;
        if moves {
            self.linear(op.address.segment, si, len as usize, false)
                .ok()?;
            from = self
                .mem
                .translate(self.cpu, from, AccessKind::Read, user)
                .ok()?;
        }
        let to = self
            .mem
            .translate(self.cpu, to, AccessKind::Write, user)
            .ok()?;
        let ram = &self.mem.ram;
        let inside = ram.contains(to, len) && (!moves || ram.contains(from, len));
        // An overlap upwards repeats what was just written; that takes one element after the other.
        let repeats = moves && to > from && to < from + len;
        if !inside || repeats || !self.mem.is_plain_page(to) {
            return None;
        }
        self.mem.note_write(to, len as usize);
        if moves {
            self.mem.ram.copy(from, to, len);
            self.set_gpr(RSI, address, si.wrapping_add(len));
        } else {
            let value = self.rax().to_le_bytes();
            for n in 0..count {
                let bytes = value.get(..size as usize).unwrap_or_default();
                self.mem.ram.write(to + n * size, bytes);
            }
        }
        self.set_gpr(RDI, address, di.wrapping_add(len));
        Some(count)
    }

    fn element(&mut self, op: &Op, address: usize) -> Exec {
        use Mnemonic as M;
        let source = op.address.segment;
        let si = truncate(self.gpr(RSI), address);
        let di = truncate(self.gpr(RDI), address);
        let (size, uses_si, uses_di) = match op.instruction.mnemonic() {
            M::Movsb | M::Cmpsb => (1, true, true),
            M::Movsw | M::Cmpsw => (2, true, true),
            M::Movsd | M::Cmpsd => (4, true, true),
            M::Movsq | M::Cmpsq => (8, true, true),
            M::Lodsb | M::Outsb => (1, true, false),
            M::Lodsw | M::Outsw => (2, true, false),
            M::Lodsd | M::Outsd => (4, true, false),
            M::Lodsq => (8, true, false),
            M::Stosb | M::Scasb | M::Insb => (1, false, true),
            M::Stosw | M::Scasw | M::Insw => (2, false, true),
            M::Stosd | M::Scasd | M::Insd => (4, false, true),
            _ => (8, false, true),
        };
        match op.instruction.mnemonic() {
            M::Movsb | M::Movsw | M::Movsd | M::Movsq => {
                let value = self.read(source, si, size)?;
                self.write_last(ES, di, size, value)?;
            }
            M::Stosb | M::Stosw | M::Stosd | M::Stosq => {
                self.write_last(ES, di, size, self.rax())?;
            }
            M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => {
                let value = self.read(source, si, size)?;
                self.set_gpr(Gpr::Rax as u8, size, value);
            }
            M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => {
                let a = self.read(source, si, size)?;
                let b = self.read(ES, di, size)?;
                self.compare(a, b, size);
            }
            M::Scasb | M::Scasw | M::Scasd | M::Scasq => {
                let b = self.read(ES, di, size)?;
                self.compare(self.rax(), b, size);
            }
            M::Outsb | M::Outsw | M::Outsd => self.outs(source, si, size)?,
            _ => self.ins(di, size)?,
        }
        let step = if self.flag(rflags::DF) {
            (size as u64).wrapping_neg()
        } else {
            size as u64
        };
        if uses_si {
            self.set_gpr(RSI, address, si.wrapping_add(step));
        }
        if uses_di {
            self.set_gpr(RDI, address, di.wrapping_add(step));
        }
        Ok(())
    }

    fn compare(&mut self, a: u64, b: u64, size: usize) {
        let flags = compare_flags(a, b, size);
        self.cpu.regs.rflags = self.cpu.regs.rflags & !rflags::STATUS | flags;
    }

    fn outs(&mut self, segment: u8, si: u64, size: usize) -> Exec {
        let port = self.cpu.regs[Gpr::Rdx] as u16;
        self.check_port(port, size)?;
        let value = self.read(segment, si, size)?;
        self.ask_out(port, size, value)
    }

    fn ins(&mut self, di: u64, size: usize) -> Exec {
        let port = self.cpu.regs[Gpr::Rdx] as u16;
        self.check_port(port, size)?;
        let linear = self.linear(ES, di, size, true)?;
        let user = self.mem.user;
        let span = self
            .mem
            .span(self.cpu, linear, size, AccessKind::Write, user)?;
        let value = self.ask_in(port, size)?;
        let bytes = value.to_le_bytes();
        self.mem
            .store_span(span, bytes.get(..size).unwrap_or_default(), self.pending)
    }
}

/// The largest offset of an address size.
fn last_offset(address: usize) -> u64 {
    truncate(u64::MAX, address)
}

/// Address size in bytes.
fn address_size(op: &Op) -> usize {
    let kinds = (0..op.instruction.op_count()).map(|n| op.instruction.op_kind(n));
    for kind in kinds {
        match kind {
            OpKind::MemorySegSI | OpKind::MemoryESDI => return 2,
            OpKind::MemorySegESI | OpKind::MemoryESEDI => return 4,
            OpKind::MemorySegRSI | OpKind::MemoryESRDI => return 8,
            _ => {}
        }
    }
    8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compare_sets_all_six_flags() {
        assert_eq!(compare_flags(5, 5, 1), rflags::ZF | rflags::PF);
        assert_eq!(compare_flags(0x80, 1, 1), rflags::OF | rflags::AF);
        let borrow = rflags::CF | rflags::AF | rflags::SF | rflags::PF;
        assert_eq!(compare_flags(0, 1, 8), borrow);
    }
}
