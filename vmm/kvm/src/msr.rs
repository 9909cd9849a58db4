//! Model-specific registers: which KVM keeps, and which exit.
//!
//! Purpose: the filter for `KVM_X86_SET_MSR_FILTER` that lets KVM handle the MSRs that are part of [`CpuState`](x86::CpuState)
//! and sends every other one to user space.
//! Invariants: the filter denies by default; only addresses that have a field in the state are allowed through. LSTAR is not where the
//! engine keeps another value in KVM than the guest's ([`crate::hybrid`]).
//! Elsewhere: reading and writing them at exits ([`crate::vcpu`]); answering the others (`machine`).
//! Source: KVM API, section 4.97 (`KVM_X86_SET_MSR_FILTER`), 7.21 (`KVM_CAP_X86_USER_SPACE_MSR`).

use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use machine::engine::EngineError;
use x86::msr::{Msrs, index};

/// `KVM_MSR_EXIT_REASON_INVAL | _UNKNOWN | _FILTER`: all of them come to us.
const ALL_REASONS: u64 = 1 | 2 | 4;

/// The two ranges that hold every MSR of the state: the low ones and AMD's.
const RANGES: [(u32, u32); 2] = [(0, 0x400), (0xc000_0000, 0x200)];

/// Whether KVM keeps this MSR.
fn kept(msr: u32) -> bool {
    Msrs::INDICES.contains(&msr)
        || [
            index::IA32_EFER,
            index::IA32_FS_BASE,
            index::IA32_GS_BASE,
            index::IA32_APIC_BASE,
        ]
        .contains(&msr)
}

/// Makes every MSR that KVM does not keep exit, and LSTAR too if it is hidden.
pub(crate) fn install_filter(vm: &VmFd, hide_lstar: bool) -> Result<(), EngineError> {
    let cap = kvm_bindings::kvm_enable_cap {
        cap: kvm_bindings::KVM_CAP_X86_USER_SPACE_MSR,
        args: [ALL_REASONS, 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&cap)
        .map_err(|e| crate::vcpu::host_error("KVM_ENABLE_CAP", e))?;
    let bitmaps = RANGES.map(|(base, count)| bitmap(base, count, hide_lstar));
    let ranges: Vec<_> = RANGES
        .iter()
        .zip(&bitmaps)
        .map(|(&(base, msr_count), bitmap)| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base,
            msr_count,
            bitmap,
        })
        .collect();
    vm.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges)
        .map_err(|e| crate::vcpu::host_error("KVM_X86_SET_MSR_FILTER", e))
}

/// One bit per MSR from `base`, set where KVM keeps it.
fn bitmap(base: u32, count: u32, hide_lstar: bool) -> Vec<u8> {
    let passes = |msr| kept(msr) && !(hide_lstar && msr == index::IA32_LSTAR);
    let bit = |i: u32| u8::from(passes(base + i)) << (i % 8);
    (0..count / 8)
        .map(|byte| (0..8).map(|i| bit(byte * 8 + i)).sum())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_the_kept_ones_are_allowed() {
        for (base, count) in RANGES {
            let bitmap = bitmap(base, count, false);
            for i in 0..count {
                let allowed = bitmap[i as usize / 8] & 1 << (i % 8) != 0;
                assert_eq!(allowed, kept(base + i), "MSR {:#x}", base + i);
            }
        }
        assert!(!kept(index::IA32_TIME_STAMP_COUNTER));
    }

    #[test]
    fn the_ranges_cover_the_state() {
        for msr in Msrs::INDICES {
            let inside = RANGES
                .iter()
                .any(|&(base, n)| (base..base + n).contains(&msr));
            assert!(inside, "MSR {msr:#x}");
        }
    }
}
