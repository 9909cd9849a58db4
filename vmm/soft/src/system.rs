//! System instructions: control and debug registers, descriptor-table registers, CPUID, RDTSC, TLB and cache control.
//!
//! Invariants: privilege is checked before operands are read. Whatever changes translation empties the TLB.
//! RDTSC, which the CPU model does not offer but hardware would execute, reads the count of retired instructions.
//! Debug registers hold what is written but break nothing.
//! Elsewhere: MSRs ([`crate::msr`]), segment and task registers ([`crate::segments`]).
//! Source: Intel SDM vol. 2 (each instruction); vol. 3A, 2.5 (control registers), 4.1.2 (mode switches), 17.2 (debug registers).

use crate::guest::{Guest, truncate};
use crate::op::Op;
use crate::segmentation::is_canonical;
use crate::stop::{Exec, Stop, gp, plain, ud};
use iced_x86::{Mnemonic, OpKind};
use x86::paging::PHYS_ADDR_BITS;
use x86::regs::{Cr0, Cr4, Efer, rflags};
use x86::{DescriptorTable, Exit, Gpr, GuestPhysAddr, GuestVirtAddr, SegmentRegister, Vector};

/// The CR4 bits of the features the CPU model reports.
const CR4_KNOWN: Cr4 = Cr4::VME
    .union(Cr4::PVI)
    .union(Cr4::TSD)
    .union(Cr4::DE)
    .union(Cr4::PSE)
    .union(Cr4::PAE)
    .union(Cr4::MCE)
    .union(Cr4::PGE)
    .union(Cr4::PCE)
    .union(Cr4::OSFXSR)
    .union(Cr4::OSXMMEXCPT);
/// DR6 and DR7 bits that read as one.
const DR6_FIXED: u64 = 0xffff_0ff0;
const DR7_FIXED: u64 = 0x400;
/// DR6.BD, DR7.GD.
const DR6_BD: u64 = 1 << 13;
const DR7_GD: u64 = 1 << 13;

impl Guest<'_> {
    /// #GP(0) above CPL 0.
    pub(crate) fn require_cpl0(&self) -> Exec {
        if self.mode.cpl == 0 {
            Ok(())
        } else {
            Err(gp(0))
        }
    }

    /// Exits before the instruction, unless that exit was taken at this boundary already.
    pub(crate) fn intercept(&self, on: bool, exit: Exit) -> Exec {
        if on && !self.past_intercept {
            Err(Stop::Exit(exit))
        } else {
            Ok(())
        }
    }

    fn register_size(&self) -> usize {
        if self.mode.long { 8 } else { 4 }
    }

    /// MOV from a control register.
    pub(crate) fn mov_from_control(&mut self, op: &Op) -> Exec {
        self.require_cpl0()?;
        let value = match op.instruction.op1_register().number() {
            0 => self.cpu.cr0.bits(),
            2 => self.cpu.cr2,
            3 => self.cpu.cr3,
            4 => self.cpu.cr4.bits(),
            8 => u64::from(self.cpu.cr8),
            _ => return Err(ud()),
        };
        let number = op.instruction.op0_register().number() as u8;
        self.set_gpr(number, self.register_size(), value);
        Ok(())
    }

    /// MOV to a control register.
    pub(crate) fn mov_to_control(&mut self, op: &Op) -> Exec {
        self.require_cpl0()?;
        let number = op.instruction.op1_register().number() as u8;
        let value = truncate(self.gpr(number), self.register_size());
        match op.instruction.op0_register().number() {
            0 => self.write_cr0(value),
            2 => {
                self.cpu.cr2 = value;
                Ok(())
            }
            3 => {
                let exit = Exit::CrAccess {
                    register: 3,
                    write: true,
                    value,
                };
                self.intercept(self.rules.controls.cr3_load_exiting, exit)?;
                self.write_cr3(value)
            }
            4 => self.write_cr4(value),
            8 if value < 16 => {
                self.cpu.cr8 = value as u8;
                Ok(())
            }
            8 => Err(gp(0)),
            _ => Err(ud()),
        }
    }

    fn write_cr0(&mut self, value: u64) -> Exec {
        let new = Cr0::from_bits_truncate(value) | Cr0::ET;
        let old = self.cpu.cr0;
        let paging = new.contains(Cr0::PG);
        if value >> 32 != 0
            || paging && !new.contains(Cr0::PE)
            || new.contains(Cr0::NW) && !new.contains(Cr0::CD)
        {
            return Err(gp(0));
        }
        let long_code = self.cpu.segment(SegmentRegister::Cs).attributes.long();
        if paging && !old.contains(Cr0::PG) {
            if self.cpu.efer.contains(Efer::LME) {
                if !self.cpu.cr4.contains(Cr4::PAE) || long_code {
                    return Err(gp(0));
                }
                self.cpu.efer.insert(Efer::LMA);
            } else if self.cpu.cr4.contains(Cr4::PAE) {
                self.check_pointers(self.cpu.cr3)?;
            }
        }
        if !paging && old.contains(Cr0::PG) {
            if self.mode.long || self.cpu.cr4.contains(Cr4::PCIDE) {
                return Err(gp(0));
            }
            self.cpu.efer.remove(Efer::LMA);
        }
        self.cpu.cr0 = new;
        self.mem.flush();
        self.mode_changed();
        Ok(())
    }

    fn write_cr3(&mut self, value: u64) -> Exec {
        if self.mode.lma {
            if value >> PHYS_ADDR_BITS != 0 {
                return Err(gp(0));
            }
        } else if self.cpu.cr0.contains(Cr0::PG) && self.cpu.cr4.contains(Cr4::PAE) {
            self.check_pointers(value)?;
        }
        self.cpu.cr3 = value;
        self.mem.flush();
        Ok(())
    }

    /// #GP(0) if a present PAE page-directory pointer has reserved bits set (SDM vol. 3A, 4.4.1).
    fn check_pointers(&mut self, cr3: u64) -> Exec {
        use x86::paging::TableMemory;
        let table = cr3 & 0xffff_ffe0;
        let reserved = 0x1e6 | !((1 << PHYS_ADDR_BITS) - 1);
        for n in 0..4 {
            let at = GuestPhysAddr::new(table + 8 * n);
            let entry = self.mem.ram.memory().read_u64(at).unwrap_or(0);
            if entry & 1 != 0 && entry & reserved != 0 {
                return Err(gp(0));
            }
        }
        Ok(())
    }

    fn write_cr4(&mut self, value: u64) -> Exec {
        let new = Cr4::from_bits_retain(value);
        if !CR4_KNOWN.contains(new) || self.mode.lma && !new.contains(Cr4::PAE) {
            return Err(gp(0));
        }
        let walks_pointers = Cr4::PAE | Cr4::PSE | Cr4::PGE;
        let pae = new.contains(Cr4::PAE) && self.cpu.cr0.contains(Cr0::PG) && !self.mode.lma;
        if pae && (new ^ self.cpu.cr4).intersects(walks_pointers) {
            self.check_pointers(self.cpu.cr3)?;
        }
        self.cpu.cr4 = new;
        self.mem.flush();
        Ok(())
    }

    /// MOV to and from debug registers.
    pub(crate) fn mov_debug(&mut self, op: &Op) -> Exec {
        self.require_cpl0()?;
        let to_debug = op.instruction.op0_register().is_dr();
        let (debug, general) = if to_debug {
            (op.instruction.op0_register(), op.instruction.op1_register())
        } else {
            (op.instruction.op1_register(), op.instruction.op0_register())
        };
        let number = match debug.number() {
            n @ (4 | 5) if !self.cpu.cr4.contains(Cr4::DE) => n + 2,
            n @ (0..=3 | 6 | 7) => n,
            _ => return Err(ud()),
        };
        if self.cpu.dr7 & DR7_GD != 0 {
            self.cpu.dr7 &= !DR7_GD;
            self.cpu.dr6 |= DR6_BD;
            return Err(plain(Vector::DB));
        }
        let general = general.number() as u8;
        if !to_debug {
            let value = match number {
                6 => self.cpu.dr6,
                7 => self.cpu.dr7,
                n => self.cpu.dr.get(n).copied().unwrap_or(0),
            };
            self.set_gpr(general, self.register_size(), value);
            return Ok(());
        }
        let value = truncate(self.gpr(general), self.register_size());
        match number {
            6 | 7 if value >> 32 != 0 => return Err(gp(0)),
            6 => self.cpu.dr6 = value & 0xe00f | DR6_FIXED,
            7 => self.cpu.dr7 = value & 0xffff_23ff | DR7_FIXED,
            n => {
                if let Some(register) = self.cpu.dr.get_mut(n) {
                    *register = value;
                }
            }
        }
        Ok(())
    }

    /// LGDT and LIDT.
    pub(crate) fn load_table(&mut self, op: &Op) -> Exec {
        self.require_cpl0()?;
        let limit = self.read_memory(op, 0, 2)? as u16;
        let size = if self.mode.long { 8 } else { 4 };
        let mut base = self.read_memory(op, 2, size)?;
        if is_24_bit_base(op) {
            base &= 0xff_ffff;
        }
        if self.mode.long && !is_canonical(base) {
            return Err(gp(0));
        }
        let table = DescriptorTable { base, limit };
        match op.instruction.mnemonic() {
            Mnemonic::Lgdt => self.cpu.gdtr = table,
            _ => self.cpu.idtr = table,
        }
        Ok(())
    }

    /// SGDT and SIDT.
    pub(crate) fn store_table(&mut self, op: &Op) -> Exec {
        let table = match op.instruction.mnemonic() {
            Mnemonic::Sgdt => self.cpu.gdtr,
            _ => self.cpu.idtr,
        };
        let size = if self.mode.long { 8 } else { 4 };
        self.write_memory(op, 0, 2, u64::from(table.limit))?;
        self.write_memory(op, 2, size, table.base)
    }

    /// SLDT, STR and SMSW: a selector, or CR0.
    pub(crate) fn store_word(&mut self, op: &Op) -> Exec {
        let value = match op.instruction.mnemonic() {
            Mnemonic::Smsw => self.cpu.cr0.bits(),
            _ if !self.mode.protected => return Err(ud()),
            Mnemonic::Sldt => u64::from(self.cpu.ldtr.selector),
            _ => u64::from(self.cpu.tr.selector),
        };
        let size = match op.instruction.op0_kind() {
            OpKind::Register => op.instruction.op0_register().size(),
            _ => 2,
        };
        self.set_operand(op, 0, size, value)
    }

    /// LMSW.
    pub(crate) fn lmsw(&mut self, op: &Op) -> Exec {
        self.require_cpl0()?;
        let value = self.operand(op, 0, 2)? & 0xf;
        let old = self.cpu.cr0.bits();
        // PE can be set this way, but not cleared.
        self.write_cr0(old & !0xe | value)
    }

    /// CLTS.
    pub(crate) fn clts(&mut self) -> Exec {
        self.require_cpl0()?;
        self.cpu.cr0.remove(Cr0::TS);
        Ok(())
    }

    /// INVLPG.
    pub(crate) fn invlpg(&mut self, op: &Op) -> Exec {
        self.require_cpl0()?;
        let offset = self.offset(op);
        let base = match self.cpu.segments.get(usize::from(op.address.segment)) {
            Some(segment) if !self.mode.long || op.address.segment >= 4 => segment.base,
            _ => 0,
        };
        let linear = base.wrapping_add(offset) & self.mem.linear_mask;
        self.intercept(
            self.rules.controls.invlpg_exiting,
            Exit::Invlpg(GuestVirtAddr::new(linear)),
        )?;
        self.mem.flush();
        Ok(())
    }

    /// CPUID.
    pub(crate) fn cpuid(&mut self) -> Exec {
        let leaf = self.rax() as u32;
        let subleaf = self.cpu.regs[Gpr::Rcx] as u32;
        self.intercept(
            self.rules.controls.cpuid_exiting,
            Exit::Cpuid { leaf, subleaf },
        )?;
        let result = self.rules.model.cpuid(leaf, subleaf);
        self.cpu.regs[Gpr::Rax] = u64::from(result.eax);
        self.cpu.regs[Gpr::Rbx] = u64::from(result.ebx);
        self.cpu.regs[Gpr::Rcx] = u64::from(result.ecx);
        self.cpu.regs[Gpr::Rdx] = u64::from(result.edx);
        Ok(())
    }

    /// RDTSC.
    pub(crate) fn rdtsc(&mut self) -> Exec {
        if self.cpu.cr4.contains(Cr4::TSD) {
            self.require_cpl0()?;
        }
        self.intercept(self.rules.controls.rdtsc_exiting, Exit::Rdtsc)?;
        self.cpu.regs[Gpr::Rax] = self.time & 0xffff_ffff;
        self.cpu.regs[Gpr::Rdx] = self.time >> 32;
        Ok(())
    }

    /// CLI and STI.
    pub(crate) fn interrupt_flag(&mut self, on: bool) -> Exec {
        if !self.mode.io_allowed(self.cpu.regs.rflags) {
            return Err(gp(0));
        }
        if on && !self.flag(rflags::IF) {
            self.cpu.shadow = x86::InterruptShadow::Sti;
        }
        self.set_flags(rflags::IF, on);
        Ok(())
    }
}

/// LGDT and LIDT with a 16-bit operand load 24 bits of the base.
fn is_24_bit_base(op: &Op) -> bool {
    use iced_x86::Code;
    matches!(
        op.instruction.code(),
        Code::Lgdt_m1632_16 | Code::Lidt_m1632_16
    )
}
