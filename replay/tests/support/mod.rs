//! A small deterministic processor, and a capricious host: recordings and replays without a real engine.

#![allow(dead_code, unreachable_pub)] // Each test uses its part.

pub mod fake;
pub mod host;

use fake::{FakeEngine, Program};
use machine::engine::{Engine, EngineKind};
use machine::environment::Environment;
use machine::session::Session;
use machine::{BoardConfig, End, GuestMemory, MachineConfig};
use replay::recorder::{RecordOptions, Recorder, finish};
use replay::timeline::Timeline;
use replay::trace::{Image, MachineRecord, Record, Trace, TraceWriter};
use std::io::{self, Cursor, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use x86::{CpuModel, CpuState};

/// A file in memory.
#[derive(Clone, Default)]
pub struct Shared(pub Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("lock").extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    pub fn bytes(&self) -> Vec<u8> {
        self.0.lock().expect("lock").clone()
    }
}

pub fn config() -> MachineConfig {
    MachineConfig {
        memory: 4 << 20,
        cpu_model: CpuModel::V2,
        board: BoardConfig::default(),
        // Only so that there is something to boot: the fake processor has a program of its own.
        kernel: fixtures::by_name("hello").expect("hello").elf.to_vec(),
        cmdline: String::new(),
    }
}

/// Digests often, and at the same places each time.
pub fn options() -> RecordOptions {
    RecordOptions {
        digest_interval: Duration::MAX,
        digest_sync_points: 40,
        digest_spacing: 0,
        flush_interval: Duration::ZERO,
    }
}

/// A writer for a trace of `config`, and what it writes.
pub fn writer(config: &MachineConfig, kind: EngineKind) -> (TraceWriter, Shared) {
    let file = Shared::default();
    let image = Image {
        name: "kernel".to_owned(),
        bytes: config.kernel.clone(),
    };
    let machine = MachineRecord::of(config, kind);
    let out = Box::new(file.clone());
    let writer = TraceWriter::new(out, "test.cvt".to_owned(), &machine, &[image]);
    (writer.expect("memory"), file)
}

/// Records a machine until it ends; the trace and how it ended.
pub fn record<E: Environment>(
    config: &MachineConfig,
    options: RecordOptions,
    parts: impl FnOnce(&GuestMemory, &CpuState) -> (Box<dyn Engine>, E),
) -> (Vec<u8>, End) {
    let (memory, board, cpu) = config.build().expect("build");
    let (engine, environment) = parts(&memory, &cpu);
    let (writer, file) = writer(config, engine.kind());
    let recorder = Recorder::new(environment, writer, options);
    let mut session = Session::new(memory, board, engine, Box::new(recorder));
    let end = session.run_to_end().expect("run");
    finish(&mut session).expect("finish");
    (file.bytes(), end)
}

pub fn open(bytes: &[u8]) -> Trace {
    Trace::read(Box::new(Cursor::new(bytes.to_vec()))).expect("a trace")
}

/// A timeline of `bytes` on the fake processor, which `tamper` may spoil.
pub fn timeline_with(
    bytes: &[u8],
    program: &Program,
    tamper: impl Fn(&mut FakeEngine),
) -> Timeline {
    Timeline::of(open(bytes), "test.cvt".to_owned(), &|memory, _, _| {
        let mut engine = FakeEngine::new(program.clone(), memory.clone(), true);
        tamper(&mut engine);
        Ok(Box::new(engine))
    })
    .expect("a timeline")
}

pub fn timeline(bytes: &[u8], program: &Program) -> Timeline {
    timeline_with(bytes, program, |_| {})
}

pub fn log(trace: &mut Trace) -> Vec<Record> {
    (0..trace.log.len())
        .map(|i| trace.log.get(i).expect("readable").expect("there").clone())
        .collect()
}

/// The trace with its log changed by `edit`.
pub fn edited(bytes: &[u8], edit: impl FnOnce(&mut Vec<Record>)) -> Vec<u8> {
    let mut trace = open(bytes);
    let mut records = log(&mut trace);
    edit(&mut records);
    let file = Shared::default();
    let out = Box::new(file.clone());
    let mut writer = TraceWriter::new(out, "edited.cvt".to_owned(), &trace.machine, &trace.images)
        .expect("memory");
    for record in records {
        writer.record(record).expect("record");
    }
    match &trace.end {
        Some(end) => writer.finish(end).expect("finish"),
        None => writer.flush().expect("flush"),
    }
    file.bytes()
}
