//! Dates of the proleptic Gregorian calendar.
//!
//! Purpose: seconds since 1970 to calendar fields and back, for any number the guest can leave in the clock's registers.
//! Invariants: total functions; fields out of range carry over into the next larger one.
//! Elsewhere: the registers' formats ([`super`]).
//! Source: Howard Hinnant, "chrono-compatible low-level date algorithms" (days_from_civil, civil_from_days).

pub(super) const SECONDS_PER_DAY: i64 = 86_400;

/// A date and time of day.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct DateTime {
    pub(super) year: i64,
    /// 1..=12
    pub(super) month: i64,
    /// 1..=31
    pub(super) day: i64,
    pub(super) hour: i64,
    pub(super) minute: i64,
    pub(super) second: i64,
}

impl DateTime {
    /// From seconds since 1970-01-01 00:00:00 UTC.
    pub(super) fn from_unix(seconds: i64) -> Self {
        let days = seconds.div_euclid(SECONDS_PER_DAY) + 719_468;
        let of_day = seconds.rem_euclid(SECONDS_PER_DAY);
        let era = days.div_euclid(146_097);
        let day_of_era = days.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted = (5 * day_of_year + 2) / 153; // months since March
        let month = if shifted < 10 {
            shifted + 3
        } else {
            shifted - 9
        };
        Self {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month,
            day: day_of_year - (153 * shifted + 2) / 5 + 1,
            hour: of_day / 3600,
            minute: of_day / 60 % 60,
            second: of_day % 60,
        }
    }

    /// Seconds since 1970-01-01 00:00:00 UTC.
    pub(super) fn to_unix(self) -> i64 {
        let year = self.year + (self.month - 1).div_euclid(12);
        let month = (self.month - 1).rem_euclid(12) + 1;
        let year = year - i64::from(month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let shifted = if month > 2 { month - 3 } else { month + 9 };
        let day_of_year = (153 * shifted + 2) / 5 + self.day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        days * SECONDS_PER_DAY + self.hour * 3600 + self.minute * 60 + self.second
    }

    /// 1 is Sunday, 7 Saturday.
    pub(super) fn weekday(seconds: i64) -> i64 {
        (seconds.div_euclid(SECONDS_PER_DAY) + 4).rem_euclid(7) + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_dates() {
        let leap_day = DateTime {
            year: 2024,
            month: 2,
            day: 29,
            hour: 23,
            minute: 59,
            second: 58,
        };
        assert_eq!(leap_day.to_unix(), 1_709_251_198);
        assert_eq!(DateTime::from_unix(1_709_251_198), leap_day);
        assert_eq!(DateTime::weekday(1_709_251_198), 5, "a Thursday");
        assert_eq!(DateTime::from_unix(-1).year, 1969);
    }

    proptest! {
        #[test]
        fn there_and_back(seconds in -62_000_000_000i64..300_000_000_000) {
            prop_assert_eq!(DateTime::from_unix(seconds).to_unix(), seconds);
        }
    }
}
