//! The engine contract: how a guest's instructions get executed.
//!
//! Purpose: one trait behind which `vmm/kvm` and `vmm/soft` stand; nothing above it knows which one runs.
//! Invariants:
//! - The loop is outside the engine ([`crate::session`]): [`Engine::run`] returns at every exit, so each crossing passes one
//!   place that can log it. Exits and entries are owned values.
//! - An engine reads no clock, no entropy and no input. Given the same state, memory and entries, two engines take the same
//!   exits for which [`Exit::is_sync_point`] holds, in the same order, with equal state there.
//! - [`Engine::state`] is exact: an instruction boundary with nothing half done. While an exit awaits completion (an IN's
//!   value has not been handed back) it is an error to ask; run with [`Until::Completed`] first.
//! - A guest fault is the guest's business and no error; a triple fault is an exit; a stop asked for is an exit;
//!   [`EngineError`] is the host's failure or a limit of the engine, and the machine must not be continued after it.
//!
//! Elsewhere: exits and controls as data (`vmm/x86`); devices ([`crate::board`]).
//! Source: Intel SDM vol. 3C, chapters 26 and 27 (VM entries and exits); KVM API, KVM_RUN.

use crate::memory::PageSet;
use std::sync::Arc;
use x86::controls::Control;
use x86::exit::Injection;
use x86::{CpuState, Exit, ExitControls, GuestPhysAddr, Position, Registers, VcpuId};

/// Which engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// KVM.
    Kvm,
    /// Software.
    Soft,
}

impl EngineKind {
    /// The name users type.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Soft => "soft",
        }
    }
}

/// The fulfilment of the last exit ([`Exit::wants`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Answer {
    /// The exit wanted nothing.
    #[default]
    None,
    /// What an IN or an MMIO read returns; only the low bytes asked for count.
    Data(u64),
    /// What RDMSR returns.
    MsrValue(u64),
    /// The WRMSR is accepted.
    MsrAccepted,
    /// There is no such MSR, or not this value: #GP(0).
    MsrRefused,
}

/// What goes into the guest with an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Entry {
    /// The answer to the last exit.
    pub answer: Answer,
    /// A vector to deliver before the first instruction. Only after [`Exit::InterruptWindow`], or for an NMI.
    pub inject: Option<Injection>,
    /// Exit with [`Exit::InterruptWindow`] at the first boundary at which an external interrupt would be taken: IF set, no
    /// STI or MOV SS shadow. That may be at once, right after the pending instruction completes; a halted CPU
    /// with IF set counts.
    pub interrupt_window: bool,
}

/// A bound to a run, besides the exits.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Until<'a> {
    /// None.
    Exit,
    /// Finish the instruction the last exit interrupted (with the entry's answer), execute nothing more, and exit
    /// with [`Exit::BoundReached`]. Another exit comes back instead when the instruction has more to ask.
    Completed,
    /// Exit with [`Exit::BoundReached`] at this position, or at once if it is not ahead. Needs an engine that counts.
    Position(Position),
    /// Exit with [`Exit::BoundReached`] at the next boundary at which the general registers, RIP and RFLAGS (but for RF, which
    /// hosts leave set inside a REP) equal these, or at the first that is not before `limit`, whichever comes first; at least
    /// one boundary is passed before. Boundaries between REP iterations count. Needs an engine that counts.
    Registers {
        /// What to look for.
        registers: &'a Registers,
        /// Where to give up; [`Position::NEVER`] for nowhere.
        limit: Position,
    },
}

/// Wakes a virtual CPU out of [`Engine::run`], from any thread.
pub trait Kick: Send + Sync {
    /// Makes the current run, or the next one, end with [`Exit::Kicked`] at an instruction boundary. Never lost,
    /// may be spurious. Async-signal-safe.
    fn kick(&self);
}

/// Why an engine cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The engine lacks a control.
    #[error("the {engine} engine cannot honour {control} on this host: {reason}")]
    Unsupported {
        /// Which engine.
        engine: &'static str,
        /// What was asked.
        control: Control,
        /// Why not, and what to do.
        reason: &'static str,
    },
    /// A bound that needs an engine that counts instructions.
    #[error("the {0} engine does not count instructions; run this on the soft engine")]
    CannotCount(&'static str),
    /// The host failed.
    #[error("{operation} failed: {source}")]
    Host {
        /// What was tried, with the host's name for it (`KVM_RUN`).
        operation: &'static str,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// The guest did something this engine cannot execute.
    #[error("cannot execute the instruction at {rip:#x} ({bytes:02x?}): {reason}")]
    Unimplemented {
        /// RIP.
        rip: u64,
        /// The instruction's first bytes, as far as they could be read.
        bytes: Vec<u8>,
        /// What is missing.
        reason: String,
    },
    /// A call that the contract forbids at this moment.
    #[error("engine used out of order: {0}")]
    OutOfOrder(&'static str),
    /// No such CPU.
    #[error("no virtual CPU {}", .0.0)]
    NoSuchVcpu(VcpuId),
}

/// Executes guest instructions. See the module's invariants.
pub trait Engine {
    /// Which engine this is.
    fn kind(&self) -> EngineKind;

    /// Puts `controls` in force from the next run on; refuses them whole if one cannot be honoured.
    fn set_controls(&mut self, controls: &ExitControls) -> Result<(), EngineError>;

    /// Enters the guest with `entry` and runs it until something exits or `until` is reached.
    fn run(&mut self, vcpu: VcpuId, entry: Entry, until: Until<'_>) -> Result<Exit, EngineError>;

    /// The CPU's state at the present boundary.
    fn state(&mut self, vcpu: VcpuId) -> Result<CpuState, EngineError>;

    /// Replaces the CPU's state.
    fn set_state(&mut self, vcpu: VcpuId, state: &CpuState) -> Result<(), EngineError>;

    /// RFLAGS.IF of the CPU, also while an exit awaits completion.
    fn interrupts_enabled(&mut self, vcpu: VcpuId) -> Result<bool, EngineError>;

    /// A handle that wakes the CPU.
    fn kicker(&self, vcpu: VcpuId) -> Result<Arc<dyn Kick>, EngineError>;

    /// The pages written since the last call by guest code and by the monitor (through
    /// [`crate::memory::GuestMemory`]). May name pages that were not written, never misses one that was.
    fn take_dirty(&mut self) -> Result<PageSet, EngineError>;

    /// Tells the engine that the monitor wrote guest memory (a device, a debugger), which may be code it has cached.
    fn memory_written(&mut self, addr: GuestPhysAddr, len: usize);

    /// Where the timeline stands, for an engine that counts.
    fn position(&self) -> Option<Position>;

    /// Sets the count, after [`Engine::set_state`] put a saved machine back. No effect on an engine that does not count.
    fn set_position(&mut self, position: Position);
}
