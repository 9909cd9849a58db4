//! Whether the moment of an arrival has come.
//!
//! Purpose: compare where the machine stands with a recorded moment, and say how far to run towards it.
//! Invariants: a moment is never passed unnoticed.
//! Elsewhere: matching one landmark with one boundary ([`super::search`]); how long to wait at all ([`super::patience`]).

use super::Cursor;
use super::search::Search;
use crate::divergence::{Difference, LandmarkMiss};
use crate::recorder::deliveries;
use crate::trace::Landmark;
use machine::engine::EngineError;
use machine::environment::{Bound, Boundary, EnvironmentError};
use x86::Position;

/// What looking for a moment came to.
pub(super) enum Sought {
    /// It is this boundary.
    Here,
    /// Not yet; run this far.
    Ahead(Bound),
    /// It cannot come any more.
    Passed(Difference),
}

pub(super) fn seek_position(
    at: &Boundary<'_>,
    position: Position,
    limit: Position,
) -> Result<Sought, EnvironmentError> {
    let now = at.engine.position().ok_or_else(|| cannot_count(at))?;
    Ok(match now.cmp(&position) {
        std::cmp::Ordering::Equal => Sought::Here,
        std::cmp::Ordering::Less => Sought::Ahead(Bound::Position(position.min(limit))),
        std::cmp::Ordering::Greater => {
            Sought::Passed(Difference::PassedPosition { recorded: position })
        }
    })
}

/// `found`: where it was, when it was found before. `patience`: where it is given up.
pub(super) fn seek_landmark(
    cursor: &mut Cursor,
    at: &mut Boundary<'_>,
    landmark: &Landmark,
    found: Option<Position>,
    patience: Position,
    limit: Position,
) -> Result<Sought, EnvironmentError> {
    let now = at.engine.position().ok_or_else(|| cannot_count(at))?;
    if let Some(found) = found.filter(|found| now < *found) {
        return Ok(Sought::Ahead(Bound::Position(found.min(limit))));
    }
    let record = cursor.next;
    let search = match &mut cursor.search {
        Some(search) if search.record == record => search,
        other => other.insert(Search::new(record)),
    };
    let delivered = deliveries(cursor.windows, at.cause);
    if search.matches(landmark, delivered, at.vcpu, at.engine, at.memory)? {
        return Ok(Sought::Here);
    }
    if now >= patience {
        let ended_by = format!("position {now}, where it was given up");
        let nearest = search.nearest.take();
        let miss = LandmarkMiss::new(landmark, ended_by, search.candidates, nearest);
        return Ok(Sought::Passed(Difference::NoLandmark(Box::new(miss))));
    }
    Ok(Sought::Ahead(Bound::Registers {
        registers: Box::new(landmark.registers.clone()),
        limit: patience.min(limit),
    }))
}

/// The error of a replay on an engine that does not count.
pub(super) fn cannot_count(at: &Boundary<'_>) -> EngineError {
    EngineError::CannotCount(at.engine.kind().name())
}
