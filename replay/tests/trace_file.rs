//! The trace file under every kind of bad weather: round trips, truncation and bit flips at every byte, arbitrary bytes, full disks.

use machine::engine::EngineKind;
use machine::environment::{Arrival, Channel, SyncOrdinal};
use machine::{BoardConfig, End};
use proptest::prelude::*;
use replay::digest::{CpuDigest, Digest};
use replay::trace::{
    CreateTraceError, DigestRecord, EndRecord, Fault, HostCpu, Image, Landmark, MachineRecord,
    Moment, PageDigest, Record, Totals, Trace, TraceError, TraceWriter, check, dump, info,
};
use std::io::{self, Cursor, Write};
use std::sync::{Arc, Mutex};
use x86::{CpuModel, CpuState, Nanos, PageFrame, Position, Registers, VcpuId};

/// A file in memory that can be looked at while it is written, and fails after so many bytes.
#[derive(Clone)]
struct Disk {
    bytes: Arc<Mutex<Vec<u8>>>,
    space: usize,
    full: io::ErrorKind,
}

impl Disk {
    fn new() -> Self {
        Self::of(usize::MAX, io::ErrorKind::StorageFull)
    }

    fn of(space: usize, full: io::ErrorKind) -> Self {
        Self {
            bytes: Arc::default(),
            space,
            full,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().expect("lock").clone()
    }
}

impl Write for Disk {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut bytes = self.bytes.lock().expect("lock");
        let fits = data.len().min(self.space - bytes.len());
        if fits == 0 && !data.is_empty() {
            return Err(self.full.into());
        }
        bytes.extend_from_slice(&data[..fits]);
        Ok(fits)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn machine() -> MachineRecord {
    MachineRecord {
        chronovisor: "0.1.0".to_owned(),
        engine: EngineKind::Kvm,
        host: HostCpu {
            vendor: "AuthenticAMD".to_owned(),
            model: "AMD EPYC".to_owned(),
        },
        memory: 16 << 20,
        cpu: CpuModel::V2,
        board: BoardConfig::default(),
        cmdline: "console=ttyS0".to_owned(),
        images: 0,
    }
}

fn image() -> Image {
    Image {
        name: "crash".to_owned(),
        bytes: (0..600u32).map(|i| ((i * i) >> 3) as u8).collect(),
    }
}

fn registers(seed: u64) -> Registers {
    Registers {
        gpr: std::array::from_fn(|i| seed.wrapping_mul(0x9e37_79b9).rotate_left(i as u32)),
        rip: 0x10_0000 + seed,
        rflags: 0x246,
    }
}

fn pages(count: u64) -> Vec<PageDigest> {
    (0..count)
        .map(|i| PageDigest {
            page: PageFrame::new(100 + i),
            digest: Digest(i * 77),
        })
        .collect()
}

/// A log as a recording makes it: clock readings, arrivals of every kind, digests.
fn records(count: u64) -> Vec<Record> {
    let arrival = |after, moment, arrival| Record::Arrival {
        after: SyncOrdinal(after),
        vcpu: VcpuId::BOOT,
        moment,
        arrival,
    };
    let time = |now| Arrival::Time {
        now: Nanos::new(now),
    };
    let mut records = Vec::new();
    for i in 1..=count {
        let after = SyncOrdinal(3 * i);
        records.push(Record::ClockRead {
            after,
            now: Nanos::new(i * 1_000_003),
        });
        records.push(arrival(3 * i, Moment::Sync, time(i * 1_000_100)));
        let landmark = Landmark {
            registers: registers(i),
            rest: Digest(i),
            deliveries: i % 3,
            pages: pages(i % 4),
        };
        records.push(arrival(
            3 * i + 1,
            Moment::Landmark(Box::new(landmark)),
            time(i * 1_000_200),
        ));
        let input = Arrival::Input {
            channel: Channel::Com1,
            bytes: vec![b'a'; i as usize % 5 + 1],
        };
        records.push(arrival(3 * i + 1, Moment::Same, input));
        records.push(arrival(
            3 * i + 1,
            Moment::Position(Position::at(i)),
            time(i * 1_000_300),
        ));
        records.push(Record::Entropy {
            after: SyncOrdinal(3 * i + 2),
            bytes: vec![i as u8; 7],
        });
        let digest = DigestRecord {
            position: (i % 2 == 0).then_some(Position::at(i)),
            registers: registers(i),
            cpu: CpuDigest::of(&CpuState::default()),
            pages: pages(i % 5),
            board: Digest(3),
            exits: Digest(1),
            console: Digest(2),
        };
        let digest = Box::new(digest);
        records.push(Record::Digest {
            after: SyncOrdinal(3 * i + 2),
            digest,
        });
    }
    records
}

fn end(after: u64) -> EndRecord {
    EndRecord {
        end: End::DebugExit(1),
        after: SyncOrdinal(after),
        position: None,
        cpu: Some((registers(9), CpuDigest::of(&CpuState::default()))),
        memory: Digest(3),
        board: Digest(4),
        exits: Digest(5),
        console: Digest(6),
        totals: Totals {
            arrivals: 4,
            ..Totals::default()
        },
    }
}

/// Writes a trace in chunks of `per_chunk` records.
fn write(disk: Disk, records: &[Record], per_chunk: usize) -> io::Result<()> {
    let out = Box::new(disk);
    let run = || {
        let mut writer = TraceWriter::new(out, "test.cvt".to_owned(), &machine(), &[image()])?;
        for chunk in records.chunks(per_chunk) {
            for record in chunk {
                writer.record(record.clone())?;
            }
            writer.flush()?;
        }
        writer.finish(&end(1000))
    };
    run().map_err(|e| {
        assert!(e.to_string().contains("test.cvt"), "names the file: {e}");
        e.source
    })
}

fn written(records: &[Record], per_chunk: usize) -> Vec<u8> {
    let disk = Disk::new();
    write(disk.clone(), records, per_chunk).expect("memory does not fail");
    disk.bytes()
}

fn read(bytes: &[u8]) -> Result<Trace, TraceError> {
    Trace::read(Box::new(Cursor::new(bytes.to_vec())))
}

fn log(trace: &mut Trace) -> Vec<Record> {
    (0..trace.log.len())
        .map(|i| {
            trace
                .log
                .get(i)
                .expect("read again")
                .expect("is there")
                .clone()
        })
        .collect()
}

#[test]
fn what_is_written_is_read_back() {
    let records = records(20);
    for per_chunk in [1, 14, 1000] {
        let bytes = written(&records, 7 * per_chunk);
        let mut trace = read(&bytes).expect("read");
        assert_eq!(
            trace.machine,
            MachineRecord {
                images: 1,
                ..machine()
            }
        );
        assert_eq!(trace.images, [image()]);
        assert_eq!(trace.end, Some(end(1000)));
        assert!(trace.damage.is_none());
        assert_eq!(log(&mut trace), records);
        // Backwards too, which reads chunks again.
        for (i, record) in records.iter().enumerate().rev() {
            assert_eq!(trace.log.get(i as u64).expect("read"), Some(record));
        }
        assert_eq!(trace.log.get(records.len() as u64).expect("read"), None);
        assert_eq!(trace.events.len(), 80);
        assert_eq!(
            trace.events[2].landmark, trace.events[1].landmark,
            "at the same moment"
        );
    }
}

#[test]
fn a_log_grows_into_chunks_by_itself() {
    let records = records(3000);
    let bytes = written(&records, usize::MAX);
    let mut trace = read(&bytes).expect("read");
    let logs = info(&trace)
        .chunks
        .iter()
        .find(|c| c.kind == "log")
        .expect("log")
        .chunks;
    assert!(logs > 3, "{logs} chunks");
    assert_eq!(log(&mut trace), records);
}

#[test]
fn truncated_at_every_byte_it_is_an_error_or_an_intact_prefix() {
    let records = records(4);
    let bytes = written(&records, 7);
    let whole = read(&bytes).expect("read");
    let first_log = first_log_offset(&bytes);
    let mut longest = 0;
    for len in 0..bytes.len() {
        match read(&bytes[..len]) {
            Err(error) => {
                assert!(len < first_log, "cut at {len}: {error}");
                assert!(error.offset <= len as u64, "cut at {len}: {error}");
            }
            Ok(mut trace) => {
                assert!(len >= first_log, "cut at {len}");
                let damage = trace.damage.as_ref().expect("cut, and not noticed");
                assert!(damage.offset <= len as u64, "cut at {len}: {damage}");
                assert!(!trace.complete());
                let got = log(&mut trace);
                assert_eq!(got, records[..got.len()], "cut at {len}");
                assert!(got.len() >= longest, "more bytes, fewer records");
                longest = got.len();
            }
        }
    }
    assert_eq!(
        longest,
        records.len(),
        "without its end, all records are there"
    );
    assert!(whole.complete());
}

/// Where log chunks begin: after header, machine and image.
fn first_log_offset(bytes: &[u8]) -> usize {
    let mut at = 24;
    for _ in 0..2 {
        let len = u32::from_le_bytes(bytes[at + 20..at + 24].try_into().expect("4 bytes"));
        at += 32 + len as usize;
    }
    at
}

#[test]
fn every_flipped_bit_is_noticed() {
    let records = records(4);
    let bytes = written(&records, 7);
    let first_log = first_log_offset(&bytes);
    for at in 0..bytes.len() {
        for bit in [0, 3, 7] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            match read(&damaged) {
                Err(error) => {
                    assert!(at < first_log, "byte {at}: {error}");
                    assert!(error.offset <= at as u64, "byte {at}: {error}");
                }
                Ok(mut trace) => {
                    assert!(at >= first_log, "byte {at} flipped, and not noticed");
                    let damage = trace.damage.as_ref().expect("flipped, and not noticed");
                    assert!(damage.offset <= at as u64, "byte {at}: {damage}");
                    let got = log(&mut trace);
                    assert_eq!(got, records[..got.len()], "byte {at}");
                }
            }
        }
    }
}

#[test]
fn another_version_is_named() {
    let mut bytes = written(&[], 1);
    bytes[8] = 7;
    let error = read(&bytes).expect_err("another version");
    assert!(
        matches!(
            error.what,
            Fault::Version {
                found: 7,
                intact: false
            }
        ),
        "{error}"
    );
    let sum = xxhash(&bytes[..16]);
    bytes[16..24].copy_from_slice(&sum.to_le_bytes());
    let error = read(&bytes).expect_err("another version");
    assert!(
        matches!(
            error.what,
            Fault::Version {
                found: 7,
                intact: true
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("version 7"), "{error}");
    assert_eq!(error.offset, 8);
}

fn xxhash(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(bytes)
}

#[test]
fn what_is_no_trace_is_called_so() {
    for bytes in [&b""[..], b"\x7fELF\x02\x01\x01", b"#!/bin/sh\n", &[0; 4096]] {
        let error = read(bytes).expect_err("not a trace");
        assert!(matches!(error.what, Fault::NotATrace), "{error}");
    }
}

/// A chunk as a hostile writer makes it: its checksum is right, whatever it claims.
fn hostile_chunk(kind: u16, flags: u16, sequence: u64, raw_len: u32, payload: &[u8]) -> Vec<u8> {
    let mut chunk = b"CVch".to_vec();
    chunk.extend(kind.to_le_bytes());
    chunk.extend(flags.to_le_bytes());
    chunk.extend(sequence.to_le_bytes());
    chunk.extend(raw_len.to_le_bytes());
    chunk.extend((payload.len() as u32).to_le_bytes());
    let sum = xxhash(&[&chunk[..], payload].concat());
    chunk.extend(sum.to_le_bytes());
    chunk.extend(payload);
    chunk
}

/// A trace without its end, and the number its next chunk has.
fn open_ended() -> (Vec<u8>, u64) {
    let disk = Disk::new();
    let out = Box::new(disk.clone());
    let mut writer = TraceWriter::new(out, "test.cvt".to_owned(), &machine(), &[]).expect("memory");
    writer.record(records(1)[0].clone()).expect("record");
    writer.flush().expect("flush");
    (disk.bytes(), 2)
}

#[test]
fn hostile_chunks_are_refused_by_what_is_wrong_with_them() {
    let (prefix, next) = open_ended();
    let offset = prefix.len() as u64;
    let squeeze = |bytes: &[u8]| zstd::bulk::compress(bytes, 3).expect("compress");
    let bomb = squeeze(&vec![0; 40 << 20]);
    let two_frames = [squeeze(&[0, 0, 0]), squeeze(&[0, 0, 0])].concat();
    type Expected = fn(&Fault) -> bool;
    let cases: Vec<(Vec<u8>, Expected)> = vec![
        (hostile_chunk(3, 0, next, u32::MAX, &bomb), |f| {
            matches!(f, Fault::TooLarge { .. })
        }),
        (hostile_chunk(3, 0, next, 40 << 20, &bomb), |f| {
            matches!(f, Fault::TooLarge { .. })
        }),
        (hostile_chunk(3, 0, next, 1 << 20, &bomb), |f| {
            matches!(f, Fault::Compression { .. })
        }),
        (hostile_chunk(3, 0, next, 3, &two_frames), |f| {
            matches!(f, Fault::Compression { .. })
        }),
        (hostile_chunk(3, 0, next, 9, b"not zstd"), |f| {
            matches!(f, Fault::Compression { .. })
        }),
        (hostile_chunk(3, 0, next, 4, &squeeze(&[0, 0, 0])), |f| {
            matches!(f, Fault::Compression { .. })
        }),
        (hostile_chunk(3, 0, next, 3, &squeeze(&[0, 0, 9])), |f| {
            matches!(f, Fault::Payload { .. })
        }),
        (
            hostile_chunk(3, 0, next + 1, 3, &squeeze(&[0, 0, 0])),
            |f| {
                matches!(
                    f,
                    Fault::Sequence {
                        expected: 2,
                        found: 3
                    }
                )
            },
        ),
        (
            hostile_chunk(3, 0x8000, next, 3, &squeeze(&[0, 0, 0])),
            |f| matches!(f, Fault::UnknownFlags(0x8000)),
        ),
        (hostile_chunk(1, 0, next, 3, &squeeze(&[0, 0, 0])), |f| {
            matches!(f, Fault::OutOfPlace { .. })
        }),
        (hostile_chunk(99, 0, next, 3, b"future"), |f| {
            matches!(f, Fault::UnknownKind(99))
        }),
        (b"CVch".to_vec(), |f| matches!(f, Fault::Truncated(_))),
        (b"garbage".to_vec(), |f| matches!(f, Fault::NoMarker)),
    ];
    for (i, (chunk, expected)) in cases.into_iter().enumerate() {
        let mut trace = read(&[&prefix[..], &chunk].concat()).expect("the prefix is intact");
        let damage = trace.damage.take().expect("noticed");
        assert!(expected(&damage.reason), "case {i}: {damage}");
        assert_eq!(damage.offset, offset, "case {i}: {damage}");
        assert_eq!(log(&mut trace).len(), 1, "case {i}");
    }
}

#[test]
fn chunks_marked_skippable_are_skipped() {
    let (mut bytes, next) = open_ended();
    bytes.extend(hostile_chunk(99, 1, next, 0, &[7; 100_000]));
    let trace = read(&bytes).expect("read");
    let damage = trace.damage.expect("no end");
    assert!(matches!(damage.reason, Fault::NoEnd), "{damage}");
    assert_eq!(damage.offset, bytes.len() as u64);
    let skipped = bytes.len() - 1;
    // A log chunk behind it is read, at once and again.
    let raw = written_chunk(next + 1);
    bytes.extend(&raw);
    let mut trace = read(&bytes).expect("read");
    assert_eq!(log(&mut trace).len(), 2);
    bytes[skipped] ^= 1;
    let damage = read(&bytes).expect("read").damage.expect("flipped");
    assert!(matches!(damage.reason, Fault::ChunkChecksum), "{damage}");
}

/// The log chunk of [`open_ended`] once more, its differences counted from where it ended.
fn written_chunk(sequence: u64) -> Vec<u8> {
    let records = records(1);
    let Record::ClockRead { after, now } = records[0] else {
        panic!("a clock reading")
    };
    let base = (after.0, now.get());
    let raw = [varint(base.0), varint(base.1), vec![1, 0, 0, 2]].concat();
    let payload = zstd::bulk::compress(&raw, 3).expect("compress");
    hostile_chunk(3, 0, sequence, raw.len() as u32, &payload)
}

/// As postcard writes it.
fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

#[test]
fn data_after_the_end_is_reported_and_the_end_still_stands() {
    let records = records(1);
    let bytes = written(&records, 100);
    let twice = [&bytes[..], &hostile_chunk(3, 0, 4, 3, b"xxx")].concat();
    let trace = read(&twice).expect("read");
    assert!(trace.complete());
    let damage = trace.damage.expect("noticed");
    assert!(matches!(damage.reason, Fault::AfterEnd), "{damage}");
    assert_eq!(damage.offset, bytes.len() as u64);
}

#[test]
fn a_disk_that_fills_up_at_any_byte_leaves_a_valid_prefix() {
    let records = records(4);
    let whole = written(&records, 7);
    let first_log = first_log_offset(&whole);
    for space in 0..whole.len() {
        for full in [io::ErrorKind::StorageFull, io::ErrorKind::BrokenPipe] {
            let disk = Disk::of(space, full);
            let error = write(disk.clone(), &records, 7).expect_err("full");
            assert_eq!(error.kind(), full);
            let bytes = disk.bytes();
            assert_eq!(
                bytes,
                whole[..space],
                "nothing is written after the failure"
            );
            if space >= first_log {
                let mut trace = read(&bytes).expect("a prefix");
                let got = log(&mut trace);
                assert_eq!(got, records[..got.len()]);
            }
        }
    }
}

#[test]
fn after_a_failed_write_nothing_more_is_written() {
    let disk = Disk::of(400, io::ErrorKind::StorageFull);
    let out = Box::new(disk.clone());
    let mut writer = TraceWriter::new(out, "t".to_owned(), &machine(), &[]).expect("fits");
    let mut big = disk.clone();
    for record in records(50) {
        writer.record(record).expect("collected");
    }
    writer.flush().expect_err("full");
    let torn = disk.bytes().len();
    big.space = usize::MAX;
    for record in records(1) {
        let _ = writer.record(record);
    }
    writer.flush().expect_err("still failed");
    writer.finish(&end(1)).expect_err("still failed");
    assert_eq!(disk.bytes().len(), torn);
}

#[test]
fn dev_full_and_a_closed_pipe_are_clear_errors() {
    let full = std::path::Path::new("/dev/full");
    match TraceWriter::create(full, false, &machine(), &[image()]) {
        Err(CreateTraceError::Write(e)) => {
            assert_eq!(e.source.kind(), io::ErrorKind::StorageFull);
            assert!(e.to_string().contains("/dev/full"), "{e}");
        }
        Err(e) => panic!("{e}"),
        Ok(_) => panic!("/dev/full takes nothing"),
    }
    assert!(
        !full.metadata().expect("still there").is_file(),
        "never replaced"
    );
    let (reader, pipe) = io::pipe().expect("pipe");
    drop(reader);
    let error = TraceWriter::new(Box::new(pipe), "pipe".to_owned(), &machine(), &[])
        .map(|_| ())
        .expect_err("closed");
    assert_eq!(error.source.kind(), io::ErrorKind::BrokenPipe, "{error}");
}

#[test]
fn an_old_trace_is_kept_until_the_new_one_is_under_way() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("a.cvt");
    std::fs::write(&path, b"precious").expect("write");
    let refused = TraceWriter::create(&path, false, &machine(), &[]).map(|_| ());
    assert!(
        matches!(refused, Err(CreateTraceError::Exists { .. })),
        "{refused:?}"
    );
    // An image too large fails before the old file is touched.
    let huge = Image {
        name: "huge".to_owned(),
        bytes: vec![0; (512 << 20) + 1],
    };
    let failed = TraceWriter::create(&path, true, &machine(), &[huge]).map(|_| ());
    assert!(
        matches!(failed, Err(CreateTraceError::Write(_))),
        "{failed:?}"
    );
    assert_eq!(std::fs::read(&path).expect("read"), b"precious");
    let link = dir.path().join("link.cvt");
    std::os::unix::fs::symlink(&path, &link).expect("link");
    let mut writer = TraceWriter::create(&link, true, &machine(), &[image()]).expect("overwritten");
    writer.finish(&end(1)).expect("finish");
    assert!(
        link.symlink_metadata().expect("there").is_symlink(),
        "the link stays a link"
    );
    assert!(Trace::open(&path).expect("a trace").complete());
    let names: Vec<_> = dir.path().read_dir().expect("list").collect();
    assert_eq!(names.len(), 2, "nothing else is left: {names:?}");
    let missing = dir.path().join("no/such/place.cvt");
    assert!(matches!(
        TraceWriter::create(&missing, false, &machine(), &[]).map(|_| ()),
        Err(CreateTraceError::Io { .. })
    ));
}

#[test]
fn a_recording_that_cannot_begin_leaves_no_file() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("new.cvt");
    let huge = Image {
        name: "huge".to_owned(),
        bytes: vec![0; (512 << 20) + 1],
    };
    TraceWriter::create(&path, false, &machine(), &[huge])
        .map(|_| ())
        .expect_err("too large");
    assert!(!path.exists());
}

#[test]
fn a_trace_is_read_from_a_pipe_too() {
    let records = records(2);
    let bytes = written(&records, 7);
    let (reader, mut pipe) = io::pipe().expect("pipe");
    let writer = std::thread::spawn(move || pipe.write_all(&bytes));
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", reader.as_raw_fd());
    let mut trace = Trace::open(path.as_ref()).expect("open");
    writer.join().expect("join").expect("write");
    assert_eq!(log(&mut trace), records);
    let zero = Trace::open("/dev/zero".as_ref()).expect_err("endless, and no trace");
    assert!(zero.to_string().contains("/dev/zero"), "{zero}");
}

#[test]
fn info_check_and_dump_tell_what_is_there() {
    let records = records(2);
    let bytes = written(&records, 7);
    let mut trace = read(&bytes).expect("read");
    let summary = info(&trace);
    assert_eq!((summary.records, summary.arrivals), (14, 8));
    assert_eq!(summary.status, Some(1));
    assert_eq!(summary.images, [("crash".to_owned(), 600)]);
    assert!(check(&trace).intact);
    let dumped: Vec<_> = dump(&mut trace).collect::<Result<_, _>>().expect("dump");
    assert_eq!(dumped.len(), 14);
    let json = serde_json::to_value(&dumped[2]).expect("json");
    assert_eq!(json["record"], "arrival");
    assert_eq!(json["moment"]["landmark"]["registers"]["rip"], "0x100001");
    assert_eq!(json["moment"]["landmark"]["pages"][0]["addr"], "0x64000");
    serde_json::to_string(&dumped).expect("all of it");
    let cut = read(&bytes[..bytes.len() - 5]).expect("prefix");
    let report = check(&cut);
    assert!(!report.intact && !report.complete);
    assert_eq!(report.records, 14);
    assert!(report.intact_up_to.is_some());
    assert_eq!(info(&cut).status, None);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let _ = read(&bytes);
    }

    #[test]
    fn arbitrary_chunks_never_panic(
        kind in 1u16..6,
        flags in 0u16..2,
        raw in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let (prefix, next) = open_ended();
        let payload = zstd::bulk::compress(&raw, 1).expect("compress");
        let chunk = hostile_chunk(kind, flags, next, raw.len() as u32, &payload);
        let mut trace = read(&[&prefix[..], &chunk].concat()).expect("prefix");
        let _ = dump(&mut trace).count();
        // In front, too.
        let chunk = hostile_chunk(kind, flags, 0, raw.len() as u32, &payload);
        let _ = read(&[&prefix[..24], &chunk].concat());
    }

    #[test]
    fn any_records_survive(seeds in proptest::collection::vec(any::<(u8, u64, u64)>(), 0..50)) {
        let mut after = 0u64;
        let mut records = Vec::new();
        for (kind, a, b) in seeds {
            after = after.saturating_add(a >> (a % 64));
            let at = SyncOrdinal(after);
            records.push(match kind % 3 {
                0 => Record::ClockRead { after: at, now: Nanos::new(b) },
                1 => Record::Entropy { after: at, bytes: b.to_le_bytes()[..(a % 8) as usize].to_vec() },
                _ => Record::Arrival {
                    after: at,
                    vcpu: VcpuId(kind),
                    moment: Moment::Position(Position::at(b)),
                    arrival: Arrival::Time { now: Nanos::new(a) },
                },
            });
        }
        let mut trace = read(&written(&records, 5)).expect("read");
        prop_assert_eq!(log(&mut trace), records);
    }
}
