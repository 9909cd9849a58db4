//! The machine as gdbstub's target.
//!
//! Purpose: registers, memory, breakpoints and threads of a [`Debuggable`] in gdbstub's terms.
//! Invariants:
//! - Memory is read and written by guest virtual address under the CPU's page tables (or by physical address, when that is switched on);
//!   a write is done whole or not at all. What is not RAM is an error.
//! - A write that changes nothing is not passed on: gdb writes registers back as it found them, and on a timeline each real write leaves
//!   the recording.
//! - Breakpoints are told to the machine when it is resumed, and only when they differ: gdb takes all of them out at each stop
//!   and puts them back at each resume.
//!
//! Elsewhere: running (`resume.rs`), register values (`registers.rs`), `monitor` (`monitor.rs`).

use crate::registers::{Register, RegisterFile, X86_64, from_le_bytes};
use crate::resume::Action;
use crate::server::Mode;
use gdbstub::common::Tid;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{MultiThreadBase, MultiThreadResumeOps};
use gdbstub::target::ext::base::single_register_access::{
    SingleRegisterAccess, SingleRegisterAccessOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, SwBreakpoint, SwBreakpointOps,
};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use introspect::virtual_memory::{read_virtual, write_targets};
use machine::debuggable::{DebugError, Debuggable};
use std::collections::BTreeSet;
use std::convert::Infallible;
use x86::{CpuState, GuestPhysAddr, GuestVirtAddr, VcpuId};

/// The machine, and what gdb has asked of it.
pub(crate) struct Bridge<'m> {
    pub(crate) machine: &'m mut dyn Debuggable,
    pub(crate) mode: Mode,
    pub(crate) action: Action,
    pub(crate) software: BTreeSet<GuestVirtAddr>,
    pub(crate) hardware: BTreeSet<GuestVirtAddr>,
    /// What the machine was last told.
    pub(crate) installed: BTreeSet<GuestVirtAddr>,
    /// Addresses are physical.
    pub(crate) physical: bool,
    /// Lines for the user that gdb could not take yet.
    pub(crate) notes: Vec<String>,
    /// The client knows that a live guest has ended.
    pub(crate) end_told: bool,
    /// The user knows that the timeline has left its recording.
    pub(crate) branch_told: bool,
    /// The machine broke and must not be resumed; why.
    pub(crate) failed: Option<String>,
}

/// Error numbers as gdb's protocol has them (those of Linux).
pub(crate) mod errno {
    pub(crate) const EPERM: u8 = 1;
    pub(crate) const ESRCH: u8 = 3;
    pub(crate) const EIO: u8 = 5;
    pub(crate) const E2BIG: u8 = 7;
    pub(crate) const EFAULT: u8 = 14;
    pub(crate) const EINVAL: u8 = 22;
}

type Result<T, E = TargetError<Infallible>> = std::result::Result<T, E>;

impl<'m> Bridge<'m> {
    pub(crate) fn new(machine: &'m mut dyn Debuggable, mode: Mode) -> Self {
        Self {
            branch_told: machine.branched(),
            machine,
            mode,
            action: Action::Continue,
            software: BTreeSet::new(),
            hardware: BTreeSet::new(),
            installed: BTreeSet::new(),
            physical: false,
            notes: Vec::new(),
            end_told: false,
            failed: None,
        }
    }

    /// Forgets what a client asked for that is gone: its breakpoints and how it looked at memory.
    pub(crate) fn forget_client(&mut self) {
        self.software.clear();
        self.hardware.clear();
        self.physical = false;
        self.end_told = false;
        if let Err(error) = self.install_breakpoints() {
            self.failed = Some(error.to_string());
        }
    }

    /// Tells the machine where to stop, if that has changed.
    pub(crate) fn install_breakpoints(&mut self) -> Result<(), DebugError> {
        let wanted: BTreeSet<_> = self.software.union(&self.hardware).copied().collect();
        if wanted != self.installed {
            self.machine.set_breakpoints(&wanted)?;
            self.installed = wanted;
        }
        Ok(())
    }

    /// The CPU that stands for the machine where none is named.
    pub(crate) fn first_vcpu(&self) -> VcpuId {
        self.machine
            .vcpus()
            .first()
            .copied()
            .unwrap_or(VcpuId::BOOT)
    }

    pub(crate) fn vcpu(&self, tid: Tid) -> Result<VcpuId> {
        let number = u8::try_from(tid.get() - 1).map_err(|_| TargetError::Errno(errno::ESRCH))?;
        let vcpu = VcpuId(number);
        if self.machine.vcpus().contains(&vcpu) {
            Ok(vcpu)
        } else {
            Err(TargetError::Errno(errno::ESRCH))
        }
    }

    fn cpu(&mut self, tid: Tid) -> Result<(VcpuId, CpuState)> {
        let vcpu = self.vcpu(tid)?;
        let cpu = self
            .machine
            .cpu(vcpu)
            .map_err(|error| self.refuse(&error))?;
        Ok((vcpu, cpu))
    }

    fn set_cpu(&mut self, vcpu: VcpuId, old: &CpuState, new: &CpuState) -> Result<()> {
        if old == new {
            return Ok(());
        }
        self.machine
            .set_cpu(vcpu, new)
            .map_err(|error| self.refuse(&error))?;
        self.notice_branch();
        Ok(())
    }

    /// The error number for gdb, which shows no text; that follows when gdb can take it.
    fn refuse(&mut self, error: &DebugError) -> TargetError<Infallible> {
        self.notes.push(error.to_string());
        TargetError::Errno(match error {
            DebugError::Memory(_) => errno::EFAULT,
            DebugError::Refused(_) => errno::EPERM,
            DebugError::Engine(_) | DebugError::Environment(_) => errno::EIO,
        })
    }

    /// Says so once when a change has left the recording.
    fn notice_branch(&mut self) {
        if self.mode == Mode::Timeline && !self.branch_told && self.machine.branched() {
            self.branch_told = true;
            let line = "this change has left the recording: what follows did not happen in it";
            self.notes.push(line.to_owned());
        }
    }

    fn read_memory(&mut self, addr: u64, data: &mut [u8], tid: Tid) -> Result<usize> {
        let done = if self.physical {
            read_physical(self.machine, addr, data)
        } else {
            let (_, cpu) = self.cpu(tid)?;
            let addr = GuestVirtAddr::new(addr);
            match read_virtual(&cpu, self.machine.memory(), addr, data) {
                Ok(()) => data.len(),
                Err(error) => error.done,
            }
        };
        // No byte at all would look to gdb like a request that is not understood.
        if done == 0 && !data.is_empty() {
            Err(TargetError::Errno(errno::EFAULT))
        } else {
            Ok(done)
        }
    }

    fn write_memory(&mut self, addr: u64, data: &[u8], tid: Tid) -> Result<()> {
        let fault = TargetError::Errno(errno::EFAULT);
        if self.physical {
            let addr = GuestPhysAddr::new(addr);
            if !self.machine.memory().contains(addr, data.len()) {
                return Err(fault);
            }
            self.write_piece(addr, data)?;
        } else {
            let (_, cpu) = self.cpu(tid)?;
            let addr = GuestVirtAddr::new(addr);
            let Ok(pieces) = write_targets(&cpu, self.machine.memory(), addr, data.len()) else {
                return Err(fault);
            };
            let mut rest = data;
            for piece in pieces {
                let Some((now, later)) = rest.split_at_checked(piece.len) else {
                    break;
                };
                self.write_piece(piece.physical, now)?;
                rest = later;
            }
        }
        self.notice_branch();
        Ok(())
    }

    fn write_piece(&mut self, addr: GuestPhysAddr, data: &[u8]) -> Result<()> {
        let mut present = vec![0; data.len()];
        if self.machine.memory().read(addr, &mut present).is_ok() && present == data {
            return Ok(());
        }
        self.machine
            .write_memory(addr, data)
            .map_err(|error| self.refuse(&error))
    }
}

/// Reads as far as there is RAM; how many bytes that was.
fn read_physical(machine: &dyn Debuggable, addr: u64, data: &mut [u8]) -> usize {
    let available = machine
        .memory()
        .size()
        .saturating_sub(addr)
        .min(data.len() as u64) as usize;
    let addr = GuestPhysAddr::new(addr);
    let Some(data) = data.get_mut(..available) else {
        return 0;
    };
    machine.memory().read(addr, data).map_or(0, |()| available)
}

/// gdb's thread number of a CPU: they start at 1.
pub(crate) fn tid(vcpu: VcpuId) -> Tid {
    Tid::MIN.saturating_add(usize::from(vcpu.0))
}

impl Target for Bridge<'_> {
    type Arch = X86_64;
    type Error = Infallible;

    fn base_ops(&mut self) -> BaseOps<'_, X86_64, Infallible> {
        BaseOps::MultiThread(self)
    }

    // A machine has no processes that could fork.

    fn use_fork_stop_reason(&self) -> bool {
        false
    }

    fn use_vfork_stop_reason(&self) -> bool {
        false
    }

    fn use_vforkdone_stop_reason(&self) -> bool {
        false
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Bridge<'_> {
    fn read_registers(&mut self, regs: &mut RegisterFile, tid: Tid) -> TargetResult<(), Self> {
        *regs = RegisterFile::of(&self.cpu(tid)?.1);
        Ok(())
    }

    fn write_registers(&mut self, regs: &RegisterFile, tid: Tid) -> TargetResult<(), Self> {
        let (vcpu, old) = self.cpu(tid)?;
        let mut new = old.clone();
        regs.apply(&mut new)
            .map_err(|_| TargetError::Errno(errno::EINVAL))?;
        self.set_cpu(vcpu, &old, &new)
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, addr: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        self.read_memory(addr, data, tid)
    }

    fn write_addrs(&mut self, addr: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        self.write_memory(addr, data, tid)
    }

    fn list_active_threads(&mut self, found: &mut dyn FnMut(Tid)) -> Result<(), Infallible> {
        self.machine.vcpus().into_iter().map(tid).for_each(found);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl SingleRegisterAccess<Tid> for Bridge<'_> {
    fn read_register(
        &mut self,
        tid: Tid,
        register: Register,
        buffer: &mut [u8],
    ) -> TargetResult<usize, Self> {
        let (_, cpu) = self.cpu(tid)?;
        let value = register.get(&cpu).to_le_bytes();
        let size = register.size();
        match (buffer.get_mut(..size), value.get(..size)) {
            (Some(buffer), Some(value)) => buffer.copy_from_slice(value),
            _ => return Err(TargetError::Errno(errno::EINVAL)),
        }
        Ok(size)
    }

    fn write_register(
        &mut self,
        tid: Tid,
        register: Register,
        value: &[u8],
    ) -> TargetResult<(), Self> {
        let invalid = || TargetError::Errno(errno::EINVAL);
        let (vcpu, old) = self.cpu(tid)?;
        let value = from_le_bytes(value).filter(|_| value.len() == register.size());
        let mut new = old.clone();
        register
            .set(&mut new, value.ok_or_else(invalid)?)
            .map_err(|_| invalid())?;
        self.set_cpu(vcpu, &old, &new)
    }
}

impl ThreadExtraInfo for Bridge<'_> {
    fn thread_extra_info(&self, tid: Tid, buffer: &mut [u8]) -> Result<usize, Infallible> {
        let text = format!("CPU {} ({})", tid.get() - 1, self.machine.engine().name());
        let len = text.len().min(buffer.len());
        for (to, from) in buffer.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        Ok(len)
    }
}

impl Breakpoints for Bridge<'_> {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Bridge<'_> {
    fn add_sw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.software.insert(GuestVirtAddr::new(addr));
        Ok(true)
    }

    fn remove_sw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.software.remove(&GuestVirtAddr::new(addr));
        Ok(true)
    }
}

impl HwBreakpoint for Bridge<'_> {
    fn add_hw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.hardware.insert(GuestVirtAddr::new(addr));
        Ok(true)
    }

    fn remove_hw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.hardware.remove(&GuestVirtAddr::new(addr));
        Ok(true)
    }
}

impl MonitorCmd for Bridge<'_> {
    fn handle_monitor_cmd(
        &mut self,
        command: &[u8],
        mut out: ConsoleOutput<'_>,
    ) -> Result<(), Infallible> {
        let mut text = self.monitor(&String::from_utf8_lossy(command));
        for note in self.notes.drain(..) {
            text.push_str(&format!("[{note}]\n"));
        }
        // In pieces that every client's packet buffer holds.
        for piece in text.as_bytes().chunks(1024) {
            out.write_raw(piece);
            out.flush();
        }
        Ok(())
    }
}
