//! What a debugger sees: a live machine or a timeline, alike.
//!
//! Purpose: the one trait that `gdb-bridge` and `tui` know; neither ever touches an engine.
//! Invariants: between calls the machine is stopped at an instruction boundary. Reads have no side effects. Stopping
//! points are invisible to the guest: no byte of its memory or registers changes for a breakpoint.
//! Elsewhere: the live implementation ([`crate::live`]), the timeline's (`replay`).

use crate::End;
use crate::engine::{EngineError, EngineKind};
use crate::environment::{Arrival, EnvironmentError, SyncOrdinal};
use crate::exit_counts::ExitCounts;
use crate::memory::{GuestMemory, NoMemoryError};
use std::collections::BTreeSet;
use std::time::Duration;
use x86::{CpuState, GuestPhysAddr, GuestVirtAddr, Position, VcpuId};

/// How to go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resume {
    /// One boundary of this CPU: an instruction, a REP iteration, or the delivery of an interrupt.
    Step(VcpuId),
    /// Until something stops it.
    Continue,
}

/// Why it stopped.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stop {
    /// A step was made.
    Stepped,
    /// The instruction at a breakpoint is about to execute.
    Breakpoint(VcpuId, GuestVirtAddr),
    /// The time slice is over; nothing happened. Resume again.
    Slice,
    /// The guest ended.
    Ended(End),
    /// A timeline's recorded history ends here (an incomplete trace).
    EndOfHistory,
    /// Going back, a timeline's start was reached.
    StartOfHistory,
    /// A timeline left its recording; the text says where and how.
    Diverged(String),
}

/// Why a debugger's wish failed.
#[derive(Debug, thiserror::Error)]
pub enum DebugError {
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Input or output failed.
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    /// No memory there.
    #[error(transparent)]
    Memory(#[from] NoMemoryError),
    /// This machine cannot do that; the text says why.
    #[error("{0}")]
    Refused(String),
}

/// One asynchronous event of a timeline.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EventView {
    /// Which in order, from 0.
    pub index: u64,
    /// The sync point it follows.
    pub after: SyncOrdinal,
    /// Where, once the timeline has passed it.
    pub position: Option<Position>,
    /// What arrived.
    pub arrival: Arrival,
    /// At a landmark (true) or at the sync point itself.
    pub landmark: bool,
}

/// A stopped machine that can be looked at, changed and resumed.
pub trait Debuggable {
    /// The engine that executes it.
    fn engine(&self) -> EngineKind;

    /// What it is, in a few words, for titles ("live on kvm", "crash.cvt").
    fn describe(&self) -> String;

    /// Its CPUs.
    fn vcpus(&self) -> Vec<VcpuId>;

    /// A CPU's state.
    fn cpu(&mut self, vcpu: VcpuId) -> Result<CpuState, DebugError>;

    /// Changes a CPU's state. On a timeline this leaves the recorded future (a branch), see [`Self::branched`].
    fn set_cpu(&mut self, vcpu: VcpuId, state: &CpuState) -> Result<(), DebugError>;

    /// Its memory, to read.
    fn memory(&self) -> &GuestMemory;

    /// Changes memory. On a timeline this leaves the recorded future, as [`Self::set_cpu`] does.
    fn write_memory(&mut self, addr: GuestPhysAddr, data: &[u8]) -> Result<(), DebugError>;

    /// Replaces the set of breakpoints.
    fn set_breakpoints(&mut self, at: &BTreeSet<GuestVirtAddr>) -> Result<(), DebugError>;

    /// Resumes. Returns [`Stop::Slice`] after about `slice`, so that the caller can look after its connection or
    /// screen. A breakpoint at the present instruction does not stop it again; so a slice never ends on one that has not been
    /// reported, but with [`Stop::Breakpoint`].
    fn resume(&mut self, how: Resume, slice: Duration) -> Result<Stop, DebugError>;

    /// Where the timeline stands, if it is known (an engine that counts).
    fn position(&self) -> Option<Position>;

    /// How it ended, once it has.
    fn end(&self) -> Option<End>;

    /// All console output so far.
    fn console(&self) -> &[u8];

    /// Exits so far.
    fn exits(&self) -> &ExitCounts;

    /// Recorded asynchronous events, past and future; empty for a live machine.
    fn events(&self) -> &[EventView];

    /// Whether the debugger's changes have left the recorded future.
    fn branched(&self) -> bool;

    /// Going back, for a machine that keeps its past; `None` for one that cannot. The answer never changes.
    fn reverse(&mut self) -> Option<&mut dyn Reverse> {
        None
    }
}

/// Going back in time ([`Debuggable::reverse`]).
///
/// Both return [`Stop::Slice`] after about `slice` when they are not there yet; the same call again goes on, any other
/// call finds the machine at a boundary no later than the one the search began at.
pub trait Reverse {
    /// One boundary of this CPU back, the inverse of [`Resume::Step`]: [`Stop::Stepped`], or [`Stop::StartOfHistory`].
    fn step_back(&mut self, vcpu: VcpuId, slice: Duration) -> Result<Stop, DebugError>;

    /// Back to the nearest earlier boundary at which the instruction at a breakpoint is about to execute:
    /// [`Stop::Breakpoint`], or [`Stop::StartOfHistory`].
    fn continue_back(&mut self, slice: Duration) -> Result<Stop, DebugError>;

    /// To `position`, back or forward, whatever breakpoints lie between: [`Stop::Stepped`] once there; anything but that and
    /// [`Stop::Slice`] stopped it before.
    fn seek(&mut self, position: Position, slice: Duration) -> Result<Stop, DebugError> {
        let _ = (position, slice);
        Err(DebugError::Refused(
            "this machine cannot go to a position".to_owned(),
        ))
    }
}
