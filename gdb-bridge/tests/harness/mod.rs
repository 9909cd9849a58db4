//! A server on a thread, and the real gdb against it.

#![allow(dead_code)] // Each test file uses a part.

use gdb_bridge::{Address, Listener, Mode, Notice, Options, Outcome, ServeError, serve};
use machine::debuggable::Debuggable;
use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// A machine being served; `R` is what is kept of it.
pub(crate) struct Served<R> {
    pub(crate) address: Address,
    /// What the server notified, as it happens.
    pub(crate) notices: mpsc::Receiver<Notice>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(Result<Outcome, ServeError>, R)>,
}

impl<M: Debuggable + Send + 'static> Served<M> {
    /// Serves `machine` on a port of 127.0.0.1 that the system chooses.
    pub(crate) fn new(machine: M, mode: Mode) -> Self {
        let address = ":0".parse().expect("an address");
        Self::made(&address, mode, move || machine, |machine| machine)
    }
}

impl<R: Send + 'static> Served<R> {
    /// Serves what `make` makes, on the server's thread, at `address`; `keep` takes what is of interest afterwards.
    pub(crate) fn made<M: Debuggable>(
        address: &Address,
        mode: Mode,
        make: impl FnOnce() -> M + Send + 'static,
        keep: impl FnOnce(M) -> R + Send + 'static,
    ) -> Self {
        let listener = Listener::bind(address, false).expect("bound");
        let address = listener.address().clone();
        let (sender, notices) = mpsc::channel();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut machine = make();
            let mut notify = |notice| {
                // A test that has heard enough no longer listens.
                let _ = sender.send(notice);
            };
            let options = Options {
                mode,
                stop: Some(&stopped),
                notify: &mut notify,
            };
            let outcome = serve(&mut machine, listener, options);
            (outcome, keep(machine))
        });
        Served {
            address,
            notices,
            stop,
            thread,
        }
    }

    /// Waits until serving has ended by itself.
    pub(crate) fn ended(self) -> (Outcome, R) {
        let (outcome, kept) = self.thread.join().expect("the server did not panic");
        (outcome.expect("served"), kept)
    }

    /// Ends serving.
    pub(crate) fn stop(self) -> (Outcome, R) {
        self.stop.store(true, Ordering::Relaxed);
        self.ended()
    }

    /// Runs gdb's `commands` after connecting; all it printed.
    pub(crate) fn gdb(&self, commands: &[&str]) -> String {
        let connect = format!("target remote {}", self.address);
        let mut all = vec![connect.as_str()];
        all.extend(commands);
        gdb(&all)
    }
}

/// Says that a test did not run, unless gdb is there.
pub(crate) fn have_gdb(test: &str) -> bool {
    let there = Command::new("gdb").arg("--version").output().is_ok();
    if !there {
        eprintln!("{test}: skipped: gdb is not installed");
    }
    there
}

/// One gdb at a time: two cores are few.
static ONE_GDB: Mutex<()> = Mutex::new(());

/// Runs gdb without the user's configuration; all it printed, on both channels.
pub(crate) fn gdb(commands: &[&str]) -> String {
    let _turn = ONE_GDB.lock();
    let mut command = Command::new("timeout");
    command.args(["60", "gdb", "-batch", "-nx", "-ex", "set pagination off"]);
    command.args(["-ex", "set confirm off", "-ex", "set width 0"]);
    for line in commands {
        command.args(["-ex", line]);
    }
    // Both channels in one pipe, so that what was printed stays in order.
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    command
        .stdin(Stdio::null())
        .stderr(writer.try_clone().expect("cloned"))
        .stdout(writer);
    let mut child = command.spawn().expect("gdb runs");
    drop(command);
    let mut text = Vec::new();
    reader.read_to_end(&mut text).expect("read");
    let text = String::from_utf8_lossy(&text).into_owned();
    let status = child.wait().expect("gdb ends");
    assert_ne!(status.code(), Some(124), "gdb hung: {text}");
    text
}

/// Wants each of `parts` in `text`, in this order.
#[track_caller]
pub(crate) fn expect_in_order(text: &str, parts: &[&str]) {
    let mut rest = text;
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => panic!("{part:?} is missing, or not in order, in:\n{text}"),
        }
    }
}
