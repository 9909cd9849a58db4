//! How fast the software engine executes: guest instructions per second on small loops.
//!
//! `cargo run --release -p chronovisor-soft --example speed`

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use machine::GuestMemory;
use machine::engine::{Engine, Entry, Until};
use soft::SoftEngine;
use std::time::Instant;
use x86::regs::{Cr0, Cr4, Efer, rflags};
use x86::{
    CpuModel, CpuState, GuestPhysAddr, Instructions, Position, Segment, SegmentRegister, VcpuId,
};

const CODE: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const COUNT: u64 = 20_000_000;

fn arithmetic(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    a.add(rax, rcx)?;
    a.xor(edx, eax)?;
    a.rol(edx, 7)?;
    a.lea(rsi, qword_ptr(rax + rdx * 4 + 16))?;
    a.imul_2(rcx, rsi)?;
    a.sub(r8, rcx)?;
    a.cmp(r8, r9)?;
    a.jne(top)?;
    a.jmp(top)
}

fn memory(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    let mut inner = a.create_label();
    a.set_label(&mut top)?;
    a.xor(ecx, ecx)?;
    a.set_label(&mut inner)?;
    a.mov(rax, qword_ptr(rbx + rcx * 8))?;
    a.add(rax, qword_ptr(rbx + rcx * 8 + 2048))?;
    a.mov(qword_ptr(rbx + rcx * 8), rax)?;
    a.add(dword_ptr(rbx + 4096), 1)?;
    a.inc(ecx)?;
    a.cmp(ecx, 200)?;
    a.jb(inner)?;
    a.jmp(top)
}

fn calls(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    let mut function = a.create_label();
    a.set_label(&mut top)?;
    a.mov(edi, eax)?;
    a.call(function)?;
    a.jmp(top)?;
    a.set_label(&mut function)?;
    a.push(rbx)?;
    a.push(rbp)?;
    a.lea(ebx, dword_ptr(rdi + 1))?;
    a.test(ebx, 1)?;
    a.mov(eax, ebx)?;
    a.pop(rbp)?;
    a.pop(rbx)?;
    a.ret()
}

fn vectors(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    a.movdqu(xmm0, xmmword_ptr(rbx))?;
    a.paddd(xmm0, xmm1)?;
    a.pshufd(xmm1, xmm0, 0x4e)?;
    a.mulsd(xmm2, xmm3)?;
    a.movdqu(xmmword_ptr(rbx), xmm0)?;
    a.jmp(top)
}

fn copies(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    a.mov(rsi, rbx)?;
    a.lea(rdi, qword_ptr(rbx + 8192))?;
    a.mov(ecx, 512)?;
    a.rep().movsq()?;
    a.jmp(top)
}

fn engine(program: fn(&mut CodeAssembler) -> Result<(), IcedError>) -> SoftEngine {
    let memory = GuestMemory::new(4 << 20).expect("memory");
    let entry = |at: u64, value: u64| {
        memory
            .write(GuestPhysAddr::new(at), &value.to_le_bytes())
            .expect("in RAM");
    };
    entry(0x1000, 0x2003);
    entry(0x2000, 0x3003);
    entry(0x3000, 0x83);
    entry(0x3008, 0x20_0083);
    let mut assembler = CodeAssembler::new(64).expect("assembler");
    program(&mut assembler).expect("assembles");
    let code = assembler.assemble(CODE).expect("assembles");
    memory
        .write(GuestPhysAddr::new(CODE), &code)
        .expect("in RAM");
    let mut cpu = CpuState {
        cr0: Cr0::PE | Cr0::PG | Cr0::ET | Cr0::NE | Cr0::WP,
        cr3: 0x1000,
        cr4: Cr4::PAE | Cr4::OSFXSR,
        efer: Efer::LME | Efer::LMA,
        ..CpuState::default()
    };
    for which in SegmentRegister::ALL {
        *cpu.segment_mut(which) = Segment::flat(0x10, 0xc093);
    }
    *cpu.segment_mut(SegmentRegister::Cs) = Segment::flat(8, 0xa09b);
    cpu.regs.rip = CODE;
    cpu.regs.rflags = rflags::FIXED;
    cpu.regs.gpr = std::array::from_fn(|n| n as u64 * 0x1357_9bdf);
    cpu.regs.gpr[3] = DATA;
    cpu.regs.gpr[4] = DATA + 0x1_0000;
    let mut engine = SoftEngine::new(memory, CpuModel::V2).expect("an engine");
    engine.set_state(VcpuId::BOOT, &cpu).expect("a state");
    engine
}

fn main() {
    type Program = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let programs: [(&str, Program); 5] = [
        ("arithmetic", arithmetic),
        ("memory", memory),
        ("calls", calls),
        ("vectors", vectors),
        ("copies (iterations)", copies),
    ];
    for (name, program) in programs {
        let mut engine = engine(program);
        let count = if name.starts_with("copies") {
            COUNT / 500
        } else {
            COUNT
        };
        let end = Position {
            retired: Instructions::new(count),
            within: 0,
        };
        let start = Instant::now();
        engine
            .run(VcpuId::BOOT, Entry::default(), Until::Position(end))
            .expect("runs");
        let seconds = start.elapsed().as_secs_f64();
        let done = if name.starts_with("copies") {
            count / 5 * 516
        } else {
            count
        };
        println!("{name:20} {:6.1} M/s", done as f64 / seconds / 1e6);
    }
}
