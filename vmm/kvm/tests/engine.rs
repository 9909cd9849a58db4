//! The engine's contract, held against real KVM guests of a few instructions. Nothing here needs single steps on a KVM that
//! runs these instructions itself.

mod guest;

use guest::*;
use iced_x86::code_asm::*;
use machine::GuestMemory;
use machine::engine::{Answer, Engine, EngineError, Entry, Until};
use x86::exit::AccessData;
use x86::regs::rflags;
use x86::{
    Activity, CpuModel, CpuState, Exit, Gpr, GuestPhysAddr, InterruptShadow, PageFrame, Position,
    Segment, SegmentRegister, VcpuId,
};

type Write = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;

/// An engine about to execute `code` in ring 0.
fn ring0(code: Write) -> Option<(kvm::KvmEngine, GuestMemory)> {
    let memory = memory();
    put(&memory, CODE, &assemble(CODE, code));
    let mut engine = engine(&memory)?;
    engine.set_state(CPU, &kernel()).expect("state");
    Some((engine, memory))
}

/// An engine about to execute `code` in ring 3.
fn ring3(code: Write) -> Option<(kvm::KvmEngine, GuestMemory)> {
    let memory = memory();
    put(&memory, USER_CODE, &assemble(USER_CODE, code));
    let mut engine = engine(&memory)?;
    engine.set_state(CPU, &user()).expect("state");
    Some((engine, memory))
}

#[test]
fn port_accesses_exit_with_their_data_and_take_answers() {
    let Some((mut engine, _)) = ring0(|a| {
        a.mov(eax, 0x1234_5678)?;
        a.out(0x80, ax)?;
        a.in_(eax, 0x64)?;
        a.hlt()
    }) else {
        return;
    };
    let out = run(&mut engine, Answer::None);
    assert_eq!(
        out,
        Exit::IoOut {
            port: 0x80,
            data: AccessData {
                value: 0x5678,
                size: 2
            }
        }
    );
    assert_eq!(
        run(&mut engine, Answer::None),
        Exit::IoIn {
            port: 0x64,
            size: 4
        }
    );
    assert_eq!(
        complete(&mut engine, Answer::Data(0xaabb_ccdd)),
        Exit::BoundReached
    );
    let cpu = engine.state(CPU).expect("state");
    assert_eq!(cpu.regs[Gpr::Rax], 0xaabb_ccdd);
    assert_eq!(run(&mut engine, Answer::None), Exit::Hlt);
    assert_eq!(engine.state(CPU).expect("state").activity, Activity::Halted);
}

#[test]
fn the_state_may_not_be_asked_for_in_the_middle_of_an_instruction() {
    let Some((mut engine, _)) = ring0(|a| {
        a.in_(al, 0x60)?;
        a.hlt()
    }) else {
        return;
    };
    run(&mut engine, Answer::None);
    assert!(matches!(engine.state(CPU), Err(EngineError::OutOfOrder(_))));
    assert!(matches!(
        engine.set_state(CPU, &kernel()),
        Err(EngineError::OutOfOrder(_))
    ));
    let missing = engine.run(CPU, Entry::default(), Until::Exit);
    assert!(
        matches!(missing, Err(EngineError::OutOfOrder(_))),
        "an IN needs its value"
    );
}

#[test]
fn mmio_is_read_modified_and_written_in_two_exits() {
    let Some((mut engine, _)) = ring0(|a| {
        a.add(dword_ptr(DEVICE), 5)?;
        a.mov(rax, qword_ptr(DEVICE + 8))?;
        a.hlt()
    }) else {
        return;
    };
    let at = |offset| GuestPhysAddr::new(DEVICE_ADDR + offset);
    assert_eq!(
        run(&mut engine, Answer::None),
        Exit::MmioRead {
            addr: at(0),
            size: 4
        }
    );
    let write = Exit::MmioWrite {
        addr: at(0),
        data: AccessData { value: 12, size: 4 },
    };
    assert_eq!(complete(&mut engine, Answer::Data(7)), write);
    assert_eq!(
        run(&mut engine, Answer::None),
        Exit::MmioRead {
            addr: at(8),
            size: 8
        }
    );
    assert_eq!(
        complete(&mut engine, Answer::Data(u64::MAX - 1)),
        Exit::BoundReached
    );
    assert_eq!(
        engine.state(CPU).expect("state").regs[Gpr::Rax],
        u64::MAX - 1
    );
}

#[test]
fn other_msrs_exit_and_those_of_the_state_do_not() {
    let Some((mut engine, _)) = ring0(|a| {
        a.mov(ecx, 0xc000_0081u32)?;
        a.mov(eax, 0x11)?;
        a.mov(edx, 0x22)?;
        a.wrmsr()?;
        a.mov(ecx, 0x10)?;
        a.rdmsr()?;
        a.mov(ebx, eax)?;
        a.mov(ecx, 0x8b)?;
        a.wrmsr()?;
        a.hlt()
    }) else {
        return;
    };
    assert_eq!(run(&mut engine, Answer::None), Exit::Rdmsr { msr: 0x10 });
    let answer = Answer::MsrValue(0x5_0000_0077);
    let write = Exit::Wrmsr {
        msr: 0x8b,
        value: 0x5_0000_0077,
    };
    assert_eq!(run(&mut engine, answer), write);
    assert_eq!(run(&mut engine, Answer::MsrAccepted), Exit::Hlt);
    let cpu = engine.state(CPU).expect("state");
    assert_eq!(cpu.msrs.star, 0x22_0000_0011);
    assert_eq!(cpu.regs[Gpr::Rbx], 0x77);
}

#[test]
fn every_part_of_the_state_goes_through_kvm_and_back() {
    let Some((mut engine, _)) = ring0(|a| {
        a.out(0x80, al)?;
        a.hlt()
    }) else {
        return;
    };
    let mut cpu = kernel();
    for gpr in Gpr::ALL {
        cpu.regs[gpr] = 0x0101_0101_0101_0101 * (1 + gpr as u64);
    }
    cpu.regs.rflags = rflags::FIXED | rflags::CF | rflags::OF | rflags::ID;
    cpu.fpu.xmm[3] = 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef;
    cpu.fpu.mxcsr = 0x1f81;
    cpu.fpu.fcw = 0x27f;
    cpu.fpu.ftw = 0x80;
    cpu.fpu.fsw = 0x3800;
    cpu.fpu.st[0] = [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f];
    cpu.msrs.kernel_gs_base = 0xffff_8880_1234_5000;
    cpu.msrs.fmask = 0x4_7700;
    cpu.dr[1] = 0x7fff_1234;
    cpu.cr2 = 0xdead_b000;
    cpu.cr8 = 3;
    cpu.segment_mut(SegmentRegister::Fs).base = 0x7f00_0000_1000;
    *cpu.segment_mut(SegmentRegister::Gs) = Segment {
        base: 0xffff_8881_0000_0000,
        ..Segment::default()
    };
    *cpu.segment_mut(SegmentRegister::Es) = Segment::default();
    engine.set_state(CPU, &cpu).expect("set");
    assert_eq!(engine.state(CPU).expect("not run yet"), cpu);
    assert!(matches!(run(&mut engine, Answer::None), Exit::IoOut { .. }));
    assert_eq!(complete(&mut engine, Answer::None), Exit::BoundReached);
    cpu.regs.rip += 2;
    assert_eq!(engine.state(CPU).expect("after OUT"), cpu);
}

#[test]
fn a_kick_ends_an_endless_loop_in_either_ring() {
    for start in [ring0, ring3] {
        let Some((mut engine, _)) = start(|a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.inc(rax)?;
            a.inc(rbx)?;
            a.jmp(again)
        }) else {
            return;
        };
        for _ in 0..50 {
            let kicker = engine.kicker(CPU).expect("kicker");
            let thread = std::thread::spawn(move || kicker.kick());
            assert_eq!(run(&mut engine, Answer::None), Exit::Kicked);
            thread.join().expect("kicker thread");
            let cpu = engine.state(CPU).expect("boundary");
            let ahead = cpu.regs[Gpr::Rax] - cpu.regs[Gpr::Rbx];
            assert!(ahead <= 1, "an instruction boundary");
        }
    }
}

#[test]
fn a_kick_before_the_run_is_not_lost_and_counts_once() {
    let Some((mut engine, _)) = ring0(|a| {
        a.nop()?;
        a.hlt()
    }) else {
        return;
    };
    engine.kicker(CPU).expect("kicker").kick();
    assert_eq!(run(&mut engine, Answer::None), Exit::Kicked);
    assert_eq!(engine.state(CPU).expect("state").regs.rip, CODE);
    assert_eq!(run(&mut engine, Answer::None), Exit::Hlt);
}

#[test]
fn a_kick_while_an_exit_is_owed_comes_after_its_completion() {
    let Some((mut engine, _)) = ring0(|a| {
        a.in_(al, 0x60)?;
        a.hlt()
    }) else {
        return;
    };
    run(&mut engine, Answer::None);
    engine.kicker(CPU).expect("kicker").kick();
    assert_eq!(run(&mut engine, Answer::Data(0x5a)), Exit::Kicked);
    let cpu = engine.state(CPU).expect("boundary");
    assert_eq!((cpu.regs.rip, cpu.regs[Gpr::Rax]), (CODE + 2, 0x5a));
}

#[test]
fn kickers_outlive_their_engine() {
    let Some((engine, _)) = ring0(|a| a.hlt()) else {
        return;
    };
    let kicker = engine.kicker(CPU).expect("kicker");
    drop(engine);
    kicker.kick();
}

#[test]
fn pages_written_are_reported_once() {
    let Some((mut engine, memory)) = ring0(|a| {
        a.mov(qword_ptr(DATA), rax)?;
        a.hlt()
    }) else {
        return;
    };
    let _ = engine.take_dirty().expect("what the test itself wrote");
    run(&mut engine, Answer::None);
    put(&memory, 0x10_0000, &[1]);
    engine.memory_written(GuestPhysAddr::new(0x10_0000), 1);
    let dirty = engine.take_dirty().expect("dirty");
    for addr in [DATA, 0x10_0000] {
        assert!(
            dirty.contains(&PageFrame::containing(GuestPhysAddr::new(addr))),
            "{addr:#x}"
        );
    }
    assert!(!dirty.contains(&PageFrame::containing(GuestPhysAddr::new(DATA + 0x1000))));
    assert!(engine.take_dirty().expect("again").is_empty());
}

#[test]
fn a_halted_cpu_waits_until_an_interrupt_can_be_injected() {
    let Some((mut engine, _)) = ring0(|a| {
        a.sti()?;
        a.hlt()?;
        a.hlt()
    }) else {
        return;
    };
    assert_eq!(run(&mut engine, Answer::None), Exit::Hlt);
    assert!(engine.interrupts_enabled(CPU).expect("IF"));
    assert_eq!(
        run(&mut engine, Answer::None),
        Exit::Kicked,
        "nothing has woken it"
    );
    let entry = Entry {
        interrupt_window: true,
        ..Entry::default()
    };
    assert_eq!(
        engine.run(CPU, entry, Until::Exit).expect("run"),
        Exit::InterruptWindow
    );
    assert_eq!(engine.state(CPU).expect("state").regs.rip, CODE + 2);
}

#[test]
fn the_power_on_state_runs_real_mode() {
    let memory = GuestMemory::new(1 << 20).expect("memory");
    // mov ax, 1234h; add ax, 1; out 80h, ax; hlt
    put(
        &memory,
        0x1000,
        &[0xb8, 0x34, 0x12, 0x05, 0x01, 0x00, 0xe7, 0x80, 0xf4],
    );
    let Some(mut engine) = engine(&memory) else {
        return;
    };
    let mut cpu = CpuState::default();
    *cpu.segment_mut(SegmentRegister::Cs) = Segment::real_mode(0x100, true);
    cpu.regs.rip = 0;
    engine.set_state(CPU, &cpu).expect("state");
    let out = Exit::IoOut {
        port: 0x80,
        data: AccessData {
            value: 0x1235,
            size: 2,
        },
    };
    assert_eq!(run(&mut engine, Answer::None), out);
    assert_eq!(run(&mut engine, Answer::None), Exit::Hlt);
    assert_eq!(engine.state(CPU).expect("state").regs.rip, 9);
}

#[test]
fn an_interrupt_shadow_is_part_of_the_state() {
    let Some((mut engine, _)) = ring0(|a| a.hlt()) else {
        return;
    };
    let mut cpu = kernel();
    cpu.regs.rflags |= rflags::IF;
    cpu.shadow = InterruptShadow::Sti;
    engine.set_state(CPU, &cpu).expect("state");
    assert_eq!(
        engine.state(CPU).expect("state").shadow,
        InterruptShadow::Sti
    );
    let entry = Entry {
        interrupt_window: true,
        ..Entry::default()
    };
    let exit = engine.run(CPU, entry, Until::Completed).expect("run");
    assert_eq!(exit, Exit::BoundReached, "no window in the shadow of STI");
}

#[test]
fn what_the_engine_cannot_do_is_an_error() {
    let Some((mut engine, _)) = ring0(|a| a.hlt()) else {
        return;
    };
    let until = Until::Position(Position::at(5));
    let counted = engine.run(CPU, Entry::default(), until);
    assert!(matches!(counted, Err(EngineError::CannotCount("kvm"))));
    let controls = x86::ExitControls {
        cr3_load_exiting: true,
        ..Default::default()
    };
    assert!(matches!(
        engine.set_controls(&controls),
        Err(EngineError::Unsupported { .. })
    ));
    assert!(matches!(
        engine.state(VcpuId(1)),
        Err(EngineError::NoSuchVcpu(_))
    ));
    assert_eq!(engine.position(), None);
}

#[test]
fn many_engines_can_be_made_and_dropped() {
    let memory = GuestMemory::new(1 << 20).expect("memory");
    for _ in 0..20 {
        match kvm::KvmEngine::new(memory.clone(), CpuModel::default()) {
            Ok(engine) => drop(engine),
            Err(error) => return skipped(&error),
        }
    }
}
