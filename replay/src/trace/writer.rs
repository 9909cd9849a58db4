//! Writing a trace.
//!
//! Purpose: header and chunks out to a file, each chunk in a single write, log records collected until a chunk is worth writing.
//! Invariants: after a failed write nothing more is written: the file stays a valid prefix with at most one torn chunk at its tail.
//! Taking in a record writes nothing unless the chunk is full; it allocates only while its buffer grows.
//! Elsewhere: how the file comes to be (`create`); when to flush ([`crate::recorder`]).

use super::chunk::frame;
use super::format::{ChunkKind, LOG_CHUNK_TARGET, file_header};
use super::records::{EndRecord, Image, MachineRecord, Record};
use super::wire::Encoder;
use std::io::{self, Write};

/// A trace could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the trace {name}: {source}{hint}", hint = hint(.source))]
pub struct WriteTraceError {
    /// The file.
    pub name: String,
    /// Why.
    pub source: io::Error,
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; what was recorded before can be replayed"
        }
        io::ErrorKind::BrokenPipe => "; its reader has gone away",
        _ => "",
    }
}

/// Writes one trace.
pub struct TraceWriter {
    out: Box<dyn Write + Send>,
    name: String,
    sequence: u64,
    log: Encoder,
    /// A write failed; the tail of the file may be torn.
    failed: bool,
    frame: Vec<u8>,
}

impl TraceWriter {
    /// Begins a trace on `out`, called `name` in messages: header, machine and images are written at once.
    pub fn new(
        out: Box<dyn Write + Send>,
        name: String,
        machine: &MachineRecord,
        images: &[Image],
    ) -> Result<Self, WriteTraceError> {
        let mut writer = Self {
            out,
            name,
            sequence: 0,
            log: Encoder::default(),
            failed: false,
            frame: file_header().to_vec(),
        };
        let images_len = u32::try_from(images.len()).unwrap_or(u32::MAX);
        let machine = MachineRecord {
            images: images_len,
            ..machine.clone()
        };
        let payload = postcard::to_stdvec(&machine).map_err(|e| writer.encoding(e))?;
        writer.chunk(ChunkKind::Machine, &payload)?;
        for Image { name, bytes } in images {
            let mut payload = postcard::to_stdvec(name).map_err(|e| writer.encoding(e))?;
            payload.extend_from_slice(bytes);
            writer.chunk(ChunkKind::Image, &payload)?;
        }
        // Not the size of an image for the rest of its life.
        writer.frame = Vec::new();
        Ok(writer)
    }

    /// Takes a record in; writes a chunk out when it is full.
    pub fn record(&mut self, record: Record) -> Result<(), WriteTraceError> {
        // Arrivals of the same moment stay in one chunk: they only mean something together.
        let together = matches!(
            record,
            Record::Arrival {
                moment: super::records::Moment::Same,
                ..
            }
        );
        if self.log.len() >= LOG_CHUNK_TARGET && !together {
            self.flush()?;
        }
        self.log.push(record).map_err(|e| self.encoding(e))
    }

    /// Whether records wait to be written.
    pub fn pending(&self) -> bool {
        !self.log.is_empty()
    }

    /// Whether a chunk's worth of records waits to be written.
    pub fn full(&self) -> bool {
        self.log.len() >= LOG_CHUNK_TARGET
    }

    /// Writes out what waits.
    pub fn flush(&mut self) -> Result<(), WriteTraceError> {
        if self.log.is_empty() {
            return Ok(());
        }
        let payload = self.log.take().map_err(|e| self.encoding(e))?;
        self.chunk(ChunkKind::Log, &payload)
    }

    /// Writes out what waits, and the end.
    pub fn finish(&mut self, end: &EndRecord) -> Result<(), WriteTraceError> {
        self.flush()?;
        let payload = postcard::to_stdvec(end).map_err(|e| self.encoding(e))?;
        self.chunk(ChunkKind::End, &payload)?;
        self.out.flush().map_err(|e| self.error(e))
    }

    fn chunk(&mut self, kind: ChunkKind, raw: &[u8]) -> Result<(), WriteTraceError> {
        if self.failed {
            return Err(self.error(io::Error::other("an earlier write failed")));
        }
        if raw.len() > kind.limit() as usize {
            let limit = kind.limit();
            self.failed = true;
            let what = format!(
                "the {kind} is {} bytes long; the limit is {limit}",
                raw.len()
            );
            return Err(self.error(io::Error::new(io::ErrorKind::InvalidInput, what)));
        }
        frame(kind, self.sequence, raw, &mut self.frame)
            .and_then(|()| self.out.write_all(&self.frame))
            .map_err(|e| {
                self.failed = true;
                self.error(e)
            })?;
        self.frame.clear();
        self.sequence += 1;
        Ok(())
    }

    fn error(&self, source: io::Error) -> WriteTraceError {
        WriteTraceError {
            name: self.name.clone(),
            source,
        }
    }

    fn encoding(&self, error: postcard::Error) -> WriteTraceError {
        self.error(io::Error::new(io::ErrorKind::InvalidInput, error))
    }
}
