//! The two 8259A interrupt controllers, wired as on a PC.
//!
//! Purpose: collect the devices' interrupt lines into INTR and say which vector an INTA cycle returns.
//! Invariants: a pure register machine: what it does follows from line changes, register accesses and INTA cycles. INTR is a function
//! of the state. The slave's INT output drives the master's IR2 as a level, whatever the trigger mode of IR2.
//! A request on an edge-triggered line goes when the line falls before it was acknowledged, as the datasheet says.
//! Elsewhere: who raises the lines ([`super::Board`]); when INTA happens ([`crate::session`]).
//! Source: Intel 8259A datasheet (order 231468); edge/level registers 4D0h and 4D1h from the 82371SB (PIIX3) datasheet, whose
//! rule it follows that ELCR replaces the LTIM bit of ICW1. MCS-80 mode (ICW4 uPM = 0) behaves as 8086 mode.

use super::state::Device;
use serde::{Deserialize, Serialize};

/// Lines that can be level-triggered on each chip: not the timer, keyboard and cascade, nor the clock and the FPU.
const ELCR_MASK: [u8; 2] = [0xf8, 0xde];
/// The master's input that the slave drives.
const CASCADE: u8 = 2;
const MASTER: usize = 0;
const SLAVE: usize = 1;

const ICW1_IC4: u8 = 1 << 0;
const ICW1_SNGL: u8 = 1 << 1;
const ICW1: u8 = 1 << 4;
const ICW4_AEOI: u8 = 1 << 1;
const ICW4_SFNM: u8 = 1 << 4;
const OCW3: u8 = 1 << 3;

/// Which initialisation word the chip waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum Initialisation {
    /// It was never initialised.
    Never,
    Icw2,
    Icw3,
    Icw4,
    Done,
}

/// One 8259A.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Chip {
    /// Input levels.
    lines: u8,
    /// Interrupt request register.
    irr: u8,
    /// In-service register.
    isr: u8,
    /// Interrupt mask register.
    imr: u8,
    /// Level-triggered lines.
    elcr: u8,
    /// ICW2: vector of IR0; the low three bits are zero.
    base: u8,
    initialisation: Initialisation,
    icw1: u8,
    icw3: u8,
    icw4: u8,
    /// The line of lowest priority, 0..=7; the next one up has the highest.
    lowest: u8,
    rotate_on_aeoi: bool,
    special_mask: bool,
    /// A0 = 0 reads ISR instead of IRR.
    read_isr: bool,
    /// The next read is a poll.
    poll: bool,
}

impl Chip {
    fn new() -> Self {
        Self {
            lines: 0,
            irr: 0,
            isr: 0,
            imr: 0,
            elcr: 0,
            base: 0,
            initialisation: Initialisation::Never,
            icw1: 0,
            icw3: 0,
            icw4: 0,
            lowest: 7,
            rotate_on_aeoi: false,
            special_mask: false,
            read_isr: false,
            poll: false,
        }
    }

    fn check(&self) -> Result<(), &'static str> {
        let Self {
            lines: _,
            irr: _,
            isr: _,
            imr: _,
            elcr: _,
            base,
            initialisation: _,
            icw1: _,
            icw3: _,
            icw4: _,
            lowest,
            rotate_on_aeoi: _,
            special_mask: _,
            read_isr: _,
            poll: _,
        } = self;
        if base & 7 != 0 {
            return Err("vector base is no multiple of 8");
        }
        if *lowest > 7 {
            return Err("lowest priority is not a line");
        }
        Ok(())
    }

    fn set_line(&mut self, line: u8, level: bool) {
        let bit = 1 << (line & 7);
        let rising = level && self.lines & bit == 0;
        if level {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
            self.irr &= !bit;
        }
        if rising || (level && self.elcr & bit != 0) {
            self.irr |= bit;
        }
    }

    /// The highest-priority set bit of `set`, as a line.
    fn highest(&self, set: u8) -> Option<u8> {
        // Rotated so that bit 0 is the line of highest priority.
        let rotated = set.rotate_right(u32::from(self.lowest) + 1);
        (rotated != 0).then(|| (rotated.trailing_zeros() as u8 + self.lowest + 1) & 7)
    }

    /// How urgent a line is; 0 is the highest.
    fn rank(&self, line: u8) -> u8 {
        line.wrapping_sub(self.lowest).wrapping_sub(1) & 7
    }

    /// The line whose request gets through, given the request register with the cascade input merged in.
    fn requesting(&self, irr: u8) -> Option<u8> {
        if self.initialisation != Initialisation::Done {
            return None;
        }
        let line = self.highest(irr & !self.imr)?;
        let blocking = if self.special_mask {
            self.isr & !self.imr
        } else {
            self.isr
        };
        match self.highest(blocking) {
            None => Some(line),
            Some(in_service) if self.rank(line) < self.rank(in_service) => Some(line),
            // Special fully nested mode: a slave in service may interrupt again.
            Some(in_service)
                if self.icw4 & ICW4_SFNM != 0
                    && line == in_service
                    && self.icw3 & 1 << line != 0 =>
            {
                Some(line)
            }
            Some(_) => None,
        }
    }

    /// What INTA (or a poll) does to the chip for the line that gets through.
    fn take(&mut self, line: u8) {
        let bit = 1 << (line & 7);
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if self.icw4 & ICW4_AEOI == 0 {
            self.isr |= bit;
        } else if self.rotate_on_aeoi {
            self.lowest = line & 7;
        }
    }

    fn write(&mut self, a0: bool, value: u8) {
        match (a0, value) {
            (false, v) if v & ICW1 != 0 => self.write_icw1(v),
            (false, v) if v & OCW3 != 0 => self.write_ocw3(v),
            (false, v) => self.write_ocw2(v),
            (true, v) => self.write_a1(v),
        }
    }

    fn write_icw1(&mut self, value: u8) {
        self.icw1 = value;
        self.imr = 0;
        self.isr = 0;
        // The edge sense is reset: a line that is high must fall and rise again; level lines request at once.
        self.irr = self.lines & self.elcr;
        self.lowest = 7;
        self.special_mask = false;
        self.read_isr = false;
        self.poll = false;
        self.rotate_on_aeoi = false;
        self.icw4 = 0;
        self.initialisation = Initialisation::Icw2;
    }

    fn write_a1(&mut self, value: u8) {
        let needs_icw4 = self.icw1 & ICW1_IC4 != 0;
        let after_icw3 = if needs_icw4 {
            Initialisation::Icw4
        } else {
            Initialisation::Done
        };
        self.initialisation = match self.initialisation {
            Initialisation::Never | Initialisation::Done => {
                self.imr = value;
                self.initialisation
            }
            Initialisation::Icw2 => {
                self.base = value & 0xf8;
                if self.icw1 & ICW1_SNGL != 0 {
                    after_icw3
                } else {
                    Initialisation::Icw3
                }
            }
            Initialisation::Icw3 => {
                self.icw3 = value;
                after_icw3
            }
            Initialisation::Icw4 => {
                self.icw4 = value;
                Initialisation::Done
            }
        };
    }

    fn write_ocw2(&mut self, value: u8) {
        let level = value & 7;
        match value >> 5 {
            0b000 => self.rotate_on_aeoi = false,
            0b100 => self.rotate_on_aeoi = true,
            0b001 => {
                self.end_highest();
            }
            0b101 => {
                if let Some(line) = self.end_highest() {
                    self.lowest = line;
                }
            }
            0b011 => self.isr &= !(1 << level),
            0b111 => {
                self.isr &= !(1 << level);
                self.lowest = level;
            }
            0b110 => self.lowest = level,
            _ => {} // 010: no operation
        }
    }

    /// Non-specific EOI: the line that was in service.
    fn end_highest(&mut self) -> Option<u8> {
        // In special mask mode a masked line in service is left alone.
        let candidates = if self.special_mask {
            self.isr & !self.imr
        } else {
            self.isr
        };
        let line = self.highest(candidates)?;
        self.isr &= !(1 << line);
        Some(line)
    }

    fn write_ocw3(&mut self, value: u8) {
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
        self.poll = value & 4 != 0;
        if !self.poll && value & 2 != 0 {
            self.read_isr = value & 1 != 0;
        }
    }

    /// A read; `irr` has the cascade input merged in.
    fn read(&mut self, a0: bool, irr: u8) -> u8 {
        if std::mem::take(&mut self.poll) {
            return match self.requesting(irr) {
                Some(line) => {
                    self.take(line);
                    0x80 | line
                }
                None => 0,
            };
        }
        match (a0, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => irr,
        }
    }

    fn set_elcr(&mut self, value: u8) {
        self.elcr = value;
        // A level-triggered request is its line; an edge already latched on it stays only while the line is high.
        self.irr = self.irr & self.lines | self.lines & self.elcr;
    }
}

/// The pair.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Pic {
    chips: [Chip; 2],
}

impl Device for Pic {
    const KIND: &'static str = "8259A";
    const VERSION: u16 = 1;

    fn check(&self) -> Result<(), &'static str> {
        let Self { chips } = self;
        for (chip, mask) in chips.iter().zip(ELCR_MASK) {
            chip.check()?;
            if chip.elcr & !mask != 0 {
                return Err("a line is level-triggered that cannot be");
            }
        }
        Ok(())
    }
}

impl Pic {
    pub(super) fn new() -> Self {
        Self {
            chips: [Chip::new(), Chip::new()],
        }
    }

    /// Drives IRQ `irq`, 0..=15.
    pub(super) fn set_line(&mut self, irq: u8, level: bool) {
        self.chips[usize::from(irq >> 3 & 1)].set_line(irq & 7, level);
    }

    /// A low-to-high edge on IRQ `irq`, which stays high.
    pub(super) fn pulse(&mut self, irq: u8) {
        self.set_line(irq, false);
        self.set_line(irq, true);
    }

    fn slave_int(&self) -> bool {
        self.chips[SLAVE]
            .requesting(self.chips[SLAVE].irr)
            .is_some()
    }

    /// The request register of a chip, with the slave's INT as the master's IR2.
    fn irr(&self, chip: usize) -> u8 {
        let irr = self.chips[chip].irr;
        if chip == MASTER && self.cascaded() {
            irr & !(1 << CASCADE) | u8::from(self.slave_int()) << CASCADE
        } else {
            irr
        }
    }

    fn cascaded(&self) -> bool {
        self.chips[MASTER].icw1 & ICW1_SNGL == 0
    }

    /// The INTR line.
    pub(super) fn intr(&self) -> bool {
        self.chips[MASTER].requesting(self.irr(MASTER)).is_some()
    }

    /// An INTA cycle: the vector. With no request left it is the default one, of IR7 (or IR15), and nothing is in service.
    pub(super) fn acknowledge(&mut self) -> u8 {
        let irr = self.irr(MASTER);
        let master = &mut self.chips[MASTER];
        let Some(line) = master.requesting(irr) else {
            return master.base | 7;
        };
        master.take(line);
        if line != CASCADE || !self.cascaded() {
            return self.chips[MASTER].base | line;
        }
        let slave = &mut self.chips[SLAVE];
        match slave.requesting(slave.irr) {
            Some(line) => {
                slave.take(line);
                slave.base | line
            }
            None => slave.base | 7,
        }
    }

    /// Reads one of ports 20h, 21h, A0h, A1h, 4D0h, 4D1h.
    pub(super) fn read(&mut self, port: u16) -> u8 {
        match port {
            0x4d0 => self.chips[MASTER].elcr,
            0x4d1 => self.chips[SLAVE].elcr,
            _ => {
                let chip = Self::chip(port);
                let irr = self.irr(chip);
                self.chips[chip].read(port & 1 != 0, irr)
            }
        }
    }

    /// Writes one of the same ports.
    pub(super) fn write(&mut self, port: u16, value: u8) {
        match port {
            0x4d0 => self.chips[MASTER].set_elcr(value & ELCR_MASK[MASTER]),
            0x4d1 => self.chips[SLAVE].set_elcr(value & ELCR_MASK[SLAVE]),
            _ => self.chips[Self::chip(port)].write(port & 1 != 0, value),
        }
    }

    fn chip(port: u16) -> usize {
        if port & 0x80 == 0 { MASTER } else { SLAVE }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Initialised as every PC does: vectors 20h and 28h, all lines unmasked.
    fn pair(icw4: u8) -> Pic {
        let mut pic = Pic::new();
        for (port, icw3) in [(0x20, 4), (0xa0, 2)] {
            pic.write(port, 0x11);
            pic.write(port + 1, if port == 0x20 { 0x20 } else { 0x28 });
            pic.write(port + 1, icw3);
            pic.write(port + 1, icw4);
        }
        pic
    }

    fn read_irr(pic: &mut Pic, port: u16) -> u8 {
        pic.write(port, 0x0a);
        pic.read(port)
    }

    fn read_isr(pic: &mut Pic, port: u16) -> u8 {
        pic.write(port, 0x0b);
        pic.read(port)
    }

    #[test]
    fn nothing_gets_through_before_initialisation() {
        let mut pic = Pic::new();
        pic.set_line(0, true);
        assert!(!pic.intr());
        pic.write(0x20, 0x11);
        pic.write(0x21, 0x20);
        pic.write(0x21, 4);
        assert!(!pic.intr(), "ICW4 is missing");
        pic.write(0x21, 1);
        assert!(!pic.intr(), "ICW1 cleared the edge");
        pic.pulse(0);
        assert!(pic.intr());
    }

    #[test]
    fn lower_numbers_win_and_block_until_eoi() {
        let mut pic = pair(1);
        pic.pulse(4);
        pic.pulse(1);
        assert_eq!(pic.acknowledge(), 0x21);
        assert!(!pic.intr(), "IRQ 4 waits for the EOI of IRQ 1");
        pic.pulse(0);
        assert_eq!(pic.acknowledge(), 0x20, "a higher one nests");
        assert_eq!(read_isr(&mut pic, 0x20), 0b11);
        pic.write(0x20, 0x20);
        assert_eq!(
            read_isr(&mut pic, 0x20),
            0b10,
            "non-specific EOI ends the highest"
        );
        pic.write(0x20, 0x61);
        assert_eq!(pic.acknowledge(), 0x24);
    }

    #[test]
    fn an_edge_is_taken_once_and_goes_with_its_line() {
        let mut pic = pair(1);
        pic.set_line(4, true);
        assert_eq!(pic.acknowledge(), 0x24);
        pic.write(0x20, 0x20);
        assert!(
            !pic.intr(),
            "the line is still high, but there was no new edge"
        );
        pic.pulse(4);
        assert!(pic.intr());
        pic.set_line(4, false);
        assert!(!pic.intr());
        assert_eq!(read_irr(&mut pic, 0x20), 0);
    }

    #[test]
    fn a_level_requests_as_long_as_it_is_high() {
        let mut pic = pair(1);
        pic.write(0x4d1, 0xff);
        assert_eq!(pic.read(0x4d1), 0xde, "8 and 13 are always edges");
        pic.set_line(11, true);
        for _ in 0..2 {
            assert_eq!(pic.acknowledge(), 0x2b);
            pic.write(0xa0, 0x20);
            pic.write(0x20, 0x20);
            assert!(pic.intr());
        }
        pic.set_line(11, false);
        assert!(!pic.intr());
    }

    #[test]
    fn without_a_request_the_vector_is_spurious_and_nothing_is_in_service() {
        let mut pic = pair(1);
        assert_eq!(pic.acknowledge(), 0x27);
        assert_eq!(read_isr(&mut pic, 0x20), 0);
    }

    #[test]
    fn the_slave_goes_through_ir2_and_needs_both_eois() {
        let mut pic = pair(1);
        pic.pulse(8);
        assert_eq!(read_irr(&mut pic, 0x20), 4);
        assert_eq!(pic.acknowledge(), 0x28);
        assert_eq!((read_isr(&mut pic, 0x20), read_isr(&mut pic, 0xa0)), (4, 1));
        pic.pulse(12);
        assert!(!pic.intr(), "blocked at the slave");
        pic.write(0xa0, 0x20);
        assert!(!pic.intr(), "blocked at the master");
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x2c);
    }

    #[test]
    fn special_fully_nested_mode_lets_the_slave_interrupt_itself() {
        let mut pic = pair(0x11);
        pic.pulse(12);
        assert_eq!(pic.acknowledge(), 0x2c);
        pic.pulse(3);
        assert!(!pic.intr(), "lower than the cascade");
        pic.pulse(9);
        assert_eq!(pic.acknowledge(), 0x29, "higher within the slave");
    }

    #[test]
    fn masks_hold_requests_back_without_losing_them() {
        let mut pic = pair(1);
        pic.write(0x21, 0xff);
        pic.pulse(0);
        assert!(!pic.intr());
        assert_eq!(read_irr(&mut pic, 0x20), 1);
        pic.write(0x21, 0xfe);
        assert_eq!(pic.acknowledge(), 0x20);
        assert_eq!(pic.read(0x21), 0xfe);
    }

    #[test]
    fn special_mask_mode_lets_lower_lines_through_a_masked_one_in_service() {
        let mut pic = pair(1);
        pic.pulse(1);
        pic.acknowledge();
        pic.pulse(5);
        pic.write(0x21, 1 << 1);
        assert!(!pic.intr());
        pic.write(0x20, 0x68);
        assert_eq!(pic.acknowledge(), 0x25);
        pic.write(0x20, 0x20);
        assert_eq!(
            read_isr(&mut pic, 0x20),
            1 << 1,
            "EOI spares the masked line"
        );
    }

    #[test]
    fn rotation_makes_the_served_line_the_lowest() {
        let mut pic = pair(1);
        for irq in [0, 3, 5] {
            pic.pulse(irq);
        }
        assert_eq!(pic.acknowledge(), 0x20);
        pic.write(0x20, 0xa0);
        pic.pulse(0);
        assert_eq!(pic.acknowledge(), 0x23);
        pic.write(0x20, 0xa0);
        assert_eq!(pic.acknowledge(), 0x25, "0 comes after 4..7");
        pic.write(0x20, 0xe5);
        assert_eq!(pic.acknowledge(), 0x20);
        pic.write(0x20, 0x60);
        pic.write(0x20, 0xc0 | 2);
        pic.pulse(2 + 1);
        pic.pulse(1);
        assert_eq!(
            pic.acknowledge(),
            0x23,
            "set priority: 3 is now the highest"
        );
    }

    #[test]
    fn automatic_eoi_leaves_nothing_in_service() {
        let mut pic = pair(3);
        pic.write(0x20, 0x80);
        pic.pulse(3);
        pic.pulse(4);
        assert_eq!(pic.acknowledge(), 0x23);
        assert_eq!(read_isr(&mut pic, 0x20), 0);
        pic.pulse(3);
        assert_eq!(pic.acknowledge(), 0x24, "rotated");
    }

    #[test]
    fn a_poll_acknowledges_by_reading() {
        let mut pic = pair(1);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0);
        pic.pulse(6);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0x86);
        assert_eq!(read_isr(&mut pic, 0x20), 1 << 6);
        assert!(!pic.intr());
    }

    #[test]
    fn level_lines_request_again_after_initialisation() {
        let mut pic = pair(1);
        pic.write(0x4d0, 1 << 5);
        pic.set_line(5, true);
        pic.write(0x20, 0x11);
        pic.write(0x21, 0x40);
        pic.write(0x21, 4);
        pic.write(0x21, 1);
        assert_eq!(pic.acknowledge(), 0x45);
    }
}
