//! The loop over a toy engine: answers, sync points, halting, interrupts and ends.

use super::*;
use crate::board::BoardConfig;
use crate::environment::{Channel, Directive};
use crate::tiny_engine::{Op, TinyEngine, start_timer};
use std::collections::VecDeque;
use x86::{Nanos, Position};

/// Lets the arrivals of a script happen, one list at each boundary, and keeps what it is told.
#[derive(Default)]
struct Script {
    directives: VecDeque<Directive>,
    /// Once the script is over, time comes to the deadline whenever the CPU is halted.
    wakes: bool,
    now: Nanos,
    output: Vec<u8>,
    /// Ordinals at which exits were told, with the exit.
    told: Vec<(u64, Exit)>,
    /// Whether each boundary was halted.
    halted: Vec<bool>,
}

impl Environment for Script {
    fn now(&mut self) -> Result<Nanos, EnvironmentError> {
        Ok(self.now)
    }

    fn entropy(&mut self, out: &mut [u8]) -> Result<(), EnvironmentError> {
        out.fill(7);
        Ok(())
    }

    fn output(&mut self, _: Channel, bytes: &[u8]) -> Result<(), EnvironmentError> {
        self.output.extend(bytes);
        Ok(())
    }

    fn exited(
        &mut self,
        _: VcpuId,
        exit: &Exit,
        ordinal: SyncOrdinal,
        _: Option<Position>,
    ) -> Result<(), EnvironmentError> {
        self.told.push((ordinal.0, exit.clone()));
        Ok(())
    }

    fn boundary(&mut self, at: Boundary<'_>) -> Result<Directive, EnvironmentError> {
        self.halted.push(at.halted);
        if let Some(directive) = self.directives.pop_front() {
            return Ok(directive);
        }
        let mut directive = Directive::default();
        if self.wakes && at.halted {
            self.now = at.deadline.expect("something to wake for");
            directive.arrivals.push(Arrival::Time { now: self.now });
        }
        Ok(directive)
    }
}

fn arrives(arrivals: Vec<Arrival>) -> Directive {
    Directive {
        arrivals,
        bound: Bound::Exit,
    }
}

fn session(program: Vec<Op>, handler: Vec<Op>, script: Script) -> Session<Script> {
    Session::new(
        GuestMemory::new(1 << 20).expect("1 MiB"),
        Board::new(&BoardConfig::default()),
        Box::new(TinyEngine::new(program, handler)),
        Box::new(script),
    )
}

fn run(session: &mut Session<Script>) -> Result<End, RunError> {
    for _ in 0..10_000 {
        if let Turn::Ended(end) = session.turn(&Bound::Exit)? {
            return Ok(end);
        }
    }
    panic!("it does not end");
}

#[test]
fn answers_go_back_and_output_leaves_in_order() {
    let program = vec![
        Op::In(0xe9),
        Op::OutAl(0xe9),
        Op::Out(0x3f8, b'x'),
        Op::In(0x3fd),
        Op::OutAl(0xf4),
    ];
    let mut session = session(program, vec![], Script::default());
    assert_eq!(run(&mut session).expect("runs"), End::DebugExit(0x60));
    assert_eq!(session.environment().output, [0xe9, b'x']);
    assert_eq!(session.progress().ordinal, SyncOrdinal(5));
    assert_eq!(session.end().map(End::status), Some(0x60));
    assert_eq!(
        session.turn(&Bound::Exit).expect("ended"),
        Turn::Ended(End::DebugExit(0x60))
    );
    assert_eq!(session.counts().total().count, 5);
}

#[test]
fn sync_points_are_counted_before_they_are_told() {
    let program = vec![Op::Nop, Op::In(0x80), Op::Out(0x80, 1), Op::TripleFault];
    let mut session = session(program, vec![], Script::default());
    assert_eq!(run(&mut session).expect("runs"), End::TripleFault);
    let ordinals: Vec<u64> = session
        .environment()
        .told
        .iter()
        .map(|told| told.0)
        .collect();
    assert_eq!(ordinals, [1, 2, 3]);
}

#[test]
fn a_halt_without_interrupts_is_the_end() {
    let mut session = session(vec![Op::Cli, Op::Hlt], vec![], Script::default());
    assert_eq!(run(&mut session).expect("runs"), End::HaltedForever);
}

#[test]
fn a_timer_wakes_a_halted_cpu_and_its_handler_runs() {
    let mut program = start_timer(1000);
    let here = program.len() as u64;
    program.extend([Op::Sti, Op::Hlt, Op::Jump(here + 1)]);
    let handler = vec![Op::Out(0xe9, b't'), Op::Out(0x20, 0x20), Op::Iret];
    let script = Script {
        wakes: true,
        ..Script::default()
    };
    let mut session = session(program, handler, script);
    while session.environment().output.len() < 5 {
        session.turn(&Bound::Exit).expect("runs");
    }
    assert_eq!(session.environment().output, b"ttttt");
    let now = session.environment().now.get();
    assert!(
        (4_190_000..4_200_000).contains(&now),
        "5000 ticks, not {now} ns"
    );
    assert_eq!(session.end(), None);
}

#[test]
fn what_arrives_and_wakes_nobody_leaves_the_cpu_halted() {
    let nothing = Arrival::Input {
        channel: Channel::Com1,
        bytes: vec![b'x'],
    };
    let directives = [vec![], vec![], vec![nothing], vec![], vec![Arrival::Stop]];
    let script = Script {
        directives: directives.map(arrives).into(),
        ..Script::default()
    };
    let mut session = session(vec![Op::Sti, Op::Hlt, Op::Broken], vec![], script);
    assert_eq!(
        session.turn(&Bound::Exit).expect("runs"),
        Turn::Exit(Exit::Hlt)
    );
    assert!(session.progress().halted());
    for _ in 0..3 {
        assert_eq!(session.turn(&Bound::Exit).expect("idles"), Turn::Idle);
    }
    assert_eq!(run(&mut session).expect("stops"), End::Stopped);
    assert_eq!(
        session.environment().halted,
        [false, true, true, true, true]
    );
}

#[test]
fn an_interrupt_waits_until_the_guest_takes_it() {
    let mut program = start_timer(100);
    let spin = [Op::Nop, Op::Sti, Op::Nop, Op::Out(0xf4, 1)];
    let taken = program.len() as u64 + 2;
    program.extend(spin);
    let outs = start_timer(100).len();
    let mut directives = vec![Directive::default(); outs];
    directives.push(arrives(vec![Arrival::Time {
        now: Nanos::new(1_000_000),
    }]));
    let script = Script {
        directives: directives.into(),
        ..Script::default()
    };
    let mut session = session(program, vec![Op::In(0x80), Op::Out(0xf4, 2)], script);
    let exits: Vec<Exit> = std::iter::from_fn(|| match session.turn(&Bound::Exit).expect("runs") {
        Turn::Exit(exit) => Some(exit),
        _ => None,
    })
    .collect();
    assert_eq!(exits[outs], Exit::InterruptWindow);
    assert_eq!(
        exits[outs + 1],
        Exit::IoIn {
            port: 0x80,
            size: 1
        },
        "in the handler"
    );
    assert_eq!(session.end(), Some(End::DebugExit(2)));
    let position = session.engine().position().expect("it counts");
    assert_eq!(
        position.retired.get(),
        taken + 1,
        "after STI, and the handler's IN"
    );
}

#[test]
fn a_turn_stops_at_the_nearer_bound() {
    let script = Script {
        directives: [
            Bound::Position(Position::at(3)),
            Bound::Position(Position::at(9)),
        ]
        .map(|bound| Directive {
            arrivals: vec![],
            bound,
        })
        .into(),
        ..Script::default()
    };
    let mut session = session(vec![Op::Nop; 20], vec![], script);
    for (asked, reached) in [(5, 3), (5, 5)] {
        let turn = session
            .turn(&Bound::Position(Position::at(asked)))
            .expect("runs");
        assert_eq!(turn, Turn::Exit(Exit::BoundReached));
        assert_eq!(session.engine().position(), Some(Position::at(reached)));
    }
}

#[test]
fn completing_hands_the_answer_back_and_executes_nothing_more() {
    let program = vec![Op::In(0xe9), Op::Out(0xf4, 0)];
    let mut session = session(program, vec![], Script::default());
    session.turn(&Bound::Exit).expect("runs");
    assert!(session.incomplete());
    let turn = session.turn(&Bound::Completed).expect("completes");
    assert_eq!(turn, Turn::Exit(Exit::BoundReached));
    assert!(!session.incomplete());
    assert_eq!(session.engine().position(), Some(Position::at(1)));
}

#[test]
fn an_engines_failure_ends_the_run_with_its_words() {
    let mut session = session(vec![Op::Broken], vec![], Script::default());
    let error = run(&mut session).expect_err("fails").to_string();
    assert!(error.contains("it is broken"), "{error}");
}
