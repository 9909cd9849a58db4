//! Executing one instruction.

use crate::Pending;
use machine::engine::EngineError;
use machine::{GuestMemory, PageSet};
use x86::exit::Injection;
use x86::{CpuModel, CpuState, Exception, Exit, ExitControls, GuestPhysAddr, Vector};

/// What one call of [`Stepper::step`] came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// One instruction retired.
    Retired,
    /// One iteration of a REP instruction was made; RIP still stands at it.
    Within,
    /// An exception was delivered; nothing retired.
    Delivered(Vector),
    /// The instruction needs something first, or is intercepted; no state has changed. If [`Pending::incomplete`], give
    /// the answer to [`Pending::answer`] and step again; otherwise stepping again executes it.
    Exit(Exit),
    /// One instruction retired and exits: HLT, VMCALL, PAUSE.
    RetiredExit(Exit),
}

/// What delivering an event came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Delivery {
    /// The CPU stands at the handler of this vector (the event's, or that of an exception met on the way).
    Delivered(Vector),
    /// No handler could be reached: the CPU is in shutdown.
    TripleFault,
}

/// Executes guest instructions one at a time on a CPU state its caller holds.
///
/// Caches decoded instructions, native stubs and address translations. They follow every write made through this type, and
/// follow others by [`Self::memory_written`] or [`Self::native_code_ran`].
#[derive(Debug)]
pub struct Stepper {
    memory: GuestMemory,
}

impl Stepper {
    /// A stepper over `memory`, showing the guest `model`.
    pub fn new(memory: GuestMemory, _model: CpuModel) -> Result<Self, EngineError> {
        Ok(Self { memory })
    }

    /// Which instructions and exceptions exit. Breakpoints and the monitor trap flag are the caller's business.
    pub fn set_controls(&mut self, _controls: &ExitControls) {}

    /// Executes one instruction, or one iteration of a REP instruction, or delivers `cpu.pending`.
    /// `pending` belongs to `cpu` and must be kept from call to call.
    pub fn step(
        &mut self,
        cpu: &mut CpuState,
        _pending: &mut Pending,
    ) -> Result<Step, EngineError> {
        Err(EngineError::Unimplemented {
            rip: cpu.regs.rip,
            bytes: Vec::new(),
            reason: "single-instruction execution".into(),
        })
    }

    /// Delivers an exception at the present boundary, as a fault of the instruction at RIP (RF set in the pushed image).
    pub fn deliver(
        &mut self,
        _cpu: &mut CpuState,
        exception: Exception,
    ) -> Result<Delivery, EngineError> {
        Ok(Delivery::Delivered(exception.vector))
    }

    /// Delivers an external interrupt or an NMI; wakes a halted CPU. The caller has checked [`CpuState::interruptible`].
    pub fn inject(
        &mut self,
        _cpu: &mut CpuState,
        _injection: Injection,
    ) -> Result<Delivery, EngineError> {
        Ok(Delivery::TripleFault)
    }

    /// Forgets all address translations. Needed when page tables were written behind this type's back; changes
    /// of CR0, CR3, CR4 and EFER between steps are noticed without it.
    pub fn flush_translations(&mut self) {}

    /// The monitor wrote guest memory.
    pub fn memory_written(&mut self, _addr: GuestPhysAddr, _len: usize) {}

    /// Guest code ran natively since the last step and may have written any page: flushes translations, and has cached code
    /// checked against memory before it is used again.
    pub fn native_code_ran(&mut self) {}

    /// Pages written by guest code through this type since the last call, and by the monitor through [`GuestMemory`].
    pub fn take_dirty(&mut self) -> PageSet {
        self.memory.take_dirty()
    }
}
