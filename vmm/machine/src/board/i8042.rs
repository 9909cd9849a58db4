//! The 8042 keyboard controller.
//!
//! Purpose: what operating systems ask of it at boot, and the reset line. No keyboard or mouse is attached: bytes sent to
//! one get no reply.
//! Invariants: a pure register machine; commands are done at once, so the input buffer is always empty.
//! Elsewhere: what a reset means ([`super::power`]). A20 is always open; its bit is only remembered.
//! Source: IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller".

use super::state::Device;
use serde::{Deserialize, Serialize};

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;
const STATUS_AUX: u8 = 1 << 5;

const COMMAND_BYTE_KEYBOARD_INTERRUPT: u8 = 1 << 0;
const COMMAND_BYTE_AUX_INTERRUPT: u8 = 1 << 1;
const COMMAND_BYTE_SYSTEM: u8 = 1 << 2;
const COMMAND_BYTE_KEYBOARD_DISABLED: u8 = 1 << 4;
const COMMAND_BYTE_AUX_DISABLED: u8 = 1 << 5;

/// Output port: bit 0 low resets the CPU, bit 1 opens A20.
const OUTPUT_PORT_NO_RESET: u8 = 1 << 0;
const OUTPUT_PORT_A20: u8 = 1 << 1;

/// A byte for the CPU to read at port 60h.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Output {
    byte: u8,
    aux: bool,
}

/// The controller.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct I8042 {
    /// Controller RAM; byte 0 is the command byte.
    ram: [u8; 32],
    output: Option<Output>,
    output_port: u8,
    /// A command that waits for its data byte.
    command: Option<u8>,
    /// The last write went to port 64h.
    last_was_command: bool,
}

impl Device for I8042 {
    const KIND: &'static str = "8042";
    const VERSION: u16 = 1;

    fn check(&self) -> Result<(), &'static str> {
        let Self {
            ram: _,
            output: _,
            output_port: _,
            command: _,
            last_was_command: _,
        } = self;
        Ok(())
    }
}

impl I8042 {
    pub(super) fn new() -> Self {
        let mut ram = [0; 32];
        ram[0] = COMMAND_BYTE_KEYBOARD_DISABLED | COMMAND_BYTE_AUX_DISABLED;
        Self {
            ram,
            output: None,
            output_port: OUTPUT_PORT_NO_RESET | OUTPUT_PORT_A20,
            command: None,
            last_was_command: false,
        }
    }

    fn command_byte(&self) -> u8 {
        self.ram[0]
    }

    /// IRQ 1.
    pub(super) fn keyboard_irq(&self) -> bool {
        self.command_byte() & COMMAND_BYTE_KEYBOARD_INTERRUPT != 0
            && self.output.is_some_and(|output| !output.aux)
    }

    /// IRQ 12.
    pub(super) fn aux_irq(&self) -> bool {
        self.command_byte() & COMMAND_BYTE_AUX_INTERRUPT != 0
            && self.output.is_some_and(|output| output.aux)
    }

    /// Reads port 60h (`command` false) or 64h.
    pub(super) fn read(&mut self, command: bool) -> u8 {
        if !command {
            return self.output.take().map_or(0, |output| output.byte);
        }
        let mut status = STATUS_UNLOCKED;
        if let Some(output) = self.output {
            status |= STATUS_OUTPUT_FULL;
            if output.aux {
                status |= STATUS_AUX;
            }
        }
        if self.command_byte() & COMMAND_BYTE_SYSTEM != 0 {
            status |= STATUS_SYSTEM;
        }
        if self.last_was_command {
            status |= STATUS_COMMAND;
        }
        status
    }

    /// Writes port 60h (`command` false) or 64h. Returns whether the reset line was pulled.
    #[must_use]
    pub(super) fn write(&mut self, command: bool, value: u8) -> bool {
        self.last_was_command = command;
        if command {
            self.write_command(value)
        } else {
            self.write_data(value)
        }
    }

    fn reply(&mut self, byte: u8) {
        self.output = Some(Output { byte, aux: false });
    }

    fn write_command(&mut self, value: u8) -> bool {
        self.command = None;
        match value {
            0x20..=0x3f => self.reply(self.ram[usize::from(value & 0x1f)]),
            0x60..=0x7f | 0xd1..=0xd4 => self.command = Some(value),
            0xa7 => self.ram[0] |= COMMAND_BYTE_AUX_DISABLED,
            0xa8 => self.ram[0] &= !COMMAND_BYTE_AUX_DISABLED,
            0xa9 | 0xab => self.reply(0), // interface tests: no error
            0xaa => {
                self.ram[0] |= COMMAND_BYTE_SYSTEM;
                self.reply(0x55);
            }
            0xad => self.ram[0] |= COMMAND_BYTE_KEYBOARD_DISABLED,
            0xae => self.ram[0] &= !COMMAND_BYTE_KEYBOARD_DISABLED,
            0xc0 => self.reply(0x80), // input port: keyboard not locked
            0xd0 => self.reply(self.output_port),
            0xf0..=0xff => return value & OUTPUT_PORT_NO_RESET == 0, // pulses the lines whose bits are 0
            _ => {}
        }
        false
    }

    fn write_data(&mut self, value: u8) -> bool {
        match self.command.take() {
            Some(command @ 0x60..=0x7f) => self.ram[usize::from(command & 0x1f)] = value,
            Some(0xd1) => {
                self.output_port = value | OUTPUT_PORT_NO_RESET;
                return value & OUTPUT_PORT_NO_RESET == 0;
            }
            Some(0xd2) => self.reply(value),
            Some(0xd3) => {
                self.output = Some(Output {
                    byte: value,
                    aux: true,
                })
            }
            _ => {} // for a keyboard or mouse that is not there
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(controller: &mut I8042, command: u8) -> u8 {
        assert!(!controller.write(true, command));
        assert_eq!(
            controller.read(true) & STATUS_OUTPUT_FULL,
            STATUS_OUTPUT_FULL
        );
        let reply = controller.read(false);
        assert_eq!(controller.read(true) & STATUS_OUTPUT_FULL, 0);
        reply
    }

    #[test]
    fn self_tests_pass() {
        let mut controller = I8042::new();
        assert_eq!(ask(&mut controller, 0xaa), 0x55);
        assert_eq!(ask(&mut controller, 0xab), 0);
        assert_eq!(controller.read(true) & STATUS_SYSTEM, STATUS_SYSTEM);
    }

    #[test]
    fn the_command_byte_is_kept_and_gates_the_interrupt() {
        let mut controller = I8042::new();
        assert!(!controller.write(true, 0x60));
        assert!(!controller.write(false, 0x03));
        assert_eq!(ask(&mut controller, 0x20), 0x03);
        for (command, irqs) in [(0xd2, (true, false)), (0xd3, (false, true))] {
            assert!(!controller.write(true, command));
            assert!(!controller.write(false, 0x42));
            assert_eq!((controller.keyboard_irq(), controller.aux_irq()), irqs);
            assert_eq!(controller.read(false), 0x42);
            assert!(!controller.keyboard_irq() && !controller.aux_irq());
        }
    }

    #[test]
    fn reset_by_pulse_and_by_output_port() {
        let mut controller = I8042::new();
        assert!(controller.write(true, 0xfe));
        assert!(!controller.write(true, 0xff), "pulses nothing");
        assert!(!controller.write(true, 0xd1));
        assert!(!controller.write(false, 0x03));
        assert!(!controller.write(true, 0xd1));
        assert!(controller.write(false, 0x02));
    }

    #[test]
    fn nobody_answers_for_a_missing_keyboard() {
        let mut controller = I8042::new();
        assert!(!controller.write(false, 0xff));
        assert_eq!(controller.read(true) & STATUS_OUTPUT_FULL, 0);
    }
}
