//! Moving along a timeline on a scripted processor: every boundary is reached alike from every side.

mod support;

use machine::End;
use machine::debuggable::{Debuggable, Resume, Stop};
use machine::engine::EngineError;
use proptest::prelude::*;
use replay::digest::CpuDigest;
use replay::timeline::{OpenTimelineError, Outcome, Timeline};
use std::collections::BTreeSet;
use std::sync::OnceLock;
use std::time::Duration;
use support::fake::{FakeEngine, racing};
use support::host::Capricious;
use support::{config, open, options, record, timeline};
use x86::{Gpr, GuestPhysAddr, GuestVirtAddr, Position, VcpuId};

const TICKS: u64 = 4;
/// Long enough never to be over.
const LONG: Duration = Duration::from_secs(3600);

/// A recording full of landmarks.
fn trace() -> &'static [u8] {
    static TRACE: OnceLock<Vec<u8>> = OnceLock::new();
    TRACE.get_or_init(|| {
        let host = Capricious {
            input_every: 3,
            ..Capricious::new(11)
        };
        let (bytes, end) = record(&config(), options(), |memory, _| {
            let engine = FakeEngine::new(racing(TICKS), memory.clone(), false);
            (Box::new(engine.kicked(vec![37, 401, 93, 1, 250])), host)
        });
        assert_eq!(end, End::DebugExit(7));
        assert!(open(&bytes).end.expect("complete").totals.landmarks > 10);
        bytes
    })
}

/// What a boundary looks like: position, RIP, CPU and memory.
type Look = (Position, u64, CpuDigest, u64);

fn look(timeline: &mut Timeline) -> Look {
    let cpu = timeline.cpu(VcpuId::BOOT).expect("clean");
    let position = timeline.position().expect("counts");
    // What the program writes; the whole of memory is compared at the end of every replay.
    let mut memory = vec![0; 0xa000];
    timeline
        .memory()
        .read(GuestPhysAddr::new(0), &mut memory)
        .expect("RAM");
    (
        position,
        cpu.regs.rip,
        CpuDigest::of(&cpu),
        xxhash_rust::xxh3::xxh3_64(&memory),
    )
}

/// Every boundary of the recording, by stepping from its start.
fn boundaries() -> &'static [Look] {
    static LOOKS: OnceLock<Vec<Look>> = OnceLock::new();
    LOOKS.get_or_init(|| {
        let mut timeline = timeline(trace(), &racing(TICKS));
        let mut looks = vec![look(&mut timeline)];
        loop {
            match timeline
                .resume(Resume::Step(VcpuId::BOOT), LONG)
                .expect("step")
            {
                Stop::Stepped => looks.push(look(&mut timeline)),
                Stop::Ended(End::DebugExit(7)) => break,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(timeline.report().outcome, Outcome::Verified);
        looks
    })
}

fn fresh() -> Timeline {
    timeline(trace(), &racing(TICKS))
}

/// Calls again while only the time slice was over.
fn patiently(mut call: impl FnMut() -> Stop) -> Stop {
    loop {
        match call() {
            Stop::Slice => {}
            stop => return stop,
        }
    }
}

#[test]
fn stepping_visits_each_boundary_once_and_in_order() {
    let looks = boundaries();
    assert!(looks.len() > 1000, "{}", looks.len());
    assert!(looks.windows(2).all(|pair| pair[0].0 < pair[1].0));
    assert!(looks.iter().any(|look| look.0.within > 1), "inside a REP");
}

#[test]
fn stepping_ends_as_running_does() {
    let mut timeline = fresh();
    let report = timeline.run_to_end().expect("replay");
    assert_eq!(report.outcome, Outcome::Verified);
    assert_eq!(timeline.end(), Some(End::DebugExit(7)));
    assert_eq!(
        timeline.resume(Resume::Continue, LONG).expect("resume"),
        Stop::Ended(End::DebugExit(7))
    );
    let console = timeline.console().to_vec();
    assert_eq!(console.len() as u64, report.console_bytes);
    assert!(report.exits > 20);
    // To the start and again, with the same result.
    let stop = timeline.seek(Position::START, LONG).expect("seek");
    assert_eq!(stop, Stop::Stepped);
    assert_eq!((timeline.end(), timeline.console()), (None, &b""[..]));
    assert_eq!(look(&mut timeline), boundaries()[0]);
    let again = timeline.run_to_end().expect("replay");
    assert_eq!(
        replay::timeline::Report {
            duration: report.duration,
            ..again
        },
        report
    );
    assert_eq!(timeline.console(), console);
}

#[test]
fn stepping_back_is_the_inverse_of_stepping() {
    let looks = boundaries();
    let mut timeline = fresh();
    let from = looks.len() - 1;
    assert_eq!(
        timeline.seek(looks[from].0, LONG).expect("seek"),
        Stop::Stepped
    );
    for expected in looks[..from].iter().rev().take(400) {
        let reverse = timeline.reverse().expect("keeps its past");
        let stop = patiently(|| {
            reverse
                .step_back(VcpuId::BOOT, Duration::ZERO)
                .expect("back")
        });
        assert_eq!(stop, Stop::Stepped);
        assert_eq!(look(&mut timeline), *expected);
    }
    assert_eq!(
        timeline
            .resume(Resume::Step(VcpuId::BOOT), LONG)
            .expect("step"),
        Stop::Stepped
    );
    assert_eq!(look(&mut timeline), looks[from - 399]);
    // From the very end, and at the very start.
    timeline.run_to_end().expect("replay");
    let reverse = timeline.reverse().expect("keeps its past");
    assert_eq!(
        reverse.step_back(VcpuId::BOOT, LONG).expect("back"),
        Stop::Stepped
    );
    assert_eq!(look(&mut timeline), looks[looks.len() - 1]);
    timeline.seek(looks[1].0, LONG).expect("seek");
    let reverse = timeline.reverse().expect("keeps its past");
    assert_eq!(
        reverse.step_back(VcpuId::BOOT, LONG).expect("back"),
        Stop::Stepped
    );
    assert_eq!(
        reverse.step_back(VcpuId::BOOT, LONG).expect("back"),
        Stop::StartOfHistory
    );
    assert_eq!(look(&mut timeline), looks[0]);
}

/// The interrupt handler, the REP, the main loop.
fn breakpoints() -> Vec<BTreeSet<GuestVirtAddr>> {
    let looks = boundaries();
    let rep = looks
        .iter()
        .find(|look| look.0.within > 1)
        .expect("a REP")
        .1;
    let handler = racing(TICKS).handler as u64;
    let at = |list: &[u64]| list.iter().map(|&a| GuestVirtAddr::new(a)).collect();
    vec![
        at(&[handler]),
        at(&[rep]),
        at(&[handler, handler + 1]),
        at(&[20, handler + 9]),
    ]
}

/// Where breakpoints are met going forward: each boundary whose instruction has one.
fn hits(set: &BTreeSet<GuestVirtAddr>) -> Vec<&'static Look> {
    // The fake processor counts RIP in instructions, with a code segment that starts elsewhere.
    boundaries()
        .iter()
        .filter(|look| set.contains(&linear(look.1)))
        .collect()
}

fn linear(rip: u64) -> GuestVirtAddr {
    let mut cpu = x86::CpuState::default();
    cpu.regs.rip = rip;
    cpu.rip_linear()
}

#[test]
fn continuing_stops_at_every_breakpoint() {
    for set in breakpoints() {
        let set: BTreeSet<_> = set.iter().map(|addr| linear(addr.get())).collect();
        let mut timeline = fresh();
        timeline.set_breakpoints(&set).expect("set");
        let hits = hits(&set);
        assert!(hits.len() > 1, "{}", hits.len());
        for hit in &hits {
            let stop = patiently(|| {
                timeline
                    .resume(Resume::Continue, Duration::ZERO)
                    .expect("run")
            });
            assert_eq!(stop, Stop::Breakpoint(VcpuId::BOOT, linear(hit.1)));
            assert_eq!(look(&mut timeline), **hit);
        }
        let stop = patiently(|| {
            timeline
                .resume(Resume::Continue, Duration::ZERO)
                .expect("run")
        });
        assert_eq!(stop, Stop::Ended(End::DebugExit(7)));
        assert_eq!(timeline.report().outcome, Outcome::Verified);
        // And backwards through all of them.
        for hit in hits.iter().rev() {
            let reverse = timeline.reverse().expect("keeps its past");
            let stop = patiently(|| reverse.continue_back(Duration::ZERO).expect("back"));
            assert_eq!(stop, Stop::Breakpoint(VcpuId::BOOT, linear(hit.1)));
            assert_eq!(look(&mut timeline), **hit);
        }
        let reverse = timeline.reverse().expect("keeps its past");
        let stop = patiently(|| reverse.continue_back(Duration::ZERO).expect("back"));
        assert_eq!(stop, Stop::StartOfHistory);
        assert_eq!(look(&mut timeline), boundaries()[0]);
    }
}

#[test]
fn events_learn_their_positions_as_they_are_passed() {
    let mut timeline = fresh();
    assert!(
        timeline
            .events()
            .iter()
            .all(|event| event.position.is_none())
    );
    let half = boundaries()[boundaries().len() / 2].0;
    timeline.seek(half, LONG).expect("seek");
    let known = timeline
        .events()
        .iter()
        .filter(|event| event.position.is_some())
        .count();
    assert!(known > 0 && known < timeline.events().len());
    let (passed, total) = timeline.progress();
    assert!(passed > 0 && passed < total);
    timeline.run_to_end().expect("replay");
    let positions: Vec<_> = timeline
        .events()
        .iter()
        .map(|e| e.position.expect("passed"))
        .collect();
    assert!(positions.is_sorted());
    assert_eq!(timeline.progress(), (total, total));
}

#[test]
fn a_change_leaves_the_recording_and_going_back_returns_to_it() {
    let looks = boundaries();
    let middle = looks[looks.len() / 2];
    let mut timeline = fresh();
    timeline.seek(middle.0, LONG).expect("seek");
    assert!(!timeline.branched());
    // Three ticks are enough for this future.
    timeline
        .write_memory(GuestPhysAddr::new(0x7000), &(TICKS - 1).to_le_bytes())
        .expect("write");
    let mut cpu = timeline.cpu(VcpuId::BOOT).expect("state");
    cpu.regs[Gpr::R15] = 0x1234;
    timeline.set_cpu(VcpuId::BOOT, &cpu).expect("set");
    assert!(timeline.branched());
    let edited = look(&mut timeline);
    assert_eq!(
        timeline
            .resume(Resume::Step(VcpuId::BOOT), LONG)
            .expect("step"),
        Stop::Stepped
    );
    let stop = patiently(|| timeline.resume(Resume::Continue, LONG).expect("run"));
    assert_eq!(stop, Stop::Ended(End::DebugExit(7)), "in its own way");
    assert!(timeline.branched() && timeline.divergence().is_none());
    assert_eq!(timeline.report().outcome, Outcome::Unfinished);
    assert_eq!(
        timeline.cpu(VcpuId::BOOT).expect("state").regs[Gpr::R15],
        0x1234
    );
    let (end, console) = (look(&mut timeline), timeline.console().to_vec());
    // The branch goes the same way again.
    timeline.seek(middle.0, LONG).expect("seek");
    assert!(timeline.branched());
    assert_eq!(look(&mut timeline), edited);
    patiently(|| timeline.resume(Resume::Continue, LONG).expect("run"));
    assert_eq!(
        (look(&mut timeline), timeline.console()),
        (end, &console[..])
    );
    // Before the change there is the recording, with its own future.
    let before = looks[looks.len() / 2 - 1];
    timeline.seek(before.0, LONG).expect("seek");
    assert!(!timeline.branched());
    assert_eq!(look(&mut timeline), before);
    let report = timeline.run_to_end().expect("replay");
    assert_eq!(report.outcome, Outcome::Verified);
}

#[test]
fn a_branch_of_a_guest_that_nothing_wakes_is_stopped() {
    let (bytes, _) = record(&config(), options(), |memory, _| {
        (
            Box::new(FakeEngine::new(racing(TICKS), memory.clone(), true)),
            Capricious::new(3),
        )
    });
    // Before the timer is programmed, the guest is made to halt with interrupts on.
    let program = racing(TICKS);
    let halt = program
        .ops
        .iter()
        .position(|op| matches!(op, support::fake::Op::Hlt));
    let mut timeline = timeline(&bytes, &program);
    let mut cpu = timeline.cpu(VcpuId::BOOT).expect("state");
    cpu.regs.rip = halt.expect("a HLT") as u64;
    cpu.regs.rflags |= x86::regs::rflags::IF;
    timeline.set_cpu(VcpuId::BOOT, &cpu).expect("set");
    let stop = patiently(|| timeline.resume(Resume::Continue, LONG).expect("run"));
    assert_eq!(stop, Stop::Ended(End::Stopped));
}

#[test]
fn an_engine_that_does_not_count_is_refused() {
    let error = Timeline::of(open(trace()), "t".to_owned(), &|memory, _, _| {
        Ok(Box::new(FakeEngine::new(racing(1), memory.clone(), false)))
    });
    let error = error.map(|_| ()).expect_err("refused");
    assert!(
        matches!(error, OpenTimelineError::CannotCount("kvm")),
        "{error}"
    );
    assert!(error.to_string().contains("soft"), "{error}");
    let error = Timeline::of(open(trace()), "t".to_owned(), &|_, _, _| {
        Err(EngineError::OutOfOrder("no engine today"))
    });
    assert!(matches!(
        error.map(|_| ()),
        Err(OpenTimelineError::Engine(_))
    ));
}

#[test]
fn a_machine_that_cannot_be_is_refused() {
    let mut trace = open(crate::trace());
    trace.machine.memory = u64::MAX;
    let made = Timeline::of(trace, "t".to_owned(), &|_, _, _| unreachable!());
    assert!(matches!(made.map(|_| ()), Err(OpenTimelineError::Build(_))));
    let mut trace = open(crate::trace());
    trace.images[0].bytes.truncate(100);
    let made = Timeline::of(trace, "t".to_owned(), &|_, _, _| unreachable!());
    assert!(matches!(made.map(|_| ()), Err(OpenTimelineError::Build(_))));
    let mut trace = open(crate::trace());
    trace.images.clear();
    let made = Timeline::of(trace, "t".to_owned(), &|_, _, _| unreachable!());
    assert!(matches!(made.map(|_| ()), Err(OpenTimelineError::NoKernel)));
}

#[test]
fn a_cut_recording_can_be_looked_at_from_both_sides_of_its_end() {
    let bytes = &trace()[..trace().len() - 500];
    let mut timeline = timeline(bytes, &racing(TICKS));
    assert!(timeline.damage().is_some());
    let stop = patiently(|| timeline.resume(Resume::Continue, LONG).expect("run"));
    assert_eq!(stop, Stop::EndOfHistory);
    let end = look(&mut timeline);
    let at = boundaries()
        .iter()
        .position(|look| *look == end)
        .expect("a boundary of the recording");
    assert_eq!(
        timeline.resume(Resume::Continue, LONG).expect("run"),
        Stop::EndOfHistory
    );
    let reverse = timeline.reverse().expect("keeps its past");
    assert_eq!(
        reverse.step_back(VcpuId::BOOT, LONG).expect("back"),
        Stop::Stepped
    );
    assert_eq!(look(&mut timeline), boundaries()[at - 1]);
    assert_eq!(
        timeline
            .resume(Resume::Step(VcpuId::BOOT), LONG)
            .expect("step"),
        Stop::Stepped
    );
    assert_eq!(look(&mut timeline), end);
    assert_eq!(
        timeline
            .resume(Resume::Step(VcpuId::BOOT), LONG)
            .expect("step"),
        Stop::EndOfHistory
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(40) })]

    #[test]
    fn every_boundary_is_reached_alike_from_everywhere(
        places in proptest::collection::vec(any::<prop::sample::Index>(), 1..40),
        spacing in 10u64..3000,
    ) {
        let looks = boundaries();
        let mut timeline = fresh();
        timeline.set_snapshot_spacing(spacing);
        for place in places {
            let expected = place.get(looks);
            let stop = patiently(|| timeline.seek(expected.0, Duration::ZERO).expect("seek"));
            prop_assert_eq!(stop, Stop::Stepped);
            prop_assert_eq!(&look(&mut timeline), expected);
        }
        prop_assert_eq!(timeline.run_to_end().expect("replay").outcome, Outcome::Verified);
    }
}
