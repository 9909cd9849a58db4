//! The commands as a user types them: the demo, statistics, looking into traces, the terminal UI's text, completions.

mod harness;

use harness::{Traces, chronovisor, expect, run, stderr};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

#[test]
fn the_demo_records_a_crash_and_replays_it_twice() {
    let traces = Traces::new("demo");
    let file = traces.file("crash.cvt");
    let text = String::from_utf8(expect(0, &["demo", "-o", &file])).expect("UTF-8");
    assert!(text.contains("it panicked"), "{text}");
    assert!(text.contains("Identical"), "{text}");
    assert!(text.contains("Kernel panic - not syncing"), "{text}");
    // What it says to type next works.
    let screen = expect(0, &["debug", &file, "--at", "end", "--once", "120x40"]);
    let screen = String::from_utf8(screen).expect("UTF-8");
    assert!(screen.contains("panic"), "{screen}");
    assert!(screen.contains("ENDED"), "{screen}");
    expect(1, &["replay", &file]);
    expect(0, &["trace", "dump", &file]);
}

#[test]
fn statistics_count_every_port() {
    let output = run(&["run", "hello", "--engine", "soft", "--stats", "--json"]);
    assert_eq!(output.status.code(), Some(0));
    let report: Value = serde_json::from_slice(&output.stderr).expect("JSON on standard error");
    let io = &report["reasons"][0];
    assert_eq!(io["reason"], "IO_INSTRUCTION", "{report}");
    assert_eq!(io["sdm_number"], 30, "{report}");
    let sites = io["sites"].as_array().expect("sites");
    assert!(sites.iter().any(|site| site["port"] == 0x3f8), "{report}");
    let total: u64 = sites.iter().filter_map(|site| site["count"].as_u64()).sum();
    assert_eq!(Some(total), io["count"].as_u64(), "{report}");
    let table = stderr(&run(&["run", "hello", "--engine", "soft", "--stats"]));
    assert!(table.contains("COM1") && table.contains("SHARE"), "{table}");
}

#[test]
fn a_trace_tells_what_it_holds() {
    let traces = Traces::new("tells");
    let file = traces.file("timer.cvt");
    expect(0, &["record", "timer", "--engine", "soft", "-o", &file]);
    let info: Value =
        serde_json::from_slice(&expect(0, &["trace", "info", "--json", &file])).expect("JSON");
    assert_eq!(info["version"], 1);
    assert_eq!(info["engine"], "soft");
    assert_eq!(info["complete"], true);
    let text = String::from_utf8(expect(0, &["trace", "info", &file])).expect("UTF-8");
    assert!(text.contains("debug exit with 0"), "{text}");
    let dump = String::from_utf8(expect(0, &["trace", "dump", "--json", &file])).expect("UTF-8");
    let records: Vec<Value> = dump
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(info["records"].as_u64(), Some(records.len() as u64));
    let arrivals = records
        .iter()
        .filter(|record| record["record"] == "arrival")
        .count();
    assert!(
        arrivals >= 16,
        "two threads were preempted eight times each: {arrivals}"
    );
    let check = String::from_utf8(expect(0, &["trace", "check", &file])).expect("UTF-8");
    assert!(check.contains("intact"), "{check}");
}

#[test]
fn soft_runs_in_virtual_time_are_all_the_same() {
    let traces = Traces::new("virtual-time");
    let dumps: Vec<_> = ["first.cvt", "second.cvt"]
        .map(|name| {
            let file = traces.file(name);
            expect(0, &["record", "timer", "--engine", "soft", "-o", &file]);
            expect(0, &["trace", "dump", "--json", &file])
        })
        .into_iter()
        .map(|dump| {
            // Digests are taken by the host's clock, and cover the wall-clock start date; arrivals are not, and do not.
            let text = String::from_utf8(dump).expect("UTF-8");
            let arrivals = text.lines().filter(|line| line.contains("\"arrival\""));
            arrivals
                .map(|line| {
                    let mut record: Value = serde_json::from_str(line).expect("JSON");
                    record["index"] = Value::Null;
                    record
                })
                .collect::<Vec<_>>()
        })
        .collect();
    assert!(!dumps[0].is_empty());
    assert_eq!(dumps[0], dumps[1]);
}

#[test]
fn what_is_typed_reaches_the_guest_and_its_replay() {
    let traces = Traces::new("typed");
    let file = traces.file("entropy.cvt");
    let mut child = chronovisor(&[
        "record", "entropy", "--engine", "soft", "--input", "-", "-o", &file,
    ])
    .stdin(Stdio::piped())
    .stdout(Stdio::piped())
    .stderr(Stdio::null())
    .spawn()
    .expect("starts");
    child
        .stdin
        .take()
        .expect("piped")
        .write_all(b"chrono")
        .expect("typed");
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(0));
    let replayed = expect(0, &["replay", &file]);
    assert_eq!(
        String::from_utf8_lossy(&replayed),
        String::from_utf8_lossy(&output.stdout)
    );
}

#[test]
fn gdb_attaches_to_a_replay_at_its_end() {
    if !harness::program("gdb", "gdb_attaches_to_a_replay_at_its_end") {
        return;
    }
    let traces = Traces::new("gdb");
    let (file, elf) = (traces.file("paging.cvt"), traces.file("paging.elf"));
    expect(0, &["record", "paging", "--engine", "soft", "-o", &file]);
    expect(0, &["fixtures", "extract", "paging", "-o", &elf]);
    let mut server = chronovisor(&["replay", &file, "--at", "end", "--gdb", "127.0.0.1:0"])
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut said = BufReader::new(server.stderr.take().expect("piped"));
    let mut line = String::new();
    said.read_line(&mut line).expect("a line");
    let address = line
        .split("target remote ")
        .nth(1)
        .expect(&line)
        .trim()
        .trim_end_matches('\'');
    let gdb = std::process::Command::new("gdb")
        .args([
            "-batch",
            "-nx",
            &elf,
            "-ex",
            &format!("target remote {address}"),
        ])
        .args([
            "-ex",
            "backtrace",
            "-ex",
            "monitor when",
            "-ex",
            "reverse-stepi",
        ])
        .args(["-ex", "monitor when", "-ex", "kill"])
        .stdin(Stdio::null())
        .output()
        .expect("gdb starts");
    let text = String::from_utf8_lossy(&gdb.stdout);
    assert!(text.contains("runtime_start"), "{text}\n{}", stderr(&gdb));
    assert_eq!(server.wait().expect("ends").code(), Some(0));
}

#[test]
fn another_machine_is_not_let_in_unasked() {
    let output = run(&["run", "hello", "--engine", "soft", "--gdb", "0.0.0.0:0"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(
        stderr(&output).contains("--gdb-allow-remote"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn kernels_that_are_none_are_named_as_such() {
    let traces = Traces::new("kernels");
    for (name, bytes) in [
        ("empty", &b""[..]),
        ("text", b"not a kernel"),
        ("cut", b"\x7fELF\x02\x01"),
    ] {
        let file = traces.file(name);
        std::fs::write(&file, bytes).expect("write");
        let output = run(&["run", "--engine", "soft", "--kernel", &file]);
        assert_eq!(
            output.status.code(),
            Some(125),
            "{name}: {}",
            stderr(&output)
        );
    }
    let output = run(&["run", "--kernel", "/no/such/file"]);
    assert!(
        stderr(&output).contains("/no/such/file"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn completions_are_scripts() {
    for shell in ["bash", "zsh", "fish"] {
        let script = expect(0, &["completions", shell]);
        assert!(
            String::from_utf8_lossy(&script).contains("record"),
            "{shell}"
        );
    }
}
