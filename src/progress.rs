//! Progress of what takes longer than a second, on standard error if that is a terminal.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Nothing is shown before this.
const PATIENCE: Duration = Duration::from_secs(1);

/// One line that counts up; removed when dropped.
pub struct Progress {
    what: &'static str,
    started: Instant,
    shown: bool,
    terminal: bool,
}

impl Progress {
    /// Progress of `what` ("replaying"), starting now.
    pub fn new(what: &'static str) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self {
            what,
            started: Instant::now(),
            shown: false,
            terminal,
        }
    }

    /// So much is done, of so much.
    pub fn show(&mut self, done: u64, of: u64) {
        if !self.terminal || self.started.elapsed() < PATIENCE {
            return;
        }
        self.shown = true;
        let percent = done
            .saturating_mul(100)
            .checked_div(of)
            .unwrap_or(0)
            .min(100);
        let seconds = self.started.elapsed().as_secs();
        // Progress that cannot be shown is no reason to stop.
        let _ = write!(
            std::io::stderr(),
            "\r{} ... {percent} %, {seconds} s\x1b[K",
            self.what
        );
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}
