//! What the end-to-end tests share: running the built binary, and traces that outlive a failing test.
//!
//! Invariants: a test that lacks a device is visibly skipped, and fails instead where `CHRONOVISOR_REQUIRE` names the device.

#![allow(dead_code, unreachable_pub)] // Each test binary uses its own share.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The binary under test.
pub const CHRONOVISOR: &str = env!("CARGO_BIN_EXE_chronovisor");

/// A command line of it, with no terminal and no input.
pub fn chronovisor(arguments: &[&str]) -> Command {
    let mut command = Command::new(CHRONOVISOR);
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Runs it to the end.
pub fn run(arguments: &[&str]) -> Output {
    chronovisor(arguments).output().expect("the binary starts")
}

/// Runs it, wants this exit status, and gives back standard output.
#[track_caller]
pub fn expect(status: i32, arguments: &[&str]) -> Vec<u8> {
    let output = run(arguments);
    assert_eq!(
        output.status.code(),
        Some(status),
        "chronovisor {}\n-- stdout\n{}\n-- stderr\n{}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    output.stdout
}

/// Standard error as text.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Whether `/dev/kvm` can be used here. If not, says so; or fails, where the environment demands it.
pub fn kvm(test: &str) -> bool {
    let usable = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    if !usable {
        assert!(
            !required("kvm"),
            "{test}: /dev/kvm is required here, and cannot be opened"
        );
        eprintln!("skipped: {test}: /dev/kvm cannot be opened");
    }
    usable
}

/// Whether a program is installed. If not, says so; or fails, where the environment demands it.
pub fn program(name: &str, test: &str) -> bool {
    let found = Command::new(name)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !found {
        assert!(
            !required(name),
            "{test}: {name} is required here, and is not installed"
        );
        eprintln!("skipped: {test}: {name} is not installed");
    }
    found
}

fn required(what: &str) -> bool {
    std::env::var("CHRONOVISOR_REQUIRE").is_ok_and(|list| list.split(',').any(|item| item == what))
}

/// A folder for a test's traces: removed when the test passes, kept and named when it fails.
pub struct Traces {
    folder: PathBuf,
}

impl Traces {
    /// A fresh folder for the test called `test`.
    pub fn new(test: &str) -> Self {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(test);
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).expect("a folder for traces");
        Self { folder }
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> String {
        self.folder
            .join(name)
            .into_os_string()
            .into_string()
            .expect("UTF-8 path")
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.folder);
            return;
        }
        for entry in std::fs::read_dir(&self.folder)
            .into_iter()
            .flatten()
            .flatten()
        {
            eprintln!(
                "kept; replay it with: {CHRONOVISOR} replay {}",
                entry.path().display()
            );
        }
    }
}
