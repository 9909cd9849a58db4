//! How a command fails: one line that says what to do, and an exit status.
//!
//! Invariants: every failure is printed once, with its causes, on standard error. A guest's own exit status is not a failure.

use std::error::Error;
use std::fmt;

/// The status of every failure of chronovisor's own.
pub const FAILED: u8 = 125;
/// The status of a replay that verified all there was of a trace whose end is missing or damaged.
pub const INCOMPLETE: u8 = 126;

/// Why a command failed: what was being done, and the error.
#[derive(Debug)]
pub struct Failure {
    doing: String,
    cause: Option<Box<dyn Error + Send + Sync>>,
}

impl Failure {
    /// A failure without a deeper cause.
    pub fn new(what: impl Into<String>) -> Self {
        Self {
            doing: what.into(),
            cause: None,
        }
    }

    /// The same on standard error, causes included.
    pub fn print(&self) {
        // Standard error may be closed too; there is nobody left to tell.
        let _ = std::io::Write::write_all(
            &mut std::io::stderr(),
            format!("chronovisor: error: {self}\n").as_bytes(),
        );
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.doing)?;
        let mut cause = self.cause.as_deref().map(|e| e as &dyn Error);
        let mut said = self.doing.clone();
        while let Some(error) = cause {
            let text = error.to_string();
            // Many errors have their source's text in their own.
            if !said.contains(&text) {
                write!(f, ": {text}")?;
                said = text;
            }
            cause = error.source();
        }
        Ok(())
    }
}

/// Adds what was being done to an error.
pub trait Doing<T> {
    /// `what` reads as the start of "WHAT: cause".
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: Error + Send + Sync + 'static> Doing<T> for Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|e| Failure {
            doing: what(),
            cause: Some(Box::new(e)),
        })
    }
}

/// An error that needs no introduction.
impl<E: Error + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        let doing = error.to_string();
        Self {
            doing,
            cause: Some(Box::new(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_said_once() {
        let error = std::io::Error::other("no space left");
        let failure = Err::<(), _>(error)
            .doing(|| "cannot write a.cvt".into())
            .unwrap_err();
        assert_eq!(failure.to_string(), "cannot write a.cvt: no space left");
        let bare = Failure::from(std::io::Error::other("no space left"));
        assert_eq!(bare.to_string(), "no space left");
    }
}
