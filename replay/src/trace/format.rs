//! The numbers of trace format version 1.
//!
//! Purpose: magic, version, chunk kinds, flags and limits, in one place for writer, reader and documentation.
//! Invariants: nothing here changes without a new [`VERSION`]. The first [`FILE_HEADER_LEN`] bytes have the same layout in every version.
//! Elsewhere: framing (`chunk`), payloads (`records`, `wire`).

use std::fmt;

/// The first bytes of every trace. As in PNG: not text, and damaged by a transfer that changes line ends or clears bit 7.
pub const MAGIC: [u8; 8] = *b"\x89CVT\r\n\x1a\n";
/// The version this build reads and writes.
pub const VERSION: u32 = 1;
/// Magic, version (u32), reserved (u32, zero), checksum of those 16 bytes (u64).
pub const FILE_HEADER_LEN: usize = 24;

/// What every chunk begins with.
pub const CHUNK_MARKER: [u8; 4] = *b"CVch";
/// Marker, kind (u16), flags (u16), sequence number (u64), raw length (u32), stored length (u32), checksum (u64).
pub const CHUNK_HEADER_LEN: usize = 32;
/// Chunk flag: a reader that does not know the kind may skip the chunk.
pub const FLAG_SKIPPABLE: u16 = 1 << 0;

/// zstd level of every payload: level 3 compresses a log at several hundred MB/s.
pub(crate) const COMPRESSION_LEVEL: i32 = 3;
/// The largest zstd window a reader accepts, as a power of two; level 3 uses 2 MiB at most.
pub(crate) const WINDOW_LOG_MAX: u32 = 23;

/// A log chunk is written out when it has grown to this many bytes.
pub(crate) const LOG_CHUNK_TARGET: usize = 64 << 10;

/// What a chunk holds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum ChunkKind {
    /// What was recorded, on what: always the first chunk.
    Machine,
    /// A file the guest was started with: right after the machine, as many as it announces.
    Image,
    /// Records, in the order in which they happened.
    Log,
    /// How it ended: the last chunk of a complete trace.
    End,
}

impl ChunkKind {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::Machine, Self::Image, Self::Log, Self::End];

    /// The number in the file.
    pub const fn code(self) -> u16 {
        match self {
            Self::Machine => 1,
            Self::Image => 2,
            Self::Log => 3,
            Self::End => 4,
        }
    }

    /// The kind with this number.
    pub fn from_code(code: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }

    /// The most bytes such a chunk may hold, uncompressed.
    pub const fn limit(self) -> u32 {
        match self {
            Self::Machine => 1 << 20,
            Self::Image => 512 << 20,
            // A landmark may name every page of 3 GiB.
            Self::Log => 32 << 20,
            Self::End => 64 << 10,
        }
    }

    /// The name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Machine => "machine",
            Self::Image => "image",
            Self::Log => "log",
            Self::End => "end",
        }
    }
}

impl fmt::Display for ChunkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The checksum used throughout: XXH3, 64 bits, seed 0.
pub(crate) fn checksum(parts: &[&[u8]]) -> u64 {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    for part in parts {
        hash.update(part);
    }
    hash.digest()
}

/// The file header of this version.
pub(crate) fn file_header() -> [u8; FILE_HEADER_LEN] {
    let mut header = [0; FILE_HEADER_LEN];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    let sum = checksum(&[&header[..16]]);
    header[16..].copy_from_slice(&sum.to_le_bytes());
    header
}
