//! The timeline: a recorded machine that can be moved along its past.
//!
//! Purpose: open a trace, build its machine on an engine that counts, and run it: to its end, to a position, step by step, backwards; and off its
//! recorded course, when a debugger changes it.
//! Invariants:
//! - Between calls the machine stands at a clean boundary. Moving is invisible to the guest and never changes what the recorded course is.
//! - Going back is restoring a snapshot and running forward; what is reached is verified like the first time.
//! - A change to CPU or memory leaves the recording ([`machine::debuggable::Debuggable::branched`]); going back before it returns to the recording.
//!
//! Elsewhere: the log's meaning ([`crate::replayer`]); gdb and the terminal UI, which see a [`machine::debuggable::Debuggable`].

mod backward;
mod debuggable;
mod live;
mod snapshots;
mod tape;

use crate::digest::Digest;
use crate::divergence::Divergence;
use crate::finish::FinalState;
use crate::replayer::Replayer;
use crate::trace::{Damage, Image, MachineRecord, OpenTraceError, Trace};
use backward::Backward;
use machine::debuggable::{DebugError, EventView, Stop};
use machine::engine::{Engine, EngineError};
use machine::environment::{Bound, EnvironmentError};
use machine::session::{RunError, Session, Turn};
use machine::{BuildError, End, GuestMemory, MachineConfig};
use serde::Serialize;
use snapshots::Snapshots;
use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};
use tape::Tape;
use x86::{CpuModel, CpuState, Exit, ExitControls, GuestVirtAddr, Nanos, Position, VcpuId};

/// Makes the engine that executes a timeline: for this memory, in this start state, showing this CPU model.
pub type EngineFactory<'a> =
    dyn Fn(&GuestMemory, &CpuState, CpuModel) -> Result<Box<dyn Engine>, EngineError> + 'a;

/// Why a trace cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum OpenTimelineError {
    /// The trace cannot be read.
    #[error(transparent)]
    Trace(#[from] OpenTraceError),
    /// The trace holds no kernel.
    #[error("the trace holds no kernel")]
    NoKernel,
    /// Its machine cannot be built.
    #[error("the recorded machine cannot be built: {0}")]
    Build(#[from] BuildError),
    /// The engine cannot be made.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The engine does not count instructions.
    #[error(
        "a replay needs an engine that counts instructions, and {0} does not; replay on the soft engine"
    )]
    CannotCount(&'static str),
    /// The first snapshot cannot be taken.
    #[error("cannot take a snapshot of the start: {0}")]
    Snapshot(DebugError),
}

/// How a replay went.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// It reached the recorded end, and everything agreed.
    Verified,
    /// The trace has no end; everything up to where it stops agreed.
    Incomplete {
        /// Why the trace stops there.
        reason: Option<String>,
    },
    /// It left the recording.
    Diverged(Divergence),
    /// It has not come to the recording's end, or a debugger's change has left the recording.
    Unfinished,
}

/// A replay, summed up.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Report {
    /// How it went.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// How the guest ended.
    pub end: Option<End>,
    /// Instructions retired.
    pub instructions: u64,
    /// Sync points passed.
    pub sync_points: u64,
    /// Exits of the guest's.
    pub exits: u64,
    /// Arrivals delivered.
    pub arrivals: u64,
    /// Digests compared, the end's included.
    pub verified: u64,
    /// Bytes of output.
    pub console_bytes: u64,
    /// Digest of the output.
    pub console: Digest,
    /// The last virtual time the guest was told.
    pub virtual_time: Nanos,
    /// Time the replay took on the host.
    pub duration: Duration,
}

/// A recorded machine, standing somewhere on its timeline.
pub struct Timeline {
    name: String,
    machine: MachineRecord,
    images: Vec<Image>,
    damage: Option<Damage>,
    events: Vec<EventView>,
    session: Session<Tape>,
    snapshots: Snapshots,
    breakpoints: BTreeSet<GuestVirtAddr>,
    /// Whether the engine stops at them now.
    armed: bool,
    /// Why it cannot go forward from here.
    stopped: Option<Stop>,
    divergence: Option<Divergence>,
    /// The machine was changed and has not run since.
    edited: bool,
    backward: Option<Backward>,
    spent: Duration,
}

/// How far a run forward came.
enum Reached {
    /// To the position wanted, or just past it.
    Target,
    /// The time was over first.
    Slice,
    /// Something stopped it.
    Stop(Stop),
}

/// Instructions between two looks at the clock.
const LOOK: u64 = 100_000;

impl Timeline {
    /// Opens the trace file `path` at its start.
    pub fn open(path: &Path, factory: &EngineFactory<'_>) -> Result<Self, OpenTimelineError> {
        let name = path
            .file_name()
            .unwrap_or(path.as_os_str())
            .to_string_lossy()
            .into_owned();
        Self::of(Trace::open(path)?, name, factory)
    }

    /// A timeline of `trace`, called `name`, at its start.
    pub fn of(
        trace: Trace,
        name: String,
        factory: &EngineFactory<'_>,
    ) -> Result<Self, OpenTimelineError> {
        let Trace {
            machine,
            images,
            events,
            end,
            damage,
            log,
            ..
        } = trace;
        let config = machine.config(&images).ok_or(OpenTimelineError::NoKernel)?;
        let (memory, board, cpu) = config.build()?;
        let engine = factory(&memory, &cpu, config.cpu_model)?;
        if engine.position().is_none() {
            return Err(OpenTimelineError::CannotCount(engine.kind().name()));
        }
        let tape = Tape::new(Replayer::over(log, end, machine.engine));
        let mut session = Session::new(memory, board, engine, Box::new(tape));
        let mut snapshots = Snapshots::default();
        snapshots
            .take(&mut session)
            .map_err(OpenTimelineError::Snapshot)?;
        Ok(Self {
            name,
            machine,
            images,
            damage,
            events,
            session,
            snapshots,
            breakpoints: BTreeSet::new(),
            armed: false,
            stopped: None,
            divergence: None,
            edited: false,
            backward: None,
            spent: Duration::ZERO,
        })
    }

    /// What was recorded, on what.
    pub fn machine(&self) -> &MachineRecord {
        &self.machine
    }

    /// The files the guest was started with; the kernel is the first.
    pub fn images(&self) -> &[Image] {
        &self.images
    }

    /// Why the trace is not whole; `None` when it is.
    pub fn damage(&self) -> Option<&Damage> {
        self.damage.as_ref()
    }

    /// How the replay left the recording, if it has.
    pub fn divergence(&self) -> Option<&Divergence> {
        self.divergence.as_ref()
    }

    /// Sync points passed, and how many the recording has: how far a replay has come.
    pub fn progress(&self) -> (u64, u64) {
        let last = self.events.last().map_or(0, |event| event.after.0);
        let recorded = self.session.environment_ref().replayer.recorded_end();
        let total = recorded.map_or(last, |end| end.after.0);
        (self.session.progress().ordinal.0, total)
    }

    /// Takes snapshots this many instructions apart from now on: the most that going back costs, paid for by memory and by copying dirty
    /// pages on the way.
    pub fn set_snapshot_spacing(&mut self, instructions: u64) {
        self.snapshots.spacing = instructions;
    }

    /// Runs to the end, verifying everything on the way.
    pub fn run_to_end(&mut self) -> Result<Report, DebugError> {
        self.prepare()?;
        self.forward(Position::NEVER, None, false)?;
        Ok(self.report())
    }

    /// Goes to `position`, forward or back. [`Stop::Stepped`] when it is there; [`Stop::Slice`] when `slice` was over first, and
    /// the same call again goes on; anything else stopped it before.
    pub fn seek(&mut self, position: Position, slice: Duration) -> Result<Stop, DebugError> {
        let until = Instant::now() + slice;
        self.prepare()?;
        if position < self.here() {
            self.restore(position)?;
        }
        Ok(match self.forward(position, Some(until), false)? {
            Reached::Target => Stop::Stepped,
            Reached::Slice => Stop::Slice,
            Reached::Stop(stop) => stop,
        })
    }

    /// How the replay went so far.
    pub fn report(&self) -> Report {
        let tape = self.session.environment_ref();
        let outcome = match (&self.divergence, &self.stopped) {
            (Some(divergence), _) => Outcome::Diverged(divergence.clone()),
            _ if tape.live.is_some() => Outcome::Unfinished,
            (None, Some(Stop::Ended(_))) => Outcome::Verified,
            (None, Some(Stop::EndOfHistory)) => Outcome::Incomplete {
                reason: self.damage.as_ref().map(ToString::to_string),
            },
            _ => Outcome::Unfinished,
        };
        Report {
            outcome,
            end: self.session.end(),
            instructions: self.here().retired.get(),
            sync_points: self.session.progress().ordinal.0,
            exits: tape.counts.total().count,
            arrivals: tape.replayer.arrivals(),
            verified: tape.replayer.verified(),
            console_bytes: tape.replayer.console().len() as u64,
            console: tape.replayer.console_digest(),
            virtual_time: tape.replayer.last_time(),
            duration: self.spent,
        }
    }

    /// Where the machine stands.
    fn here(&self) -> Position {
        self.session.engine_ref().position().unwrap_or_default()
    }

    /// Before the machine moves: a search backwards that was going on is over, and what a debugger changed becomes a branch to go back to.
    fn prepare(&mut self) -> Result<(), DebugError> {
        self.backward = None;
        if std::mem::take(&mut self.edited) {
            self.snapshots.truncate(self.here());
            self.snapshots.take(&mut self.session)?;
        }
        Ok(())
    }

    /// Makes the machine what it was at the last snapshot not after `position`.
    fn restore(&mut self, position: Position) -> Result<(), DebugError> {
        self.stopped = None;
        self.divergence = None;
        self.snapshots.restore(position, &mut self.session)?;
        Ok(())
    }

    /// Runs until the machine is at `target` or past it, or `until`.
    fn forward(
        &mut self,
        target: Position,
        until: Option<Instant>,
        breakpoints: bool,
    ) -> Result<Reached, DebugError> {
        let started = Instant::now();
        self.arm(breakpoints)?;
        let reached = self.run(target, until);
        self.spent += started.elapsed();
        reached
    }

    fn run(&mut self, target: Position, until: Option<Instant>) -> Result<Reached, DebugError> {
        let mut looked = self.here();
        loop {
            if let Some(stop) = &self.stopped {
                return Ok(Reached::Stop(stop.clone()));
            }
            let here = self.here();
            if !self.session.incomplete() {
                if here >= target {
                    return Ok(Reached::Target);
                }
                if here >= self.snapshots.next_due() {
                    self.snapshots.take(&mut self.session)?;
                }
                if here.retired.since(looked.retired) >= LOOK {
                    looked = here;
                    if until.is_some_and(|until| Instant::now() >= until) {
                        return Ok(Reached::Slice);
                    }
                }
            }
            let look = Position {
                retired: here.retired.saturating_add(LOOK),
                within: 0,
            };
            let limit = target.min(look);
            // An exit may have reached the limit with its instruction still to be completed.
            let bound = if here >= limit {
                Bound::Completed
            } else {
                Bound::Position(limit)
            };
            if let Some(stop) = self.turn(limit, &bound)? {
                return Ok(Reached::Stop(stop));
            }
        }
    }

    /// One turn of the loop, to `limit` at most; what stopped it, if anything did.
    fn turn(&mut self, limit: Position, bound: &Bound) -> Result<Option<Stop>, DebugError> {
        self.session.environment().set_limit(limit);
        let turned = self.session.turn(bound);
        let tape = self.session.environment();
        for (index, position) in tape.replayer.take_placed() {
            let event = usize::try_from(index)
                .ok()
                .and_then(|index| self.events.get_mut(index));
            if let Some(event) = event {
                event.position = Some(position);
            }
        }
        match turned {
            Ok(Turn::Exit(Exit::Breakpoint(addr))) => {
                Ok(Some(Stop::Breakpoint(VcpuId::BOOT, addr)))
            }
            Ok(Turn::Exit(_) | Turn::Idle) => Ok(None),
            Ok(Turn::Ended(end)) => self.ended(end).map(Some),
            Err(RunError::Engine(error)) => Err(error.into()),
            Err(RunError::Environment(error)) => self.stop_at(error).map(Some),
        }
    }

    /// The guest has ended: compare it with the recording's end.
    fn ended(&mut self, end: End) -> Result<Stop, DebugError> {
        let state = FinalState::of(&mut self.session)?;
        let ordinal = self.session.progress().ordinal;
        let tape = self.session.environment();
        tape.in_exit = false;
        if tape.live.is_none()
            && let Err(error) = tape.replayer.verify_end(end, ordinal, &state)
        {
            return self.stop_at(error);
        }
        let stop = Stop::Ended(end);
        self.stopped = Some(stop.clone());
        Ok(stop)
    }

    /// The log stopped the machine.
    fn stop_at(&mut self, error: EnvironmentError) -> Result<Stop, DebugError> {
        let (stop, divergence) = match error {
            EnvironmentError::EndOfTrace => (Stop::EndOfHistory, None),
            EnvironmentError::Diverged(error) => {
                let stop = Stop::Diverged(error.to_string());
                (
                    stop,
                    error
                        .downcast::<Divergence>()
                        .ok()
                        .map(|divergence| *divergence),
                )
            }
            other => return Err(other.into()),
        };
        if self.session.environment_ref().in_exit {
            self.stand_clean()?;
        }
        self.stopped = Some(stop.clone());
        self.divergence = divergence;
        Ok(stop)
    }

    /// The log stopped the machine in the midst of an exit: go back to a boundary just before, so that it can be looked at.
    fn stand_clean(&mut self) -> Result<(), DebugError> {
        let clean = self.session.environment_ref().clean;
        // Before the instruction that exited, whether the engine counts it already or not.
        let before = earlier(self.here(), 1);
        self.restore(clean)?;
        for target in [clean, before.max(clean)] {
            while self.here() < target || self.session.incomplete() {
                self.session.environment().set_limit(target);
                let bound = if self.here() < target {
                    Bound::Position(target)
                } else {
                    Bound::Completed
                };
                match self.session.turn(&bound) {
                    Ok(Turn::Exit(_) | Turn::Idle) => {}
                    // It was here before without trouble.
                    Ok(Turn::Ended(_)) | Err(_) => return Ok(()),
                }
            }
        }
        Ok(())
    }

    /// Makes the engine stop at breakpoints, or not.
    fn arm(&mut self, on: bool) -> Result<(), DebugError> {
        let on = on && !self.breakpoints.is_empty();
        if on != self.armed {
            let breakpoints = if on {
                self.breakpoints.clone()
            } else {
                BTreeSet::new()
            };
            let controls = ExitControls {
                breakpoints,
                ..ExitControls::default()
            };
            self.session.engine().set_controls(&controls)?;
            self.armed = on;
        }
        Ok(())
    }

    /// One boundary forward, without stopping at breakpoints.
    fn step(&mut self) -> Result<Reached, DebugError> {
        let here = self.here();
        let next = Position {
            within: here.within.saturating_add(1),
            ..here
        };
        self.forward(next, None, false)
    }

    /// The breakpoint at the present instruction, if there is one.
    fn breakpoint_here(&mut self) -> Result<Option<GuestVirtAddr>, DebugError> {
        if self.breakpoints.is_empty() {
            return Ok(None);
        }
        let addr = self.session.engine().state(VcpuId::BOOT)?.rip_linear();
        Ok(self.breakpoints.contains(&addr).then_some(addr))
    }
}

/// The position so many instructions earlier.
fn earlier(position: Position, instructions: u64) -> Position {
    Position::at(position.retired.get().saturating_sub(instructions))
}

impl MachineRecord {
    /// The machine to build, with the first of `images` as its kernel; `None` when there is none.
    pub fn config(&self, images: &[Image]) -> Option<MachineConfig> {
        let kernel = images.first()?.bytes.clone();
        Some(MachineConfig {
            memory: self.memory,
            cpu_model: self.cpu,
            board: self.board.clone(),
            kernel,
            cmdline: self.cmdline.clone(),
        })
    }
}
