//! Trace file, recorder, replayer and timeline.
//!
//! Purpose: write down everything nondeterministic that reaches a machine ([`recorder`]), in one self-contained file ([`trace`]), and give it
//! back so that the machine goes the same way ([`replayer`]); over that, a machine that can be moved along its recorded past
//! ([`timeline`]).
//! Invariants: inputs are logged, outputs are not; devices and interrupts follow from the inputs and are executed again. Every replay is verified:
//! what differs is a [`divergence`], never passed over.
//! Elsewhere: engines, devices and the loop (`vmm`); debuggers (`gdb-bridge`, `tui`).

pub mod digest;
pub mod divergence;
mod finish;
pub mod recorder;
pub mod replayer;
pub mod timeline;
pub mod trace;
