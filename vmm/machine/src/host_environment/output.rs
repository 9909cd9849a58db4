//! The guest's output on its way to the host.
//!
//! Purpose: guests send single bytes; write whole lines where that costs nobody any waiting.
//! Invariants: bytes leave in order, at the latest with the end of their line, when [`LIMIT`] have gathered or when told to. What a failed
//! write lost is not written again.
//! Elsewhere: when waiting becomes too long ([`super`]).

use crate::environment::EnvironmentError;
use std::io::Write;

const LIMIT: usize = 4096;

/// A sink with a line's buffer.
pub(super) struct Output {
    sink: Box<dyn Write + Send>,
    waiting: Vec<u8>,
}

impl Output {
    pub(super) fn new(sink: Box<dyn Write + Send>) -> Self {
        Self {
            sink,
            waiting: Vec::with_capacity(LIMIT),
        }
    }

    /// Whether bytes wait to be written.
    pub(super) fn waits(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(super) fn send(&mut self, bytes: &[u8]) -> Result<(), EnvironmentError> {
        self.waiting.extend_from_slice(bytes);
        if self.waiting.len() >= LIMIT || bytes.contains(&b'\n') {
            self.flush()?;
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) -> Result<(), EnvironmentError> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let written = self
            .sink
            .write_all(&self.waiting)
            .and_then(|()| self.sink.flush());
        // After a failure nobody knows how much was written; writing it again would repeat some.
        self.waiting.clear();
        written.map_err(|source| EnvironmentError::Io {
            what: "cannot write the guest's console output".into(),
            source,
        })
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        // The run is over, and with it everybody who could be told; whoever must know calls `flush` first.
        let _ = self.flush();
    }
}
