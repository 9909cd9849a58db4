//! The host as an environment: no sleeps, no timing asserts; where something takes time, the tests wait for it to happen.

use super::*;
use crate::End;
use crate::board::{Board, BoardConfig};
use crate::memory::GuestMemory;
use crate::session::{Session, Turn};
use crate::tiny_engine::{Op, TinyEngine, start_timer};
use std::num::NonZeroU64;
use std::sync::Mutex;

/// A sink the test can look into.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Sink {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().expect("not poisoned")).into_owned()
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("not poisoned").extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A pipe whose reader is gone.
struct Broken;

impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// An environment with the engine and memory its boundaries show.
struct Bench {
    engine: TinyEngine,
    memory: GuestMemory,
    environment: HostEnvironment,
    sink: Sink,
}

/// What a boundary is like, besides the parts that are always the same.
#[derive(Clone, Copy, Default)]
struct At {
    halted: bool,
    incomplete: bool,
    deadline: Option<Nanos>,
    room: usize,
}

impl Bench {
    fn new(clock: Clock) -> Self {
        Self::with(TinyEngine::new(vec![], vec![]), clock)
    }

    fn with(engine: TinyEngine, clock: Clock) -> Self {
        let sink = Sink::default();
        let kick = engine.kick_flag();
        let environment =
            HostEnvironment::new(kick, clock, Box::new(sink.clone())).expect("starts");
        let memory = GuestMemory::new(1 << 20).expect("1 MiB");
        Self {
            engine,
            memory,
            environment,
            sink,
        }
    }

    fn ask(&mut self, at: At) -> Directive {
        self.try_ask(at).expect("an answer")
    }

    fn try_ask(&mut self, at: At) -> Result<Directive, EnvironmentError> {
        self.environment.boundary(Boundary {
            vcpu: VcpuId::BOOT,
            cause: None,
            ordinal: SyncOrdinal(0),
            incomplete: at.incomplete,
            halted: at.halted,
            deadline: at.deadline,
            input_room: at.room,
            engine: &mut self.engine,
            memory: &self.memory,
            board: &Board::new(&BoardConfig::default()),
        })
    }
}

fn instructions(per_second: u64) -> Clock {
    Clock::Instructions {
        per_second: NonZeroU64::new(per_second).expect("not zero"),
    }
}

fn bytes(directive: &Directive) -> Vec<u8> {
    let input = directive
        .arrivals
        .iter()
        .filter_map(|arrival| match arrival {
            Arrival::Input {
                channel: Channel::Com1,
                bytes,
            } => Some(bytes.clone()),
            _ => None,
        });
    input.flatten().collect()
}

#[test]
fn nothing_arrives_nearly_always() {
    let mut bench = Bench::new(Clock::Host);
    assert_eq!(bench.ask(At::default()), Directive::default());
    let far = At {
        deadline: Some(Nanos::NEVER),
        ..At::default()
    };
    assert_eq!(bench.ask(far), Directive::default());
}

#[test]
fn time_arrives_at_a_deadline_that_has_passed() {
    let mut bench = Bench::new(Clock::Host);
    let directive = bench.ask(At {
        deadline: Some(Nanos::ZERO),
        ..At::default()
    });
    assert!(matches!(directive.arrivals[..], [Arrival::Time { .. }]));
}

#[test]
fn a_halted_cpu_waits_for_its_deadline() {
    let mut bench = Bench::new(Clock::Host);
    let deadline = bench
        .environment
        .now()
        .expect("a clock")
        .saturating_add(2_000_000);
    let at = At {
        halted: true,
        deadline: Some(deadline),
        ..At::default()
    };
    match bench.ask(at).arrivals[..] {
        [Arrival::Time { now }] => assert!(now >= deadline),
        ref other => panic!("{other:?}"),
    }
}

#[test]
fn a_halted_cpu_waits_for_input_a_stop_or_the_end_of_a_slice() {
    let halted = At {
        halted: true,
        room: 100,
        ..At::default()
    };

    let mut bench = Bench::new(Clock::Host);
    let input = bench.environment.input_handle();
    let typist = std::thread::spawn(move || input.push(b"hello"));
    assert_eq!(bytes(&bench.ask(halted)), b"hello");
    typist.join().expect("joins").expect("pushed");

    let stop = bench.environment.stop_handle();
    let stopper = std::thread::spawn(move || stop.stop());
    assert_eq!(bench.ask(halted).arrivals, [Arrival::Stop]);
    stopper.join().expect("joins");

    let mut bench = Bench::new(instructions(1));
    let mut control = bench.environment.run_control();
    control.start(Duration::ZERO);
    assert_eq!(bench.ask(halted), Directive::default());
    assert!(control.expired());
    control.start(Duration::from_secs(3600));
    assert!(!control.expired());
}

#[test]
fn input_comes_in_order_as_there_is_room_and_none_is_lost() {
    let mut bench = Bench::new(Clock::Host);
    let text: Vec<u8> = (0..20_000u32).map(|n| n as u8).collect();
    let (input, typed) = (bench.environment.input_handle(), text.clone());
    let typist = std::thread::spawn(move || input.push(&typed));
    let mut seen = Vec::new();
    while seen.len() < text.len() {
        // First with the little room a guest has, then waiting for more.
        seen.extend(bytes(&bench.ask(At {
            room: 7,
            ..At::default()
        })));
        seen.extend(bytes(&bench.ask(At {
            room: 0,
            ..At::default()
        })));
        if seen.len() < text.len() {
            seen.extend(bytes(&bench.ask(At {
                room: 1000,
                halted: true,
                ..At::default()
            })));
        }
    }
    assert!(seen == text);
    typist.join().expect("joins").expect("pushed");
}

#[test]
fn a_typist_learns_that_the_machine_is_gone() {
    let bench = Bench::new(Clock::Host);
    let input = bench.environment.input_handle();
    let typist = std::thread::spawn(move || input.push(&[0; 1 << 20]));
    drop(bench);
    assert_eq!(typist.join().expect("joins"), Err(InputClosed));
}

#[test]
fn a_stop_waits_for_the_instruction_in_progress_and_is_never_taken_back() {
    let mut bench = Bench::new(Clock::Host);
    bench.environment.stop_handle().stop();
    let directive = bench.ask(At {
        incomplete: true,
        ..At::default()
    });
    assert_eq!(
        directive,
        Directive {
            arrivals: vec![],
            bound: Bound::Completed
        }
    );
    for _ in 0..2 {
        assert_eq!(bench.ask(At::default()).arrivals, [Arrival::Stop]);
    }
}

#[test]
fn lines_are_written_whole_and_the_rest_before_anything_else_happens() {
    let mut bench = Bench::new(Clock::Host);
    let output = |bench: &mut Bench, text: &[u8]| {
        for byte in text {
            bench
                .environment
                .output(Channel::Com1, &[*byte])
                .expect("written");
        }
    };
    let exit = |bench: &mut Bench, exit: Exit| {
        bench
            .environment
            .exited(VcpuId::BOOT, &exit, SyncOrdinal(1), None)
            .expect("told");
    };
    output(&mut bench, b"one\ntw");
    assert_eq!(bench.sink.text(), "one\n");
    exit(
        &mut bench,
        Exit::IoIn {
            port: 0x3fd,
            size: 1,
        },
    );
    assert_eq!(bench.sink.text(), "one\n", "it polls its transmitter");
    exit(&mut bench, Exit::Hlt);
    assert_eq!(bench.sink.text(), "one\ntw");
    output(&mut bench, b"o");
    drop(bench.environment);
    assert_eq!(bench.sink.text(), "one\ntwo");
}

#[test]
fn a_line_that_stays_unfinished_is_written_all_the_same() {
    let mut bench = Bench::new(Clock::Host);
    bench
        .environment
        .output(Channel::Com1, b"login: ")
        .expect("taken");
    // A guest that polls for input.
    while bench.sink.text().is_empty() {
        bench.ask(At::default());
    }
    assert_eq!(bench.sink.text(), "login: ");
}

#[test]
fn a_closed_pipe_is_an_error_that_says_so() {
    let kick = TinyEngine::new(vec![], vec![]).kick_flag();
    let mut environment =
        HostEnvironment::new(kick, Clock::Host, Box::new(Broken)).expect("starts");
    environment
        .output(Channel::Com1, b"x")
        .expect("it waits for the line");
    let error = environment
        .output(Channel::Com1, b"\n")
        .expect_err("closed");
    assert_eq!(
        error.to_string(),
        "cannot write the guest's console output: broken pipe"
    );
    environment
        .flush()
        .expect("what was lost is not written again");
}

#[test]
fn entropy_is_fresh() {
    let mut bench = Bench::new(Clock::Host);
    let mut draws = [[0; 32]; 2];
    for draw in &mut draws {
        bench.environment.entropy(draw).expect("random bytes");
    }
    assert_ne!(draws[0], draws[1]);
}

#[test]
fn the_instruction_clock_needs_an_engine_that_counts() {
    let engine = TinyEngine::new(vec![], vec![]).without_position();
    let mut bench = Bench::with(engine, instructions(1000));
    let error = bench
        .try_ask(At::default())
        .expect_err("refused")
        .to_string();
    assert!(error.contains("kvm engine does not count"), "{error}");
}

#[test]
fn the_instruction_clock_bounds_runs_at_the_deadline_and_skips_idle_time() {
    let mut bench = Bench::new(instructions(1_000_000_000));
    let deadline = Some(Nanos::new(500));
    assert_eq!(bench.ask(At::default()).bound, Bound::Exit);
    let ahead = bench.ask(At {
        deadline,
        ..At::default()
    });
    assert_eq!(ahead.bound, Bound::Position(Position::at(500)));
    let skipped = bench.ask(At {
        deadline,
        halted: true,
        ..At::default()
    });
    assert_eq!(
        skipped.arrivals,
        [Arrival::Time {
            now: Nanos::new(500)
        }]
    );
    assert_eq!(bench.environment.now().expect("a clock"), Nanos::new(500));
    let passed = bench.ask(At {
        deadline,
        ..At::default()
    });
    assert_eq!(
        passed.arrivals,
        [Arrival::Time {
            now: Nanos::new(500)
        }]
    );
    assert_eq!(
        passed.bound,
        Bound::Position(Position::at(1)),
        "soon: there is a new deadline"
    );
}

/// A session of a program with a timer of `count` ticks.
fn ticking(
    count: u16,
    then: &[Op],
    handler: &[Op],
    clock: Clock,
) -> (Session<HostEnvironment>, Sink, Arc<dyn Kick>) {
    let program = [start_timer(count), then.to_vec()].concat();
    let engine = TinyEngine::new(program, handler.to_vec());
    let (sink, kick) = (Sink::default(), engine.kick_flag());
    let environment =
        HostEnvironment::new(kick.clone(), clock, Box::new(sink.clone())).expect("starts");
    let session = Session::new(
        GuestMemory::new(1 << 20).expect("1 MiB"),
        Board::new(&BoardConfig::default()),
        Box::new(engine),
        Box::new(environment),
    );
    (session, sink, kick)
}

#[test]
fn the_alarm_brings_a_guest_out_that_never_exits() {
    let here = start_timer(0).len() as u64;
    for count in [2, 1193, 20_000] {
        let (mut session, _, _) = ticking(
            count,
            &[Op::Sti, Op::Jump(here + 1)],
            &[Op::Out(0xf4, 3)],
            Clock::Host,
        );
        assert_eq!(session.run_to_end().expect("runs"), End::DebugExit(3));
    }
}

#[test]
fn a_stop_brings_a_guest_out_that_never_exits() {
    let (mut session, _, _) = ticking(0, &[Op::Jump(8)], &[], Clock::Host);
    let stop = session.environment().stop_handle();
    let stopper = std::thread::spawn(move || stop.stop());
    assert_eq!(session.run_to_end().expect("runs"), End::Stopped);
    stopper.join().expect("joins");
}

#[test]
fn a_slice_brings_a_guest_out_that_never_exits_and_time_stands_still_after_it() {
    let (mut session, _, _) = ticking(0, &[Op::Jump(8)], &[], Clock::Host);
    let mut control = session.environment().run_control();
    for _ in 0..3 {
        control.start(Duration::from_millis(1));
        while !control.expired() {
            session.turn(&Bound::Exit).expect("runs");
        }
        control.pause();
    }
    assert!(session.counts().total().count > 0);
}

#[test]
fn the_instruction_clock_gives_the_same_run_every_time() {
    let here = start_timer(0).len() as u64;
    let spin = [Op::Sti, Op::Nop, Op::Jump(here + 1)];
    let handler = [Op::Out(0xe9, b't'), Op::Out(0x20, 0x20), Op::Iret];
    let run = || {
        let (mut session, sink, kick) = ticking(1193, &spin, &handler, instructions(10_000_000));
        let mut exits = Vec::new();
        let mut turns = 0;
        while sink.text().len() < 10 {
            turns += 1;
            if turns % 3 == 0 {
                kick.kick(); // must not matter
            }
            match session.turn(&Bound::Exit).expect("runs") {
                Turn::Exit(Exit::Kicked) => {}
                Turn::Exit(exit) => {
                    exits.push((exit, session.engine().position().expect("it counts")));
                }
                other => panic!("{other:?}"),
            }
        }
        exits
    };
    let exits = run();
    assert_eq!(run(), exits);
    let windows = exits
        .iter()
        .filter(|(exit, _)| *exit == Exit::InterruptWindow);
    let at: Vec<u64> = windows
        .map(|(_, position)| position.retired.get())
        .collect();
    // 1193 ticks are 999 847 ns, at 10 instructions a microsecond.
    for pair in at.windows(2) {
        assert!((9998..=9999).contains(&(pair[1] - pair[0])), "{at:?}");
    }
}

#[test]
fn a_halted_guest_on_the_instruction_clock_costs_no_time() {
    let here = start_timer(0).len() as u64;
    let handler = [Op::Out(0x20, 0x20), Op::Iret];
    let (mut session, _, _) = ticking(
        0xffff,
        &[Op::Sti, Op::Hlt, Op::Jump(here + 1)],
        &handler,
        instructions(1000),
    );
    while session.environment().now().expect("a clock") < Nanos::new(3_600_000_000_000) {
        session.turn(&Bound::Exit).expect("runs");
    }
    assert_eq!(session.end(), None);
}

#[test]
fn the_wall_clock_is_after_this_was_written() {
    assert!(wall_clock() > 1_700_000_000);
}
