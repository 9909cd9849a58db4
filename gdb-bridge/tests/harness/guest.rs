//! Real guests: live on either engine, and recorded.

use fixtures::Fixture;
use machine::engine::Engine;
use machine::host_environment::{Clock, HostEnvironment};
use machine::live::LiveMachine;
use machine::session::Session;
use machine::{Board, BoardConfig, End, GuestMemory, MachineConfig};
use replay::recorder::{RecordOptions, Recorder, finish};
use replay::timeline::Timeline;
use replay::trace::{Image, MachineRecord, TraceWriter};
use soft::SoftEngine;
use std::num::NonZeroU64;
use std::path::Path;
use x86::{CpuModel, CpuState, VcpuId};

/// Instructions in a second of virtual time, where nothing else is asked.
pub(crate) const RATE: u64 = 20_000_000;

pub(crate) fn fixture(name: &str) -> &'static Fixture {
    fixtures::by_name(name).expect("a fixture")
}

fn config(fixture: &Fixture) -> MachineConfig {
    MachineConfig {
        memory: Fixture::RAM,
        cpu_model: CpuModel::V2,
        board: BoardConfig::default(),
        kernel: fixture.elf.to_vec(),
        cmdline: String::new(),
    }
}

fn soft_engine(memory: &GuestMemory, cpu: &CpuState, model: CpuModel) -> Box<dyn Engine> {
    let mut engine = SoftEngine::new(memory.clone(), model).expect("an engine");
    engine.set_state(VcpuId::BOOT, cpu).expect("a start state");
    Box::new(engine)
}

fn environment(engine: &dyn Engine, clock: Clock) -> HostEnvironment {
    let kick = engine.kicker(VcpuId::BOOT).expect("a kick");
    HostEnvironment::new(kick, clock, Box::new(std::io::sink())).expect("an environment")
}

fn instruction_clock(rate: u64) -> Clock {
    Clock::Instructions {
        per_second: NonZeroU64::new(rate).expect("not 0"),
    }
}

fn live(memory: GuestMemory, board: Board, engine: Box<dyn Engine>, clock: Clock) -> LiveMachine {
    let environment = environment(engine.as_ref(), clock);
    let run = environment.run_control();
    LiveMachine::new(memory, board, engine, Box::new(environment), run)
}

/// A guest about to start on the soft engine, `rate` instructions being a second of its time.
pub(crate) fn live_on_soft(fixture: &Fixture, rate: u64) -> LiveMachine {
    let config = config(fixture);
    let (memory, board, cpu) = config.build().expect("a machine");
    let engine = soft_engine(&memory, &cpu, config.cpu_model);
    live(memory, board, engine, instruction_clock(rate))
}

/// A guest about to start on KVM, in the host's time.
pub(crate) fn live_on_kvm(fixture: &Fixture) -> LiveMachine {
    let config = config(fixture);
    let (memory, board, cpu) = config.build().expect("a machine");
    let mut engine = kvm::KvmEngine::new(memory.clone(), config.cpu_model).expect("KVM");
    engine.set_state(VcpuId::BOOT, &cpu).expect("a start state");
    live(memory, board, Box::new(engine), Clock::Host)
}

/// Records a guest on the soft engine into `path`; how it ended.
pub(crate) fn record(fixture: &Fixture, rate: u64, path: &Path) -> End {
    let config = config(fixture);
    let (memory, board, cpu) = config.build().expect("a machine");
    let engine = soft_engine(&memory, &cpu, config.cpu_model);
    let record = MachineRecord::of(&config, engine.kind());
    let images = [Image {
        name: fixture.name.to_owned(),
        bytes: config.kernel,
    }];
    let writer = TraceWriter::create(path, true, &record, &images).expect("a trace");
    let environment = environment(engine.as_ref(), instruction_clock(rate));
    let recorder = Recorder::new(environment, writer, RecordOptions::default());
    let mut session = Session::new(memory, board, engine, Box::new(recorder));
    let end = session.run_to_end().expect("it runs");
    finish(&mut session).expect("a whole trace");
    end
}

/// Records `crash` until it panics, which depends on how fast its time is; the rate at which it did.
pub(crate) fn record_panic(path: &Path) -> u64 {
    let crash = fixture("crash");
    let mut rates = (0..40).map(|n| RATE + 100_003 * n);
    rates
        .find(|rate| record(crash, *rate, path) == End::DebugExit(1))
        .expect("about one rate in two makes it panic")
}

/// The recording in `path`, at its start.
pub(crate) fn timeline(path: &Path) -> Timeline {
    Timeline::open(path, &|memory, cpu, model| {
        Ok(soft_engine(memory, cpu, model))
    })
    .expect("opened")
}
