//! Recording and replaying on a scripted processor: every kind of moment, and every kind of divergence at its place.

mod support;

use machine::End;
use machine::debuggable::{Debuggable, Stop};
use machine::environment::Arrival;
use replay::divergence::Difference;
use replay::timeline::Outcome;
use replay::trace::{Moment, Record};
use std::time::Duration;
use support::fake::{FakeEngine, Fault, racing};
use support::host::Capricious;
use support::{config, edited, log, open, options, record, timeline, timeline_with};
use x86::{Gpr, Nanos};

/// Kicks at boundaries that fall on anything: loops, REP iterations, handlers, right after exits.
fn kicks(seed: u64) -> Vec<u64> {
    (0..50)
        .map(|i| 1 + (seed.wrapping_mul(6_364_136_223_846_793_005) >> (i % 40)) % 301)
        .collect()
}

/// A recording as a hypervisor makes it.
fn blind(seed: u64, ticks: u64) -> (Vec<u8>, End) {
    record(&config(), options(), |memory, _| {
        let engine = FakeEngine::new(racing(ticks), memory.clone(), false);
        (Box::new(engine.kicked(kicks(seed))), Capricious::new(seed))
    })
}

/// A recording on an engine that counts.
fn counted(seed: u64, ticks: u64) -> (Vec<u8>, End) {
    let host = Capricious {
        slices: true,
        ..Capricious::new(seed)
    };
    record(&config(), options(), |memory, _| {
        (
            Box::new(FakeEngine::new(racing(ticks), memory.clone(), true)),
            host,
        )
    })
}

#[test]
fn recordings_by_landmark_replay_exactly() {
    let mut landmarks = 0;
    for seed in 1..40 {
        let (bytes, end) = blind(seed, 12);
        assert_eq!(end, End::DebugExit(7));
        let trace = open(&bytes);
        landmarks += trace.end.as_ref().expect("complete").totals.landmarks;
        let mut timeline = timeline(&bytes, &racing(12));
        let report = timeline.run_to_end().expect("replay");
        assert_eq!(report.outcome, Outcome::Verified, "seed {seed}");
        assert!(report.verified > 3, "seed {seed}: {report:?}");
        assert_eq!(report.end, Some(end));
        let totals = trace.end.expect("complete").totals;
        assert_eq!(report.arrivals, totals.arrivals);
        assert_eq!(report.console_bytes, totals.console_bytes);
        assert!(
            timeline
                .events()
                .iter()
                .all(|event| event.position.is_some())
        );
    }
    assert!(
        landmarks > 300,
        "only {landmarks} landmarks: the test does not test"
    );
}

#[test]
fn recordings_by_position_replay_exactly() {
    let mut positions = 0;
    for seed in 1..40 {
        let (bytes, end) = counted(seed, 12);
        let mut timeline = timeline(&bytes, &racing(12));
        positions += open(&bytes)
            .events
            .iter()
            .filter(|e| e.position.is_some())
            .count();
        let report = timeline.run_to_end().expect("replay");
        assert_eq!(report.outcome, Outcome::Verified, "seed {seed}");
        assert_eq!(report.end, Some(end));
        let recorded = open(&bytes)
            .end
            .expect("complete")
            .position
            .expect("counted");
        assert_eq!(report.instructions, recorded.retired.get());
    }
    assert!(
        positions > 100,
        "only {positions} arrivals between sync points: the test does not test"
    );
}

#[test]
fn two_seeds_make_two_different_runs() {
    let console = |seed| {
        let (bytes, _) = blind(seed, 12);
        open(&bytes).end.expect("complete").console
    };
    assert_ne!(console(1), console(2), "the race does not race");
}

#[test]
fn a_stop_is_replayed_where_it_came() {
    for seed in 1..30 {
        let host = Capricious {
            stop_at: 300_000 * seed,
            ..Capricious::new(seed)
        };
        let (bytes, end) = record(&config(), options(), |memory, _| {
            let engine = FakeEngine::new(racing(u64::MAX), memory.clone(), false);
            (Box::new(engine.kicked(kicks(seed))), host)
        });
        assert_eq!(end, End::Stopped);
        assert!(
            open(&bytes).end.expect("complete").cpu.is_some(),
            "a state to look at"
        );
        let report = timeline(&bytes, &racing(u64::MAX))
            .run_to_end()
            .expect("replay");
        assert_eq!(
            (report.outcome, report.end),
            (Outcome::Verified, Some(End::Stopped))
        );
    }
}

#[test]
fn every_prefix_of_a_recording_replays_to_where_it_ends() {
    let (bytes, _) = blind(5, 6);
    let mut lengths: Vec<usize> = (0..bytes.len()).step_by(977).collect();
    lengths.extend(bytes.len() - 300..bytes.len());
    let mut replayed = 0;
    for len in lengths {
        let cut = std::io::Cursor::new(bytes[..len].to_vec());
        let Ok(trace) = replay::trace::Trace::read(Box::new(cut)) else {
            continue;
        };
        assert!(!trace.complete());
        let mut timeline = timeline(&bytes[..len], &racing(6));
        let report = timeline.run_to_end().expect("replay");
        assert!(
            matches!(report.outcome, Outcome::Incomplete { .. }),
            "{len}: {report:?}"
        );
        assert_eq!(report.arrivals, trace.events.len() as u64, "cut at {len}");
        timeline
            .cpu(x86::VcpuId::BOOT)
            .expect("a clean state to look at");
        replayed += 1;
    }
    assert!(replayed > 100, "only {replayed} prefixes replayed");
}

/// Replays `bytes`, tampered with, and says how it diverged.
fn divergence(
    bytes: &[u8],
    tamper: impl Fn(&mut FakeEngine),
) -> Option<replay::divergence::Divergence> {
    let mut timeline = timeline_with(bytes, &racing(12), tamper);
    let report = timeline.run_to_end().expect("replay");
    match report.outcome {
        Outcome::Diverged(divergence) => {
            let stop = timeline.resume(machine::debuggable::Resume::Continue, Duration::ZERO);
            assert!(
                matches!(stop, Ok(Stop::Diverged(_))),
                "stays where it is: {stop:?}"
            );
            timeline
                .cpu(x86::VcpuId::BOOT)
                .expect("a clean state to look at");
            assert!(!divergence.to_string().is_empty());
            Some(divergence)
        }
        Outcome::Verified => None,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_flipped_register_is_named_with_both_values() {
    let (bytes, _) = counted(3, 12);
    let flip = |engine: &mut FakeEngine| engine.err(Fault::Register(2000, Gpr::R14, 0x40));
    let found = divergence(&bytes, flip).expect("noticed");
    let Difference::State(state) = &found.what else {
        panic!("{found}")
    };
    let names: Vec<_> = state
        .registers
        .iter()
        .map(|r| (r.name, r.recorded, r.replayed))
        .collect();
    assert_eq!(names, [("r14", 0, 0x40)], "{found}");
    assert!(
        found.since.position.expect("counted").retired.get() <= 2000,
        "{found}"
    );
    assert!(
        found.at.position.expect("counted").retired.get() >= 2000,
        "{found}"
    );
    assert!(
        found.to_string().contains("r14 is 0x40 instead of 0x0"),
        "{found}"
    );
}

#[test]
fn a_changed_byte_of_memory_is_named_by_its_page() {
    let (bytes, _) = counted(3, 12);
    // In a page the guest writes all the time.
    let spoil = |engine: &mut FakeEngine| engine.err(Fault::Memory(2000, 0x3fff, 1));
    let found = divergence(&bytes, spoil).expect("noticed");
    let Difference::State(state) = &found.what else {
        panic!("{found}")
    };
    assert_eq!(state.pages, [x86::PageFrame::new(3)], "{found}");
    assert!(found.to_string().contains("0x3000"), "{found}");
    // In a page nobody else writes: known only at the end.
    let spoil = |engine: &mut FakeEngine| engine.err(Fault::Memory(2000, 0x20_0000, 1));
    let found = divergence(&bytes, spoil).expect("noticed");
    let Difference::State(state) = &found.what else {
        panic!("{found}")
    };
    assert!(state.memory && state.pages.is_empty(), "{found}");
}

#[test]
fn other_processor_state_is_compared_too() {
    let (bytes, _) = counted(3, 12);
    let found = divergence(&bytes, |engine| engine.err(Fault::Msr(2000))).expect("noticed");
    let Difference::State(state) = &found.what else {
        panic!("{found}")
    };
    assert_eq!(state.cpu, ["model-specific registers"], "{found}");
}

#[test]
fn a_landmark_that_is_not_found_says_how_near_it_came() {
    let (bytes, _) = blind(3, 12);
    let spoil = |engine: &mut FakeEngine| engine.err(Fault::Register(2000, Gpr::R14, 1));
    let found = divergence(&bytes, spoil).expect("noticed");
    let Difference::NoLandmark(miss) = &found.what else {
        panic!("{found}")
    };
    assert_eq!(miss.candidates, 0, "{found}");
    let spoil = |engine: &mut FakeEngine| engine.err(Fault::Msr(2000));
    let found = divergence(&bytes, spoil).expect("noticed");
    let Difference::NoLandmark(miss) = &found.what else {
        panic!("{found}")
    };
    assert!(miss.candidates > 0, "{found}");
    assert!(miss.nearest.as_ref().expect("near").cpu, "{found}");
}

#[test]
fn a_replay_that_gets_stuck_is_given_up() {
    let forever = racing(12).handler - 1;
    let (bytes, _) = blind(3, 12);
    let mut kinds = [0, 0];
    for at in [500, 1500, 2500, 3500, 4500, 5500] {
        let stick = |engine: &mut FakeEngine| engine.err(Fault::Jump(at, forever));
        match divergence(&bytes, stick).expect("noticed").what {
            Difference::NoLandmark(_) => kinds[0] += 1,
            Difference::Overdue { .. } => kinds[1] += 1,
            // Interrupts still come.
            Difference::State(_) | Difference::Missed { .. } | Difference::Unexpected { .. } => {}
            other => panic!("{other}"),
        }
    }
    assert!(kinds[0] > 0 && kinds[1] > 0, "{kinds:?}");
}

#[test]
fn another_path_is_a_divergence_wherever_it_is_taken() {
    let (bytes, _) = counted(3, 12);
    let mut silent = Vec::new();
    for at in (100..6000).step_by(59) {
        match divergence(&bytes, |engine| engine.err(Fault::Jump(at, 16))) {
            Some(found) => {
                assert!(
                    found.since.position.is_none_or(|p| p.retired.get() <= at),
                    "{at}: {found}"
                );
            }
            None => silent.push(at),
        }
    }
    assert_eq!(silent, [0; 0], "jumps that went unnoticed");
}

/// Every record of every kind, changed or dropped, one by one.
#[test]
fn every_change_to_the_log_is_a_divergence() {
    for (bytes, what) in [(blind(9, 5).0, "landmarks"), (counted(9, 5).0, "positions")] {
        let records = log(&mut open(&bytes));
        let mut unnoticed = Vec::new();
        for (i, record) in records.iter().enumerate() {
            let mut dropped = records.clone();
            dropped.remove(i);
            let mut changes = vec![("dropped", dropped)];
            if let Some(changed) = changed(record) {
                let mut list = records.clone();
                list[i] = changed;
                changes.push(("changed", list));
            }
            for (how, list) in changes {
                if matches!(
                    list.get(i),
                    Some(Record::Arrival {
                        moment: Moment::Same,
                        ..
                    })
                ) {
                    continue; // No valid log: it has lost what it is the same as.
                }
                let harmless = matches!(record, Record::Digest { .. }) && how == "dropped";
                let spoilt = edited(&bytes, |records| *records = list);
                let mut timeline = timeline(&spoilt, &racing(5));
                let report = timeline.run_to_end().expect("replay");
                match report.outcome {
                    Outcome::Diverged(found) => {
                        assert!(!harmless, "{what}, {i}: {found}");
                        assert!(
                            found.since.after <= record.after(),
                            "{what}, {i} {how}: {found}"
                        );
                    }
                    Outcome::Verified if harmless => {}
                    Outcome::Verified => unnoticed.push((i, how, record.to_string())),
                    other => panic!("{other:?}"),
                }
            }
        }
        // Time that no device looks at again, and input no guest reads, show in the devices' state at the end; nothing may be lost.
        assert!(unnoticed.is_empty(), "{what}: {unnoticed:#?}");
    }
}

/// The record with something else in it; `None` for what has nothing to change.
fn changed(record: &Record) -> Option<Record> {
    let mut record = record.clone();
    match &mut record {
        // So far that a timer fires.
        Record::ClockRead { now, .. } => *now = Nanos::new(now.get() + 5_000_000),
        Record::Entropy { bytes, .. } => bytes[0] ^= 1,
        Record::Arrival {
            arrival, moment, ..
        } => match (arrival, moment) {
            (_, Moment::Landmark(landmark)) => landmark.registers[Gpr::Rdx] ^= 1,
            (_, Moment::Position(position)) => position.within += 100,
            (Arrival::Input { bytes, .. }, _) => bytes[0] ^= 1,
            _ => return None,
        },
        Record::Digest { digest, .. } => digest.exits.0 ^= 1,
    }
    Some(record)
}

#[test]
fn a_guest_that_goes_on_past_the_end_is_stopped() {
    let (bytes, _) = counted(4, 5);
    // The program that runs longer asks for what the log does not have.
    let mut timeline = timeline(&bytes, &racing(50));
    let report = timeline.run_to_end().expect("replay");
    let Outcome::Diverged(found) = report.outcome else {
        panic!("{report:?}")
    };
    assert!(
        matches!(
            found.what,
            Difference::PastEnd { .. } | Difference::Unexpected { .. }
        ),
        "{found}"
    );
}

#[test]
fn a_guest_that_ends_early_is_noticed() {
    let (bytes, _) = counted(4, 12);
    let mut timeline = timeline(&bytes, &racing(3));
    let report = timeline.run_to_end().expect("replay");
    let Outcome::Diverged(found) = report.outcome else {
        panic!("{report:?}")
    };
    assert!(
        matches!(
            found.what,
            Difference::EndedEarly { .. } | Difference::State(_) | Difference::Missed { .. }
        ),
        "{found}"
    );
}
