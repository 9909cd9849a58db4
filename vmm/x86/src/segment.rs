//! Segment registers, their hidden parts, and descriptor tables.
//!
//! Purpose: a segment register as the processor holds it: selector plus cached descriptor.
//! Invariants: `limit` is in bytes (granularity already applied), as KVM and the VMCS hold it.
//! Elsewhere: loading one from a descriptor table, with its checks (`vmm/soft`).
//! Source: Intel SDM vol. 3A, 3.4.3-3.5.1; vol. 3C, 24.4.1 (access rights layout).

use serde::{Deserialize, Serialize};

/// The six segment registers, numbered as instructions encode them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[repr(u8)]
#[allow(missing_docs)] // The names are the SDM's.
pub enum SegmentRegister {
    Es = 0,
    Cs = 1,
    Ss = 2,
    Ds = 3,
    Fs = 4,
    Gs = 5,
}

impl SegmentRegister {
    /// All six, in encoding order.
    pub const ALL: [Self; 6] = [Self::Es, Self::Cs, Self::Ss, Self::Ds, Self::Fs, Self::Gs];
}

/// One segment register with its hidden part. Also used for LDTR and TR.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Linear base address.
    pub base: u64,
    /// Last valid offset, in bytes.
    pub limit: u32,
    /// The attributes.
    pub attributes: SegmentAttributes,
}

/// Access rights as the VMCS lays them out: bits 3:0 type, 4 S, 6:5 DPL, 7 P, 12 AVL, 13 L, 14 D/B, 15 G, 16 unusable.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SegmentAttributes(u32);

impl Default for SegmentAttributes {
    fn default() -> Self {
        Self::UNUSABLE
    }
}

impl SegmentAttributes {
    /// A register loaded with a null selector.
    pub const UNUSABLE: Self = Self(1 << 16);

    /// From the VMCS layout; reserved bits are dropped.
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits & 0x1_f0ff)
    }

    /// From bits 55..40 of a descriptor's eight bytes.
    pub const fn from_descriptor(descriptor: u64) -> Self {
        Self::from_bits((descriptor >> 40) as u32 & 0xf0ff)
    }

    /// The VMCS layout.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Type field, 0..=15.
    pub const fn kind(self) -> u8 {
        (self.0 & 0xf) as u8
    }

    /// Code or data (true) or system (false).
    pub const fn is_code_or_data(self) -> bool {
        self.0 & 1 << 4 != 0
    }

    /// A code segment.
    pub const fn is_code(self) -> bool {
        self.is_code_or_data() && self.kind() & 8 != 0
    }

    /// Descriptor privilege level, 0..=3.
    pub const fn dpl(self) -> u8 {
        (self.0 >> 5 & 3) as u8
    }

    /// Present.
    pub const fn present(self) -> bool {
        self.0 & 1 << 7 != 0
    }

    /// 64-bit code segment.
    pub const fn long(self) -> bool {
        self.0 & 1 << 13 != 0
    }

    /// Default operand size 32 (code), 32-bit stack pointer (stack), upper bound 4 GiB (expand-down data).
    pub const fn db(self) -> bool {
        self.0 & 1 << 14 != 0
    }

    /// Limit counted in pages in the descriptor; the cached limit is in bytes either way.
    pub const fn granularity(self) -> bool {
        self.0 & 1 << 15 != 0
    }

    /// Holds no descriptor: a null selector was loaded.
    pub const fn unusable(self) -> bool {
        self.0 & 1 << 16 != 0
    }

    /// The same with another DPL.
    #[must_use]
    pub const fn with_dpl(self, dpl: u8) -> Self {
        Self(self.0 & !(3 << 5) | ((dpl & 3) as u32) << 5)
    }

    /// The same with another type field.
    #[must_use]
    pub const fn with_kind(self, kind: u8) -> Self {
        Self(self.0 & !0xf | (kind & 0xf) as u32)
    }
}

impl Segment {
    /// A flat 4 GiB segment with these attributes.
    pub const fn flat(selector: u16, attributes: u32) -> Self {
        Self {
            selector,
            base: 0,
            limit: u32::MAX,
            attributes: SegmentAttributes::from_bits(attributes),
        }
    }

    /// A real-mode segment: base is selector * 16, limit 64 KiB, read/write data or code.
    pub const fn real_mode(selector: u16, code: bool) -> Self {
        Self {
            selector,
            base: (selector as u64) << 4,
            limit: 0xffff,
            attributes: SegmentAttributes::from_bits(if code { 0x9b } else { 0x93 }),
        }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Last valid offset, in bytes.
    pub limit: u16,
}
