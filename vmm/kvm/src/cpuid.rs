//! Showing the guest its CPU model through KVM.
//!
//! Purpose: the list for `KVM_SET_CPUID2` that makes KVM answer as [`CpuModel::cpuid`] does.
//! Invariants: leaves that read as zero near the ones that do not are listed explicitly, because KVM answers an unlisted leaf
//! of an Intel model with the highest basic leaf.
//! Elsewhere: KVMs that put host features back in ([`crate::quirks::Quirks::cpuid_forced`]).
//! Source: KVM API, section 4.20 (`KVM_SET_CPUID2`); Intel SDM vol. 2A, CPUID.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use x86::CpuModel;

/// Basic, hypervisor and extended leaves up to these numbers are listed even when they read as zero.
const ZERO_LEAVES: [std::ops::Range<u32>; 3] =
    [0..0x20, 0x4000_0000..0x4000_0002, 0x8000_0000..0x8000_0022];

/// What `KVM_SET_CPUID2` gets. `None` if the list is longer than the bindings allow, which it is not.
pub(crate) fn entries(model: CpuModel) -> Option<CpuId> {
    let list: Vec<_> = ZERO_LEAVES
        .into_iter()
        .flatten()
        .map(|leaf| entry(model, leaf))
        .collect();
    CpuId::from_entries(&list).ok()
}

fn entry(model: CpuModel, leaf: u32) -> kvm_cpuid_entry2 {
    let result = model.cpuid(leaf, 0);
    kvm_cpuid_entry2 {
        function: leaf,
        eax: result.eax,
        ebx: result.ebx,
        ecx: result.ecx,
        edx: result.edx,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_leaf_of_the_model_is_listed() {
        let entries = entries(CpuModel::V2).expect("short list");
        for (leaf, _) in CpuModel::LEAVES {
            let listed = entries.as_slice().iter().find(|e| e.function == leaf);
            let listed = listed.unwrap_or_else(|| panic!("leaf {leaf:#x}"));
            assert_eq!(
                listed.eax,
                CpuModel::V2.cpuid(leaf, 0).eax,
                "leaf {leaf:#x}"
            );
        }
    }
}
