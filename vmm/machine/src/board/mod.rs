//! The board: every device of the machine behind one bus.
//!
//! Purpose: route port and MMIO accesses to devices, wire their interrupt lines, and keep the timers' next deadline.
//! Invariants:
//! - A board has no clock: the time comes in when the guest accesses a register that shows it ([`Environment::now`]) and
//!   when the loop says so ([`Board::time`]). It never runs backwards here. Two boards fed alike are alike.
//! - The bus is eight bits wide: a wider access is made byte by byte, lowest port first, as ISA does. Where nothing is, reads are all
//!   ones and writes go nowhere. No access can fail by itself, whatever the guest sends.
//! - What a board holds is what [`Board::save`] returns.
//!
//! The machine: two 8259A (20h, A0h, 4D0h), 8254 (40h, IRQ 0), port 61h, 8042 (60h and 64h, IRQ 1 and 12), POST code (80h), MC146818 (70h,
//! IRQ 8), 16550 (3F8h, IRQ 4), debug console (E9h), debug exit (F4h). There is no PCI: CF8h and CFCh read all ones, which is how
//! system software finds out. There is no local APIC and no I/O APIC yet: their pages read all ones.
//!
//! Elsewhere: RAM ([`crate::memory`]), the loop ([`crate::session`]).
//! Source: IBM PC AT Technical Reference; the datasheets are named in each device.

mod i8042;
mod pic;
mod pit;
mod power;
mod rtc;
mod state;
mod system_control;
#[cfg(test)]
mod tests;
mod uart;

use crate::End;
use crate::environment::{Channel, Environment, EnvironmentError};
use i8042::I8042;
use pic::Pic;
use pit::Pit;
use power::Power;
use rtc::Rtc;
use serde::{Deserialize, Serialize};
pub use state::{BoardState, DeviceState, RestoreError};
use system_control::SystemControl;
use uart::Uart;
use x86::exit::{AccessData, AccessSize};
use x86::msr::index::IA32_BIOS_SIGN_ID;
use x86::{GuestPhysAddr, Nanos, Vector};

const KEYBOARD_IRQ: u8 = 1;
const COM1_IRQ: u8 = 4;
const RTC_IRQ: u8 = 8;
const AUX_IRQ: u8 = 12;

/// The byte that says the debug console is there.
const DEBUG_CONSOLE_PRESENT: u8 = 0xe9;

/// What a board is built with; part of a trace.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BoardConfig {
    /// What the real-time clock shows at virtual time 0: seconds since 1970-01-01 00:00:00 UTC, up to the year 9999.
    pub boot_time: i64,
}

impl Default for BoardConfig {
    /// Powered on at 2000-01-01 00:00:00 UTC.
    fn default() -> Self {
        Self {
            boot_time: 946_684_800,
        }
    }
}

/// Every device of the machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Board {
    pic: Pic,
    pit: Pit,
    rtc: Rtc,
    uart: Uart,
    i8042: I8042,
    system_control: SystemControl,
    power: Power,
    /// Follows from the timers; kept because every entry asks for it.
    deadline: Option<Nanos>,
}

impl Board {
    /// A board at power-on.
    pub fn new(config: &BoardConfig) -> Self {
        let mut board = Self {
            pic: Pic::new(),
            pit: Pit::new(),
            rtc: Rtc::new(config.boot_time),
            uart: Uart::new(),
            i8042: I8042::new(),
            system_control: SystemControl::new(),
            power: Power::new(),
            deadline: None,
        };
        board.wire_timers(); // lines that are high at power-on are no edges later
        board
    }

    /// What an IN of `size` bytes returns.
    pub fn port_read(
        &mut self,
        port: u16,
        size: AccessSize,
        env: &mut dyn Environment,
    ) -> Result<u64, EnvironmentError> {
        let mut value = 0;
        for n in 0..u16::from(size.min(8)) {
            let byte = self.read_byte(port.wrapping_add(n), env)?;
            value |= u64::from(byte) << (8 * n);
        }
        Ok(value)
    }

    /// An OUT.
    pub fn port_write(
        &mut self,
        port: u16,
        data: AccessData,
        env: &mut dyn Environment,
    ) -> Result<(), EnvironmentError> {
        let bytes = data.value.to_le_bytes();
        for (n, &byte) in (0..u16::from(data.size)).zip(&bytes) {
            self.write_byte(port.wrapping_add(n), byte, env)?;
        }
        Ok(())
    }

    fn read_byte(&mut self, port: u16, env: &mut dyn Environment) -> Result<u8, EnvironmentError> {
        Ok(match port {
            0x3f8..=0x3ff => {
                let value = self.uart.read(port - 0x3f8);
                self.wire_uart();
                value
            }
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => self.pic.read(port),
            0x40..=0x43 => {
                self.time(env.now()?);
                self.pit.read(port)
            }
            0x60 | 0x64 => {
                let value = self.i8042.read(port == 0x64);
                self.wire_i8042();
                value
            }
            0x61 => {
                self.time(env.now()?);
                self.system_control.read_port_b(&self.pit)
            }
            0x71 => {
                self.time(env.now()?);
                let value = self.rtc.read();
                self.wire_timers();
                value
            }
            0x80 => self.system_control.post_code,
            0xe9 => DEBUG_CONSOLE_PRESENT,
            _ => 0xff,
        })
    }

    fn write_byte(
        &mut self,
        port: u16,
        value: u8,
        env: &mut dyn Environment,
    ) -> Result<(), EnvironmentError> {
        match port {
            0x3f8..=0x3ff => {
                if let Some(sent) = self.uart.write(port - 0x3f8, value) {
                    env.output(Channel::Com1, &[sent])?;
                }
                self.wire_uart();
            }
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => self.pic.write(port, value),
            0x40..=0x43 => {
                self.time(env.now()?);
                self.pit.write(port, value);
                self.wire_timers();
            }
            0x60 | 0x64 => {
                if self.i8042.write(port == 0x64, value) {
                    self.power.set(End::Reset);
                }
                self.wire_i8042();
            }
            0x61 => {
                self.time(env.now()?);
                self.system_control.write_port_b(value, &mut self.pit);
            }
            0x70 => self.rtc.select(value),
            0x71 => {
                self.time(env.now()?);
                self.rtc.write(value);
                self.wire_timers();
            }
            0x80 => self.system_control.post_code = value,
            0xe9 => env.output(Channel::DebugConsole, &[value])?,
            0xf4 => self.power.set(End::DebugExit(value)),
            _ => {}
        }
        Ok(())
    }

    fn wire_uart(&mut self) {
        self.pic.set_line(COM1_IRQ, self.uart.irq());
    }

    fn wire_i8042(&mut self) {
        self.pic.set_line(KEYBOARD_IRQ, self.i8042.keyboard_irq());
        self.pic.set_line(AUX_IRQ, self.i8042.aux_irq());
    }

    fn wire_timers(&mut self) {
        let irq0 = self.pit.irq0();
        if irq0.rose {
            self.pic.pulse(0);
        }
        self.pic.set_line(0, irq0.level);
        self.pic.set_line(RTC_IRQ, self.rtc.irq());
        self.deadline = self.timers_deadline();
    }

    fn timers_deadline(&self) -> Option<Nanos> {
        self.pit
            .deadline()
            .into_iter()
            .chain(self.rtc.deadline())
            .min()
    }

    /// What a read outside RAM returns: there is no device, so all ones.
    pub fn mmio_read(
        &mut self,
        _addr: GuestPhysAddr,
        size: AccessSize,
        _env: &mut dyn Environment,
    ) -> Result<u64, EnvironmentError> {
        let bits = 8 * u32::from(size.min(8));
        Ok(u64::MAX.checked_shr(64 - bits).unwrap_or(0))
    }

    /// A write outside RAM: there is no device, so it goes nowhere.
    pub fn mmio_write(
        &mut self,
        _addr: GuestPhysAddr,
        _data: AccessData,
        _env: &mut dyn Environment,
    ) -> Result<(), EnvironmentError> {
        Ok(())
    }

    /// The value of an MSR that belongs to the platform; `None` when there is none.
    pub fn msr_read(&self, msr: u32) -> Option<u64> {
        // No microcode update was ever loaded.
        (msr == IA32_BIOS_SIGN_ID).then_some(0)
    }

    /// Writes an MSR that belongs to the platform; false when there is none or it refuses the value.
    pub fn msr_write(&mut self, msr: u32, _value: u64) -> bool {
        // Software writes it before it reads the revision back; the write itself has no effect.
        msr == IA32_BIOS_SIGN_ID
    }

    /// When the next timer is due, in virtual time; may lie in the past when a device was accessed late.
    pub fn deadline(&self) -> Option<Nanos> {
        self.deadline
    }

    /// Time has come to `now`: what is due fires.
    pub fn time(&mut self, now: Nanos) {
        self.pit.advance(now);
        self.rtc.advance(now);
        self.wire_timers();
    }

    /// Bytes typed at a channel. The debug console takes none.
    pub fn input(&mut self, channel: Channel, bytes: &[u8]) {
        match channel {
            Channel::Com1 => {
                self.uart.receive(bytes);
                self.wire_uart();
            }
            Channel::DebugConsole => {}
        }
    }

    /// How many bytes of input the serial port takes now without losing any.
    pub fn input_room(&self) -> usize {
        self.uart.room()
    }

    /// The INTR line.
    pub fn interrupt_pending(&self) -> bool {
        self.pic.intr()
    }

    /// An INTA cycle: the vector to deliver, or `None` when INTR is low.
    pub fn acknowledge(&mut self) -> Option<Vector> {
        self.pic.intr().then(|| Vector(self.pic.acknowledge()))
    }

    /// How a device ended the run, once one has.
    pub fn end(&self) -> Option<End> {
        self.power.end()
    }

    /// The last byte written to the POST code port, 80h.
    pub fn post_code(&self) -> u8 {
        self.system_control.post_code
    }

    /// Everything the board holds.
    pub fn save(&self) -> BoardState {
        let Self {
            pic,
            pit,
            rtc,
            uart,
            i8042,
            system_control,
            power,
            deadline: _,
        } = self;
        BoardState {
            devices: vec![
                state::save(pic),
                state::save(pit),
                state::save(rtc),
                state::save(uart),
                state::save(i8042),
                state::save(system_control),
                state::save(power),
            ],
        }
    }

    /// Puts a saved board back; on an error nothing has changed.
    pub fn restore(&mut self, state: &BoardState) -> Result<(), RestoreError> {
        let [pic, pit, rtc, uart, i8042, system_control, power] = state.devices.as_slice() else {
            return Err(RestoreError::DeviceCount {
                found: state.devices.len(),
                expected: 7,
            });
        };
        let mut restored = Self {
            pic: state::load(pic)?,
            pit: state::load(pit)?,
            rtc: state::load(rtc)?,
            uart: state::load(uart)?,
            i8042: state::load(i8042)?,
            system_control: state::load(system_control)?,
            power: state::load(power)?,
            deadline: None,
        };
        restored.deadline = restored.timers_deadline();
        *self = restored;
        Ok(())
    }
}
