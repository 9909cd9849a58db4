//! Ctrl-C and its kin.
//!
//! Purpose: the first SIGINT, SIGTERM or SIGHUP asks what is running to stop, so that a recording ends cleanly; the second SIGINT ends the
//! process at once.

use crate::failure::{Doing, Failure};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use std::thread::JoinHandle;

/// The status of a process that the user interrupted twice (128 + SIGINT).
const INTERRUPTED: i32 = 130;

/// While it lives, signals ask for a stop.
pub struct OnInterrupt {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

/// Calls `stop` once at the first signal, from a thread of its own.
pub fn on_interrupt(stop: impl Fn() + Send + 'static) -> Result<OnInterrupt, Failure> {
    let mut signals =
        Signals::new([SIGINT, SIGTERM, SIGHUP]).doing(|| "cannot catch signals".into())?;
    let handle = signals.handle();
    let thread = std::thread::spawn(move || {
        let mut asked = false;
        for signal in signals.forever() {
            if asked && signal == SIGINT {
                std::process::exit(INTERRUPTED);
            }
            asked = true;
            stop();
        }
    });
    Ok(OnInterrupt {
        handle,
        thread: Some(thread),
    })
}

impl Drop for OnInterrupt {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            // It ends when its signals are closed; a panic in it has been printed.
            let _ = thread.join();
        }
    }
}
