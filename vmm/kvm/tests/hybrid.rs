//! What the single-instruction path does in KVM's place: breakpoints, single steps, string input and output, faults, and
//! instructions that this host's KVM cannot execute. On any host the outcome is the same.

mod guest;

use guest::*;
use iced_x86::code_asm::*;
use machine::GuestMemory;
use machine::engine::{Answer, Engine, Entry, Until};
use soft::SoftEngine;
use x86::exit::{AccessData, Injection};
use x86::{
    Activity, CpuModel, CpuState, Exit, ExitControls, Gpr, GuestVirtAddr, Position,
    SegmentRegister, Vector,
};

type Write = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;

fn start(at: u64, cpu: &CpuState, code: Write) -> Option<(kvm::KvmEngine, GuestMemory)> {
    let memory = memory();
    put(&memory, at, &assemble(at, code));
    let mut engine = engine(&memory)?;
    engine.set_state(CPU, cpu).expect("state");
    Some((engine, memory))
}

fn ring0(code: Write) -> Option<(kvm::KvmEngine, GuestMemory)> {
    start(CODE, &kernel(), code)
}

fn ring3(code: Write) -> Option<(kvm::KvmEngine, GuestMemory)> {
    start(USER_CODE, &user(), code)
}

fn stub(vector: u64) -> u64 {
    STUBS + 2 * vector + 1
}

#[test]
fn string_output_is_one_exit_for_each_element() {
    let Some((mut engine, memory)) = ring0(|a| {
        a.mov(edx, 0x80)?;
        a.mov(ecx, 3)?;
        a.mov(esi, DATA as u32)?;
        a.rep().outsw()?;
        a.hlt()
    }) else {
        return;
    };
    put(&memory, DATA, &[1, 2, 3, 4, 5, 6]);
    for (i, value) in [0x0201, 0x0403, 0x0605].into_iter().enumerate() {
        let exit = if i == 0 {
            run(&mut engine, Answer::None)
        } else {
            complete_then_run(&mut engine)
        };
        assert_eq!(
            exit,
            Exit::IoOut {
                port: 0x80,
                data: AccessData { value, size: 2 }
            }
        );
    }
    assert_eq!(complete(&mut engine, Answer::None), Exit::BoundReached);
    let cpu = engine.state(CPU).expect("state");
    assert_eq!((cpu.regs[Gpr::Rcx], cpu.regs[Gpr::Rsi]), (0, DATA + 6));
    assert_eq!(run(&mut engine, Answer::None), Exit::Hlt);
}

fn complete_then_run(engine: &mut kvm::KvmEngine) -> Exit {
    assert_eq!(complete(engine, Answer::None), Exit::BoundReached);
    let rip = engine.state(CPU).expect("between iterations").regs.rip;
    assert!((CODE..CODE + 32).contains(&rip));
    run(engine, Answer::None)
}

#[test]
fn string_input_asks_for_each_element() {
    let Some((mut engine, memory)) = ring0(|a| {
        a.mov(edx, 0x1f0)?;
        a.mov(ecx, 4)?;
        a.mov(edi, DATA as u32)?;
        a.rep().insw()?;
        a.hlt()
    }) else {
        return;
    };
    put(&memory, DATA, &[0xee; 16]);
    let mut answer = Answer::None;
    for i in 0..4u64 {
        assert_eq!(
            run(&mut engine, answer),
            Exit::IoIn {
                port: 0x1f0,
                size: 2
            }
        );
        let bytes = get_u64(&memory, DATA).to_le_bytes();
        assert!(
            bytes[2 * i as usize..].iter().all(|&b| b == 0xee),
            "nothing is stored ahead: {bytes:x?}"
        );
        answer = Answer::Data(0x1100 + i);
    }
    assert_eq!(run(&mut engine, answer), Exit::Hlt);
    assert_eq!(get_u64(&memory, DATA), 0x1103_1102_1101_1100);
    assert_eq!(get_u64(&memory, DATA + 8), 0xeeee_eeee_eeee_eeee);
    assert_eq!(engine.state(CPU).expect("state").regs[Gpr::Rcx], 0);
}

#[test]
fn breakpoints_stop_before_the_instruction_in_either_ring() {
    for (at, cpu) in [(CODE, kernel()), (USER_CODE, user())] {
        let code: Write = |a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.inc(rax)?;
            a.inc(rbx)?;
            a.jmp(again)
        };
        // More than the processor has, and few enough for it.
        for extra in [0, 5] {
            let Some((mut engine, _)) = start(at, &cpu, code) else {
                return;
            };
            let breakpoint = GuestVirtAddr::new(at + 3);
            let others = (0..extra).map(|i| GuestVirtAddr::new(0x10_0000 + i));
            let breakpoints = others.chain([breakpoint]).collect();
            let controls = ExitControls {
                breakpoints,
                ..ExitControls::default()
            };
            engine.set_controls(&controls).expect("breakpoints");
            for round in 1..4 {
                assert_eq!(run(&mut engine, Answer::None), Exit::Breakpoint(breakpoint));
                let cpu = engine.state(CPU).expect("state");
                assert_eq!((cpu.regs.rip, cpu.regs[Gpr::Rax]), (at + 3, round));
                assert_eq!(cpu.regs[Gpr::Rbx], round - 1, "not executed yet");
            }
            engine.set_controls(&ExitControls::default()).expect("none");
            engine.kicker(CPU).expect("kicker").kick();
            assert_eq!(run(&mut engine, Answer::None), Exit::Kicked);
        }
    }
}

#[test]
fn the_monitor_trap_flag_stops_after_each_instruction() {
    let Some((mut engine, _)) = ring0(|a| {
        a.inc(rax)?;
        a.popcnt(rbx, rax)?;
        a.out(0x80, al)?;
        a.int3()
    }) else {
        return;
    };
    let controls = ExitControls {
        monitor_trap_flag: true,
        ..ExitControls::default()
    };
    engine.set_controls(&controls).expect("monitor trap flag");
    let mut rips = Vec::new();
    for _ in 0..5 {
        let exit = run(&mut engine, Answer::None);
        if exit == Exit::MonitorTrapFlag {
            rips.push(engine.state(CPU).expect("state").regs.rip);
        } else {
            assert!(matches!(exit, Exit::IoOut { .. }), "{exit}");
        }
    }
    assert_eq!(rips, [CODE + 3, CODE + 8, CODE + 10, STUBS + 2 * 3]);
}

#[test]
fn what_kvm_may_not_emulate_runs_all_the_same() {
    let Some((mut engine, memory)) = ring0(|a| {
        a.mov(rax, 0xff00_ff00u64)?;
        a.popcnt(rbx, rax)?;
        a.fld1()?;
        a.fld1()?;
        a.faddp(st1, st0)?;
        a.fstp(qword_ptr(DATA))?;
        a.movq(xmm0, rax)?;
        a.paddq(xmm0, xmm0)?;
        a.movq(rcx, xmm0)?;
        a.int(0x80)
    }) else {
        return;
    };
    assert_eq!(run(&mut engine, Answer::None), Exit::Hlt);
    let cpu = engine.state(CPU).expect("state");
    assert_eq!(cpu.regs.rip, stub(0x80));
    assert_eq!(cpu.regs[Gpr::Rbx], 16);
    assert_eq!(cpu.regs[Gpr::Rcx], 0x1_fe01_fe00);
    assert_eq!(f64::from_bits(get_u64(&memory, DATA)), 2.0);
}

#[test]
fn ring_3_enters_the_kernel_by_every_door() {
    let doors: [(Write, u64); 7] = [
        (|a| a.syscall(), SYSCALL_ENTRY + 1),
        (|a| a.int(0x80), stub(0x80)),
        (|a| a.int3(), stub(3)),
        (|a| a.ud2(), stub(6)),
        (|a| a.cli(), stub(13)),
        (|a| a.mov(rax, qword_ptr(0x4000_0000u64)), stub(14)),
        (|a| a.int1(), stub(1)),
    ];
    for (code, rip) in doors {
        let Some((mut engine, memory)) = ring3(code) else {
            return;
        };
        assert_eq!(run(&mut engine, Answer::None), Exit::Hlt);
        let cpu = engine.state(CPU).expect("state");
        assert_eq!((cpu.regs.rip, cpu.cpl()), (rip, 0));
        if rip == SYSCALL_ENTRY + 1 {
            assert_eq!(
                (cpu.regs[Gpr::Rcx], cpu.regs[Gpr::R11]),
                (USER_CODE + 2, 0x202)
            );
            assert_eq!(cpu.regs[Gpr::Rsp], USER_STACK);
        } else {
            let top = cpu.regs[Gpr::Rsp];
            let frame = if matches!(rip, r if r == stub(13) || r == stub(14)) {
                top + 8
            } else {
                top
            };
            assert_eq!(get_u64(&memory, frame + 8), u64::from(USER_CS));
            assert_eq!(get_u64(&memory, frame + 24), USER_STACK);
            assert_eq!(get_u64(&memory, frame + 32), u64::from(USER_DS));
        }
    }
}

#[test]
fn returning_to_ring_3_nulls_what_ring_3_may_not_have() {
    let Some((mut engine, memory)) = ring0(|a| {
        for value in [
            USER_DS as i32,
            USER_STACK as i32,
            0x202,
            USER_CS as i32,
            USER_CODE as i32,
        ] {
            a.push(value)?;
        }
        a.iretq()
    }) else {
        return;
    };
    put(&memory, USER_CODE, &assemble(USER_CODE, |a| a.int(0x80)));
    assert_eq!(run(&mut engine, Answer::None), Exit::Hlt);
    let cpu = engine.state(CPU).expect("state");
    assert_eq!(cpu.segment(SegmentRegister::Ds).selector, 0);
    assert_eq!(cpu.segment(SegmentRegister::Gs).selector, 0);
}

#[test]
fn the_cpu_model_is_what_either_ring_sees() {
    let model = CpuModel::default().cpuid(1, 0);
    for (at, cpu) in [(CODE, kernel()), (USER_CODE, user())] {
        let Some((mut engine, _)) = start(at, &cpu, |a| {
            a.mov(eax, 1)?;
            a.cpuid()?;
            a.int3()
        }) else {
            return;
        };
        assert_eq!(run(&mut engine, Answer::None), Exit::Hlt);
        let cpu = engine.state(CPU).expect("state");
        assert_eq!(cpu.regs[Gpr::Rcx], u64::from(model.ecx));
        assert_eq!(cpu.regs[Gpr::Rdx], u64::from(model.edx));
    }
}

#[test]
fn an_interrupt_is_delivered_before_the_next_instruction() {
    let Some((mut engine, memory)) = ring3(|a| {
        a.inc(rax)?;
        a.ud2()
    }) else {
        return;
    };
    let wish = Entry {
        interrupt_window: true,
        ..Entry::default()
    };
    assert_eq!(
        engine.run(CPU, wish, Until::Exit).expect("run"),
        Exit::InterruptWindow
    );
    let inject = Some(Injection::ExternalInterrupt(Vector(0x20)));
    let entry = Entry {
        inject,
        ..Entry::default()
    };
    assert_eq!(engine.run(CPU, entry, Until::Exit).expect("run"), Exit::Hlt);
    let cpu = engine.state(CPU).expect("state");
    assert_eq!((cpu.regs.rip, cpu.regs[Gpr::Rax]), (stub(0x20), 0));
    assert_eq!(get_u64(&memory, cpu.regs[Gpr::Rsp]), USER_CODE);
}

#[test]
fn a_window_opens_behind_the_shadow_of_sti() {
    let Some((mut engine, _)) = ring0(|a| {
        a.out(0x80, al)?;
        a.nop()?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        a.hlt()
    }) else {
        return;
    };
    assert!(matches!(run(&mut engine, Answer::None), Exit::IoOut { .. }));
    let wish = Entry {
        interrupt_window: true,
        ..Entry::default()
    };
    assert_eq!(
        engine.run(CPU, wish, Until::Exit).expect("run"),
        Exit::InterruptWindow
    );
    assert_eq!(engine.state(CPU).expect("state").regs.rip, CODE + 5);
}

#[test]
fn a_triple_fault_is_an_exit() {
    let Some((mut engine, _)) = ring0(|a| a.ud2()) else {
        return;
    };
    let mut cpu = kernel();
    cpu.idtr.limit = 0;
    engine.set_state(CPU, &cpu).expect("state");
    assert_eq!(run(&mut engine, Answer::None), Exit::TripleFault);
    assert_eq!(
        engine.state(CPU).expect("state").activity,
        Activity::Shutdown
    );
}

/// A page table that ring 0 changes is seen by ring 3, whoever executes ring 0.
#[test]
fn mappings_changed_by_the_kernel_hold_in_ring_3() {
    for policy in [kvm::Cpl0Policy::Kvm, kvm::Cpl0Policy::Soft] {
        let memory = memory();
        // Reads, and asks the kernel for another page there.
        put(
            &memory,
            USER_CODE,
            &assemble(USER_CODE, |a| {
                let mut again = a.create_label();
                a.set_label(&mut again)?;
                a.mov(rbx, qword_ptr(DATA))?;
                a.syscall()?;
                a.jmp(again)
            }),
        );
        let entry = PT + 8 * (DATA >> 12);
        put(
            &memory,
            SYSCALL_ENTRY,
            &assemble(SYSCALL_ENTRY, |a| {
                a.out(0x80, al)?;
                a.mov(rdx, qword_ptr(entry))?;
                a.xor(rdx, 0x1000)?;
                a.mov(qword_ptr(entry), rdx)?;
                a.invlpg(byte_ptr(DATA))?;
                a.sysretq()
            }),
        );
        put(&memory, DATA, &[0x11]);
        put(&memory, DATA ^ 0x1000, &[0x22]);
        let mut engine =
            match kvm::KvmEngine::with_policy(memory.clone(), CpuModel::default(), policy) {
                Ok(engine) => engine,
                Err(error) => return skipped(&error),
            };
        engine.set_state(CPU, &user()).expect("state");
        for round in 0..6 {
            assert!(matches!(run(&mut engine, Answer::None), Exit::IoOut { .. }));
            complete(&mut engine, Answer::None);
            let seen = engine.state(CPU).expect("state").regs[Gpr::Rbx] as u8;
            assert_eq!(
                seen,
                if round % 2 == 0 { 0x11 } else { 0x22 },
                "{policy:?}, round {round}"
            );
        }
    }
}

/// Where a kick stopped KVM, the soft engine comes by as well: the landmark a recording needs.
#[test]
fn the_soft_engine_passes_where_a_kick_stopped_kvm() {
    let code: Write = |a| {
        let mut again = a.create_label();
        a.mov(ebx, 7)?;
        a.set_label(&mut again)?;
        a.imul_3(rbx, rbx, 0x0101_0101)?;
        a.add(qword_ptr(DATA), rbx)?;
        a.mov(ecx, 40)?;
        a.mov(edi, DATA as u32 + 64)?;
        a.rep().stosb()?;
        a.mov(al, bl)?;
        a.addsd(xmm0, xmm0)?;
        a.jmp(again)
    };
    for (at, cpu) in [(CODE, kernel()), (USER_CODE, user())] {
        for _ in 0..3 {
            let Some((mut engine, memory)) = start(at, &cpu, code) else {
                return;
            };
            let replay = GuestMemory::new(RAM).expect("memory");
            copy(&memory, &replay);
            let kicker = engine.kicker(CPU).expect("kicker");
            let thread = std::thread::spawn(move || kicker.kick());
            assert_eq!(run(&mut engine, Answer::None), Exit::Kicked);
            thread.join().expect("kicker thread");
            let landmark = engine.state(CPU).expect("state");
            if landmark.regs.rip == at {
                continue; // Kicked before it started.
            }
            let mut soft = SoftEngine::new(replay.clone(), CpuModel::default()).expect("soft");
            soft.set_state(CPU, &cpu).expect("state");
            let limit = Position::at(20_000_000);
            while replay.digest() != memory.digest() || soft.state(CPU).expect("state") != landmark
            {
                let until = Until::Registers {
                    registers: &landmark.regs,
                    limit,
                };
                assert_eq!(
                    soft.run(CPU, Entry::default(), until).expect("run"),
                    Exit::BoundReached
                );
                assert!(
                    soft.position().is_some_and(|at| at < limit),
                    "no such moment: {landmark:#x?}"
                );
            }
        }
    }
}

/// A kick may come while KVM is about to execute an instruction for which it has set accessed and dirty bits already.
#[test]
fn a_kick_leaves_no_accessed_bit_of_an_instruction_that_was_not_executed() {
    const PAGES: u64 = 256;
    const FIRST: u64 = 0x2_0000;
    for _ in 0..40 {
        let memory = memory();
        for page in FIRST >> 12..(FIRST >> 12) + PAGES {
            put(&memory, PT + 8 * page, &(page << 12 | 7).to_le_bytes());
        }
        put(
            &memory,
            USER_CODE,
            &assemble(USER_CODE, |a| {
                let (mut again, mut end) = (a.create_label(), a.create_label());
                a.mov(ecx, PAGES as u32)?;
                a.mov(edi, FIRST as u32)?;
                a.set_label(&mut again)?;
                a.mov(qword_ptr(rdi), rcx)?;
                a.add(rdi, 0x1000)?;
                a.dec(ecx)?;
                a.jnz(again)?;
                a.set_label(&mut end)?;
                a.jmp(end)
            }),
        );
        let Some(mut engine) = engine(&memory) else {
            return;
        };
        engine.set_state(CPU, &user()).expect("state");
        let kicker = engine.kicker(CPU).expect("kicker");
        let thread = std::thread::spawn(move || kicker.kick());
        assert_eq!(run(&mut engine, Answer::None), Exit::Kicked);
        thread.join().expect("kicker thread");
        let stored = engine.state(CPU).expect("state").regs[Gpr::Rdi].saturating_sub(FIRST) >> 12;
        let touched =
            (0..PAGES).filter(|page| get_u64(&memory, PT + 8 * ((FIRST >> 12) + page)) & 0x60 != 0);
        let ahead = touched.count() as u64 - stored;
        // RDI goes up in the instruction after the store.
        assert!(ahead <= 1, "{ahead} pages ahead");
        if ahead == 1 {
            let last = get_u64(&memory, FIRST + (stored << 12));
            assert_eq!(last, PAGES - stored, "dirty, and not written");
        }
    }
}

fn copy(from: &GuestMemory, to: &GuestMemory) {
    let mut bytes = vec![0; RAM as usize];
    from.read(x86::GuestPhysAddr::new(0), &mut bytes)
        .expect("read");
    to.write(x86::GuestPhysAddr::new(0), &bytes).expect("write");
}
