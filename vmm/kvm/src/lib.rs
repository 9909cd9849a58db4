//! The hardware-assisted engine, on KVM.
//!
//! Purpose: [`KvmEngine`] is [`machine::engine::Engine`] on `/dev/kvm`: the host's processor runs the guest, this crate
//! turns KVM's exits into [`x86::Exit`]s and carries the answers back. What KVM cannot execute, or does not execute as the
//! SDM says, is executed by [`soft::Stepper`] on the same state ("hybrid execution").
//!
//! Invariants: no in-kernel interrupt controller or timer, so that every interrupt is delivered by us at a known
//! boundary; the guest's memory and registers are never changed for a measure of ours. Whether the host's KVM needs a measure is
//! measured once per process ([`quirks`]), never assumed; on a KVM without quirks all of them stay off and cost nothing.
//!
//! Elsewhere: the loop around the engine, devices, the contract (`machine`); executing single instructions (`soft`).
//!
//! Source: Linux `Documentation/virt/kvm/api.rst`; Intel SDM vol. 3C (what the exits are named after).

mod cpuid;
mod engine;
mod exit;
pub mod host;
mod hybrid;
mod kick;
mod msr;
mod probe;
pub mod quirks;
mod sensitive;
mod shadow;
mod slots;
mod state;
mod transfer;
mod vcpu;
mod vm;

pub use engine::{Cpl0Policy, KvmEngine, Work};
pub use host::{OpenError, Report, report};
pub use quirks::Quirks;
