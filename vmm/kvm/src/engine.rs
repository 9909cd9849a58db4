//! The engine: who holds the guest's state, and who executes next.
//!
//! Purpose: [`KvmEngine`] behind [`Engine`]: take the answer to the last exit, deliver what is to be injected, then let KVM or the
//! single-instruction path execute until something exits.
//! Invariants:
//! - The state is in one place: in KVM, or here ([`Core`]), where it may have changed. The extra state (FPU, MSRs, debug
//!   registers) is read only when somebody needs it, and written back only where it differs.
//! - While KVM awaits the completion of an exit ([`Owed`]), nothing is put into it.
//! - Interrupts are delivered by [`soft::Stepper`] on every host, so that frames, flags and accessed bits are the ones a replay makes.
//!
//! Elsewhere: moving the state ([`crate::transfer`]); KVM's exits ([`crate::exit`]); when and how the single-instruction path runs ([`crate::hybrid`]).
//! Source: KVM API, sections 4.10 and 5.

use crate::host::{self, OpenError};
use crate::quirks::Quirks;
use crate::sensitive::Sensitive;
use crate::shadow::Tables;
use crate::slots::Slots;
use crate::vcpu::Vcpu;
use crate::vm;
use kvm_ioctls::{Kvm, VmFd};
use machine::engine::{Answer, Engine, EngineError, EngineKind, Entry, Kick, Until};
use machine::{GuestMemory, PageSet};
use soft::{Delivery, Pending, Stepper};
use std::sync::Arc;
use x86::controls::Control;
use x86::exit::Injection;
use x86::regs::rflags;
use x86::{
    Activity, CpuModel, CpuState, DescriptorTable, Exit, ExitControls, GuestPhysAddr,
    GuestVirtAddr, PAGE_SIZE, PageFrame, Position, VcpuId,
};

/// Who executes the guest's kernel (and everything else at privilege level 0).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Cpl0Policy {
    /// KVM, but for what it cannot do.
    #[default]
    Kvm,
    /// The single-instruction path; KVM runs ring 3 only.
    Soft,
}

/// Where registers, system registers and events are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Core {
    /// In KVM; what is here is out of date.
    InKvm,
    /// Here, and KVM holds the same.
    Same,
    /// Here; KVM's are out of date.
    Changed,
}

/// What the last exit left unfinished.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Owed {
    /// Nothing: an instruction boundary.
    Nothing,
    /// A port access in KVM; `read` wants a value of this many bytes.
    Port { read: Option<u8> },
    /// An MMIO access in KVM.
    Mmio(Fragments),
    /// An MSR access in KVM.
    Msr,
    /// An access in KVM that has been answered already.
    Answered,
    /// An instruction of the single-instruction path.
    Soft,
}

/// One MMIO access of KVM's, handed out in pieces of 1, 2, 4 or 8 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Fragments {
    pub addr: u64,
    pub len: usize,
    /// Bytes handed out so far.
    pub done: usize,
    pub write: bool,
    /// What is written, or what has been read so far.
    pub value: u64,
}

/// Who did how much.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Work {
    /// Times KVM was entered.
    pub entries: u64,
    /// Instructions, REP iterations and exceptions that the single-instruction path executed.
    pub steps: u64,
    /// Pages that KVM does not get to see at present.
    pub pages_taken_out: u64,
}

/// How many hardware breakpoints a processor has.
pub(crate) const HARDWARE_BREAKPOINTS: usize = 4;

/// The engine on KVM. One virtual CPU.
#[derive(Debug)]
pub struct KvmEngine {
    pub(crate) vm: VmFd,
    pub(crate) vcpu: Vcpu,
    pub(crate) slots: Slots,
    pub(crate) memory: GuestMemory,
    pub(crate) stepper: Stepper,
    pub(crate) pending: Pending,
    pub(crate) quirks: Quirks,
    pub(crate) sensitive: Sensitive,
    pub(crate) policy: Cpl0Policy,
    pub(crate) controls: ExitControls,
    pub(crate) cpu: CpuState,
    pub(crate) core: Core,
    /// The extra state is here, and KVM's the same or out of date.
    pub(crate) extra_here: bool,
    pub(crate) owed: Owed,
    /// The guest's IDTR while KVM holds `hidden_idtr`.
    pub(crate) guest_idtr: DescriptorTable,
    pub(crate) hidden_idtr: Option<DescriptorTable>,
    /// CR2 when KVM was last entered.
    pub(crate) entry_cr2: u64,
    /// The next instruction is for the single-instruction path.
    pub(crate) must_step: bool,
    /// That is only because a kick interrupted KVM.
    pub(crate) after_kick: bool,
    /// KVM ran since the stepper did.
    pub(crate) kvm_ran: bool,
    /// The stepper or the monitor may have written memory since KVM was last given its state.
    pub(crate) wrote: bool,
    /// The stepper may have executed an instruction that drops translations since then.
    pub(crate) stepped: bool,
    /// The breakpoint that was reported last; it does not stop the next run again.
    pub(crate) resume_at: Option<GuestVirtAddr>,
    /// Pages written that nobody has asked for yet.
    pub(crate) dirty: PageSet,
    /// Pages written by us that KVM's shadow page tables may be made from.
    pub(crate) unseen: PageSet,
    /// Pages to look for sensitive instructions in.
    pub(crate) unscanned: PageSet,
    pub(crate) tables: Tables,
    pub(crate) work: Work,
}

impl KvmEngine {
    /// An engine over `memory` whose CPU is of `model`, in its power-on state.
    pub fn new(memory: GuestMemory, model: CpuModel) -> Result<Self, OpenError> {
        Self::with_policy(memory, model, Cpl0Policy::default())
    }

    /// The same, with a say in who executes the guest's kernel.
    pub fn with_policy(
        memory: GuestMemory,
        model: CpuModel,
        policy: Cpl0Policy,
    ) -> Result<Self, OpenError> {
        let kvm = host::open()?;
        let quirks = Quirks::of(&kvm)?;
        Self::with_quirks(&kvm, memory, model, policy, quirks)
    }

    /// The same, taking the measures for these quirks.
    pub(crate) fn with_quirks(
        kvm: &Kvm,
        memory: GuestMemory,
        model: CpuModel,
        policy: Cpl0Policy,
        quirks: Quirks,
    ) -> Result<Self, OpenError> {
        let (vm, vcpu) = vm::create(kvm, model, quirks.syscall_broken)?;
        let sensitive = quirks.sensitive();
        let dirty = memory.take_dirty();
        let found = dirty
            .iter()
            .copied()
            .filter(|&page| sensitive.any() && sensitive.is_in(&memory, page));
        let slots = Slots::new(&vm, &memory, found.collect(), kvm.get_nr_memslots())?;
        let stepper = Stepper::new(memory.clone(), model)?;
        Ok(Self {
            vm,
            vcpu,
            slots,
            memory,
            stepper,
            pending: Pending::new(),
            quirks,
            sensitive,
            policy,
            controls: ExitControls::default(),
            cpu: CpuState::default(),
            core: Core::Changed,
            extra_here: true,
            owed: Owed::Nothing,
            guest_idtr: DescriptorTable::default(),
            hidden_idtr: None,
            entry_cr2: 0,
            must_step: false,
            after_kick: false,
            kvm_ran: false,
            wrote: true,
            stepped: false,
            resume_at: None,
            dirty,
            unseen: PageSet::new(),
            unscanned: PageSet::new(),
            tables: Tables::default(),
            work: Work::default(),
        })
    }

    /// What was found out about this host.
    pub fn quirks(&self) -> Quirks {
        self.quirks
    }

    /// How the work was divided between KVM and the single-instruction path so far.
    pub fn work(&self) -> Work {
        Work {
            pages_taken_out: self.slots.count_out(),
            ..self.work
        }
    }

    /// Lets KVM run, and makes an exit of how it ended. `None`: go on.
    fn enter(&mut self, window: bool) -> Result<Option<Exit>, EngineError> {
        self.load()?;
        let raw = self.vcpu.enter(window && !self.quirks.windows_unreliable)?;
        self.kvm_has_run();
        self.translate(raw)
    }

    /// Finishes what the last exit interrupted. `Some`: it has more to ask.
    fn finish(&mut self) -> Result<Option<Exit>, EngineError> {
        loop {
            match self.owed {
                Owed::Nothing => return Ok(None),
                Owed::Soft => return self.step(),
                Owed::Port { .. } | Owed::Mmio(_) | Owed::Msr | Owed::Answered => {
                    let raw = self.vcpu.finish()?;
                    self.kvm_has_run();
                    if let Some(exit) = self.translate(raw)? {
                        return Ok(Some(exit));
                    }
                }
            }
        }
    }

    /// What has to be looked at before an instruction is executed. `Some`: stop here.
    fn at_boundary(&mut self, entry: &Entry, completed: bool) -> Result<Option<Exit>, EngineError> {
        if self.cpu.activity == Activity::Shutdown {
            return Ok(Some(Exit::TripleFault));
        }
        if entry.interrupt_window && self.interruptible() {
            return Ok(Some(Exit::InterruptWindow));
        }
        if completed {
            return Ok(Some(Exit::BoundReached));
        }
        if self.must_step {
            return Ok(None);
        }
        if self.vcpu.kick().take_request() || self.cpu.activity == Activity::Halted {
            return Ok(Some(Exit::Kicked));
        }
        Ok(None)
    }

    pub(crate) fn interruptible(&mut self) -> bool {
        match self.core {
            Core::InKvm => self.vcpu.interruptible(),
            Core::Same | Core::Changed => self.cpu.interruptible(),
        }
    }

    fn inject(&mut self, injection: Injection) -> Result<Option<Exit>, EngineError> {
        self.fetch_core();
        self.before_step();
        self.core = Core::Changed;
        match self.stepper.inject(&mut self.cpu, injection)? {
            Delivery::Delivered(_) => Ok(None),
            Delivery::TripleFault => {
                self.cpu.activity = Activity::Shutdown;
                Ok(Some(Exit::TripleFault))
            }
        }
    }

    /// Whether every boundary has to be looked at, so that an exit must be completed before the guest goes on.
    fn watches_boundaries(&self) -> bool {
        self.controls.monitor_trap_flag || !self.controls.breakpoints.is_empty()
    }

    fn known(&self, vcpu: VcpuId) -> Result<(), EngineError> {
        if vcpu == VcpuId::BOOT {
            Ok(())
        } else {
            Err(EngineError::NoSuchVcpu(vcpu))
        }
    }
}

impl Engine for KvmEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Kvm
    }

    fn set_controls(&mut self, controls: &ExitControls) -> Result<(), EngineError> {
        let unsupported = controls
            .active()
            .find(|control| !matches!(control, Control::MonitorTrapFlag | Control::Breakpoints));
        if let Some(control) = unsupported {
            return Err(EngineError::Unsupported {
                engine: EngineKind::Kvm.name(),
                control,
                reason: "KVM has no exit for it; use `--engine soft`, or replay a recording",
            });
        }
        let mut at: Vec<u64> = controls.breakpoints.iter().map(|addr| addr.get()).collect();
        if at.len() > HARDWARE_BREAKPOINTS {
            at.clear();
        }
        self.vcpu.set_breakpoints(&at)?;
        self.controls = controls.clone();
        Ok(())
    }

    fn run(&mut self, vcpu: VcpuId, entry: Entry, until: Until<'_>) -> Result<Exit, EngineError> {
        self.known(vcpu)?;
        let completed = match until {
            Until::Exit => false,
            Until::Completed => true,
            Until::Position(_) | Until::Registers { .. } => {
                return Err(EngineError::CannotCount(EngineKind::Kvm.name()));
            }
        };
        if let Some(exit) = self.accept(entry.answer)? {
            return Ok(exit);
        }
        let boundary = completed
            || entry.interrupt_window
            || entry.inject.is_some()
            || self.watches_boundaries();
        if boundary && let Some(exit) = self.finish()? {
            return Ok(exit);
        }
        if let Some(injection) = entry.inject
            && let Some(exit) = self.inject(injection)?
        {
            return Ok(exit);
        }
        loop {
            let exit = if self.owed == Owed::Soft || (boundary && self.owed != Owed::Nothing) {
                self.finish()?
            } else if self.owed != Owed::Nothing {
                self.enter(entry.interrupt_window)?
            } else if let Some(exit) = self.at_boundary(&entry, completed)? {
                Some(exit)
            } else if self.steps_next(entry.interrupt_window) {
                self.step()?
            } else {
                self.enter(entry.interrupt_window)?
            };
            if let Some(exit) = exit {
                return Ok(exit);
            }
        }
    }

    fn state(&mut self, vcpu: VcpuId) -> Result<CpuState, EngineError> {
        self.known(vcpu)?;
        if self.owed != Owed::Nothing {
            return Err(EngineError::OutOfOrder(
                "state asked for while an exit awaits completion",
            ));
        }
        self.fetch()?;
        Ok(self.cpu.clone())
    }

    fn set_state(&mut self, vcpu: VcpuId, state: &CpuState) -> Result<(), EngineError> {
        self.known(vcpu)?;
        match self.owed {
            Owed::Nothing | Owed::Soft => {}
            _ => {
                return Err(EngineError::OutOfOrder(
                    "state set while an exit awaits completion",
                ));
            }
        }
        self.pending.clear();
        self.owed = Owed::Nothing;
        self.cpu = state.clone();
        self.core = Core::Changed;
        self.extra_here = true;
        self.must_step = false;
        self.resume_at = None;
        Ok(())
    }

    fn interrupts_enabled(&mut self, vcpu: VcpuId) -> Result<bool, EngineError> {
        self.known(vcpu)?;
        Ok(match self.core {
            Core::InKvm => self.vcpu.interrupt_flag(),
            Core::Same | Core::Changed => self.cpu.regs.rflags & rflags::IF != 0,
        })
    }

    fn kicker(&self, vcpu: VcpuId) -> Result<Arc<dyn Kick>, EngineError> {
        self.known(vcpu)?;
        Ok(self.vcpu.kick().clone())
    }

    fn take_dirty(&mut self) -> Result<PageSet, EngineError> {
        let by_kvm = self.slots.take_dirty(&self.vm)?;
        self.note_written(&by_kvm);
        let by_us = self.stepper.take_dirty();
        self.note_written(&by_us);
        if self.quirks.shadows_stale {
            self.unseen.extend(&by_us);
        }
        self.wrote = true;
        Ok(std::mem::take(&mut self.dirty))
    }

    fn memory_written(&mut self, addr: GuestPhysAddr, len: usize) {
        self.stepper.memory_written(addr, len);
        self.wrote = true;
        if len == 0 {
            return;
        }
        let last = addr.get().saturating_add(len as u64 - 1) / PAGE_SIZE;
        let pages = (addr.get() / PAGE_SIZE..=last)
            .map(PageFrame::new)
            .collect();
        self.note_written(&pages);
        if self.quirks.shadows_stale {
            self.unseen.extend(pages);
        }
    }

    fn position(&self) -> Option<Position> {
        None
    }

    fn set_position(&mut self, _position: Position) {}
}

/// The value in an answer, or that it is missing.
pub(crate) fn data(answer: Answer) -> Result<u64, EngineError> {
    match answer {
        Answer::Data(value) => Ok(value),
        _ => Err(EngineError::OutOfOrder(
            "the value that the last exit wants is missing",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86::exit::{AccessData, Wants};

    /// On a KVM as it should be, no measure is in the way. This host's may need some for ring 3; its ring 0 runs without.
    #[test]
    fn without_quirks_nothing_is_stepped_but_what_kvm_refuses() {
        let kvm = match host::open() {
            Ok(kvm) => kvm,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let memory = GuestMemory::new(1 << 20).expect("memory");
        // mov ecx, 5; l: out 80h, al; dec cx; jnz l; cpuid; hlt -- in real mode
        let code = [0xb9, 5, 0, 0xe6, 0x80, 0x49, 0x75, 0xfb, 0x0f, 0xa2, 0xf4];
        memory
            .write(GuestPhysAddr::new(0x1000), &code)
            .expect("code");
        let model = CpuModel::default();
        let mut engine =
            KvmEngine::with_quirks(&kvm, memory, model, Cpl0Policy::Kvm, Quirks::default())
                .expect("engine");
        let mut cpu = CpuState::default();
        *cpu.segment_mut(x86::SegmentRegister::Cs) = x86::Segment::real_mode(0x100, true);
        cpu.regs.rip = 0;
        engine.set_state(VcpuId::BOOT, &cpu).expect("state");
        for _ in 0..5 {
            let exit = engine
                .run(VcpuId::BOOT, Entry::default(), Until::Exit)
                .expect("run");
            assert_eq!(
                exit,
                Exit::IoOut {
                    port: 0x80,
                    data: AccessData { value: 0, size: 1 }
                }
            );
            assert_eq!(exit.wants(), Wants::Nothing);
        }
        assert_eq!(
            engine
                .run(VcpuId::BOOT, Entry::default(), Until::Exit)
                .expect("run"),
            Exit::Hlt
        );
        assert_eq!(
            engine.work(),
            Work {
                entries: 6,
                steps: 0,
                pages_taken_out: 0
            }
        );
    }
}
