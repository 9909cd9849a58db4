//! How long to wait for what the recording has next.
//!
//! Purpose: a replay that has left its recording without a sync point to show it must not run for ever.
//! Invariants: nothing a recording can hold is given up: the bound is far above what a processor executes in the time that passed, and where the
//! time is not known there is none (for a landmark, a very large one).
//! Elsewhere: what becomes of a replay that is given up ([`super`]).

use super::Cursor;
use crate::trace::{EndRecord, Record};
use machine::engine::EngineKind;
use machine::environment::Arrival;
use x86::Position;

/// More instructions than any processor retires in a nanosecond.
const MOST_PER_NANO: u64 = 64;
/// What is always waited for, whatever the clock says.
const GRACE: u64 = 1 << 24;
/// Instructions after which a landmark is given up when nothing is known of the time.
const LANDMARK: u64 = 1 << 36;

/// A wait under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait {
    /// Number of the record waited for.
    record: u64,
    /// Where it began.
    pub(super) from: Position,
    /// Where it is given up.
    pub(super) limit: Position,
}

impl Wait {
    /// A wait for `record`, which has number `cursor.next`, or for `end`. Time on `engine`, which recorded, was the host's if it is KVM.
    pub(super) fn new(
        cursor: &Cursor,
        from: Position,
        record: Option<&Record>,
        end: Option<&EndRecord>,
        engine: EngineKind,
    ) -> Self {
        let nanos = match record {
            _ if engine != EngineKind::Kvm => None,
            Some(
                Record::ClockRead { now, .. }
                | Record::Arrival {
                    arrival: Arrival::Time { now },
                    ..
                },
            ) => Some(now.since(cursor.last_time)),
            // The whole recording took that long.
            _ => end.map(|end| end.totals.host_nanos),
        };
        let instructions = match (nanos, record) {
            (Some(nanos), _) => GRACE.saturating_add(nanos.saturating_mul(MOST_PER_NANO)),
            (None, Some(Record::Arrival { .. })) => LANDMARK,
            (None, _) => {
                return Self {
                    record: cursor.next,
                    from,
                    limit: Position::NEVER,
                };
            }
        };
        let limit = Position {
            retired: from.retired.saturating_add(instructions),
            within: 0,
        };
        Self {
            record: cursor.next,
            from,
            limit,
        }
    }

    /// Whether this is the wait for record `record`.
    pub(super) fn is_for(&self, record: u64) -> bool {
        self.record == record
    }
}
