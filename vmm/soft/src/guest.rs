//! The CPU and memory an instruction executes on.
//!
//! Purpose: [`Guest`] is what every instruction's code is a method of; here are its registers and operands.
//! Invariants: code that may stop half way is either careful to change registers last, or runs under
//! [`crate::dispatch`], which puts registers and segments back; stores are staged ([`crate::memory`]).

use crate::Pending;
use crate::memory::Memory;
use crate::mode::Mode;
use crate::op::{BASE_RIP, NO_REGISTER, Op};
use crate::stop::{Exec, Stop};
use crate::stub::Frame;
use iced_x86::{OpKind, Register};
use x86::{CpuModel, CpuState, ExitControls, Gpr};

/// What instructions look up and never change.
#[derive(Debug, Default)]
pub(crate) struct Rules {
    pub(crate) model: CpuModel,
    pub(crate) controls: ExitControls,
}

/// See the module.
pub(crate) struct Guest<'a> {
    pub(crate) cpu: &'a mut CpuState,
    pub(crate) mem: &'a mut Memory,
    pub(crate) mode: &'a mut Mode,
    pub(crate) pending: &'a mut Pending,
    pub(crate) rules: &'a Rules,
    pub(crate) frame: &'a mut Frame,
    /// What RDTSC reads.
    pub(crate) time: u64,
    /// RIP after the instruction; control transfers change it.
    pub(crate) next: u64,
    /// The instruction enters the kernel and cancels the single-step trap (INT n, SYSCALL).
    pub(crate) no_trap: bool,
    /// How many iterations of a REP instruction this step may make, at least one; then how many it made.
    pub(crate) iterations: u64,
    /// An interception that was reported at this boundary already and is to be executed now.
    pub(crate) past_intercept: bool,
}

impl Guest<'_> {
    /// A general register by number, all 64 bits.
    #[inline]
    pub(crate) fn gpr(&self, number: u8) -> u64 {
        self.cpu.regs.gpr[usize::from(number & 15)]
    }

    /// Writes `size` bytes of a general register as instructions do: four bytes clear the upper half.
    #[inline]
    pub(crate) fn set_gpr(&mut self, number: u8, size: usize, value: u64) {
        let register = &mut self.cpu.regs.gpr[usize::from(number & 15)];
        *register = merge(*register, size, value);
    }

    /// A register under its encoding name, AH to BH and segment registers included; zero-extended.
    pub(crate) fn register(&self, register: Register) -> u64 {
        if register.is_segment_register() {
            let number = register.number() & 7;
            return self
                .cpu
                .segments
                .get(number)
                .map_or(0, |s| u64::from(s.selector));
        }
        let value = self.gpr(register.full_register().number() as u8);
        if is_high_byte(register) {
            return value >> 8 & 0xff;
        }
        truncate(value, register.size())
    }

    /// Writes a register under its encoding name.
    pub(crate) fn set_register(&mut self, register: Register, value: u64) {
        let number = register.full_register().number() as u8;
        if is_high_byte(register) {
            let old = self.gpr(number);
            self.set_gpr(number, 8, old & !0xff00 | (value & 0xff) << 8);
        } else {
            self.set_gpr(number, register.size(), value);
        }
    }

    /// The offset an instruction's memory operand has in its segment.
    #[inline]
    pub(crate) fn offset(&self, op: &Op) -> u64 {
        let address = &op.address;
        let mut offset = address.displacement;
        if address.base < NO_REGISTER {
            offset = offset.wrapping_add(self.gpr(address.base));
        } else if address.base == BASE_RIP {
            offset = offset.wrapping_add(self.next);
        }
        if address.index < NO_REGISTER {
            offset = offset.wrapping_add(self.gpr(address.index) << address.shift);
        }
        offset & address.mask
    }

    /// Reads `size` bytes of an instruction's memory operand, `skip` bytes behind its start.
    pub(crate) fn read_memory(&mut self, op: &Op, skip: u64, size: usize) -> Exec<u64> {
        let offset = self.offset(op).wrapping_add(skip) & op.address.mask;
        self.read(op.address.segment, offset, size)
    }

    /// Stages a store to an instruction's memory operand.
    pub(crate) fn write_memory(&mut self, op: &Op, skip: u64, size: usize, value: u64) -> Exec {
        let offset = self.offset(op).wrapping_add(skip) & op.address.mask;
        self.write(op.address.segment, offset, size, value)
    }

    /// Operand `n`, `size` bytes of it where it is memory, zero-extended.
    pub(crate) fn operand(&mut self, op: &Op, n: u32, size: usize) -> Exec<u64> {
        match op.instruction.op_kind(n) {
            OpKind::Register => Ok(truncate(self.register(op.instruction.op_register(n)), size)),
            OpKind::Memory => self.read_memory(op, 0, size),
            _ => Ok(truncate(immediate(op, n)?, size)),
        }
    }

    /// Writes operand `n`; a store is staged.
    pub(crate) fn set_operand(&mut self, op: &Op, n: u32, size: usize, value: u64) -> Exec {
        match op.instruction.op_kind(n) {
            OpKind::Register => {
                self.set_register(op.instruction.op_register(n), value);
                Ok(())
            }
            OpKind::Memory => self.write_memory(op, 0, size, value),
            _ => Err(Stop::Unimplemented("an operand that cannot be written")),
        }
    }

    /// RAX.
    #[inline]
    pub(crate) fn rax(&self) -> u64 {
        self.cpu.regs[Gpr::Rax]
    }

    /// Sets or clears flags.
    pub(crate) fn set_flags(&mut self, mask: u64, on: bool) {
        if on {
            self.cpu.regs.rflags |= mask;
        } else {
            self.cpu.regs.rflags &= !mask;
        }
    }

    /// Whether a flag is set.
    #[inline]
    pub(crate) fn flag(&self, mask: u64) -> bool {
        self.cpu.regs.rflags & mask != 0
    }

    /// Something that [`Mode`] or the address translation depends on changed.
    pub(crate) fn mode_changed(&mut self) {
        *self.mode = Mode::of(self.cpu);
        self.mem.user = self.mode.cpl == 3;
        self.mem.linear_mask = self.mode.linear_mask();
    }
}

/// An immediate operand, sign-extended as the instruction does.
pub(crate) fn immediate(op: &Op, n: u32) -> Exec<u64> {
    op.instruction
        .try_immediate(n)
        .map_err(|_| Stop::Unimplemented("an operand of an unexpected kind"))
}

fn is_high_byte(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::CH | Register::DH | Register::BH
    )
}

/// The low `size` bytes.
#[inline]
pub(crate) fn truncate(value: u64, size: usize) -> u64 {
    if size >= 8 {
        value
    } else {
        value & ((1 << (8 * size)) - 1)
    }
}

/// The low `size` bytes, sign-extended.
#[inline]
pub(crate) fn sign_extend(value: u64, size: usize) -> u64 {
    let shift = 64 - 8 * size.clamp(1, 8) as u32;
    ((value << shift) as i64 >> shift) as u64
}

/// `old` with its low `size` bytes replaced as a register write does.
#[inline]
pub(crate) fn merge(old: u64, size: usize, value: u64) -> u64 {
    match size {
        1 => old & !0xff | value & 0xff,
        2 => old & !0xffff | value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    }
}
