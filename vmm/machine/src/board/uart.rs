//! A 16550 serial port.
//!
//! Purpose: the console. Sent bytes leave at once; received bytes go through the FIFO and raise the interrupt.
//! Invariants: a pure register machine without a clock: the transmitter is always empty, and bytes that stay below the FIFO's trigger
//! level report the character timeout at once. What does not fit the FIFO waits in a queue that is part of the state; what
//! does not fit the queue is lost, as an overrun. The interrupt follows INTRPT; the PC's OUT2 gate is left out, because guests exist that
//! forget it.
//! Elsewhere: where the bytes come from and go to ([`crate::environment`]).
//! Source: National PC16550D datasheet. The `Serial` of vm-superio was looked at and not used: it writes through generic sinks
//! and triggers from inside a register access, knows no FIFO control, trigger level or overrun, and takes input only as
//! far as its own buffer goes.

use super::state::Device;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Bytes that wait for room in the FIFO.
const QUEUE_LIMIT: usize = 4 << 10;
const FIFO_SIZE: usize = 16;

const IER_MASK: u8 = 0x0f;
const IER_RDA: u8 = 1 << 0;
const IER_THRE: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_MODEM: u8 = 1 << 3;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM: u8 = 0x00;
const IIR_THRE: u8 = 0x02;
const IIR_RDA: u8 = 0x04;
const IIR_LINE: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFOS: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;
/// What of the FIFO control register stays: enable, DMA mode, trigger level.
const FCR_KEPT: u8 = 0xc9;

const LCR_DLAB: u8 = 1 << 7;

const MCR_MASK: u8 = 0x1f;
const MCR_LOOP: u8 = 1 << 4;

const LSR_DR: u8 = 1 << 0;
const LSR_OE: u8 = 1 << 1;
/// Transmitter holding register and transmitter empty.
const LSR_EMPTY: u8 = 0x60;

/// CTS, DSR and DCD: somebody is listening.
const MSR_CONNECTED: u8 = 0xb0;

/// The port.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Uart {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    /// Overrun has happened since LSR was read.
    overrun: bool,
    /// The modem status as last seen, for the delta bits.
    modem_deltas: u8,
    scratch: u8,
    divisor: u16,
    /// The transmitter-empty interrupt is owed.
    thre_pending: bool,
    /// The guest has looked for input; before that all of it waits in the queue, so that what was typed ahead is not lost when a
    /// driver clears the FIFO to begin with.
    listening: bool,
    fifo: VecDeque<u8>,
    queue: VecDeque<u8>,
}

impl Device for Uart {
    const KIND: &'static str = "16550";
    const VERSION: u16 = 1;

    fn check(&self) -> Result<(), &'static str> {
        let Self {
            ier,
            fcr,
            lcr: _,
            mcr,
            overrun: _,
            modem_deltas,
            scratch: _,
            divisor: _,
            thre_pending: _,
            listening,
            fifo,
            queue,
        } = self;
        if ier & !IER_MASK != 0 || fcr & !FCR_KEPT != 0 || mcr & !MCR_MASK != 0 {
            return Err("a reserved bit is set");
        }
        if modem_deltas & 0xf0 != 0 {
            return Err("modem deltas out of range");
        }
        if fifo.len() > self.capacity() || queue.len() > QUEUE_LIMIT {
            return Err("more input than fits");
        }
        if *listening && !queue.is_empty() && fifo.len() < self.capacity() {
            return Err("input waits although there is room");
        }
        Ok(())
    }
}

impl Uart {
    pub(super) fn new() -> Self {
        Self {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            overrun: false,
            modem_deltas: 0,
            scratch: 0,
            divisor: 12, // 9600 baud
            thre_pending: false,
            listening: false,
            fifo: VecDeque::new(),
            queue: VecDeque::new(),
        }
    }

    fn fifos_enabled(&self) -> bool {
        self.fcr & FCR_ENABLE != 0
    }

    /// Bytes the receiver holds: the FIFO, or the one holding register.
    fn capacity(&self) -> usize {
        if self.fifos_enabled() { FIFO_SIZE } else { 1 }
    }

    fn trigger_level(&self) -> usize {
        if self.fifos_enabled() {
            [1, 4, 8, 14][usize::from(self.fcr >> 6)]
        } else {
            1
        }
    }

    /// Bytes arrive on the line.
    pub(super) fn receive(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if self.listening && self.fifo.len() < self.capacity() {
                self.fifo.push_back(byte);
            } else if self.queue.len() < QUEUE_LIMIT {
                self.queue.push_back(byte);
            } else {
                self.overrun = true;
            }
        }
    }

    /// Bytes that can be received now without loss.
    pub(super) fn room(&self) -> usize {
        let fifo = if self.listening {
            self.capacity() - self.fifo.len()
        } else {
            0
        };
        fifo + QUEUE_LIMIT - self.queue.len()
    }

    /// The guest looks for input.
    fn listen(&mut self) {
        if !self.listening {
            self.listening = true;
            self.refill();
        }
    }

    fn refill(&mut self) {
        while self.listening && self.fifo.len() < self.capacity() {
            let Some(byte) = self.queue.pop_front() else {
                return;
            };
            self.fifo.push_back(byte);
        }
    }

    /// The four modem inputs, in MSR's high nibble.
    fn modem_inputs(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return MSR_CONNECTED;
        }
        // DTR -> DSR, RTS -> CTS, OUT1 -> RI, OUT2 -> DCD.
        (self.mcr & 1) << 5 | (self.mcr & 2) << 3 | (self.mcr & 4) << 4 | (self.mcr & 8) << 4
    }

    /// The pending interrupt of highest priority, as IIR encodes it.
    fn interrupt(&self) -> u8 {
        if self.ier & IER_LINE != 0 && self.overrun {
            IIR_LINE
        } else if self.ier & IER_RDA != 0 && self.fifo.len() >= self.trigger_level() {
            IIR_RDA
        } else if self.ier & IER_RDA != 0 && !self.fifo.is_empty() {
            IIR_TIMEOUT
        } else if self.ier & IER_THRE != 0 && self.thre_pending {
            IIR_THRE
        } else if self.ier & IER_MODEM != 0 && self.modem_deltas != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    /// The interrupt output.
    pub(super) fn irq(&self) -> bool {
        self.interrupt() != IIR_NONE
    }

    /// Reads register `offset`, 0..=7.
    pub(super) fn read(&mut self, offset: u16) -> u8 {
        let [divisor_low, divisor_high] = self.divisor.to_le_bytes();
        match (offset & 7, self.lcr & LCR_DLAB != 0) {
            (0, true) => divisor_low,
            (1, true) => divisor_high,
            (0, false) => {
                self.listen();
                let byte = self.fifo.pop_front().unwrap_or(0);
                self.refill();
                byte
            }
            (1, false) => self.ier,
            (2, _) => {
                let iir = self.interrupt();
                if iir == IIR_THRE {
                    self.thre_pending = false;
                }
                if self.fifos_enabled() {
                    iir | IIR_FIFOS
                } else {
                    iir
                }
            }
            (3, _) => self.lcr,
            (4, _) => self.mcr,
            (5, _) => {
                self.listen();
                let overrun = std::mem::take(&mut self.overrun);
                LSR_EMPTY
                    | if self.fifo.is_empty() { 0 } else { LSR_DR }
                    | if overrun { LSR_OE } else { 0 }
            }
            (6, _) => self.modem_inputs() | std::mem::take(&mut self.modem_deltas),
            _ => self.scratch,
        }
    }

    /// Writes register `offset`, 0..=7. Returns the byte that leaves on the line, if one does.
    pub(super) fn write(&mut self, offset: u16, value: u8) -> Option<u8> {
        let [divisor_low, divisor_high] = self.divisor.to_le_bytes();
        match (offset & 7, self.lcr & LCR_DLAB != 0) {
            (0, true) => self.divisor = u16::from_le_bytes([value, divisor_high]),
            (1, true) => self.divisor = u16::from_le_bytes([divisor_low, value]),
            (0, false) => return self.transmit(value),
            (1, false) => {
                // The transmitter is empty: enabling its interrupt raises it.
                self.thre_pending |= value & !self.ier & IER_THRE != 0;
                self.ier = value & IER_MASK;
                if value & IER_RDA != 0 {
                    self.listen();
                }
            }
            (2, _) => self.write_fcr(value),
            (3, _) => self.lcr = value,
            (4, _) => self.write_mcr(value),
            (7, _) => self.scratch = value,
            _ => {} // LSR and MSR are read-only.
        }
        None
    }

    fn transmit(&mut self, byte: u8) -> Option<u8> {
        self.thre_pending = true;
        if self.mcr & MCR_LOOP == 0 {
            return Some(byte);
        }
        if self.fifo.len() < self.capacity() {
            self.fifo.push_back(byte);
        } else {
            self.overrun = true;
        }
        None
    }

    fn write_fcr(&mut self, value: u8) {
        let toggled = (value ^ self.fcr) & FCR_ENABLE != 0;
        // The other bits count only while bit 0 is written as 1.
        self.fcr = if value & FCR_ENABLE != 0 {
            value & FCR_KEPT
        } else {
            0
        };
        if toggled || value & (FCR_ENABLE | FCR_CLEAR_RECEIVER) == FCR_ENABLE | FCR_CLEAR_RECEIVER {
            self.fifo.clear();
            self.refill();
        }
    }

    fn write_mcr(&mut self, value: u8) {
        let before = self.modem_inputs();
        self.mcr = value & MCR_MASK;
        let after = self.modem_inputs();
        let changed = (before ^ after) >> 4;
        // CTS, DSR and DCD report any change; RI only its falling edge.
        self.modem_deltas |= changed & 0b1011 | changed & before >> 4 & 0b0100;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(uart: &mut Uart) -> Vec<u8> {
        let mut bytes = Vec::new();
        while uart.read(5) & LSR_DR != 0 {
            bytes.push(uart.read(0));
        }
        bytes
    }

    #[test]
    fn sent_bytes_leave_at_once() {
        let mut uart = Uart::new();
        assert_eq!(uart.read(5), LSR_EMPTY);
        assert_eq!(uart.write(0, b'x'), Some(b'x'));
        assert_eq!(uart.read(5), LSR_EMPTY);
    }

    #[test]
    fn the_divisor_hides_data_and_interrupt_enable() {
        let mut uart = Uart::new();
        uart.write(3, 0x80);
        assert_eq!(uart.write(0, 1), None);
        uart.write(1, 2);
        assert_eq!((uart.read(0), uart.read(1)), (1, 2));
        uart.write(3, 3);
        assert_eq!(uart.read(1), 0);
        assert_eq!(uart.read(3), 3);
    }

    #[test]
    fn input_waits_in_order_with_and_without_fifo() {
        let text: Vec<u8> = (0..100).collect();
        for fcr in [0, 1] {
            let mut uart = Uart::new();
            uart.write(2, fcr);
            uart.receive(&text);
            assert_eq!(received(&mut uart), text);
        }
    }

    #[test]
    fn too_much_input_is_an_overrun() {
        let mut uart = Uart::new();
        assert_eq!(uart.room(), QUEUE_LIMIT);
        uart.listen();
        assert_eq!(uart.room(), QUEUE_LIMIT + 1);
        uart.receive(&vec![7; QUEUE_LIMIT + 1]);
        assert_eq!(uart.room(), 0);
        assert_eq!(
            uart.read(5),
            LSR_EMPTY | LSR_DR,
            "the last one fits the holding register"
        );
        uart.receive(&[8]);
        uart.write(1, IER_LINE);
        assert!(uart.irq());
        assert_eq!(uart.read(2), IIR_LINE);
        assert_eq!(uart.read(5) & LSR_OE, LSR_OE);
        assert_eq!(uart.read(5) & LSR_OE, 0);
        assert!(!uart.irq());
        assert_eq!(received(&mut uart).len(), QUEUE_LIMIT + 1);
    }

    #[test]
    fn the_trigger_level_tells_data_from_timeout() {
        let mut uart = Uart::new();
        uart.write(2, 0x41);
        uart.write(1, IER_RDA);
        assert_eq!(uart.read(2), IIR_FIFOS | IIR_NONE);
        uart.receive(b"abc");
        assert_eq!(uart.read(2), IIR_FIFOS | IIR_TIMEOUT);
        uart.receive(b"d");
        assert_eq!(uart.read(2), IIR_FIFOS | IIR_RDA);
        assert!(uart.irq());
        assert_eq!(received(&mut uart), b"abcd");
        assert!(!uart.irq());
    }

    #[test]
    fn the_transmitter_interrupt_goes_by_reading_iir() {
        let mut uart = Uart::new();
        uart.write(1, IER_THRE);
        assert!(uart.irq(), "enabling it raises it");
        assert_eq!(uart.read(2), IIR_THRE);
        assert!(!uart.irq());
        uart.write(0, b'x');
        assert!(uart.irq());
        uart.write(1, 0);
        assert!(!uart.irq());
    }

    #[test]
    fn loopback_returns_bytes_and_modem_lines() {
        let mut uart = Uart::new();
        uart.write(4, MCR_LOOP | 0x0a);
        assert_eq!(uart.read(6) & 0xf0, 0x90, "RTS -> CTS, OUT2 -> DCD");
        assert_eq!(uart.write(0, b'x'), None);
        assert_eq!(received(&mut uart), b"x");
        uart.write(1, IER_MODEM);
        uart.write(4, MCR_LOOP);
        assert_eq!(uart.read(2), IIR_MODEM);
        assert_eq!(uart.read(6), 0b1001, "CTS and DCD fell");
        assert!(!uart.irq());
    }

    #[test]
    fn enabling_the_fifo_clears_the_receiver() {
        let mut uart = Uart::new();
        uart.listen();
        uart.receive(b"a");
        uart.write(2, FCR_ENABLE);
        assert_eq!(received(&mut uart), b"");
        uart.receive(b"b");
        uart.write(2, FCR_ENABLE | FCR_CLEAR_RECEIVER);
        assert_eq!(received(&mut uart), b"");
    }

    #[test]
    fn what_was_typed_ahead_survives_the_drivers_first_reset() {
        let mut uart = Uart::new();
        uart.receive(b"typed ahead");
        assert!(!uart.irq());
        uart.write(2, FCR_ENABLE | FCR_CLEAR_RECEIVER);
        assert_eq!(received(&mut uart), b"typed ahead");
        let mut uart = Uart::new();
        uart.receive(b"x");
        uart.write(2, FCR_ENABLE | FCR_CLEAR_RECEIVER);
        uart.write(1, IER_RDA);
        assert!(
            uart.irq(),
            "a driver that only waits for the interrupt listens too"
        );
    }
}
