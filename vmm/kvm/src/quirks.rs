//! Where a host's KVM deviates from the SDM.
//!
//! Purpose: one value that says which measures the engine has to take on this host, and what a user should know of it.
//! Invariants: every field is measured by running guests of a few instructions, once per process. All fields off
//! (the default) is KVM on VT-x or AMD-V as it should be: then no measure is taken.
//! Elsewhere: the measuring guests ([`crate::probe`]); the measures ([`crate::hybrid`], [`crate::shadow`], [`crate::sensitive`]).
//! Source: KVM implementations without hardware support exist (the page-table based ones), and share `/dev/kvm` with the others.

use crate::probe::Probe;
use crate::sensitive::Sensitive;
use kvm_ioctls::Kvm;
use machine::engine::EngineError;
use machine::memory::CreateMemoryError;
use std::sync::OnceLock;

/// Why the host could not be examined.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// KVM failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// No memory for the examining guests.
    #[error(transparent)]
    Memory(#[from] CreateMemoryError),
}

/// What is wrong with a KVM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Quirks {
    /// CPL 0 is emulated instruction by instruction, not run by the processor.
    pub kernel_emulated: bool,
    /// SYSCALL in ring 3 does not enter ring 0.
    pub syscall_broken: bool,
    /// INT n in ring 3 is not delivered.
    pub int_n_broken: bool,
    /// In 64-bit ring 3, software reads these selectors from CS and SS whatever it loaded.
    pub ring3_selectors: Option<(u16, u16)>,
    /// CPUID shows features that the CPU model does not have.
    pub cpuid_forced: bool,
    /// CR4.TSD does not keep ring 3 from RDTSC.
    pub tsd_ignored: bool,
    /// CR0.TS, CR0.EM and CR4.OSFXSR do not keep ring 3 from x87 and SSE.
    pub fpu_traps_ignored: bool,
    /// FXSAVE stores more than the soft engine does: another MXCSR mask, or x87 pointers.
    pub fxsave_differs: bool,
    /// IRETQ to ring 3 leaves ring-0 selectors in DS, ES, FS and GS.
    pub iret_keeps_selectors: bool,
    /// An interrupt window that was asked for is not reported where it opens.
    pub windows_unreliable: bool,
    /// Paging outside of long mode does not run.
    pub legacy_paging_broken: bool,
    /// Page-table entries that the monitor changed stay unseen.
    pub shadows_stale: bool,
    /// Hardware breakpoints do not stop ring 3.
    pub ring3_breakpoints_broken: bool,
}

impl Quirks {
    /// Measures the host, or returns what was measured before in this process.
    pub(crate) fn of(kvm: &Kvm) -> Result<Self, ProbeError> {
        static MEASURED: OnceLock<Quirks> = OnceLock::new();
        if let Some(&quirks) = MEASURED.get() {
            return Ok(quirks);
        }
        let quirks = Probe::new(kvm)?.measure()?;
        Ok(*MEASURED.get_or_init(|| quirks))
    }

    /// Whether the guest's IDT must be hidden from KVM, so that every exception comes to us.
    pub(crate) fn hides_idt(&self) -> bool {
        self.syscall_broken || self.int_n_broken
    }

    /// The instructions whose pages must not be executed by KVM.
    pub(crate) fn sensitive(&self) -> Sensitive {
        Sensitive {
            identity: self.cpuid_forced,
            idtr: self.hides_idt(),
            returns: self.iret_keeps_selectors
                || self.ring3_selectors.is_some()
                || self.hides_idt(),
            fxsave: self.fxsave_differs,
            hypercalls: self.kernel_emulated,
        }
    }

    /// What a user should know: each deviation that was found, and what is done about it. Empty on a KVM as it should be.
    pub fn describe(&self) -> Vec<(&'static str, &'static str)> {
        let hidden = "the IDT is hidden from KVM; such instructions and all exceptions are executed by the soft engine";
        let stepped = "pages that hold such instructions are executed by the soft engine";
        let all = [
            (
                self.kernel_emulated,
                "guest kernels are emulated by KVM, not run by the processor",
                "slow; what KVM cannot emulate is executed by the soft engine",
            ),
            (
                self.syscall_broken,
                "SYSCALL in ring 3 does not enter ring 0",
                hidden,
            ),
            (
                self.int_n_broken,
                "INT n in ring 3 is not delivered",
                hidden,
            ),
            (
                self.ring3_selectors.is_some(),
                "ring 3 reads the host's selectors from CS and SS",
                "ring 3 with other selectors is executed by the soft engine",
            ),
            (
                self.cpuid_forced,
                "CPUID shows host features that the CPU model hides",
                stepped,
            ),
            (
                self.tsd_ignored,
                "CR4.TSD does not keep ring 3 from RDTSC",
                stepped,
            ),
            (
                self.fpu_traps_ignored,
                "CR0.TS does not keep ring 3 from the FPU",
                "ring 3 without the FPU is executed by the soft engine",
            ),
            (
                self.fxsave_differs,
                "FXSAVE stores what differs between processors",
                stepped,
            ),
            (
                self.iret_keeps_selectors,
                "IRET to ring 3 leaves ring-0 data selectors loaded",
                stepped,
            ),
            (
                self.windows_unreliable,
                "interrupt windows are not reported where they open",
                "the soft engine executes up to the window",
            ),
            (
                self.legacy_paging_broken,
                "paging outside of long mode does not run",
                "such code is executed by the soft engine",
            ),
            (
                self.shadows_stale,
                "page tables written by the monitor stay unseen",
                "KVM's shadow page tables are dropped when needed",
            ),
            (
                self.ring3_breakpoints_broken,
                "hardware breakpoints do not stop ring 3",
                "ring 3 is executed by the soft engine while breakpoints are set",
            ),
        ];
        all.into_iter()
            .filter_map(|(found, what, measure)| found.then_some((what, measure)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kvm_as_it_should_be_needs_no_measure() {
        let quirks = Quirks::default();
        assert!(!quirks.hides_idt());
        assert!(!quirks.sensitive().any());
        assert!(quirks.describe().is_empty());
    }

    #[test]
    fn measuring_twice_finds_the_same() {
        let kvm = match crate::host::open() {
            Ok(kvm) => kvm,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let measure = || Probe::new(&kvm).and_then(Probe::measure).expect("probe");
        assert_eq!(measure(), measure());
    }
}
