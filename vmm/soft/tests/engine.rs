//! The engine contract: bounds, positions, kicks, windows, breakpoints, completion.

mod guest;

use guest::{CODE, DATA, Guest, HANDLERS};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use machine::engine::{Answer, Engine, EngineError, Entry, Until};
use soft::SoftEngine;
use x86::exit::{AccessData, Injection};
use x86::regs::rflags;
use x86::{
    Activity, CpuModel, CpuState, Exit, ExitControls, Gpr, GuestVirtAddr, Instructions, Position,
    VcpuId, Vector,
};

const CPU: VcpuId = VcpuId::BOOT;

fn position(retired: u64, within: u64) -> Position {
    Position {
        retired: Instructions::new(retired),
        within,
    }
}

fn engine(program: fn(&mut CodeAssembler) -> Result<(), IcedError>) -> SoftEngine {
    let mut guest = Guest::long();
    guest.code(64, program);
    let mut engine = SoftEngine::new(guest.memory.clone(), CpuModel::V2).expect("an engine");
    engine.set_state(CPU, &guest.cpu).expect("a state");
    engine
}

fn run(engine: &mut SoftEngine, until: Until<'_>) -> Exit {
    engine.run(CPU, Entry::default(), until).expect("runs")
}

fn rip(engine: &mut SoftEngine) -> u64 {
    state(engine).regs.rip
}

fn state(engine: &mut SoftEngine) -> CpuState {
    engine.state(CPU).expect("a boundary")
}

fn change(engine: &mut SoftEngine, change: impl FnOnce(&mut CpuState)) {
    let mut cpu = state(engine);
    change(&mut cpu);
    engine.set_state(CPU, &cpu).expect("a state");
}

fn five_nops(a: &mut CodeAssembler) -> Result<(), IcedError> {
    for _ in 0..5 {
        a.nop()?;
    }
    a.hlt()
}

#[test]
fn positions_bound_a_run() {
    let mut engine = engine(five_nops);
    assert_eq!(
        run(&mut engine, Until::Position(position(3, 0))),
        Exit::BoundReached
    );
    assert_eq!(
        (engine.position(), rip(&mut engine)),
        (Some(position(3, 0)), CODE + 3)
    );
    assert_eq!(
        run(&mut engine, Until::Position(position(2, 0))),
        Exit::BoundReached
    );
    assert_eq!(
        engine.position(),
        Some(position(3, 0)),
        "not ahead: at once"
    );
    assert_eq!(run(&mut engine, Until::Exit), Exit::Hlt);
    assert_eq!(engine.position(), Some(position(6, 0)));
}

#[test]
fn positions_lie_inside_rep() {
    let mut engine = engine(|a| {
        a.mov(ecx, 4)?;
        a.mov(edi, DATA as u32)?;
        a.rep().stosb()?;
        a.hlt()
    });
    assert_eq!(
        run(&mut engine, Until::Position(position(2, 2))),
        Exit::BoundReached
    );
    assert_eq!(state(&mut engine).regs[Gpr::Rcx], 2);
    assert_eq!(run(&mut engine, Until::Exit), Exit::Hlt);
    assert_eq!(engine.position(), Some(position(4, 0)), "REP counts as one");
}

#[test]
fn registers_bound_a_run() {
    let mut engine = engine(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.inc(rax)?;
        a.jmp(top)
    });
    let mut wanted = state(&mut engine).regs;
    wanted[Gpr::Rax] = 5;
    wanted.rip = CODE + 3;
    wanted.rflags = rflags::FIXED | rflags::PF;
    let until = Until::Registers {
        registers: &wanted,
        limit: Position::at(100),
    };
    assert_eq!(run(&mut engine, until), Exit::BoundReached);
    assert_eq!(engine.position(), Some(position(9, 0)));
    assert_eq!(state(&mut engine).regs, wanted);
    let until = Until::Registers {
        registers: &wanted,
        limit: Position::at(100),
    };
    assert_eq!(run(&mut engine, until), Exit::BoundReached);
    assert_eq!(
        engine.position(),
        Some(position(100, 0)),
        "one boundary is passed; then the limit"
    );
}

#[test]
fn an_exit_that_wants_an_answer_is_finished_by_the_next_run() {
    let mut engine = engine(|a| {
        a.in_(al, 0x60)?;
        a.out(0x80, al)?;
        a.nop()
    });
    assert_eq!(
        run(&mut engine, Until::Exit),
        Exit::IoIn {
            port: 0x60,
            size: 1
        }
    );
    assert!(matches!(engine.state(CPU), Err(EngineError::OutOfOrder(_))));
    assert_eq!(engine.position(), Some(Position::START));
    let entry = Entry {
        answer: Answer::Data(0x41),
        ..Entry::default()
    };
    let exit = engine.run(CPU, entry, Until::Completed).expect("runs");
    assert_eq!(exit, Exit::BoundReached);
    assert_eq!(
        (rip(&mut engine), state(&mut engine).regs[Gpr::Rax]),
        (CODE + 2, 0x41)
    );
    let out = Exit::IoOut {
        port: 0x80,
        data: AccessData {
            value: 0x41,
            size: 1,
        },
    };
    assert_eq!(run(&mut engine, Until::Exit), out);
    // A kick that arrives meanwhile comes after the instruction.
    engine.kicker(CPU).expect("a kicker").kick();
    assert_eq!(run(&mut engine, Until::Exit), Exit::Kicked);
    assert_eq!(
        (rip(&mut engine), engine.position()),
        (CODE + 4, Some(position(2, 0)))
    );
}

#[test]
fn a_kick_is_seen_once() {
    let mut engine = engine(five_nops);
    engine.kicker(CPU).expect("a kicker").kick();
    assert_eq!(run(&mut engine, Until::Exit), Exit::Kicked);
    assert_eq!(rip(&mut engine), CODE);
    assert_eq!(run(&mut engine, Until::Exit), Exit::Hlt);
}

#[test]
fn a_kick_from_another_thread_ends_an_endless_loop() {
    let mut engine = engine(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.jmp(top)
    });
    let kicker = engine.kicker(CPU).expect("a kicker");
    let thread = std::thread::spawn(move || kicker.kick());
    assert_eq!(run(&mut engine, Until::Exit), Exit::Kicked);
    thread.join().expect("kicked");
}

#[test]
fn the_interrupt_window_opens_after_the_sti_shadow() {
    let mut engine = engine(|a| {
        a.nop()?;
        a.sti()?;
        a.nop()?;
        a.nop()
    });
    let wait = Entry {
        interrupt_window: true,
        ..Entry::default()
    };
    assert_eq!(
        engine.run(CPU, wait, Until::Exit).expect("runs"),
        Exit::InterruptWindow
    );
    assert_eq!(rip(&mut engine), CODE + 3);
    let inject = Some(Injection::ExternalInterrupt(Vector(0x20)));
    let entry = Entry {
        inject,
        ..Entry::default()
    };
    assert_eq!(
        engine.run(CPU, entry, Until::Exit).expect("runs"),
        Exit::Hlt
    );
    assert_eq!(rip(&mut engine), HANDLERS + 16 * 0x20 + 1);
    assert_eq!(
        engine.position(),
        Some(position(4, 0)),
        "three before, delivery, HLT"
    );
}

#[test]
fn a_halted_cpu_waits_for_an_interrupt() {
    let mut engine = engine(|a| {
        a.sti()?;
        a.hlt()?;
        a.nop()
    });
    assert_eq!(run(&mut engine, Until::Exit), Exit::Hlt);
    assert_eq!(state(&mut engine).activity, Activity::Halted);
    assert_eq!(
        run(&mut engine, Until::Exit),
        Exit::Kicked,
        "nothing can happen"
    );
    assert_eq!(
        run(&mut engine, Until::Position(Position::at(50))),
        Exit::BoundReached
    );
    assert_eq!(engine.position(), Some(position(2, 0)));
    let wait = Entry {
        interrupt_window: true,
        ..Entry::default()
    };
    assert_eq!(
        engine.run(CPU, wait, Until::Exit).expect("runs"),
        Exit::InterruptWindow
    );
    let inject = Some(Injection::ExternalInterrupt(Vector(0x20)));
    let entry = Entry {
        inject,
        ..Entry::default()
    };
    let until = Until::Position(position(2, 1));
    assert_eq!(
        engine.run(CPU, entry, until).expect("runs"),
        Exit::BoundReached
    );
    assert_eq!(rip(&mut engine), HANDLERS + 16 * 0x20);
}

#[test]
fn breakpoints_stop_before_the_instruction_and_are_passed_once() {
    let mut engine = engine(|a| {
        let mut top = a.create_label();
        a.nop()?;
        a.set_label(&mut top)?;
        a.nop()?;
        a.jmp(top)
    });
    let at = GuestVirtAddr::new(CODE + 1);
    let controls = ExitControls {
        breakpoints: [at].into(),
        ..ExitControls::default()
    };
    engine.set_controls(&controls).expect("honoured");
    for retired in [1, 3, 5] {
        assert_eq!(run(&mut engine, Until::Exit), Exit::Breakpoint(at));
        assert_eq!(engine.position(), Some(position(retired, 0)));
    }
    // A bound at the same place comes first, and the breakpoint is still there afterwards.
    assert_eq!(
        run(&mut engine, Until::Position(position(7, 0))),
        Exit::BoundReached
    );
    assert_eq!(run(&mut engine, Until::Exit), Exit::Breakpoint(at));
    assert_eq!(engine.position(), Some(position(7, 0)));
}

#[test]
fn the_monitor_trap_flag_exits_at_every_boundary() {
    let mut engine = engine(|a| {
        a.mov(ecx, 2)?;
        a.rep().lodsb()?;
        a.hlt()
    });
    change(&mut engine, |cpu| cpu.regs[Gpr::Rsi] = DATA);
    let controls = ExitControls {
        monitor_trap_flag: true,
        ..ExitControls::default()
    };
    engine.set_controls(&controls).expect("honoured");
    let mut positions = Vec::new();
    for _ in 0..3 {
        assert_eq!(run(&mut engine, Until::Exit), Exit::MonitorTrapFlag);
        positions.extend(engine.position());
    }
    assert_eq!(positions, [position(1, 0), position(1, 1), position(2, 0)]);
    assert_eq!(run(&mut engine, Until::Exit), Exit::Hlt);
}

#[test]
fn a_triple_fault_is_an_exit() {
    let mut engine = engine(|a| a.ud2());
    change(&mut engine, |cpu| cpu.idtr.limit = 0);
    assert_eq!(run(&mut engine, Until::Exit), Exit::TripleFault);
    assert_eq!(state(&mut engine).activity, Activity::Shutdown);
    assert_eq!(rip(&mut engine), CODE);
}

#[test]
fn rdtsc_reads_the_position() {
    let mut engine = engine(|a| {
        a.nop()?;
        a.rdtsc()?;
        a.hlt()
    });
    engine.set_position(position(1000, 0));
    assert_eq!(run(&mut engine, Until::Exit), Exit::Hlt);
    assert_eq!(state(&mut engine).regs[Gpr::Rax], 1001);
}

#[test]
fn a_saved_state_continues_the_same_way() {
    let program = |a: &mut CodeAssembler| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.add(rax, 3)?;
        a.imul_2(rax, rax)?;
        a.xor(edx, eax)?;
        a.jmp(top)
    };
    let mut one = engine(program);
    assert_eq!(
        run(&mut one, Until::Position(Position::at(1000))),
        Exit::BoundReached
    );
    let middle = state(&mut one);
    assert_eq!(
        run(&mut one, Until::Position(Position::at(2000))),
        Exit::BoundReached
    );
    let mut two = engine(program);
    two.set_state(CPU, &middle).expect("a state");
    two.set_position(Position::at(1000));
    assert_eq!(
        run(&mut two, Until::Position(Position::at(2000))),
        Exit::BoundReached
    );
    let (first, mut second) = (state(&mut one), state(&mut two));
    second.cr2 = first.cr2;
    assert_eq!(first, second);
}

#[test]
fn there_is_one_cpu() {
    let mut engine = engine(five_nops);
    let other = VcpuId(1);
    assert!(matches!(
        engine.state(other),
        Err(EngineError::NoSuchVcpu(_))
    ));
    assert!(engine.run(other, Entry::default(), Until::Exit).is_err());
}

#[test]
fn what_is_not_implemented_says_so() {
    let mut engine = engine(|a| a.mov(eax, 1));
    change(&mut engine, |cpu| cpu.regs.rip = 1 << 30); // device memory
    let error = engine
        .run(CPU, Entry::default(), Until::Exit)
        .expect_err("cannot fetch there");
    assert!(
        matches!(error, EngineError::Unimplemented { rip, .. } if rip == 1 << 30),
        "{error}"
    );
}
