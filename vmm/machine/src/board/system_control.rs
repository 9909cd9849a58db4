//! System control port B (61h) and the POST code register (80h).
//!
//! Purpose: the speaker and its counter's gate, what they drive, and the byte a boot program shows on its way.
//! Invariants: a pure register machine. Ports A (92h) and the DMA page registers (81h to 8Fh) are not there: writes go
//! nowhere, reads are all ones.
//! Elsewhere: counter 2, whose gate bit 0 is ([`super::pit`]).
//! Source: IBM PC AT Technical Reference, "System Control Port"; 82371SB datasheet, NMISC.

use super::pit::Pit;
use super::state::Device;
use serde::{Deserialize, Serialize};

const GATE: u8 = 1 << 0;
const REFRESH: u8 = 1 << 4;
const OUT: u8 = 1 << 5;
/// What can be written besides the gate: speaker data, and two check enables without a source.
const WRITABLE: u8 = 0x0e;

/// The registers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct SystemControl {
    /// Bits 1..=3 of port 61h.
    port_b: u8,
    /// Port 80h.
    pub(super) post_code: u8,
}

impl Device for SystemControl {
    const KIND: &'static str = "system control";
    const VERSION: u16 = 1;

    fn check(&self) -> Result<(), &'static str> {
        let Self {
            port_b,
            post_code: _,
        } = self;
        if port_b & !WRITABLE != 0 {
            return Err("a read-only bit is set");
        }
        Ok(())
    }
}

impl SystemControl {
    pub(super) fn new() -> Self {
        Self {
            port_b: 0,
            post_code: 0,
        }
    }

    /// Reads port 61h; the timer stands at the present moment.
    pub(super) fn read_port_b(&self, pit: &Pit) -> u8 {
        let bit = |on: bool, bit: u8| if on { bit } else { 0 };
        self.port_b
            | bit(pit.gate2(), GATE)
            | bit(pit.refresh_toggle(), REFRESH)
            | bit(pit.out2(), OUT)
    }

    /// Writes port 61h.
    pub(super) fn write_port_b(&mut self, value: u8, pit: &mut Pit) {
        self.port_b = value & WRITABLE;
        pit.set_gate2(value & GATE != 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86::Nanos;

    #[test]
    fn the_gate_reads_back_and_starts_counter_2() {
        let (mut control, mut pit) = (SystemControl::new(), Pit::new());
        pit.write(0x43, 0xb0);
        pit.write(0x42, 100);
        pit.write(0x42, 0);
        control.write_port_b(0xff, &mut pit);
        assert_eq!(control.read_port_b(&pit), 0x0f);
        pit.advance(Nanos::new(1_000_000));
        assert_eq!(control.read_port_b(&pit) & OUT, OUT);
    }

    #[test]
    fn the_refresh_bit_toggles_with_time() {
        let (control, mut pit) = (SystemControl::new(), Pit::new());
        let mut changes = 0;
        let mut last = 0;
        for micros in 0..1000 {
            pit.advance(Nanos::new(micros * 1000));
            let now = control.read_port_b(&pit) & REFRESH;
            changes += u32::from(now != last);
            last = now;
        }
        assert_eq!(changes, 1193 / 18);
    }
}
