//! What other threads want of the thread that runs the machine.
//!
//! Purpose: a word of flags that is looked at before every entry, and the two ways to make that happen soon: a kick when the
//! guest runs, a futex when the CPU is halted and the thread sleeps.
//! Invariants: [`Attention::raise`] is async-signal-safe if the engine's kick is: it touches one atomic word and makes system calls, takes no
//! lock and allocates nothing. A flag raised before or during a wait ends it.
//! Elsewhere: what the flags mean ([`super`]).
//! Source: futex(2); signal-safety(7).

#![allow(unsafe_code)] // The futex system call: the only wait that a signal handler may end.

use crate::engine::Kick;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Somebody asked the run to end. Never taken back.
pub(super) const STOP: u32 = 1 << 0;
/// Console input waits.
pub(super) const INPUT: u32 = 1 << 1;
/// A debugger's time slice is over.
pub(super) const SLICE: u32 = 1 << 2;
/// Output has waited long enough.
pub(super) const FLUSH: u32 = 1 << 3;

/// The flags.
pub(super) struct Attention {
    word: AtomicU32,
    kick: Arc<dyn Kick>,
}

impl Attention {
    pub(super) fn new(kick: Arc<dyn Kick>) -> Self {
        Self {
            word: AtomicU32::new(0),
            kick,
        }
    }

    /// Raises flags, wakes the thread if it sleeps and kicks the CPU out of the guest.
    pub(super) fn raise(&self, flags: u32) {
        self.word.fetch_or(flags, Ordering::Release);
        // SAFETY: FUTEX_WAKE takes the address of a live, aligned u32 and a count, and reads nothing else.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.word.as_ptr(),
                libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
                i32::MAX,
            );
        }
        self.kick.kick();
    }

    /// Kicks the CPU out of the guest without a flag.
    pub(super) fn kick(&self) {
        self.kick.kick();
    }

    /// The flags raised.
    pub(super) fn seen(&self) -> u32 {
        self.word.load(Ordering::Acquire)
    }

    /// Takes flags back.
    pub(super) fn clear(&self, flags: u32) {
        self.word.fetch_and(!flags, Ordering::AcqRel);
    }

    /// Sleeps until the flags are no longer `seen`, or `timeout` has passed. May wake for no reason.
    pub(super) fn wait(&self, seen: u32, timeout: Option<Duration>) {
        let timeout = timeout.map(|timeout| libc::timespec {
            tv_sec: timeout.as_secs().min(i32::MAX as u64) as libc::time_t,
            tv_nsec: timeout.subsec_nanos().into(),
        });
        let timeout = timeout
            .as_ref()
            .map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: FUTEX_WAIT takes the address of a live, aligned u32, the value it is expected to have, and a timespec that is null or
        // lives until the call returns. Every failure (value changed, interrupted, timed out) is a reason to look again.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.word.as_ptr(),
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                seen,
                timeout,
            );
        }
    }
}
