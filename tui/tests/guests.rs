//! The UI's screen over real guests, recorded and replayed by the software engine.
//!
//! Addresses depend on the compiler that built the guests, so this looks for what must be there whatever they are.

use fixtures::Fixture;
use introspect::symbols::Symbols;
use machine::debuggable::{Debuggable, Resume, Stop};
use machine::engine::Engine;
use machine::host_environment::{Clock, HostEnvironment};
use machine::session::Session;
use machine::{BoardConfig, End, GuestMemory, MachineConfig};
use replay::recorder::{RecordOptions, Recorder, finish};
use replay::timeline::Timeline;
use replay::trace::{Image, MachineRecord, TraceWriter};
use soft::SoftEngine;
use std::num::NonZeroU64;
use std::path::Path;
use std::time::Duration;
use x86::{CpuModel, CpuState, VcpuId};

/// Instructions in a second of virtual time.
const RATE: u64 = 20_000_000;

fn engine(memory: &GuestMemory, cpu: &CpuState, model: CpuModel) -> Box<dyn Engine> {
    let mut engine = SoftEngine::new(memory.clone(), model).expect("an engine");
    engine.set_state(VcpuId::BOOT, cpu).expect("a start state");
    Box::new(engine)
}

/// Records a guest, its time counted in instructions.
fn record(fixture: &Fixture, rate: u64, path: &Path) -> End {
    let config = MachineConfig {
        memory: Fixture::RAM,
        cpu_model: CpuModel::V2,
        board: BoardConfig::default(),
        kernel: fixture.elf.to_vec(),
        cmdline: String::new(),
    };
    let (memory, board, cpu) = config.build().expect("a machine");
    let engine = engine(&memory, &cpu, config.cpu_model);
    let record = MachineRecord::of(&config, engine.kind());
    let images = [Image {
        name: fixture.name.to_owned(),
        bytes: config.kernel,
    }];
    let writer = TraceWriter::create(path, true, &record, &images).expect("a trace");
    let clock = Clock::Instructions {
        per_second: NonZeroU64::new(rate).expect("not 0"),
    };
    let kick = engine.kicker(VcpuId::BOOT).expect("a kick");
    let environment =
        HostEnvironment::new(kick, clock, Box::new(std::io::sink())).expect("an environment");
    let recorder = Recorder::new(environment, writer, RecordOptions::default());
    let mut session = Session::new(memory, board, engine, Box::new(recorder));
    let end = session.run_to_end().expect("it runs");
    finish(&mut session).expect("a whole trace");
    end
}

/// A recording of `crash` that panics, at its start, and the guest's symbols.
fn panicking(path: &Path) -> (Timeline, Symbols) {
    let crash = fixtures::by_name("crash").expect("a fixture");
    let panicked = (0..40).any(|n| record(crash, RATE + 100_003 * n, path) == End::DebugExit(1));
    assert!(panicked, "one rate in two makes it panic");
    let timeline = Timeline::open(path, &|memory, cpu, model| Ok(engine(memory, cpu, model)));
    (
        timeline.expect("opens"),
        Symbols::from_elf(crash.elf).expect("symbols"),
    )
}

#[test]
fn a_recorded_crash_from_its_start_to_its_last_words() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut timeline, symbols) = panicking(&folder.path().join("crash.cvt"));

    let start = tui::render_text(&mut timeline, &symbols, 200, 60).expect("renders");
    for expected in [
        "crash.cvt | soft | position 0 | 32-bit protected mode, CPL 0",
        "STOPPED",
        "-- here: 0 arrived",
    ] {
        assert!(start.contains(expected), "{expected:?} in\n{start}");
    }
    assert!(
        !start.contains(" 0 to come"),
        "there are events to come\n{start}"
    );

    while timeline
        .resume(Resume::Continue, Duration::from_secs(1))
        .expect("replays")
        == Stop::Slice
    {}
    let end = tui::render_text(&mut timeline, &symbols, 200, 60).expect("renders");
    for expected in [
        "ENDED: debug exit with 1",
        "64-bit mode, CPL 0",
        // The console's last words.
        "panic",
        // Names from the guest's symbols, in the disassembly and the backtrace.
        " panic ",
        "#1  crash::oops::list_corruption+0x",
        "start64+0x",
        // Ports by name.
        "COM1",
        "debug exit",
        " 0 to come",
    ] {
        assert!(end.contains(expected), "{expected:?} in\n{end}");
    }
    assert!(end.lines().all(|line| line.chars().count() <= 200));

    let third = timeline
        .events()
        .get(2)
        .and_then(|event| event.position)
        .expect("arrived");
    let past = timeline.reverse().expect("a timeline keeps its past");
    while past.seek(third, Duration::from_secs(1)).expect("goes back") == Stop::Slice {}
    assert_eq!(timeline.position(), Some(third));
    let back = tui::render_text(&mut timeline, &symbols, 200, 60).expect("renders");
    assert!(
        back.contains("STOPPED") && !back.contains("panic -"),
        "{back}"
    );
}
