//! What can be wrong with a trace.
//!
//! Purpose: name the place and the fault, so that a person can tell a cut file from a damaged one from one of another version.
//! Invariants: an offset counts bytes from the start of the file; for a chunk it is where the chunk begins.
//! Elsewhere: errors of writing (`writer`, `create`).

use super::format::{ChunkKind, VERSION};

/// A trace that cannot be read, and where.
#[derive(Debug, thiserror::Error)]
#[error("at offset {offset}: {what}")]
pub struct TraceError {
    /// Bytes from the start of the file.
    pub offset: u64,
    /// What is wrong there.
    pub what: Fault,
}

/// Where the intact part of a trace ends, and why.
#[derive(Debug, thiserror::Error)]
#[error("intact up to offset {offset}: {reason}")]
pub struct Damage {
    /// Bytes from the start of the file that are intact.
    pub offset: u64,
    /// What comes then.
    pub reason: Fault,
}

/// What is wrong.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The magic number is missing.
    #[error("this is not a chronovisor trace")]
    NotATrace,
    /// Another version.
    #[error(
        "this is a trace of format version {found}, and this build reads version {VERSION}{}",
        if *.intact { "; use the chronovisor that recorded it" } else { " (the header's checksum does not match: the file may be damaged)" }
    )]
    Version {
        /// The version in the file.
        found: u32,
        /// Whether the header's checksum agrees.
        intact: bool,
    },
    /// The file header is damaged.
    #[error("the file header is damaged (its checksum does not match)")]
    HeaderChecksum,
    /// The file ends too early.
    #[error("the file ends inside {0}")]
    Truncated(&'static str),
    /// It ends between two chunks, but without its end.
    #[error("the recording stops here without an end; its recorder was interrupted")]
    NoEnd,
    /// No chunk where one must begin.
    #[error("no chunk begins here")]
    NoMarker,
    /// A chunk whose checksum does not match.
    #[error("the chunk that begins here is damaged (its checksum does not match)")]
    ChunkChecksum,
    /// A chunk out of sequence.
    #[error(
        "chunk {found} where chunk {expected} should be; part of the file is missing or repeated"
    )]
    Sequence {
        /// The number that should be here.
        expected: u64,
        /// The number that is.
        found: u64,
    },
    /// A kind this build does not know.
    #[error("chunk kind {0} is not known to this build")]
    UnknownKind(u16),
    /// Flags this build does not know.
    #[error("chunk flags {0:#06x} are not known to this build")]
    UnknownFlags(u16),
    /// A size past the limit.
    #[error("{kind} chunk of {size} bytes; the limit is {limit}")]
    TooLarge {
        /// Which kind.
        kind: ChunkKind,
        /// What the file says.
        size: u32,
        /// What is allowed.
        limit: u32,
    },
    /// The payload is no zstd frame of the length announced.
    #[error("the {kind} chunk cannot be decompressed: {reason}")]
    Compression {
        /// Which kind.
        kind: ChunkKind,
        /// What went wrong.
        reason: String,
    },
    /// The payload does not decode.
    #[error("the {kind} chunk does not decode: {reason}")]
    Payload {
        /// Which kind.
        kind: ChunkKind,
        /// What went wrong.
        reason: String,
    },
    /// A chunk of this kind may not stand here.
    #[error("{found} chunk where {expected} should be")]
    OutOfPlace {
        /// What is here.
        found: ChunkKind,
        /// What belongs here.
        expected: &'static str,
    },
    /// Something follows the end.
    #[error("more data after the end of the recording")]
    AfterEnd,
    /// The host could not read the file.
    #[error("cannot read the file: {0}")]
    Read(std::io::Error),
}

impl Fault {
    /// Puts it at an offset.
    pub(crate) fn at(self, offset: u64) -> TraceError {
        TraceError { offset, what: self }
    }
}
