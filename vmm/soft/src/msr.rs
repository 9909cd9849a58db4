//! RDMSR and WRMSR.
//!
//! Purpose: the MSRs that are part of the CPU's state; all others exit, and whoever runs the engine answers or refuses.
//! Invariants: a value the processor would not take is #GP(0) and changes nothing.
//! Elsewhere: the list ([`x86::msr`]).
//! Source: Intel SDM vol. 2 (RDMSR, WRMSR); vol. 4, 2.1; vol. 3A, 11.12.2 (PAT).

use crate::guest::Guest;
use crate::segmentation::is_canonical;
use crate::stop::{Exec, gp};
use machine::engine::Answer;
use x86::msr::index;
use x86::regs::{Cr0, Efer};
use x86::{Exit, Gpr, SegmentRegister};

impl Guest<'_> {
    /// RDMSR.
    pub(crate) fn rdmsr(&mut self) -> Exec {
        self.require_cpl0()?;
        let msr = self.cpu.regs[Gpr::Rcx] as u32;
        let value = match msr {
            index::IA32_EFER => self.cpu.efer.bits(),
            index::IA32_FS_BASE => self.cpu.segment(SegmentRegister::Fs).base,
            index::IA32_GS_BASE => self.cpu.segment(SegmentRegister::Gs).base,
            index::IA32_APIC_BASE => self.cpu.apic_base,
            _ => match self.cpu.msrs.field_mut(msr) {
                Some(field) => *field,
                None => match self.pending.ask(Exit::Rdmsr { msr })? {
                    Answer::MsrValue(value) | Answer::Data(value) => value,
                    _ => return Err(gp(0)),
                },
            },
        };
        self.cpu.regs[Gpr::Rax] = value & 0xffff_ffff;
        self.cpu.regs[Gpr::Rdx] = value >> 32;
        Ok(())
    }

    /// WRMSR.
    pub(crate) fn wrmsr(&mut self) -> Exec {
        self.require_cpl0()?;
        let msr = self.cpu.regs[Gpr::Rcx] as u32;
        let low = self.rax() & 0xffff_ffff;
        let value = low | self.cpu.regs[Gpr::Rdx] << 32;
        match msr {
            index::IA32_EFER => return self.write_efer(value),
            index::IA32_FS_BASE | index::IA32_GS_BASE => {
                require(is_canonical(value))?;
                let which = match msr {
                    index::IA32_FS_BASE => SegmentRegister::Fs,
                    _ => SegmentRegister::Gs,
                };
                self.cpu.segment_mut(which).base = value;
                return Ok(());
            }
            index::IA32_APIC_BASE => {
                self.cpu.apic_base = value;
                return Ok(());
            }
            index::IA32_LSTAR
            | index::IA32_CSTAR
            | index::IA32_KERNEL_GS_BASE
            | index::IA32_SYSENTER_ESP
            | index::IA32_SYSENTER_EIP => require(is_canonical(value))?,
            index::IA32_PAT => {
                let types = value.to_le_bytes();
                require(types.iter().all(|kind| matches!(kind, 0 | 1 | 4..=7)))?;
            }
            _ => {}
        }
        match self.cpu.msrs.field_mut(msr) {
            Some(field) => *field = value,
            None => match self.pending.ask(Exit::Wrmsr { msr, value })? {
                Answer::MsrAccepted => {}
                _ => return Err(gp(0)),
            },
        }
        Ok(())
    }

    fn write_efer(&mut self, value: u64) -> Exec {
        let known = Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE;
        let wanted = Efer::from_bits_retain(value);
        require(known.contains(wanted))?;
        let old = self.cpu.efer;
        let switches = (old ^ wanted).contains(Efer::LME);
        require(!(switches && self.cpu.cr0.contains(Cr0::PG)))?;
        self.cpu.efer = wanted & !Efer::LMA | old & Efer::LMA;
        self.mem.flush();
        self.mode_changed();
        Ok(())
    }
}

fn require(holds: bool) -> Exec {
    if holds { Ok(()) } else { Err(gp(0)) }
}
