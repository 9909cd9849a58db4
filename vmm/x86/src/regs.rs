//! General registers, RFLAGS and control-register bits.
//!
//! Purpose: name them once. Invariants: [`Gpr`] numbers are the instruction encoding's.
//! Elsewhere: the whole state of a CPU ([`crate::CpuState`]).
//! Source: Intel SDM vol. 1, 3.4; vol. 3A, 2.3 and 2.5.

use bitflags::bitflags;
use serde::{Deserialize, Serialize};

/// A general-purpose register, numbered as instructions encode it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[repr(u8)]
#[allow(missing_docs)] // The names are the SDM's.
pub enum Gpr {
    Rax = 0,
    Rcx = 1,
    Rdx = 2,
    Rbx = 3,
    Rsp = 4,
    Rbp = 5,
    Rsi = 6,
    Rdi = 7,
    R8 = 8,
    R9 = 9,
    R10 = 10,
    R11 = 11,
    R12 = 12,
    R13 = 13,
    R14 = 14,
    R15 = 15,
}

impl Gpr {
    /// All sixteen, in encoding order.
    pub const ALL: [Self; 16] = [
        Self::Rax,
        Self::Rcx,
        Self::Rdx,
        Self::Rbx,
        Self::Rsp,
        Self::Rbp,
        Self::Rsi,
        Self::Rdi,
        Self::R8,
        Self::R9,
        Self::R10,
        Self::R11,
        Self::R12,
        Self::R13,
        Self::R14,
        Self::R15,
    ];

    /// Lower-case name of the 64-bit register.
    pub const fn name(self) -> &'static str {
        [
            "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11",
            "r12", "r13", "r14", "r15",
        ][self as usize]
    }
}

/// General registers, instruction pointer and flags.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Registers {
    /// Indexed by [`Gpr`].
    pub gpr: [u64; 16],
    /// Offset of the next instruction in CS.
    pub rip: u64,
    /// RFLAGS; bit 1 is always set.
    pub rflags: u64,
}

impl std::ops::Index<Gpr> for Registers {
    type Output = u64;
    fn index(&self, gpr: Gpr) -> &u64 {
        &self.gpr[gpr as usize]
    }
}

impl std::ops::IndexMut<Gpr> for Registers {
    fn index_mut(&mut self, gpr: Gpr) -> &mut u64 {
        &mut self.gpr[gpr as usize]
    }
}

#[allow(missing_docs)] // The names are the SDM's.
pub mod rflags {
    pub const CF: u64 = 1 << 0;
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// CF, PF, AF, ZF, SF and OF: what arithmetic writes.
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
}

#[allow(missing_docs)] // The names are the SDM's.
mod flags {
    use super::*;

    bitflags! {
        /// CR0.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct Cr0: u64 {
            const PE = 1 << 0;
            const MP = 1 << 1;
            const EM = 1 << 2;
            const TS = 1 << 3;
            const ET = 1 << 4;
            const NE = 1 << 5;
            const WP = 1 << 16;
            const AM = 1 << 18;
            const NW = 1 << 29;
            const CD = 1 << 30;
            const PG = 1 << 31;
        }

        /// CR4.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct Cr4: u64 {
            const VME = 1 << 0;
            const PVI = 1 << 1;
            const TSD = 1 << 2;
            const DE = 1 << 3;
            const PSE = 1 << 4;
            const PAE = 1 << 5;
            const MCE = 1 << 6;
            const PGE = 1 << 7;
            const PCE = 1 << 8;
            const OSFXSR = 1 << 9;
            const OSXMMEXCPT = 1 << 10;
            const UMIP = 1 << 11;
            const LA57 = 1 << 12;
            const VMXE = 1 << 13;
            const FSGSBASE = 1 << 16;
            const PCIDE = 1 << 17;
            const OSXSAVE = 1 << 18;
            const SMEP = 1 << 20;
            const SMAP = 1 << 21;
        }

        /// IA32_EFER.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct Efer: u64 {
            const SCE = 1 << 0;
            const LME = 1 << 8;
            const LMA = 1 << 10;
            const NXE = 1 << 11;
        }
    }
}

pub use flags::{Cr0, Cr4, Efer};
