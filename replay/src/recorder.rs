//! The recorder: any environment, with everything it answers written to a trace.
//!
//! Purpose: wrap a live [`Environment`]; log its answers by order, its arrivals with the moment at which they were delivered, and, now and then, digests
//! of the machine, so that a replay can be fed the same and compared.
//! Invariants:
//! - What the guest gets is what the wrapped environment answered, at the same moments; two things only are added: a run is sometimes
//!   bounded by [`Bound::Completed`] so that the state can be looked at, and a stop waits for the instruction in progress.
//! - A record is in the log before its effect reaches the guest, and in the file at most [`RecordOptions::flush_interval`] of activity later.
//! - Nothing on the path of an exit allocates or formats; the rolling digest takes three multiplications.
//! - A failed write ends the recording with an error that names the file; what was written before stays a valid prefix.
//!
//! Elsewhere: the file ([`crate::trace`]), reading it back ([`crate::replayer`]).

use crate::digest::{
    ConsoleDigest, CpuDigest, Digest, ExitDigest, board_digest, canonical_registers,
};
use crate::finish::FinalState;
use crate::trace::{
    DigestRecord, EndRecord, HostCpu, Landmark, MachineRecord, Moment, PageDigest, Record, Totals,
    TraceWriter, WriteTraceError,
};
use machine::engine::{Engine, EngineError, EngineKind};
use machine::environment::{
    Arrival, Bound, Boundary, Channel, Directive, Environment, EnvironmentError, SyncOrdinal,
};
use machine::session::Session;
use machine::{GuestMemory, MachineConfig, PageSet};
use std::time::{Duration, Instant};
use x86::{Exit, Nanos, Position, VcpuId};

/// How often things are written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecordOptions {
    /// A digest is taken at the first sync point this long after the last.
    pub digest_interval: Duration,
    /// And at the first that is this many sync points after it.
    pub digest_sync_points: u64,
    /// But never sooner than this many times as long as the last one took: bounds the share of time they cost.
    pub digest_spacing: u32,
    /// Records are written to the file at the first boundary this long after the last write.
    pub flush_interval: Duration,
}

impl Default for RecordOptions {
    fn default() -> Self {
        Self {
            digest_interval: Duration::from_millis(200),
            digest_sync_points: 16384,
            digest_spacing: 50,
            flush_interval: Duration::from_millis(100),
        }
    }
}

/// Why a recording could not be brought to its end.
#[derive(Debug, thiserror::Error)]
pub enum FinishError {
    /// The machine still runs.
    #[error("the machine has not ended, so that its recording cannot be finished")]
    NotEnded,
    /// The last state could not be read.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The file could not be written.
    #[error(transparent)]
    Write(#[from] WriteTraceError),
}

impl From<WriteTraceError> for EnvironmentError {
    fn from(error: WriteTraceError) -> Self {
        Self::Io {
            what: format!("cannot write the trace {}", error.name),
            source: error.source,
        }
    }
}

impl MachineRecord {
    /// The description of a machine that is recorded here and now on `engine`.
    pub fn of(config: &MachineConfig, engine: EngineKind) -> Self {
        let MachineConfig {
            memory,
            cpu_model,
            board,
            kernel: _,
            cmdline,
        } = config;
        Self {
            chronovisor: env!("CARGO_PKG_VERSION").to_owned(),
            engine,
            host: HostCpu::detect(),
            memory: *memory,
            cpu: *cpu_model,
            board: board.clone(),
            cmdline: cmdline.clone(),
            images: 0,
        }
    }
}

/// An environment that is being recorded. See the module's invariants.
pub struct Recorder<E> {
    inner: E,
    trace: TraceWriter,
    options: RecordOptions,
    ordinal: SyncOrdinal,
    exits: ExitDigest,
    console: ConsoleDigest,
    /// Interrupt windows since the last sync point.
    windows: u64,
    /// Pages written since the last digest, as far as they were asked for.
    dirty: PageSet,
    /// The start has been digested.
    begun: bool,
    /// A digest waits for the instruction in progress.
    digest_wanted: bool,
    /// A stop waits for it.
    stopping: bool,
    last_digest: DigestTaken,
    flushed: Instant,
    started: Instant,
    totals: Totals,
}

/// When the last digest was taken, and what it cost.
struct DigestTaken {
    ordinal: SyncOrdinal,
    at: Instant,
    cost: Duration,
}

impl<E: Environment> Recorder<E> {
    /// Records `inner` into `trace`. The machine must stand at its start.
    pub fn new(inner: E, trace: TraceWriter, options: RecordOptions) -> Self {
        let now = Instant::now();
        let ordinal = SyncOrdinal::default();
        Self {
            inner,
            trace,
            options,
            ordinal,
            exits: ExitDigest::default(),
            console: ConsoleDigest::default(),
            windows: 0,
            dirty: PageSet::new(),
            begun: false,
            digest_wanted: false,
            stopping: false,
            last_digest: DigestTaken {
                ordinal,
                at: now,
                cost: Duration::ZERO,
            },
            flushed: now,
            started: now,
            totals: Totals::default(),
        }
    }

    /// The environment that is recorded.
    pub fn inner(&mut self) -> &mut E {
        &mut self.inner
    }

    /// What was recorded so far.
    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Writes out every record taken so far.
    pub fn flush(&mut self) -> Result<(), WriteTraceError> {
        self.flushed = Instant::now();
        self.trace.flush()
    }

    fn digest_due(&self, now: Instant) -> bool {
        let last = &self.last_digest;
        let since = now.saturating_duration_since(last.at);
        let due = since >= self.options.digest_interval
            || self.ordinal.0 - last.ordinal.0 >= self.options.digest_sync_points;
        due && self.ordinal != last.ordinal
            && since >= last.cost.saturating_mul(self.options.digest_spacing)
    }

    /// The pages written since they were last asked for.
    fn take_dirty(&mut self, engine: &mut dyn Engine) -> Result<PageSet, EngineError> {
        let taken = engine.take_dirty()?;
        self.dirty.extend(&taken);
        Ok(taken)
    }

    fn digest(&mut self, at: &mut Boundary<'_>, now: Instant) -> Result<(), EnvironmentError> {
        self.digest_wanted = false;
        self.take_dirty(at.engine)?;
        let cpu = at.engine.state(at.vcpu)?;
        let digest = DigestRecord {
            position: at.engine.position(),
            registers: canonical_registers(&cpu.regs),
            cpu: CpuDigest::of(&cpu),
            pages: page_digests(at.memory, &std::mem::take(&mut self.dirty)),
            board: board_digest(at.board),
            exits: self.exits.digest(),
            console: self.console.digest(),
        };
        self.totals.digests += 1;
        self.trace.record(Record::Digest {
            after: at.ordinal,
            digest: Box::new(digest),
        })?;
        self.last_digest = DigestTaken {
            ordinal: at.ordinal,
            at: now,
            cost: now.elapsed(),
        };
        Ok(())
    }

    /// When it is, for something that arrives at this boundary.
    fn moment(&mut self, at: &mut Boundary<'_>) -> Result<Moment, EnvironmentError> {
        if at.cause.is_none_or(Exit::is_sync_point) {
            return Ok(Moment::Sync);
        }
        if let Some(position) = at.engine.position() {
            return Ok(Moment::Position(position));
        }
        self.totals.landmarks += 1;
        // The pages since the last landmark or digest after the same sync point are enough: a replay finds this
        // landmark by running on from that one, where memory was the same.
        let pages = self.take_dirty(at.engine)?;
        let cpu = at.engine.state(at.vcpu)?;
        Ok(Moment::Landmark(Box::new(Landmark {
            registers: canonical_registers(&cpu.regs),
            rest: CpuDigest::of(&cpu).rest(),
            deliveries: deliveries(self.windows, at.cause),
            pages: page_digests(at.memory, &pages),
        })))
    }

    /// Logs what arrives at this boundary.
    fn log_arrivals(
        &mut self,
        at: &mut Boundary<'_>,
        arrivals: &[Arrival],
    ) -> Result<(), EnvironmentError> {
        let mut moment = Some(self.moment(at)?);
        for arrival in arrivals {
            if let Arrival::Time { now } = *arrival {
                self.totals.last_time = now;
            }
            self.totals.arrivals += 1;
            self.trace.record(Record::Arrival {
                after: at.ordinal,
                vcpu: at.vcpu,
                moment: moment.take().unwrap_or(Moment::Same),
                arrival: arrival.clone(),
            })?;
        }
        Ok(())
    }

    /// Writes records out when it is time. A guest about to sleep for who knows how long must not take them along.
    fn flush_if_due(&mut self, now: Instant, sleeping: bool) -> Result<(), WriteTraceError> {
        let waited = now.saturating_duration_since(self.flushed) >= self.options.flush_interval;
        if self.trace.full() || (self.trace.pending() && (waited || sleeping)) {
            self.flushed = now;
            self.trace.flush()?;
        }
        Ok(())
    }

    /// What the wrapped environment says at this boundary; a stop waits until no instruction is in progress, so that the machine ends in a
    /// state that can be looked at.
    fn ask(&mut self, at: &mut Boundary<'_>) -> Result<Directive, EnvironmentError> {
        if self.stopping {
            return Ok(if at.incomplete {
                Directive {
                    arrivals: Vec::new(),
                    bound: Bound::Completed,
                }
            } else {
                Directive {
                    arrivals: vec![Arrival::Stop],
                    bound: Bound::Exit,
                }
            });
        }
        let mut directive = self.inner.boundary(Boundary {
            engine: &mut *at.engine,
            ..*at
        })?;
        if at.incomplete
            && let Some(stop) = directive.arrivals.iter().position(|a| *a == Arrival::Stop)
        {
            directive.arrivals.truncate(stop);
            directive.bound = Bound::Completed;
            self.stopping = true;
        }
        Ok(directive)
    }
}

impl<E: Environment> Environment for Recorder<E> {
    fn now(&mut self) -> Result<Nanos, EnvironmentError> {
        let now = self.inner.now()?;
        self.totals.clock_reads += 1;
        self.totals.last_time = now;
        self.trace.record(Record::ClockRead {
            after: self.ordinal,
            now,
        })?;
        Ok(now)
    }

    fn entropy(&mut self, out: &mut [u8]) -> Result<(), EnvironmentError> {
        self.inner.entropy(out)?;
        self.totals.entropy_bytes += out.len() as u64;
        self.trace.record(Record::Entropy {
            after: self.ordinal,
            bytes: out.to_vec(),
        })?;
        Ok(())
    }

    fn output(&mut self, channel: Channel, bytes: &[u8]) -> Result<(), EnvironmentError> {
        self.console.add(channel, bytes);
        self.inner.output(channel, bytes)
    }

    fn exited(
        &mut self,
        vcpu: VcpuId,
        exit: &Exit,
        ordinal: SyncOrdinal,
        position: Option<Position>,
    ) -> Result<(), EnvironmentError> {
        self.totals.exits += 1;
        self.exits.add(exit);
        if ordinal != self.ordinal {
            self.ordinal = ordinal;
            self.windows = 0;
        }
        self.windows += u64::from(*exit == Exit::InterruptWindow);
        self.inner.exited(vcpu, exit, ordinal, position)
    }

    fn boundary(&mut self, mut at: Boundary<'_>) -> Result<Directive, EnvironmentError> {
        let now = Instant::now();
        let sync = at.cause.is_some_and(Exit::is_sync_point);
        // The start, too: a replay must begin with the same machine.
        let start = !std::mem::replace(&mut self.begun, true);
        if start || self.digest_wanted || (sync && self.digest_due(now)) {
            self.digest_wanted = at.incomplete;
            if !at.incomplete {
                self.digest(&mut at, now)?;
            }
        }
        self.flush_if_due(now, at.halted && at.deadline.is_none())?;
        let mut directive = self.ask(&mut at)?;
        if !directive.arrivals.is_empty() {
            self.log_arrivals(&mut at, &directive.arrivals)?;
        }
        if self.digest_wanted {
            directive.bound = Bound::Completed;
        }
        Ok(directive)
    }
}

impl<E> Drop for Recorder<E> {
    /// A run that failed leaves everything it recorded.
    fn drop(&mut self) {
        // There is nobody left to tell; the reason the run failed has been told.
        let _ = self.trace.flush();
    }
}

/// Ends the recording of a machine that has ended: takes its last state and writes the end of the trace.
pub fn finish<E: Environment>(
    session: &mut Session<Recorder<E>>,
) -> Result<EndRecord, FinishError> {
    let end = session.end().ok_or(FinishError::NotEnded)?;
    let state = FinalState::of(session)?;
    let after = session.progress().ordinal;
    let recorder = session.environment();
    let mut totals = recorder.totals;
    totals.console_bytes = recorder.console.len();
    totals.host_nanos = u64::try_from(recorder.started.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let record = EndRecord {
        end,
        after,
        position: state.position,
        cpu: state.cpu,
        memory: state.memory,
        board: state.board,
        exits: recorder.exits.digest(),
        console: recorder.console.digest(),
        totals,
    };
    recorder.trace.finish(&record)?;
    Ok(record)
}

/// Interrupts delivered since the sync point, from the windows that opened since: the last one has not been used yet
/// while it is the cause of the boundary.
pub(crate) fn deliveries(windows: u64, cause: Option<&Exit>) -> u64 {
    windows.saturating_sub(u64::from(cause == Some(&Exit::InterruptWindow)))
}

fn page_digests(memory: &GuestMemory, pages: &PageSet) -> Vec<PageDigest> {
    pages
        .iter()
        .filter_map(|&page| {
            let digest = Digest(memory.page_digest(page)?);
            Some(PageDigest { page, digest })
        })
        .collect()
}
