//! Model-specific registers that are part of a CPU's state.
//!
//! Purpose: their addresses, and one struct that holds what both engines must save and restore.
//! Invariants: an MSR outside this list does not exist for the guest: RDMSR and WRMSR of it raise #GP(0).
//! Elsewhere: EFER, FS.base, GS.base and APIC_BASE, which live with the registers they belong to ([`crate::CpuState`]).
//! Source: Intel SDM vol. 4, table 2-2; AMD APM vol. 2, 3.2 for the SYSCALL family.

use serde::{Deserialize, Serialize};

#[allow(missing_docs)] // The names are the SDM's.
pub mod index {
    pub const IA32_TIME_STAMP_COUNTER: u32 = 0x10;
    pub const IA32_APIC_BASE: u32 = 0x1b;
    pub const IA32_BIOS_SIGN_ID: u32 = 0x8b;
    pub const IA32_MTRRCAP: u32 = 0xfe;
    pub const IA32_SYSENTER_CS: u32 = 0x174;
    pub const IA32_SYSENTER_ESP: u32 = 0x175;
    pub const IA32_SYSENTER_EIP: u32 = 0x176;
    pub const IA32_MISC_ENABLE: u32 = 0x1a0;
    pub const IA32_PAT: u32 = 0x277;
    pub const IA32_EFER: u32 = 0xc000_0080;
    pub const IA32_STAR: u32 = 0xc000_0081;
    pub const IA32_LSTAR: u32 = 0xc000_0082;
    pub const IA32_CSTAR: u32 = 0xc000_0083;
    pub const IA32_FMASK: u32 = 0xc000_0084;
    pub const IA32_FS_BASE: u32 = 0xc000_0100;
    pub const IA32_GS_BASE: u32 = 0xc000_0101;
    pub const IA32_KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const IA32_TSC_AUX: u32 = 0xc000_0103;
}

/// The MSRs with a field of their own.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[allow(missing_docs)] // Named in `index`.
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    pub tsc_aux: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub misc_enable: u64,
}

impl Default for Msrs {
    /// Power-on values (SDM vol. 3A, table 9-1; PAT from 11.12.4).
    fn default() -> Self {
        Self {
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            tsc_aux: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            pat: 0x0007_0406_0007_0406,
            misc_enable: 1, // fast strings
        }
    }
}

impl Msrs {
    /// The field behind an MSR address, if it has one here.
    pub fn field_mut(&mut self, msr: u32) -> Option<&mut u64> {
        Some(match msr {
            index::IA32_STAR => &mut self.star,
            index::IA32_LSTAR => &mut self.lstar,
            index::IA32_CSTAR => &mut self.cstar,
            index::IA32_FMASK => &mut self.fmask,
            index::IA32_KERNEL_GS_BASE => &mut self.kernel_gs_base,
            index::IA32_TSC_AUX => &mut self.tsc_aux,
            index::IA32_SYSENTER_CS => &mut self.sysenter_cs,
            index::IA32_SYSENTER_ESP => &mut self.sysenter_esp,
            index::IA32_SYSENTER_EIP => &mut self.sysenter_eip,
            index::IA32_PAT => &mut self.pat,
            index::IA32_MISC_ENABLE => &mut self.misc_enable,
            _ => return None,
        })
    }

    /// Every MSR address that has a field here, in the order engines save them.
    pub const INDICES: [u32; 11] = [
        index::IA32_STAR,
        index::IA32_LSTAR,
        index::IA32_CSTAR,
        index::IA32_FMASK,
        index::IA32_KERNEL_GS_BASE,
        index::IA32_TSC_AUX,
        index::IA32_SYSENTER_CS,
        index::IA32_SYSENTER_ESP,
        index::IA32_SYSENTER_EIP,
        index::IA32_PAT,
        index::IA32_MISC_ENABLE,
    ];
}
