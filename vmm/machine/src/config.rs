//! What a machine is made of.
//!
//! Purpose: the one description from which a run, a recording and a replay make their machine; a trace begins with it.
//! Invariants: two machines built from equal configurations are equal, byte for byte; building reads no clock and no file. The configuration may come from a
//! trace, so everything in it is checked.
//! Elsewhere: CPU models ([`x86::CpuModel`]); who executes it ([`crate::engine`]).

use crate::board::{Board, BoardConfig};
use crate::boot::{self, BootError};
use crate::memory::{CreateMemoryError, GuestMemory};
use serde::{Deserialize, Serialize};
use x86::{CpuModel, CpuState};

/// A machine and what it boots.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Bytes of RAM: a multiple of 4 KiB between 1 MiB and 3 GiB.
    pub memory: u64,
    /// What CPUID says.
    pub cpu_model: CpuModel,
    /// The devices' settings.
    pub board: BoardConfig,
    /// The kernel's file.
    pub kernel: Vec<u8>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// Why a machine cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// No memory.
    #[error(transparent)]
    Memory(#[from] CreateMemoryError),
    /// No kernel.
    #[error(transparent)]
    Boot(#[from] BootError),
}

impl MachineConfig {
    /// RAM of a machine of which nothing else was asked.
    pub const DEFAULT_MEMORY: u64 = 64 << 20;

    /// Makes the machine: its memory with the kernel loaded, its board at power-on and its CPU at the kernel's entry.
    pub fn build(&self) -> Result<(GuestMemory, Board, CpuState), BuildError> {
        let memory = GuestMemory::new(self.memory)?;
        let cpu = boot::load(&self.kernel, &self.cmdline, &memory)?;
        Ok((memory, Board::new(&self.board), cpu))
    }
}
