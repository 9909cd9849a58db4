//! The real-time clock and its CMOS RAM.
//!
//! Purpose: the date, periodic, alarm and update-ended interrupts on IRQ 8, and 114 bytes of memory.
//! Invariants: the date is a fixed base plus virtual time; nothing runs between accesses, the flags of register C catch up when
//! the time is brought in ([`Rtc::advance`]). Seconds change where virtual time passes a whole second, whenever the divider was
//! released. The day of the week follows from the date and cannot be set apart from it. While the alarm interrupt is enabled the clock asks to
//! be told the time every second. The square-wave output and daylight saving are not there.
//! Elsewhere: the host's clock, which only [`super::BoardConfig`] brings in.
//! Source: Motorola MC146818A datasheet; register 32h (century) as PC firmware uses it.

mod calendar;

use super::state::Device;
use calendar::{DateTime, SECONDS_PER_DAY};
use serde::{Deserialize, Serialize};
use x86::Nanos;

const RAM_SIZE: usize = 128;
const NANOS_PER_SECOND: u64 = 1_000_000_000;
/// From UIP rising to the end of the update: 244 us and 1984 us.
const UPDATE_NANOS: u64 = 2_228_000;
/// The last second of the year 9999.
const LAST_SECOND: i64 = 253_402_300_799;
/// Bound of the offset in a saved clock: well beyond what its registers can say.
const OFFSET_LIMIT: i64 = 1 << 41;

const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;
const DATE_REGISTERS: [u8; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];

const A_UIP: u8 = 1 << 7;
const A_DIVIDER: u8 = 0x70;
const A_DIVIDER_RUNS: u8 = 0x20;
const A_RATE: u8 = 0x0f;
const B_SET: u8 = 1 << 7;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
/// Flags in C, enables in B.
const PERIODIC: u8 = 1 << 6;
const ALARM: u8 = 1 << 5;
const UPDATE: u8 = 1 << 4;
const C_IRQF: u8 = 1 << 7;
const D_VALID: u8 = 1 << 7;

/// The clock.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Rtc {
    index: u8,
    a: u8,
    b: u8,
    /// PF, AF and UF; IRQF follows from them.
    flags: u8,
    /// Alarm registers and memory; the date registers' places hold the date only while it stands still.
    ram: Vec<u8>,
    /// What the date is ahead of virtual time, in seconds since 1970, while it runs.
    offset: i64,
    /// The latest moment it was told of.
    now: Nanos,
}

impl Device for Rtc {
    const KIND: &'static str = "MC146818";
    const VERSION: u16 = 1;

    fn check(&self) -> Result<(), &'static str> {
        let Self {
            index,
            a,
            b: _,
            flags,
            ram,
            offset,
            now: _,
        } = self;
        if *index >= RAM_SIZE as u8 || a & A_UIP != 0 {
            return Err("a reserved bit is set");
        }
        if flags & !(PERIODIC | ALARM | UPDATE) != 0 {
            return Err("an unknown interrupt flag is set");
        }
        if ram.len() != RAM_SIZE {
            return Err("the memory has the wrong size");
        }
        if !(-OFFSET_LIMIT..OFFSET_LIMIT).contains(offset) {
            return Err("the date is out of range");
        }
        Ok(())
    }
}

impl Rtc {
    /// A clock that shows `boot_time` (seconds since 1970) at virtual time 0; dates past the years 1970..=9999 are cut to them.
    pub(super) fn new(boot_time: i64) -> Self {
        Self {
            index: 0,
            a: A_DIVIDER_RUNS | 6,
            b: B_24_HOURS,
            flags: 0,
            ram: vec![0; RAM_SIZE],
            offset: boot_time.clamp(0, LAST_SECOND),
            now: Nanos::ZERO,
        }
    }

    fn divider_runs(&self) -> bool {
        self.a & A_DIVIDER == A_DIVIDER_RUNS
    }

    /// Whether the date is being updated.
    fn runs(&self) -> bool {
        self.divider_runs() && self.b & B_SET == 0
    }

    fn unix(&self) -> i64 {
        self.offset + (self.now.get() / NANOS_PER_SECOND) as i64
    }

    /// The period of the periodic interrupt, in 1/32768 s.
    fn period(&self) -> Option<u64> {
        if !self.divider_runs() {
            return None;
        }
        match self.a & A_RATE {
            0 => None,
            rate @ (1 | 2) => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    /// Brings the clock to `now`.
    pub(super) fn advance(&mut self, now: Nanos) {
        let before = self.now;
        self.now = now.max(before);
        if let Some(period) = self.period()
            && periods(self.now, period) > periods(before, period)
        {
            self.flags |= PERIODIC;
        }
        let from = before.get() / NANOS_PER_SECOND;
        let to = self.now.get() / NANOS_PER_SECOND;
        if self.runs() && to > from {
            self.flags |= UPDATE;
            if self.flags & ALARM == 0 && self.alarm_within(to - from) {
                self.flags |= ALARM;
            }
        }
    }

    /// Whether one of the last `seconds` seconds, the present one included, matches the alarm.
    fn alarm_within(&self, seconds: u64) -> bool {
        let last = self.unix();
        let seconds = (seconds.min(SECONDS_PER_DAY.unsigned_abs())) as i64;
        let wanted = [SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM].map(|index| self.stored(index));
        let matches = |wanted: u8, shown: u8| wanted >= 0xc0 || wanted == shown;
        (last - seconds + 1..=last).any(|second| {
            let of_day = second.rem_euclid(SECONDS_PER_DAY);
            let shown = [
                self.encode(of_day % 60),
                self.encode(of_day / 60 % 60),
                self.encode_hour(of_day / 3600),
            ];
            wanted
                .into_iter()
                .zip(shown)
                .all(|(wanted, shown)| matches(wanted, shown))
        })
    }

    /// IRQ 8.
    pub(super) fn irq(&self) -> bool {
        self.flags & self.b != 0
    }

    /// When the line rises next, at the earliest.
    pub(super) fn deadline(&self) -> Option<Nanos> {
        if self.irq() {
            return None; // further flags wait until register C is read
        }
        let now = self.now.get();
        let periodic = self
            .period()
            .filter(|_| self.b & PERIODIC != 0)
            .map(|period| {
                let next = (periods(self.now, period) + 1) * u128::from(period);
                u64::try_from((next * u128::from(NANOS_PER_SECOND)).div_ceil(32_768))
                    .map_or(Nanos::NEVER, Nanos::new)
            });
        let second = (self.runs() && self.b & (ALARM | UPDATE) != 0)
            .then(|| Nanos::new((now / NANOS_PER_SECOND + 1).saturating_mul(NANOS_PER_SECOND)));
        periodic.into_iter().chain(second).min()
    }

    fn encode(&self, value: i64) -> u8 {
        let value = value.rem_euclid(100) as u8;
        if self.b & B_BINARY != 0 {
            value
        } else {
            (value / 10) << 4 | (value % 10)
        }
    }

    fn decode(&self, value: u8) -> i64 {
        i64::from(if self.b & B_BINARY != 0 {
            value
        } else {
            (value >> 4) * 10 + (value & 0xf)
        })
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.b & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { 0x80 } else { 0 };
        self.encode((hour + 11) % 12 + 1) | pm
    }

    fn decode_hour(&self, value: u8) -> i64 {
        if self.b & B_24_HOURS != 0 {
            return self.decode(value);
        }
        self.decode(value & 0x7f) % 12 + if value & 0x80 != 0 { 12 } else { 0 }
    }

    /// A date register's value at the present moment.
    fn shown(&self, index: u8) -> u8 {
        let unix = self.unix();
        let date = DateTime::from_unix(unix);
        match index {
            SECONDS => self.encode(date.second),
            MINUTES => self.encode(date.minute),
            HOURS => self.encode_hour(date.hour),
            WEEKDAY => self.encode(DateTime::weekday(unix)),
            DAY => self.encode(date.day),
            MONTH => self.encode(date.month),
            YEAR => self.encode(date.year.rem_euclid(100)),
            _ => self.encode(date.year.div_euclid(100)),
        }
    }

    fn stored(&self, index: u8) -> u8 {
        self.ram.get(usize::from(index)).copied().unwrap_or(0xff)
    }

    fn store(&mut self, index: u8, value: u8) {
        if let Some(byte) = self.ram.get_mut(usize::from(index)) {
            *byte = value;
        }
    }

    /// The date stops: its registers keep what they show.
    fn freeze(&mut self) {
        for index in DATE_REGISTERS {
            let value = self.shown(index);
            self.store(index, value);
        }
    }

    /// The date goes on from what its registers hold.
    fn thaw(&mut self) {
        let field = |index| self.decode(self.stored(index));
        let date = DateTime {
            year: field(CENTURY) * 100 + field(YEAR),
            month: field(MONTH),
            day: field(DAY),
            hour: self.decode_hour(self.stored(HOURS)),
            minute: field(MINUTES),
            second: field(SECONDS),
        };
        self.offset += date.to_unix() - self.unix();
        for index in DATE_REGISTERS {
            self.store(index, 0); // one state for one date
        }
    }

    /// Changes A or B, and stops or starts the date as they say.
    fn control(&mut self, a: u8, b: u8) {
        let ran = self.runs();
        let (old_a, old_b) = (self.a, self.b);
        (self.a, self.b) = (a, b);
        let runs = self.runs();
        if ran && !runs {
            // The registers keep what they showed in the old format.
            (self.a, self.b) = (old_a, old_b);
            self.freeze();
            (self.a, self.b) = (a, b);
        } else if !ran && runs {
            self.thaw();
        }
    }

    /// Writes port 70h. Bit 7 masks NMI, of which there are none.
    pub(super) fn select(&mut self, value: u8) {
        self.index = value & 0x7f;
    }

    /// Reads port 71h; the clock stands at the present moment.
    pub(super) fn read(&mut self) -> u8 {
        match self.index {
            REGISTER_A => {
                let updating = self.runs()
                    && self.now.get() % NANOS_PER_SECOND >= NANOS_PER_SECOND - UPDATE_NANOS;
                self.a | if updating { A_UIP } else { 0 }
            }
            REGISTER_B => self.b,
            REGISTER_C => {
                let irq = if self.irq() { C_IRQF } else { 0 };
                std::mem::take(&mut self.flags) | irq
            }
            REGISTER_D => D_VALID,
            index if DATE_REGISTERS.contains(&index) && self.runs() => self.shown(index),
            index => self.stored(index),
        }
    }

    /// Writes port 71h; the clock stands at the present moment.
    pub(super) fn write(&mut self, value: u8) {
        match self.index {
            REGISTER_A => self.control(value & !A_UIP, self.b),
            REGISTER_B => {
                // SET clears the update-ended interrupt's enable.
                let cleared = if value & B_SET != 0 { UPDATE } else { 0 };
                self.control(self.a, value & !cleared);
            }
            REGISTER_C | REGISTER_D => {}
            index if DATE_REGISTERS.contains(&index) && self.runs() => {
                self.freeze();
                self.store(index, value);
                self.thaw();
            }
            index => self.store(index, value),
        }
    }
}

/// Whole periods of `period` / 32768 s passed by a moment.
fn periods(now: Nanos, period: u64) -> u128 {
    u128::from(now.get()) * 32_768 / u128::from(NANOS_PER_SECOND) / u128::from(period)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2024-02-29 13:59:58 UTC, a Thursday.
    const BOOT: i64 = 1_709_215_198;

    fn read(rtc: &mut Rtc, index: u8) -> u8 {
        rtc.select(index);
        rtc.read()
    }

    fn write(rtc: &mut Rtc, index: u8, value: u8) {
        rtc.select(index);
        rtc.write(value);
    }

    fn date(rtc: &mut Rtc) -> [u8; 8] {
        DATE_REGISTERS.map(|index| read(rtc, index))
    }

    fn at(millis: u64) -> Nanos {
        Nanos::new(millis * 1_000_000)
    }

    #[test]
    fn the_date_runs_with_virtual_time() {
        let mut rtc = Rtc::new(BOOT);
        assert_eq!(date(&mut rtc), [0x58, 0x59, 0x13, 5, 0x29, 2, 0x24, 0x20]);
        rtc.advance(at(2000));
        assert_eq!(date(&mut rtc), [0, 0, 0x14, 5, 0x29, 2, 0x24, 0x20]);
        rtc.advance(at(10 * 3_600_000 + 2000));
        assert_eq!(date(&mut rtc), [0, 0, 0, 6, 1, 3, 0x24, 0x20]);
    }

    #[test]
    fn formats_follow_register_b() {
        let mut rtc = Rtc::new(BOOT);
        write(&mut rtc, REGISTER_B, B_BINARY | B_24_HOURS);
        assert_eq!(date(&mut rtc)[..3], [58, 59, 13]);
        write(&mut rtc, REGISTER_B, 0);
        assert_eq!(date(&mut rtc)[..3], [0x58, 0x59, 0x81], "1 pm");
        rtc.advance(at(11 * 3_600_000));
        assert_eq!(read(&mut rtc, HOURS), 0x12, "midnight is 12 am");
    }

    #[test]
    fn a_date_set_under_set_starts_when_it_is_cleared() {
        let mut rtc = Rtc::new(BOOT);
        rtc.advance(at(500));
        write(&mut rtc, REGISTER_B, B_SET | B_24_HOURS);
        for (index, value) in DATE_REGISTERS
            .into_iter()
            .zip([0x59, 0x59, 0x23, 1, 0x31, 0x12, 0x99, 0x19])
        {
            write(&mut rtc, index, value);
        }
        rtc.advance(at(5500));
        assert_eq!(read(&mut rtc, SECONDS), 0x59, "it stands");
        write(&mut rtc, REGISTER_B, B_24_HOURS);
        assert_eq!(
            date(&mut rtc),
            [0x59, 0x59, 0x23, 6, 0x31, 0x12, 0x99, 0x19]
        );
        rtc.advance(at(6000));
        assert_eq!(date(&mut rtc), [0, 0, 0, 7, 1, 1, 0, 0x20]);
    }

    #[test]
    fn a_running_date_can_be_changed_field_by_field() {
        let mut rtc = Rtc::new(BOOT);
        write(&mut rtc, HOURS, 0x07);
        assert_eq!(date(&mut rtc), [0x58, 0x59, 7, 5, 0x29, 2, 0x24, 0x20]);
    }

    #[test]
    fn update_in_progress_shows_before_the_second_changes() {
        let mut rtc = Rtc::new(BOOT);
        let mut updating = |nanos| {
            rtc.advance(Nanos::new(nanos));
            read(&mut rtc, REGISTER_A) & A_UIP != 0
        };
        assert!(!updating(997_771_999));
        assert!(updating(997_772_000));
        assert!(updating(999_999_999));
        assert!(!updating(1_000_000_000));
    }

    #[test]
    fn flags_are_cleared_by_reading_and_drive_the_line_only_when_enabled() {
        let mut rtc = Rtc::new(BOOT);
        rtc.advance(at(1000));
        assert!(!rtc.irq());
        assert_eq!(read(&mut rtc, REGISTER_C), PERIODIC | UPDATE);
        write(&mut rtc, REGISTER_B, B_24_HOURS | UPDATE);
        assert_eq!(rtc.deadline(), Some(at(2000)));
        rtc.advance(at(2000));
        assert!(rtc.irq());
        assert_eq!(rtc.deadline(), None);
        assert_eq!(read(&mut rtc, REGISTER_C), C_IRQF | PERIODIC | UPDATE);
        assert!(!rtc.irq());
    }

    #[test]
    fn the_periodic_rate_follows_register_a() {
        let mut rtc = Rtc::new(BOOT);
        for (rate, nanos) in [
            (1, 3_906_250),
            (2, 7_812_500),
            (6, 976_563),
            (15, 500_000_000),
        ] {
            let mut rtc = rtc.clone();
            write(&mut rtc, REGISTER_A, A_DIVIDER_RUNS | rate);
            write(&mut rtc, REGISTER_B, PERIODIC);
            assert_eq!(rtc.deadline(), Some(Nanos::new(nanos)));
            rtc.advance(Nanos::new(nanos - 1));
            assert!(!rtc.irq());
            rtc.advance(Nanos::new(nanos));
            assert!(rtc.irq());
        }
        write(&mut rtc, REGISTER_B, PERIODIC);
        write(&mut rtc, REGISTER_A, 0x60);
        assert_eq!(rtc.deadline(), None, "the divider is held");
    }

    #[test]
    fn the_alarm_matches_with_wildcards_and_across_jumps() {
        let mut rtc = Rtc::new(BOOT);
        for (index, value) in [
            (SECONDS_ALARM, 0),
            (MINUTES_ALARM, 0xff),
            (HOURS_ALARM, 0xc0),
        ] {
            write(&mut rtc, index, value);
        }
        write(&mut rtc, REGISTER_B, B_24_HOURS | ALARM);
        rtc.advance(at(1999));
        assert!(!rtc.irq());
        rtc.advance(at(61_999));
        assert!(rtc.irq(), "14:00:00 was passed");
        read(&mut rtc, REGISTER_C);
        write(&mut rtc, HOURS_ALARM, 0x13);
        rtc.advance(at(70_000_000));
        assert!(!rtc.irq(), "the next 13:00:00 is a day away");
        rtc.advance(at(200_000_000));
        assert!(rtc.irq());
    }

    #[test]
    fn memory_is_kept_and_c_and_d_are_read_only() {
        let mut rtc = Rtc::new(BOOT);
        write(&mut rtc, 0xff, 0x5a);
        assert_eq!(
            read(&mut rtc, 0x7f),
            0x5a,
            "bit 7 of the index is the NMI mask"
        );
        write(&mut rtc, REGISTER_C, 0xff);
        write(&mut rtc, REGISTER_D, 0);
        assert_eq!(read(&mut rtc, REGISTER_C), 0);
        assert_eq!(read(&mut rtc, REGISTER_D), D_VALID);
    }

    #[test]
    fn no_date_is_out_of_range() {
        for boot in [i64::MIN, -1, LAST_SECOND, i64::MAX] {
            let mut rtc = Rtc::new(boot);
            write(&mut rtc, REGISTER_B, B_SET);
            for index in DATE_REGISTERS {
                write(&mut rtc, index, 0xff);
            }
            write(&mut rtc, REGISTER_B, 0);
            rtc.advance(Nanos::NEVER);
            write(&mut rtc, YEAR, 0xff);
            let _ = date(&mut rtc);
            assert_eq!(rtc.check(), Ok(()));
        }
    }
}
