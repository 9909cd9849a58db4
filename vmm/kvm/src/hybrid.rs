//! Hybrid execution: what the single-instruction path executes in KVM's place.
//!
//! Purpose: decide at a boundary whether KVM or [`soft::Stepper`] executes next, make one step, and turn exceptions that a KVM could
//! not deliver into steps.
//! Invariants: on a KVM without quirks, with no control in force, the decision costs one comparison. Whatever a step does is exact, so
//! choosing it where KVM would have done costs speed only. Each pass through here executes an
//! instruction, delivers an event or exits: there is always progress.
//!
//! Why a guest's exceptions can reach us at all: where KVM mishandles ring 3 ([`crate::quirks::Quirks::hides_idt`]), it holds an IDT of
//! limit 0. Delivery of any exception then fails, KVM exits with KVM_EXIT_SHUTDOWN, and the state is that of the
//! instruction that raised it; the single-instruction path executes it again and delivers the exception through the guest's own IDT.
//!
//! There too, KVM's LSTAR leads nowhere: SYSCALL ends in such an exit, and is executed again in the same way.
//!
//! Elsewhere: executing and delivering (`soft`); finding instructions that must not run in KVM ([`crate::sensitive`]).
//! Source: Intel SDM vol. 3A, 6.15 (exceptions); vol. 2 (SYSCALL).

use crate::engine::{Core, Cpl0Policy, HARDWARE_BREAKPOINTS, KvmEngine, Owed};
use crate::state;
use crate::vcpu::NOWHERE;
use machine::engine::EngineError;
use soft::Step;
use x86::paging::PageFaultCode;
use x86::regs::{Cr0, Cr4, Efer, rflags};
use x86::{
    Activity, CpuMode, Exception, Exit, Gpr, GuestVirtAddr, PageFrame, SegmentRegister, Vector,
};

const SYSCALL: [u8; 2] = [0x0f, 0x05];
const INT3: u8 = 0xcc;
const INT1: u8 = 0xf1;
/// DR6.BS: a single step.
const DR6_SINGLE_STEP: u64 = 1 << 14;

impl KvmEngine {
    /// Whether the next instruction is for the single-instruction path.
    pub(crate) fn steps_next(&mut self, window: bool) -> bool {
        if self.must_step || (self.core != Core::InKvm && self.cpu.pending.is_some()) {
            return true;
        }
        let watched = self.controls.monitor_trap_flag || !self.controls.breakpoints.is_empty();
        if !watched && self.policy == Cpl0Policy::Kvm && self.quirks == Default::default() {
            return false;
        }
        self.fetch_core();
        self.controls.monitor_trap_flag
            || self.breakpoints_need_steps()
            || (window && self.quirks.windows_unreliable)
            || (self.policy == Cpl0Policy::Soft && self.cpu.cpl() == 0)
            || self.quirks_need_steps()
    }

    fn breakpoints_need_steps(&self) -> bool {
        let at = &self.controls.breakpoints;
        !at.is_empty()
            && (at.len() > HARDWARE_BREAKPOINTS
                || at.contains(&self.cpu.rip_linear())
                || (self.quirks.ring3_breakpoints_broken && self.cpu.cpl() == 3))
    }

    fn quirks_need_steps(&self) -> bool {
        let quirks = &self.quirks;
        let cpu = &self.cpu;
        let paging = cpu.cr0.contains(Cr0::PG);
        cpu.pending.is_some()
            || (quirks.legacy_paging_broken && paging && !cpu.efer.contains(Efer::LMA))
            || (quirks.hides_idt() && cpu.regs.rflags & rflags::TF != 0)
            || (cpu.cpl() == 3 && self.ring3_needs_steps())
            || (self.slots.any_out() && self.touches_page_taken_out())
    }

    fn ring3_needs_steps(&self) -> bool {
        let cpu = &self.cpu;
        let selector = |which| cpu.segment(which).selector;
        let foreign = self.quirks.ring3_selectors.is_some_and(|native| {
            cpu.mode() != CpuMode::Long64
                || native != (selector(SegmentRegister::Cs), selector(SegmentRegister::Ss))
        });
        let fpu_traps = cpu.cr0.intersects(Cr0::TS | Cr0::EM) || !cpu.cr4.contains(Cr4::OSFXSR);
        foreign || (self.quirks.fpu_traps_ignored && fpu_traps)
    }

    /// KVM cannot fetch from a page that was taken out, and may get lost when it finds descriptors there.
    fn touches_page_taken_out(&self) -> bool {
        let cpu = &self.cpu;
        let gdt = GuestVirtAddr::new(cpu.gdtr.base);
        let used = [
            cpu.rip_linear(),
            gdt,
            gdt.wrapping_add(u64::from(cpu.gdtr.limit)),
            GuestVirtAddr::new(cpu.tr.base),
        ];
        used.into_iter()
            .filter_map(|addr| self.physical(addr))
            .any(|addr| self.slots.is_out(PageFrame::containing(addr)))
    }

    /// Executes one instruction or REP iteration, or delivers a pending exception. `Some`: it exits.
    pub(crate) fn step(&mut self) -> Result<Option<Exit>, EngineError> {
        self.fetch()?;
        if self.owed == Owed::Nothing
            && let Some(exit) = self.breakpoint_here()
        {
            return Ok(Some(exit));
        }
        self.before_step();
        self.stepped = true;
        self.work.steps += 1;
        self.must_step = false;
        let after_kick = std::mem::take(&mut self.after_kick);
        let step = match self.stepper.step(&mut self.cpu, &mut self.pending) {
            // KVM can execute what the stepper cannot; the kick is reported where it came.
            Err(EngineError::Unimplemented { .. }) if after_kick => return Ok(None),
            step => step?,
        };
        self.core = Core::Changed;
        self.owed = if self.pending.incomplete() {
            Owed::Soft
        } else {
            Owed::Nothing
        };
        Ok(match step {
            Step::Retired | Step::Within | Step::Delivered(_) => self
                .controls
                .monitor_trap_flag
                .then_some(Exit::MonitorTrapFlag),
            Step::Exit(exit) | Step::RetiredExit(exit) => {
                if exit == Exit::TripleFault {
                    self.cpu.activity = Activity::Shutdown;
                }
                Some(exit)
            }
        })
    }

    /// The breakpoint at RIP, unless it is the one the guest is just being resumed from.
    fn breakpoint_here(&mut self) -> Option<Exit> {
        let here = self.cpu.rip_linear();
        let resumed = self.resume_at.take() == Some(here);
        if resumed || self.controls.monitor_trap_flag || !self.controls.breakpoints.contains(&here)
        {
            return None;
        }
        self.resume_at = Some(here);
        Some(Exit::Breakpoint(here))
    }

    /// KVM could not deliver an exception: puts the state back before the instruction that raised it, which is then
    /// executed by the single-instruction path.
    pub(crate) fn recover(&mut self) -> Result<(), EngineError> {
        self.fetch()?;
        let raised = state::exception(&self.vcpu.events(), self.cpu.cr2);
        self.core = Core::Changed;
        self.must_step = true;
        self.cpu.pending = None;
        self.cpu.regs.rflags &= !rflags::RF;
        match raised.vector {
            Vector::PF => {
                self.undo_syscall(&raised);
                self.cpu.cr2 = self.entry_cr2;
            }
            Vector::BP => self.undo_int3(),
            Vector::DB => self.keep_debug_trap(),
            _ => {}
        }
        Ok(())
    }

    /// A SYSCALL ends in a fetch fault at [`NOWHERE`].
    fn undo_syscall(&mut self, fault: &Exception) {
        let fetch = fault
            .error_code
            .is_some_and(|code| code & PageFaultCode::I.bits() != 0);
        let there = self.cpu.regs.rip == NOWHERE && self.cpu.cr2 == NOWHERE;
        if fetch && there {
            self.leave_nowhere();
        }
    }

    /// Back to the SYSCALL that led to [`NOWHERE`], so that it is executed again.
    pub(crate) fn leave_nowhere(&mut self) {
        if !self.quirks.syscall_broken || self.cpu.regs.rip != NOWHERE {
            return;
        }
        let before = self.cpu.regs[Gpr::Rcx].wrapping_sub(SYSCALL.len() as u64);
        if self.bytes_at(GuestVirtAddr::new(before)) == SYSCALL {
            self.cpu.regs.rip = before;
            self.cpu.regs.rflags = self.cpu.regs[Gpr::R11] | rflags::FIXED;
        }
    }

    /// INT3 is a trap: RIP is behind it.
    fn undo_int3(&mut self) {
        let before = self.cpu.regs.rip.wrapping_sub(1);
        let linear = self.cpu.rip_linear().wrapping_add(u64::MAX);
        if self.bytes_at(linear) == [INT3] {
            self.cpu.regs.rip = before;
        }
    }

    /// A debug exception is a trap here (single step), or an INT1, whose RIP KVM leaves at it.
    fn keep_debug_trap(&mut self) {
        let stepping = self.cpu.regs.rflags & rflags::TF != 0;
        if stepping || self.bytes_at(self.cpu.rip_linear()) != [INT1] {
            self.cpu.dr6 |= DR6_SINGLE_STEP;
            self.cpu.pending = Some(Exception::plain(Vector::DB));
        }
    }
}
