//! Reading a trace.
//!
//! Purpose: one pass over the file that checks all of it and finds how far it is intact; then records by number, a chunk at a time.
//! Invariants: damage before the first record is an error; damage after it ends the trace there ([`Trace::damage`]), and what
//! lies before is intact. Memory holds machine, images and the list of arrivals, but of the log never more than one chunk.
//! Elsewhere: framing (`chunk`), what records mean ([`crate::replayer`]).

use super::chunk::{Chunk, ChunkReader};
use super::error::{Damage, Fault, TraceError};
use super::format::{ChunkKind, MAGIC};
use super::records::{EndRecord, Image, MachineRecord, Moment, Record};
use super::wire::{self, Base};
use machine::debuggable::EventView;
use machine::environment::SyncOrdinal;
use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Where a trace is read from.
pub trait Source: Read + Seek + Send {}

impl<T: Read + Seek + Send> Source for T {}

/// Why a trace file cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenTraceError {
    /// The host refused.
    #[error("cannot open {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is no usable trace.
    #[error("{}: {source}", path.display())]
    Trace {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        source: TraceError,
    },
}

/// A trace whose every byte was checked.
pub struct Trace {
    /// What was recorded, on what.
    pub machine: MachineRecord,
    /// The files the guest was started with; the kernel is the first.
    pub images: Vec<Image>,
    /// Every arrival.
    pub events: Vec<EventView>,
    /// Sync point of the last record.
    pub last: SyncOrdinal,
    /// How it ended; `None` when the recorder was interrupted or the end is damaged.
    pub end: Option<EndRecord>,
    /// Why the trace is not whole; `None` when it is.
    pub damage: Option<Damage>,
    /// The records.
    pub log: Log,
    /// Chunks by kind: how many, and their bytes uncompressed and in the file.
    pub(super) sizes: Vec<(ChunkKind, u64, u64, u64)>,
}

impl std::fmt::Debug for Trace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trace")
            .field("machine", &self.machine)
            .field("images", &self.images)
            .field("records", &self.log.records)
            .field("end", &self.end)
            .field("damage", &self.damage)
            .finish_non_exhaustive()
    }
}

impl Trace {
    /// Opens the file `path`. What is no regular file (a pipe) is read into memory.
    pub fn open(path: &Path) -> Result<Self, OpenTraceError> {
        let io_error = |source| OpenTraceError::Io {
            path: path.to_owned(),
            source,
        };
        let mut file = File::open(path).map_err(io_error)?;
        let source: Box<dyn Source> = if file.metadata().map_err(io_error)?.is_file() {
            Box::new(file)
        } else {
            // The magic number first, so that an endless device is not read to its end.
            let mut bytes = Vec::new();
            let magic = MAGIC.len() as u64;
            file.by_ref()
                .take(magic)
                .read_to_end(&mut bytes)
                .map_err(io_error)?;
            if bytes == MAGIC {
                file.read_to_end(&mut bytes).map_err(io_error)?;
            }
            Box::new(Cursor::new(bytes))
        };
        Self::read(source).map_err(|source| OpenTraceError::Trace {
            path: path.to_owned(),
            source,
        })
    }

    /// Reads a trace from its first byte on.
    pub fn read(mut source: Box<dyn Source>) -> Result<Self, TraceError> {
        let mut chunks = ChunkReader::open(&mut source)?;
        let mut sizes = Vec::new();
        let machine = first_chunk(&mut chunks, ChunkKind::Machine, &mut sizes)?;
        let machine: MachineRecord = decode_whole(&machine)?;
        let mut images = Vec::new();
        for _ in 0..machine.images {
            let chunk = first_chunk(&mut chunks, ChunkKind::Image, &mut sizes)?;
            images.push(decode_image(&chunk)?);
        }
        let mut scan = Scan {
            sizes,
            ..Scan::default()
        };
        let damage = loop {
            let next = chunks.next();
            match next.and_then(|chunk| scan.chunk(chunk, chunks.offset())) {
                Ok(true) => {}
                Ok(false) => break None,
                Err(TraceError {
                    offset,
                    what: Fault::Read(e),
                }) => {
                    return Err(Fault::Read(e).at(offset));
                }
                Err(TraceError { offset, what }) => {
                    break Some(Damage {
                        offset,
                        reason: what,
                    });
                }
            }
        };
        Ok(Self {
            machine,
            images,
            events: scan.events,
            last: scan.last,
            end: scan.end,
            damage,
            log: Log {
                source,
                chunks: scan.chunks,
                records: scan.records,
                loaded: None,
            },
            sizes: scan.sizes,
        })
    }

    /// Whether the trace has its end.
    pub fn complete(&self) -> bool {
        self.end.is_some()
    }
}

/// A chunk that must be there: machine, image.
fn first_chunk<R: Read>(
    chunks: &mut ChunkReader<R>,
    kind: ChunkKind,
    sizes: &mut Vec<(ChunkKind, u64, u64, u64)>,
) -> Result<Chunk, TraceError> {
    let offset = chunks.offset();
    let missing = match kind {
        ChunkKind::Machine => "the description of the machine",
        _ => "an image",
    };
    match chunks.next()? {
        None => Err(Fault::Truncated(match kind {
            ChunkKind::Machine => "its beginning, before the description of the machine",
            _ => "its beginning, before all images",
        })
        .at(offset)),
        Some(chunk) if chunk.kind == kind => {
            count(sizes, &chunk);
            Ok(chunk)
        }
        Some(chunk) => Err(Fault::OutOfPlace {
            found: chunk.kind,
            expected: missing,
        }
        .at(chunk.offset)),
    }
}

fn count(sizes: &mut Vec<(ChunkKind, u64, u64, u64)>, chunk: &Chunk) {
    let raw = u64::from(chunk.raw_len);
    let stored = chunk.stored_len();
    match sizes.iter_mut().find(|(kind, ..)| *kind == chunk.kind) {
        Some((_, chunks, raw_sum, stored_sum)) => {
            *chunks += 1;
            *raw_sum += raw;
            *stored_sum += stored;
        }
        None => sizes.push((chunk.kind, 1, raw, stored)),
    }
}

/// A payload that is one postcard value and nothing else.
fn decode_whole<T: serde::de::DeserializeOwned>(chunk: &Chunk) -> Result<T, TraceError> {
    let raw = chunk.raw()?;
    let fault = |reason: String| {
        Fault::Payload {
            kind: chunk.kind,
            reason,
        }
        .at(chunk.offset)
    };
    let (value, rest) = postcard::take_from_bytes(&raw).map_err(|e| fault(e.to_string()))?;
    if !rest.is_empty() {
        return Err(fault(format!("{} bytes are left over", rest.len())));
    }
    Ok(value)
}

fn decode_image(chunk: &Chunk) -> Result<Image, TraceError> {
    let mut raw = chunk.raw()?;
    let (name, rest) = postcard::take_from_bytes::<String>(&raw).map_err(|e| {
        Fault::Payload {
            kind: chunk.kind,
            reason: e.to_string(),
        }
        .at(chunk.offset)
    })?;
    let start = raw.len() - rest.len();
    raw.drain(..start);
    Ok(Image { name, bytes: raw })
}

/// One chunk of the log, as found by the first pass.
#[derive(Clone, Copy, Debug)]
struct LogChunk {
    offset: u64,
    sequence: u64,
    /// Number of its first record.
    first: u64,
    records: u64,
}

/// The first pass over log and end.
#[derive(Default)]
struct Scan {
    base: Option<Base>,
    chunks: Vec<LogChunk>,
    records: u64,
    events: Vec<EventView>,
    last: SyncOrdinal,
    end: Option<EndRecord>,
    sizes: Vec<(ChunkKind, u64, u64, u64)>,
}

impl Scan {
    /// Takes in what came next; false where the trace rightly ends. `len`: bytes read so far.
    fn chunk(&mut self, chunk: Option<Chunk>, len: u64) -> Result<bool, TraceError> {
        let Some(chunk) = chunk else {
            return if self.end.is_some() {
                Ok(false)
            } else {
                Err(Fault::NoEnd.at(len))
            };
        };
        if self.end.is_some() {
            return Err(Fault::AfterEnd.at(chunk.offset));
        }
        match chunk.kind {
            ChunkKind::Log => self.log(&chunk)?,
            ChunkKind::End => self.end = Some(decode_whole(&chunk)?),
            found => {
                let expected = "the log or the end";
                return Err(Fault::OutOfPlace { found, expected }.at(chunk.offset));
            }
        }
        count(&mut self.sizes, &chunk);
        Ok(true)
    }

    fn log(&mut self, chunk: &Chunk) -> Result<(), TraceError> {
        let raw = chunk.raw()?;
        let mut base = Some(self.base.unwrap_or_default());
        let records = wire::decode(&raw, &mut base).map_err(|reason| {
            Fault::Payload {
                kind: ChunkKind::Log,
                reason,
            }
            .at(chunk.offset)
        })?;
        self.base = base;
        let count = records.len() as u64;
        let first = self.records;
        let Chunk {
            offset, sequence, ..
        } = *chunk;
        self.chunks.push(LogChunk {
            offset,
            sequence,
            first,
            records: count,
        });
        self.records += count;
        for record in records {
            self.last = record.after();
            self.event(record);
        }
        Ok(())
    }

    fn event(&mut self, record: Record) {
        let Record::Arrival {
            after,
            moment,
            arrival,
            ..
        } = record
        else {
            return;
        };
        let (position, landmark) = match moment {
            Moment::Sync => (None, false),
            Moment::Landmark(_) => (None, true),
            Moment::Position(position) => (Some(position), true),
            Moment::Same => self
                .events
                .last()
                .map_or((None, false), |last| (last.position, last.landmark)),
        };
        let index = self.events.len() as u64;
        self.events.push(EventView {
            index,
            after,
            position,
            arrival,
            landmark,
        });
    }
}

/// The records of a trace, by number.
pub struct Log {
    source: Box<dyn Source>,
    chunks: Vec<LogChunk>,
    records: u64,
    /// The chunk at hand.
    loaded: Option<(LogChunk, Vec<Record>)>,
}

impl Log {
    /// Records in the log.
    pub fn len(&self) -> u64 {
        self.records
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.records == 0
    }

    /// Record `index`, counted from 0; `None` past the end. In order, each chunk is read once.
    pub fn get(&mut self, index: u64) -> Result<Option<&Record>, TraceError> {
        let here = |chunk: &LogChunk| (chunk.first..chunk.first + chunk.records).contains(&index);
        if !self.loaded.as_ref().is_some_and(|(chunk, _)| here(chunk)) {
            let at = self
                .chunks
                .partition_point(|chunk| chunk.first + chunk.records <= index);
            let Some(&chunk) = self.chunks.get(at) else {
                return Ok(None);
            };
            self.loaded = Some((chunk, self.load(chunk)?));
        }
        Ok(self.loaded.as_ref().and_then(|(chunk, records)| {
            records.get(usize::try_from(index.checked_sub(chunk.first)?).ok()?)
        }))
    }

    /// Reads a chunk again that the first pass found intact.
    fn load(&mut self, chunk: LogChunk) -> Result<Vec<Record>, TraceError> {
        let LogChunk {
            offset, sequence, ..
        } = chunk;
        self.source
            .seek(SeekFrom::Start(offset))
            .map_err(|e| Fault::Read(e).at(offset))?;
        let mut chunks = ChunkReader::resume(&mut self.source, offset, sequence);
        let Some(found) = chunks.next()? else {
            return Err(Fault::Truncated("a chunk").at(offset));
        };
        let records = wire::decode(&found.raw()?, &mut None).map_err(|reason| {
            Fault::Payload {
                kind: found.kind,
                reason,
            }
            .at(offset)
        })?;
        if records.len() as u64 != chunk.records {
            let reason = "the file has changed since it was opened".to_owned();
            return Err(Fault::Payload {
                kind: found.kind,
                reason,
            }
            .at(offset));
        }
        Ok(records)
    }
}
