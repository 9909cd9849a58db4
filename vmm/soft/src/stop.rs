//! Why an instruction did not run to its end.
//!
//! Purpose: the error type of everything that executes; `?` leaves an instruction before it has changed anything.
//! Invariants: whoever returns a [`Stop`] has changed no architectural state that its caller does not put back.

use machine::engine::Answer;
use x86::{Exception, Exit, GuestVirtAddr, Vector};

/// See the module.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Stop {
    /// The instruction faults.
    Fault(Exception),
    /// Something must be asked first.
    Exit(Exit),
    /// The engine cannot do this.
    Unimplemented(&'static str),
}

/// The result of a part of an instruction.
pub(crate) type Exec<T = ()> = Result<T, Stop>;

impl From<Exception> for Stop {
    fn from(exception: Exception) -> Self {
        Self::Fault(exception)
    }
}

/// #GP with this error code.
pub(crate) fn gp(code: u32) -> Stop {
    Stop::Fault(Exception::gp(code))
}

/// #UD.
pub(crate) fn ud() -> Stop {
    Stop::Fault(Exception::ud())
}

/// An exception without error code.
pub(crate) fn plain(vector: Vector) -> Stop {
    Stop::Fault(Exception::plain(vector))
}

/// An exception with an error code.
pub(crate) fn coded(vector: Vector, code: u32) -> Stop {
    Stop::Fault(Exception::with_code(vector, code))
}

/// A page fault.
pub(crate) fn page_fault(linear: u64, code: x86::paging::PageFaultCode) -> Exception {
    Exception::page_fault(GuestVirtAddr::new(linear), code)
}

/// The value an answer carries, for an access of `size` bytes.
pub(crate) fn data_of(answer: Answer, size: usize) -> u64 {
    let value = match answer {
        Answer::Data(value) | Answer::MsrValue(value) => value,
        _ => 0,
    };
    if size >= 8 {
        value
    } else {
        value & ((1 << (8 * size)) - 1)
    }
}
