//! Going live: what a machine is fed once it has left its recording.
//!
//! Purpose: an environment for a branch of a timeline: virtual time goes on from where the log told it last, and nothing else arrives.
//! Invariants: everything follows from the instruction count, so that a branch, too, goes the same way each time. A halted guest's
//! time jumps to its next deadline; one that nothing can wake is stopped.
//! Elsewhere: output, which the timeline collects ([`super::tape`]).

use machine::environment::{Arrival, Bound, Boundary, Directive};
use x86::{Instructions, Nanos, Position};

/// Virtual nanoseconds per instruction: a processor of about 1 GHz that retires one instruction per cycle.
const NANOS_PER_INSTRUCTION: u64 = 1;

/// The environment of a branch.
#[derive(Clone, Debug)]
pub(super) struct Live {
    /// Virtual time at `from`.
    base: Nanos,
    from: Instructions,
    /// Instructions retired, as far as known.
    at: Instructions,
    random: u64,
}

impl Live {
    /// Takes over at `position`, when the log last told the time `now`.
    pub(super) fn new(position: Position, now: Nanos) -> Self {
        let at = position.retired;
        Self {
            base: now,
            from: at,
            at,
            random: at.get(),
        }
    }

    /// The guest has come this far.
    pub(super) fn reached(&mut self, position: Option<Position>) {
        if let Some(position) = position {
            self.at = position.retired;
        }
    }

    pub(super) fn now(&self) -> Nanos {
        self.base.saturating_add(
            self.at
                .since(self.from)
                .saturating_mul(NANOS_PER_INSTRUCTION),
        )
    }

    /// Bytes that look random and are the same each time (SplitMix64).
    pub(super) fn entropy(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.random;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            for (out, byte) in chunk.iter_mut().zip((z ^ (z >> 31)).to_le_bytes()) {
                *out = byte;
            }
        }
    }

    pub(super) fn boundary(&mut self, at: &Boundary<'_>) -> Directive {
        self.reached(at.engine.position());
        if at.halted {
            let arrival = match at.deadline {
                Some(deadline) => {
                    self.base = deadline.max(self.now());
                    self.from = self.at;
                    Arrival::Time { now: self.base }
                }
                None => Arrival::Stop,
            };
            return Directive {
                arrivals: vec![arrival],
                bound: Bound::Exit,
            };
        }
        let now = self.now();
        let Some(deadline) = at.deadline else {
            return Directive::default();
        };
        if deadline <= now {
            return Directive {
                arrivals: vec![Arrival::Time { now }],
                bound: Bound::Exit,
            };
        }
        let instructions = deadline.since(now).div_ceil(NANOS_PER_INSTRUCTION);
        let position = Position {
            retired: self.at.saturating_add(instructions),
            within: 0,
        };
        Directive {
            arrivals: Vec::new(),
            bound: Bound::Position(position),
        }
    }
}
