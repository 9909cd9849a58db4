//! Virtual time of a live run.
//!
//! Purpose: nanoseconds since power-on, from the host's monotonic clock or from the instructions executed.
//! Invariants: it never runs backwards. On the host's clock it stands still while the machine is paused. On the instruction
//! clock it is a function of the engine's position and of the idle time skipped, and of nothing else.
//! Elsewhere: recorded time (`replay`).

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use x86::{Nanos, Position};

const NANOS_PER_SECOND: u128 = 1_000_000_000;

/// Where virtual time comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Clock {
    /// The host's monotonic clock.
    #[default]
    Host,
    /// Instructions executed, at this many a second; a halted CPU skips to the next deadline. Needs an engine that counts.
    Instructions {
        /// Instructions in one second of virtual time.
        per_second: NonZeroU64,
    },
}

/// What the host's clock and a pause share.
#[derive(Default)]
pub(super) struct Pauses {
    /// Nanoseconds of pauses so far.
    total: AtomicU64,
    /// Counts pauses that ended, so that alarms set before one can be told from those after it.
    ended: AtomicU64,
}

impl Pauses {
    pub(super) fn add(&self, pause: Duration) {
        self.total.fetch_add(nanos(pause), Ordering::Relaxed);
        self.ended.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn ended(&self) -> u64 {
        self.ended.load(Ordering::Relaxed)
    }

    fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Virtual time on the host's clock.
pub(super) struct HostClock {
    origin: Instant,
    /// The latest reading.
    last: Nanos,
    start: Nanos,
    pauses: Arc<Pauses>,
}

impl HostClock {
    pub(super) fn new(start: Nanos, pauses: Arc<Pauses>) -> Self {
        Self {
            origin: Instant::now(),
            last: start,
            start,
            pauses,
        }
    }

    pub(super) fn now(&mut self) -> Nanos {
        let elapsed = nanos(self.origin.elapsed());
        let run = elapsed.saturating_sub(self.pauses.total());
        self.last = self.last.max(self.start.saturating_add(run));
        self.last
    }

    pub(super) fn pauses_ended(&self) -> u64 {
        self.pauses.ended()
    }
}

/// Virtual time by instructions.
pub(super) struct InstructionClock {
    per_second: NonZeroU64,
    /// Virtual time at `from`.
    start: Nanos,
    from: Position,
    at: Position,
    /// Idle time skipped, in nanoseconds.
    skipped: u64,
}

impl InstructionClock {
    pub(super) fn new(per_second: NonZeroU64, start: Nanos, from: Position) -> Self {
        Self {
            per_second,
            start,
            from,
            at: from,
            skipped: 0,
        }
    }

    /// The engine stands here.
    pub(super) fn set_position(&mut self, at: Position) {
        self.at = self.at.max(at);
    }

    /// Virtual time without what the instructions since `from` took.
    fn base(&self) -> Nanos {
        self.start.saturating_add(self.skipped)
    }

    pub(super) fn now(&self) -> Nanos {
        let retired = self.at.retired.since(self.from.retired);
        let took = u128::from(retired) * NANOS_PER_SECOND / u128::from(self.per_second.get());
        self.base()
            .saturating_add(u64::try_from(took).unwrap_or(u64::MAX))
    }

    /// Skips to `deadline`, if it is ahead.
    pub(super) fn skip_to(&mut self, deadline: Nanos) {
        self.skipped = self.skipped.saturating_add(deadline.since(self.now()));
    }

    /// One instruction on.
    pub(super) fn next_position(&self) -> Position {
        Position {
            retired: self.at.retired.saturating_add(1),
            within: 0,
        }
    }

    /// The first position at which `deadline` has come, if instructions alone pass.
    pub(super) fn position_of(&self, deadline: Nanos) -> Position {
        let nanos = u128::from(deadline.since(self.base()));
        let retired = (nanos * u128::from(self.per_second.get())).div_ceil(NANOS_PER_SECOND);
        let retired = u64::try_from(retired).unwrap_or(u64::MAX);
        Position {
            retired: self.from.retired.saturating_add(retired),
            within: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock(per_second: u64, start: u64, from: u64) -> InstructionClock {
        let per_second = NonZeroU64::new(per_second).expect("not zero");
        InstructionClock::new(per_second, Nanos::new(start), Position::at(from))
    }

    #[test]
    fn a_deadline_comes_exactly_at_its_position() {
        for per_second in [1, 3, 1_000_000_000, 7_777_777_777] {
            for deadline in [501, 1000, 1_000_000, 5_000_000_001].map(Nanos::new) {
                let mut clock = clock(per_second, 500, 10);
                let due = clock.position_of(deadline);
                assert!(due.retired.get() > 10);
                clock.set_position(Position::at(due.retired.get() - 1));
                assert!(clock.now() < deadline, "{per_second} {deadline}");
                clock.set_position(due);
                assert!(clock.now() >= deadline, "{per_second} {deadline}");
            }
        }
    }

    #[test]
    fn skipping_idle_time_moves_later_deadlines_nearer() {
        let mut clock = clock(1_000_000_000, 0, 0);
        clock.set_position(Position::at(100));
        clock.skip_to(Nanos::new(1000));
        assert_eq!(clock.now(), Nanos::new(1000));
        clock.skip_to(Nanos::new(10));
        assert_eq!(clock.now(), Nanos::new(1000), "never backwards");
        assert_eq!(clock.position_of(Nanos::new(1050)), Position::at(150));
    }

    #[test]
    fn extreme_numbers_saturate() {
        let mut clock = clock(u64::MAX, u64::MAX, 0);
        clock.set_position(Position::at(u64::MAX));
        assert_eq!(clock.now(), Nanos::NEVER);
        clock.skip_to(Nanos::NEVER);
        assert_eq!(clock.position_of(Nanos::NEVER), Position::at(0));
        let slow = self::clock(1, 0, 5);
        assert_eq!(slow.position_of(Nanos::new(1)), Position::at(6));
    }

    #[test]
    fn pauses_do_not_count_on_the_hosts_clock() {
        let pauses = Arc::new(Pauses::default());
        let mut clock = HostClock::new(Nanos::new(7), Arc::clone(&pauses));
        let before = clock.now();
        assert!(before >= Nanos::new(7));
        pauses.add(Duration::from_secs(1_000_000));
        assert_eq!(clock.now(), before, "all of it was a pause");
        assert_eq!(clock.pauses_ended(), 1);
    }
}
