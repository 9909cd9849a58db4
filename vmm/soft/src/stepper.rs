//! Executing one instruction.
//!
//! Purpose: [`Stepper::step`] fetches, executes and retires one instruction on a CPU state its caller holds, or delivers what
//! keeps it from executing.
//! Invariants:
//! - After a step the CPU stands at an instruction boundary (or between two iterations of a REP instruction), or, after
//!   [`Step::Exit`], where it stood before.
//! - RF is set in the image a fault pushes and while a REP instruction is under way, and clear after an instruction retires.
//! - The single-step trap (TF) is raised after the instruction, except after one that loads SS or enters a handler; it is
//!   delivered as a step of its own.
//!
//! Not implemented: breakpoints in debug registers.
//! Elsewhere: what instructions do ([`crate::dispatch`]); running many ([`crate::engine`]).
//! Source: Intel SDM vol. 3A, 6.8-6.9 (priorities), 17.3.1.4 (single step), 6.8.3 (MOV SS).

use crate::Pending;
use crate::code::{Code, Slot};
use crate::decode::MAX_LEN;
use crate::delivery::Event;
use crate::dispatch::Done;
use crate::guest::{Guest, Rules};
use crate::memory::Memory;
use crate::mode::Mode;
use crate::raise::Delivery;
use crate::stop::{Exec, Stop, gp};
use crate::stub::Frame;
use machine::engine::EngineError;
use machine::{GuestMemory, PageSet};
use x86::exit::Injection;
use x86::paging::AccessKind;
use x86::regs::{Cr0, Cr4, Efer, rflags};
use x86::{
    CpuModel, CpuState, Exception, Exit, ExitControls, GuestPhysAddr, InterruptShadow,
    SegmentRegister, Vector,
};

/// What one call of [`Stepper::step`] came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// One instruction retired.
    Retired,
    /// One iteration of a REP instruction was made; RIP still stands at it.
    Within,
    /// An exception was delivered; nothing retired.
    Delivered(Vector),
    /// The instruction needs something first, or is intercepted; no state has changed. If [`Pending::incomplete`], give
    /// the answer to [`Pending::answer`] and step again; otherwise stepping again executes it. After
    /// [`Exit::TripleFault`] there is nothing to step.
    Exit(Exit),
    /// One instruction retired and exits: HLT, VMCALL, PAUSE.
    RetiredExit(Exit),
}

/// DR6.BS: the single-step trap.
const DR6_BS: u64 = 1 << 14;
/// Recently used code pages, direct-mapped by linear page.
const WINDOWS: usize = 64;

/// A linear page whose code page is known.
#[derive(Clone, Copy, Debug)]
struct Window {
    key: u64,
    epoch: u64,
    page: u32,
}

/// What translations depend on besides memory.
type Translating = (Cr0, u64, Cr4, Efer);

/// Executes guest instructions one at a time on a CPU state its caller holds.
///
/// Caches decoded instructions, native stubs and address translations. They follow every write made through this type, and
/// follow others by [`Self::memory_written`] or [`Self::native_code_ran`].
#[derive(Debug)]
pub struct Stepper {
    mem: Memory,
    code: Code,
    frame: Box<Frame>,
    rules: Rules,
    mode: Mode,
    windows: [Window; WINDOWS],
    translating: Option<Translating>,
    time: u64,
    past_intercept: bool,
    /// How many iterations of REP a step may make.
    allowed_iterations: u64,
    /// How many the last step made.
    iterations: u64,
}

impl Stepper {
    /// A stepper over `memory`, showing the guest `model`.
    pub fn new(memory: GuestMemory, model: CpuModel) -> Result<Self, EngineError> {
        let code = Code::new().map_err(|source| EngineError::Host {
            operation: "mapping memory for generated code",
            source,
        })?;
        let none = Window {
            key: u64::MAX,
            epoch: 0,
            page: 0,
        };
        Ok(Self {
            mem: Memory::new(memory),
            code,
            frame: Box::default(),
            rules: Rules {
                model,
                controls: ExitControls::default(),
            },
            mode: Mode::of(&CpuState::default()),
            windows: [none; WINDOWS],
            translating: None,
            time: 0,
            past_intercept: false,
            allowed_iterations: 1,
            iterations: 1,
        })
    }

    /// Which instructions and exceptions exit. Breakpoints and the monitor trap flag are the caller's business.
    pub fn set_controls(&mut self, controls: &ExitControls) {
        self.rules.controls = controls.clone();
    }

    /// Sets the number of instructions retired so far, which RDTSC reads.
    pub fn set_retired(&mut self, retired: u64) {
        self.time = retired;
    }

    /// Lets a step make up to this many iterations of a REP instruction; one at first, and never less.
    pub fn allow_iterations(&mut self, count: u64) {
        self.allowed_iterations = count.max(1);
    }

    /// How many iterations the last step made, if it was [`Step::Within`].
    pub fn iterations(&self) -> u64 {
        self.iterations
    }

    /// Executes one instruction, or one iteration of a REP instruction, or delivers `cpu.pending`.
    /// `pending` belongs to `cpu` and must be kept from call to call.
    pub fn step(&mut self, cpu: &mut CpuState, pending: &mut Pending) -> Result<Step, EngineError> {
        self.enter(cpu);
        self.advance(cpu, pending)
    }

    /// Delivers an exception at the present boundary, as a fault of the instruction at RIP (RF set in the pushed image).
    pub fn deliver(
        &mut self,
        cpu: &mut CpuState,
        exception: Exception,
    ) -> Result<Delivery, EngineError> {
        self.enter(cpu);
        self.raise(cpu, &mut Pending::new(), Event::Exception(exception))
    }

    /// Delivers an external interrupt or an NMI; wakes a halted CPU. The caller has checked [`CpuState::interruptible`].
    pub fn inject(
        &mut self,
        cpu: &mut CpuState,
        injection: Injection,
    ) -> Result<Delivery, EngineError> {
        self.enter(cpu);
        let event = match injection {
            Injection::ExternalInterrupt(vector) => Event::External(vector),
            Injection::Nmi => Event::Nmi,
        };
        self.raise(cpu, &mut Pending::new(), event)
    }

    /// Forgets all address translations. Needed when page tables were written behind this type's back; changes
    /// of CR0, CR3, CR4 and EFER between steps are noticed without it.
    pub fn flush_translations(&mut self) {
        self.mem.flush();
    }

    /// The monitor wrote guest memory.
    pub fn memory_written(&mut self, addr: GuestPhysAddr, len: usize) {
        self.mem.written_outside(addr, len);
        self.forget_written_code();
    }

    /// Guest code ran natively since the last step and may have written any page: flushes translations, and has cached code
    /// checked against memory before it is used again.
    pub fn native_code_ran(&mut self) {
        self.mem.flush();
        self.code.doubt();
        self.past_intercept = false;
    }

    /// Pages written by guest code through this type since the last call, and by the monitor through [`GuestMemory`].
    pub fn take_dirty(&mut self) -> PageSet {
        self.mem.take_dirty()
    }

    /// Prepares for a CPU state that may have been changed by others.
    pub(crate) fn enter(&mut self, cpu: &CpuState) {
        let now = (cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer);
        if self.translating != Some(now) {
            self.translating = Some(now);
            self.mem.flush();
        }
        self.mode = Mode::of(cpu);
        self.mem.user = self.mode.cpl == 3;
        self.mem.linear_mask = self.mode.linear_mask();
    }

    /// Whether an interception that was just reported is to be executed by the next step.
    pub(crate) fn is_past_intercept(&self) -> bool {
        self.past_intercept
    }

    /// The CPU was given another state after an interception was reported: the next step may report one again.
    pub fn forget_intercept(&mut self) {
        self.past_intercept = false;
    }

    /// [`Self::step`] on the state this type last worked on.
    #[inline]
    pub(crate) fn advance(
        &mut self,
        cpu: &mut CpuState,
        pending: &mut Pending,
    ) -> Result<Step, EngineError> {
        if let Some(exception) = cpu.pending {
            return self.deliver_pending(cpu, pending, exception);
        }
        pending.rewind();
        let slot = match self.fetch_quickly(cpu) {
            Some(slot) => slot,
            None => match self.fetch_slowly(cpu) {
                Ok(slot) => slot,
                Err(stop) => return self.stopped(cpu, pending, stop),
            },
        };
        let Some(op) = self.code.get(slot) else {
            return self.stopped(
                cpu,
                pending,
                Stop::Unimplemented("its decoded form is gone"),
            );
        };
        let rip = cpu.regs.rip;
        let mut next = rip.wrapping_add(u64::from(op.len));
        if !self.mode.long {
            if next.wrapping_sub(1) > self.mode.fetch_limit {
                return self.stopped(cpu, pending, gp(0));
            }
            next &= 0xffff_ffff;
        }
        let shadow = cpu.shadow;
        let single_step = cpu.regs.rflags & rflags::TF != 0;
        cpu.shadow = InterruptShadow::None;
        let mut guest = Guest {
            cpu,
            mem: &mut self.mem,
            mode: &mut self.mode,
            pending,
            rules: &self.rules,
            frame: &mut self.frame,
            time: self.time,
            next,
            no_trap: false,
            iterations: if single_step {
                1
            } else {
                self.allowed_iterations
            },
            past_intercept: self.past_intercept,
        };
        match guest.execute(op) {
            Ok(done) => {
                let (next, no_trap) = (guest.next, guest.no_trap);
                self.iterations = guest.iterations;
                if single_step && !no_trap && cpu.shadow != InterruptShadow::MovSs {
                    cpu.dr6 |= DR6_BS;
                    cpu.pending = Some(Exception::plain(Vector::DB));
                }
                if !self.mem.code_writes.is_empty() {
                    self.forget_written_code();
                }
                self.past_intercept = false;
                Ok(self.retire(cpu, pending, done, next))
            }
            Err(stop) => {
                cpu.shadow = shadow;
                self.stopped(cpu, pending, stop)
            }
        }
    }

    #[inline]
    fn retire(&mut self, cpu: &mut CpuState, pending: &mut Pending, done: Done, next: u64) -> Step {
        pending.clear();
        if done == Done::Within {
            cpu.regs.rflags |= rflags::RF;
            return Step::Within;
        }
        cpu.regs.rip = next;
        self.time = self.time.wrapping_add(1);
        if done != Done::RetiredWithRf {
            cpu.regs.rflags &= !rflags::RF;
        }
        match done {
            Done::Exit(exit) => Step::RetiredExit(exit),
            _ => Step::Retired,
        }
    }

    /// The linear address of RIP.
    #[inline]
    fn fetch_linear(&self, cpu: &CpuState) -> u64 {
        let rip = cpu.regs.rip;
        if self.mode.long {
            return rip;
        }
        cpu.segment(SegmentRegister::Cs).base.wrapping_add(rip) & 0xffff_ffff
    }

    /// The operation at RIP, if it is decoded and its page known.
    #[inline]
    fn fetch_quickly(&self, cpu: &CpuState) -> Option<Slot> {
        if cpu.regs.rip > self.mode.fetch_limit {
            return None;
        }
        let linear = self.fetch_linear(cpu);
        let page = linear >> 12;
        let window = &self.windows[page as usize % WINDOWS];
        if window.key != page ^ self.mode.fetch_key || window.epoch != self.mem.epoch {
            return None;
        }
        self.code.cached(window.page, (linear & 0xfff) as usize)
    }

    /// Finds the operation at RIP.
    #[cold]
    fn fetch_slowly(&mut self, cpu: &CpuState) -> Exec<Slot> {
        if cpu.regs.rip > self.mode.fetch_limit {
            return Err(gp(0));
        }
        let linear = self.fetch_linear(cpu);
        let addr = self.fetch_address(cpu, linear)?;
        let bits = self.mode.bits;
        let page = self.code.page(&mut self.mem, addr, bits);
        let number = linear >> 12;
        self.windows[number as usize % WINDOWS] = Window {
            key: number ^ self.mode.fetch_key,
            epoch: self.mem.epoch,
            page,
        };
        let offset = (linear & 0xfff) as usize;
        if let Some(slot) = self.code.cached(page, offset) {
            return Ok(slot);
        }
        if let Ok(slot) = self.code.decode(&mut self.mem, page, bits, offset) {
            return Ok(slot);
        }
        let mut bytes = [0; MAX_LEN];
        let here = (0x1000 - offset).min(MAX_LEN);
        self.mem.ram.read(addr, &mut bytes[..here]);
        let beyond = linear.wrapping_add(here as u64) & self.mem.linear_mask;
        let addr = self.fetch_address(cpu, beyond)?;
        self.mem.ram.read(addr, &mut bytes[here..]);
        self.code
            .decode_crossing(&bytes, bits)
            .ok_or(Stop::Unimplemented("it does not decode"))
    }

    fn fetch_address(&mut self, cpu: &CpuState, linear: u64) -> Exec<u64> {
        let user = self.mem.user;
        let addr = self.mem.translate(cpu, linear, AccessKind::Execute, user)?;
        if self.mem.ram.contains(addr & !0xfff, 0x1000) {
            Ok(addr)
        } else {
            Err(Stop::Unimplemented("a fetch from outside RAM"))
        }
    }

    /// The instruction did not finish.
    #[cold]
    fn stopped(
        &mut self,
        cpu: &mut CpuState,
        pending: &mut Pending,
        stop: Stop,
    ) -> Result<Step, EngineError> {
        if !self.mem.code_writes.is_empty() {
            self.forget_written_code();
        }
        match stop {
            Stop::Exit(exit) => {
                self.past_intercept = !pending.incomplete();
                Ok(Step::Exit(exit))
            }
            Stop::Fault(exception) => {
                pending.clear();
                self.fault(cpu, pending, exception)
            }
            Stop::Unimplemented(reason) => Err(self.unimplemented(cpu, reason)),
        }
    }

    fn deliver_pending(
        &mut self,
        cpu: &mut CpuState,
        pending: &mut Pending,
        exception: Exception,
    ) -> Result<Step, EngineError> {
        let step = self.fault(cpu, pending, exception)?;
        if !matches!(step, Step::Exit(Exit::ExceptionOrNmi(_))) {
            cpu.pending = None;
        }
        Ok(step)
    }

    /// Delivers an exception, or exits for it.
    fn fault(
        &mut self,
        cpu: &mut CpuState,
        pending: &mut Pending,
        exception: Exception,
    ) -> Result<Step, EngineError> {
        let bit = 1 << (exception.vector.0 & 31);
        if self.rules.controls.exception_bitmap & bit != 0 && !self.past_intercept {
            self.past_intercept = true;
            return Ok(Step::Exit(Exit::ExceptionOrNmi(exception)));
        }
        Ok(
            match self.raise(cpu, pending, Event::Exception(exception))? {
                Delivery::Delivered(vector) => Step::Delivered(vector),
                Delivery::TripleFault => Step::Exit(Exit::TripleFault),
            },
        )
    }

    fn raise(
        &mut self,
        cpu: &mut CpuState,
        pending: &mut Pending,
        event: Event,
    ) -> Result<Delivery, EngineError> {
        self.past_intercept = false;
        pending.clear();
        let back = cpu.regs.rip;
        let mut guest = Guest {
            cpu,
            mem: &mut self.mem,
            mode: &mut self.mode,
            pending,
            rules: &self.rules,
            frame: &mut self.frame,
            time: self.time,
            next: back,
            no_trap: false,
            iterations: 1,
            past_intercept: false,
        };
        let raised = guest.raise(event, back);
        pending.clear();
        if !self.mem.code_writes.is_empty() {
            self.forget_written_code();
        }
        raised.map_err(|stop| {
            self.unimplemented(
                cpu,
                match stop {
                    Stop::Unimplemented(reason) => reason,
                    _ => "event delivery stopped",
                },
            )
        })
    }

    fn forget_written_code(&mut self) {
        while let Some((addr, len)) = self.mem.code_writes.pop() {
            self.code.written(&mut self.mem, addr, u64::from(len));
        }
    }

    #[cold]
    fn unimplemented(&mut self, cpu: &CpuState, reason: &str) -> EngineError {
        let mut bytes = Vec::new();
        let linear = cpu.rip_linear().get();
        for n in 0..MAX_LEN as u64 {
            let at = linear.wrapping_add(n) & self.mem.linear_mask;
            let user = self.mem.user;
            match self.mem.translate(cpu, at, AccessKind::Execute, user) {
                Ok(addr) if self.mem.ram.contains(addr, 1) => bytes.push(self.mem.ram.load(addr)),
                _ => break,
            }
        }
        EngineError::Unimplemented {
            rip: cpu.regs.rip,
            bytes,
            reason: reason.to_owned(),
        }
    }
}
