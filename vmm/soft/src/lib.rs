//! The software engine and single-instruction execution: the host CPU is the semantics.
//!
//! Purpose: [`Stepper`] executes exactly one guest instruction (or delivers one event) on a [`x86::CpuState`];
//! [`SoftEngine`] is the engine contract on top of it. `vmm/kvm` borrows [`Stepper`] for what KVM cannot execute.
//! Elsewhere: translation of whole blocks (later, on the same operand code).

mod pending;
mod stepper;

pub use pending::Pending;
pub use stepper::{Delivery, Step, Stepper};
