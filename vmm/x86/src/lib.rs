//! The x86 processor as data.
//!
//! Purpose: the vocabulary every other crate speaks: typed addresses and clocks, the complete
//! architectural state of a CPU, page-table formats, VM exits under the Intel SDM's names, the controls
//! that decide what exits, and the CPU models a guest may be shown.
//!
//! Invariants: nothing here runs a guest, touches the host or holds guest memory. Every type is a plain value:
//! owned, comparable, and (where it is part of a saved machine or a trace) serialisable.
//!
//! Elsewhere: running instructions (`vmm/soft`, `vmm/kvm`), the machine around the CPU (`vmm/machine`).
//!
//! Source: Intel SDM volumes 1 and 3 (chapters are named in each module).

mod addr;
mod clock;
pub mod controls;
pub mod cpu_model;
pub mod exception;
pub mod exit;
pub mod msr;
pub mod paging;
pub mod regs;
pub mod segment;
mod state;

pub use addr::{GuestPhysAddr, GuestVirtAddr, PAGE_SIZE, PageFrame};
pub use clock::{Instructions, Nanos, ParsePositionError, Position};
pub use controls::ExitControls;
pub use cpu_model::CpuModel;
pub use exception::{Exception, Vector};
pub use exit::{Exit, ExitReason};
pub use regs::{Gpr, Registers};
pub use segment::{DescriptorTable, Segment, SegmentRegister};
pub use state::{Activity, CpuMode, CpuState, FpuState, InterruptShadow, MXCSR_MASK, VcpuId};
