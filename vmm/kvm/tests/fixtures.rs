//! Every fixture guest on KVM in real time, under the host's clock, with interrupts arriving when they arrive.

mod guest;

use fixtures::Fixture;
use kvm::{Cpl0Policy, KvmEngine};
use machine::engine::Engine;
use machine::host_environment::{Clock, HostEnvironment};
use machine::session::Session;
use machine::{BoardConfig, End, MachineConfig};
use std::io::Write;
use std::sync::{Arc, Mutex};
use x86::{CpuModel, VcpuId};

/// Console output, kept.
#[derive(Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("console").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn run(fixture: &Fixture, policy: Cpl0Policy) -> Option<(Vec<u8>, End)> {
    let config = MachineConfig {
        memory: Fixture::RAM,
        cpu_model: CpuModel::default(),
        board: BoardConfig::default(),
        kernel: fixture.elf.to_vec(),
        cmdline: String::new(),
    };
    let (memory, board, cpu) = config.build().expect("machine");
    let mut engine = match KvmEngine::with_policy(memory.clone(), CpuModel::default(), policy) {
        Ok(engine) => engine,
        Err(error) => {
            guest::skipped(&error);
            return None;
        }
    };
    engine.set_state(VcpuId::BOOT, &cpu).expect("start state");
    let kick = engine.kicker(VcpuId::BOOT).expect("kicker");
    let console = Console::default();
    let environment =
        HostEnvironment::new(kick, Clock::Host, Box::new(console.clone())).expect("environment");
    let mut session = Session::new(memory, board, Box::new(engine), Box::new(environment));
    let end = session
        .run_to_end()
        .unwrap_or_else(|error| panic!("{}: {error}", fixture.name));
    session.environment().flush().expect("console");
    let text = console.0.lock().expect("console").clone();
    Some((text, end))
}

fn check(policy: Cpl0Policy) {
    for fixture in fixtures::ALL {
        let Some((console, end)) = run(fixture, policy) else {
            return;
        };
        let end = match end {
            End::DebugExit(status) => fixtures::End::DebugExit(status),
            End::TripleFault => fixtures::End::TripleFault,
            other => panic!("{} ended with {other}", fixture.name),
        };
        if let Err(mismatch) = fixture.expected.check_run(&console, end) {
            panic!(
                "{} ({policy:?}): {mismatch}\n{}",
                fixture.name,
                String::from_utf8_lossy(&console)
            );
        }
    }
}

#[test]
fn every_fixture_runs_on_kvm() {
    check(Cpl0Policy::Kvm);
}

#[test]
fn every_fixture_runs_with_ring_0_in_the_soft_engine() {
    check(Cpl0Policy::Soft);
}
