//! Interrupt and exception vectors.
//!
//! Purpose: name the vectors, and say which push an error code.
//! Invariants: an [`Exception`] carries an error code exactly when its vector pushes one.
//! Elsewhere: delivery through the IDT (`vmm/soft`), injection through KVM (`vmm/kvm`).
//! Source: Intel SDM vol. 3A, 6.3 and table 6-1.

use crate::GuestVirtAddr;
use serde::{Deserialize, Serialize};
use std::fmt;

/// An interrupt vector, 0..=255.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Vector(pub u8);

#[allow(missing_docs)] // The names are the SDM's mnemonics.
impl Vector {
    pub const DE: Self = Self(0);
    pub const DB: Self = Self(1);
    pub const NMI: Self = Self(2);
    pub const BP: Self = Self(3);
    pub const OF: Self = Self(4);
    pub const BR: Self = Self(5);
    pub const UD: Self = Self(6);
    pub const NM: Self = Self(7);
    pub const DF: Self = Self(8);
    pub const TS: Self = Self(10);
    pub const NP: Self = Self(11);
    pub const SS: Self = Self(12);
    pub const GP: Self = Self(13);
    pub const PF: Self = Self(14);
    pub const MF: Self = Self(16);
    pub const AC: Self = Self(17);
    pub const MC: Self = Self(18);
    pub const XM: Self = Self(19);

    /// The SDM's mnemonic (`#PF`), for the vectors that are exceptions.
    pub const fn mnemonic(self) -> Option<&'static str> {
        Some(match self.0 {
            0 => "#DE",
            1 => "#DB",
            2 => "NMI",
            3 => "#BP",
            4 => "#OF",
            5 => "#BR",
            6 => "#UD",
            7 => "#NM",
            8 => "#DF",
            10 => "#TS",
            11 => "#NP",
            12 => "#SS",
            13 => "#GP",
            14 => "#PF",
            16 => "#MF",
            17 => "#AC",
            18 => "#MC",
            19 => "#XM",
            _ => return None,
        })
    }

    /// Whether the processor pushes an error code for this exception.
    pub const fn pushes_error_code(self) -> bool {
        matches!(self.0, 8 | 10..=14 | 17 | 21)
    }
}

impl fmt::Display for Vector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mnemonic() {
            Some(name) => f.write_str(name),
            None => write!(f, "vector {:#04x}", self.0),
        }
    }
}

/// An exception the processor raised, not yet delivered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Exception {
    /// Which one.
    pub vector: Vector,
    /// What it pushes; `Some` exactly when [`Vector::pushes_error_code`].
    pub error_code: Option<u32>,
    /// The faulting linear address that goes into CR2 (#PF only).
    pub cr2: Option<GuestVirtAddr>,
}

impl Exception {
    /// An exception without error code (#UD, #DE, #NM ...).
    pub const fn plain(vector: Vector) -> Self {
        Self {
            vector,
            error_code: None,
            cr2: None,
        }
    }

    /// An exception with an error code (#GP, #SS, #NP, #TS, #AC, #DF).
    pub const fn with_code(vector: Vector, error_code: u32) -> Self {
        Self {
            vector,
            error_code: Some(error_code),
            cr2: None,
        }
    }

    /// #GP with this error code (0 or a selector).
    pub const fn gp(error_code: u32) -> Self {
        Self::with_code(Vector::GP, error_code)
    }

    /// #UD.
    pub const fn ud() -> Self {
        Self::plain(Vector::UD)
    }

    /// #PF at `addr`.
    pub const fn page_fault(addr: GuestVirtAddr, code: crate::paging::PageFaultCode) -> Self {
        Self {
            vector: Vector::PF,
            error_code: Some(code.bits()),
            cr2: Some(addr),
        }
    }
}

impl fmt::Display for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.vector)?;
        if let Some(code) = self.error_code {
            write!(f, " (error code {code:#x})")?;
        }
        if let Some(addr) = self.cr2 {
            write!(f, " at {addr}")?;
        }
        Ok(())
    }
}
