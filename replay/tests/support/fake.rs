//! A processor with a dozen instructions, behind the engine contract.
//!
//! It can count, or be blind and kicked at arbitrary boundaries as a hypervisor's is; and it can be made to err.

use machine::engine::{Answer, Engine, EngineError, EngineKind, Entry, Kick, Until};
use machine::{GuestMemory, PageSet};
use std::collections::BTreeSet;
use std::sync::Arc;
use x86::exit::{AccessData, Injection};
use x86::regs::rflags;
use x86::{
    Activity, CpuState, Exit, ExitControls, Gpr, GuestPhysAddr, GuestVirtAddr, Instructions,
    Position, VcpuId,
};

/// One instruction. Addresses are physical; RIP counts instructions.
#[derive(Clone, Debug)]
pub enum Op {
    Set(Gpr, u64),
    Add(Gpr, Gpr),
    Load(Gpr, u64),
    Store(u64, Gpr),
    /// Stores a register at [base + another register].
    StoreAt(u64, Gpr, Gpr),
    /// RAX from a port, one byte.
    In(u16),
    Out(u16, u8),
    /// AL to a port.
    OutAl(u16),
    Jump(usize),
    /// Decrements and jumps if not zero.
    Loop(Gpr, usize),
    /// Jumps if the register is less.
    JumpBelow(Gpr, u64, usize),
    /// RCX times: stores AL at [RDI], RDI + 1. Interruptible between.
    RepStore,
    Push(Gpr),
    Pop(Gpr),
    Hlt,
    Sti,
    Cli,
    Iret,
}

/// A program and where its interrupts go.
#[derive(Clone, Debug, Default)]
pub struct Program {
    pub ops: Vec<Op>,
    pub handler: usize,
}

/// An error to make.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// After so many instructions a register changes.
    Register(u64, Gpr, u64),
    /// After so many instructions a byte of memory changes.
    Memory(u64, u64, u8),
    /// After so many instructions a model-specific register changes.
    Msr(u64),
    /// After so many instructions, and somewhere else, the CPU jumps there.
    Jump(u64, usize),
}

pub struct FakeEngine {
    program: Program,
    memory: GuestMemory,
    cpu: CpuState,
    position: Position,
    counts: bool,
    /// Boundaries between kicks; cycles.
    kicks: Vec<u64>,
    kick: usize,
    until_kick: u64,
    pending: Option<Exit>,
    breakpoints: BTreeSet<GuestVirtAddr>,
    fault: Option<Fault>,
}

struct NoKick;

impl Kick for NoKick {
    fn kick(&self) {}
}

impl FakeEngine {
    pub fn new(program: Program, memory: GuestMemory, counts: bool) -> Self {
        let mut cpu = CpuState::default();
        cpu.regs.rip = 0;
        cpu.regs[Gpr::Rsp] = 0x9000;
        Self {
            program,
            memory,
            cpu,
            position: Position::START,
            counts,
            kicks: Vec::new(),
            kick: 0,
            until_kick: u64::MAX,
            pending: None,
            breakpoints: BTreeSet::new(),
            fault: None,
        }
    }

    /// Kicks the CPU after so many boundaries each.
    pub fn kicked(mut self, kicks: Vec<u64>) -> Self {
        self.until_kick = kicks.first().copied().unwrap_or(u64::MAX);
        self.kicks = kicks;
        self
    }

    pub fn err(&mut self, fault: Fault) {
        self.fault = Some(fault);
    }

    fn retire(&mut self) {
        self.position = Position {
            retired: Instructions::new(self.position.retired.get() + 1),
            within: 0,
        };
        self.cpu.regs.rip += 1;
    }

    fn passed(&mut self) {
        self.until_kick = self.until_kick.saturating_sub(1);
        let retired = self.position.retired.get();
        match self.fault {
            Some(Fault::Register(at, gpr, xor)) if at == retired => self.cpu.regs[gpr] ^= xor,
            Some(Fault::Memory(at, addr, value)) if at == retired => {
                self.memory
                    .write(GuestPhysAddr::new(addr), &[value])
                    .expect("RAM");
            }
            Some(Fault::Msr(at)) if at == retired => self.cpu.msrs.kernel_gs_base ^= 1,
            Some(Fault::Jump(at, target))
                if at <= retired && self.cpu.regs.rip != target as u64 =>
            {
                self.cpu.regs.rip = target as u64;
            }
            _ => return,
        }
        self.fault = None;
    }

    fn push(&mut self, value: u64) {
        self.cpu.regs[Gpr::Rsp] -= 8;
        self.write(self.cpu.regs[Gpr::Rsp], value);
    }

    fn pop(&mut self) -> u64 {
        let value = self.read(self.cpu.regs[Gpr::Rsp]);
        self.cpu.regs[Gpr::Rsp] += 8;
        value
    }

    fn read(&self, addr: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory
            .read(GuestPhysAddr::new(addr), &mut bytes)
            .expect("RAM");
        u64::from_le_bytes(bytes)
    }

    fn write(&self, addr: u64, value: u64) {
        self.memory
            .write(GuestPhysAddr::new(addr), &value.to_le_bytes())
            .expect("RAM");
    }

    fn complete(&mut self, answer: Answer) {
        match (self.pending.take(), answer) {
            (None, _) => return,
            (Some(Exit::IoIn { .. }), Answer::Data(data)) => self.cpu.regs[Gpr::Rax] = data & 0xff,
            (Some(Exit::IoOut { .. }), _) => {}
            (pending, answer) => panic!("{pending:?} answered with {answer:?}"),
        }
        self.retire();
        self.passed();
    }

    fn deliver(&mut self) {
        self.push(self.cpu.regs.rflags);
        self.push(self.cpu.regs.rip);
        self.cpu.regs.rip = self.program.handler as u64;
        self.cpu.regs.rflags &= !rflags::IF;
        self.cpu.activity = Activity::Active;
        self.position.within += 1;
        self.passed();
    }

    /// Executes one instruction; an exit comes back when it has one.
    fn execute(&mut self) -> Option<Exit> {
        let op = self.program.ops[self.cpu.regs.rip as usize].clone();
        let regs = &mut self.cpu.regs;
        let mut next = regs.rip + 1;
        match op {
            Op::Set(gpr, value) => regs[gpr] = value,
            Op::Add(a, b) => regs[a] = regs[a].wrapping_add(regs[b]),
            Op::Load(gpr, addr) => self.cpu.regs[gpr] = self.read(addr),
            Op::Store(addr, gpr) => self.write(addr, self.cpu.regs[gpr]),
            Op::StoreAt(base, index, gpr) => {
                let addr = base + regs[index];
                self.write(addr, self.cpu.regs[gpr]);
            }
            Op::Push(gpr) => self.push(self.cpu.regs[gpr]),
            Op::Pop(gpr) => self.cpu.regs[gpr] = self.pop(),
            Op::In(port) => return self.ask(Exit::IoIn { port, size: 1 }),
            Op::Out(port, value) => return self.out(port, value),
            Op::OutAl(port) => {
                let value = regs[Gpr::Rax] as u8;
                return self.out(port, value);
            }
            Op::Jump(target) => next = target as u64,
            Op::Loop(gpr, target) => {
                regs[gpr] -= 1;
                if regs[gpr] != 0 {
                    next = target as u64;
                }
            }
            Op::JumpBelow(gpr, limit, target) => {
                if regs[gpr] < limit {
                    next = target as u64;
                }
            }
            Op::RepStore => {
                if regs[Gpr::Rcx] > 1 {
                    self.rep();
                    self.position.within += 1;
                    self.passed();
                    return None;
                }
                self.rep();
            }
            Op::Sti => regs.rflags |= rflags::IF,
            Op::Cli => regs.rflags &= !rflags::IF,
            Op::Iret => {
                next = self.pop();
                self.cpu.regs.rflags = self.pop();
            }
            Op::Hlt => {
                self.cpu.activity = Activity::Halted;
                self.retire();
                self.passed();
                return Some(Exit::Hlt);
            }
        }
        self.retire();
        self.cpu.regs.rip = next;
        self.passed();
        None
    }

    fn rep(&mut self) {
        let regs = &mut self.cpu.regs;
        let byte = [regs[Gpr::Rax] as u8];
        let addr = GuestPhysAddr::new(regs[Gpr::Rdi]);
        regs[Gpr::Rdi] += 1;
        regs[Gpr::Rcx] -= 1;
        self.memory.write(addr, &byte).expect("RAM");
    }

    fn out(&mut self, port: u16, value: u8) -> Option<Exit> {
        let data = AccessData {
            value: value.into(),
            size: 1,
        };
        self.ask(Exit::IoOut { port, data })
    }

    fn ask(&mut self, exit: Exit) -> Option<Exit> {
        self.pending = Some(exit.clone());
        Some(exit)
    }

    fn bound_reached(&self, until: Until<'_>, passed: bool) -> bool {
        match until {
            Until::Exit => false,
            Until::Completed => true,
            Until::Position(position) => {
                assert!(self.counts, "this engine does not count");
                self.position >= position
            }
            Until::Registers { registers, limit } => {
                assert!(self.counts, "this engine does not count");
                self.position >= limit || passed && self.cpu.regs == *registers
            }
        }
    }
}

impl Engine for FakeEngine {
    fn kind(&self) -> EngineKind {
        if self.counts {
            EngineKind::Soft
        } else {
            EngineKind::Kvm
        }
    }

    fn set_controls(&mut self, controls: &ExitControls) -> Result<(), EngineError> {
        self.breakpoints = controls.breakpoints.clone();
        Ok(())
    }

    fn run(&mut self, _: VcpuId, entry: Entry, until: Until<'_>) -> Result<Exit, EngineError> {
        let mut passed = self.pending.is_some() || entry.inject.is_some();
        self.complete(entry.answer);
        if let Some(Injection::ExternalInterrupt(_)) = entry.inject {
            self.deliver();
        }
        loop {
            if self.until_kick == 0 {
                self.kick = (self.kick + 1) % self.kicks.len();
                self.until_kick = self.kicks[self.kick];
                return Ok(Exit::Kicked);
            }
            // A bound comes first on an engine that counts, a window on one that does not: both are right.
            if self.counts && self.bound_reached(until, passed) {
                return Ok(Exit::BoundReached);
            }
            if entry.interrupt_window && self.cpu.interruptible() {
                return Ok(Exit::InterruptWindow);
            }
            if !self.counts && self.bound_reached(until, passed) {
                return Ok(Exit::BoundReached);
            }
            assert_eq!(self.cpu.activity, Activity::Active, "entered while halted");
            let here = self.cpu.rip_linear();
            if self.breakpoints.contains(&here) {
                return Ok(Exit::Breakpoint(here));
            }
            if let Some(exit) = self.execute() {
                return Ok(exit);
            }
            passed = true;
        }
    }

    fn state(&mut self, _: VcpuId) -> Result<CpuState, EngineError> {
        if self.pending.is_some() {
            return Err(EngineError::OutOfOrder("an exit awaits completion"));
        }
        Ok(self.cpu.clone())
    }

    fn set_state(&mut self, _: VcpuId, state: &CpuState) -> Result<(), EngineError> {
        self.pending = None;
        self.cpu = state.clone();
        Ok(())
    }

    fn interrupts_enabled(&mut self, _: VcpuId) -> Result<bool, EngineError> {
        Ok(self.cpu.regs.rflags & rflags::IF != 0)
    }

    fn kicker(&self, _: VcpuId) -> Result<Arc<dyn Kick>, EngineError> {
        Ok(Arc::new(NoKick))
    }

    fn take_dirty(&mut self) -> Result<PageSet, EngineError> {
        Ok(self.memory.take_dirty())
    }

    fn memory_written(&mut self, _: GuestPhysAddr, _: usize) {}

    fn position(&self) -> Option<Position> {
        self.counts.then_some(self.position)
    }

    fn set_position(&mut self, position: Position) {
        self.position = position;
    }
}

/// Adds instructions; the number of the first comes back.
fn add(ops: &mut Vec<Op>, more: impl IntoIterator<Item = Op>) -> usize {
    let at = ops.len();
    ops.extend(more);
    at
}

/// Main loop and timer handler race: the handler writes what it finds of the main loop's counters into a list, reads the timer and
/// prints. After `ticks` interrupts the guest ends. How it halts, spins, copies and prints is spread over the loop.
pub fn racing(ticks: u64) -> Program {
    let mut ops = Vec::new();
    let out = |list: &[(u16, u8)]| list.iter().map(|&(p, v)| Op::Out(p, v)).collect::<Vec<_>>();
    // PIC at vectors 20h and 28h, only the timer enabled; PIT channel 0, mode 2, about 1 kHz.
    let pic = [
        (0x20, 0x11),
        (0x21, 0x20),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xfe),
    ];
    add(&mut ops, out(&pic));
    add(
        &mut ops,
        out(&[
            (0xa0, 0x11),
            (0xa1, 0x28),
            (0xa1, 2),
            (0xa1, 1),
            (0xa1, 0xff),
        ]),
    );
    add(&mut ops, out(&[(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)]));
    add(
        &mut ops,
        [Op::Set(Gpr::Rbx, 1), Op::Set(Gpr::R12, 0), Op::Sti],
    );
    let main = add(&mut ops, [Op::Set(Gpr::R8, 300)]);
    // Counts in registers and memory, without an exit.
    let spin = add(
        &mut ops,
        [
            Op::Add(Gpr::R9, Gpr::Rbx),
            Op::Store(0x3000, Gpr::R9),
            Op::Add(Gpr::R10, Gpr::R9),
            Op::StoreAt(0x4000, Gpr::R12, Gpr::R10),
        ],
    );
    add(&mut ops, [Op::Loop(Gpr::R8, spin)]);
    // A spin in which registers repeat and only memory moves on.
    add(&mut ops, [Op::Set(Gpr::R8, 50)]);
    let still = add(
        &mut ops,
        [
            Op::Load(Gpr::R11, 0x5000),
            Op::Add(Gpr::R11, Gpr::Rbx),
            Op::Store(0x5000, Gpr::R11),
            Op::Set(Gpr::R11, 0),
            Op::Push(Gpr::R8),
            Op::Set(Gpr::R8, 0),
            Op::Pop(Gpr::R8),
        ],
    );
    add(&mut ops, [Op::Loop(Gpr::R8, still)]);
    add(
        &mut ops,
        [
            Op::Set(Gpr::Rdi, 0x6000),
            Op::Set(Gpr::Rcx, 40),
            Op::RepStore,
        ],
    );
    add(&mut ops, [Op::Set(Gpr::Rax, b'.'.into()), Op::OutAl(0x3f8)]);
    // Halts every other time.
    let again = ops.len() + 3;
    add(
        &mut ops,
        [Op::In(0x61), Op::JumpBelow(Gpr::Rax, 0x10, again), Op::Hlt],
    );
    add(
        &mut ops,
        [
            Op::Load(Gpr::R13, 0x7000),
            Op::JumpBelow(Gpr::R13, ticks, main),
        ],
    );
    add(
        &mut ops,
        [
            Op::Cli,
            Op::Load(Gpr::Rax, 0x8000),
            Op::OutAl(0xe9),
            Op::Out(0xf4, 7),
        ],
    );
    add(&mut ops, [Op::Hlt]);
    // Right before the handler, and reached only by mistake.
    let forever = ops.len();
    add(&mut ops, [Op::Jump(forever)]);
    let save = [Gpr::Rax, Gpr::R11, Gpr::R13];
    let handler = add(&mut ops, save.map(Op::Push));
    add(&mut ops, [Op::Out(0x43, 0), Op::In(0x40), Op::OutAl(0x3f8)]);
    add(
        &mut ops,
        [
            Op::Load(Gpr::R11, 0x8000),
            Op::Add(Gpr::R11, Gpr::R10),
            Op::Add(Gpr::R11, Gpr::Rax),
            Op::Store(0x8000, Gpr::R11),
            Op::Load(Gpr::R13, 0x7000),
            Op::Add(Gpr::R13, Gpr::Rbx),
            Op::Store(0x7000, Gpr::R13),
            Op::Out(0x20, 0x20),
        ],
    );
    add(&mut ops, [Gpr::R13, Gpr::R11, Gpr::Rax].map(Op::Pop));
    add(&mut ops, [Op::Iret]);
    Program { ops, handler }
}
