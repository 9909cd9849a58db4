//! Fixture guests on KVM and on the soft engine, compared at every sync point.
//!
//! The environment is a script: time is a function of the sync points passed, so both engines get the same interrupts at the same
//! instructions, and every difference is an engine's fault. Guests that only asynchronous interrupts move on are
//! recorded and replayed elsewhere (`replay`).

mod guest;

use fixtures::{Console, Fixture};
use kvm::{Cpl0Policy, KvmEngine};
use machine::engine::Engine;
use machine::environment::{
    Arrival, Bound, Boundary, Channel, Directive, Environment, EnvironmentError, SyncOrdinal,
};
use machine::session::Session;
use machine::{Board, BoardConfig, End, GuestMemory, MachineConfig};
use soft::SoftEngine;
use x86::{CpuModel, CpuState, Exit, Nanos, Position, VcpuId};

/// Virtual time that passes with each sync point.
const NANOS_PER_SYNC_POINT: u64 = 200_000;
/// A guest that takes more turns than this is lost.
const TURNS: u64 = 2_000_000;

/// What was seen at one sync point.
#[derive(Clone, PartialEq, Debug)]
struct Seen {
    exit: Exit,
    cpu: CpuState,
    memory: u64,
}

/// Answers from a script, and notes what it sees.
struct Script {
    now: Nanos,
    random: u64,
    console: Vec<u8>,
    last: Option<Exit>,
    seen: Vec<Seen>,
    turns: u64,
    /// The run ends once this has been printed.
    until: Option<&'static str>,
}

impl Script {
    fn new(until: Option<&'static str>) -> Self {
        Self {
            until,
            now: Nanos::ZERO,
            random: 0x9e37_79b9_7f4a_7c15,
            console: Vec::new(),
            last: None,
            seen: Vec::new(),
            turns: 0,
        }
    }

    /// Registers, and now and then all of memory.
    fn note(&mut self, at: &mut Boundary<'_>) -> Result<(), EnvironmentError> {
        let Some(exit) = self.last.take() else {
            return Ok(());
        };
        let cpu = at.engine.state(at.vcpu)?;
        let memory = if self.seen.len().is_multiple_of(64) {
            at.memory.digest()
        } else {
            0
        };
        self.seen.push(Seen { exit, cpu, memory });
        Ok(())
    }
}

impl Environment for Script {
    fn now(&mut self) -> Result<Nanos, EnvironmentError> {
        Ok(self.now)
    }

    fn entropy(&mut self, out: &mut [u8]) -> Result<(), EnvironmentError> {
        for byte in out {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            *byte = self.random as u8;
        }
        Ok(())
    }

    fn output(&mut self, _channel: Channel, bytes: &[u8]) -> Result<(), EnvironmentError> {
        self.console.extend_from_slice(bytes);
        Ok(())
    }

    fn exited(
        &mut self,
        _vcpu: VcpuId,
        exit: &Exit,
        ordinal: SyncOrdinal,
        _position: Option<Position>,
    ) -> Result<(), EnvironmentError> {
        if exit.is_sync_point() {
            self.last = Some(exit.clone());
            self.now = Nanos::new(self.now.get().max(ordinal.0 * NANOS_PER_SYNC_POINT));
        }
        Ok(())
    }

    fn boundary(&mut self, mut at: Boundary<'_>) -> Result<Directive, EnvironmentError> {
        self.turns += 1;
        let printed = self
            .until
            .is_some_and(|text| self.console.ends_with(text.as_bytes()));
        if printed || self.turns > TURNS {
            return Ok(Directive {
                arrivals: vec![Arrival::Stop],
                bound: Bound::Exit,
            });
        }
        if at.incomplete {
            return Ok(Directive {
                arrivals: Vec::new(),
                bound: Bound::Completed,
            });
        }
        let sync_point = self.last.is_some();
        self.note(&mut at)?;
        if at.halted {
            let wake = at.deadline.unwrap_or(self.now);
            self.now = self.now.max(wake);
        }
        let arrivals = match sync_point || at.halted {
            true => vec![Arrival::Time { now: self.now }],
            false => Vec::new(),
        };
        Ok(Directive {
            arrivals,
            bound: Bound::Exit,
        })
    }
}

/// How a run went.
struct Run {
    end: End,
    script: Script,
    memory: GuestMemory,
}

fn run(
    fixture: &Fixture,
    until: Option<&'static str>,
    engine: impl FnOnce(GuestMemory) -> Option<Box<dyn Engine>>,
) -> Option<Run> {
    let config = MachineConfig {
        memory: Fixture::RAM,
        cpu_model: CpuModel::default(),
        board: BoardConfig::default(),
        kernel: fixture.elf.to_vec(),
        cmdline: String::new(),
    };
    let (memory, board, cpu): (GuestMemory, Board, CpuState) = config.build().expect("machine");
    let mut engine = engine(memory.clone())?;
    engine.set_state(VcpuId::BOOT, &cpu).expect("start state");
    let mut session = Session::new(memory.clone(), board, engine, Box::new(Script::new(until)));
    let end = session.run_to_end().unwrap_or_else(|error| {
        let console = String::from_utf8_lossy(&session.environment_ref().console).into_owned();
        panic!("{}: {error}\n{console}", fixture.name)
    });
    let script = std::mem::replace(session.environment(), Script::new(None));
    Some(Run {
        end,
        script,
        memory,
    })
}

fn on_kvm(fixture: &Fixture, until: Option<&'static str>, policy: Cpl0Policy) -> Option<Run> {
    run(fixture, until, |memory| {
        match KvmEngine::with_policy(memory, CpuModel::default(), policy) {
            Ok(engine) => Some(Box::new(engine)),
            Err(error) => {
                guest::skipped(&error);
                None
            }
        }
    })
}

fn on_soft(fixture: &Fixture, until: Option<&'static str>) -> Run {
    run(fixture, until, |memory| {
        Some(Box::new(
            SoftEngine::new(memory, CpuModel::default()).expect("soft engine"),
        ))
    })
    .expect("the soft engine needs nothing of the host")
}

/// Both runs must have gone the same way, and the way the fixture is to go.
fn compare(fixture: &Fixture, kvm: &Run, soft: &Run) {
    for (i, (a, b)) in kvm.script.seen.iter().zip(&soft.script.seen).enumerate() {
        assert_eq!(a.exit, b.exit, "{}: exit at sync point {i}", fixture.name);
        if a.cpu != b.cpu {
            panic!(
                "{}: state after sync point {i}, {}:\n{}",
                fixture.name,
                a.exit,
                differences(&a.cpu, &b.cpu)
            );
        }
        assert_eq!(
            a.memory, b.memory,
            "{}: memory at sync point {i}, {}",
            fixture.name, a.exit
        );
    }
    assert_eq!(
        kvm.script.seen.len(),
        soft.script.seen.len(),
        "{}",
        fixture.name
    );
    assert_eq!(kvm.end, soft.end, "{}", fixture.name);
    assert_eq!(
        kvm.memory.digest(),
        soft.memory.digest(),
        "{}: memory at the end",
        fixture.name
    );
    let text = String::from_utf8_lossy(&kvm.script.console);
    assert_eq!(
        text,
        String::from_utf8_lossy(&soft.script.console),
        "{}",
        fixture.name
    );
    assert!(!kvm.script.seen.is_empty(), "{}", fixture.name);
    if let [outcome] = fixture.expected.outcomes
        && let Console::Exact(expected) = outcome.console
    {
        assert_eq!(text, expected, "{}", fixture.name);
    }
}

/// The fields in which two states differ, KVM's first.
fn differences(kvm: &CpuState, soft: &CpuState) -> String {
    let (kvm, soft) = (format!("{kvm:#x?}"), format!("{soft:#x?}"));
    let lines = kvm.lines().zip(soft.lines()).filter(|(a, b)| a != b);
    lines
        .map(|(a, b)| format!("kvm {} | soft {}\n", a.trim(), b.trim()))
        .collect()
}

fn lockstep(name: &str, until: Option<&'static str>) {
    let fixture = fixtures::by_name(name).expect("a fixture");
    let soft = on_soft(fixture, until);
    for policy in [Cpl0Policy::Kvm, Cpl0Policy::Soft] {
        let Some(kvm) = on_kvm(fixture, until, policy) else {
            return;
        };
        compare(fixture, &kvm, &soft);
    }
}

#[test]
fn hello() {
    lockstep("hello", None);
}

#[test]
fn paging() {
    lockstep("paging", None);
}

#[test]
fn syscalls() {
    lockstep("syscalls", None);
}

#[test]
fn smc() {
    lockstep("smc", None);
}

#[test]
fn triple_fault() {
    lockstep("triple-fault", None);
}

#[test]
fn entropy() {
    // What follows is moved on by asynchronous interrupts alone.
    lockstep("entropy", Some(" polls)\n"));
}

#[test]
fn modes() {
    lockstep("modes", None);
}
