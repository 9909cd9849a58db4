//! What a timeline's machine is fed from: the log, or, on a branch, the live continuation.
//!
//! Purpose: one environment for both, which also counts exits as the guest made them and knows where the last clean boundary was.
//! Invariants: exits that only a debugger's bounds caused are not counted.
//! Elsewhere: the log ([`crate::replayer`]), the continuation ([`super::live`]).

use super::live::Live;
use crate::replayer::{Cursor, Replayer};
use machine::environment::{
    Bound, Boundary, Channel, Directive, Environment, EnvironmentError, SyncOrdinal,
};
use machine::exit_counts::ExitCounts;
use std::time::Duration;
use x86::{Exit, Nanos, Position, VcpuId};

/// The environment of a timeline.
pub(super) struct Tape {
    pub(super) replayer: Replayer,
    /// On a branch.
    pub(super) live: Option<Live>,
    pub(super) counts: ExitCounts,
    /// How far the machine may run.
    pub(super) limit: Position,
    /// The last boundary at which the CPU's state could be asked for.
    pub(super) clean: Position,
    /// Whether an exit has been taken since, so that the state may be half done.
    pub(super) in_exit: bool,
}

/// Where a tape stands, for snapshots.
#[derive(Clone)]
pub(super) struct TapeState {
    pub(super) cursor: Cursor,
    live: Option<Live>,
    counts: ExitCounts,
}

impl Tape {
    pub(super) fn new(replayer: Replayer) -> Self {
        Self {
            replayer,
            live: None,
            counts: ExitCounts::default(),
            limit: Position::NEVER,
            clean: Position::START,
            in_exit: false,
        }
    }

    pub(super) fn save(&self) -> TapeState {
        TapeState {
            cursor: self.replayer.cursor(),
            live: self.live.clone(),
            counts: self.counts.clone(),
        }
    }

    /// Goes to where `state` was saved, at `position`.
    pub(super) fn restore(&mut self, state: &TapeState, position: Position) {
        let TapeState {
            cursor,
            live,
            counts,
        } = state.clone();
        self.replayer.set_cursor(cursor);
        self.live = live;
        self.counts = counts;
        self.clean = position;
        self.in_exit = false;
    }

    pub(super) fn set_limit(&mut self, limit: Position) {
        self.limit = limit;
        self.replayer.set_limit(limit);
    }
}

impl Environment for Tape {
    fn now(&mut self) -> Result<Nanos, EnvironmentError> {
        match &self.live {
            Some(live) => Ok(live.now()),
            None => self.replayer.now(),
        }
    }

    fn entropy(&mut self, out: &mut [u8]) -> Result<(), EnvironmentError> {
        match &mut self.live {
            Some(live) => {
                live.entropy(out);
                Ok(())
            }
            None => self.replayer.entropy(out),
        }
    }

    fn output(&mut self, channel: Channel, bytes: &[u8]) -> Result<(), EnvironmentError> {
        self.replayer.output(channel, bytes)
    }

    fn exited(
        &mut self,
        vcpu: VcpuId,
        exit: &Exit,
        ordinal: SyncOrdinal,
        position: Option<Position>,
    ) -> Result<(), EnvironmentError> {
        self.in_exit = true;
        let guests = !matches!(
            exit,
            Exit::BoundReached | Exit::Breakpoint(_) | Exit::MonitorTrapFlag | Exit::Kicked
        );
        if guests {
            self.counts.add(exit, Duration::ZERO, Duration::ZERO);
        }
        match &mut self.live {
            Some(live) => {
                live.reached(position);
                Ok(())
            }
            None => self.replayer.exited(vcpu, exit, ordinal, position),
        }
    }

    fn boundary(&mut self, at: Boundary<'_>) -> Result<Directive, EnvironmentError> {
        if !at.incomplete {
            self.in_exit = false;
            self.clean = at.engine.position().unwrap_or(self.clean);
        }
        let mut directive = match &mut self.live {
            Some(live) => live.boundary(&at),
            None => return self.replayer.boundary(at),
        };
        if let Bound::Position(position) = &mut directive.bound {
            *position = self.limit.min(*position);
        }
        Ok(directive)
    }
}
