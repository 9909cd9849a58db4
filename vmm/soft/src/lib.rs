//! The software engine and single-instruction execution: the host CPU is the semantics.
//!
//! Purpose: [`Stepper`] executes exactly one guest instruction (or delivers one event) on a [`x86::CpuState`];
//! [`SoftEngine`] is the engine contract on top of it. `vmm/kvm` borrows [`Stepper`] for what KVM cannot execute.
//!
//! How an instruction executes:
//! - *Plain* instructions (integer arithmetic, moves, SSE, MMX, x87) run natively, each in a stub generated once
//!   (`stub.rs`), with their memory operand in a scratch slot that `plain.rs` fills and writes back.
//! - Everything that touches control flow, the stack, segments, privilege, ports or the system has code of its own
//!   (`dispatch.rs` names the places).
//!
//! Invariants: deterministic: nothing depends on the host but its arithmetic. No instruction changes state before all of its
//! accesses have been checked. Where it deviates from hardware, the module in question says so under "Deviation" or "Not
//! implemented".
//! Elsewhere: translation of whole blocks (later, on the same operand code).

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the software engine runs guest instructions on the host CPU, which must be x86-64");

mod code;
mod control;
mod decode;
mod delivery;
mod descriptor;
#[cfg(test)]
mod differential;
mod dispatch;
mod engine;
mod far;
mod fpu_state;
mod guest;
mod io;
mod iret;
mod legacy;
mod memory;
mod mode;
mod msr;
mod op;
mod pending;
mod plain;
mod query;
mod raise;
mod ram;
mod segmentation;
mod segments;
mod stack;
mod stepper;
mod stop;
mod stores;
mod strings;
mod stub;
mod syscall;
mod system;
mod tlb;

pub use engine::SoftEngine;
pub use pending::Pending;
pub use raise::Delivery;
pub use stepper::{Step, Stepper};
