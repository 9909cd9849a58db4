//! Log records as bytes.
//!
//! Purpose: pack records densely: ordinals and times as differences from the record before, numbers as varints (postcard).
//! Invariants: each chunk decodes by itself: it begins with the values its first record's differences count from. Decoding
//! checks what a reader relies on (order, no empty input), and fails rather than wrap.
//! Elsewhere: framing and compression (`chunk`).
//! Source: the postcard wire format 1.x.

use super::records::{DigestRecord, Landmark, Moment, Record};
use machine::environment::{Arrival, Channel, SyncOrdinal};
use serde::{Deserialize, Serialize};
use x86::{Instructions, Nanos, Position, VcpuId};

/// What differences count from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Base {
    after: u64,
    now: u64,
}

/// The start of a log chunk.
#[derive(Serialize, Deserialize)]
struct Prefix {
    base: Base,
    records: u32,
}

/// A record in the file. `after`: sync points since the record before. Times: nanoseconds since the time before, signed.
#[derive(Serialize, Deserialize)]
enum Wire {
    ClockRead {
        after: u64,
        now: i64,
    },
    Entropy {
        after: u64,
        bytes: Vec<u8>,
    },
    Arrival {
        after: u64,
        vcpu: VcpuId,
        moment: WireMoment,
        arrival: WireArrival,
    },
    Digest {
        after: u64,
        digest: Box<DigestRecord>,
    },
}

#[derive(Serialize, Deserialize)]
enum WireMoment {
    Sync,
    Landmark(Box<Landmark>),
    Position { retired: u64, within: u64 },
    Same,
}

#[derive(Serialize, Deserialize)]
enum WireArrival {
    Time { now: i64 },
    Input { channel: Channel, bytes: Vec<u8> },
    Stop,
}

impl Base {
    fn delta_after(&mut self, after: SyncOrdinal) -> u64 {
        after
            .0
            .saturating_sub(std::mem::replace(&mut self.after, after.0))
    }

    fn delta_now(&mut self, now: Nanos) -> i64 {
        // Wrapping on purpose: any two times have a difference that leads from one to the other.
        now.get()
            .wrapping_sub(std::mem::replace(&mut self.now, now.get())) as i64
    }

    fn add_after(&mut self, delta: u64) -> Result<SyncOrdinal, String> {
        self.after = self
            .after
            .checked_add(delta)
            .ok_or("the sync points of a record overflow")?;
        Ok(SyncOrdinal(self.after))
    }

    fn add_now(&mut self, delta: i64) -> Nanos {
        self.now = self.now.wrapping_add(delta as u64);
        Nanos::new(self.now)
    }
}

/// Collects the records of one chunk.
#[derive(Default)]
pub(super) struct Encoder {
    start: Base,
    base: Base,
    records: u32,
    bytes: Vec<u8>,
}

impl Encoder {
    /// Bytes collected.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.records == 0
    }

    /// Takes a record in. Its `after` must not be less than the last one's.
    pub(super) fn push(&mut self, record: Record) -> postcard::Result<()> {
        let base = &mut self.base;
        let wire = match record {
            Record::ClockRead { after, now } => Wire::ClockRead {
                after: base.delta_after(after),
                now: base.delta_now(now),
            },
            Record::Entropy { after, bytes } => Wire::Entropy {
                after: base.delta_after(after),
                bytes,
            },
            Record::Digest { after, digest } => Wire::Digest {
                after: base.delta_after(after),
                digest,
            },
            Record::Arrival {
                after,
                vcpu,
                moment,
                arrival,
            } => Wire::Arrival {
                after: base.delta_after(after),
                vcpu,
                moment: match moment {
                    Moment::Sync => WireMoment::Sync,
                    Moment::Landmark(landmark) => WireMoment::Landmark(landmark),
                    Moment::Position(Position { retired, within }) => WireMoment::Position {
                        retired: retired.get(),
                        within,
                    },
                    Moment::Same => WireMoment::Same,
                },
                arrival: match arrival {
                    Arrival::Time { now } => WireArrival::Time {
                        now: base.delta_now(now),
                    },
                    Arrival::Input { channel, bytes } => WireArrival::Input { channel, bytes },
                    Arrival::Stop => WireArrival::Stop,
                },
            },
        };
        self.bytes = postcard::to_extend(&wire, std::mem::take(&mut self.bytes))?;
        self.records += 1;
        Ok(())
    }

    /// The chunk's payload; the encoder goes on with the next chunk.
    pub(super) fn take(&mut self) -> postcard::Result<Vec<u8>> {
        let prefix = Prefix {
            base: self.start,
            records: self.records,
        };
        let mut payload = postcard::to_stdvec(&prefix)?;
        payload.extend_from_slice(&self.bytes);
        self.bytes.clear();
        self.records = 0;
        self.start = self.base;
        Ok(payload)
    }
}

/// The records of a log chunk. `base` is where the chunk before ended (`None` where it was not read), and becomes where this one does.
pub(super) fn decode(raw: &[u8], base: &mut Option<Base>) -> Result<Vec<Record>, String> {
    let (prefix, mut rest) =
        postcard::take_from_bytes::<Prefix>(raw).map_err(|e| format!("its start: {e}"))?;
    if base.is_some_and(|base| base != prefix.base) {
        return Err("it does not go on where the chunk before ended".to_owned());
    }
    let mut at = prefix.base;
    let mut records = Vec::new();
    for index in 0..prefix.records {
        let (wire, left) =
            postcard::take_from_bytes::<Wire>(rest).map_err(|e| format!("record {index}: {e}"))?;
        rest = left;
        let record = unpack(wire, &mut at)
            .and_then(|record| {
                check(&record, records.last())
                    .map(|()| record)
                    .map_err(str::to_owned)
            })
            .map_err(|e| format!("record {index}: {e}"))?;
        records.push(record);
    }
    if !rest.is_empty() {
        return Err(format!(
            "{} bytes are left over after the last record",
            rest.len()
        ));
    }
    *base = Some(at);
    Ok(records)
}

fn unpack(wire: Wire, base: &mut Base) -> Result<Record, String> {
    Ok(match wire {
        Wire::ClockRead { after, now } => Record::ClockRead {
            after: base.add_after(after)?,
            now: base.add_now(now),
        },
        Wire::Entropy { after, bytes } => Record::Entropy {
            after: base.add_after(after)?,
            bytes,
        },
        Wire::Digest { after, digest } => Record::Digest {
            after: base.add_after(after)?,
            digest,
        },
        Wire::Arrival {
            after,
            vcpu,
            moment,
            arrival,
        } => Record::Arrival {
            after: base.add_after(after)?,
            vcpu,
            moment: match moment {
                WireMoment::Sync => Moment::Sync,
                WireMoment::Landmark(landmark) => Moment::Landmark(landmark),
                WireMoment::Position { retired, within } => Moment::Position(Position {
                    retired: Instructions::new(retired),
                    within,
                }),
                WireMoment::Same => Moment::Same,
            },
            arrival: match arrival {
                WireArrival::Time { now } => Arrival::Time {
                    now: base.add_now(now),
                },
                WireArrival::Input { channel, bytes } => Arrival::Input { channel, bytes },
                WireArrival::Stop => Arrival::Stop,
            },
        },
    })
}

/// What a reader relies on besides the encoding.
fn check(record: &Record, before: Option<&Record>) -> Result<(), &'static str> {
    let Record::Arrival {
        after,
        moment,
        arrival,
        ..
    } = record
    else {
        return Ok(());
    };
    if matches!(arrival, Arrival::Input { bytes, .. } if bytes.is_empty()) {
        return Err("empty input");
    }
    // A chunk never ends between arrivals of the same moment.
    let same = matches!(before, Some(Record::Arrival { after: then, .. }) if then == after);
    if *moment == Moment::Same && !same {
        return Err("an arrival at the moment of an arrival that is not there");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::trace::records::PageDigest;
    use x86::{PageFrame, Registers};

    fn arrival(after: u64, moment: Moment, arrival: Arrival) -> Record {
        Record::Arrival {
            after: SyncOrdinal(after),
            vcpu: VcpuId::BOOT,
            moment,
            arrival,
        }
    }

    fn encoded(records: &[Record]) -> Vec<u8> {
        let mut encoder = Encoder::default();
        for record in records {
            encoder.push(record.clone()).expect("encode");
        }
        encoder.take().expect("encode")
    }

    #[test]
    fn the_encoding_is_fixed() {
        // These bytes are the format: if they change, so must the version.
        let time = |now| Arrival::Time {
            now: Nanos::new(now),
        };
        let landmark = Landmark {
            registers: Registers {
                gpr: [0; 16],
                rip: 0x1_0000,
                rflags: 2,
            },
            rest: Digest(0x0807_0605_0403_0201),
            deliveries: 1,
            pages: vec![PageDigest {
                page: PageFrame::new(300),
                digest: Digest(1),
            }],
        };
        let input = Arrival::Input {
            channel: Channel::DebugConsole,
            bytes: b"hi".to_vec(),
        };
        let position = Position {
            retired: Instructions::new(129),
            within: 3,
        };
        let records = [
            Record::ClockRead {
                after: SyncOrdinal(1),
                now: Nanos::new(64),
            },
            arrival(3, Moment::Sync, time(63)),
            arrival(3, Moment::Landmark(Box::new(landmark)), input),
            arrival(3, Moment::Same, Arrival::Stop),
            arrival(4, Moment::Position(position), Arrival::Stop),
            Record::Entropy {
                after: SyncOrdinal(4),
                bytes: vec![7, 8],
            },
        ];
        let mut expected = vec![0, 0, 6]; // base 0, base 0, six records
        expected.extend([0, 1, 0x80, 1]); // clock, +1, +64 zigzag
        expected.extend([2, 2, 0, 0, 0, 1]); // arrival, +2, CPU 0, sync, time, -1 zigzag
        expected.extend([2, 0, 0, 1]); // arrival, +0, CPU 0, landmark
        expected.extend([0; 16]);
        expected.extend([0x80, 0x80, 4, 2]); // RIP, RFLAGS
        expected.extend([1, 2, 3, 4, 5, 6, 7, 8, 1]); // rest, deliveries
        expected.extend([1, 0xac, 2, 1, 0, 0, 0, 0, 0, 0, 0]); // one page: number, digest
        expected.extend([1, 1, 2, b'h', b'i']); // input, debug console, two bytes
        expected.extend([2, 0, 0, 3, 2]); // same, stop
        expected.extend([2, 1, 0, 2, 0x81, 1, 3, 2]); // position 129+3, stop
        expected.extend([1, 0, 2, 7, 8]); // entropy
        assert_eq!(encoded(&records), expected);
        assert_eq!(decode(&expected, &mut None).expect("decode"), records);
    }

    #[test]
    fn chunks_follow_on_from_each_other() {
        let mut encoder = Encoder::default();
        let record = |n| Record::ClockRead {
            after: SyncOrdinal(n),
            now: Nanos::new(n * 1000),
        };
        encoder.push(record(5)).expect("encode");
        let first = encoder.take().expect("encode");
        encoder.push(record(9)).expect("encode");
        let second = encoder.take().expect("encode");
        let mut base = Some(Base::default());
        assert_eq!(decode(&first, &mut base).expect("first"), [record(5)]);
        assert_eq!(decode(&second, &mut base).expect("second"), [record(9)]);
        assert_eq!(decode(&second, &mut None).expect("alone"), [record(9)]);
        assert!(decode(&first, &mut base).is_err(), "a chunk twice");
    }

    #[test]
    fn what_a_reader_relies_on_is_checked() {
        let lone = encoded(&[arrival(1, Moment::Same, Arrival::Stop)]);
        assert!(
            decode(&lone, &mut None).is_err(),
            "nothing to be the same as"
        );
        let input = Arrival::Input {
            channel: Channel::Com1,
            bytes: vec![],
        };
        let empty = encoded(&[arrival(1, Moment::Sync, input)]);
        assert!(decode(&empty, &mut None).is_err(), "empty input");
        let mut long = encoded(&[arrival(1, Moment::Sync, Arrival::Stop)]);
        long.push(0);
        assert!(decode(&long, &mut None).is_err(), "left over");
        // Base 2^64 - 1, one record: clock, +1.
        let mut overflow = vec![0xff; 9];
        overflow.extend([1, 0, 1, 0, 1, 0]);
        assert!(decode(&overflow, &mut None).is_err(), "overflow");
        // 2^32 - 1 records announced, none there.
        let count = [0, 0, 0xff, 0xff, 0xff, 0xff, 0x0f];
        assert!(decode(&count, &mut None).is_err(), "count");
    }
}
