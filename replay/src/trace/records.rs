//! What a trace says, decoded.
//!
//! Purpose: the contents of the chunks as plain values with absolute numbers.
//! Invariants: types that derive serde here are encoded as they stand: a changed field or variant is a new format version.
//! A record's `after` never decreases along the log, and [`Moment::Same`] follows another arrival.
//! Elsewhere: the delta encoding of log records (`wire`).

use crate::digest::{CpuDigest, Digest};
use machine::environment::{Arrival, SyncOrdinal};
use machine::{BoardConfig, End, engine::EngineKind};
use serde::{Deserialize, Serialize};
use std::fmt;
use x86::{CpuModel, Nanos, PageFrame, Position, Registers, VcpuId};

/// The processor of the machine a recording was made on, as the host names it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct HostCpu {
    /// `GenuineIntel`, `AuthenticAMD`, ...
    pub vendor: String,
    /// The model's name.
    pub model: String,
}

impl HostCpu {
    /// The processor this runs on; empty names where `/proc/cpuinfo` does not tell.
    pub fn detect() -> Self {
        let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let value = |name| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        Self {
            vendor: value("vendor_id").unwrap_or_default(),
            model: value("model name").unwrap_or_default(),
        }
    }
}

/// The machine chunk: what was recorded, on what.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MachineRecord {
    /// The version of chronovisor that recorded.
    pub chronovisor: String,
    /// The engine that recorded.
    pub engine: EngineKind,
    /// The host's processor.
    pub host: HostCpu,
    /// Guest memory in bytes.
    pub memory: u64,
    /// The processor the guest was shown.
    pub cpu: CpuModel,
    /// The board.
    pub board: BoardConfig,
    /// The kernel's command line.
    pub cmdline: String,
    /// Image chunks that follow.
    pub images: u32,
}

/// An image chunk: a file the guest was started with. The kernel is the first.
#[derive(Clone, PartialEq, Eq)]
pub struct Image {
    /// Its name, as the user gave it.
    pub name: String,
    /// Its contents.
    pub bytes: Vec<u8>,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Image({:?}, {} bytes)", self.name, self.bytes.len())
    }
}

/// One entry of the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Record {
    /// A device read the clock.
    ClockRead {
        /// Sync points passed, the one being handled included.
        after: SyncOrdinal,
        /// What it read.
        now: Nanos,
    },
    /// A device drew random bytes.
    Entropy {
        /// Sync points passed, the one being handled included.
        after: SyncOrdinal,
        /// What it drew.
        bytes: Vec<u8>,
    },
    /// Something arrived from outside.
    Arrival {
        /// Sync points passed.
        after: SyncOrdinal,
        /// On which CPU's account.
        vcpu: VcpuId,
        /// Exactly when.
        moment: Moment,
        /// What.
        arrival: Arrival,
    },
    /// What a replay is compared with.
    Digest {
        /// Sync points passed. The state is that of the first clean boundary after the last of them.
        after: SyncOrdinal,
        /// The state there.
        digest: Box<DigestRecord>,
    },
}

impl Record {
    /// Sync points passed when it happened.
    pub fn after(&self) -> SyncOrdinal {
        match self {
            Self::ClockRead { after, .. }
            | Self::Entropy { after, .. }
            | Self::Arrival { after, .. }
            | Self::Digest { after, .. } => *after,
        }
    }
}

/// For messages: what is expected next, and where.
impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let after = self.after();
        match self {
            Self::ClockRead { now, .. } => {
                write!(f, "a clock reading of {now} at sync point {after}")
            }
            Self::Entropy { bytes, .. } => {
                write!(f, "{} bytes of entropy at sync point {after}", bytes.len())
            }
            Self::Arrival {
                moment, arrival, ..
            } => {
                match arrival {
                    Arrival::Time { now } => write!(f, "the time {now}")?,
                    Arrival::Input { bytes, .. } => write!(f, "{} bytes of input", bytes.len())?,
                    Arrival::Stop => f.write_str("a request to stop")?,
                }
                match moment {
                    Moment::Sync | Moment::Same => write!(f, " at sync point {after}"),
                    Moment::Landmark(landmark) => write!(
                        f,
                        " after sync point {after}, at a landmark with RIP {:#x}",
                        landmark.registers.rip
                    ),
                    Moment::Position(position) => {
                        write!(f, " after sync point {after}, at position {position}")
                    }
                }
            }
            Self::Digest { .. } => write!(f, "a check of the state at sync point {after}"),
        }
    }
}

/// When something arrived.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Moment {
    /// Right after the sync point was handled (at the start: before the first instruction).
    Sync,
    /// Later, at the boundary the landmark describes.
    Landmark(Box<Landmark>),
    /// Later, at this position (recorded on an engine that counts).
    Position(Position),
    /// At the same boundary as the arrival before.
    Same,
}

/// A boundary between two sync points, told by what the machine looks like there.
///
/// Two boundaries after the same sync point with equal CPU, equal memory and equally many interrupts delivered have the same future,
/// so any boundary that matches is the right one.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Landmark {
    /// General registers, RIP, RFLAGS (RF cleared).
    pub registers: Registers,
    /// The rest of the CPU's state: [`CpuDigest::rest`].
    pub rest: Digest,
    /// Interrupts delivered since the sync point. They change the interrupt controllers, which neither CPU nor memory show.
    pub deliveries: u64,
    /// At least the pages written since the sync point, with what they hold now; in ascending order.
    pub pages: Vec<PageDigest>,
}

/// What a page holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PageDigest {
    /// Which page.
    pub page: PageFrame,
    /// [`machine::GuestMemory::page_digest`].
    pub digest: Digest,
}

/// What a replay is compared with on the way.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DigestRecord {
    /// Where, on an engine that counts.
    pub position: Option<Position>,
    /// General registers, RIP, RFLAGS (RF cleared): so that a difference can be named.
    pub registers: Registers,
    /// The CPU's state.
    pub cpu: CpuDigest,
    /// At least the pages written since the last digest, with what they hold now; in ascending order.
    pub pages: Vec<PageDigest>,
    /// The devices ([`crate::digest::board_digest`]).
    pub board: Digest,
    /// All sync points so far ([`crate::digest::ExitDigest`]).
    pub exits: Digest,
    /// All output so far ([`crate::digest::ConsoleDigest`]).
    pub console: Digest,
}

/// The end chunk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EndRecord {
    /// How it ended.
    pub end: End,
    /// Sync points passed.
    pub after: SyncOrdinal,
    /// Where, on an engine that counts.
    pub position: Option<Position>,
    /// General registers and digest of the CPU; `None` when the last instruction could not be brought to an end.
    pub cpu: Option<(Registers, CpuDigest)>,
    /// All of memory ([`machine::GuestMemory::digest`]).
    pub memory: Digest,
    /// The devices ([`crate::digest::board_digest`]).
    pub board: Digest,
    /// All sync points.
    pub exits: Digest,
    /// All output.
    pub console: Digest,
    /// Sums, for people.
    pub totals: Totals,
}

/// How much was recorded.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Totals {
    /// Arrivals logged.
    pub arrivals: u64,
    /// Arrivals that needed a landmark.
    pub landmarks: u64,
    /// Clock readings logged.
    pub clock_reads: u64,
    /// Entropy logged, in bytes.
    pub entropy_bytes: u64,
    /// Digests on the way.
    pub digests: u64,
    /// Output of the guest on all channels, in bytes.
    pub console_bytes: u64,
    /// Exits of every kind.
    pub exits: u64,
    /// The last virtual time that was logged.
    pub last_time: Nanos,
    /// How long the recording took on the host, in nanoseconds.
    pub host_nanos: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use machine::environment::Channel;

    fn bytes(value: &impl Serialize) -> Vec<u8> {
        postcard::to_stdvec(value).expect("encode")
    }

    // These bytes are the format: if one of these tests fails, so must readers of old traces.

    #[test]
    fn the_machine_chunk_is_fixed() {
        let machine = MachineRecord {
            chronovisor: "0.1".to_owned(),
            engine: EngineKind::Soft,
            host: HostCpu {
                vendor: "V".to_owned(),
                model: "M".to_owned(),
            },
            memory: 0x4000,
            cpu: CpuModel::V2,
            board: BoardConfig { boot_time: -1 },
            cmdline: "c".to_owned(),
            images: 1,
        };
        let expected = b"\x030.1\x01\x01V\x01M\x80\x80\x01\x00\x01\x01c\x01";
        assert_eq!(bytes(&machine), expected);
        assert_eq!(
            postcard::from_bytes::<MachineRecord>(expected).expect("decode"),
            machine
        );
    }

    #[test]
    fn the_end_chunk_is_fixed() {
        let part = |n| Digest(u64::from_le_bytes([n; 8]));
        let cpu = CpuDigest {
            registers: part(1),
            segments: part(2),
            system: part(3),
            fpu: part(4),
            msrs: part(5),
        };
        let registers = Registers {
            gpr: [0; 16],
            rip: 0x80,
            rflags: 2,
        };
        let end = EndRecord {
            end: End::DebugExit(200),
            after: SyncOrdinal(9),
            position: Some(Position {
                within: 2,
                ..Position::at(300)
            }),
            cpu: Some((registers, cpu)),
            memory: part(6),
            board: part(7),
            exits: part(8),
            console: part(9),
            totals: Totals {
                arrivals: 1,
                landmarks: 2,
                clock_reads: 3,
                entropy_bytes: 4,
                digests: 5,
                console_bytes: 6,
                exits: 7,
                last_time: Nanos::new(8),
                host_nanos: 9,
            },
        };
        let mut expected = vec![0, 200, 9, 1, 0xac, 2, 2, 1];
        expected.extend([0; 16]);
        expected.extend([0x80, 1, 2]);
        expected.extend((1..10).flat_map(|n| [n; 8]));
        expected.extend(1..10);
        assert_eq!(bytes(&end), expected);
        assert_eq!(
            postcard::from_bytes::<EndRecord>(&expected).expect("decode"),
            end
        );
    }

    #[test]
    fn a_digest_record_is_fixed() {
        let part = |n| Digest(u64::from_le_bytes([n; 8]));
        let cpu = CpuDigest {
            registers: part(1),
            segments: part(2),
            system: part(3),
            fpu: part(4),
            msrs: part(5),
        };
        let digest = DigestRecord {
            position: None,
            registers: Registers {
                gpr: [0; 16],
                rip: 1,
                rflags: 2,
            },
            cpu,
            pages: vec![PageDigest {
                page: PageFrame::new(5),
                digest: part(6),
            }],
            board: part(7),
            exits: part(8),
            console: part(9),
        };
        let mut expected = vec![0];
        expected.extend([0; 16]);
        expected.extend([1, 2]);
        expected.extend((1..6).flat_map(|n| [n; 8]));
        expected.extend([1, 5]);
        expected.extend((6..10).flat_map(|n| [n; 8]));
        assert_eq!(bytes(&digest), expected);
    }

    #[test]
    fn the_numbers_of_variants_are_fixed() {
        for (value, number) in [(EngineKind::Kvm, 0), (EngineKind::Soft, 1)] {
            assert_eq!(bytes(&value), [number]);
        }
        for (value, number) in [(Channel::Com1, 0), (Channel::DebugConsole, 1)] {
            assert_eq!(bytes(&value), [number]);
        }
        let ends = [
            End::TripleFault,
            End::Reset,
            End::HaltedForever,
            End::Stopped,
        ];
        for (value, number) in ends.iter().zip(1..) {
            assert_eq!(bytes(value), [number]);
        }
    }
}
