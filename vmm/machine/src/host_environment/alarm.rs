//! The alarm: a thread that gets the CPU's attention at given moments of the host's clock.
//!
//! Purpose: a guest that runs without exits must come out when a timer is due, a debugger's slice is over or output has waited.
//! Invariants: the thread sleeps on a condition variable and wakes only when something is due or an earlier moment was set; setting the same
//! moment again costs nothing. An alarm is about attention only: whether a timer is due is decided by whoever looks at the clock.
//! It ends with its handle.
//! Elsewhere: virtual time ([`super::clock`]); the flags ([`super::attention`]).

use super::attention::{Attention, FLUSH, SLICE};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

/// What can be due.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Due {
    /// A timer of the machine.
    Deadline = 0,
    /// A debugger's slice.
    Slice = 1,
    /// Output that waits for more.
    Flush = 2,
}

impl Due {
    const ALL: [Self; 3] = [Self::Deadline, Self::Slice, Self::Flush];
}

#[derive(Default)]
struct State {
    /// Indexed by [`Due`].
    at: [Option<Instant>; 3],
    /// What the thread sleeps for.
    asleep_until: Option<Instant>,
    quit: bool,
}

impl State {
    fn earliest(&self) -> Option<Instant> {
        self.at.iter().flatten().min().copied()
    }
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    /// Nothing panics while it holds the lock, and a state is whole at every step.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, attention: &Attention) {
        let mut state = self.lock();
        while !state.quit {
            let now = Instant::now();
            for due in Due::ALL {
                let at = &mut state.at[due as usize];
                if at.is_some_and(|at| at <= now) {
                    *at = None;
                    match due {
                        Due::Deadline => attention.kick(),
                        Due::Slice => attention.raise(SLICE),
                        Due::Flush => attention.raise(FLUSH),
                    }
                }
            }
            let earliest = state.earliest();
            state.asleep_until = earliest;
            state = match earliest {
                None => self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(at) => {
                    let timeout = at.saturating_duration_since(now);
                    let woken = self.changed.wait_timeout(state, timeout);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

/// A handle to set the alarm with.
#[derive(Clone)]
pub(super) struct AlarmClock(Arc<Shared>);

impl AlarmClock {
    /// Sets the moment at which something is due, or that it is not.
    pub(super) fn set(&self, due: Due, at: Option<Instant>) {
        let mut state = self.0.lock();
        state.at[due as usize] = at;
        let earlier = at.is_some_and(|at| {
            state
                .asleep_until
                .is_none_or(|asleep_until| at < asleep_until)
        });
        if earlier {
            // So that a second, later one does not wake the thread again before it has looked.
            state.asleep_until = at;
            drop(state);
            self.0.changed.notify_one();
        }
    }
}

/// The thread.
pub(super) struct Alarm {
    clock: AlarmClock,
    thread: Option<JoinHandle<()>>,
}

impl Alarm {
    pub(super) fn start(attention: Arc<Attention>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let clock = AlarmClock(Arc::clone(&shared));
        let thread = std::thread::Builder::new()
            .name("alarm".into())
            .spawn(move || shared.run(&attention))?;
        Ok(Self {
            clock,
            thread: Some(thread),
        })
    }

    pub(super) fn clock(&self) -> &AlarmClock {
        &self.clock
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.clock.0.lock().quit = true;
        self.clock.0.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // It has nothing to say; a panic in it has been reported where it happened.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Kick;
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    struct Report(Mutex<Sender<()>>);

    impl Kick for Report {
        fn kick(&self) {
            let _ = self.0.lock().expect("not poisoned").send(());
        }
    }

    #[test]
    fn it_gets_attention_when_something_is_due_and_ends_with_its_handle() {
        let (sender, kicks) = channel();
        let attention = Arc::new(Attention::new(Arc::new(Report(Mutex::new(sender)))));
        let alarm = Alarm::start(Arc::clone(&attention)).expect("a thread");
        let now = Instant::now();
        alarm
            .clock()
            .set(Due::Deadline, Some(now + Duration::from_secs(3600)));
        alarm.clock().set(Due::Slice, Some(now));
        kicks.recv().expect("the slice");
        assert_eq!(attention.seen(), SLICE);
        alarm.clock().set(Due::Deadline, Some(now));
        kicks.recv().expect("the deadline");
        assert_eq!(attention.seen(), SLICE, "a deadline raises no flag");
        alarm.clock().set(Due::Flush, Some(now));
        alarm.clock().set(Due::Flush, None);
        drop(alarm);
        drop(attention);
        let late = kicks.iter().count();
        assert!(
            late <= 1,
            "the flush was due at most once, not {late} times"
        );
    }
}
