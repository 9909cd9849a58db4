//! The board: every device of the machine behind one bus.

use crate::End;
use crate::environment::{Channel, Environment, EnvironmentError};
use serde::{Deserialize, Serialize};
use x86::exit::{AccessData, AccessSize};
use x86::{GuestPhysAddr, Nanos, Vector};

/// What a board is built with; part of a trace.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BoardConfig {
    /// What the real-time clock shows at virtual time 0: seconds since 1970-01-01 00:00:00 UTC.
    pub boot_time: i64,
}

impl Default for BoardConfig {
    /// Powered on at 2000-01-01 00:00:00 UTC.
    fn default() -> Self {
        Self { boot_time: 946_684_800 }
    }
}

/// One device of a saved board.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DeviceState {
    /// Which device.
    pub kind: String,
    /// The format of `bytes`.
    pub version: u16,
    /// Its registers (postcard).
    pub bytes: Vec<u8>,
}

/// A saved board.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BoardState {
    /// Every device, in the board's order.
    pub devices: Vec<DeviceState>,
}

/// Why a saved board cannot be put back.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RestoreError {
    /// A device's bytes are not a state of it.
    #[error("saved state of {kind}: {reason}")]
    Device {
        /// Which device.
        kind: &'static str,
        /// What is wrong.
        reason: String,
    },
}

/// Every device of the machine.
#[derive(Clone, Debug)]
pub struct Board {
    end: Option<End>,
}

impl Board {
    /// A board at power-on.
    pub fn new(_config: &BoardConfig) -> Self {
        Self { end: None }
    }

    /// What an IN of `size` bytes returns.
    pub fn port_read(
        &mut self,
        _port: u16,
        size: AccessSize,
        _env: &mut dyn Environment,
    ) -> Result<u64, EnvironmentError> {
        Ok(u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8))))
    }

    /// An OUT.
    pub fn port_write(
        &mut self,
        _port: u16,
        _data: AccessData,
        _env: &mut dyn Environment,
    ) -> Result<(), EnvironmentError> {
        Ok(())
    }

    /// What a read outside RAM returns.
    pub fn mmio_read(
        &mut self,
        _addr: GuestPhysAddr,
        size: AccessSize,
        _env: &mut dyn Environment,
    ) -> Result<u64, EnvironmentError> {
        Ok(u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8))))
    }

    /// A write outside RAM.
    pub fn mmio_write(
        &mut self,
        _addr: GuestPhysAddr,
        _data: AccessData,
        _env: &mut dyn Environment,
    ) -> Result<(), EnvironmentError> {
        Ok(())
    }

    /// The value of an MSR that belongs to the platform; `None` when there is none.
    pub fn msr_read(&self, _msr: u32) -> Option<u64> {
        None
    }

    /// Writes an MSR that belongs to the platform; false when there is none or it refuses the value.
    pub fn msr_write(&mut self, _msr: u32, _value: u64) -> bool {
        false
    }

    /// When the next timer is due.
    pub fn deadline(&self) -> Option<Nanos> {
        None
    }

    /// Time has come to `now`: what is due fires.
    pub fn time(&mut self, _now: Nanos) {}

    /// Bytes typed at a channel.
    pub fn input(&mut self, _channel: Channel, _bytes: &[u8]) {}

    /// The INTR line.
    pub fn interrupt_pending(&self) -> bool {
        false
    }

    /// An INTA cycle: the vector to deliver, or `None` when INTR is low.
    pub fn acknowledge(&mut self) -> Option<Vector> {
        None
    }

    /// How a device ended the run, once one has.
    pub fn end(&self) -> Option<End> {
        self.end
    }

    /// Everything a board holds.
    pub fn save(&self) -> BoardState {
        BoardState { devices: Vec::new() }
    }

    /// Puts a saved board back; on an error nothing has changed.
    pub fn restore(&mut self, _state: &BoardState) -> Result<(), RestoreError> {
        Ok(())
    }
}
