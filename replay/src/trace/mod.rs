//! The trace file: one self-contained file that holds everything a replay needs.
//!
//! Purpose: write a recording as it happens, and read one back, whole or as far as it is intact.
//! Invariants:
//! - Append-only, in whole chunks: whatever byte a recorder is killed at, what lies before is a valid prefix.
//! - Every byte of the file is covered by a checksum. Bad input is an error that names the offset, never a panic or a hang, and
//!   no size that the file claims is believed before it was compared with a limit.
//! - The encoding of a record is part of the format ([`format::VERSION`]): tests hold its bytes fixed.
//!
//! Elsewhere: what is worth recording ([`crate::recorder`]), what it means ([`crate::replayer`]). The format in prose: `docs/trace-format.md`.

mod chunk;
mod create;
mod error;
pub mod format;
mod inspect;
mod reader;
mod records;
mod wire;
mod writer;

pub use create::CreateTraceError;
pub use error::{Damage, Fault, TraceError};
pub use inspect::{Check, ChunkCount, Info, check, dump, info};
pub use reader::{Log, OpenTraceError, Source, Trace};
pub use records::{
    DigestRecord, EndRecord, HostCpu, Image, Landmark, MachineRecord, Moment, PageDigest, Record,
    Totals,
};
pub use writer::{TraceWriter, WriteTraceError};
