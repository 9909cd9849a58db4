//! Every fixture guest on the software engine, under a clock that counts instructions: one nanosecond each.
//!
//! What is checked: the console and the end each guest promises; that a run is repeatable to the last bit.

use fixtures::{Fixture, expected};
use machine::environment::{
    Arrival, Bound, Boundary, Channel, Directive, Environment, EnvironmentError, SyncOrdinal,
};
use machine::session::{Session, Turn};
use machine::{BoardConfig, End, MachineConfig};
use soft::SoftEngine;
use x86::{CpuModel, Exit, Instructions, Nanos, Position, VcpuId};

/// Instructions between two looks at the clock.
const SLICE: u64 = 1000;

/// Virtual time is the count of retired instructions, plus what was skipped while halted.
#[derive(Default)]
struct Clockwork {
    output: Vec<u8>,
    position: Position,
    skipped: u64,
    entropy: u64,
}

impl Clockwork {
    fn time(&self) -> Nanos {
        Nanos::new(self.position.retired.get() + self.skipped)
    }
}

impl Environment for Clockwork {
    fn now(&mut self) -> Result<Nanos, EnvironmentError> {
        Ok(self.time())
    }

    fn entropy(&mut self, out: &mut [u8]) -> Result<(), EnvironmentError> {
        for byte in out {
            self.entropy = self
                .entropy
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            *byte = (self.entropy >> 56) as u8;
        }
        Ok(())
    }

    fn output(&mut self, channel: Channel, bytes: &[u8]) -> Result<(), EnvironmentError> {
        if channel == Channel::Com1 {
            self.output.extend_from_slice(bytes);
        }
        Ok(())
    }

    fn exited(
        &mut self,
        _vcpu: VcpuId,
        _exit: &Exit,
        _ordinal: SyncOrdinal,
        position: Option<Position>,
    ) -> Result<(), EnvironmentError> {
        self.position = position.expect("the software engine counts");
        Ok(())
    }

    fn boundary(&mut self, at: Boundary<'_>) -> Result<Directive, EnvironmentError> {
        let mut directive = Directive::default();
        if at.halted {
            let Some(deadline) = at.deadline else {
                panic!(
                    "halted for ever; console:\n{}",
                    String::from_utf8_lossy(&self.output)
                );
            };
            self.skipped += deadline.since(self.time());
        }
        directive.arrivals.push(Arrival::Time { now: self.time() });
        let next = self.position.retired.get() + SLICE;
        directive.bound = Bound::Position(Position {
            retired: Instructions::new(next),
            within: 0,
        });
        Ok(directive)
    }
}

/// What a run comes to.
#[derive(PartialEq, Eq, Debug)]
struct Outcome {
    console: Vec<u8>,
    end: End,
    position: Position,
    memory: u64,
}

fn run(fixture: &Fixture) -> Outcome {
    let config = MachineConfig {
        memory: Fixture::RAM,
        cpu_model: CpuModel::V2,
        board: BoardConfig::default(),
        kernel: fixture.elf.to_vec(),
        cmdline: String::new(),
    };
    let (memory, board, cpu) = config.build().expect("a machine");
    let mut engine = SoftEngine::new(memory.clone(), CpuModel::V2).expect("an engine");
    use machine::engine::Engine;
    engine.set_state(VcpuId::BOOT, &cpu).expect("a state");
    let environment = Box::new(Clockwork::default());
    let mut session = Session::new(memory.clone(), board, Box::new(engine), environment);
    let end = loop {
        match session.turn(&Bound::Exit) {
            Ok(Turn::Ended(end)) => break end,
            Ok(_) => {}
            Err(error) => {
                let console = String::from_utf8_lossy(&session.environment().output).into_owned();
                panic!("{}: {error}\nconsole:\n{console}", fixture.name);
            }
        }
        let position = session.environment_ref().position;
        if position.retired.get() > 2_000_000_000 {
            let console = String::from_utf8_lossy(&session.environment().output).into_owned();
            panic!("{} does not end; console:\n{console}", fixture.name);
        }
    };
    Outcome {
        end,
        position: session.environment_ref().position,
        memory: memory.digest(),
        console: std::mem::take(&mut session.environment().output),
    }
}

fn check(name: &str) {
    let fixture = fixtures::by_name(name).expect("a fixture");
    let outcome = run(fixture);
    let end = match outcome.end {
        End::DebugExit(byte) => expected::End::DebugExit(byte),
        End::TripleFault => expected::End::TripleFault,
        other => panic!("{name} ended in {other}"),
    };
    if let Err(mismatch) = fixture.expected.check_run(&outcome.console, end) {
        let console = String::from_utf8_lossy(&outcome.console);
        panic!("{name}: {mismatch}\nconsole:\n{console}");
    }
    eprintln!("{name}: {} instructions", outcome.position);
    assert_eq!(run(fixture), outcome, "{name} is not repeatable");
}

macro_rules! fixtures {
    ($($test:ident: $name:literal),* $(,)?) => {
        $(
            #[test]
            fn $test() {
                check($name);
            }
        )*

        #[test]
        fn every_fixture_is_here() {
            let here = [$($name),*];
            for fixture in fixtures::ALL {
                assert!(here.contains(&fixture.name), "{} has no test", fixture.name);
            }
        }
    };
}

fixtures! {
    hello: "hello",
    paging: "paging",
    syscalls: "syscalls",
    timer: "timer",
    smc: "smc",
    triple_fault: "triple-fault",
    crash: "crash",
    spin: "spin",
    modes: "modes",
    entropy: "entropy",
}
