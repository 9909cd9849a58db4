//! The loop: enters the guest, handles its exits, lets things arrive.
//!
//! Purpose: the one place every crossing between guest and monitor passes, live, recording and replaying alike.
//! Invariants:
//! - Nothing nondeterministic is decided here: what arrives and when comes from the [`Environment`]; interrupts follow
//!   from the board's state, and are injected only at interrupt windows, which open at the same instruction on every engine.
//! - Handling an exit is a function of the exit, the board and the environment ([`handle`]).
//! - After an error the machine must not be continued.
//!
//! Elsewhere: devices ([`crate::board`]), engines, recorder and replayer.
//! Source: Intel SDM vol. 3A, 6.8 (when interrupts are taken); vol. 3C, 25.2 (interrupt-window exiting).

use crate::End;
use crate::board::Board;
use crate::engine::{Answer, Engine, EngineError, Entry};
use crate::environment::{Arrival, Bound, Boundary, Environment, EnvironmentError, SyncOrdinal};
use crate::exit_counts::ExitCounts;
use crate::memory::GuestMemory;
use std::time::Instant;
use x86::exit::{Injection, Wants};
use x86::{Exit, VcpuId};

/// Why a run cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The environment failed.
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
}

/// What one turn of the loop came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Turn {
    /// An exit was handled; turn again.
    Exit(Exit),
    /// The CPU is halted and what arrived, if anything, did not wake it: the guest was not entered. Turn again.
    Idle,
    /// The machine ended.
    Ended(End),
}

/// A machine being run: memory, board, engine and environment.
pub struct Session<E: Environment + ?Sized> {
    memory: GuestMemory,
    board: Board,
    engine: Box<dyn Engine>,
    counts: ExitCounts,
    progress: Progress,
    environment: Box<E>,
}

/// Where the loop stands, besides the state of engine and board: what a checkpoint must hold as well.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// Sync points passed.
    pub ordinal: SyncOrdinal,
    /// The answer owed to the guest.
    answer: Answer,
    /// The last exit's instruction is not finished yet.
    incomplete: bool,
    /// The CPU executed HLT and nothing has woken it.
    halted: bool,
    /// An interrupt window has opened.
    window: bool,
    cause: Option<Exit>,
    end: Option<End>,
}

impl Progress {
    /// Where a loop stands that was restored at a clean boundary.
    pub fn at(ordinal: SyncOrdinal, halted: bool) -> Self {
        Self {
            ordinal,
            halted,
            ..Self::default()
        }
    }

    /// Whether the CPU executed HLT and nothing has woken it.
    pub fn halted(&self) -> bool {
        self.halted
    }
}

impl<E: Environment + ?Sized> Session<E> {
    /// A session about to make its first entry. `engine` already holds the CPU's start state and maps `memory`.
    pub fn new(
        memory: GuestMemory,
        board: Board,
        engine: Box<dyn Engine>,
        environment: Box<E>,
    ) -> Self {
        Self {
            memory,
            board,
            engine,
            counts: ExitCounts::default(),
            progress: Progress::default(),
            environment,
        }
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The devices.
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// The devices, to be restored.
    pub fn board_mut(&mut self) -> &mut Board {
        &mut self.board
    }

    /// The engine.
    pub fn engine(&mut self) -> &mut dyn Engine {
        self.engine.as_mut()
    }

    /// The engine, to look at.
    pub fn engine_ref(&self) -> &dyn Engine {
        self.engine.as_ref()
    }

    /// The environment.
    pub fn environment(&mut self) -> &mut E {
        &mut self.environment
    }

    /// The environment, to look at.
    pub fn environment_ref(&self) -> &E {
        &self.environment
    }

    /// Replaces the environment (going live from a replay).
    pub fn set_environment(&mut self, environment: Box<E>) -> Box<E> {
        std::mem::replace(&mut self.environment, environment)
    }

    /// Exits so far.
    pub fn counts(&self) -> &ExitCounts {
        &self.counts
    }

    /// Where the loop stands.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Puts the loop where a restored machine stands.
    pub fn set_progress(&mut self, progress: Progress) {
        self.progress = progress;
    }

    /// How it ended, once it has.
    pub fn end(&self) -> Option<End> {
        self.progress.end
    }

    /// Whether the CPU's state may not be asked for until the pending instruction is completed.
    pub fn incomplete(&self) -> bool {
        self.progress.incomplete
    }

    /// Runs until the machine ends.
    pub fn run_to_end(&mut self) -> Result<End, RunError> {
        loop {
            if let Turn::Ended(end) = self.turn(&Bound::Exit)? {
                return Ok(end);
            }
        }
    }

    /// One turn: ask what arrives, enter the guest, handle its exit. `bound` limits the run besides what the
    /// environment asks; see [`Bound::nearer`].
    pub fn turn(&mut self, bound: &Bound) -> Result<Turn, RunError> {
        if let Some(end) = self.progress.end {
            return Ok(Turn::Ended(end));
        }
        let vcpu = VcpuId::BOOT;
        let wanted = self.arrive(vcpu)?;
        if let Some(end) = self.progress.end {
            return Ok(Turn::Ended(end));
        }
        if self.progress.halted && !self.board.interrupt_pending() {
            // Entering now would run past the HLT on an engine that keeps no halted state.
            return Ok(Turn::Idle);
        }
        let bound = bound.nearer(wanted);
        let entry = self.entry();
        let entered = Instant::now();
        let exit = self.engine.run(vcpu, entry, bound.until())?;
        let left = Instant::now();
        self.exited(vcpu, &exit)?;
        self.counts.add(&exit, left - entered, left.elapsed());
        self.progress.cause = Some(exit.clone());
        match self.progress.end {
            Some(end) => Ok(Turn::Ended(end)),
            None => Ok(Turn::Exit(exit)),
        }
    }

    /// Lets the environment deliver what arrives at this boundary.
    fn arrive(&mut self, vcpu: VcpuId) -> Result<Bound, RunError> {
        if self.progress.halted && !self.engine.interrupts_enabled(vcpu)? {
            self.progress.end = Some(End::HaltedForever);
            return Ok(Bound::Exit);
        }
        let directive = self.environment.boundary(Boundary {
            vcpu,
            cause: self.progress.cause.as_ref(),
            ordinal: self.progress.ordinal,
            incomplete: self.progress.incomplete,
            halted: self.progress.halted && !self.board.interrupt_pending(),
            deadline: self.board.deadline(),
            input_room: self.board.input_room(),
            engine: self.engine.as_mut(),
            memory: &self.memory,
            board: &self.board,
        })?;
        for arrival in &directive.arrivals {
            match arrival {
                Arrival::Time { now } => self.board.time(*now),
                Arrival::Input { channel, bytes } => self.board.input(*channel, bytes),
                Arrival::Stop => self.progress.end = Some(End::Stopped),
            }
        }
        Ok(directive.bound)
    }

    /// The entry that the board's and the guest's state call for.
    fn entry(&mut self) -> Entry {
        let answer = std::mem::take(&mut self.progress.answer);
        let window = std::mem::take(&mut self.progress.window);
        let inject = if window {
            self.board.acknowledge()
        } else {
            None
        };
        Entry {
            answer,
            inject: inject.map(Injection::ExternalInterrupt),
            interrupt_window: self.board.interrupt_pending(),
        }
    }

    /// Counts and handles one exit.
    fn exited(&mut self, vcpu: VcpuId, exit: &Exit) -> Result<(), RunError> {
        let progress = &mut self.progress;
        if exit.is_sync_point() {
            progress.ordinal.0 += 1;
        }
        self.environment
            .exited(vcpu, exit, progress.ordinal, self.engine.position())?;
        progress.incomplete = exit.wants() != Wants::Nothing
            || matches!(exit, Exit::IoOut { .. } | Exit::MmioWrite { .. });
        progress.halted = match exit {
            Exit::Hlt => true,
            Exit::Kicked | Exit::BoundReached => progress.halted,
            _ => false,
        };
        progress.window = *exit == Exit::InterruptWindow;
        progress.answer = handle(exit, &mut self.board, self.environment.as_mut())?;
        progress.end = match exit {
            Exit::TripleFault => Some(End::TripleFault),
            _ => self.board.end(),
        };
        Ok(())
    }
}

/// Handles one exit: what the devices do, and what the guest gets back.
pub fn handle<E: Environment + ?Sized>(
    exit: &Exit,
    board: &mut Board,
    environment: &mut E,
) -> Result<Answer, EnvironmentError> {
    let mut environment = environment;
    let environment = &mut environment;
    Ok(match *exit {
        Exit::IoIn { port, size } => Answer::Data(board.port_read(port, size, environment)?),
        Exit::IoOut { port, data } => {
            board.port_write(port, data, environment)?;
            Answer::None
        }
        Exit::MmioRead { addr, size } => Answer::Data(board.mmio_read(addr, size, environment)?),
        Exit::MmioWrite { addr, data } => {
            board.mmio_write(addr, data, environment)?;
            Answer::None
        }
        Exit::Rdmsr { msr } => board
            .msr_read(msr)
            .map_or(Answer::MsrRefused, Answer::MsrValue),
        Exit::Wrmsr { msr, value } => {
            if board.msr_write(msr, value) {
                Answer::MsrAccepted
            } else {
                Answer::MsrRefused
            }
        }
        _ => Answer::None,
    })
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
