//! A live machine under a debugger.
//!
//! Purpose: [`Debuggable`] over a [`Session`] whose environment is the host, on any engine that honours the monitor trap flag
//! and breakpoints.
//! Invariants: between calls no instruction is half done, and virtual time stands still. Nothing of the guest's is changed for a breakpoint; stepping
//! and stopping take the guest along the same way as running does. After an error only looking is allowed.
//! Elsewhere: the recorded past, which a live machine does not have (`replay`).

use crate::End;
use crate::board::Board;
use crate::debuggable::{DebugError, Debuggable, EventView, Resume, Stop};
use crate::engine::{Engine, EngineError, EngineKind, Entry, Until};
use crate::environment::{
    Bound, Boundary, Channel, Directive, Environment, EnvironmentError, SyncOrdinal,
};
use crate::exit_counts::ExitCounts;
use crate::host_environment::RunControl;
use crate::memory::GuestMemory;
use crate::session::{Progress, RunError, Session, Turn};
use std::collections::BTreeSet;
use std::time::Duration;
use x86::{
    Activity, CpuState, Exit, ExitControls, Gpr, GuestPhysAddr, GuestVirtAddr, Nanos, Position,
    VcpuId,
};

/// An environment whose output is kept as well.
struct Tee {
    inner: Box<dyn Environment>,
    console: Vec<u8>,
}

impl Environment for Tee {
    fn now(&mut self) -> Result<Nanos, EnvironmentError> {
        self.inner.now()
    }

    fn entropy(&mut self, out: &mut [u8]) -> Result<(), EnvironmentError> {
        self.inner.entropy(out)
    }

    fn output(&mut self, channel: Channel, bytes: &[u8]) -> Result<(), EnvironmentError> {
        self.console.extend_from_slice(bytes);
        self.inner.output(channel, bytes)
    }

    fn exited(
        &mut self,
        vcpu: VcpuId,
        exit: &Exit,
        ordinal: SyncOrdinal,
        position: Option<Position>,
    ) -> Result<(), EnvironmentError> {
        self.inner.exited(vcpu, exit, ordinal, position)
    }

    fn boundary(&mut self, at: Boundary<'_>) -> Result<Directive, EnvironmentError> {
        self.inner.boundary(at)
    }
}

impl From<RunError> for DebugError {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Engine(error) => Self::Engine(error),
            RunError::Environment(error) => Self::Environment(error),
        }
    }
}

/// What one step did.
enum Stepped {
    /// An instruction, or an iteration of one.
    Executed,
    /// An interrupt was delivered; nothing was executed.
    Delivered,
    /// It did not come to that.
    Not(Stop),
}

/// A running machine that can be stopped, looked at and changed.
pub struct LiveMachine {
    session: Session<Tee>,
    run: RunControl,
    kind: EngineKind,
    breakpoints: BTreeSet<GuestVirtAddr>,
    /// The controls the engine has.
    controls: ExitControls,
    /// An interrupt came before the instruction at this breakpoint, with this RSP: coming back there is no new hit.
    interrupted: Option<(GuestVirtAddr, u64)>,
    /// The instruction that ended the machine was finished.
    finished: bool,
    failed: bool,
}

impl LiveMachine {
    /// A machine about to make its first entry, stopped. `engine` holds the CPU's start state and maps `memory`; `run` belongs to
    /// `environment`.
    pub fn new(
        memory: GuestMemory,
        board: Board,
        engine: Box<dyn Engine>,
        environment: Box<dyn Environment>,
        run: RunControl,
    ) -> Self {
        let kind = engine.kind();
        let tee = Tee {
            inner: environment,
            console: Vec::new(),
        };
        let mut run = run;
        run.pause();
        Self {
            session: Session::new(memory, board, engine, Box::new(tee)),
            run,
            kind,
            breakpoints: BTreeSet::new(),
            controls: ExitControls::default(),
            interrupted: None,
            finished: false,
            failed: false,
        }
    }

    fn control(&mut self, monitor_trap_flag: bool) -> Result<(), DebugError> {
        let breakpoints = if monitor_trap_flag {
            BTreeSet::new()
        } else {
            self.breakpoints.clone()
        };
        let wanted = ExitControls {
            monitor_trap_flag,
            breakpoints,
            ..ExitControls::default()
        };
        if wanted != self.controls {
            self.session.engine().set_controls(&wanted)?;
            self.controls = wanted;
        }
        Ok(())
    }

    fn turn(&mut self, bound: &Bound) -> Result<Turn, DebugError> {
        let turn = self.session.turn(bound);
        self.failed |= turn.is_err();
        Ok(turn?)
    }

    /// Finishes the instruction the last exit interrupted.
    fn complete(&mut self) -> Result<Option<End>, DebugError> {
        while self.session.incomplete() {
            if let Turn::Ended(end) = self.turn(&Bound::Completed)? {
                return Ok(Some(end));
            }
        }
        Ok(None)
    }

    fn linear_rip(&mut self) -> Result<(GuestVirtAddr, u64), DebugError> {
        let state = self.session.engine().state(VcpuId::BOOT)?;
        Ok((state.rip_linear(), state.regs[Gpr::Rsp]))
    }

    /// One boundary.
    fn step(&mut self) -> Result<Stepped, DebugError> {
        self.control(true)?;
        loop {
            let before = self.session.engine_ref().position();
            match self.turn(&Bound::Exit)? {
                Turn::Ended(end) => return Ok(Stepped::Not(Stop::Ended(end))),
                Turn::Idle => {}
                Turn::Exit(Exit::InterruptWindow) => {
                    // The next entry delivers; it must not execute the handler's first instruction as well.
                    return Ok(match self.turn(&Bound::Completed)? {
                        Turn::Ended(end) => Stepped::Not(Stop::Ended(end)),
                        Turn::Exit(_) | Turn::Idle => Stepped::Delivered,
                    });
                }
                Turn::Exit(Exit::Kicked | Exit::BoundReached) => {
                    if before != self.session.engine_ref().position() {
                        return Ok(Stepped::Executed);
                    }
                }
                Turn::Exit(_) => {
                    return Ok(match self.complete()? {
                        Some(end) => Stepped::Not(Stop::Ended(end)),
                        None => Stepped::Executed,
                    });
                }
            }
            if self.run.expired() {
                return Ok(Stepped::Not(Stop::Slice));
            }
        }
    }

    /// Executes the instruction at a breakpoint without stopping there. `None`: go on.
    fn step_over(&mut self, at: (GuestVirtAddr, u64)) -> Result<Option<Stop>, DebugError> {
        self.interrupted = None;
        match self.step()? {
            Stepped::Not(stop) => return Ok(Some(stop)),
            Stepped::Executed => {}
            Stepped::Delivered => self.interrupted = Some(at),
        }
        self.breakpoint_here()
    }

    /// The breakpoint at the present instruction, arrived at just now.
    fn breakpoint_here(&mut self) -> Result<Option<Stop>, DebugError> {
        if self.breakpoints.is_empty() {
            return Ok(None);
        }
        let (here, _) = self.linear_rip()?;
        let hit = self.breakpoints.contains(&here);
        Ok(hit.then_some(Stop::Breakpoint(VcpuId::BOOT, here)))
    }

    fn go_on(&mut self) -> Result<Stop, DebugError> {
        if !self.breakpoints.is_empty() {
            let at = self.linear_rip()?;
            if self.breakpoints.contains(&at.0)
                && let Some(stop) = self.step_over(at)?
            {
                return Ok(stop);
            }
        }
        self.control(false)?;
        loop {
            match self.turn(&Bound::Exit)? {
                Turn::Ended(end) => return Ok(Stop::Ended(end)),
                Turn::Exit(Exit::Breakpoint(_)) => {
                    let at = self.linear_rip()?;
                    if self.interrupted != Some(at) {
                        return Ok(Stop::Breakpoint(VcpuId::BOOT, at.0));
                    }
                    if let Some(stop) = self.step_over(at)? {
                        return Ok(stop);
                    }
                    self.control(false)?;
                }
                Turn::Exit(_) | Turn::Idle => {}
            }
            if self.run.expired() {
                return self.slice_over();
            }
        }
    }

    fn slice_over(&mut self) -> Result<Stop, DebugError> {
        if let Some(end) = self.complete()? {
            return Ok(Stop::Ended(end));
        }
        // The next resume would pass over it unseen.
        Ok(self.breakpoint_here()?.unwrap_or(Stop::Slice))
    }

    fn go(&mut self, how: Resume) -> Result<Stop, DebugError> {
        match how {
            Resume::Continue => self.go_on(),
            Resume::Step(VcpuId::BOOT) => Ok(match self.step()? {
                Stepped::Not(stop) => stop,
                Stepped::Executed | Stepped::Delivered => Stop::Stepped,
            }),
            Resume::Step(vcpu) => Err(EngineError::NoSuchVcpu(vcpu).into()),
        }
    }

    /// Finishes the instruction that ended the machine, which the loop does not enter again. It is owed no answer: what ends a
    /// machine is a write, a triple fault, a halt, or a stop at a boundary.
    fn finish(&mut self) -> Result<(), DebugError> {
        if self.session.end().is_some() && self.session.incomplete() && !self.finished {
            self.finished = true;
            self.session
                .engine()
                .run(VcpuId::BOOT, Entry::default(), Until::Completed)?;
        }
        Ok(())
    }
}

impl Debuggable for LiveMachine {
    fn engine(&self) -> EngineKind {
        self.kind
    }

    fn describe(&self) -> String {
        format!("live on {}", self.kind.name())
    }

    fn vcpus(&self) -> Vec<VcpuId> {
        vec![VcpuId::BOOT]
    }

    fn cpu(&mut self, vcpu: VcpuId) -> Result<CpuState, DebugError> {
        self.finish()?;
        let mut state = self.session.engine().state(vcpu)?;
        if self.session.progress().halted() {
            // Not every engine keeps it.
            state.activity = Activity::Halted;
        }
        Ok(state)
    }

    fn set_cpu(&mut self, vcpu: VcpuId, state: &CpuState) -> Result<(), DebugError> {
        let before = self.cpu(vcpu)?;
        self.session.engine().set_state(vcpu, state)?;
        if self.session.end().is_none() {
            // Who moves a halted CPU elsewhere wants it to run there.
            let halted = state.activity == Activity::Halted && state.regs.rip == before.regs.rip;
            let ordinal = self.session.progress().ordinal;
            self.session.set_progress(Progress::at(ordinal, halted));
        }
        self.interrupted = None;
        Ok(())
    }

    fn memory(&self) -> &GuestMemory {
        self.session.memory()
    }

    fn write_memory(&mut self, addr: GuestPhysAddr, data: &[u8]) -> Result<(), DebugError> {
        self.session.memory().write(addr, data)?;
        self.session.engine().memory_written(addr, data.len());
        Ok(())
    }

    fn set_breakpoints(&mut self, at: &BTreeSet<GuestVirtAddr>) -> Result<(), DebugError> {
        let before = std::mem::replace(&mut self.breakpoints, at.clone());
        // At once, so that an engine that cannot says so to whoever asks.
        let set = self.control(false);
        if set.is_err() {
            self.breakpoints = before;
        }
        set
    }

    fn resume(&mut self, how: Resume, slice: Duration) -> Result<Stop, DebugError> {
        if let Some(end) = self.session.end() {
            return Ok(Stop::Ended(end));
        }
        if self.failed {
            let reason = "the machine failed earlier and cannot go on; look at it, or start anew";
            return Err(DebugError::Refused(reason.into()));
        }
        self.run.start(slice);
        let stop = self.go(how);
        self.run.pause();
        stop
    }

    fn position(&self) -> Option<Position> {
        self.session.engine_ref().position()
    }

    fn end(&self) -> Option<End> {
        self.session.end()
    }

    fn console(&self) -> &[u8] {
        &self.session.environment_ref().console
    }

    fn exits(&self) -> &ExitCounts {
        self.session.counts()
    }

    fn events(&self) -> &[EventView] {
        &[]
    }

    fn branched(&self) -> bool {
        false
    }
}

#[cfg(test)]
#[path = "live_tests.rs"]
mod tests;
