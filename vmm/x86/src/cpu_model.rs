//! CPU models: what CPUID tells a guest.
//!
//! Purpose: the same processor on every host and both engines, so that a trace replays anywhere.
//! Invariants: nothing nondeterministic is offered: no TSC, RDRAND, RDSEED, RDPMC, no KVM or hypervisor leaves, no XSAVE variants
//! that track modifications. A leaf that is not listed reads as zero.
//! Elsewhere: making an engine show it (`vmm/kvm` by KVM_SET_CPUID2, `vmm/soft` directly).
//! Source: Intel SDM vol. 2A, CPUID; the x86-64-v2 level of the psABI (table 3.1).

use crate::paging::PHYS_ADDR_BITS;
use serde::{Deserialize, Serialize};

/// What a guest is told its processor is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum CpuModel {
    /// x86-64-v2: up to SSE4.2, POPCNT, CMPXCHG16B.
    #[default]
    V2,
}

/// The four registers CPUID returns.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[allow(missing_docs)]
pub struct CpuidResult {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

const fn bits(list: &[u32]) -> u32 {
    let mut value = 0;
    let mut i = 0;
    while i < list.len() {
        value |= 1 << list[i];
        i += 1;
    }
    value
}

/// Leaf 1 EDX: FPU VME DE PSE MSR PAE CX8 APIC SEP PGE CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2. No TSC (4), MCE (7), MTRR (12).
const LEAF_1_EDX: u32 = bits(&[0, 2, 3, 5, 6, 8, 9, 11, 13, 15, 16, 17, 19, 23, 24, 25, 26]);
/// Leaf 1 ECX: SSE3 SSSE3 CX16 SSE4.1 SSE4.2 POPCNT.
const LEAF_1_ECX: u32 = bits(&[0, 9, 13, 19, 20, 23]);
/// Leaf 8000_0001h EDX: the repeats of leaf 1 that AMD defines are left out; SYSCALL NX 1GB LM.
const LEAF_8000_0001_EDX: u32 = bits(&[11, 20, 26, 29]);
/// Leaf 8000_0001h ECX: LAHF/SAHF in long mode.
const LEAF_8000_0001_ECX: u32 = bits(&[0]);

impl CpuModel {
    /// Every leaf that does not read as zero, as (EAX, ECX) inputs.
    pub const LEAVES: [(u32, u32); 8] = [
        (0, 0),
        (1, 0),
        (0x8000_0000, 0),
        (0x8000_0001, 0),
        (0x8000_0002, 0),
        (0x8000_0003, 0),
        (0x8000_0004, 0),
        (0x8000_0008, 0),
    ];

    /// What CPUID returns for EAX = `leaf`, ECX = `subleaf`.
    pub fn cpuid(self, leaf: u32, _subleaf: u32) -> CpuidResult {
        match leaf {
            0 => CpuidResult { eax: 1, ..vendor() },
            1 => CpuidResult {
                eax: 0x0006_0fb1,      // family 6: what software expects of a 64-bit part
                ebx: 8 << 8 | 1 << 16, // CLFLUSH line of 64 bytes, one logical processor
                ecx: LEAF_1_ECX,
                edx: LEAF_1_EDX,
            },
            0x8000_0000 => CpuidResult {
                eax: 0x8000_0008,
                ..vendor()
            },
            0x8000_0001 => CpuidResult {
                eax: 0,
                ebx: 0,
                ecx: LEAF_8000_0001_ECX,
                edx: LEAF_8000_0001_EDX,
            },
            0x8000_0002..=0x8000_0004 => brand(leaf - 0x8000_0002),
            0x8000_0008 => CpuidResult {
                eax: 48 << 8 | PHYS_ADDR_BITS,
                ..CpuidResult::default()
            },
            _ => CpuidResult::default(),
        }
    }

    /// The name users type.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V2 => "v2",
        }
    }
}

/// "GenuineIntel": kernels take their errata and SYSENTER paths by vendor, and this is the most travelled one.
fn vendor() -> CpuidResult {
    CpuidResult {
        eax: 0,
        ebx: u32::from_le_bytes(*b"Genu"),
        edx: u32::from_le_bytes(*b"ineI"),
        ecx: u32::from_le_bytes(*b"ntel"),
    }
}

fn brand(part: u32) -> CpuidResult {
    let name = b"Chronovisor virtual CPU (x86-64-v2)\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let word = |i: usize| {
        let at = part as usize * 16 + i * 4;
        u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]])
    };
    CpuidResult {
        eax: word(0),
        ebx: word(1),
        ecx: word(2),
        edx: word(3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_nondeterministic_is_offered() {
        let one = CpuModel::V2.cpuid(1, 0);
        assert_eq!(one.edx & 1 << 4, 0, "TSC");
        assert_eq!(one.ecx & 1 << 30, 0, "RDRAND");
        assert_eq!(one.ecx & 1 << 31, 0, "hypervisor");
        assert_eq!(one.ecx & 1 << 26, 0, "XSAVE");
        assert_eq!(CpuModel::V2.cpuid(7, 0).ebx & 1 << 18, 0, "RDSEED");
        assert_eq!(
            CpuModel::V2.cpuid(0x8000_0001, 0).edx & 1 << 27,
            0,
            "RDTSCP"
        );
    }

    #[test]
    fn the_level_is_v2() {
        let one = CpuModel::V2.cpuid(1, 0);
        for bit in [0, 9, 13, 19, 20, 23] {
            assert_ne!(one.ecx & 1 << bit, 0, "ECX bit {bit}");
        }
        assert_ne!(CpuModel::V2.cpuid(0x8000_0001, 0).ecx & 1, 0, "LAHF");
    }
}
