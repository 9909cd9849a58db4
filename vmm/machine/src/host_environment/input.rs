//! Console input on its way to the guest.
//!
//! Purpose: hand bytes from the thread that reads the host's terminal to the thread that runs the machine.
//! Invariants: bounded: a reader that is faster than the guest waits in [`InputHandle::push`] until there is room, so that no
//! byte is lost and none piles up.
//! Elsewhere: who reads the terminal (the program); the serial port's own FIFO ([`crate::board`]).

use super::attention::{Attention, INPUT};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

const LIMIT: usize = 4096;

#[derive(Default)]
struct State {
    bytes: VecDeque<u8>,
    closed: bool,
}

/// The queue between the two threads.
#[derive(Default)]
pub(super) struct InputQueue {
    state: Mutex<State>,
    drained: Condvar,
}

impl InputQueue {
    /// Nothing panics while it holds the lock.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes at most `room` bytes, and says whether more are left.
    pub(super) fn take(&self, room: usize) -> (Vec<u8>, bool) {
        let mut state = self.lock();
        let len = room.min(state.bytes.len());
        let bytes = state.bytes.drain(..len).collect();
        self.drained.notify_all();
        (bytes, !state.bytes.is_empty())
    }

    /// Nobody takes any more.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.drained.notify_all();
    }
}

/// The machine is gone; nobody reads its input.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the machine has ended; nobody reads its input")]
pub struct InputClosed;

/// Types at the machine's first serial port, from any thread.
#[derive(Clone)]
pub struct InputHandle {
    pub(super) queue: Arc<InputQueue>,
    pub(super) attention: Arc<Attention>,
}

impl InputHandle {
    /// Hands over bytes and wakes the machine; waits as long as there is no room for them.
    pub fn push(&self, bytes: &[u8]) -> Result<(), InputClosed> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let mut state = self.queue.lock();
            while state.bytes.len() >= LIMIT && !state.closed {
                let woken = self.queue.drained.wait(state);
                state = woken.unwrap_or_else(PoisonError::into_inner);
            }
            if state.closed {
                return Err(InputClosed);
            }
            let len = rest.len().min(LIMIT - state.bytes.len());
            let (now, later) = rest.split_at(len);
            state.bytes.extend(now);
            rest = later;
            drop(state);
            self.attention.raise(INPUT);
        }
        Ok(())
    }
}
