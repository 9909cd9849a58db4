//! Making a KVM virtual machine.
//!
//! Purpose: one place that creates a virtual machine with one vCPU as this crate wants it: no interrupt controller in the kernel,
//! the MSR filter in force, the CPU model set.
//! Elsewhere: its memory ([`crate::slots`]).
//! Source: KVM API, sections 4.2 (`KVM_CREATE_VM`), 4.7 (`KVM_CREATE_VCPU`), 4.20 (`KVM_SET_CPUID2`).

use crate::vcpu::{Vcpu, failed, host_error};
use crate::{cpuid, msr};
use kvm_ioctls::{Kvm, VmFd};
use machine::engine::EngineError;
use x86::CpuModel;

/// A virtual machine without memory, and its one vCPU in KVM's reset state. With `hide_lstar`, SYSCALL leads to an address where nothing is.
pub(crate) fn create(
    kvm: &Kvm,
    model: CpuModel,
    hide_lstar: bool,
) -> Result<(VmFd, Vcpu), EngineError> {
    let vm = kvm
        .create_vm()
        .map_err(|e| host_error("KVM_CREATE_VM", e))?;
    msr::install_filter(&vm, hide_lstar)?;
    let fd = vm
        .create_vcpu(0)
        .map_err(|e| host_error("KVM_CREATE_VCPU", e))?;
    let entries =
        cpuid::entries(model).ok_or_else(|| failed("KVM_SET_CPUID2", "too many leaves"))?;
    fd.set_cpuid2(&entries)
        .map_err(|e| host_error("KVM_SET_CPUID2", e))?;
    Ok((vm, Vcpu::new(fd, hide_lstar)?))
}
