//! Going back.
//!
//! Purpose: one boundary back, and back to the last breakpoint, by restoring and running forward.
//! Invariants: a search can be interrupted by its time slice and goes on with the same call; whatever happens, the machine stands
//! no later than where the search began.
//! Elsewhere: snapshots ([`super::snapshots`]).

use super::{Reached, Timeline, earlier};
use machine::debuggable::{DebugError, Reverse, Stop};
use std::time::{Duration, Instant};
use x86::{GuestVirtAddr, Position, VcpuId};

/// Where a step back takes its own snapshot: this many instructions before its goal, so that the next step back is short.
const APPROACH: u64 = 20_000;

/// A search backwards under way.
pub(super) enum Backward {
    /// One boundary back from `origin`.
    Step { origin: Position, phase: StepPhase },
    /// To a breakpoint before `origin`.
    Continue {
        origin: Position,
        phase: ContinuePhase,
    },
}

/// How far a step back has come.
#[derive(Clone, Copy)]
pub(super) enum StepPhase {
    /// On the way to the last boundary known to be before the origin.
    Approach(Position),
    /// From there on boundary by boundary, as the way between is not known.
    Walk,
    /// On the way to the last boundary before the origin.
    Settle(Position),
}

/// How far a search for a breakpoint has come.
#[derive(Clone, Copy)]
pub(super) enum ContinuePhase {
    /// Begin with the stretch that ends here.
    Before(Position),
    /// Running from `from` to `end`; the last breakpoint met.
    Scan {
        from: Position,
        end: Position,
        hit: Option<(Position, GuestVirtAddr)>,
    },
    /// On the way to the breakpoint that was found.
    Settle(Position, GuestVirtAddr),
}

impl Timeline {
    /// Runs to `target` without breakpoints; `Some` when something came first.
    fn towards(&mut self, target: Position, until: Instant) -> Result<Option<Stop>, DebugError> {
        Ok(match self.forward(target, Some(until), false)? {
            Reached::Target => None,
            Reached::Slice => Some(Stop::Slice),
            Reached::Stop(stop) => Some(stop),
        })
    }

    /// Goes back to a snapshot from which `goal` is reached forward.
    fn back_to(&mut self, goal: Position) -> Result<(), DebugError> {
        if self.here() > goal {
            self.restore(goal)?;
        }
        Ok(())
    }

    /// As [`Self::towards`], leaving a snapshot shortly before the goal.
    fn approach(&mut self, goal: Position, until: Instant) -> Result<Option<Stop>, DebugError> {
        self.back_to(goal)?;
        let camp = earlier(goal, APPROACH);
        let far = self
            .snapshots
            .position_before(goal)
            .is_none_or(|snapshot| camp.retired.since(snapshot.retired) > APPROACH);
        if far && self.here() <= camp {
            if let Some(stop) = self.towards(camp, until)? {
                return Ok(Some(stop));
            }
            self.snapshots.take(&mut self.session)?;
        }
        self.towards(goal, until)
    }

    fn step_back_from(
        &mut self,
        origin: Position,
        mut phase: StepPhase,
        until: Instant,
    ) -> Result<Stop, DebugError> {
        loop {
            // Kept before each move, so that a slice can end anywhere in it.
            self.backward = Some(Backward::Step { origin, phase });
            phase = match phase {
                StepPhase::Approach(goal) => {
                    if let Some(stop) = self.approach(goal, until)? {
                        return Ok(stop);
                    }
                    self.snapshots.take(&mut self.session)?;
                    StepPhase::Walk
                }
                StepPhase::Walk => {
                    let before = self.here();
                    match self.step()? {
                        Reached::Target if self.here() < origin => {
                            if Instant::now() >= until {
                                return Ok(Stop::Slice);
                            }
                            StepPhase::Walk
                        }
                        // The origin itself, or whatever stops the machine there.
                        _ => StepPhase::Settle(before),
                    }
                }
                StepPhase::Settle(goal) => {
                    self.back_to(goal)?;
                    let stop = self.towards(goal, until)?;
                    if stop != Some(Stop::Slice) {
                        self.backward = None;
                    }
                    return Ok(stop.unwrap_or(Stop::Stepped));
                }
            };
        }
    }

    fn continue_back_from(
        &mut self,
        origin: Position,
        mut phase: ContinuePhase,
        until: Instant,
    ) -> Result<Stop, DebugError> {
        loop {
            self.backward = Some(Backward::Continue { origin, phase });
            phase = match phase {
                ContinuePhase::Before(end) => match self.begin_scan(end)? {
                    Some(scan) => scan,
                    None => {
                        self.restore(Position::START)?;
                        self.backward = None;
                        return Ok(Stop::StartOfHistory);
                    }
                },
                ContinuePhase::Scan { from, end, hit } => {
                    match self.forward(end, Some(until), true)? {
                        Reached::Slice => return Ok(Stop::Slice),
                        Reached::Stop(Stop::Breakpoint(_, addr)) if self.here() < end => {
                            let hit = Some((self.here(), addr));
                            self.scan_on(from, end, hit)?
                        }
                        // The end of the stretch, or what stops the machine there.
                        _ => scanned(from, hit),
                    }
                }
                ContinuePhase::Settle(goal, addr) => {
                    self.back_to(goal)?;
                    let stop = self.towards(goal, until)?;
                    if stop != Some(Stop::Slice) {
                        self.backward = None;
                    }
                    return Ok(stop.unwrap_or(Stop::Breakpoint(VcpuId::BOOT, addr)));
                }
            };
        }
    }

    /// Stands at the start of the last stretch that ends at `end`; `None` when there is no stretch before.
    fn begin_scan(&mut self, end: Position) -> Result<Option<ContinuePhase>, DebugError> {
        let before_end = match (end.retired.get(), end.within) {
            (0, 0) => return Ok(None),
            (_, 0) => Position {
                within: u64::MAX,
                ..earlier(end, 1)
            },
            (_, within) => Position {
                within: within - 1,
                ..end
            },
        };
        let Some(from) = self.snapshots.position_before(before_end) else {
            return Ok(None);
        };
        self.restore(from)?;
        let hit = self.breakpoint_here()?.map(|addr| (from, addr));
        self.scan_on(from, end, hit).map(Some)
    }

    /// Off the present instruction, whose breakpoint has been seen, and on with the scan.
    fn scan_on(
        &mut self,
        from: Position,
        end: Position,
        hit: Option<(Position, GuestVirtAddr)>,
    ) -> Result<ContinuePhase, DebugError> {
        let Reached::Target = self.step()? else {
            return Ok(scanned(from, hit));
        };
        if self.here() >= end {
            return Ok(scanned(from, hit));
        }
        // The engine reports a breakpoint at the first instruction of a run as well.
        Ok(ContinuePhase::Scan { from, end, hit })
    }
}

/// A stretch has been run through.
fn scanned(from: Position, hit: Option<(Position, GuestVirtAddr)>) -> ContinuePhase {
    match hit {
        Some((position, addr)) => ContinuePhase::Settle(position, addr),
        None => ContinuePhase::Before(from),
    }
}

impl Reverse for Timeline {
    fn step_back(&mut self, _vcpu: VcpuId, slice: Duration) -> Result<Stop, DebugError> {
        let until = Instant::now() + slice;
        if let Some(Backward::Step { origin, phase }) = self.backward {
            return self.step_back_from(origin, phase, until);
        }
        self.prepare()?;
        let origin = self.here();
        let phase = match (origin.retired.get(), origin.within) {
            (0, 0) => return Ok(Stop::StartOfHistory),
            (retired, 0) => StepPhase::Approach(Position::at(retired - 1)),
            (_, within) => StepPhase::Settle(Position {
                within: within - 1,
                ..origin
            }),
        };
        self.step_back_from(origin, phase, until)
    }

    fn continue_back(&mut self, slice: Duration) -> Result<Stop, DebugError> {
        let until = Instant::now() + slice;
        if let Some(Backward::Continue { origin, phase }) = self.backward {
            return self.continue_back_from(origin, phase, until);
        }
        self.prepare()?;
        let origin = self.here();
        self.continue_back_from(origin, ContinuePhase::Before(origin), until)
    }

    fn seek(&mut self, position: Position, slice: Duration) -> Result<Stop, DebugError> {
        Timeline::seek(self, position, slice)
    }
}
