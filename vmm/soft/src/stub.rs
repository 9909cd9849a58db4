//! Native stubs: one plain guest instruction each, run on the host CPU.
//!
//! Purpose: give a plain instruction (arithmetic, logic, moves, SSE, x87) exactly the host's semantics. A stub loads the guest
//! registers the instruction uses, the status flags and, where it needs them, SSE and x87 state; executes the instruction
//! with its memory operand replaced by the scratch slot of a [`Frame`]; and stores back what it wrote.
//!
//! Why a stub cannot touch host memory but its [`Frame`], the [`Registers`] and the SSE registers it is given:
//! - only instructions that [`generate`] has checked become stubs: at most one memory operand, explicit, re-encoded as
//!   `[frame]` with no index and no displacement, of a size that fits the scratch slot; no implicit memory operand, no change of
//!   the stack pointer, no control transfer, no privileged or system instruction;
//! - register values of the guest never take part in an address: the registers that hold the pointers are ones the instruction
//!   does not name, and a bit offset that a memory operand would add to its address (BT and relatives) is masked to the operand
//!   before ([`Frame::bit`]);
//! - the memory holding stubs is never writable through the address it is executed at ([`memory`]).
//!
//! Why the host never faults in one: divisions are checked before ([`crate::plain`]), SSE runs with exceptions masked,
//! x87 instructions that would report a pending exception are not run, and the scratch slot is aligned.
//!
//! Elsewhere: which instructions are plain ([`crate::decode`]); what surrounds a call ([`crate::plain`]).
#![allow(unsafe_code)] // Calling generated code; see the module documentation and the SAFETY comment.

mod emit;
pub(crate) mod generate;
mod memory;

use crate::stub::memory::CodeMemory;
pub(crate) use generate::{MemoryUse, Traits};
use iced_x86::Instruction;
use std::collections::HashMap;
use x86::{FpuState, Registers};

/// Bytes of the scratch slot. FNSAVE's 108 are the largest operand.
pub(crate) const SCRATCH: usize = 128;

/// What a stub works on besides the registers.
#[repr(C, align(64))]
pub(crate) struct Frame {
    /// The memory operand.
    pub(crate) scratch: [u8; SCRATCH],
    /// x87 and MMX state around the instruction, as FXSAVE64 has it.
    pub(crate) image: [u8; 512],
    /// A bit offset, masked to the operand, for BT and its relatives in memory.
    pub(crate) bit: u64,
    /// MXCSR to run with, and after the instruction.
    pub(crate) mxcsr: u32,
    /// Where the stub keeps the host's.
    host_mxcsr: u32,
}

impl Default for Frame {
    fn default() -> Self {
        Self {
            scratch: [0; SCRATCH],
            image: [0; 512],
            bit: 0,
            mxcsr: 0x1f80,
            host_mxcsr: 0x1f80,
        }
    }
}

impl std::fmt::Debug for Frame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Frame")
    }
}

/// A stub's entry point. Valid until the [`Stubs`] it came from are flushed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Stub(usize);

impl Stub {
    /// No stub, for operations that are not plain.
    pub(crate) const NONE: Self = Self(0);

    /// Runs it. The status flags come back in the low 16 bits as LAHF and SETO leave them in AX (garbage if the instruction
    /// writes no flag, see [`Traits::writes_flags`]).
    #[inline]
    pub(crate) fn call(self, frame: &mut Frame, regs: &mut Registers, fpu: &mut FpuState) -> u64 {
        if self == Self::NONE {
            return 0;
        }
        // SAFETY: a Stub is only made by `Stubs::get` for code that `generate` produced and that stays in place until a
        // flush; flushing also drops every decoded operation that holds one. The module's documentation says why the code
        // touches only what the three references cover; it follows the sysv64 convention.
        unsafe {
            let code: unsafe extern "sysv64" fn(*mut Frame, *mut Registers, *mut u128) -> u64 =
                std::mem::transmute(self.0);
            code(frame, regs, fpu.xmm.as_mut_ptr())
        }
    }
}

/// Why an instruction has no stub.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum NoStub {
    /// It does not fit the conditions of the module's documentation.
    NotPlain(&'static str),
    /// The stub memory is full: flush everything and try again.
    Full,
}

/// All stubs, by what they execute.
#[derive(Debug)]
pub(crate) struct Stubs {
    memory: CodeMemory,
    known: HashMap<Vec<u8>, usize>,
    factory: generate::Factory,
}

impl Stubs {
    pub(crate) fn new() -> std::io::Result<Self> {
        let factory = generate::Factory::default();
        Ok(Self {
            memory: CodeMemory::new()?,
            known: HashMap::new(),
            factory,
        })
    }

    /// The stub for `instruction` and what its caller must know about it.
    pub(crate) fn get(&mut self, instruction: &Instruction) -> Result<(Stub, Traits), NoStub> {
        let (code, traits) = self.factory.generate(instruction)?;
        // Equal code means equal stubs, whatever guest instruction it came from.
        if let Some(&at) = self.known.get(&code) {
            return Ok((Stub(at), traits));
        }
        let at = self.memory.push(&code).ok_or(NoStub::Full)?;
        self.known.insert(code, at);
        Ok((Stub(at), traits))
    }

    /// Forgets all stubs; none may be called afterwards.
    pub(crate) fn flush(&mut self) {
        self.known.clear();
        self.memory.clear();
    }
}
