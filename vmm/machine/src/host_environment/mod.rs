//! The environment of a live run: the host.
//!
//! Purpose: virtual time from the host's clock or from instructions, entropy from the operating system, console output to a sink, console
//! input and requests to stop from other threads, and an alarm that brings the CPU out of the guest in time.
//! Invariants:
//! - At a boundary where nothing arrives no system call is made and nothing is locked or allocated; the clock is read only when a
//!   deadline exists.
//! - Nothing is lost: input waits until the guest has room, output leaves before the machine sleeps or stops.
//! - It only looks at the machine through [`Boundary`].
//!
//! Elsewhere: recording what it says (`replay`); reading the terminal, and which signals stop a run (the program).

mod alarm;
mod attention;
mod clock;
mod input;
mod output;
#[cfg(test)]
mod tests;

use crate::engine::{EngineError, Kick};
use crate::environment::{
    Arrival, Bound, Boundary, Channel, Directive, Environment, EnvironmentError, SyncOrdinal,
};
use alarm::{Alarm, AlarmClock, Due};
use attention::{Attention, FLUSH, INPUT, SLICE, STOP};
pub use clock::Clock;
use clock::{HostClock, InstructionClock, Pauses};
use input::InputQueue;
pub use input::{InputClosed, InputHandle};
use output::Output;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use x86::{Exit, Nanos, Position, VcpuId};

/// A deadline that is nearer gets the guest this much time at least, so that it goes on however fast its timer is.
const SHORTEST_RUN: Duration = Duration::from_micros(20);
/// When to look again after time has come: by then another deadline has taken this one's place, and usually an exit has told it.
const NEXT_LOOK: Duration = Duration::from_millis(1);
/// How long the start of a line waits for its end.
const LONGEST_WAIT: Duration = Duration::from_millis(20);

/// The host's wall clock, for [`crate::BoardConfig::boot_time`]: seconds since 1970-01-01 00:00:00 UTC.
pub fn wall_clock() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    })
}

/// Whether an exit is an access to a console device.
fn is_console(exit: &Exit) -> bool {
    matches!(
        exit,
        Exit::IoIn {
            port: 0x3f8..=0x3ff | 0xe9,
            ..
        } | Exit::IoOut {
            port: 0x3f8..=0x3ff | 0xe9,
            ..
        }
    )
}

enum VirtualTime {
    Host(HostClock),
    Instructions(InstructionClock),
}

/// The host as an environment.
pub struct HostEnvironment {
    time: VirtualTime,
    attention: Arc<Attention>,
    alarm: Alarm,
    /// The deadline the alarm is set for, and the pauses that had ended then.
    armed: Option<(Nanos, u64)>,
    output: Output,
    /// The alarm is set for output that waits.
    flush_armed: bool,
    input: Arc<InputQueue>,
    /// Input was left because the guest had no room.
    input_left: bool,
    pauses: Arc<Pauses>,
}

/// Ends the run from any thread.
#[derive(Clone)]
pub struct StopHandle(Arc<Attention>);

impl StopHandle {
    /// Makes the run end with [`crate::End::Stopped`] at the next boundary. Async-signal-safe, as engines' kicks are.
    pub fn stop(&self) {
        self.0.raise(STOP);
    }
}

/// Runs a machine in slices, for a debugger that must look after its connection or screen: virtual time stands still in between.
pub struct RunControl {
    attention: Arc<Attention>,
    alarm: AlarmClock,
    pauses: Arc<Pauses>,
    paused: Option<Instant>,
}

impl RunControl {
    /// Lets time pass again, and has the run interrupted after about `slice`.
    pub fn start(&mut self, slice: Duration) {
        self.attention.clear(SLICE);
        if let Some(since) = self.paused.take() {
            self.pauses.add(since.elapsed());
        }
        self.alarm
            .set(Due::Slice, Instant::now().checked_add(slice));
    }

    /// Whether the slice is over.
    pub fn expired(&self) -> bool {
        self.attention.seen() & SLICE != 0
    }

    /// Stops the time until the next [`RunControl::start`].
    pub fn pause(&mut self) {
        self.alarm.set(Due::Slice, None);
        self.paused.get_or_insert_with(Instant::now);
    }
}

impl HostEnvironment {
    /// An environment for the CPU that `kick` wakes, with virtual time 0 now and console output going to `sink`.
    pub fn new(
        kick: Arc<dyn Kick>,
        clock: Clock,
        sink: Box<dyn Write + Send>,
    ) -> Result<Self, EnvironmentError> {
        Self::starting_at(kick, clock, sink, Nanos::ZERO, Position::START)
    }

    /// The same for a machine that already has a past: it is `now` there, and the engine stands at `position`.
    pub fn starting_at(
        kick: Arc<dyn Kick>,
        clock: Clock,
        sink: Box<dyn Write + Send>,
        now: Nanos,
        position: Position,
    ) -> Result<Self, EnvironmentError> {
        let attention = Arc::new(Attention::new(kick));
        let alarm =
            Alarm::start(Arc::clone(&attention)).map_err(|source| EnvironmentError::Io {
                what: "cannot start the alarm thread".into(),
                source,
            })?;
        let pauses = Arc::new(Pauses::default());
        let time = match clock {
            Clock::Host => VirtualTime::Host(HostClock::new(now, Arc::clone(&pauses))),
            Clock::Instructions { per_second } => {
                VirtualTime::Instructions(InstructionClock::new(per_second, now, position))
            }
        };
        Ok(Self {
            time,
            attention,
            alarm,
            armed: None,
            output: Output::new(sink),
            flush_armed: false,
            input: Arc::default(),
            input_left: false,
            pauses,
        })
    }

    /// A handle that ends the run.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(Arc::clone(&self.attention))
    }

    /// A handle that types at the console.
    pub fn input_handle(&self) -> InputHandle {
        InputHandle {
            queue: Arc::clone(&self.input),
            attention: Arc::clone(&self.attention),
        }
    }

    /// A handle that runs the machine in slices. Only one is of use.
    pub fn run_control(&self) -> RunControl {
        RunControl {
            attention: Arc::clone(&self.attention),
            alarm: self.alarm.clock().clone(),
            pauses: Arc::clone(&self.pauses),
            paused: None,
        }
    }

    /// Writes out all output. Happens by itself when the machine stops, but errors are only told here.
    pub fn flush(&mut self) -> Result<(), EnvironmentError> {
        self.output.flush()
    }

    fn virtual_now(&mut self) -> Nanos {
        match &mut self.time {
            VirtualTime::Host(clock) => clock.now(),
            VirtualTime::Instructions(clock) => clock.now(),
        }
    }

    /// What other threads sent. A stop comes last: what arrived before it is part of the run. It waits for an instruction in progress, so
    /// that the machine ends in a state that can be looked at.
    fn requested(&mut self, at: &Boundary<'_>, arrivals: &mut Vec<Arrival>) {
        let seen = self.attention.seen();
        if seen & INPUT != 0 || (self.input_left && at.input_room > 0) {
            self.attention.clear(INPUT);
            let (bytes, left) = self.input.take(at.input_room);
            self.input_left = left;
            if !bytes.is_empty() {
                arrivals.push(Arrival::Input {
                    channel: Channel::Com1,
                    bytes,
                });
            }
        }
        if seen & STOP != 0 && !at.incomplete {
            arrivals.push(Arrival::Stop);
        }
    }

    /// What arrives at this boundary, without waiting for it.
    fn arrivals(&mut self, at: &Boundary<'_>) -> Vec<Arrival> {
        let mut arrivals = Vec::new();
        if let Some(deadline) = at.deadline {
            let now = self.virtual_now();
            if now >= deadline {
                arrivals.push(Arrival::Time { now });
            }
        }
        self.requested(at, &mut arrivals);
        arrivals
    }

    /// Sets the alarm for the deadline, unless it is.
    fn arm(&mut self, deadline: Option<Nanos>) {
        let VirtualTime::Host(clock) = &mut self.time else {
            return;
        };
        let wanted = deadline.map(|deadline| (deadline, clock.pauses_ended()));
        if wanted == self.armed {
            return;
        }
        self.armed = wanted;
        let at = deadline.and_then(|deadline| {
            let ahead = Duration::from_nanos(deadline.since(clock.now()));
            Instant::now().checked_add(ahead.max(SHORTEST_RUN))
        });
        self.alarm.clock().set(Due::Deadline, at);
    }

    /// Sets the alarm where time has just come, so that the next deadline is not known yet.
    fn arm_to_look_again(&mut self) {
        self.armed = None;
        let at = Instant::now().checked_add(NEXT_LOOK);
        self.alarm.clock().set(Due::Deadline, at);
    }

    /// How far the machine may run on the instruction clock. When time has just come, the next deadline is not known yet.
    fn bound(&self, deadline: Option<Nanos>, time_came: bool) -> Bound {
        let VirtualTime::Instructions(clock) = &self.time else {
            return Bound::Exit;
        };
        match deadline {
            _ if time_came => Bound::Position(clock.next_position()),
            Some(deadline) => Bound::Position(clock.position_of(deadline)),
            None => Bound::Exit,
        }
    }

    /// Has output written that waits for the end of its line too long.
    fn mind_output(&mut self) -> Result<(), EnvironmentError> {
        if self.flush_armed && self.attention.seen() & FLUSH != 0 {
            self.attention.clear(FLUSH);
            self.flush_armed = false;
            self.output.flush()?;
        }
        if self.output.waits() && !self.flush_armed {
            self.flush_armed = true;
            let at = Instant::now().checked_add(LONGEST_WAIT);
            self.alarm.clock().set(Due::Flush, at);
        }
        Ok(())
    }

    /// Sleeps until something arrives for the halted CPU, or a slice is over.
    fn idle(&mut self, at: &Boundary<'_>) -> Result<Vec<Arrival>, EnvironmentError> {
        self.output.flush()?;
        // It would only kick a CPU that is awake already.
        self.arm(None);
        loop {
            let seen = self.attention.seen();
            let arrivals = self.arrivals(at);
            if !arrivals.is_empty() || seen & SLICE != 0 {
                return Ok(arrivals);
            }
            let timeout = match (&mut self.time, at.deadline) {
                (VirtualTime::Host(clock), Some(deadline)) => {
                    Some(Duration::from_nanos(deadline.since(clock.now())))
                }
                (VirtualTime::Instructions(clock), Some(deadline)) => {
                    clock.skip_to(deadline);
                    continue;
                }
                (_, None) => None,
            };
            // INPUT was taken back just now; any flag raised since ends the wait.
            self.attention.wait(seen & !INPUT, timeout);
        }
    }
}

impl Environment for HostEnvironment {
    fn now(&mut self) -> Result<Nanos, EnvironmentError> {
        Ok(self.virtual_now())
    }

    fn entropy(&mut self, out: &mut [u8]) -> Result<(), EnvironmentError> {
        getrandom::fill(out).map_err(|error| EnvironmentError::Io {
            what: "cannot get random bytes from the operating system".into(),
            source: error.into(),
        })
    }

    fn output(&mut self, _channel: Channel, bytes: &[u8]) -> Result<(), EnvironmentError> {
        self.output.send(bytes)
    }

    fn exited(
        &mut self,
        _vcpu: VcpuId,
        exit: &Exit,
        _ordinal: SyncOrdinal,
        position: Option<Position>,
    ) -> Result<(), EnvironmentError> {
        if let (VirtualTime::Instructions(clock), Some(position)) = (&mut self.time, position) {
            clock.set_position(position);
        }
        // A run may end with this exit, and then nobody asks again. A guest in the middle of a line stays at its console.
        if self.output.waits() && !is_console(exit) {
            self.output.flush()?;
        }
        Ok(())
    }

    fn boundary(&mut self, at: Boundary<'_>) -> Result<Directive, EnvironmentError> {
        if let VirtualTime::Instructions(clock) = &mut self.time {
            let position = at.engine.position();
            let kind = at.engine.kind();
            clock.set_position(position.ok_or(EngineError::CannotCount(kind.name()))?);
        }
        if at.halted {
            let arrivals = self.idle(&at)?;
            return Ok(Directive {
                arrivals,
                bound: Bound::Exit,
            });
        }
        self.mind_output()?;
        let arrivals = self.arrivals(&at);
        let time_came = matches!(arrivals.first(), Some(Arrival::Time { .. }));
        match self.time {
            VirtualTime::Host(_) if time_came => self.arm_to_look_again(),
            VirtualTime::Host(_) => self.arm(at.deadline),
            VirtualTime::Instructions(_) => {}
        }
        let bound = if at.incomplete && self.attention.seen() & STOP != 0 {
            Bound::Completed
        } else {
            self.bound(at.deadline, time_came)
        };
        Ok(Directive { arrivals, bound })
    }
}

impl Drop for HostEnvironment {
    fn drop(&mut self) {
        self.input.close();
    }
}
