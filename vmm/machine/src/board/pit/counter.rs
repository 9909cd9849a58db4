//! One counter of the 8254.
//!
//! Purpose: what a counter shows and drives at a given clock tick, in all six modes.
//! Invariants: nothing runs between calls: a counter remembers the tick at which its count was loaded, and everything else is
//! arithmetic on that. Ticks are those of the 1.193182 MHz input clock since power-on.
//! Elsewhere: ticks against nanoseconds, ports ([`super`]).
//! Source: Intel 8254 datasheet (order 231164), "Mode definitions". A count of 1 in modes 2 and 3, which the datasheet calls illegal,
//! counts as 2. After a retrigger in mode 1, OUT shows high for the one tick until the count is loaded again.

use serde::{Deserialize, Serialize};

/// Bounds of every tick in a saved counter: far beyond what 64-bit nanoseconds reach, far from overflow.
pub(super) const TICK_LIMIT: i64 = 1 << 60;

/// A count that will replace the present one when its period (mode 2) or half-period (mode 3) is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct NextCount {
    at: i64,
    count: u32,
}

/// What the counting element does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum Element {
    /// No count is loaded: none was written, or the trigger is missing (modes 1 and 5).
    Idle,
    /// `count` was loaded at tick `start`.
    Counting {
        start: i64,
        count: u32,
        /// GATE has been holding it since this tick.
        held: Option<i64>,
        next: Option<NextCount>,
    },
}

/// One counter.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Counter {
    /// 0..=5.
    mode: u8,
    /// Read/write select: 1 low byte, 2 high byte, 3 low then high.
    access: u8,
    bcd: bool,
    /// Count register, as written.
    register: u16,
    /// The low byte of a two-byte write.
    low_written: Option<u8>,
    /// The low byte of a two-byte read was read.
    low_read: bool,
    /// The count register is newer than the counting element.
    null_count: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
    gate: bool,
    element: Element,
}

impl Counter {
    pub(super) fn new(gate: bool) -> Self {
        Self {
            mode: 3,
            access: 3,
            bcd: false,
            register: 0,
            low_written: None,
            low_read: false,
            null_count: true,
            latched_count: None,
            latched_status: None,
            gate,
            element: Element::Idle,
        }
    }

    pub(super) fn check(&self) -> Result<(), &'static str> {
        let Self {
            mode,
            access,
            bcd: _,
            register: _,
            low_written: _,
            low_read: _,
            null_count: _,
            latched_count: _,
            latched_status: _,
            gate: _,
            element,
        } = self;
        if *mode > 5 {
            return Err("no such counter mode");
        }
        if !(1..=3).contains(access) {
            return Err("no such read/write select");
        }
        let Element::Counting {
            start,
            count,
            held,
            next,
        } = *element
        else {
            return Ok(());
        };
        let ticks = [Some(start), held, next.map(|next| next.at)];
        if ticks
            .into_iter()
            .flatten()
            .any(|tick| !(-TICK_LIMIT..TICK_LIMIT).contains(&tick))
        {
            return Err("a tick is out of range");
        }
        let counts = [Some(count), next.map(|next| next.count)];
        if counts
            .into_iter()
            .flatten()
            .any(|count| !(1..=0x1_0000).contains(&count))
        {
            return Err("a count is out of range");
        }
        if matches!(mode, 2 | 3) && counts.into_iter().flatten().any(|count| count < 2) {
            return Err("a period is below 2");
        }
        Ok(())
    }

    /// What the counting element counts modulo.
    fn modulus(&self) -> i64 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    /// The count the register stands for.
    fn count(&self) -> u32 {
        let value = if self.bcd {
            from_bcd(self.register)
        } else {
            u32::from(self.register)
        };
        match (value, self.mode) {
            (0, _) => self.modulus() as u32,
            (1, 2 | 3) => 2,
            (value, _) => value,
        }
    }

    /// How long OUT is high in one period of mode 3.
    fn high_half(count: u32) -> i64 {
        i64::from(count.div_ceil(2))
    }

    /// Lets a count take over whose moment has come.
    fn settle(&mut self, now: i64) {
        let Element::Counting {
            next: Some(next),
            held,
            ..
        } = self.element
        else {
            return;
        };
        if held.is_some() || now < next.at {
            return;
        }
        let start = self.start_after(next);
        self.element = Element::Counting {
            start,
            count: next.count,
            held,
            next: None,
        };
        self.null_count = false;
    }

    /// The start tick that puts `next` where it takes over: in mode 3 that may be the low half.
    fn start_after(&self, next: NextCount) -> i64 {
        match self.element {
            Element::Counting { start, count, .. } if self.mode == 3 => {
                let at_cycle_end = (next.at - start).rem_euclid(i64::from(count)) == 0;
                if at_cycle_end {
                    next.at
                } else {
                    next.at - Self::high_half(next.count)
                }
            }
            _ => next.at,
        }
    }

    /// Ticks counted since the count was loaded; negative before that.
    fn elapsed(start: i64, held: Option<i64>, now: i64) -> i64 {
        held.map_or(now, |held| held.min(now)) - start
    }

    /// The counting element's value as a read shows it.
    fn value(&self, now: i64) -> u16 {
        let Element::Counting {
            start, count, held, ..
        } = self.element
        else {
            return self.register;
        };
        let elapsed = Self::elapsed(start, held, now).max(0);
        let count = i64::from(count);
        let value = match self.mode {
            2 => count - elapsed % count,
            3 => {
                let high = (count + 1) / 2;
                let at = elapsed % count;
                let step = if at < high { at } else { at - high };
                (count & !1) - 2 * step
            }
            _ => count - elapsed,
        };
        let value = value.rem_euclid(self.modulus()) as u16;
        if self.bcd { to_bcd(value) } else { value }
    }

    /// The OUT pin.
    pub(super) fn out(&self, now: i64) -> bool {
        let Element::Counting {
            start, count, held, ..
        } = self.element
        else {
            return self.mode != 0;
        };
        let elapsed = Self::elapsed(start, held, now);
        let count = i64::from(count);
        match self.mode {
            0 => elapsed >= count,
            1 => elapsed < 0 || elapsed >= count,
            2 => held.is_some() || elapsed.max(0) % count != count - 1,
            3 => held.is_some() || elapsed.max(0) % count < (count + 1) / 2,
            _ => elapsed != count,
        }
    }

    /// The OUT pin without the pulses and half-periods that follow from time alone: what stays until somebody acts.
    pub(super) fn resting_level(&self, now: i64) -> bool {
        matches!(self.mode, 2..=5) || self.out(now)
    }

    /// The first tick after `after` at which OUT rises by itself.
    pub(super) fn next_rise(&self, after: i64) -> Option<i64> {
        let Element::Counting {
            start,
            count,
            held: None,
            next,
        } = self.element
        else {
            return None;
        };
        let period = i64::from(count);
        let once = |tick: i64| (tick > after).then_some(tick);
        match self.mode {
            0 | 1 => once(start + period),
            4 | 5 => once(start + period + 1),
            _ => {
                let cycles = (after - start).div_euclid(period).max(0) + 1;
                let rise = start + cycles * period;
                match next {
                    Some(next) if rise > next.at => {
                        Some(self.start_after(next) + i64::from(next.count))
                    }
                    _ => Some(rise),
                }
            }
        }
    }

    /// A control word for this counter that is no latch command.
    pub(super) fn write_control(&mut self, value: u8) {
        self.access = value >> 4 & 3;
        self.mode = match value >> 1 & 7 {
            6 => 2,
            7 => 3,
            mode => mode,
        };
        self.bcd = value & 1 != 0;
        self.low_written = None;
        self.low_read = false;
        self.latched_count = None;
        self.latched_status = None;
        self.null_count = true;
        self.element = Element::Idle;
    }

    /// The counter latch command.
    pub(super) fn latch_count(&mut self, now: i64) {
        self.settle(now);
        if self.latched_count.is_none() {
            self.latched_count = Some(self.value(now));
        }
    }

    /// Latches the status byte (read-back command).
    pub(super) fn latch_status(&mut self, now: i64) {
        self.settle(now);
        if self.latched_status.is_none() {
            let loading = matches!(self.element, Element::Counting { start, .. } if now < start);
            self.latched_status = Some(
                u8::from(self.out(now)) << 7
                    | u8::from(self.null_count || loading) << 6
                    | self.access << 4
                    | self.mode << 1
                    | u8::from(self.bcd),
            );
        }
    }

    /// A write to the counter's port.
    pub(super) fn write(&mut self, value: u8, now: i64) {
        self.settle(now);
        let register = match (self.access, self.low_written.take()) {
            (1, _) => u16::from(value),
            (2, _) => u16::from(value) << 8,
            (_, Some(low)) => u16::from(value) << 8 | u16::from(low),
            (_, None) => {
                self.low_written = Some(value);
                if self.mode == 0 {
                    // The first byte stops the count and drives OUT low.
                    self.element = Element::Idle;
                }
                return;
            }
        };
        self.register = register;
        self.null_count = true;
        self.count_written(now);
    }

    /// What a new count does.
    fn count_written(&mut self, now: i64) {
        match (self.mode, self.element) {
            (1 | 5, _) => {} // waits for the trigger
            (
                2 | 3,
                Element::Counting {
                    start,
                    count,
                    held: None,
                    ..
                },
            ) if now >= start => {
                let elapsed = now - start;
                let (period, high) = (i64::from(count), Self::high_half(count));
                let cycle = start + elapsed / period * period;
                let at = if self.mode == 3 && now < cycle + high {
                    cycle + high
                } else {
                    cycle + period
                };
                let next = Some(NextCount {
                    at,
                    count: self.count(),
                });
                self.element = Element::Counting {
                    start,
                    count,
                    held: None,
                    next,
                };
            }
            _ => self.load(now),
        }
    }

    /// Loads the counting element on the next clock.
    fn load(&mut self, now: i64) {
        let start = now + 1;
        let held = (!self.gate && !matches!(self.mode, 1 | 5)).then_some(start);
        self.element = Element::Counting {
            start,
            count: self.count(),
            held,
            next: None,
        };
        self.null_count = false;
    }

    /// A read of the counter's port.
    pub(super) fn read(&mut self, now: i64) -> u8 {
        self.settle(now);
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self
            .latched_count
            .unwrap_or_else(|| self.value(now))
            .to_le_bytes();
        let (byte, last) = match (self.access, self.low_read) {
            (1, _) => (low, true),
            (2, _) | (_, true) => (high, true),
            (_, false) => (low, false),
        };
        self.low_read = !last;
        if last {
            self.latched_count = None;
        }
        byte
    }

    /// The GATE pin.
    pub(super) fn gate(&self) -> bool {
        self.gate
    }

    /// Drives the GATE pin.
    pub(super) fn set_gate(&mut self, level: bool, now: i64) {
        self.settle(now);
        if level == std::mem::replace(&mut self.gate, level) {
            return;
        }
        match (level, self.mode, &mut self.element) {
            (true, 1 | 5, _) => self.load(now),
            (true, 2 | 3, Element::Counting { .. }) => self.load(now),
            (true, _, Element::Counting { start, held, .. }) => {
                if let Some(since) = held.take() {
                    *start += (now - since).max(0);
                }
            }
            (false, 0 | 2 | 3 | 4, Element::Counting { start, held, .. }) => {
                *held = Some(now.max(*start));
            }
            _ => {}
        }
    }

    /// Brings the counter to `now`.
    pub(super) fn advance(&mut self, now: i64) {
        self.settle(now);
    }
}

fn from_bcd(value: u16) -> u32 {
    (0..4).rev().fold(0, |sum, digit| {
        sum * 10 + u32::from(value >> (4 * digit) & 0xf)
    })
}

fn to_bcd(value: u16) -> u16 {
    let digit = |scale: u16| value / scale % 10;
    digit(1000) << 12 | digit(100) << 8 | digit(10) << 4 | digit(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A counter in `mode` with a two-byte count written at tick 0, so that it is loaded at tick 1.
    fn counter(mode: u8, count: u16) -> Counter {
        let mut counter = Counter::new(true);
        counter.write_control(0x30 | mode << 1);
        write(&mut counter, count, 0);
        counter
    }

    fn write(counter: &mut Counter, count: u16, now: i64) {
        let [low, high] = count.to_le_bytes();
        counter.write(low, now);
        counter.write(high, now);
    }

    fn read(counter: &mut Counter, now: i64) -> u16 {
        counter.latch_count(now);
        u16::from_le_bytes([counter.read(now), counter.read(now)])
    }

    /// OUT over ticks as a string, as the datasheet's timing diagrams draw it.
    fn wave(counter: &mut Counter, ticks: std::ops::Range<i64>) -> String {
        ticks
            .map(|now| {
                counter.advance(now);
                if counter.out(now) { '-' } else { '_' }
            })
            .collect()
    }

    fn values(counter: &mut Counter, ticks: std::ops::Range<i64>) -> Vec<u16> {
        ticks.map(|now| read(counter, now)).collect()
    }

    #[test]
    fn mode_0_rises_at_terminal_count_and_counts_on() {
        let mut counter = counter(0, 4);
        assert_eq!(wave(&mut counter, 0..9), "_____----");
        assert_eq!(values(&mut counter, 1..8), [4, 3, 2, 1, 0, 0xffff, 0xfffe]);
        assert_eq!(counter.next_rise(0), Some(5));
        assert_eq!(counter.next_rise(5), None);
    }

    #[test]
    fn mode_0_gate_holds_the_count() {
        let mut counter = counter(0, 4);
        counter.set_gate(false, 2);
        assert_eq!(read(&mut counter, 50), 3);
        assert!(!counter.out(50));
        counter.set_gate(true, 50);
        assert_eq!(read(&mut counter, 51), 2);
        assert_eq!(counter.next_rise(50), Some(53));
    }

    #[test]
    fn mode_0_stops_at_the_first_byte_of_a_new_count() {
        let mut counter = counter(0, 2);
        assert!(counter.out(3));
        counter.write(9, 4);
        assert!(!counter.out(100), "OUT falls and nothing counts");
        counter.write(0, 100);
        assert_eq!(counter.next_rise(100), Some(110));
    }

    #[test]
    fn mode_1_is_a_retriggerable_one_shot() {
        let mut counter = counter(1, 3);
        counter.set_gate(false, 0);
        assert!(counter.out(5), "waits for the trigger");
        counter.set_gate(true, 5);
        assert_eq!(wave(&mut counter, 5..11), "-___--");
        counter.set_gate(false, 11);
        counter.set_gate(true, 11);
        counter.set_gate(false, 12);
        counter.set_gate(true, 13);
        assert_eq!(
            wave(&mut counter, 14..19),
            "___--",
            "the second trigger prolonged it"
        );
    }

    #[test]
    fn mode_2_divides_by_n() {
        let mut counter = counter(2, 3);
        assert_eq!(wave(&mut counter, 1..10), "--_--_--_");
        assert_eq!(values(&mut counter, 1..8), [3, 2, 1, 3, 2, 1, 3]);
        assert_eq!(counter.next_rise(0), Some(4));
        assert_eq!(counter.next_rise(4), Some(7));
    }

    #[test]
    fn mode_2_takes_a_new_count_at_the_end_of_the_period() {
        let mut counter = counter(2, 4);
        write(&mut counter, 2, 2);
        assert_eq!(wave(&mut counter, 2..10), "--_-_-_-");
        let mut counter = self::counter(2, 4);
        write(&mut counter, 5, 2);
        assert_eq!(counter.next_rise(2), Some(5));
        assert_eq!(counter.next_rise(5), Some(10), "before anything settled");
    }

    #[test]
    fn mode_2_gate_raises_out_and_reloads() {
        let mut counter = counter(2, 3);
        counter.set_gate(false, 3);
        assert!(counter.out(3), "OUT goes high at once");
        assert_eq!(counter.next_rise(3), None);
        counter.set_gate(true, 20);
        assert_eq!(values(&mut counter, 21..25), [3, 2, 1, 3]);
    }

    #[test]
    fn mode_3_is_a_square_wave_for_even_and_odd_counts() {
        let mut even = counter(3, 4);
        assert_eq!(wave(&mut even, 1..10), "--__--__-");
        assert_eq!(values(&mut even, 1..6), [4, 2, 4, 2, 4]);
        let mut odd = counter(3, 5);
        assert_eq!(wave(&mut odd, 1..12), "---__---__-");
        assert_eq!(values(&mut odd, 1..7), [4, 2, 0, 4, 2, 4]);
        assert_eq!(odd.next_rise(1), Some(6));
    }

    #[test]
    fn mode_3_takes_a_new_count_at_the_end_of_the_half_period() {
        let mut counter = counter(3, 4);
        write(&mut counter, 6, 1);
        assert_eq!(counter.next_rise(1), Some(6), "two high, then three low");
        assert_eq!(wave(&mut counter, 1..13), "--___---___-");
    }

    #[test]
    fn mode_4_strobes_once() {
        let mut counter = counter(4, 2);
        assert_eq!(wave(&mut counter, 0..8), "---_----");
        assert_eq!(counter.next_rise(0), Some(4));
        assert_eq!(counter.next_rise(4), None);
    }

    #[test]
    fn mode_5_strobes_after_a_trigger() {
        let mut counter = counter(5, 2);
        counter.set_gate(false, 1);
        assert_eq!(wave(&mut counter, 1..5), "----");
        counter.set_gate(true, 5);
        assert_eq!(wave(&mut counter, 5..10), "---_-");
    }

    #[test]
    fn a_count_of_zero_is_the_largest() {
        let mut binary = counter(2, 0);
        assert_eq!(binary.next_rise(0), Some(1 + 65536));
        assert_eq!(values(&mut binary, 1..3), [0, 65535]);
        let mut bcd = Counter::new(true);
        bcd.write_control(0x35);
        write(&mut bcd, 0, 0);
        assert_eq!(bcd.next_rise(0), Some(1 + 10_000));
        assert_eq!(values(&mut bcd, 1..3), [0, 0x9999]);
    }

    #[test]
    fn bcd_counts_in_decimal() {
        let mut counter = Counter::new(true);
        counter.write_control(0x31);
        write(&mut counter, 0x0100, 0);
        assert_eq!(values(&mut counter, 1..3), [0x0100, 0x0099]);
        assert!(counter.out(101));
    }

    #[test]
    fn latches_hold_until_read_and_the_status_comes_first() {
        let mut counter = counter(2, 0x1234);
        counter.latch_count(1);
        counter.latch_count(500);
        counter.latch_status(500);
        assert_eq!(
            counter.read(600),
            0b1011_0100,
            "OUT high, loaded, low/high, mode 2"
        );
        assert_eq!([counter.read(700), counter.read(800)], [0x34, 0x12]);
        assert_eq!(counter.read(1), 0x34, "live again");
    }

    #[test]
    fn null_count_shows_until_the_count_is_loaded() {
        let mut counter = counter(2, 10);
        let null = |counter: &mut Counter, now| {
            counter.latch_status(now);
            counter.read(now) & 0x40 != 0
        };
        assert!(null(&mut counter, 0));
        assert!(!null(&mut counter, 1));
        write(&mut counter, 20, 3);
        assert!(null(&mut counter, 10));
        assert!(!null(&mut counter, 11));
    }

    #[test]
    fn single_byte_access_reads_and_writes_one_byte() {
        let mut low = Counter::new(true);
        low.write_control(0x14);
        low.write(9, 0);
        assert_eq!([low.read(1), low.read(2)], [9, 8]);
        let mut high = Counter::new(true);
        high.write_control(0x24);
        high.write(9, 0);
        assert_eq!([high.read(1), high.read(2)], [9, 8]);
        assert_eq!(high.next_rise(0), Some(1 + 0x900));
    }
}
