//! The environment: the one door through which nondeterminism enters a machine.
//!
//! Purpose: clock readings, entropy, console input and the moments at which asynchronous events arrive all come through
//! [`Environment`]. A live run asks the host, recording wraps that and logs each answer, replaying gives the
//! logged answers back; the loop and the devices are the same code in all three.
//! Invariants: a machine fed the same answers at the same moments goes the same way. Output leaves through the same trait, so
//! that a replay can be compared. An environment never touches guest memory or CPU state; it may look.
//! Elsewhere: the loop that calls it ([`crate::session`]); recorder and replayer (`replay`).

use crate::board::Board;
use crate::engine::{Engine, EngineError, Until};
use crate::memory::GuestMemory;
use serde::{Deserialize, Serialize};
use x86::{Exit, Nanos, Position, Registers, VcpuId};

/// A character channel of the machine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash, Serialize, Deserialize)]
pub enum Channel {
    /// The first serial port, 3F8h.
    Com1,
    /// The debug console port, E9h.
    DebugConsole,
}

/// Something that reached the machine from outside, asynchronously.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Arrival {
    /// Time has come to `now`: timers that are due fire.
    Time {
        /// Virtual time.
        now: Nanos,
    },
    /// Bytes typed at a channel.
    Input {
        /// Which one.
        channel: Channel,
        /// What; never empty.
        bytes: Vec<u8>,
    },
    /// Somebody asked the run to end here.
    Stop,
}

/// Counts exits for which [`Exit::is_sync_point`] holds, of all CPUs, since the start: the clock both engines share.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct SyncOrdinal(pub u64);

impl std::fmt::Display for SyncOrdinal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Where the loop stands when it asks what arrives.
pub struct Boundary<'a> {
    /// The CPU about to be entered.
    pub vcpu: VcpuId,
    /// The exit that led here, already handled; `None` at the start and right after a debugger moved the machine.
    pub cause: Option<&'a Exit>,
    /// Sync points passed so far, this one included.
    pub ordinal: SyncOrdinal,
    /// An answer is still owed to the guest, so that [`Engine::state`] may not be asked. See [`Until::Completed`].
    pub incomplete: bool,
    /// The CPU is halted: nothing happens until something arrives.
    pub halted: bool,
    /// When the next timer of the machine is due, in virtual time.
    pub deadline: Option<Nanos>,
    /// How many bytes of input the first serial port takes now without losing any.
    pub input_room: usize,
    /// To look at the CPU's state and dirty pages.
    pub engine: &'a mut dyn Engine,
    /// To look at memory.
    pub memory: &'a GuestMemory,
    /// To look at the devices.
    pub board: &'a Board,
}

/// How far the loop may run now.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Bound {
    /// To the next exit.
    #[default]
    Exit,
    /// As [`Until::Completed`].
    Completed,
    /// As [`Until::Position`].
    Position(Position),
    /// As [`Until::Registers`].
    Registers {
        /// What to look for.
        registers: Box<Registers>,
        /// Where to give up.
        limit: Position,
    },
}

impl Bound {
    /// What is reached as soon as one of the two is; of two register states `other`'s is looked for.
    #[must_use]
    pub fn nearer(&self, other: Self) -> Self {
        match (self, other) {
            (Self::Completed, _) | (_, Self::Completed) => Self::Completed,
            (_, Self::Exit) => self.clone(),
            (Self::Position(a), Self::Position(b)) => Self::Position(b.min(*a)),
            (Self::Position(a), Self::Registers { registers, limit }) => Self::Registers {
                registers,
                limit: limit.min(*a),
            },
            (Self::Registers { registers, limit }, Self::Position(b)) => Self::Registers {
                registers: registers.clone(),
                limit: b.min(*limit),
            },
            (Self::Exit | Self::Registers { .. }, other) => other,
        }
    }

    /// The engine's form of it.
    pub fn until(&self) -> Until<'_> {
        match self {
            Self::Exit => Until::Exit,
            Self::Completed => Until::Completed,
            Self::Position(position) => Until::Position(*position),
            Self::Registers { registers, limit } => Until::Registers {
                registers,
                limit: *limit,
            },
        }
    }
}

/// What an environment says at a boundary.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Directive {
    /// What arrives here, in order. Empty nearly always.
    pub arrivals: Vec<Arrival>,
    /// How far to run then.
    pub bound: Bound,
}

/// Why the environment cannot answer.
#[derive(Debug, thiserror::Error)]
pub enum EnvironmentError {
    /// The host's input or output failed (a closed pipe, a full disk).
    #[error("{what}: {source}")]
    Io {
        /// What was being read or written.
        what: String,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// A replay left its recording. The text says where and how.
    #[error("{0}")]
    Diverged(Box<dyn std::error::Error + Send + Sync>),
    /// A replay has reached the end of an incomplete trace.
    #[error("the trace ends here")]
    EndOfTrace,
    /// The engine failed while it was looked at.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Where everything nondeterministic comes from. See the module's invariants.
pub trait Environment {
    /// Virtual time now, for a device register that shows it.
    fn now(&mut self) -> Result<Nanos, EnvironmentError>;

    /// Fills `out` with random bytes.
    fn entropy(&mut self, out: &mut [u8]) -> Result<(), EnvironmentError>;

    /// Bytes the guest sent.
    fn output(&mut self, channel: Channel, bytes: &[u8]) -> Result<(), EnvironmentError>;

    /// Told of every exit before it is handled. `ordinal` counts it already if it is a sync point; `position` is known on engines
    /// that count.
    fn exited(
        &mut self,
        vcpu: VcpuId,
        exit: &Exit,
        ordinal: SyncOrdinal,
        position: Option<Position>,
    ) -> Result<(), EnvironmentError>;

    /// Asked before every entry: what arrives at this boundary, and how far may the run go? Blocks when the CPU is
    /// halted and nothing has arrived yet.
    fn boundary(&mut self, at: Boundary<'_>) -> Result<Directive, EnvironmentError>;
}

impl<E: Environment + ?Sized> Environment for &mut E {
    fn now(&mut self) -> Result<Nanos, EnvironmentError> {
        (**self).now()
    }

    fn entropy(&mut self, out: &mut [u8]) -> Result<(), EnvironmentError> {
        (**self).entropy(out)
    }

    fn output(&mut self, channel: Channel, bytes: &[u8]) -> Result<(), EnvironmentError> {
        (**self).output(channel, bytes)
    }

    fn exited(
        &mut self,
        vcpu: VcpuId,
        exit: &Exit,
        ordinal: SyncOrdinal,
        position: Option<Position>,
    ) -> Result<(), EnvironmentError> {
        (**self).exited(vcpu, exit, ordinal, position)
    }

    fn boundary(&mut self, at: Boundary<'_>) -> Result<Directive, EnvironmentError> {
        (**self).boundary(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearer_bound_counts() {
        let position = |at| Bound::Position(Position::at(at));
        let registers = |limit| Bound::Registers {
            registers: Box::default(),
            limit: Position::at(limit),
        };
        let cases = [
            (Bound::Exit, Bound::Exit, Bound::Exit),
            (Bound::Exit, position(5), position(5)),
            (position(5), Bound::Exit, position(5)),
            (position(5), position(7), position(5)),
            (position(7), position(5), position(5)),
            (Bound::Completed, position(5), Bound::Completed),
            (registers(9), Bound::Completed, Bound::Completed),
            (position(5), registers(9), registers(5)),
            (registers(9), position(12), registers(9)),
            (Bound::Exit, registers(9), registers(9)),
        ];
        for (ours, theirs, nearer) in cases {
            assert_eq!(ours.nearer(theirs.clone()), nearer, "{ours:?} {theirs:?}");
        }
    }
}
