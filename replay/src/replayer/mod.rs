//! The replayer: an environment that gives a recording's answers back.
//!
//! Purpose: feed a machine what it was fed when it was recorded, at the same moments, and compare what it does with what it did.
//! Invariants:
//! - The log is consumed strictly in order; anything that does not fit its next record is a [`Divergence`].
//! - Every digest on the way is compared. Everything else is compared when the machine has ended (`verify_end`).
//! - A moment is found exactly: at its sync point, at its position, or at the first boundary that matches its landmark.
//!
//! Elsewhere: the loop ([`machine::session`]), which delivers; moving along the timeline ([`crate::timeline`]).

mod compare;
mod moment;
mod patience;
mod search;

use crate::digest::{ConsoleDigest, Digest, ExitDigest};
use crate::divergence::{Difference, Divergence, LandmarkMiss, Mark, StateDifference};
use crate::finish::FinalState;
use crate::trace::{EndRecord, Log, Moment, Record, Trace, TraceError};
use compare::{compare, compare_end};
use machine::End;
use machine::engine::EngineKind;
use machine::environment::{
    Arrival, Bound, Boundary, Channel, Directive, Environment, EnvironmentError, SyncOrdinal,
};
use moment::{Sought, cannot_count, seek_landmark, seek_position};
use patience::Wait;
use search::Search;
use std::collections::BTreeMap;
use x86::{Exit, Nanos, Position, VcpuId};

/// Where a replay stands in its log: what a checkpoint must hold besides the machine.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cursor {
    /// Number of the next record.
    pub(crate) next: u64,
    /// Sync points passed.
    ordinal: SyncOrdinal,
    exits: ExitDigest,
    console: ConsoleDigest,
    /// Interrupt windows since the last sync point.
    windows: u64,
    /// Arrivals delivered.
    pub(crate) arrivals: u64,
    /// The last place known to agree.
    since: Mark,
    search: Option<Search>,
    wait: Option<Wait>,
    /// The last virtual time in the log.
    pub(crate) last_time: Nanos,
    /// Digests compared.
    pub(crate) verified: u64,
    /// Length of the output so far.
    output: usize,
}

/// An environment that replays. See the module's invariants.
pub struct Replayer {
    log: Log,
    end: Option<EndRecord>,
    at: Cursor,
    /// All output, of every channel, in order. May be longer than [`Cursor::output`] after going back.
    output: Vec<u8>,
    /// Where moments were found, by number of their record: the second time there is nothing to search.
    found: BTreeMap<u64, Position>,
    /// Positions of the arrivals delivered since they were last asked for, by number of the arrival.
    placed: Vec<(u64, Position)>,
    /// How far the machine may run at most.
    limit: Position,
    /// Which engine recorded.
    recorded_on: EngineKind,
}

impl Replayer {
    /// Replays the log of `trace` from its start.
    pub fn new(trace: Trace) -> Self {
        Self::over(trace.log, trace.end, trace.machine.engine)
    }

    pub(crate) fn over(log: Log, end: Option<EndRecord>, recorded_on: EngineKind) -> Self {
        Self {
            log,
            end,
            at: Cursor::default(),
            output: Vec::new(),
            found: BTreeMap::new(),
            placed: Vec::new(),
            limit: Position::NEVER,
            recorded_on,
        }
    }

    /// All output so far.
    pub fn console(&self) -> &[u8] {
        self.output.get(..self.at.output).unwrap_or_default()
    }

    /// Digest of the output so far.
    pub fn console_digest(&self) -> Digest {
        self.at.console.digest()
    }

    /// Digests compared so far, and found equal.
    pub fn verified(&self) -> u64 {
        self.at.verified
    }

    /// Arrivals delivered so far.
    pub fn arrivals(&self) -> u64 {
        self.at.arrivals
    }

    /// The last virtual time the log has told.
    pub fn last_time(&self) -> Nanos {
        self.at.last_time
    }

    /// How the recording ended, if it has its end.
    pub fn recorded_end(&self) -> Option<&EndRecord> {
        self.end.as_ref()
    }

    /// No run goes beyond this position from now on (but it may be passed while an instruction is completed).
    pub(crate) fn set_limit(&mut self, limit: Position) {
        self.limit = limit;
    }

    pub(crate) fn cursor(&self) -> Cursor {
        self.at.clone()
    }

    /// Goes to where `cursor` was taken. What was found stays known.
    pub(crate) fn set_cursor(&mut self, cursor: Cursor) {
        self.at = cursor;
    }

    /// Positions of arrivals delivered since the last call, by number of the arrival.
    pub(crate) fn take_placed(&mut self) -> std::vec::Drain<'_, (u64, Position)> {
        self.placed.drain(..)
    }

    fn append(&mut self, bytes: &[u8]) {
        // Having gone back, what follows here is written again.
        self.output.truncate(self.at.output);
        self.output.extend_from_slice(bytes);
        self.at.output = self.output.len();
    }

    /// Compares the state of a machine that has ended with the end of the recording.
    pub(crate) fn verify_end(
        &mut self,
        replayed: End,
        ordinal: SyncOrdinal,
        state: &FinalState,
    ) -> Result<(), EnvironmentError> {
        let here = Mark {
            after: ordinal,
            position: state.position,
        };
        if let Some(record) = self.peek()? {
            let expected = record.to_string();
            return Err(self.diverged(here, Difference::EndedEarly { replayed, expected }));
        }
        let Some(recorded) = &self.end else {
            return Err(EnvironmentError::EndOfTrace);
        };
        if (recorded.end, recorded.after) != (replayed, ordinal) {
            let recorded = recorded.end;
            let what = if recorded == replayed {
                let expected = format!("the same end at sync point {}", self.end_ordinal());
                Difference::EndedEarly { replayed, expected }
            } else {
                Difference::OtherEnd { recorded, replayed }
            };
            return Err(self.diverged(here, what));
        }
        let difference = compare_end(recorded, state, &self.at);
        if difference.only_at_end() {
            self.at.since = Mark::default();
        }
        self.agree(here, difference)
    }

    fn end_ordinal(&self) -> SyncOrdinal {
        self.end
            .as_ref()
            .map_or_else(SyncOrdinal::default, |end| end.after)
    }

    fn peek(&mut self) -> Result<Option<&Record>, EnvironmentError> {
        self.log.get(self.at.next).map_err(unreadable)
    }

    fn diverged(&self, at: Mark, what: Difference) -> EnvironmentError {
        EnvironmentError::Diverged(Box::new(Divergence {
            since: self.at.since,
            at,
            what,
        }))
    }

    /// What the recording has next, in words.
    fn expected(&mut self) -> Result<String, EnvironmentError> {
        if let Some(record) = self.peek()? {
            return Ok(record.to_string());
        }
        Ok(match &self.end {
            Some(end) => format!("its end ({}) after sync point {}", end.end, end.after),
            None => "nothing more".to_owned(),
        })
    }

    /// The guest asked for something that is not the next record.
    fn unexpected(&mut self, asked: String) -> EnvironmentError {
        if self.at.next >= self.log.len() && self.end.is_none() {
            return EnvironmentError::EndOfTrace;
        }
        match self.expected() {
            Ok(expected) => {
                let here = Mark {
                    after: self.at.ordinal,
                    position: None,
                };
                self.diverged(here, Difference::Unexpected { asked, expected })
            }
            Err(error) => error,
        }
    }

    /// A sync point was reached while the log has something for an earlier one.
    fn missed(&mut self, here: Mark, exit: &Exit) -> EnvironmentError {
        let instead = format!("sync point {} ({exit})", here.after);
        let record = match self.log.get(self.at.next) {
            Ok(Some(record)) => record,
            Ok(None) => return EnvironmentError::EndOfTrace,
            Err(error) => return unreadable(error),
        };
        let what = match record {
            Record::Arrival {
                moment: Moment::Landmark(landmark),
                ..
            } => {
                let search = self.at.search.take().filter(|s| s.record == self.at.next);
                let (candidates, nearest) =
                    search.map_or((0, None), |search| (search.candidates, search.nearest));
                let miss = LandmarkMiss::new(landmark, instead, candidates, nearest);
                Difference::NoLandmark(Box::new(miss))
            }
            record => Difference::Missed {
                expected: record.to_string(),
                instead,
            },
        };
        self.diverged(here, what)
    }

    /// How long the next record is waited for.
    fn wait(&mut self, now: Position) -> Result<Wait, EnvironmentError> {
        let index = self.at.next;
        if let Some(wait) = self.at.wait.filter(|wait| wait.is_for(index)) {
            return Ok(wait);
        }
        let record = self.log.get(index).map_err(unreadable)?;
        let wait = Wait::new(&self.at, now, record, self.end.as_ref(), self.recorded_on);
        self.at.wait = Some(wait);
        Ok(wait)
    }

    /// Everything the log has for this boundary, and how far to run then.
    fn deliver(
        &mut self,
        at: &mut Boundary<'_>,
        arrivals: &mut Vec<Arrival>,
    ) -> Result<Bound, EnvironmentError> {
        let now = at.engine.position().ok_or_else(|| cannot_count(at))?;
        let here = Mark {
            after: at.ordinal,
            position: Some(now),
        };
        loop {
            let index = self.at.next;
            let patience = self.wait(now)?.limit;
            let Some(record) = self.log.get(index).map_err(unreadable)? else {
                return self.exhausted(at, here, !arrivals.is_empty());
            };
            if record.after() > at.ordinal {
                return self.go_on(at, here, !arrivals.is_empty());
            }
            let sought = match record {
                Record::Arrival {
                    moment: Moment::Sync | Moment::Same,
                    ..
                } => Sought::Here,
                Record::Arrival { .. } | Record::Digest { .. } if at.incomplete => {
                    return Ok(Bound::Completed);
                }
                Record::Arrival {
                    moment: Moment::Landmark(landmark),
                    ..
                } => {
                    let found = self.found.get(&index).copied();
                    seek_landmark(&mut self.at, at, landmark, found, patience, self.limit)?
                }
                Record::Arrival {
                    moment: Moment::Position(position),
                    ..
                } => seek_position(at, *position, self.limit)?,
                // What has arrived here must have reached the devices first: a run of no length.
                Record::Digest { .. } if !arrivals.is_empty() => return Ok(Bound::Position(now)),
                Record::Digest { digest, .. } => {
                    let difference = compare(digest, at, &self.at)?;
                    self.agree(here, difference)?;
                    self.at.next += 1;
                    continue;
                }
                Record::ClockRead { .. } | Record::Entropy { .. } => {
                    let expected = record.to_string();
                    let instead = "go on without it".to_owned();
                    return Err(self.diverged(here, Difference::Missed { expected, instead }));
                }
            };
            match sought {
                Sought::Ahead(bound) => return Ok(bound),
                Sought::Passed(what) => return Err(self.diverged(here, what)),
                Sought::Here => self.arrive(index, now, arrivals)?,
            }
        }
    }

    /// Notes that replay and recording agree here, unless they do not.
    fn agree(&mut self, here: Mark, difference: StateDifference) -> Result<(), EnvironmentError> {
        if !difference.is_empty() {
            return Err(self.diverged(here, Difference::State(Box::new(difference))));
        }
        self.at.verified += 1;
        self.at.since = here;
        Ok(())
    }

    /// Delivers record `index`, an arrival.
    fn arrive(
        &mut self,
        index: u64,
        now: Position,
        arrivals: &mut Vec<Arrival>,
    ) -> Result<(), EnvironmentError> {
        let Some(Record::Arrival {
            arrival, moment, ..
        }) = self.log.get(index).map_err(unreadable)?
        else {
            return Ok(());
        };
        if let Arrival::Time { now } = *arrival {
            self.at.last_time = now;
        }
        if matches!(moment, Moment::Landmark(_)) {
            self.found.insert(index, now);
        }
        self.placed.push((self.at.arrivals, now));
        arrivals.push(arrival.clone());
        self.at.search = None;
        self.at.arrivals += 1;
        self.at.next += 1;
        Ok(())
    }

    /// Nothing more happens here; the next record belongs to a later sync point.
    fn go_on(
        &mut self,
        at: &Boundary<'_>,
        here: Mark,
        delivered: bool,
    ) -> Result<Bound, EnvironmentError> {
        if at.halted && !delivered {
            let expected = self.expected()?;
            return Err(self.diverged(here, Difference::Asleep { expected }));
        }
        let Some(now) = here.position else {
            return Ok(Bound::Exit);
        };
        let Wait { from, limit, .. } = self.wait(now)?;
        if now >= limit && !at.incomplete {
            let expected = self.expected()?;
            let instructions = now.retired.since(from.retired);
            return Err(self.diverged(
                here,
                Difference::Overdue {
                    expected,
                    instructions,
                },
            ));
        }
        Ok(if limit == Position::NEVER {
            Bound::Exit
        } else {
            Bound::Position(limit.min(self.limit))
        })
    }

    /// The log is at its end.
    fn exhausted(
        &mut self,
        at: &Boundary<'_>,
        here: Mark,
        delivered: bool,
    ) -> Result<Bound, EnvironmentError> {
        if self.end.is_some() {
            return self.go_on(at, here, delivered);
        }
        if at.incomplete {
            return Ok(Bound::Completed);
        }
        match here.position {
            // What arrived last is delivered by a run of no length.
            Some(position) if delivered => Ok(Bound::Position(position)),
            _ => Err(EnvironmentError::EndOfTrace),
        }
    }
}

fn unreadable(error: TraceError) -> EnvironmentError {
    EnvironmentError::Io {
        what: "the trace can no longer be read".to_owned(),
        source: std::io::Error::other(error),
    }
}

impl Environment for Replayer {
    fn now(&mut self) -> Result<Nanos, EnvironmentError> {
        let ordinal = self.at.ordinal;
        match self.peek()? {
            Some(&Record::ClockRead { after, now }) if after == ordinal => {
                self.at.next += 1;
                self.at.last_time = now;
                Ok(now)
            }
            _ => Err(self.unexpected(format!("read the clock at sync point {ordinal}"))),
        }
    }

    fn entropy(&mut self, out: &mut [u8]) -> Result<(), EnvironmentError> {
        let ordinal = self.at.ordinal;
        match self.peek()? {
            Some(Record::Entropy { after, bytes })
                if *after == ordinal && bytes.len() == out.len() =>
            {
                out.copy_from_slice(bytes);
                self.at.next += 1;
                Ok(())
            }
            _ => {
                let wanted = out.len();
                Err(self.unexpected(format!(
                    "drew {wanted} bytes of entropy at sync point {ordinal}"
                )))
            }
        }
    }

    fn output(&mut self, channel: Channel, bytes: &[u8]) -> Result<(), EnvironmentError> {
        self.at.console.add(channel, bytes);
        self.append(bytes);
        Ok(())
    }

    fn exited(
        &mut self,
        _vcpu: VcpuId,
        exit: &Exit,
        ordinal: SyncOrdinal,
        position: Option<Position>,
    ) -> Result<(), EnvironmentError> {
        self.at.windows += u64::from(*exit == Exit::InterruptWindow);
        if ordinal == self.at.ordinal {
            return Ok(());
        }
        self.at.ordinal = ordinal;
        self.at.windows = 0;
        self.at.exits.add(exit);
        let here = Mark {
            after: ordinal,
            position,
        };
        match self.peek()? {
            Some(record) if record.after() < ordinal => Err(self.missed(here, exit)),
            Some(_) => Ok(()),
            None => match &self.end {
                Some(end) if ordinal > end.after => {
                    let recorded = end.end;
                    let instead = format!("sync point {ordinal} ({exit})");
                    Err(self.diverged(here, Difference::PastEnd { recorded, instead }))
                }
                _ => Ok(()),
            },
        }
    }

    fn boundary(&mut self, mut at: Boundary<'_>) -> Result<Directive, EnvironmentError> {
        let mut arrivals = Vec::new();
        let bound = self.deliver(&mut at, &mut arrivals)?;
        Ok(Directive { arrivals, bound })
    }
}
