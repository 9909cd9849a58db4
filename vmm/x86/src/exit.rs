//! VM exits.
//!
//! Purpose: why an engine stopped running the guest, as an owned value under the Intel SDM's name for it.
//! Invariants: an [`Exit`] borrows nothing; what has to be answered before the guest can go on (an IN's value, an MMIO
//! read) says so in [`Exit::wants`], and the answer travels back with the next entry.
//! Elsewhere: the entry and the engine trait (`vmm/machine`); which conditions exit at all ([`crate::controls`]).
//! Source: Intel SDM vol. 3D, appendix C (basic exit reasons); KVM API section 5 for the two names that are KVM's own.

use crate::{Exception, GuestPhysAddr, GuestVirtAddr, Vector};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Width of one port or MMIO access, in bytes: 1, 2, 4 (ports and MMIO) or 8 (MMIO only).
pub type AccessSize = u8;

/// The bytes of one device access, at most eight, little-endian.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AccessData {
    /// Value, zero-extended.
    pub value: u64,
    /// How many bytes of it count: 1, 2, 4 or 8.
    pub size: AccessSize,
}

/// Why the guest stopped running.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Exit {
    /// Basic exit reason 0: an exception that the exception bitmap intercepts; it has not been delivered.
    ExceptionOrNmi(Exception),
    /// 2: a triple fault. The CPU is in shutdown.
    TripleFault,
    /// 7: an interrupt can be injected now; the entry asked for it.
    InterruptWindow,
    /// 10: CPUID was executed (RIP before it).
    Cpuid {
        /// EAX.
        leaf: u32,
        /// ECX.
        subleaf: u32,
    },
    /// 12: HLT was executed; RIP is after it and the CPU is halted.
    Hlt,
    /// 14: INVLPG of this linear address is about to execute.
    Invlpg(GuestVirtAddr),
    /// 16: RDTSC is about to execute.
    Rdtsc,
    /// 18: VMCALL was executed; RIP is after it.
    Vmcall,
    /// 28: a MOV to or from a control register is about to execute.
    CrAccess {
        /// 0, 3, 4 or 8.
        register: u8,
        /// MOV to CR (true) or from CR.
        write: bool,
        /// What is to be written (writes only).
        value: u64,
    },
    /// 30: IN, wants [`Exit::wants`] bytes back.
    IoIn {
        /// Port number.
        port: u16,
        /// 1, 2 or 4.
        size: AccessSize,
    },
    /// 30: OUT; the instruction is finished by the next entry.
    IoOut {
        /// Port number.
        port: u16,
        /// What was written.
        data: AccessData,
    },
    /// 31: RDMSR of an MSR the engine does not hold itself; wants its value, or a refusal (#GP).
    Rdmsr {
        /// ECX.
        msr: u32,
    },
    /// 32: WRMSR of an MSR the engine does not hold itself; wants an acknowledgement, or a refusal (#GP).
    Wrmsr {
        /// ECX.
        msr: u32,
        /// EDX:EAX.
        value: u64,
    },
    /// 37: one instruction was executed under the monitor trap flag.
    MonitorTrapFlag,
    /// 40: PAUSE was executed.
    Pause,
    /// 48: an access that the page's permissions in the exit controls forbid; it has not been made.
    EptViolation {
        /// What was accessed.
        addr: GuestPhysAddr,
        /// Through which linear address.
        linear: GuestVirtAddr,
        /// Read, write or fetch.
        access: crate::paging::AccessKind,
    },
    /// KVM's name: a read of guest-physical memory that is not RAM; wants the value.
    MmioRead {
        /// Where.
        addr: GuestPhysAddr,
        /// 1, 2, 4 or 8.
        size: AccessSize,
    },
    /// KVM's name: a write to guest-physical memory that is not RAM.
    MmioWrite {
        /// Where.
        addr: GuestPhysAddr,
        /// What was written.
        data: AccessData,
    },
    /// A breakpoint of the debugger's: the instruction at this linear address is about to execute.
    Breakpoint(GuestVirtAddr),
    /// The bound given to the run was reached (an instruction count, or a register state).
    BoundReached,
    /// Somebody kicked the CPU; it stands at an instruction boundary.
    Kicked,
}

/// What an [`Exit`] needs before the guest can continue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wants {
    /// Nothing.
    Nothing,
    /// A value of this many bytes.
    Data(AccessSize),
    /// An MSR value, or a refusal.
    MsrValue,
    /// An acknowledgement of an MSR write, or a refusal.
    MsrAck,
}

/// The kind of an [`Exit`], for counting. The discriminant is the SDM's basic exit reason where there is one;
/// KVM's own and ours start at 0x100.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[repr(u16)]
#[allow(missing_docs)] // As in `Exit`.
pub enum ExitReason {
    ExceptionOrNmi = 0,
    TripleFault = 2,
    InterruptWindow = 7,
    Cpuid = 10,
    Hlt = 12,
    Invlpg = 14,
    Rdtsc = 16,
    Vmcall = 18,
    CrAccess = 28,
    IoInstruction = 30,
    Rdmsr = 31,
    Wrmsr = 32,
    MonitorTrapFlag = 37,
    Pause = 40,
    EptViolation = 48,
    Mmio = 0x100,
    Breakpoint = 0x101,
    BoundReached = 0x102,
    Kicked = 0x103,
}

impl Exit {
    /// The kind, for counting.
    pub const fn reason(&self) -> ExitReason {
        match self {
            Self::ExceptionOrNmi(_) => ExitReason::ExceptionOrNmi,
            Self::TripleFault => ExitReason::TripleFault,
            Self::InterruptWindow => ExitReason::InterruptWindow,
            Self::Cpuid { .. } => ExitReason::Cpuid,
            Self::Hlt => ExitReason::Hlt,
            Self::Invlpg(_) => ExitReason::Invlpg,
            Self::Rdtsc => ExitReason::Rdtsc,
            Self::Vmcall => ExitReason::Vmcall,
            Self::CrAccess { .. } => ExitReason::CrAccess,
            Self::IoIn { .. } | Self::IoOut { .. } => ExitReason::IoInstruction,
            Self::Rdmsr { .. } => ExitReason::Rdmsr,
            Self::Wrmsr { .. } => ExitReason::Wrmsr,
            Self::MonitorTrapFlag => ExitReason::MonitorTrapFlag,
            Self::Pause => ExitReason::Pause,
            Self::EptViolation { .. } => ExitReason::EptViolation,
            Self::MmioRead { .. } | Self::MmioWrite { .. } => ExitReason::Mmio,
            Self::Breakpoint(_) => ExitReason::Breakpoint,
            Self::BoundReached => ExitReason::BoundReached,
            Self::Kicked => ExitReason::Kicked,
        }
    }

    /// What has to come back with the next entry.
    pub const fn wants(&self) -> Wants {
        match self {
            Self::IoIn { size, .. } | Self::MmioRead { size, .. } => Wants::Data(*size),
            Self::Rdmsr { .. } => Wants::MsrValue,
            Self::Wrmsr { .. } => Wants::MsrAck,
            _ => Wants::Nothing,
        }
    }

    /// Whether both engines take this exit at the same instruction whatever the host does: the exits that are
    /// counted as **sync points** and by whose order inputs are logged.
    pub const fn is_sync_point(&self) -> bool {
        matches!(
            self,
            Self::IoIn { .. }
                | Self::IoOut { .. }
                | Self::MmioRead { .. }
                | Self::MmioWrite { .. }
                | Self::Rdmsr { .. }
                | Self::Wrmsr { .. }
                | Self::Hlt
                | Self::TripleFault
        )
    }
}

impl ExitReason {
    /// The SDM's basic exit reason, or `None` for KVM's own and ours.
    pub const fn sdm_number(self) -> Option<u16> {
        let number = self as u16;
        if number < 0x100 { Some(number) } else { None }
    }

    /// The name in the tables of statistics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ExceptionOrNmi => "EXCEPTION_OR_NMI",
            Self::TripleFault => "TRIPLE_FAULT",
            Self::InterruptWindow => "INTERRUPT_WINDOW",
            Self::Cpuid => "CPUID",
            Self::Hlt => "HLT",
            Self::Invlpg => "INVLPG",
            Self::Rdtsc => "RDTSC",
            Self::Vmcall => "VMCALL",
            Self::CrAccess => "CR_ACCESS",
            Self::IoInstruction => "IO_INSTRUCTION",
            Self::Rdmsr => "RDMSR",
            Self::Wrmsr => "WRMSR",
            Self::MonitorTrapFlag => "MONITOR_TRAP_FLAG",
            Self::Pause => "PAUSE",
            Self::EptViolation => "EPT_VIOLATION",
            Self::Mmio => "MMIO",
            Self::Breakpoint => "BREAKPOINT",
            Self::BoundReached => "BOUND_REACHED",
            Self::Kicked => "KICKED",
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::IoIn { port, size } => write!(f, "IN port {port:#06x}, {size} bytes"),
            Self::IoOut { port, data } => {
                write!(
                    f,
                    "OUT port {port:#06x} <- {:#x} ({} bytes)",
                    data.value, data.size
                )
            }
            Self::MmioRead { addr, size } => write!(f, "MMIO read {addr}, {size} bytes"),
            Self::MmioWrite { addr, data } => {
                write!(
                    f,
                    "MMIO write {addr} <- {:#x} ({} bytes)",
                    data.value, data.size
                )
            }
            Self::Rdmsr { msr } => write!(f, "RDMSR {msr:#x}"),
            Self::Wrmsr { msr, value } => write!(f, "WRMSR {msr:#x} <- {value:#x}"),
            Self::ExceptionOrNmi(exception) => write!(f, "exception {exception}"),
            Self::CrAccess {
                register,
                write: true,
                value,
            } => {
                write!(f, "MOV to CR{register} <- {value:#x}")
            }
            Self::CrAccess { register, .. } => write!(f, "MOV from CR{register}"),
            Self::EptViolation {
                addr,
                linear,
                access,
            } => {
                write!(f, "EPT violation: {access:?} of {addr} through {linear}")
            }
            Self::Breakpoint(addr) => write!(f, "breakpoint at {addr}"),
            other => f.write_str(other.reason().name()),
        }
    }
}

/// A vector to deliver to the guest before its next instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Injection {
    /// An external interrupt; the CPU must be interruptible.
    ExternalInterrupt(Vector),
    /// A non-maskable interrupt.
    Nmi,
}
