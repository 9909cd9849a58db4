//! A toy guest under a debugger's hands.

use super::*;
use crate::board::BoardConfig;
use crate::host_environment::{Clock, HostEnvironment, InputHandle};
use crate::tiny_engine::{Op, TinyEngine, start_timer};
use std::num::NonZeroU64;

/// Long enough never to be over.
const AGES: Duration = Duration::from_secs(3600);

fn machine(program: Vec<Op>, handler: Vec<Op>, clock: Clock) -> LiveMachine {
    with_input(program, handler, clock).0
}

fn with_input(program: Vec<Op>, handler: Vec<Op>, clock: Clock) -> (LiveMachine, InputHandle) {
    let engine = TinyEngine::new(program, handler);
    let kick = engine.kick_flag();
    let environment = HostEnvironment::new(kick, clock, Box::new(std::io::sink())).expect("starts");
    let (run, input) = (environment.run_control(), environment.input_handle());
    let machine = LiveMachine::new(
        GuestMemory::new(1 << 20).expect("1 MiB"),
        Board::new(&BoardConfig::default()),
        Box::new(engine),
        Box::new(environment),
        run,
    );
    (machine, input)
}

fn plain(program: Vec<Op>) -> LiveMachine {
    machine(program, vec![], Clock::Host)
}

fn slow_clock() -> Clock {
    Clock::Instructions {
        per_second: NonZeroU64::new(1_000_000).expect("not zero"),
    }
}

fn rip(machine: &mut LiveMachine) -> u64 {
    machine.cpu(VcpuId::BOOT).expect("a state").regs.rip
}

fn breakpoints(machine: &mut LiveMachine, at: &[u64]) {
    let at = at.iter().copied().map(GuestVirtAddr::new).collect();
    machine.set_breakpoints(&at).expect("set");
}

fn go(machine: &mut LiveMachine) -> Stop {
    machine.resume(Resume::Continue, AGES).expect("resumes")
}

fn step(machine: &mut LiveMachine) -> Stop {
    machine
        .resume(Resume::Step(VcpuId::BOOT), AGES)
        .expect("steps")
}

fn at(rip: u64) -> Stop {
    Stop::Breakpoint(VcpuId::BOOT, GuestVirtAddr::new(rip))
}

#[test]
fn breakpoints_stop_before_the_instruction_and_not_twice() {
    let program = vec![Op::Nop, Op::Out(0xe9, b'a'), Op::Nop, Op::Jump(0)];
    let mut machine = plain(program);
    breakpoints(&mut machine, &[1, 2]);
    for _ in 0..3 {
        assert_eq!(go(&mut machine), at(1));
        assert_eq!(rip(&mut machine), 1);
        assert_eq!(go(&mut machine), at(2));
    }
    assert_eq!(machine.console(), b"aaa");
    breakpoints(&mut machine, &[2]);
    assert_eq!(go(&mut machine), at(2), "once around");
    assert_eq!(machine.console(), b"aaaa");
}

#[test]
fn a_step_is_one_instruction_whatever_it_is() {
    let program = vec![Op::In(0xe9), Op::Out(0xe9, b'x'), Op::Nop, Op::Sti, Op::Hlt];
    let mut machine = plain(program);
    for next in 1..=5 {
        assert_eq!(step(&mut machine), Stop::Stepped);
        assert_eq!(rip(&mut machine), next);
        assert_eq!(machine.position(), Some(Position::at(next)));
    }
    let cpu = machine.cpu(VcpuId::BOOT).expect("a state");
    assert_eq!(cpu.activity, Activity::Halted);
    assert_eq!(cpu.regs[Gpr::Rax], 0xe9);
    let none = machine
        .resume(Resume::Step(VcpuId::BOOT), Duration::ZERO)
        .expect("waits");
    assert_eq!(none, Stop::Slice, "it is halted and nothing comes");
}

#[test]
fn a_step_can_be_the_delivery_of_an_interrupt() {
    let mut program = start_timer(2);
    let here = program.len() as u64;
    program.extend([
        Op::Nop,
        Op::Nop,
        Op::Nop,
        Op::Nop,
        Op::Nop,
        Op::Sti,
        Op::Nop,
    ]);
    let handler = program.len() as u64;
    let mut machine = machine(program, vec![Op::Nop, Op::Iret], slow_clock());
    breakpoints(&mut machine, &[here + 5]);
    assert_eq!(go(&mut machine), at(here + 5));
    for expected in [here + 6, handler, handler + 1, here + 6] {
        assert_eq!(step(&mut machine), Stop::Stepped);
        assert_eq!(rip(&mut machine), expected);
    }
}

#[test]
fn an_interrupt_before_a_breakpoints_instruction_does_not_make_it_hit_again() {
    let mut program = start_timer(0);
    program.extend([Op::Out(0x21, 0xef), Op::Out(0x3f9, 1), Op::Sti]); // only IRQ 4
    let here = program.len() as u64;
    program.extend([Op::Out(0xe9, b'.'), Op::Nop, Op::Jump(here)]);
    let handler = vec![
        Op::In(0x3f8),
        Op::OutAl(0xe9),
        Op::Out(0x20, 0x20),
        Op::Iret,
    ];
    let (mut machine, input) = with_input(program, handler, Clock::Host);
    breakpoints(&mut machine, &[here + 1]);
    assert_eq!(go(&mut machine), at(here + 1));
    for typed in [b"a", b"b", b"c"] {
        input.push(typed).expect("pushed");
        assert_eq!(go(&mut machine), at(here + 1));
    }
    assert_eq!(machine.console(), b".a.b.c.", "each hit is a new one");
}

#[test]
fn a_slice_returns_from_a_guest_that_never_exits() {
    let mut machine = plain(vec![Op::Jump(0)]);
    for _ in 0..3 {
        let stop = machine
            .resume(Resume::Continue, Duration::from_millis(1))
            .expect("runs");
        assert_eq!(stop, Stop::Slice);
        assert_eq!(rip(&mut machine), 0);
    }
}

#[test]
fn a_slice_never_ends_on_a_breakpoint_unseen() {
    let mut machine = plain(vec![Op::Nop, Op::Jump(0)]);
    breakpoints(&mut machine, &[1]);
    for _ in 0..100 {
        let stop = machine
            .resume(Resume::Continue, Duration::ZERO)
            .expect("runs");
        assert!(
            stop == at(1) || (stop == Stop::Slice && rip(&mut machine) == 0),
            "{stop:?}"
        );
    }
}

#[test]
fn the_end_is_final_and_can_be_looked_at() {
    let mut machine = plain(vec![Op::Nop, Op::Out(0xf4, 7), Op::Nop]);
    assert_eq!(go(&mut machine), Stop::Ended(End::DebugExit(7)));
    assert_eq!(step(&mut machine), Stop::Ended(End::DebugExit(7)));
    assert_eq!(machine.end(), Some(End::DebugExit(7)));
    assert_eq!(rip(&mut machine), 2, "after the OUT that ended it");
    assert_eq!(rip(&mut machine), 2);
}

#[test]
fn state_and_memory_can_be_changed() {
    let mut machine = plain(vec![Op::Sti, Op::Hlt, Op::Broken, Op::OutAl(0xf4)]);
    assert_eq!(step(&mut machine), Stop::Stepped);
    assert_eq!(step(&mut machine), Stop::Stepped);
    let mut cpu = machine.cpu(VcpuId::BOOT).expect("a state");
    cpu.regs.rip = 3;
    cpu.regs[Gpr::Rax] = 42;
    machine.set_cpu(VcpuId::BOOT, &cpu).expect("set");
    let addr = GuestPhysAddr::new(0x1234);
    machine.write_memory(addr, b"hi").expect("written");
    let mut bytes = [0; 2];
    machine.memory().read(addr, &mut bytes).expect("read");
    assert_eq!(&bytes, b"hi");
    assert!(
        machine
            .write_memory(GuestPhysAddr::new(1 << 40), b"hi")
            .is_err()
    );
    assert_eq!(
        go(&mut machine),
        Stop::Ended(End::DebugExit(42)),
        "it was halted, and runs from there"
    );
}

#[test]
fn after_a_failure_only_looking_is_allowed() {
    let mut machine = plain(vec![Op::Nop, Op::Broken]);
    let failed = machine
        .resume(Resume::Continue, AGES)
        .expect_err("fails")
        .to_string();
    assert!(failed.contains("it is broken"), "{failed}");
    assert_eq!(rip(&mut machine), 1);
    assert!(matches!(
        machine.resume(Resume::Continue, AGES),
        Err(DebugError::Refused(_))
    ));
}

#[test]
fn another_cpu_is_refused_and_nothing_is_lost() {
    let mut machine = plain(vec![Op::Out(0xf4, 0)]);
    assert!(machine.resume(Resume::Step(VcpuId(1)), AGES).is_err());
    assert_eq!(go(&mut machine), Stop::Ended(End::DebugExit(0)));
    assert!(machine.events().is_empty() && !machine.branched());
    assert_eq!(machine.exits().total().count, 1);
    assert_eq!(machine.describe(), "live on soft");
}

#[test]
fn a_stop_asked_for_ends_it() {
    let engine = TinyEngine::new(vec![Op::Jump(0)], vec![]);
    let environment =
        HostEnvironment::new(engine.kick_flag(), Clock::Host, Box::new(std::io::sink()))
            .expect("starts");
    let (run, stop) = (environment.run_control(), environment.stop_handle());
    let mut machine = LiveMachine::new(
        GuestMemory::new(1 << 20).expect("1 MiB"),
        Board::new(&BoardConfig::default()),
        Box::new(engine),
        Box::new(environment),
        run,
    );
    stop.stop();
    assert_eq!(go(&mut machine), Stop::Ended(End::Stopped));
    assert_eq!(rip(&mut machine), 0);
}
