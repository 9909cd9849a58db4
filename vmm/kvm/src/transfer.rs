//! Moving the state between KVM and the engine, and keeping both's view of memory whole.
//!
//! Purpose: bring registers here when somebody needs them, give KVM what changed before it runs, and see to it that KVM and the
//! single-instruction path notice what the other wrote to memory.
//! Invariants: [`Core`] and [`KvmEngine::extra_here`] say where the state is; they are changed here and where a step or an answer
//! changes registers. What changed here reaches KVM before it runs next. Page tables and code that were written by one side are
//! never used stale by the other.
//! Elsewhere: the ioctls ([`crate::vcpu`]), the slots ([`crate::slots`]), shadow page tables ([`crate::shadow`]).
//! Source: KVM API, section 6.6 (`KVM_CAP_SYNC_REGS`); Intel SDM vol. 3A, 4.10 (translations are cached until they are invalidated).

use crate::engine::{Core, KvmEngine, Owed};
use machine::PageSet;
use machine::engine::EngineError;
use x86::regs::{Cr0, Cr4};
use x86::{Activity, PageFrame};

impl KvmEngine {
    /// Brings registers, system registers and events here.
    pub(crate) fn fetch_core(&mut self) {
        if self.core != Core::InKvm {
            return;
        }
        self.vcpu.core(&mut self.cpu);
        if self.hidden_idtr == Some(self.cpu.idtr) {
            self.cpu.idtr = self.guest_idtr;
        }
        self.core = Core::Same;
    }

    /// Brings the whole state here.
    pub(crate) fn fetch(&mut self) -> Result<(), EngineError> {
        self.fetch_core();
        if !self.extra_here {
            self.vcpu.read_extra(&mut self.cpu)?;
            self.extra_here = true;
        }
        Ok(())
    }

    /// Gives KVM what changed here, right before it runs.
    pub(crate) fn load(&mut self) -> Result<(), EngineError> {
        if self.wrote {
            self.catch_up()?;
        }
        if self.stepped {
            self.flush_translations()?;
        }
        if self.core == Core::Changed {
            self.put_core();
        }
        if self.extra_here {
            self.vcpu.put_extra(&self.cpu)?;
        }
        if self.quirks.hides_idt() {
            self.entry_cr2 = match self.core {
                Core::InKvm => self.vcpu.sregs().cr2,
                Core::Same | Core::Changed => self.cpu.cr2,
            };
        }
        self.cpu.activity = Activity::Active;
        Ok(())
    }

    fn put_core(&mut self) {
        let mut idtr = self.cpu.idtr;
        if self.quirks.hides_idt() {
            self.guest_idtr = idtr;
            idtr.limit = 0;
            self.hidden_idtr = Some(idtr);
        }
        self.vcpu.put_core(&self.cpu, &idtr);
        self.core = Core::Same;
    }

    /// What the single-instruction path and the monitor wrote since KVM ran: KVM has to see changed page tables, and
    /// changed code is looked at again.
    fn catch_up(&mut self) -> Result<(), EngineError> {
        self.wrote = false;
        let written = self.stepper.take_dirty();
        self.note_written(&written);
        self.scan()?;
        if !self.quirks.shadows_stale {
            return Ok(());
        }
        self.unseen.extend(written);
        self.fetch_core();
        // Ring 0 does not run on shadows there, and every way from it to ring 3 comes by here.
        let later = self.sensitive.returns && self.cpu.cpl() != 3;
        if later || self.unseen.is_empty() {
            self.wrote = !self.unseen.is_empty();
            return Ok(());
        }
        let unseen = std::mem::take(&mut self.unseen);
        if self.tables.changed(&self.cpu, &self.memory, &unseen) {
            self.slots.drop_shadows(&self.vm)?;
        }
        Ok(())
    }

    /// Makes the processor drop its translations: the single-instruction path may have executed INVLPG.
    fn flush_translations(&mut self) -> Result<(), EngineError> {
        self.stepped = false;
        let paging = self.cpu.cr0.contains(Cr0::PG);
        if self.quirks.kernel_emulated || self.core == Core::InKvm || !paging {
            return Ok(());
        }
        let mut toggled = self.cpu.clone();
        toggled.cr4 ^= Cr4::PGE;
        let idtr = toggled.idtr;
        self.vcpu.put_core(&toggled, &idtr);
        self.vcpu.finish()?;
        self.core = Core::Changed;
        Ok(())
    }

    pub(crate) fn note_written(&mut self, pages: &PageSet) {
        if self.sensitive.any() {
            self.unscanned.extend(pages);
        }
        self.dirty.extend(pages);
    }

    /// Takes pages out of the slots, or puts them back, according to what they hold now.
    pub(crate) fn scan(&mut self) -> Result<(), EngineError> {
        for page in std::mem::take(&mut self.unscanned) {
            // An instruction may start at the end of the page before.
            let before = page.number().checked_sub(1).map(PageFrame::new);
            for page in before.into_iter().chain([page]) {
                if self.sensitive.is_in(&self.memory, page) {
                    self.slots.take_out(&self.vm, page)?;
                } else {
                    self.slots.put_back(&self.vm, page)?;
                }
            }
        }
        Ok(())
    }

    pub(crate) fn kvm_has_run(&mut self) {
        self.core = Core::InKvm;
        self.extra_here = false;
        self.kvm_ran = true;
        self.owed = Owed::Nothing;
        self.work.entries += 1;
    }

    /// To be called before the stepper looks at memory.
    pub(crate) fn before_step(&mut self) {
        if self.kvm_ran {
            self.stepper.native_code_ran();
            self.kvm_ran = false;
        }
        self.wrote = true;
    }
}
