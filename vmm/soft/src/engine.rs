//! The engine contract on [`Stepper`].
//!
//! Purpose: run until something exits or a bound is reached, counting positions.
//! Invariants:
//! - At a boundary things are looked at in this order: the bound, a kick, the interrupt window, a breakpoint, the instruction.
//! - What is pending from the last exit is finished before any of them.
//! - A halted CPU executes nothing: a run returns [`Exit::InterruptWindow`] if the entry asks for it and IF is set, otherwise
//!   [`Exit::BoundReached`] if there is a bound and [`Exit::Kicked`] if there is none; never [`Exit::Hlt`] again, which would count
//!   as a new sync point.
//! - A breakpoint stops before the first iteration of a REP instruction only: like the processor's own, it looks at RF.
//! - A breakpoint or an interception that was the last exit, with the state unchanged since, is passed.
//!
//! Elsewhere: what a step is ([`crate::stepper`]).

use crate::{Delivery, Pending, Step, Stepper};
use machine::engine::{Engine, EngineError, EngineKind, Entry, Kick, Until};
use machine::{GuestMemory, PageSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use x86::regs::rflags;
use x86::{
    Activity, CpuModel, CpuState, Exit, ExitControls, GuestPhysAddr, Position, Registers, VcpuId,
};

/// Iterations of REP between two looks at a kick.
const ITERATIONS: u64 = 4096;

/// Wakes the CPU out of a run.
#[derive(Debug, Default)]
struct Flag(AtomicBool);

impl Kick for Flag {
    fn kick(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// The software engine: one virtual CPU, every instruction counted.
#[derive(Debug)]
pub struct SoftEngine {
    stepper: Stepper,
    cpu: CpuState,
    pending: Pending,
    position: Position,
    controls: ExitControls,
    kick: Arc<Flag>,
    /// The last exit was a breakpoint at this boundary.
    past_breakpoint: bool,
}

impl SoftEngine {
    /// An engine over `memory` whose CPU is in its reset state.
    pub fn new(memory: GuestMemory, model: CpuModel) -> Result<Self, EngineError> {
        Ok(Self {
            stepper: Stepper::new(memory, model)?,
            cpu: CpuState::default(),
            pending: Pending::new(),
            position: Position::START,
            controls: ExitControls::default(),
            kick: Arc::default(),
            past_breakpoint: false,
        })
    }

    fn check(&self, vcpu: VcpuId) -> Result<(), EngineError> {
        if vcpu == VcpuId::BOOT {
            Ok(())
        } else {
            Err(EngineError::NoSuchVcpu(vcpu))
        }
    }

    /// Takes a step and counts it; `Some` when it exits.
    #[inline]
    fn step(&mut self) -> Result<Option<Exit>, EngineError> {
        let step = self.stepper.advance(&mut self.cpu, &mut self.pending)?;
        Ok(match step {
            Step::Retired => {
                self.retired();
                None
            }
            Step::Within => {
                self.position.within += self.stepper.iterations();
                None
            }
            Step::Delivered(_) => {
                self.position.within += 1;
                None
            }
            Step::Exit(exit) => Some(exit),
            Step::RetiredExit(exit) => {
                self.retired();
                Some(exit)
            }
        })
    }

    #[inline]
    fn retired(&mut self) {
        self.position = Position {
            retired: self.position.retired.saturating_add(1),
            within: 0,
        };
    }

    /// Delivers what the entry injects.
    fn inject(&mut self, entry: &Entry) -> Result<Option<Exit>, EngineError> {
        let Some(injection) = entry.inject else {
            return Ok(None);
        };
        let delivery = self.stepper.inject(&mut self.cpu, injection)?;
        self.position.within += 1;
        self.past_breakpoint = false;
        Ok(match delivery {
            Delivery::Delivered(_) => None,
            Delivery::TripleFault => Some(Exit::TripleFault),
        })
    }

    /// The loop. `passed`: a boundary has been passed in this run already.
    fn run_on(
        &mut self,
        window: bool,
        until: Until<'_>,
        mut passed: bool,
    ) -> Result<Exit, EngineError> {
        let breakpoints = !self.controls.breakpoints.is_empty();
        let trap = self.controls.monitor_trap_flag;
        loop {
            self.stepper
                .allow_iterations(self.iterations_allowed(window, until));
            if self.reached(until, passed) {
                return Ok(Exit::BoundReached);
            }
            if self.kick.0.load(Ordering::Relaxed) && self.kick.0.swap(false, Ordering::Acquire) {
                return Ok(Exit::Kicked);
            }
            if window && self.cpu.interruptible() {
                return Ok(Exit::InterruptWindow);
            }
            if self.cpu.activity != Activity::Active && self.cpu.pending.is_none() {
                return Ok(self.idle(until));
            }
            if breakpoints && self.at_breakpoint() {
                self.past_breakpoint = true;
                return Ok(Exit::Breakpoint(self.cpu.rip_linear()));
            }
            if let Some(exit) = self.step()? {
                // Nothing but a retired instruction moves the CPU off a breakpoint.
                self.past_breakpoint &= self.stepper.is_past_intercept();
                return Ok(exit);
            }
            self.past_breakpoint = false;
            passed = true;
            if trap {
                return Ok(Exit::MonitorTrapFlag);
            }
        }
    }

    /// How many iterations of REP may pass before something has to be looked at again.
    #[inline]
    fn iterations_allowed(&self, window: bool, until: Until<'_>) -> u64 {
        let watched =
            self.controls.monitor_trap_flag || window && self.cpu.regs.rflags & rflags::IF != 0;
        match until {
            _ if watched => 1,
            Until::Exit => ITERATIONS,
            Until::Position(position) if position.retired > self.position.retired => ITERATIONS,
            Until::Position(position) => position
                .within
                .saturating_sub(self.position.within)
                .min(ITERATIONS),
            _ => 1,
        }
    }

    #[inline]
    fn reached(&self, until: Until<'_>, passed: bool) -> bool {
        match until {
            Until::Exit => false,
            Until::Completed => true,
            Until::Position(position) => self.position >= position,
            Until::Registers { registers, limit } => {
                passed && (self.position >= limit || same_registers(&self.cpu.regs, registers))
            }
        }
    }

    /// The exit of a run in which a CPU that executes nothing waits for more than the entry offers.
    fn idle(&self, until: Until<'_>) -> Exit {
        match (self.cpu.activity, until) {
            (Activity::Shutdown, _) => Exit::TripleFault,
            (_, Until::Exit) => Exit::Kicked,
            _ => Exit::BoundReached,
        }
    }

    fn at_breakpoint(&self) -> bool {
        !self.past_breakpoint
            && self.cpu.pending.is_none()
            && self.cpu.regs.rflags & rflags::RF == 0
            && self.controls.breakpoints.contains(&self.cpu.rip_linear())
    }
}

/// Equal but for RF, which hosts leave set inside a REP.
#[inline]
fn same_registers(a: &Registers, b: &Registers) -> bool {
    a.rip == b.rip && (a.rflags ^ b.rflags) & !rflags::RF == 0 && a.gpr == b.gpr
}

impl Engine for SoftEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Soft
    }

    fn set_controls(&mut self, controls: &ExitControls) -> Result<(), EngineError> {
        self.stepper.set_controls(controls);
        self.controls = controls.clone();
        Ok(())
    }

    fn run(&mut self, vcpu: VcpuId, entry: Entry, until: Until<'_>) -> Result<Exit, EngineError> {
        self.check(vcpu)?;
        self.stepper.enter(&self.cpu);
        self.stepper.set_retired(self.position.retired.get());
        self.stepper.allow_iterations(1);
        let mut passed = false;
        if self.pending.incomplete() {
            self.pending.answer(entry.answer);
            if let Some(exit) = self.step()? {
                return Ok(exit);
            }
            self.past_breakpoint = false;
            passed = true;
            if self.controls.monitor_trap_flag && until != Until::Completed {
                return Ok(Exit::MonitorTrapFlag);
            }
        }
        if let Some(exit) = self.inject(&entry)? {
            return Ok(exit);
        }
        passed |= entry.inject.is_some();
        self.run_on(entry.interrupt_window, until, passed)
    }

    fn state(&mut self, vcpu: VcpuId) -> Result<CpuState, EngineError> {
        self.check(vcpu)?;
        if self.pending.incomplete() {
            return Err(EngineError::OutOfOrder(
                "state asked for while an exit awaits its answer",
            ));
        }
        Ok(self.cpu.clone())
    }

    fn set_state(&mut self, vcpu: VcpuId, state: &CpuState) -> Result<(), EngineError> {
        self.check(vcpu)?;
        self.cpu = state.clone();
        self.pending.clear();
        self.past_breakpoint = false;
        self.stepper.forget_intercept();
        Ok(())
    }

    fn interrupts_enabled(&mut self, vcpu: VcpuId) -> Result<bool, EngineError> {
        self.check(vcpu)?;
        Ok(self.cpu.regs.rflags & rflags::IF != 0)
    }

    fn kicker(&self, vcpu: VcpuId) -> Result<Arc<dyn Kick>, EngineError> {
        self.check(vcpu)?;
        Ok(self.kick.clone())
    }

    fn take_dirty(&mut self) -> Result<PageSet, EngineError> {
        Ok(self.stepper.take_dirty())
    }

    fn memory_written(&mut self, addr: GuestPhysAddr, len: usize) {
        self.stepper.memory_written(addr, len);
    }

    fn position(&self) -> Option<Position> {
        Some(self.position)
    }

    fn set_position(&mut self, position: Position) {
        self.position = position;
    }
}
