//! A decoded instruction, ready to execute.
//!
//! Purpose: everything about an instruction that does not depend on the CPU's state, worked out once.
//! Invariants: nothing in an [`Op`] depends on the linear address it was decoded at: branch targets and RIP-relative operands are
//! kept as displacements, so that one page mapped at two addresses shares its operations.
//! Elsewhere: making one ([`crate::decode`]); keeping them ([`crate::code`]).

use crate::stub::{Stub, Traits};
use iced_x86::Instruction;

/// How an instruction is executed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// By its stub.
    Plain,
    /// LEA: an address, but no access.
    Lea,
    /// Nothing happens: NOP, PREFETCH, fences.
    Nop,
    /// Conditional near jump.
    Jcc,
    /// Unconditional near jump to a constant.
    Jmp,
    /// Near call of a constant.
    Call,
    /// Near return.
    Ret,
    /// PUSH of a general register.
    PushRegister,
    /// POP into a general register.
    PopRegister,
    /// By the code for its mnemonic ([`crate::dispatch`]).
    Own,
    /// #UD.
    Undefined,
    /// Meant for a stub, but refused by its conditions.
    Refused,
    /// Longer than 15 bytes: #GP(0).
    TooLong,
}

/// Which checks of CR0, CR4 and pending x87 exceptions come first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FpuChecks {
    /// None.
    None,
    /// An x87 instruction that waits for pending exceptions.
    X87,
    /// An x87 control instruction that does not.
    X87Control,
    /// MMX.
    Mmx,
    /// SSE on XMM registers.
    Sse,
    /// SSE on XMM and MMX registers.
    SseMmx,
}

/// What a plain instruction needs checked besides.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Special {
    /// Nothing.
    None,
    /// DIV: the quotient must fit.
    Divide,
    /// IDIV.
    DivideSigned,
    /// The bit offset in this register moves the memory operand.
    BitOffset(u8),
}

/// No base or no index register.
pub(crate) const NO_REGISTER: u8 = 16;
/// The base is RIP after the instruction.
pub(crate) const BASE_RIP: u8 = 17;

/// How to compute an effective address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Address {
    /// Segment register number.
    pub(crate) segment: u8,
    /// General register number, [`NO_REGISTER`] or [`BASE_RIP`].
    pub(crate) base: u8,
    /// General register number or [`NO_REGISTER`].
    pub(crate) index: u8,
    /// Log2 of the scale.
    pub(crate) shift: u8,
    /// Displacement.
    pub(crate) displacement: u64,
    /// All ones in the address size.
    pub(crate) mask: u64,
}

/// See the module.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Op {
    pub(crate) kind: Kind,
    /// Bytes.
    pub(crate) len: u8,
    /// Operand size in bytes of [`Kind::Lea`], pushes, pops, calls and returns.
    pub(crate) size: u8,
    /// The register number of [`Kind::PushRegister`] and [`Kind::PopRegister`]; the condition of [`Kind::Jcc`].
    pub(crate) register: u8,
    pub(crate) checks: FpuChecks,
    pub(crate) special: Special,
    /// #GP unless the memory operand is aligned to 16 bytes.
    pub(crate) aligned: bool,
    pub(crate) traits: Traits,
    pub(crate) stub: Stub,
    pub(crate) address: Address,
    /// Distance of a near branch from the end of the instruction.
    pub(crate) branch: u64,
    /// All ones in the instruction pointer's size after a near branch.
    pub(crate) branch_mask: u64,
    /// What was decoded.
    pub(crate) instruction: Instruction,
}
