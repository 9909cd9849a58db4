//! The machine around the processor, and the contracts it stands on.
//!
//! Purpose: guest memory, the board with its devices, boot protocols, the loop that runs a machine; and the two traits
//! everything else plugs into: [`engine::Engine`] (who executes instructions) and [`environment::Environment`] (where
//! everything nondeterministic comes from).
//!
//! Invariants: a machine has no clock, thread, file descriptor or randomness of its own. Fed the same answers at the same
//! moments it goes the same way, on either engine.
//!
//! Elsewhere: the engines (`vmm/kvm`, `vmm/soft`), recording (`replay`), presentation (`introspect`).

pub mod board;
pub mod boot;
mod config;
pub mod debuggable;
mod end;
pub mod engine;
pub mod environment;
pub mod exit_counts;
pub mod host_environment;
pub mod live;
pub mod memory;
pub mod session;
#[cfg(test)]
mod tiny_engine;

pub use board::{Board, BoardConfig, BoardState};
pub use config::{BuildError, MachineConfig};
pub use end::End;
pub use memory::{GuestMemory, PageSet};
