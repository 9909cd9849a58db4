//! How a run ends.
//!
//! Purpose: one value for every way a machine stops by itself or is stopped, and its process exit status.
//! Invariants: an end is the guest's or the user's doing; failures of the host are errors.

use serde::{Deserialize, Serialize};
use std::fmt;

/// How a run ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum End {
    /// The guest wrote this byte to the debug-exit port (F4h).
    DebugExit(u8),
    /// A triple fault.
    TripleFault,
    /// The guest asked for a reset (i8042 command FEh).
    Reset,
    /// The CPU halted with interrupts off: nothing can wake it.
    HaltedForever,
    /// Somebody asked the run to stop.
    Stopped,
}

impl End {
    /// The exit status of a command that ran the guest: the debug-exit byte itself; 0 for a halt for good or a stop asked for;
    /// 124 for a triple fault, 123 for a reset.
    pub const fn status(self) -> u8 {
        match self {
            Self::DebugExit(value) => value,
            Self::TripleFault => 124,
            Self::Reset => 123,
            Self::HaltedForever | Self::Stopped => 0,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DebugExit(value) => write!(f, "debug exit with {value}"),
            Self::TripleFault => f.write_str("triple fault"),
            Self::Reset => f.write_str("reset by the guest"),
            Self::HaltedForever => f.write_str("halted with interrupts off"),
            Self::Stopped => f.write_str("stopped"),
        }
    }
}
