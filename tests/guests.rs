//! Every fixture guest, on both engines, run, recorded and replayed.

mod harness;

use fixtures::{End, Fixture};
use harness::{Traces, expect, run, stderr};

fn end_of(status: Option<i32>) -> End {
    match status {
        Some(124) => End::TripleFault,
        Some(status) => End::DebugExit(u8::try_from(status).expect("a status is a byte")),
        None => panic!("killed by a signal"),
    }
}

/// Records a fixture on `engine`, holds its console and end against what it must do, replays it and wants the same again.
fn record_and_replay(fixture: &Fixture, engine: &str, traces: &Traces) {
    let trace = traces.file(&format!("{}-{engine}.cvt", fixture.name));
    let recorded = run(&[
        "record",
        fixture.name,
        "--engine",
        engine,
        "-o",
        &trace,
        "--force",
    ]);
    let end = end_of(recorded.status.code());
    if let Err(mismatch) = fixture.expected.check_run(&recorded.stdout, end) {
        panic!(
            "{} on {engine}: {mismatch}\n{}",
            fixture.name,
            stderr(&recorded)
        );
    }
    let replayed = run(&["replay", &trace]);
    assert_eq!(
        replayed.status.code(),
        recorded.status.code(),
        "replay of {} recorded on {engine}: {}",
        fixture.name,
        stderr(&replayed)
    );
    assert_eq!(
        String::from_utf8_lossy(&replayed.stdout),
        String::from_utf8_lossy(&recorded.stdout),
        "console of {} recorded on {engine}",
        fixture.name
    );
    let verified = stderr(&replayed);
    assert!(
        verified.contains("verified"),
        "the replay says that it verified: {verified}"
    );
}

#[test]
fn every_guest_records_on_soft_and_replays() {
    let traces = Traces::new("guests-soft");
    for fixture in fixtures::ALL {
        record_and_replay(fixture, "soft", &traces);
    }
}

#[test]
fn every_guest_records_on_kvm_and_replays_on_soft() {
    if !harness::kvm("every_guest_records_on_kvm_and_replays_on_soft") {
        return;
    }
    let traces = Traces::new("guests-kvm");
    for fixture in fixtures::ALL {
        record_and_replay(fixture, "kvm", &traces);
    }
}

#[test]
fn a_run_prints_what_a_recording_prints() {
    for fixture in fixtures::ALL.iter().filter(|fixture| fixture.deterministic) {
        let ran = run(&["run", fixture.name, "--engine", "soft"]);
        let end = end_of(ran.status.code());
        if let Err(mismatch) = fixture.expected.check_run(&ran.stdout, end) {
            panic!("{}: {mismatch}\n{}", fixture.name, stderr(&ran));
        }
    }
}

/// The recordings in a row that the interrupt-timing guests must survive.
const ENDURANCE: usize = 100;

fn endure(name: &str) {
    if !harness::kvm(name) {
        return;
    }
    let traces = Traces::new(&format!("endurance-{name}"));
    let fixture = fixtures::by_name(name).expect("a fixture");
    for _ in 0..ENDURANCE {
        record_and_replay(fixture, "kvm", &traces);
    }
}

#[test]
fn a_hundred_kvm_recordings_of_crash_replay() {
    endure("crash");
}

#[test]
fn a_hundred_kvm_recordings_of_timer_replay() {
    endure("timer");
}

#[test]
fn crash_depends_on_interrupt_timing() {
    if !harness::kvm("crash_depends_on_interrupt_timing") {
        return;
    }
    let mut ends = std::collections::BTreeSet::new();
    for _ in 0..200 {
        ends.insert(run(&["run", "crash", "--engine", "kvm"]).status.code());
        if ends.len() == 2 {
            return;
        }
    }
    panic!("200 runs of crash all ended alike: {ends:?}");
}

#[test]
fn the_listed_fixtures_are_the_ones_that_run() {
    let list = expect(0, &["fixtures", "list", "--json"]);
    let list: serde_json::Value = serde_json::from_slice(&list).expect("JSON");
    assert_eq!(list.as_array().map(Vec::len), Some(fixtures::ALL.len()));
    assert!(stderr(&run(&["run", "no-such-guest"])).contains("hello"));
}
