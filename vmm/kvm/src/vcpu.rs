//! One virtual CPU of KVM.
//!
//! Purpose: move a [`CpuState`] into and out of a vCPU with as few ioctls as possible, enter the guest, and hand every exit out as
//! an owned value.
//! Invariants: registers, system registers and events travel through the shared `kvm_run` page; the rest (FPU, MSRs, debug
//! registers, XCR0: "the extra state") by ioctls, and only when somebody asks or something changed. While a KVM exit awaits
//! completion nothing may be put.
//! Elsewhere: which of us holds the present state, and what an exit means ([`crate::engine`], [`crate::exit`]).
//! Source: KVM API, sections 4.10 (`KVM_RUN`), 5 (`kvm_run`), 6.6 (`KVM_CAP_SYNC_REGS`).

// Reads unions of the `kvm_run` page and writes an answer into its I/O area; sets XSAVE state.
#![allow(unsafe_code)]

use crate::kick::Shared;
use crate::state;
use kvm_bindings::{
    KVM_EXIT_IO, KVM_EXIT_MMIO, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_SYNC_X86_EVENTS,
    KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, Msrs as KvmMsrs, kvm_guest_debug, kvm_msr_entry,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use machine::engine::EngineError;
use std::io;
use std::sync::Arc;
use x86::msr::{Msrs, index};
use x86::{CpuState, DescriptorTable, FpuState};

/// `KVM_EXIT_INTERNAL_ERROR`'s suberror for an instruction KVM could not emulate.
const SUBERROR_EMULATION: u32 = 1;

/// Where SYSCALL leads while LSTAR is hidden: the last page of the address space, which no kernel maps for ring 3.
pub(crate) const NOWHERE: u64 = 0xffff_ffff_ffff_f000;

/// A KVM exit, owned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum KvmExit {
    /// Port access: `count` elements of `size` bytes; the first is in `data` (writes).
    Io {
        port: u16,
        size: u8,
        count: u32,
        write: bool,
        data: u64,
    },
    /// Access to guest-physical memory that is in no slot.
    Mmio {
        addr: u64,
        len: usize,
        write: bool,
        data: u64,
    },
    /// RDMSR that the filter denies.
    Rdmsr {
        msr: u32,
    },
    /// WRMSR that the filter denies.
    Wrmsr {
        msr: u32,
        value: u64,
    },
    Hlt,
    InterruptWindow,
    /// The guest lowered CR8.
    TaskPriority,
    Shutdown,
    /// KVM could not fetch or emulate the instruction at RIP.
    Unemulated,
    /// Guest debugging: the linear address.
    Debug {
        pc: u64,
    },
    /// A signal interrupted the guest.
    Interrupted,
    /// What was pending has been finished, and nothing else executed.
    Finished,
    /// Anything else: a failure. The text says which.
    Failed(String),
}

/// The extra state: what takes ioctls to read and write.
#[derive(Clone, PartialEq, Debug)]
struct Extra {
    fpu: FpuState,
    msrs: Msrs,
    xcr0: u64,
    dr: [u64; 4],
    dr6: u64,
    dr7: u64,
}

impl Extra {
    fn of(cpu: &CpuState) -> Self {
        Self {
            fpu: cpu.fpu.clone(),
            msrs: cpu.msrs.clone(),
            xcr0: cpu.xcr0,
            dr: cpu.dr,
            dr6: cpu.dr6,
            dr7: cpu.dr7,
        }
    }
}

/// A vCPU.
#[derive(Debug)]
pub(crate) struct Vcpu {
    fd: VcpuFd,
    kick: Arc<Shared>,
    /// The MSRs of the state that this KVM keeps under the guest's CPU model.
    msrs: Vec<u32>,
    /// The extra state KVM held when it was last read or written; `None` once the guest ran since.
    extra: Option<Extra>,
    /// Hardware breakpoints are set in KVM.
    breakpoints: bool,
}

impl Vcpu {
    /// Wraps a fresh vCPU whose CPUID has been set. With `hide_lstar`, KVM's LSTAR is [`NOWHERE`] for good, and never read back.
    pub(crate) fn new(fd: VcpuFd, hide_lstar: bool) -> Result<Self, EngineError> {
        let kick = Arc::new(Shared::new(&fd)?);
        let mut vcpu = Self {
            fd,
            kick,
            msrs: Vec::new(),
            extra: None,
            breakpoints: false,
        };
        if hide_lstar {
            vcpu.msrs = vec![index::IA32_LSTAR];
            vcpu.write_msrs(&Msrs {
                lstar: NOWHERE,
                ..Msrs::default()
            })?;
        }
        let kept = |msr| vcpu.keeps(msr) && !(hide_lstar && msr == index::IA32_LSTAR);
        vcpu.msrs = Msrs::INDICES.into_iter().filter(|&msr| kept(msr)).collect();
        let regs = vcpu
            .fd
            .get_regs()
            .map_err(|e| host_error("KVM_GET_REGS", e))?;
        let sregs = vcpu
            .fd
            .get_sregs()
            .map_err(|e| host_error("KVM_GET_SREGS", e))?;
        let events = vcpu
            .fd
            .get_vcpu_events()
            .map_err(|e| host_error("KVM_GET_VCPU_EVENTS", e))?;
        let run = vcpu.fd.get_kvm_run();
        run.kvm_valid_regs =
            u64::from(KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS);
        let shared = vcpu.fd.sync_regs_mut();
        shared.regs = regs;
        shared.sregs = sregs;
        shared.events = events;
        Ok(vcpu)
    }

    /// A handle that wakes this CPU.
    pub(crate) fn kick(&self) -> &Arc<Shared> {
        &self.kick
    }

    fn keeps(&self, msr: u32) -> bool {
        let entry = kvm_msr_entry {
            index: msr,
            ..Default::default()
        };
        KvmMsrs::from_entries(&[entry]).is_ok_and(|mut list| self.fd.get_msrs(&mut list) == Ok(1))
    }

    // --- State out of KVM ------------------------------------------------------------------------------------------

    /// Registers, system registers and events of the last exit, into `cpu`.
    pub(crate) fn core(&self, cpu: &mut CpuState) {
        let shared = self.fd.sync_regs();
        cpu.regs = state::regs_from_kvm(&shared.regs);
        state::sregs_from_kvm(&shared.sregs, cpu);
        state::events_from_kvm(&shared.events, cpu);
    }

    /// The system registers of the last exit, as KVM has them.
    pub(crate) fn sregs(&self) -> kvm_sregs {
        self.fd.sync_regs().sregs
    }

    /// The events of the last exit, as KVM has them.
    pub(crate) fn events(&self) -> kvm_vcpu_events {
        self.fd.sync_regs().events
    }

    /// The extra state, into `cpu`.
    pub(crate) fn read_extra(&mut self, cpu: &mut CpuState) -> Result<(), EngineError> {
        let area = self
            .fd
            .get_xsave()
            .map_err(|e| host_error("KVM_GET_XSAVE", e))?;
        cpu.fpu = state::fpu_from_kvm(&area);
        let debug = self
            .fd
            .get_debug_regs()
            .map_err(|e| host_error("KVM_GET_DEBUGREGS", e))?;
        state::debug_from_kvm(&debug, cpu);
        self.read_msrs(&mut cpu.msrs)?;
        self.extra = Some(Extra::of(cpu));
        Ok(())
    }

    fn read_msrs(&self, msrs: &mut Msrs) -> Result<(), EngineError> {
        let entry = |&index: &u32| kvm_msr_entry {
            index,
            ..Default::default()
        };
        let entries: Vec<_> = self.msrs.iter().map(entry).collect();
        let mut list = msr_list(&entries)?;
        let read = self
            .fd
            .get_msrs(&mut list)
            .map_err(|e| host_error("KVM_GET_MSRS", e))?;
        if read != entries.len() {
            return Err(failed(
                "KVM_GET_MSRS",
                "not every MSR of the CPU state could be read",
            ));
        }
        for entry in list.as_slice() {
            if let Some(field) = msrs.field_mut(entry.index) {
                *field = entry.data;
            }
        }
        Ok(())
    }

    // --- State into KVM --------------------------------------------------------------------------------------------

    /// Puts registers, system registers (with `idtr` in place of the guest's own) and events; they take effect with
    /// the next entry.
    pub(crate) fn put_core(&mut self, cpu: &CpuState, idtr: &DescriptorTable) {
        let sregs = state::sregs_to_kvm(cpu, idtr);
        let events = state::events_to_kvm(cpu);
        let held = self.fd.sync_regs();
        let mut dirty = KVM_SYNC_X86_REGS;
        let shared = self.fd.sync_regs_mut();
        shared.regs = state::regs_to_kvm(&cpu.regs);
        if held.sregs != sregs {
            dirty |= KVM_SYNC_X86_SREGS;
            shared.sregs = sregs;
        }
        if !same_events(&held.events, &events) {
            dirty |= KVM_SYNC_X86_EVENTS;
            shared.events = events;
        }
        let run = self.fd.get_kvm_run();
        run.kvm_dirty_regs |= u64::from(dirty);
        run.cr8 = u64::from(cpu.cr8);
    }

    /// Writes what differs of the extra state.
    pub(crate) fn put_extra(&mut self, cpu: &CpuState) -> Result<(), EngineError> {
        let new = Extra::of(cpu);
        let old = self.extra.take();
        let differs =
            |same: fn(&Extra, &Extra) -> bool| old.as_ref().is_none_or(|old| !same(old, &new));
        if differs(|a, b| a.fpu == b.fpu) {
            self.write_fpu(&new.fpu)?;
        }
        if differs(|a, b| a.msrs == b.msrs) {
            self.write_msrs(&new.msrs)?;
        }
        if differs(|a, b| (a.dr, a.dr6, a.dr7) == (b.dr, b.dr6, b.dr7)) {
            let debug = state::debug_to_kvm(cpu);
            self.fd
                .set_debug_regs(&debug)
                .map_err(|e| host_error("KVM_SET_DEBUGREGS", e))?;
        }
        if old
            .as_ref()
            .map_or(new.xcr0 != 1, |old| old.xcr0 != new.xcr0)
        {
            self.write_xcr0(new.xcr0)?;
        }
        self.extra = Some(new);
        Ok(())
    }

    fn write_fpu(&mut self, fpu: &FpuState) -> Result<(), EngineError> {
        let mut area = self
            .fd
            .get_xsave()
            .map_err(|e| host_error("KVM_GET_XSAVE", e))?;
        state::fpu_to_kvm(fpu, &mut area);
        // SAFETY: no dynamically enabled XSAVE feature (AMX) is ever enabled here, so the area's fixed 4 KiB are all KVM reads.
        unsafe { self.fd.set_xsave(&area) }.map_err(|e| host_error("KVM_SET_XSAVE", e))
    }

    fn write_msrs(&mut self, msrs: &Msrs) -> Result<(), EngineError> {
        let mut msrs = msrs.clone();
        let entry = |&index: &u32| {
            let data = msrs.field_mut(index).map_or(0, |field| *field);
            kvm_msr_entry {
                index,
                data,
                ..Default::default()
            }
        };
        let entries: Vec<_> = self.msrs.iter().map(entry).collect();
        let written = self
            .fd
            .set_msrs(&msr_list(&entries)?)
            .map_err(|e| host_error("KVM_SET_MSRS", e))?;
        match entries.get(written) {
            None => Ok(()),
            // A KVM may refuse to change this one; the value it has is the one of the CPU models.
            Some(entry) if entry.index == index::IA32_MISC_ENABLE => Ok(()),
            Some(entry) => Err(EngineError::Host {
                operation: "KVM_SET_MSRS",
                source: io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("KVM refuses {:#x} for MSR {:#x}", entry.data, entry.index),
                ),
            }),
        }
    }

    fn write_xcr0(&mut self, value: u64) -> Result<(), EngineError> {
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0].value = value;
        self.fd
            .set_xcrs(&xcrs)
            .map_err(|e| host_error("KVM_SET_XCRS", e))
    }

    /// At most four hardware breakpoints at these linear addresses; none turns guest debugging off.
    pub(crate) fn set_breakpoints(&mut self, at: &[u64]) -> Result<(), EngineError> {
        if at.is_empty() && !self.breakpoints {
            return Ok(());
        }
        let mut debug = kvm_guest_debug::default();
        if !at.is_empty() {
            debug.control =
                kvm_bindings::KVM_GUESTDBG_ENABLE | kvm_bindings::KVM_GUESTDBG_USE_HW_BP;
        }
        for (n, &addr) in at.iter().take(4).enumerate() {
            debug.arch.debugreg[n] = addr;
            debug.arch.debugreg[7] |= 1 << (2 * n) | 1 << 10;
        }
        self.fd
            .set_guest_debug(&debug)
            .map_err(|e| host_error("KVM_SET_GUEST_DEBUG", e))?;
        self.breakpoints = !at.is_empty();
        Ok(())
    }

    // --- Entering --------------------------------------------------------------------------------------------------

    /// Runs the guest until KVM exits.
    pub(crate) fn enter(&mut self, interrupt_window: bool) -> Result<KvmExit, EngineError> {
        self.fd.get_kvm_run().request_interrupt_window = u8::from(interrupt_window);
        self.kick.set_immediate_exit(false);
        if self.kick.is_requested() {
            return self.finish();
        }
        self.kick.set_running(true);
        let exit = self.run();
        self.kick.set_running(false);
        exit
    }

    /// Lets KVM finish what the last exit interrupted, without executing anything more.
    pub(crate) fn finish(&mut self) -> Result<KvmExit, EngineError> {
        self.kick.set_immediate_exit(true);
        let exit = self.run();
        self.kick.set_immediate_exit(false);
        Ok(match exit? {
            KvmExit::Interrupted => KvmExit::Finished,
            exit => exit,
        })
    }

    fn run(&mut self) -> Result<KvmExit, EngineError> {
        self.extra = None;
        let exit = match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => (port, little_endian(data), true),
            Ok(VcpuExit::IoIn(port, _)) => (port, 0, false),
            Ok(VcpuExit::MmioRead(addr, data)) => {
                return Ok(KvmExit::Mmio {
                    addr,
                    len: data.len(),
                    write: false,
                    data: 0,
                });
            }
            Ok(VcpuExit::MmioWrite(addr, data)) => {
                return Ok(KvmExit::Mmio {
                    addr,
                    len: data.len(),
                    write: true,
                    data: little_endian(data),
                });
            }
            Ok(VcpuExit::X86Rdmsr(exit)) => return Ok(KvmExit::Rdmsr { msr: exit.index }),
            Ok(VcpuExit::X86Wrmsr(exit)) => {
                return Ok(KvmExit::Wrmsr {
                    msr: exit.index,
                    value: exit.data,
                });
            }
            Ok(VcpuExit::Hlt) => return Ok(KvmExit::Hlt),
            Ok(VcpuExit::IrqWindowOpen) => return Ok(KvmExit::InterruptWindow),
            Ok(VcpuExit::SetTpr) => return Ok(KvmExit::TaskPriority),
            Ok(VcpuExit::Shutdown) => return Ok(KvmExit::Shutdown),
            Ok(VcpuExit::Debug(debug)) => return Ok(KvmExit::Debug { pc: debug.pc }),
            Ok(VcpuExit::Intr) => return Ok(KvmExit::Interrupted),
            Ok(VcpuExit::InternalError) => return Ok(self.internal_error()),
            Ok(other) => return Ok(KvmExit::Failed(format!("KVM_RUN ended with {other:?}"))),
            Err(errno) if matches!(errno.errno(), libc::EINTR | libc::EAGAIN) => {
                return Ok(KvmExit::Interrupted);
            }
            Err(errno) => return Err(host_error("KVM_RUN", errno)),
        };
        let (port, data, write) = exit;
        // SAFETY: KVM_EXIT_IO says that this member of the union is in use.
        let io = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io };
        Ok(KvmExit::Io {
            port,
            size: io.size,
            count: io.count,
            write,
            data: masked(data, io.size),
        })
    }

    fn internal_error(&mut self) -> KvmExit {
        // SAFETY: KVM_EXIT_INTERNAL_ERROR says that this member of the union is in use.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        if internal.suberror == SUBERROR_EMULATION {
            return KvmExit::Unemulated;
        }
        let data = internal
            .data
            .get(..internal.ndata as usize)
            .unwrap_or(&internal.data);
        KvmExit::Failed(format!(
            "KVM internal error {} {data:x?}",
            internal.suberror
        ))
    }

    /// RFLAGS.IF as of the last exit.
    pub(crate) fn interrupt_flag(&mut self) -> bool {
        self.fd.get_kvm_run().if_flag != 0
    }

    /// RFLAGS.IF and no shadow, as of the last exit. Only meaningful when nothing awaits completion.
    pub(crate) fn interruptible(&mut self) -> bool {
        self.fd.get_kvm_run().ready_for_interrupt_injection != 0
    }

    // --- Answers ---------------------------------------------------------------------------------------------------

    /// What an IN returns: the bytes of all its elements, in order. What is missing reads as zero.
    pub(crate) fn answer_io(&mut self, bytes: &[u8]) {
        let run = self.fd.get_kvm_run();
        if run.exit_reason != KVM_EXIT_IO {
            return;
        }
        // SAFETY: the exit reason says that this member of the union is in use.
        let io = unsafe { run.__bindgen_anon_1.io };
        let start: *mut kvm_bindings::kvm_run = run;
        for i in 0..usize::from(io.size) * io.count as usize {
            let byte = bytes.get(i).copied().unwrap_or(0);
            // SAFETY: KVM placed `count` elements of `size` bytes at `data_offset` inside the mapping of `kvm_run`.
            unsafe {
                start
                    .cast::<u8>()
                    .add(io.data_offset as usize + i)
                    .write(byte)
            };
        }
    }

    /// What an MMIO read returns.
    pub(crate) fn answer_mmio(&mut self, value: u64) {
        let run = self.fd.get_kvm_run();
        if run.exit_reason == KVM_EXIT_MMIO {
            run.__bindgen_anon_1.mmio.data = value.to_le_bytes();
        }
    }

    /// What RDMSR returns, or that an MSR access is accepted (`Some`) or refused (`None`).
    pub(crate) fn answer_msr(&mut self, value: Option<u64>) {
        let run = self.fd.get_kvm_run();
        if !matches!(run.exit_reason, KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR) {
            return;
        }
        run.__bindgen_anon_1.msr.error = u8::from(value.is_none());
        if run.exit_reason == KVM_EXIT_X86_RDMSR {
            run.__bindgen_anon_1.msr.data = value.unwrap_or(0);
        }
    }
}

/// Whether KVM's events mean the same for the guest as `wanted`, of which only shadow and NMI blocking count.
fn same_events(held: &kvm_vcpu_events, wanted: &kvm_vcpu_events) -> bool {
    let quiet = held.exception.injected == 0
        && held.exception.pending == 0
        && held.interrupt.injected == 0
        && held.nmi.injected == 0
        && held.nmi.pending == 0;
    quiet
        && held.interrupt.shadow == wanted.interrupt.shadow
        && held.nmi.masked == wanted.nmi.masked
}

fn msr_list(entries: &[kvm_msr_entry]) -> Result<KvmMsrs, EngineError> {
    KvmMsrs::from_entries(entries)
        .map_err(|_| failed("KVM_GET_MSRS", "the list of MSRs is too long"))
}

/// Up to eight bytes as a number.
fn little_endian(data: &[u8]) -> u64 {
    data.iter()
        .take(8)
        .rev()
        .fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn masked(value: u64, size: u8) -> u64 {
    if size >= 8 {
        value
    } else {
        value & ((1 << (8 * u32::from(size))) - 1)
    }
}

/// A KVM ioctl that failed.
pub(crate) fn host_error(operation: &'static str, errno: kvm_ioctls::Error) -> EngineError {
    EngineError::Host {
        operation,
        source: io::Error::from_raw_os_error(errno.errno()),
    }
}

/// A system call that failed just now.
pub(crate) fn host_errno(operation: &'static str) -> EngineError {
    EngineError::Host {
        operation,
        source: io::Error::last_os_error(),
    }
}

/// A failure that has no errno.
pub(crate) fn failed(operation: &'static str, why: &'static str) -> EngineError {
    EngineError::Host {
        operation,
        source: io::Error::other(why),
    }
}
