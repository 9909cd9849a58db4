//! How the machine ends by itself.
//!
//! Purpose: the debug-exit port and the reset line, as a latch.
//! Invariants: the first cause stays.
//! Elsewhere: who pulls it (the debug-exit port F4h in [`super::Board`], the 8042's reset line); what the loop does then
//! ([`crate::session`]).
//! Source: QEMU's isa-debug-exit, whose port this is; unlike there the byte itself becomes the exit status.

use super::state::Device;
use crate::End;
use serde::{Deserialize, Serialize};

/// The latch.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Power {
    end: Option<End>,
}

impl Device for Power {
    const KIND: &'static str = "power";
    const VERSION: u16 = 1;

    fn check(&self) -> Result<(), &'static str> {
        let Self { end } = self;
        match end {
            None | Some(End::DebugExit(_) | End::Reset) => Ok(()),
            Some(End::TripleFault | End::HaltedForever | End::Stopped) => {
                Err("no device ends a run that way")
            }
        }
    }
}

impl Power {
    pub(super) fn new() -> Self {
        Self { end: None }
    }

    pub(super) fn end(&self) -> Option<End> {
        self.end
    }

    pub(super) fn set(&mut self, end: End) {
        self.end.get_or_insert(end);
    }
}
