//! The 8254 timer.
//!
//! Purpose: counter 0 drives IRQ 0, counter 1 nothing that is left of the PC, counter 2 the speaker, gated by port 61h.
//! Invariants: the time comes in with each access ([`Pit::advance`]) and never runs backwards here, whatever the caller says.
//! Between accesses only rising edges of counter 0 matter; [`Pit::deadline`] says when the next one is due. An edge that has come is
//! held by the interrupt controller until it is acknowledged: that OUT falls again by itself (one tick in modes 2, 4, the low
//! half of mode 3) does not take the request back, which would cost an exit for each fall and serve no guest.
//! Elsewhere: a counter's modes ([`counter`]); port 61h ([`super::system_control`]).
//! Source: Intel 8254 datasheet (order 231164); the PC's clock of 14.31818 MHz / 12.

mod counter;

use super::state::Device;
use counter::{Counter, TICK_LIMIT};
use serde::{Deserialize, Serialize};
use x86::Nanos;

/// Input clock, Hz.
const FREQUENCY: u128 = 1_193_182;
const NANOS_PER_SECOND: u128 = 1_000_000_000;

/// Clock ticks up to a moment.
fn ticks(now: Nanos) -> i64 {
    // 2^64 ns are 2.2e16 ticks.
    (u128::from(now.get()) * FREQUENCY / NANOS_PER_SECOND) as i64
}

/// The first moment at which `ticks` have passed.
fn moment(tick: i64) -> Nanos {
    let tick = u128::from(tick.max(0).unsigned_abs());
    let nanos = (tick * NANOS_PER_SECOND).div_ceil(FREQUENCY);
    u64::try_from(nanos).map_or(Nanos::NEVER, Nanos::new)
}

/// What the timer did to IRQ 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Irq0 {
    /// OUT rose.
    pub(super) rose: bool,
    /// The level it has now.
    pub(super) level: bool,
}

/// The timer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Pit {
    counters: [Counter; 3],
    /// The latest tick it was told of.
    tick: i64,
    /// A rise of counter 0 that [`Pit::irq0`] has not reported yet.
    rose: bool,
}

impl Device for Pit {
    const KIND: &'static str = "8254";
    const VERSION: u16 = 1;

    fn check(&self) -> Result<(), &'static str> {
        let Self {
            counters,
            tick,
            rose: _,
        } = self;
        if !(0..TICK_LIMIT).contains(tick) {
            return Err("the tick is out of range");
        }
        counters.iter().try_for_each(Counter::check)
    }
}

impl Pit {
    pub(super) fn new() -> Self {
        let [zero, one, two] = [true, true, false].map(Counter::new);
        Self {
            counters: [zero, one, two],
            tick: 0,
            rose: false,
        }
    }

    /// Brings the timer to `now`.
    pub(super) fn advance(&mut self, now: Nanos) {
        let now = ticks(now).max(self.tick);
        let [zero, ..] = &mut self.counters;
        self.rose |= zero.next_rise(self.tick).is_some_and(|rise| rise <= now);
        for counter in &mut self.counters {
            counter.advance(now);
        }
        self.tick = now;
    }

    /// What has happened to IRQ 0 since the last call.
    pub(super) fn irq0(&mut self) -> Irq0 {
        let [zero, ..] = &self.counters;
        Irq0 {
            rose: std::mem::take(&mut self.rose),
            level: zero.resting_level(self.tick),
        }
    }

    /// When counter 0 rises next.
    pub(super) fn deadline(&self) -> Option<Nanos> {
        let [zero, ..] = &self.counters;
        zero.next_rise(self.tick).map(moment)
    }

    /// Reads one of ports 40h..=43h; the control register reads all ones.
    pub(super) fn read(&mut self, port: u16) -> u8 {
        let now = self.tick;
        self.counters
            .get_mut(usize::from(port & 3))
            .map_or(0xff, |counter| counter.read(now))
    }

    /// Writes one of the same ports.
    pub(super) fn write(&mut self, port: u16, value: u8) {
        let now = self.tick;
        match self.counters.get_mut(usize::from(port & 3)) {
            Some(counter) => counter.write(value, now),
            None => self.write_control(value),
        }
    }

    fn write_control(&mut self, value: u8) {
        let now = self.tick;
        match self.counters.get_mut(usize::from(value >> 6)) {
            Some(counter) if value & 0x30 == 0 => counter.latch_count(now),
            Some(counter) => counter.write_control(value),
            None => self.read_back(value),
        }
    }

    fn read_back(&mut self, value: u8) {
        let now = self.tick;
        for (n, counter) in self.counters.iter_mut().enumerate() {
            if value & 2 << n == 0 {
                continue;
            }
            if value & 0x20 == 0 {
                counter.latch_count(now);
            }
            if value & 0x10 == 0 {
                counter.latch_status(now);
            }
        }
    }

    /// Counter 2's GATE.
    pub(super) fn gate2(&self) -> bool {
        let [.., two] = &self.counters;
        two.gate()
    }

    /// Drives counter 2's GATE.
    pub(super) fn set_gate2(&mut self, level: bool) {
        let now = self.tick;
        let [.., two] = &mut self.counters;
        two.set_gate(level, now);
    }

    /// Counter 2's OUT.
    pub(super) fn out2(&self) -> bool {
        let [.., two] = &self.counters;
        two.out(self.tick)
    }

    /// The DRAM refresh toggle of port 61h, which changes every 18 ticks (15.085 us).
    pub(super) fn refresh_toggle(&self) -> bool {
        self.tick / 18 % 2 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(pit: &mut Pit, channel: u8, mode: u8, count: u16) {
        pit.write(0x43, channel << 6 | 0x30 | mode << 1);
        let [low, high] = count.to_le_bytes();
        pit.write(0x40 + u16::from(channel), low);
        pit.write(0x40 + u16::from(channel), high);
    }

    #[test]
    fn a_moment_is_the_first_with_its_tick() {
        for tick in [1, 2, 1193, 1_193_182, 1 << 40] {
            let at = moment(tick).get();
            assert_eq!(ticks(Nanos::new(at)), tick);
            assert_eq!(ticks(Nanos::new(at - 1)), tick - 1);
        }
        assert_eq!(ticks(Nanos::new(1_000_000_000)), 1_193_182);
    }

    #[test]
    fn deadlines_follow_the_period_without_drift() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 2, 11932);
        for tick in 1..1000 {
            let due = pit.deadline().expect("running");
            assert_eq!(due, moment(1 + tick * 11932));
            pit.advance(Nanos::new(due.get() - 1));
            assert!(!pit.irq0().rose);
            pit.advance(due);
            assert!(pit.irq0().rose);
        }
    }

    #[test]
    fn missed_periods_are_one_edge() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 2, 100);
        pit.advance(Nanos::new(1_000_000_000));
        assert!(pit.irq0().rose);
        pit.advance(Nanos::new(1_000_000_001));
        assert!(!pit.irq0().rose);
        assert!(pit.deadline().expect("running") > Nanos::new(1_000_000_000));
    }

    #[test]
    fn only_mode_0_and_a_new_mode_change_the_resting_level() {
        let mut pit = Pit::new();
        assert!(pit.irq0().level);
        program(&mut pit, 0, 0, 100);
        assert!(!pit.irq0().level);
        pit.advance(moment(101));
        assert_eq!(
            pit.irq0(),
            Irq0 {
                rose: true,
                level: true
            }
        );
        assert_eq!(pit.deadline(), None, "one-shot");
    }

    #[test]
    fn time_does_not_run_backwards() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 2, 100);
        pit.advance(moment(150));
        let due = pit.deadline();
        pit.advance(Nanos::ZERO);
        assert_eq!(pit.deadline(), due);
    }

    #[test]
    fn read_back_latches_what_is_asked_for() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 2, 0x1000);
        program(&mut pit, 2, 3, 0x2000);
        pit.advance(moment(1));
        pit.write(0x43, 0xc0 | 0b1010);
        assert_eq!(pit.read(0x40) & 0x3f, 0x34);
        assert_eq!([pit.read(0x40), pit.read(0x40)], [0x00, 0x10]);
        assert_eq!(pit.read(0x42) & 0x3f, 0x36);
        assert_eq!(pit.read(0x43), 0xff);
    }

    #[test]
    fn counter_2_counts_while_its_gate_is_open() {
        let mut pit = Pit::new();
        program(&mut pit, 2, 0, 100);
        pit.advance(moment(1000));
        assert!(!pit.out2());
        pit.set_gate2(true);
        pit.advance(moment(1099));
        assert!(!pit.out2());
        pit.advance(moment(1100));
        assert!(pit.out2());
    }

    #[test]
    fn the_longest_time_is_no_overflow() {
        let mut pit = Pit::new();
        for mode in 0..8 {
            pit.advance(Nanos::NEVER);
            program(&mut pit, 0, mode, 1);
            let _ = (pit.deadline(), pit.irq0(), pit.read(0x40));
        }
    }
}
