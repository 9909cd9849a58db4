//! Encoding instructions into a buffer.
//!
//! Purpose: the few instructions around the guest's own, and that one, as bytes for 64-bit mode.
//! Invariants: an instruction that cannot be encoded makes the whole buffer unusable, not shorter.

use iced_x86::{Code, Encoder, IcedError, Instruction, MemoryOperand, Register};

/// Collects encoded instructions.
pub(super) struct Emitter {
    encoder: Encoder,
    failed: bool,
}

impl std::fmt::Debug for Emitter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Emitter")
    }
}

/// `[base + displacement]`.
pub(super) fn at(base: Register, displacement: usize) -> MemoryOperand {
    MemoryOperand::with_base_displ(base, displacement as i64)
}

impl Emitter {
    pub(super) fn new() -> Self {
        Self {
            encoder: Encoder::new(64),
            failed: false,
        }
    }

    /// Adds an instruction; returns whether it could be encoded.
    pub(super) fn push(&mut self, instruction: &Instruction) -> bool {
        let encoded = self.encoder.encode(instruction, 0).is_ok();
        self.failed |= !encoded;
        encoded
    }

    fn add(&mut self, instruction: Result<Instruction, IcedError>) {
        match instruction {
            Ok(instruction) => {
                self.push(&instruction);
            }
            Err(_) => self.failed = true,
        }
    }

    /// `code register, memory`.
    pub(super) fn load(&mut self, code: Code, register: Register, from: MemoryOperand) {
        self.add(Instruction::with2(code, register, from));
    }

    /// `code memory, register`.
    pub(super) fn store(&mut self, code: Code, to: MemoryOperand, register: Register) {
        self.add(Instruction::with2(code, to, register));
    }

    /// `code memory`.
    pub(super) fn memory(&mut self, code: Code, operand: MemoryOperand) {
        self.add(Instruction::with1(code, operand));
    }

    /// `code register`.
    pub(super) fn register(&mut self, code: Code, register: Register) {
        self.add(Instruction::with1(code, register));
    }

    /// `code register, immediate`.
    pub(super) fn immediate(&mut self, code: Code, register: Register, value: u32) {
        self.add(Instruction::with2(code, register, value));
    }

    /// `mov to, from`.
    pub(super) fn copy(&mut self, to: Register, from: Register) {
        self.add(Instruction::with2(Code::Mov_r64_rm64, to, from));
    }

    /// An instruction without operands.
    pub(super) fn bare(&mut self, code: Code) {
        self.push(&Instruction::with(code));
    }

    /// The bytes, unless something could not be encoded.
    pub(super) fn finish(&mut self) -> Option<Vec<u8>> {
        let code = self.encoder.take_buffer();
        let failed = std::mem::take(&mut self.failed);
        if failed { None } else { Some(code) }
    }
}
