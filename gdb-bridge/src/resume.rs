//! Running the machine for gdb, a slice at a time.
//!
//! Purpose: what gdb asked for (continue, step, step within a range, either one back in time) as calls of [`Debuggable::resume`] and
//! [`Reverse`], until something happens that gdb is to know.
//! Invariants: [`Bridge::advance`] returns within about a slice. A machine that failed is never resumed again. Signals that gdb
//! passes along with a resume are dropped: a machine has none.
//! Elsewhere: who calls it between looks at the connection (`server.rs`); what a stop looks like to gdb (`stops.rs`).
//! Source: "Debugging with gdb", E.2 (`vCont`, `bc`, `bs`).
//!
//! [`Debuggable::resume`]: machine::debuggable::Debuggable::resume
//! [`Reverse`]: machine::debuggable::Reverse

use crate::bridge::Bridge;
use crate::stops::StopReason;
use gdbstub::common::{Signal, Tid};
use gdbstub::target::ext::base::multithread::{
    MultiThreadRangeStepping, MultiThreadRangeSteppingOps, MultiThreadResume,
    MultiThreadSchedulerLocking, MultiThreadSchedulerLockingOps, MultiThreadSingleStep,
    MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::reverse_exec::{
    ReverseCont, ReverseContOps, ReverseStep, ReverseStepOps,
};
use machine::debuggable::{DebugError, Resume, Stop};
use std::convert::Infallible;
use std::ops::Range;
use std::time::{Duration, Instant};
use x86::VcpuId;

/// What gdb asked for last.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Action {
    Continue,
    Step(VcpuId),
    /// Step at least once, and on while the next instruction lies in the range (of linear addresses).
    StepWithin(VcpuId, Range<u64>),
    ContinueBack,
    StepBack(VcpuId),
    /// It cannot be done; why.
    Impossible(&'static str),
}

impl Action {
    /// The CPU that gdb wants to hear of when the stop itself names none.
    pub(crate) fn vcpu(&self) -> Option<VcpuId> {
        match *self {
            Self::Step(vcpu) | Self::StepWithin(vcpu, _) | Self::StepBack(vcpu) => Some(vcpu),
            Self::Continue | Self::ContinueBack | Self::Impossible(_) => None,
        }
    }
}

impl Bridge<'_> {
    /// Does what gdb asked for, for about `slice`; why it stopped, if it did.
    pub(crate) fn advance(&mut self, slice: Duration) -> Option<StopReason> {
        if let Some(reason) = self.cannot_run() {
            return Some(reason);
        }
        match self.run(slice) {
            Ok(Stop::Slice) => None,
            Ok(stop) => Some(self.stopped(stop)),
            Err(error) => {
                self.failed = Some(error.to_string());
                self.cannot_run()
            }
        }
    }

    fn run(&mut self, slice: Duration) -> Result<Stop, DebugError> {
        self.install_breakpoints()?;
        match self.action.clone() {
            Action::Continue => self.machine.resume(Resume::Continue, slice),
            Action::Step(vcpu) => self.machine.resume(Resume::Step(vcpu), slice),
            Action::StepWithin(vcpu, range) => self.step_within(vcpu, range, slice),
            Action::StepBack(vcpu) => match self.machine.reverse() {
                Some(reverse) => reverse.step_back(vcpu, slice),
                None => Err(cannot_go_back()),
            },
            Action::ContinueBack => match self.machine.reverse() {
                Some(reverse) => reverse.continue_back(slice),
                None => Err(cannot_go_back()),
            },
            Action::Impossible(why) => {
                self.notes.push(why.to_owned());
                Ok(Stop::Stepped)
            }
        }
    }

    fn step_within(
        &mut self,
        vcpu: VcpuId,
        range: Range<u64>,
        slice: Duration,
    ) -> Result<Stop, DebugError> {
        let start = Instant::now();
        loop {
            let left = slice.saturating_sub(start.elapsed());
            let stop = self.machine.resume(Resume::Step(vcpu), left)?;
            if stop != Stop::Stepped {
                return Ok(stop);
            }
            let rip = self.machine.cpu(vcpu)?.rip_linear();
            if self.installed.contains(&rip) {
                return Ok(Stop::Breakpoint(vcpu, rip));
            }
            if !range.contains(&rip.get()) {
                return Ok(Stop::Stepped);
            }
            if start.elapsed() >= slice {
                return Ok(Stop::Slice);
            }
        }
    }

    fn step_action(&self, tid: Tid, action: impl FnOnce(VcpuId) -> Action) -> Action {
        match self.vcpu(tid) {
            Ok(vcpu) => action(vcpu),
            Err(_) => Action::Impossible("there is no such CPU"),
        }
    }
}

/// gdb offers going back only where we said that it works, so this is a client that did not ask.
fn cannot_go_back() -> DebugError {
    DebugError::Refused("this machine keeps no past to go back to".to_owned())
}

impl MultiThreadResume for Bridge<'_> {
    fn resume(&mut self) -> Result<(), Infallible> {
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Infallible> {
        self.action = Action::Continue;
        Ok(())
    }

    fn set_resume_action_continue(
        &mut self,
        _tid: Tid,
        _signal: Option<Signal>,
    ) -> Result<(), Infallible> {
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_range_step(&mut self) -> Option<MultiThreadRangeSteppingOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }

    fn support_reverse_step(&mut self) -> Option<ReverseStepOps<'_, Tid, Self>> {
        if self.machine.reverse().is_some() {
            Some(self)
        } else {
            None
        }
    }

    fn support_reverse_cont(&mut self) -> Option<ReverseContOps<'_, Tid, Self>> {
        if self.machine.reverse().is_some() {
            Some(self)
        } else {
            None
        }
    }
}

impl MultiThreadSingleStep for Bridge<'_> {
    fn set_resume_action_step(
        &mut self,
        tid: Tid,
        _signal: Option<Signal>,
    ) -> Result<(), Infallible> {
        self.action = self.step_action(tid, Action::Step);
        Ok(())
    }
}

impl MultiThreadRangeStepping for Bridge<'_> {
    fn set_resume_action_range_step(
        &mut self,
        tid: Tid,
        start: u64,
        end: u64,
    ) -> Result<(), Infallible> {
        self.action = self.step_action(tid, |vcpu| Action::StepWithin(vcpu, start..end));
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Bridge<'_> {
    /// A step moves one CPU only, so this asks for something new only when a machine of several is to continue with one.
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Infallible> {
        if self.action == Action::Continue && self.machine.vcpus().len() > 1 {
            self.action = Action::Impossible(
                "one CPU cannot run on while the others stand still; set scheduler-locking off",
            );
        }
        Ok(())
    }
}

impl ReverseStep<Tid> for Bridge<'_> {
    fn reverse_step(&mut self, tid: Tid) -> Result<(), Infallible> {
        self.action = self.step_action(tid, Action::StepBack);
        Ok(())
    }
}

impl ReverseCont<Tid> for Bridge<'_> {
    fn reverse_cont(&mut self) -> Result<(), Infallible> {
        self.action = Action::ContinueBack;
        Ok(())
    }
}
