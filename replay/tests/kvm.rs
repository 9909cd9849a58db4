//! Real guests, recorded on KVM, replayed on the software engine: the main road.

mod support;

use fixtures::Fixture;
use kvm::KvmEngine;
use machine::engine::Engine;
use machine::host_environment::{Clock, HostEnvironment};
use machine::{End, MachineConfig};
use replay::recorder::RecordOptions;
use replay::timeline::{Outcome, Timeline};
use soft::SoftEngine;
use std::sync::mpsc;
use std::time::Duration;
use support::{open, record};
use x86::{CpuModel, VcpuId};

/// No guest takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

fn config(fixture: &Fixture) -> MachineConfig {
    MachineConfig {
        memory: Fixture::RAM,
        cpu_model: CpuModel::V2,
        board: machine::BoardConfig::default(),
        kernel: fixture.elf.to_vec(),
        cmdline: String::new(),
    }
}

/// Whether there is a usable KVM; says so if not.
fn available() -> bool {
    match kvm::host::open() {
        Ok(_) => true,
        Err(error) => {
            eprintln!("skipped: {error}");
            let required = std::env::var("CHRONOVISOR_REQUIRE").unwrap_or_default();
            assert!(
                !required.split(',').any(|what| what == "kvm"),
                "KVM is required: {error}"
            );
            false
        }
    }
}

/// A recording of `fixture` on KVM, by the host's clock. A guest that does not end is stopped, and the test fails.
fn recorded(fixture: &Fixture, options: RecordOptions) -> (Vec<u8>, End) {
    let (ended, watched) = mpsc::channel::<()>();
    let (bytes, end) = record(&config(fixture), options, |memory, cpu| {
        let mut engine = KvmEngine::new(memory.clone(), CpuModel::V2).expect("KVM");
        engine
            .set_state(VcpuId::BOOT, cpu)
            .expect("the start state");
        let kick = engine.kicker(VcpuId::BOOT).expect("a kicker");
        let host = HostEnvironment::new(kick, Clock::Host, Box::new(std::io::sink()));
        let host = host.expect("an alarm");
        let stop = host.stop_handle();
        std::thread::spawn(move || {
            if watched.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
                stop.stop();
            }
        });
        (Box::new(engine), host)
    });
    drop(ended);
    assert_ne!(end, End::Stopped, "{} does not end on KVM", fixture.name);
    (bytes, end)
}

fn replay(fixture: &Fixture, bytes: &[u8], end: End) {
    let mut timeline = Timeline::of(
        open(bytes),
        fixture.name.to_owned(),
        &|memory, cpu, model| {
            let mut engine = SoftEngine::new(memory.clone(), model)?;
            engine.set_state(VcpuId::BOOT, cpu)?;
            Ok(Box::new(engine))
        },
    )
    .expect("a timeline");
    let report = timeline.run_to_end().expect("replay");
    if let Outcome::Diverged(divergence) = &report.outcome {
        panic!("{}: {divergence}", fixture.name);
    }
    assert_eq!(report.outcome, Outcome::Verified, "{}", fixture.name);
    assert_eq!(report.end, Some(end), "{}", fixture.name);
}

#[test]
fn every_guest_recorded_on_kvm_replays_on_soft() {
    if !available() {
        return;
    }
    let options = RecordOptions {
        digest_sync_points: 50,
        digest_spacing: 0,
        ..RecordOptions::default()
    };
    for fixture in fixtures::ALL {
        let (bytes, end) = recorded(fixture, options.clone());
        replay(fixture, &bytes, end);
    }
}

#[test]
fn crash_and_timer_replay_time_and_again() {
    if !available() {
        return;
    }
    for _ in 0..5 {
        for name in ["timer", "crash"] {
            let fixture = fixtures::by_name(name).expect("a guest");
            let (bytes, end) = recorded(fixture, RecordOptions::default());
            replay(fixture, &bytes, end);
        }
    }
}
