//! Exit controls: what makes a guest exit.
//!
//! Purpose: one value that mirrors the VMCS's execution controls, the exception bitmap, the I/O and MSR bitmaps and per-page
//! permissions, plus the debugger's breakpoints.
//! Invariants: everything off by default, and what is off costs the guest nothing. An engine that cannot honour a control
//! says so instead of ignoring it.
//! Elsewhere: how an engine makes a condition exit.
//! Source: Intel SDM vol. 3C, 24.6 (VM-execution control fields).

use crate::GuestVirtAddr;
use std::collections::BTreeSet;
use std::fmt;

/// The controls in force for a run.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ExitControls {
    /// Bit n: exception vector n exits instead of being delivered.
    pub exception_bitmap: u32,
    /// MOV to CR3 exits.
    pub cr3_load_exiting: bool,
    /// RDTSC and RDTSCP exit.
    pub rdtsc_exiting: bool,
    /// CPUID exits instead of being answered from the CPU model.
    pub cpuid_exiting: bool,
    /// PAUSE exits.
    pub pause_exiting: bool,
    /// INVLPG exits.
    pub invlpg_exiting: bool,
    /// Exit after each instruction.
    pub monitor_trap_flag: bool,
    /// Instructions that exit before they execute, by linear address under whatever root is current.
    pub breakpoints: BTreeSet<GuestVirtAddr>,
}

/// One control, to name in errors and lists.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)] // As in `ExitControls`.
pub enum Control {
    ExceptionBitmap,
    Cr3LoadExiting,
    RdtscExiting,
    CpuidExiting,
    PauseExiting,
    InvlpgExiting,
    MonitorTrapFlag,
    Breakpoints,
}

impl fmt::Display for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ExceptionBitmap => "exception bitmap",
            Self::Cr3LoadExiting => "CR3-load exiting",
            Self::RdtscExiting => "RDTSC exiting",
            Self::CpuidExiting => "CPUID exiting",
            Self::PauseExiting => "PAUSE exiting",
            Self::InvlpgExiting => "INVLPG exiting",
            Self::MonitorTrapFlag => "monitor trap flag",
            Self::Breakpoints => "breakpoints",
        })
    }
}

impl ExitControls {
    /// The controls that are on, for an engine to check against what it can honour.
    pub fn active(&self) -> impl Iterator<Item = Control> {
        [
            (self.exception_bitmap != 0, Control::ExceptionBitmap),
            (self.cr3_load_exiting, Control::Cr3LoadExiting),
            (self.rdtsc_exiting, Control::RdtscExiting),
            (self.cpuid_exiting, Control::CpuidExiting),
            (self.pause_exiting, Control::PauseExiting),
            (self.invlpg_exiting, Control::InvlpgExiting),
            (self.monitor_trap_flag, Control::MonitorTrapFlag),
            (!self.breakpoints.is_empty(), Control::Breakpoints),
        ]
        .into_iter()
        .filter_map(|(on, control)| on.then_some(control))
    }
}
