//! Chunk framing.
//!
//! Purpose: bytes to chunks and back: header, sequence number, compression, checksum.
//! Invariants: a chunk is handed out only when its checksum matched; memory in use is bounded by the kind's limit
//! and by what the file really holds, whatever the header claims; [`frame`] yields a whole chunk for a single write.
//! Elsewhere: which chunks may follow which (`reader`), payloads (`records`, `wire`).

use super::error::{Fault, TraceError};
use super::format::{
    CHUNK_HEADER_LEN, CHUNK_MARKER, COMPRESSION_LEVEL, ChunkKind, FILE_HEADER_LEN, FLAG_SKIPPABLE,
    MAGIC, VERSION, WINDOW_LOG_MAX, checksum,
};
use std::io::{self, Read};
use xxhash_rust::xxh3::Xxh3;

/// Appends one whole chunk to `out`. The caller has checked `raw` against the kind's limit.
pub(super) fn frame(
    kind: ChunkKind,
    sequence: u64,
    raw: &[u8],
    out: &mut Vec<u8>,
) -> io::Result<()> {
    let too_long = || io::Error::new(io::ErrorKind::InvalidInput, "chunk longer than 4 GiB");
    let payload = zstd::bulk::compress(raw, COMPRESSION_LEVEL)?;
    let raw_len = u32::try_from(raw.len()).map_err(|_| too_long())?;
    let stored_len = u32::try_from(payload.len()).map_err(|_| too_long())?;
    let start = out.len();
    out.extend_from_slice(&CHUNK_MARKER);
    out.extend_from_slice(&kind.code().to_le_bytes());
    out.extend_from_slice(&0u16.to_le_bytes());
    out.extend_from_slice(&sequence.to_le_bytes());
    out.extend_from_slice(&raw_len.to_le_bytes());
    out.extend_from_slice(&stored_len.to_le_bytes());
    let sum = checksum(&[out.get(start..).unwrap_or_default(), &payload]);
    out.extend_from_slice(&sum.to_le_bytes());
    out.extend_from_slice(&payload);
    Ok(())
}

/// A chunk whose checksum matched.
pub(super) struct Chunk {
    /// Where it begins.
    pub(super) offset: u64,
    pub(super) sequence: u64,
    pub(super) kind: ChunkKind,
    pub(super) raw_len: u32,
    /// As stored.
    payload: Vec<u8>,
}

impl Chunk {
    /// The payload, decompressed.
    pub(super) fn raw(&self) -> Result<Vec<u8>, TraceError> {
        decompress(&self.payload, self.raw_len).map_err(|e| {
            Fault::Compression {
                kind: self.kind,
                reason: e.to_string(),
            }
            .at(self.offset)
        })
    }

    /// Bytes in the file, header included.
    pub(super) fn stored_len(&self) -> u64 {
        CHUNK_HEADER_LEN as u64 + self.payload.len() as u64
    }
}

/// One zstd frame of exactly `raw_len` bytes.
fn decompress(payload: &[u8], raw_len: u32) -> io::Result<Vec<u8>> {
    let mismatch = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut rest = payload;
    let mut decoder = zstd::stream::read::Decoder::with_buffer(&mut rest)?.single_frame();
    decoder.window_log_max(WINDOW_LOG_MAX)?;
    let mut raw = Vec::new();
    // One byte more than announced, to notice a longer one; the vector grows with what is really there.
    decoder
        .by_ref()
        .take(u64::from(raw_len) + 1)
        .read_to_end(&mut raw)?;
    drop(decoder);
    if raw.len() as u64 != u64::from(raw_len) {
        return Err(mismatch("its length is not the one announced"));
    }
    if !rest.is_empty() {
        return Err(mismatch("bytes are left over"));
    }
    Ok(raw)
}

struct ChunkHeader {
    kind: u16,
    flags: u16,
    sequence: u64,
    raw_len: u32,
    stored_len: u32,
    sum: u64,
}

impl ChunkHeader {
    fn parse(bytes: &[u8; CHUNK_HEADER_LEN]) -> Option<Self> {
        let [m0, m1, m2, m3, k0, k1, f0, f1, rest @ ..] = *bytes;
        if [m0, m1, m2, m3] != CHUNK_MARKER {
            return None;
        }
        let (sequence, rest) = rest.split_first_chunk::<8>()?;
        let (raw_len, rest) = rest.split_first_chunk::<4>()?;
        let (stored_len, rest) = rest.split_first_chunk::<4>()?;
        let (sum, _) = rest.split_first_chunk::<8>()?;
        Some(Self {
            kind: u16::from_le_bytes([k0, k1]),
            flags: u16::from_le_bytes([f0, f1]),
            sequence: u64::from_le_bytes(*sequence),
            raw_len: u32::from_le_bytes(*raw_len),
            stored_len: u32::from_le_bytes(*stored_len),
            sum: u64::from_le_bytes(*sum),
        })
    }
}

/// Reads chunks one after the other.
pub(super) struct ChunkReader<R> {
    input: R,
    /// Bytes consumed so far: where the next chunk begins.
    offset: u64,
    sequence: u64,
}

impl<R: Read> ChunkReader<R> {
    /// Reads and checks the file header.
    pub(super) fn open(mut input: R) -> Result<Self, TraceError> {
        let mut header = [0; FILE_HEADER_LEN];
        let got = read_up_to(&mut input, &mut header).map_err(|e| Fault::Read(e).at(0))?;
        let there = header.get(..got).unwrap_or_default();
        if there.iter().zip(&MAGIC).any(|(a, b)| a != b) || got == 0 {
            return Err(Fault::NotATrace.at(0));
        }
        if got < FILE_HEADER_LEN {
            return Err(Fault::Truncated("the file header").at(got as u64));
        }
        let (fields, sum) = header.split_at(16);
        let intact = checksum(&[fields]).to_le_bytes() == *sum;
        let found = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        if found != VERSION {
            return Err(Fault::Version { found, intact }.at(8));
        }
        if !intact || header[12..16] != [0; 4] {
            return Err(Fault::HeaderChecksum.at(0));
        }
        Ok(Self {
            input,
            offset: FILE_HEADER_LEN as u64,
            sequence: 0,
        })
    }

    /// A reader that stands at a chunk which an earlier pass found there.
    pub(super) fn resume(input: R, offset: u64, sequence: u64) -> Self {
        Self {
            input,
            offset,
            sequence,
        }
    }

    /// Where the next chunk begins.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// The next chunk of a known kind; `None` where the file ends.
    pub(super) fn next(&mut self) -> Result<Option<Chunk>, TraceError> {
        loop {
            let offset = self.offset;
            let Some(header) = self.header()? else {
                return Ok(None);
            };
            let Some(kind) = ChunkKind::from_code(header.kind) else {
                let intact = self.skip(&header)?;
                if !intact {
                    return Err(Fault::ChunkChecksum.at(offset));
                }
                if header.flags & FLAG_SKIPPABLE == 0 {
                    return Err(Fault::UnknownKind(header.kind).at(offset));
                }
                self.check_place(&header, offset)?;
                continue;
            };
            let payload = self.payload(&header, kind)?;
            if checksum(&[&header_fields(&header), &payload]) != header.sum {
                return Err(Fault::ChunkChecksum.at(offset));
            }
            self.check_place(&header, offset)?;
            self.offset = offset + CHUNK_HEADER_LEN as u64 + payload.len() as u64;
            let ChunkHeader {
                sequence, raw_len, ..
            } = header;
            return Ok(Some(Chunk {
                offset,
                sequence,
                kind,
                raw_len,
                payload,
            }));
        }
    }

    fn header(&mut self) -> Result<Option<ChunkHeader>, TraceError> {
        let mut bytes = [0; CHUNK_HEADER_LEN];
        let got =
            read_up_to(&mut self.input, &mut bytes).map_err(|e| Fault::Read(e).at(self.offset))?;
        if got == 0 {
            return Ok(None);
        }
        let there = bytes.get(..got).unwrap_or_default();
        if there.iter().zip(&CHUNK_MARKER).any(|(a, b)| a != b) {
            return Err(Fault::NoMarker.at(self.offset));
        }
        if got < CHUNK_HEADER_LEN {
            return Err(Fault::Truncated("a chunk header").at(self.offset));
        }
        ChunkHeader::parse(&bytes)
            .map(Some)
            .ok_or_else(|| Fault::NoMarker.at(self.offset))
    }

    fn payload(&mut self, header: &ChunkHeader, kind: ChunkKind) -> Result<Vec<u8>, TraceError> {
        let offset = self.offset;
        let limit = kind.limit();
        let too_large = |size| Fault::TooLarge { kind, size, limit }.at(offset);
        if header.raw_len > limit {
            return Err(too_large(header.raw_len));
        }
        if header.stored_len as usize > zstd::zstd_safe::compress_bound(limit as usize) {
            return Err(too_large(header.stored_len));
        }
        let mut payload = Vec::new();
        let stored_len = u64::from(header.stored_len);
        self.input
            .by_ref()
            .take(stored_len)
            .read_to_end(&mut payload)
            .map_err(|e| Fault::Read(e).at(offset))?;
        if (payload.len() as u64) < stored_len {
            return Err(Fault::Truncated("a chunk").at(offset));
        }
        Ok(payload)
    }

    /// Passes a chunk's payload; whether its checksum matched.
    fn skip(&mut self, header: &ChunkHeader) -> Result<bool, TraceError> {
        let offset = self.offset;
        let mut hash = Xxh3::new();
        hash.update(&header_fields(header));
        let mut left = u64::from(header.stored_len);
        let mut block = [0; 16 << 10];
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(block.len());
            let part = block.get_mut(..want).unwrap_or_default();
            let got = read_up_to(&mut self.input, part).map_err(|e| Fault::Read(e).at(offset))?;
            hash.update(part.get(..got).unwrap_or_default());
            left -= got as u64;
            if got < want {
                return Err(Fault::Truncated("a chunk").at(offset));
            }
        }
        self.offset = offset + CHUNK_HEADER_LEN as u64 + u64::from(header.stored_len);
        Ok(hash.digest() == header.sum)
    }

    fn check_place(&mut self, header: &ChunkHeader, offset: u64) -> Result<(), TraceError> {
        if header.flags & !FLAG_SKIPPABLE != 0 {
            return Err(Fault::UnknownFlags(header.flags).at(offset));
        }
        if header.sequence != self.sequence {
            let expected = self.sequence;
            return Err(Fault::Sequence {
                expected,
                found: header.sequence,
            }
            .at(offset));
        }
        self.sequence += 1;
        Ok(())
    }
}

/// The header's bytes that the checksum covers.
fn header_fields(header: &ChunkHeader) -> [u8; 24] {
    let mut fields = [0; 24];
    fields[..4].copy_from_slice(&CHUNK_MARKER);
    fields[4..6].copy_from_slice(&header.kind.to_le_bytes());
    fields[6..8].copy_from_slice(&header.flags.to_le_bytes());
    fields[8..16].copy_from_slice(&header.sequence.to_le_bytes());
    fields[16..20].copy_from_slice(&header.raw_len.to_le_bytes());
    fields[20..24].copy_from_slice(&header.stored_len.to_le_bytes());
    fields
}

/// Reads until `out` is full or the input ends.
fn read_up_to(input: &mut impl Read, out: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while let Some(rest) = out.get_mut(got..).filter(|rest| !rest.is_empty()) {
        match input.read(rest) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(got)
}
