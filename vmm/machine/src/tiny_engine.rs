//! An engine for a toy instruction set, for tests of everything above engines.
//!
//! Purpose: exits, completions, interrupts, breakpoints and single steps as the contract has them, without a processor. RIP counts
//! operations; RAX holds what the last IN returned; interrupts go to one handler, whatever the vector.
//! Invariants: those of [`Engine`]. It counts instructions unless told not to.

use crate::engine::{Answer, Engine, EngineError, EngineKind, Entry, Kick, Until};
use crate::memory::PageSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use x86::exit::AccessData;
use x86::regs::rflags;
use x86::{
    CpuState, Exit, ExitControls, Gpr, GuestPhysAddr, Instructions, Position, SegmentRegister,
    VcpuId,
};

/// One operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Op {
    Nop,
    In(u16),
    Out(u16, u8),
    /// OUT of AL.
    OutAl(u16),
    Jump(u64),
    Sti,
    Cli,
    Hlt,
    Iret,
    TripleFault,
    /// What no engine executes.
    Broken,
}

/// Programs the PICs (vectors 20h and 28h, only IRQ 0 and 4 unmasked) and the PIT (mode 2, `count` ticks).
pub(crate) fn start_timer(count: u16) -> Vec<Op> {
    let [low, high] = count.to_le_bytes();
    let writes = [
        (0x20, 0x11),
        (0x21, 0x20),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xee),
        (0x43, 0x34),
        (0x40, low),
        (0x40, high),
    ];
    writes.map(|(port, value)| Op::Out(port, value)).to_vec()
}

/// A program and where its interrupt handler is.
pub(crate) struct TinyEngine {
    program: Vec<Op>,
    handler: u64,
    cpu: CpuState,
    /// Interrupted RIPs.
    frames: Vec<u64>,
    position: Option<Position>,
    controls: ExitControls,
    /// The operation at RIP awaits completion.
    pending: bool,
    kicked: Arc<Flag>,
    /// Positions at which interrupts were delivered.
    pub(crate) delivered: Vec<Position>,
}

#[derive(Default)]
pub(crate) struct Flag(pub(crate) AtomicBool);

impl Kick for Flag {
    fn kick(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl TinyEngine {
    pub(crate) fn new(program: Vec<Op>, handler: Vec<Op>) -> Self {
        let start = program.len() as u64;
        let mut cpu = CpuState::default();
        cpu.regs.rip = 0;
        cpu.segment_mut(SegmentRegister::Cs).base = 0;
        Self {
            program: [program, handler].concat(),
            handler: start,
            cpu,
            frames: Vec::new(),
            position: Some(Position::START),
            controls: ExitControls::default(),
            pending: false,
            kicked: Arc::default(),
            delivered: Vec::new(),
        }
    }

    /// The same without counting.
    pub(crate) fn without_position(mut self) -> Self {
        self.position = None;
        self
    }

    pub(crate) fn kick_flag(&self) -> Arc<Flag> {
        Arc::clone(&self.kicked)
    }

    fn op(&self) -> Op {
        let at = usize::try_from(self.cpu.regs.rip).expect("small");
        self.program.get(at).copied().unwrap_or(Op::Broken)
    }

    fn retire(&mut self, rip: u64) {
        self.cpu.regs.rip = rip;
        if let Some(position) = &mut self.position {
            position.retired = Instructions::new(position.retired.get() + 1);
            position.within = 0;
        }
    }

    fn complete(&mut self, answer: Answer) -> Result<(), EngineError> {
        if !std::mem::take(&mut self.pending) {
            return Ok(());
        }
        match (self.op(), answer) {
            (Op::In(_), Answer::Data(value)) => self.cpu.regs[Gpr::Rax] = value,
            (Op::Out(..) | Op::OutAl(_), Answer::None) => {}
            _ => return Err(EngineError::OutOfOrder("the wrong answer")),
        }
        self.retire(self.cpu.regs.rip + 1);
        Ok(())
    }

    fn deliver(&mut self) {
        assert!(self.interruptible(), "an interrupt that cannot be taken");
        self.frames.push(self.cpu.regs.rip);
        self.cpu.regs.rip = self.handler;
        self.cpu.regs.rflags &= !rflags::IF;
        if let Some(position) = &mut self.position {
            position.within += 1;
            self.delivered.push(*position);
        }
    }

    fn interruptible(&self) -> bool {
        self.cpu.regs.rflags & rflags::IF != 0
    }

    fn execute(&mut self) -> Result<Option<Exit>, EngineError> {
        let next = self.cpu.regs.rip + 1;
        let out = |port, value: u8| Exit::IoOut {
            port,
            data: AccessData {
                value: value.into(),
                size: 1,
            },
        };
        match self.op() {
            Op::Nop => self.retire(next),
            Op::Jump(to) => self.retire(to),
            Op::Iret => {
                let to = self.frames.pop().expect("in a handler");
                self.cpu.regs.rflags |= rflags::IF;
                self.retire(to);
            }
            Op::Sti => {
                self.cpu.regs.rflags |= rflags::IF;
                self.retire(next);
            }
            Op::Cli => {
                self.cpu.regs.rflags &= !rflags::IF;
                self.retire(next);
            }
            Op::Hlt => {
                self.retire(next);
                return Ok(Some(Exit::Hlt));
            }
            Op::In(port) => {
                self.pending = true;
                return Ok(Some(Exit::IoIn { port, size: 1 }));
            }
            Op::Out(port, value) => {
                self.pending = true;
                return Ok(Some(out(port, value)));
            }
            Op::OutAl(port) => {
                self.pending = true;
                return Ok(Some(out(port, self.cpu.regs[Gpr::Rax] as u8)));
            }
            Op::TripleFault => return Ok(Some(Exit::TripleFault)),
            Op::Broken => {
                return Err(EngineError::Unimplemented {
                    rip: self.cpu.regs.rip,
                    bytes: Vec::new(),
                    reason: "it is broken".into(),
                });
            }
        }
        Ok(None)
    }

    /// What ends a run before the next operation.
    fn at_boundary(&self, window: bool, until: Until<'_>) -> Option<Exit> {
        if window && self.interruptible() {
            return Some(Exit::InterruptWindow);
        }
        let reached = match until {
            Until::Exit => false,
            Until::Completed => true,
            Until::Position(wanted) => self.position.is_some_and(|at| at >= wanted),
            _ => panic!("not in these tests"),
        };
        if reached {
            return Some(Exit::BoundReached);
        }
        if self.kicked.0.swap(false, Ordering::SeqCst) {
            return Some(Exit::Kicked);
        }
        let here = self.cpu.rip_linear();
        self.controls
            .breakpoints
            .contains(&here)
            .then_some(Exit::Breakpoint(here))
    }
}

impl Engine for TinyEngine {
    fn kind(&self) -> EngineKind {
        if self.position.is_some() {
            EngineKind::Soft
        } else {
            EngineKind::Kvm
        }
    }

    fn set_controls(&mut self, controls: &ExitControls) -> Result<(), EngineError> {
        self.controls = controls.clone();
        Ok(())
    }

    fn run(&mut self, _vcpu: VcpuId, entry: Entry, until: Until<'_>) -> Result<Exit, EngineError> {
        let trap = self.controls.monitor_trap_flag;
        let completes = self.pending;
        self.complete(entry.answer)?;
        if entry.inject.is_some() {
            self.deliver();
        } else if completes && trap && until != Until::Completed {
            return Ok(Exit::MonitorTrapFlag);
        }
        loop {
            if let Some(exit) = self.at_boundary(entry.interrupt_window, until) {
                return Ok(exit);
            }
            if let Some(exit) = self.execute()? {
                return Ok(exit);
            }
            if trap {
                return Ok(Exit::MonitorTrapFlag);
            }
        }
    }

    fn state(&mut self, _vcpu: VcpuId) -> Result<CpuState, EngineError> {
        if self.pending {
            return Err(EngineError::OutOfOrder("an exit awaits completion"));
        }
        Ok(self.cpu.clone())
    }

    fn set_state(&mut self, _vcpu: VcpuId, state: &CpuState) -> Result<(), EngineError> {
        self.cpu = state.clone();
        Ok(())
    }

    fn interrupts_enabled(&mut self, _vcpu: VcpuId) -> Result<bool, EngineError> {
        Ok(self.interruptible())
    }

    fn kicker(&self, _vcpu: VcpuId) -> Result<Arc<dyn Kick>, EngineError> {
        Ok(self.kick_flag())
    }

    fn take_dirty(&mut self) -> Result<PageSet, EngineError> {
        Ok(PageSet::new())
    }

    fn memory_written(&mut self, _addr: GuestPhysAddr, _len: usize) {}

    fn position(&self) -> Option<Position> {
        self.position
    }

    fn set_position(&mut self, position: Position) {
        self.position = Some(position);
    }
}
