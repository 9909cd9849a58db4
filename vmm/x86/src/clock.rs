//! The two clocks of a timeline.
//!
//! Purpose: instruction counts and virtual time are both `u64`s and must never be swapped.
//! Invariants: both only grow along a timeline.
//! Elsewhere: who advances them (engines count instructions, the environment tells the time).

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! clock {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(u64);

        impl $name {
            /// The start of the timeline.
            pub const ZERO: Self = Self(0);
            /// A moment no run reaches.
            pub const NEVER: Self = Self(u64::MAX);

            /// The moment with this reading.
            pub const fn new(value: u64) -> Self {
                Self(value)
            }

            /// The reading.
            pub const fn get(self) -> u64 {
                self.0
            }

            /// `self + more`, stopping at [`Self::NEVER`].
            #[must_use]
            pub const fn saturating_add(self, more: u64) -> Self {
                Self(self.0.saturating_add(more))
            }

            /// How much later `self` is than `earlier`; 0 when it is not later.
            pub const fn since(self, earlier: Self) -> u64 {
                self.0.saturating_sub(earlier.0)
            }
        }
    };
}

clock! {
    /// Retired guest instructions since the start of the timeline, of all virtual CPUs together. REP counts as one.
    Instructions
}
clock! {
    /// Virtual time in nanoseconds since the machine was powered on.
    Nanos
}

impl fmt::Display for Instructions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Nanos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}.{:09} s",
            self.0 / 1_000_000_000,
            self.0 % 1_000_000_000
        )
    }
}

/// A point on a timeline: retired instructions, and the boundaries passed since the last one retired.
///
/// A boundary that retires nothing is an iteration of a REP instruction or the delivery of an interrupt or exception; counting
/// them keeps every boundary's position unique and totally ordered. Written `N`, or `N+k` inside.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize,
)]
pub struct Position {
    /// Instructions retired before this point.
    pub retired: Instructions,
    /// Boundaries passed since then that retired nothing.
    pub within: u64,
}

impl Position {
    /// Where every timeline starts.
    pub const START: Self = Self {
        retired: Instructions::ZERO,
        within: 0,
    };
    /// A point no run reaches.
    pub const NEVER: Self = Self {
        retired: Instructions::NEVER,
        within: u64::MAX,
    };

    /// The point right after `retired` instructions.
    pub const fn at(retired: u64) -> Self {
        Self {
            retired: Instructions::new(retired),
            within: 0,
        }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.retired)?;
        if self.within != 0 {
            write!(f, "+{}", self.within)?;
        }
        Ok(())
    }
}

/// Text that is not a position.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is not a position; write N or N+k, with N the retired instructions")]
pub struct ParsePositionError(String);

impl std::str::FromStr for Position {
    type Err = ParsePositionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (retired, within) = text.split_once('+').unwrap_or((text, "0"));
        match (retired.replace('_', "").parse(), within.parse()) {
            (Ok(retired), Ok(within)) => Ok(Self {
                retired: Instructions::new(retired),
                within,
            }),
            _ => Err(ParsePositionError(text.to_owned())),
        }
    }
}
