//! What the instruction at the present boundary has been told so far.
//!
//! Purpose: an instruction that needs something from outside (a port, an MMIO read, an MSR) exits before it changed any
//! state, and is executed again from scratch once the answer is there. [`Pending`] holds the answers it got so far, in
//! the order it asks for them.
//! Invariants: empty at a clean boundary; an instruction that retires, faults or finishes an iteration leaves it empty.

use crate::stop::{Exec, Stop};
use machine::engine::Answer;
use x86::Exit;

/// Most questions one instruction may ask: sixteen bytes of MMIO in single bytes, read and written back.
const CAPACITY: usize = 40;

/// The answers to the exits of the instruction at the present boundary.
#[derive(Clone, Debug)]
pub struct Pending {
    answers: [Answer; CAPACITY],
    len: usize,
    used: usize,
    owed: bool,
}

impl Default for Pending {
    fn default() -> Self {
        Self {
            answers: [Answer::None; CAPACITY],
            len: 0,
            used: 0,
            owed: false,
        }
    }
}

impl Pending {
    /// A clean boundary.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether an instruction has exited and waits to be finished by another [`crate::Stepper::step`].
    pub fn incomplete(&self) -> bool {
        self.owed
    }

    /// Adds the answer to the last exit. For an exit that wanted nothing (OUT, an MMIO write) give [`Answer::None`].
    /// Ignored unless [`Self::incomplete`].
    pub fn answer(&mut self, answer: Answer) {
        if self.owed && self.len < CAPACITY {
            self.answers[self.len] = answer;
            self.len += 1;
        }
    }

    /// Forgets everything: the instruction is finished or given up.
    pub fn clear(&mut self) {
        self.len = 0;
        self.used = 0;
        self.owed = false;
    }

    /// The instruction starts, or starts over.
    pub(crate) fn rewind(&mut self) {
        self.used = 0;
    }

    /// Asks for what `exit` wants: the answer if it has been given already, else the exit to take.
    pub(crate) fn ask(&mut self, exit: Exit) -> Exec<Answer> {
        if let Some(&answer) = self.answers[..self.len].get(self.used) {
            self.used += 1;
            return Ok(answer);
        }
        if self.len == CAPACITY {
            return Err(Stop::Unimplemented(
                "so many device accesses in one instruction",
            ));
        }
        self.owed = true;
        Err(Stop::Exit(exit))
    }
}
