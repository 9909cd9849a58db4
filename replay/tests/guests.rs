//! Real guests, recorded on the software engine in two ways, replayed on it.
//!
//! "By position": as the engine is. "By landmark": behind [`Blind`], which hides the count and kicks the CPU at arbitrary
//! boundaries, as a hypervisor does; so the whole search for landmarks is exercised without one.

mod support;

use fixtures::{Fixture, expected};
use machine::debuggable::Debuggable;
use machine::engine::{Engine, EngineError, EngineKind, Entry, Kick, Until};
use machine::host_environment::{Clock, HostEnvironment};
use machine::{End, GuestMemory, MachineConfig, PageSet};
use replay::recorder::RecordOptions;
use replay::timeline::{Outcome, Report, Timeline};
use soft::SoftEngine;
use std::num::NonZeroU64;
use std::sync::Arc;
use support::{open, record};
use x86::{CpuModel, CpuState, Exit, ExitControls, GuestPhysAddr, Instructions, Position, VcpuId};

/// An engine that does not count, and is kicked.
struct Blind {
    inner: SoftEngine,
    seed: u64,
}

impl Blind {
    /// A boundary some way ahead.
    fn ahead(&mut self) -> Option<Position> {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        let here = self.inner.position()?;
        let retired = Instructions::new(here.retired.get() + self.seed % 9000 + 1);
        Some(Position {
            retired,
            within: self.seed >> 32 & 3,
        })
    }
}

impl Engine for Blind {
    fn kind(&self) -> EngineKind {
        EngineKind::Kvm
    }

    fn set_controls(&mut self, controls: &ExitControls) -> Result<(), EngineError> {
        self.inner.set_controls(controls)
    }

    fn run(&mut self, vcpu: VcpuId, entry: Entry, until: Until<'_>) -> Result<Exit, EngineError> {
        let Some(kick) = self.ahead().filter(|_| until == Until::Exit) else {
            return self.inner.run(vcpu, entry, until);
        };
        match self.inner.run(vcpu, entry, Until::Position(kick))? {
            Exit::BoundReached => Ok(Exit::Kicked),
            exit => Ok(exit),
        }
    }

    fn state(&mut self, vcpu: VcpuId) -> Result<CpuState, EngineError> {
        self.inner.state(vcpu)
    }

    fn set_state(&mut self, vcpu: VcpuId, state: &CpuState) -> Result<(), EngineError> {
        self.inner.set_state(vcpu, state)
    }

    fn interrupts_enabled(&mut self, vcpu: VcpuId) -> Result<bool, EngineError> {
        self.inner.interrupts_enabled(vcpu)
    }

    fn kicker(&self, vcpu: VcpuId) -> Result<Arc<dyn Kick>, EngineError> {
        self.inner.kicker(vcpu)
    }

    fn take_dirty(&mut self) -> Result<PageSet, EngineError> {
        self.inner.take_dirty()
    }

    fn memory_written(&mut self, addr: GuestPhysAddr, len: usize) {
        self.inner.memory_written(addr, len);
    }

    fn position(&self) -> Option<Position> {
        None
    }

    fn set_position(&mut self, _: Position) {}
}

fn soft(memory: &GuestMemory, cpu: &CpuState, model: CpuModel) -> Result<SoftEngine, EngineError> {
    let mut engine = SoftEngine::new(memory.clone(), model)?;
    engine.set_state(VcpuId::BOOT, cpu)?;
    Ok(engine)
}

fn config(fixture: &Fixture) -> MachineConfig {
    MachineConfig {
        memory: Fixture::RAM,
        cpu_model: CpuModel::V2,
        board: machine::BoardConfig::default(),
        kernel: fixture.elf.to_vec(),
        cmdline: String::new(),
    }
}

/// Digests often.
fn options() -> RecordOptions {
    RecordOptions {
        digest_sync_points: 50,
        digest_spacing: 0,
        ..RecordOptions::default()
    }
}

/// The host as an environment for `engine`.
fn host(engine: &dyn Engine, clock: Clock) -> HostEnvironment {
    let kick = engine.kicker(VcpuId::BOOT).expect("a kicker");
    HostEnvironment::new(kick, clock, Box::new(std::io::sink())).expect("an alarm")
}

/// A recording by landmark, on the host's clock: it is another one each time.
fn blind(fixture: &Fixture, seed: u64) -> (Vec<u8>, End) {
    let config = config(fixture);
    let engine_of = |memory: &GuestMemory, cpu: &CpuState| {
        let inner = soft(memory, cpu, CpuModel::V2).expect("an engine");
        Blind {
            inner,
            seed: seed.wrapping_mul(0x9e37_79b9) | 1,
        }
    };
    record(&config, options(), |memory, cpu| {
        let engine = engine_of(memory, cpu);
        let host = host(&engine, Clock::Host);
        (Box::new(engine), host)
    })
}

/// A recording by position.
fn counted(fixture: &Fixture, clock: Clock) -> (Vec<u8>, End) {
    record(&config(fixture), options(), |memory, cpu| {
        let engine = soft(memory, cpu, CpuModel::V2).expect("an engine");
        let host = host(&engine, clock);
        (Box::new(engine), host)
    })
}

fn by_name(name: &str) -> &'static Fixture {
    fixtures::by_name(name).expect("a guest")
}

fn timeline(bytes: &[u8]) -> Timeline {
    Timeline::of(open(bytes), "test.cvt".to_owned(), &|memory, cpu, model| {
        Ok(Box::new(soft(memory, cpu, model)?))
    })
    .expect("a timeline")
}

/// Replays a recording, which must be verified.
fn replay(fixture: &Fixture, bytes: &[u8], end: End) -> Report {
    let mut timeline = timeline(bytes);
    let report = timeline.run_to_end().expect("replay");
    assert_eq!(report.outcome, Outcome::Verified, "{}", fixture.name);
    assert_eq!(report.end, Some(end), "{}", fixture.name);
    report
}

#[test]
fn every_guest_recorded_by_position_replays() {
    for fixture in fixtures::ALL {
        let per_second = NonZeroU64::new(1_000_000_000).expect("not zero");
        let (bytes, end) = counted(fixture, Clock::Instructions { per_second });
        let report = replay(fixture, &bytes, end);
        let recorded = open(&bytes).end.expect("complete");
        assert_eq!(
            Some(report.instructions),
            recorded.position.map(|p| p.retired.get())
        );
    }
}

#[test]
fn guests_recorded_on_the_hosts_clock_replay() {
    for name in ["hello", "timer", "crash", "entropy"] {
        let fixture = by_name(name);
        let (bytes, end) = counted(fixture, Clock::Host);
        replay(fixture, &bytes, end);
    }
}

#[test]
fn every_guest_recorded_by_landmark_replays() {
    for (seed, fixture) in fixtures::ALL.iter().enumerate() {
        let (bytes, end) = blind(fixture, seed as u64);
        replay(fixture, &bytes, end);
    }
}

#[test]
fn crash_and_timer_replay_time_and_again() {
    let mut landmarks = 0;
    for seed in 0..5 {
        for name in ["timer", "crash"] {
            let fixture = by_name(name);
            let (bytes, end) = blind(fixture, seed);
            landmarks += open(&bytes).end.expect("complete").totals.landmarks;
            let first = replay(fixture, &bytes, end);
            let again = replay(fixture, &bytes, end);
            assert_eq!(
                Report {
                    duration: first.duration,
                    ..again
                },
                first
            );
        }
    }
    assert!(
        landmarks > 20,
        "only {landmarks} landmarks: the test does not test"
    );
}

#[test]
fn what_a_guest_printed_is_printed_again() {
    for name in ["hello", "timer", "crash"] {
        let fixture = by_name(name);
        let (bytes, end) = blind(fixture, 3);
        let mut timeline = timeline(&bytes);
        timeline.run_to_end().expect("replay");
        let End::DebugExit(status) = end else {
            panic!("{name}: {end}")
        };
        let console = timeline.console();
        if let Err(mismatch) = fixture
            .expected
            .check_run(console, expected::End::DebugExit(status))
        {
            panic!("{name}: {mismatch}");
        }
    }
}

#[test]
fn another_kernel_is_another_machine() {
    let (bytes, _) = blind(by_name("hello"), 1);
    let mut trace = open(&bytes);
    trace.images[0].bytes = by_name("timer").elf.to_vec();
    let mut timeline = Timeline::of(trace, "t".to_owned(), &|memory, cpu, model| {
        Ok(Box::new(soft(memory, cpu, model)?))
    })
    .expect("a timeline");
    let report = timeline.run_to_end().expect("replay");
    let Outcome::Diverged(found) = report.outcome else {
        panic!("{report:?}")
    };
    assert_eq!(found.at.after.0, 0, "at the start: {found}");
}
