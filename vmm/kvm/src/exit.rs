//! KVM's exits into [`Exit`]s, and answers back.
//!
//! Purpose: for each way KVM_RUN can end: the exit the contract names, or the engine's own handling of it.
//! Invariants: a port or MMIO access leaves here as single accesses of 1, 2, 4 or 8 bytes, in program order, as the
//! single-instruction path makes them. An access to RAM that has been taken out of the slots never leaves here.
//! Elsewhere: reading `kvm_run` ([`crate::vcpu`]); what happens to exceptions KVM could not deliver ([`crate::hybrid`]).
//! Source: KVM API, section 5; Intel SDM vol. 2 (INS, OUTS, REP).

use crate::engine::{Core, Fragments, KvmEngine, Owed, data};
use crate::vcpu::KvmExit;
use machine::engine::{Answer, EngineError};
use x86::exit::AccessData;
use x86::msr::index;
use x86::paging::{self, PagingContext};
use x86::{
    Activity, CpuMode, Exit, Gpr, GuestPhysAddr, GuestVirtAddr, PAGE_SIZE, PageFrame,
    SegmentRegister,
};

/// After this many KVM exits, pages that the guest wrote are looked at for sensitive instructions.
const SCAN_PERIOD: u64 = 64;

/// An instruction is at most this long (SDM vol. 2A, 2.3.11).
const MAX_INSTRUCTION: usize = 15;

impl KvmEngine {
    /// What KVM's exit means. `None`: it has been dealt with.
    pub(crate) fn translate(&mut self, raw: KvmExit) -> Result<Option<Exit>, EngineError> {
        self.scan_now_and_then()?;
        match raw {
            KvmExit::Io {
                count: 2..,
                write: false,
                ..
            } => self.undo_string_in().map(|()| None),
            KvmExit::Io {
                port,
                size,
                write,
                data,
                ..
            } => Ok(Some(self.port(port, size, write, data))),
            KvmExit::Mmio {
                addr,
                len,
                write,
                data,
            } => self.mmio(addr, len, write, data),
            KvmExit::Rdmsr {
                msr: index::IA32_LSTAR,
            } if self.quirks.syscall_broken => {
                self.vcpu.answer_msr(Some(self.cpu.msrs.lstar));
                self.owed = Owed::Answered;
                Ok(None)
            }
            KvmExit::Wrmsr {
                msr: index::IA32_LSTAR,
                value,
            } if self.quirks.syscall_broken => {
                let valid = GuestVirtAddr::new(value).is_canonical();
                if valid {
                    self.cpu.msrs.lstar = value;
                }
                self.vcpu.answer_msr(valid.then_some(0));
                self.owed = Owed::Answered;
                Ok(None)
            }
            KvmExit::Rdmsr { msr } => {
                self.owed = Owed::Msr;
                Ok(Some(Exit::Rdmsr { msr }))
            }
            KvmExit::Wrmsr { msr, value } => {
                self.owed = Owed::Msr;
                Ok(Some(Exit::Wrmsr { msr, value }))
            }
            KvmExit::Hlt => {
                self.cpu.activity = Activity::Halted;
                Ok(Some(Exit::Hlt))
            }
            KvmExit::TaskPriority => Ok(None),
            KvmExit::InterruptWindow => Ok(Some(Exit::InterruptWindow)),
            KvmExit::Shutdown if self.quirks.hides_idt() => self.recover().map(|()| None),
            KvmExit::Shutdown => {
                self.cpu.activity = Activity::Shutdown;
                Ok(Some(Exit::TripleFault))
            }
            KvmExit::Unemulated => {
                self.must_step = true;
                Ok(None)
            }
            KvmExit::Debug { pc } => Ok(self.debug(GuestVirtAddr::new(pc))),
            KvmExit::Interrupted => self.kicked().map(|()| None),
            KvmExit::Finished => self.retire_exhausted_rep().map(|()| None),
            KvmExit::Failed(why) => Err(EngineError::Host {
                operation: "KVM_RUN",
                source: std::io::Error::other(why),
            }),
        }
    }

    /// A kick, or a signal meant for somebody else. KVM may have been about to execute the instruction at RIP, and have set
    /// accessed bits for it already: a moment that exists in no replay. So it is executed before the kick is reported.
    fn kicked(&mut self) -> Result<(), EngineError> {
        self.vcpu.kick().request();
        self.must_step = true;
        self.after_kick = true;
        if self.quirks.hides_idt() {
            self.fetch()?;
            if self.cpu.pending.is_some() {
                // KVM came as far as raising an exception it cannot deliver.
                return self.recover();
            }
            // A SYSCALL may have been executed, and its fetch not have failed yet.
            self.core = Core::Changed;
            self.leave_nowhere();
        }
        Ok(())
    }

    fn scan_now_and_then(&mut self) -> Result<(), EngineError> {
        if self.sensitive.any() && self.work.entries.is_multiple_of(SCAN_PERIOD) {
            let written = self.slots.take_dirty(&self.vm)?;
            self.note_written(&written);
            self.wrote = true;
        }
        Ok(())
    }

    fn port(&mut self, port: u16, size: u8, write: bool, value: u64) -> Exit {
        if write {
            self.owed = Owed::Port { read: None };
            Exit::IoOut {
                port,
                data: AccessData { value, size },
            }
        } else {
            self.owed = Owed::Port { read: Some(size) };
            Exit::IoIn { port, size }
        }
    }

    fn mmio(
        &mut self,
        addr: u64,
        len: usize,
        write: bool,
        value: u64,
    ) -> Result<Option<Exit>, EngineError> {
        let page = PageFrame::containing(GuestPhysAddr::new(addr));
        if self.slots.is_out(page) {
            return self.ram(addr, len, write, value).map(|()| None);
        }
        let fragments = Fragments {
            addr,
            len,
            done: 0,
            write,
            value,
        };
        Ok(self.fragment(if write {
            fragments
        } else {
            Fragments {
                value: 0,
                ..fragments
            }
        }))
    }

    /// Makes the next piece of an MMIO access an exit; `None` when there is none left.
    fn fragment(&mut self, access: Fragments) -> Option<Exit> {
        let left = access.len.saturating_sub(access.done);
        if left == 0 {
            return None;
        }
        self.owed = Owed::Mmio(access);
        let size = piece(left);
        let addr = GuestPhysAddr::new(access.addr).wrapping_add(access.done as u64);
        let value = masked(access.value >> (8 * access.done), size);
        Some(if access.write {
            Exit::MmioWrite {
                addr,
                data: AccessData { value, size },
            }
        } else {
            Exit::MmioRead { addr, size }
        })
    }

    /// An access by KVM to RAM that was taken out of the slots.
    fn ram(&mut self, addr: u64, len: usize, write: bool, value: u64) -> Result<(), EngineError> {
        let mut bytes = value.to_le_bytes();
        let addr = GuestPhysAddr::new(addr);
        let len = len.min(bytes.len());
        let done = if write {
            self.wrote = true;
            self.memory.write(addr, &bytes[..len])
        } else {
            self.memory.read(addr, &mut bytes[..len])
        };
        if write {
            self.stepper.memory_written(addr, len);
        } else {
            self.vcpu.answer_mmio(u64::from_le_bytes(bytes));
        }
        self.owed = Owed::Answered;
        done.map_err(|e| EngineError::Host {
            operation: "KVM_RUN",
            source: std::io::Error::other(e),
        })
    }

    /// Takes the answer to the last exit. `Some`: the access it was part of has more to ask.
    pub(crate) fn accept(&mut self, answer: Answer) -> Result<Option<Exit>, EngineError> {
        match self.owed {
            Owed::Nothing | Owed::Answered | Owed::Port { read: None } => {}
            Owed::Port { read: Some(_) } => self.vcpu.answer_io(&data(answer)?.to_le_bytes()),
            Owed::Mmio(access) => return self.accept_mmio(access, answer),
            Owed::Msr => self.vcpu.answer_msr(match answer {
                Answer::MsrValue(value) => Some(value),
                Answer::MsrAccepted => Some(0),
                _ => None,
            }),
            Owed::Soft => self.pending.answer(answer),
        }
        Ok(None)
    }

    fn accept_mmio(
        &mut self,
        access: Fragments,
        answer: Answer,
    ) -> Result<Option<Exit>, EngineError> {
        let mut access = access;
        let size = piece(access.len.saturating_sub(access.done));
        if !access.write {
            access.value |= masked(data(answer)?, size) << (8 * access.done);
        }
        access.done += usize::from(size);
        let exit = self.fragment(access);
        if exit.is_none() && !access.write {
            self.vcpu.answer_mmio(access.value);
        }
        Ok(exit)
    }

    fn debug(&mut self, pc: GuestVirtAddr) -> Option<Exit> {
        if self.controls.breakpoints.contains(&pc) {
            self.resume_at = Some(pc);
            return Some(Exit::Breakpoint(pc));
        }
        self.must_step = true;
        None
    }

    /// Where KVM emulates a REP instruction, it makes the last iteration without moving RIP past it, a boundary that no processor
    /// has. Executing it once more, with a count of zero, moves RIP and does nothing else.
    fn retire_exhausted_rep(&mut self) -> Result<(), EngineError> {
        self.fetch_core();
        let bytes = self.instruction_bytes();
        if let Some(rep) = Rep::at(&bytes, self.cpu.mode())
            && rep.count(self.cpu.regs[Gpr::Rcx]) == 0
        {
            self.step()?;
        }
        Ok(())
    }

    /// KVM asks for the data of many iterations of REP INS at once. Here each is an exit of its own: KVM is given what
    /// memory holds already, so that nothing changes; then its registers are put back, and the
    /// single-instruction path executes the instruction.
    fn undo_string_in(&mut self) -> Result<(), EngineError> {
        self.fetch()?;
        let before = self.cpu.clone();
        let mut present = [0; PAGE_SIZE as usize];
        if let Some(at) = self.string_destination() {
            let left = GuestVirtAddr::new(at.get()).bytes_left_in_page();
            let len = usize::try_from(left).unwrap_or(0).min(present.len());
            // What is not RAM cannot be changed either.
            let _ = self.memory.read(at, &mut present[..len]);
        }
        self.vcpu.answer_io(&present);
        self.vcpu.finish()?;
        self.kvm_has_run();
        self.fetch()?;
        self.cpu = before;
        self.core = Core::Changed;
        self.must_step = true;
        Ok(())
    }

    /// Where INS would store, as a physical address.
    fn string_destination(&self) -> Option<GuestPhysAddr> {
        let rep = Rep::at(&self.instruction_bytes(), self.cpu.mode())?;
        let offset = rep.count(self.cpu.regs[Gpr::Rdi]);
        let linear = match self.cpu.mode() {
            CpuMode::Long64 => offset,
            _ => {
                self.cpu
                    .segment(SegmentRegister::Es)
                    .base
                    .wrapping_add(offset)
                    & 0xffff_ffff
            }
        };
        self.physical(GuestVirtAddr::new(linear))
    }

    /// Translates as a data read would, without setting accessed bits.
    pub(crate) fn physical(&self, addr: GuestVirtAddr) -> Option<GuestPhysAddr> {
        let context = PagingContext::of(&self.cpu);
        paging::walk(&context, &self.memory, addr)
            .outcome
            .ok()
            .map(|found| found.addr)
    }

    /// The bytes at RIP, as far as they are mapped; zeros behind.
    pub(crate) fn instruction_bytes(&self) -> [u8; MAX_INSTRUCTION] {
        self.bytes_at(self.cpu.rip_linear())
    }

    /// Bytes at a linear address, as far as they are mapped; zeros behind.
    pub(crate) fn bytes_at<const N: usize>(&self, start: GuestVirtAddr) -> [u8; N] {
        let mut bytes = [0; N];
        let mut done = 0;
        while done < N {
            let addr = start.wrapping_add(done as u64);
            let len = usize::try_from(addr.bytes_left_in_page())
                .unwrap_or(N)
                .min(N - done);
            let Some(at) = self.physical(addr) else { break };
            if self.memory.read(at, &mut bytes[done..done + len]).is_err() {
                break;
            }
            done += len;
        }
        bytes
    }
}

/// The largest access that fits into `left` bytes.
fn piece(left: usize) -> u8 {
    match left {
        8.. => 8,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

fn masked(value: u64, size: u8) -> u64 {
    if size >= 8 {
        value
    } else {
        value & ((1 << (8 * u32::from(size))) - 1)
    }
}

/// A string instruction with a REP prefix.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Rep {
    /// Address size in bits.
    address_bits: u32,
}

impl Rep {
    /// Decodes as much of an instruction as it takes to tell.
    fn at(bytes: &[u8], mode: CpuMode) -> Option<Self> {
        let (mut repeated, mut other_size) = (false, false);
        for &byte in bytes {
            match byte {
                0xf2 | 0xf3 => repeated = true,
                0x67 => other_size = true,
                0x66 | 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => {}
                0x40..=0x4f if mode == CpuMode::Long64 => {}
                0x6c..=0x6f | 0xa4..=0xa7 | 0xaa..=0xaf if repeated => {
                    return Some(Self {
                        address_bits: address_bits(mode, other_size),
                    });
                }
                _ => return None,
            }
        }
        None
    }

    /// RCX or RDI as this instruction uses it.
    fn count(self, register: u64) -> u64 {
        match self.address_bits {
            16 => register & 0xffff,
            32 => register & 0xffff_ffff,
            _ => register,
        }
    }
}

fn address_bits(mode: CpuMode, other_size: bool) -> u32 {
    match (mode, other_size) {
        (CpuMode::Long64, false) => 64,
        (CpuMode::Long64, true) => 32,
        (CpuMode::Protected32 | CpuMode::Compatibility, false) => 32,
        (CpuMode::Protected32 | CpuMode::Compatibility, true) => 16,
        (CpuMode::Real | CpuMode::Virtual8086 | CpuMode::Protected16, false) => 16,
        (CpuMode::Real | CpuMode::Virtual8086 | CpuMode::Protected16, true) => 32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rep_strings_are_told_from_others() {
        let long = CpuMode::Long64;
        for bytes in [
            &[0xf3, 0xa4][..],
            &[0xf2, 0x48, 0xaf],
            &[0xf3, 0x66, 0x6d],
            &[0x67, 0xf3, 0xaa],
        ] {
            assert!(Rep::at(bytes, long).is_some(), "{bytes:x?}");
        }
        for bytes in [
            &[0xa4][..],
            &[0xf3, 0x90],
            &[0xf3, 0x0f, 0xb8, 0xc3],
            &[0xee, 0xf3, 0xa4],
            &[0xf3; 15],
        ] {
            assert_eq!(Rep::at(bytes, long), None, "{bytes:x?}");
        }
    }

    #[test]
    fn the_count_register_has_the_address_size() {
        let count = |bytes: &[u8], mode| Rep::at(bytes, mode).expect("REP").count(0x5_0000_0000);
        assert_eq!(count(&[0xf3, 0xa4], CpuMode::Long64), 0x5_0000_0000);
        assert_eq!(count(&[0x67, 0xf3, 0xa4], CpuMode::Long64), 0);
        assert_eq!(count(&[0xf3, 0xa4], CpuMode::Protected32), 0);
        assert_eq!(
            Rep::at(&[0xf3, 0xa4], CpuMode::Real)
                .expect("REP")
                .count(0x1_0003),
            3
        );
    }

    #[test]
    fn odd_lengths_come_in_pieces() {
        let mut sizes = Vec::new();
        let mut left = 7;
        while left > 0 {
            sizes.push(piece(left));
            left -= usize::from(piece(left));
        }
        assert_eq!(sizes, [4, 2, 1]);
    }
}
