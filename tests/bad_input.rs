//! Input nobody means to send: damaged traces, full disks, closed pipes, killed recorders, missing devices.

mod harness;

use harness::{Traces, chronovisor, expect, run, stderr};
use std::io::Read;
use std::process::Stdio;

/// A trace of `hello`, made on soft so that it exists everywhere.
fn hello_trace(traces: &Traces) -> String {
    let file = traces.file("hello.cvt");
    expect(0, &["record", "hello", "--engine", "soft", "-o", &file]);
    file
}

#[test]
fn a_recording_does_not_overwrite_unasked() {
    let traces = Traces::new("overwrite");
    let file = hello_trace(&traces);
    let before = std::fs::read(&file).expect("trace");
    let second = run(&["record", "hello", "--engine", "soft", "-o", &file]);
    assert_eq!(second.status.code(), Some(125));
    assert!(stderr(&second).contains("--force"), "{}", stderr(&second));
    assert_eq!(std::fs::read(&file).expect("trace"), before);
    expect(
        0,
        &[
            "record", "hello", "--engine", "soft", "-o", &file, "--force",
        ],
    );
}

#[test]
fn files_that_are_no_traces_are_named_as_such() {
    let traces = Traces::new("no-trace");
    for (name, bytes) in [
        ("empty", &b""[..]),
        ("text", b"# Chronovisor\n"),
        ("zeros", &[0; 4096]),
    ] {
        let file = traces.file(name);
        std::fs::write(&file, bytes).expect("write");
        for command in [
            &["replay"][..],
            &["trace", "info"],
            &["trace", "check"],
            &["trace", "dump"],
            &["debug", "--once", "80x24"],
        ] {
            let mut arguments = command.to_vec();
            arguments.push(&file);
            let output = run(&arguments);
            assert_eq!(
                output.status.code(),
                Some(125),
                "{arguments:?}: {}",
                stderr(&output)
            );
            assert!(
                stderr(&output).contains(name),
                "{arguments:?}: {}",
                stderr(&output)
            );
            assert!(
                stderr(&output).contains("not a chronovisor trace"),
                "{}",
                stderr(&output)
            );
        }
    }
    let missing = run(&["replay", &traces.file("missing.cvt")]);
    assert_eq!(missing.status.code(), Some(125));
    assert!(
        stderr(&missing).contains("missing.cvt"),
        "{}",
        stderr(&missing)
    );
}

#[test]
fn a_cut_trace_replays_its_prefix_and_says_so() {
    let traces = Traces::new("cut");
    let bytes = std::fs::read(hello_trace(&traces)).expect("trace");
    let file = traces.file("cut.cvt");
    std::fs::write(&file, &bytes[..bytes.len() - 1]).expect("write");
    let output = run(&["replay", &file]);
    assert_eq!(output.status.code(), Some(126), "{}", stderr(&output));
    assert!(stderr(&output).contains("offset"), "{}", stderr(&output));
    let check = run(&["trace", "check", &file]);
    assert_eq!(check.status.code(), Some(126), "{}", stderr(&check));
}

#[test]
fn another_version_is_named() {
    let traces = Traces::new("version");
    let mut bytes = std::fs::read(hello_trace(&traces)).expect("trace");
    // docs/trace-format.md: the version is the four bytes after the magic.
    bytes[8] = 77;
    let file = traces.file("future.cvt");
    std::fs::write(&file, &bytes).expect("write");
    let output = run(&["replay", &file]);
    assert_eq!(output.status.code(), Some(125));
    assert!(
        stderr(&output).contains("version 77"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_full_disk_stops_a_recording_with_a_clear_error() {
    let output = run(&[
        "record",
        "hello",
        "--engine",
        "soft",
        "--force",
        "-o",
        "/dev/full",
    ]);
    assert_eq!(output.status.code(), Some(125), "{}", stderr(&output));
    assert!(stderr(&output).contains("/dev/full"), "{}", stderr(&output));
    assert!(
        stderr(&output).to_lowercase().contains("no space"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_closed_pipe_stops_a_run_with_a_clear_error() {
    let mut child = chronovisor(&["run", "hello", "--engine", "soft"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(125), "{}", stderr(&output));
    assert!(
        stderr(&output).to_lowercase().contains("pipe"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_killed_recorder_leaves_a_prefix_that_replays() {
    let traces = Traces::new("killed");
    let mut cut = 0;
    // Kill at ever later moments: after so many bytes of console have been seen.
    for seen in 0..40 {
        let file = traces.file("killed.cvt");
        let mut child = chronovisor(&[
            "record", "timer", "--engine", "soft", "--force", "-o", &file,
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
        let mut console = child.stdout.take().expect("piped");
        let mut bytes = vec![0; seen * 4 + 1];
        let _ = console.read_exact(&mut bytes);
        child.kill().expect("kill");
        child.wait().expect("reaped");
        let output = run(&["replay", "--quiet", &file]);
        match output.status.code() {
            Some(0) => {}
            Some(126) => cut += 1,
            status => panic!("status {status:?}: {}", stderr(&output)),
        }
    }
    assert!(
        cut > 0,
        "no recording was cut short: the test killed none in time"
    );
}

#[test]
fn without_permission_for_kvm_the_error_says_what_to_do() {
    if !harness::program("setpriv", "without_permission_for_kvm") {
        return;
    }
    // A user who may not open /dev/kvm, whoever runs the tests; the binary must be readable to them.
    let traces = Traces::new("permission");
    let copy = std::env::temp_dir().join(format!("chronovisor-{}", std::process::id()));
    std::fs::copy(harness::CHRONOVISOR, &copy).expect("copy");
    let output = std::process::Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&copy)
        .args(["run", "hello", "--engine", "kvm"])
        .stdin(Stdio::null())
        .output()
        .expect("setpriv starts");
    let _ = std::fs::remove_file(&copy);
    drop(traces);
    let text = stderr(&output);
    if text.contains("setpriv:") {
        eprintln!("skipped: without_permission_for_kvm: {text}");
        return;
    }
    assert_eq!(output.status.code(), Some(125), "{text}");
    assert!(text.contains("/dev/kvm"), "{text}");
    assert!(
        text.contains("--engine soft"),
        "the error names the way on: {text}"
    );
}
