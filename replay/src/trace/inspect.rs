//! Looking into a trace file without running it.
//!
//! Purpose: what `trace info`, `trace check` and `trace dump` show, as values that serialise.
//! Invariants: reading only; of an incomplete or damaged trace, everything that is intact is shown.
//! Elsewhere: whether a trace replays, which takes a replay ([`crate::timeline`]); presentation (the command line).

use super::error::{Damage, TraceError};
use super::format::VERSION;
use super::reader::Trace;
use super::records::{DigestRecord, HostCpu, Landmark, Moment, PageDigest, Record, Totals};
use crate::digest::Digest;
use machine::environment::{Arrival, Channel};
use serde::Serialize;
use x86::{Position, Registers};

/// A summary of a trace.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Info {
    /// Format version.
    pub version: u32,
    /// The chronovisor that recorded.
    pub chronovisor: String,
    /// The engine that recorded.
    pub engine: &'static str,
    /// The host's processor.
    pub host: HostCpu,
    /// Guest memory in bytes.
    pub memory: u64,
    /// The CPU model the guest was shown.
    pub cpu: &'static str,
    /// Virtual time 0, in seconds since 1970.
    pub boot_time: i64,
    /// The kernel's command line.
    pub cmdline: String,
    /// Names and sizes of the images.
    pub images: Vec<(String, u64)>,
    /// Whether the trace has its end.
    pub complete: bool,
    /// How the guest ended, in words.
    pub end: Option<String>,
    /// The exit status that follows from that.
    pub status: Option<u8>,
    /// Why the trace is not whole, and the offset up to which it is.
    pub damage: Option<String>,
    /// Sync points, up to the last that is known.
    pub sync_points: u64,
    /// Instructions, when the recording engine counted.
    pub instructions: Option<u64>,
    /// Records in the log.
    pub records: u64,
    /// Arrivals in it.
    pub arrivals: u64,
    /// Sums from the end chunk.
    pub totals: Option<Totals>,
    /// Chunks by kind.
    pub chunks: Vec<ChunkCount>,
}

/// How much of the file one kind of chunk takes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ChunkCount {
    /// Which kind.
    pub kind: &'static str,
    /// Chunks.
    pub chunks: u64,
    /// Bytes uncompressed.
    pub raw: u64,
    /// Bytes in the file, headers included.
    pub stored: u64,
}

/// Sums up a trace.
pub fn info(trace: &Trace) -> Info {
    let machine = &trace.machine;
    let end = trace.end.as_ref();
    Info {
        version: VERSION,
        chronovisor: machine.chronovisor.clone(),
        engine: machine.engine.name(),
        host: machine.host.clone(),
        memory: machine.memory,
        cpu: machine.cpu.name(),
        boot_time: machine.board.boot_time,
        cmdline: machine.cmdline.clone(),
        images: trace
            .images
            .iter()
            .map(|image| (image.name.clone(), image.bytes.len() as u64))
            .collect(),
        complete: trace.complete(),
        end: end.map(|end| end.end.to_string()),
        status: end.map(|end| end.end.status()),
        damage: trace.damage.as_ref().map(Damage::to_string),
        sync_points: end.map_or(trace.last.0, |end| end.after.0),
        instructions: end
            .and_then(|end| end.position)
            .map(|position| position.retired.get()),
        records: trace.log.len(),
        arrivals: trace.events.len() as u64,
        totals: end.map(|end| end.totals),
        chunks: trace
            .sizes
            .iter()
            .map(|&(kind, chunks, raw, stored)| ChunkCount {
                kind: kind.name(),
                chunks,
                raw,
                stored,
            })
            .collect(),
    }
}

/// Whether a trace file is intact.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Check {
    /// It has its end, and nothing is damaged.
    pub intact: bool,
    /// It has its end.
    pub complete: bool,
    /// Bytes from the start that are intact; `None` when all are.
    pub intact_up_to: Option<u64>,
    /// What is wrong there.
    pub reason: Option<String>,
    /// Chunks whose checksums match.
    pub chunks: u64,
    /// Records that can be replayed.
    pub records: u64,
}

/// What opening a trace found out about its integrity.
pub fn check(trace: &Trace) -> Check {
    let damage = trace.damage.as_ref();
    Check {
        intact: trace.complete() && damage.is_none(),
        complete: trace.complete(),
        intact_up_to: damage.map(|damage| damage.offset),
        reason: damage.map(|damage| damage.reason.to_string()),
        chunks: trace.sizes.iter().map(|(_, chunks, ..)| chunks).sum(),
        records: trace.log.len(),
    }
}

/// One record, for people and scripts: addresses, registers and digests in hexadecimal.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct DumpRecord {
    /// Its number.
    pub index: u64,
    /// Sync points passed.
    pub after: u64,
    /// What it says.
    #[serde(flatten)]
    pub what: DumpKind,
}

/// What a record says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "record", rename_all = "snake_case")]
#[allow(missing_docs)] // As in `Record`.
pub enum DumpKind {
    ClockRead {
        nanos: u64,
    },
    Entropy {
        bytes: String,
    },
    Arrival {
        vcpu: u8,
        moment: DumpMoment,
        arrival: DumpArrival,
    },
    Digest(Box<DumpDigest>),
}

/// When.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)] // As in `Moment`.
pub enum DumpMoment {
    Sync,
    Same,
    Position(String),
    Landmark {
        registers: DumpRegisters,
        rest: Digest,
        deliveries: u64,
        pages: Vec<DumpPage>,
    },
}

/// What arrived.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)] // As in `Arrival`.
pub enum DumpArrival {
    Time { nanos: u64 },
    Input { channel: Channel, bytes: String },
    Stop,
}

/// A page and its digest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct DumpPage {
    /// The page's first address.
    pub addr: String,
    /// Of its contents.
    pub digest: Digest,
}

/// Registers by name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DumpRegisters(Registers);

impl Serialize for DumpRegisters {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(
            crate::divergence::named_registers(&self.0)
                .map(|(name, value)| (name, format!("{value:#x}"))),
        )
    }
}

/// A digest record.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[allow(missing_docs)] // As in `DigestRecord`.
pub struct DumpDigest {
    pub position: Option<String>,
    pub registers: DumpRegisters,
    pub cpu: crate::digest::CpuDigest,
    pub pages: Vec<DumpPage>,
    pub board: Digest,
    pub exits: Digest,
    pub console: Digest,
}

/// Every record of the trace, in order. Ends at the first one that cannot be read.
pub fn dump(trace: &mut Trace) -> impl Iterator<Item = Result<DumpRecord, TraceError>> + '_ {
    let log = &mut trace.log;
    (0..log.len()).map(move |index| {
        let record = log.get(index)?.ok_or(TraceError {
            offset: 0,
            what: super::Fault::Truncated("the log"),
        })?;
        Ok(DumpRecord {
            index,
            after: record.after().0,
            what: dump_kind(record),
        })
    })
}

fn dump_kind(record: &Record) -> DumpKind {
    match record {
        Record::ClockRead { now, .. } => DumpKind::ClockRead { nanos: now.get() },
        Record::Entropy { bytes, .. } => DumpKind::Entropy { bytes: hex(bytes) },
        Record::Arrival {
            vcpu,
            moment,
            arrival,
            ..
        } => DumpKind::Arrival {
            vcpu: vcpu.0,
            moment: dump_moment(moment),
            arrival: match arrival {
                Arrival::Time { now } => DumpArrival::Time { nanos: now.get() },
                Arrival::Input { channel, bytes } => DumpArrival::Input {
                    channel: *channel,
                    bytes: hex(bytes),
                },
                Arrival::Stop => DumpArrival::Stop,
            },
        },
        Record::Digest { digest, .. } => {
            let DigestRecord {
                position,
                registers,
                cpu,
                pages,
                board,
                exits,
                console,
            } = &**digest;
            DumpKind::Digest(Box::new(DumpDigest {
                position: position.as_ref().map(Position::to_string),
                registers: DumpRegisters(registers.clone()),
                cpu: *cpu,
                pages: dump_pages(pages),
                board: *board,
                exits: *exits,
                console: *console,
            }))
        }
    }
}

fn dump_moment(moment: &Moment) -> DumpMoment {
    match moment {
        Moment::Sync => DumpMoment::Sync,
        Moment::Same => DumpMoment::Same,
        Moment::Position(position) => DumpMoment::Position(position.to_string()),
        Moment::Landmark(landmark) => {
            let Landmark {
                registers,
                rest,
                deliveries,
                pages,
            } = &**landmark;
            DumpMoment::Landmark {
                registers: DumpRegisters(registers.clone()),
                rest: *rest,
                deliveries: *deliveries,
                pages: dump_pages(pages),
            }
        }
    }
}

fn dump_pages(pages: &[PageDigest]) -> Vec<DumpPage> {
    pages
        .iter()
        .map(|page| DumpPage {
            addr: page.page.base().to_string(),
            digest: page.digest,
        })
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            // Writing to a string cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
}
