//! A timeline as debuggers see it.
//!
//! Purpose: [`Debuggable`] over a [`Timeline`].
//! Invariants: as the trait has them; a change leaves the recording and is said so by [`Debuggable::branched`].
//! Elsewhere: moving ([`super`], [`super::backward`]).

use super::live::Live;
use super::{Reached, Timeline};
use machine::debuggable::{DebugError, Debuggable, EventView, Resume, Reverse, Stop};
use machine::engine::EngineKind;
use machine::exit_counts::ExitCounts;
use machine::{End, GuestMemory};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use x86::{CpuState, GuestPhysAddr, GuestVirtAddr, Position, VcpuId};

impl Timeline {
    /// The machine is about to be changed: it leaves the recording here.
    fn branch(&mut self) {
        self.backward = None;
        self.edited = true;
        let here = self.here();
        let tape = self.session.environment();
        if tape.live.is_none() {
            tape.live = Some(Live::new(here, tape.replayer.last_time()));
        }
        // There is a future again where the recording had none. A guest that has ended stays ended.
        if !matches!(self.stopped, Some(Stop::Ended(_))) {
            self.stopped = None;
            self.divergence = None;
        }
    }
}

impl Debuggable for Timeline {
    fn engine(&self) -> EngineKind {
        self.session.engine_ref().kind()
    }

    fn describe(&self) -> String {
        self.name.clone()
    }

    fn vcpus(&self) -> Vec<VcpuId> {
        vec![VcpuId::BOOT]
    }

    fn cpu(&mut self, vcpu: VcpuId) -> Result<CpuState, DebugError> {
        Ok(self.session.engine().state(vcpu)?)
    }

    fn set_cpu(&mut self, vcpu: VcpuId, state: &CpuState) -> Result<(), DebugError> {
        self.session.engine().set_state(vcpu, state)?;
        self.branch();
        Ok(())
    }

    fn memory(&self) -> &GuestMemory {
        self.session.memory()
    }

    fn write_memory(&mut self, addr: GuestPhysAddr, data: &[u8]) -> Result<(), DebugError> {
        self.session.memory().write(addr, data)?;
        self.session.engine().memory_written(addr, data.len());
        self.branch();
        Ok(())
    }

    fn set_breakpoints(&mut self, at: &BTreeSet<GuestVirtAddr>) -> Result<(), DebugError> {
        if *at != self.breakpoints {
            // Whoever asks for others has given up on the search for these.
            self.backward = None;
            self.arm(false)?;
            self.breakpoints = at.clone();
        }
        Ok(())
    }

    fn resume(&mut self, how: Resume, slice: Duration) -> Result<Stop, DebugError> {
        let until = Instant::now() + slice;
        self.prepare()?;
        if let Resume::Step(_) = how {
            return Ok(match self.step()? {
                Reached::Target => Stop::Stepped,
                Reached::Slice => Stop::Slice,
                Reached::Stop(stop) => stop,
            });
        }
        // Off the present instruction first, so that its breakpoint does not stop the machine again.
        if self.breakpoint_here()?.is_some()
            && let Reached::Stop(stop) = self.step()?
        {
            return Ok(stop);
        }
        Ok(match self.forward(Position::NEVER, Some(until), true)? {
            Reached::Target | Reached::Slice => Stop::Slice,
            Reached::Stop(stop) => stop,
        })
    }

    fn position(&self) -> Option<Position> {
        self.session.engine_ref().position()
    }

    fn end(&self) -> Option<End> {
        match self.stopped {
            Some(Stop::Ended(end)) => Some(end),
            _ => None,
        }
    }

    fn console(&self) -> &[u8] {
        self.session.environment_ref().replayer.console()
    }

    fn exits(&self) -> &ExitCounts {
        &self.session.environment_ref().counts
    }

    fn events(&self) -> &[EventView] {
        &self.events
    }

    fn branched(&self) -> bool {
        self.session.environment_ref().live.is_some()
    }

    fn reverse(&mut self) -> Option<&mut dyn Reverse> {
        Some(self)
    }
}
