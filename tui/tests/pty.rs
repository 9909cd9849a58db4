//! The UI on a real terminal: whatever ends it, the terminal is as it was.
//!
//! The test program runs itself on a pseudo-terminal: the test [`child`] is the UI when [`CHILD`] is set, and nothing otherwise.

#[path = "../src/tests/fake.rs"]
mod fake;

use fake::{Fake, symbols};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// Names what the child is to do.
const CHILD: &str = "CHRONOVISOR_TUI_TEST_CHILD";

/// The status of a child that lost its terminal, and noticed.
const LEFT: i32 = 73;

/// The UI, when this program runs itself.
#[test]
fn child() {
    let Ok(role) = std::env::var(CHILD) else {
        return;
    };
    let mut machine = Fake::new();
    machine.endless = true;
    machine.bug_at = (role == "bug").then_some(3);
    match tui::run(&mut machine, &symbols(), tui::Options::default()) {
        // The test harness does not get over the loss of its standard output.
        Err(_) if role == "hangup" => std::process::exit(LEFT),
        Ok(()) => println!("left by quitting"),
        Err(error) => println!("left by error: {error}"),
    }
}

/// A pseudo-terminal with the UI on it.
struct Desk {
    terminal: File,
    /// Keeps the terminal and its modes alive when the child is gone.
    line: OwnedFd,
    before: Termios,
    child: Child,
    output: Arc<Output>,
}

/// What the child wrote so far.
#[derive(Default)]
struct Output {
    text: Mutex<String>,
    more: Condvar,
}

impl Output {
    /// Waits until the child has written `wanted`. The time limit only turns a hang into a failure.
    fn wait_for(&self, wanted: &str) {
        let text = self.text.lock().expect("lock");
        let hang = Duration::from_secs(120);
        let missing = |text: &mut String| !text.contains(wanted);
        let (text, result) = self
            .more
            .wait_timeout_while(text, hang, missing)
            .expect("lock");
        assert!(!result.timed_out(), "never saw {wanted:?} in {text:?}");
    }

    fn text(&self) -> String {
        self.text.lock().expect("lock").clone()
    }
}

/// The UI, just started on a pseudo-terminal.
struct Started {
    terminal: File,
    line: OwnedFd,
    before: Termios,
    child: Child,
}

fn start(role: &str) -> Started {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
        .expect("pseudo-terminal");
    grantpt(&terminal).expect("grant");
    unlockpt(&terminal).expect("unlock");
    let name = ptsname(&terminal, Vec::new()).expect("name");
    let path = name.to_str().expect("a path in ASCII");
    let open = || {
        File::options()
            .read(true)
            .write(true)
            .open(path)
            .expect("terminal")
    };
    let line = OwnedFd::from(open());
    let size = Winsize {
        ws_row: 24,
        ws_col: 80,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&line, size).expect("size");
    let before = tcgetattr(&line).expect("modes");
    // In a session of its own the child finds the pseudo-terminal and not the developer's. No group leader, it becomes
    // the program without forking.
    let child = Command::new("setsid")
        .arg("--ctty")
        .arg(std::env::current_exe().expect("own path"))
        .args(["--exact", "child", "--nocapture", "--test-threads=1"])
        .env(CHILD, role)
        .env("TERM", "xterm-256color")
        .env("LC_ALL", "C.UTF-8")
        .env("RUST_BACKTRACE", "0")
        .stdin(open())
        .stdout(open())
        .stderr(open())
        .spawn()
        .expect("setsid of util-linux");
    Started {
        terminal: File::from(terminal),
        line,
        before,
        child,
    }
}

impl Desk {
    fn open(role: &str) -> Self {
        let Started {
            terminal,
            line,
            before,
            child,
        } = start(role);
        let output = Arc::new(Output::default());
        collect(
            terminal.try_clone().expect("second handle"),
            Arc::clone(&output),
        );
        let desk = Self {
            terminal,
            line,
            before,
            child,
            output,
        };
        desk.output.wait_for("registers");
        assert_ne!(
            modes(&desk.line),
            modes_of(&desk.before),
            "raw while the UI runs"
        );
        desk
    }

    fn type_keys(&mut self, keys: &str) {
        self.terminal.write_all(keys.as_bytes()).expect("type");
    }

    /// Waits for the child's end and checks the terminal.
    fn close(mut self) -> (ExitStatus, String) {
        let status = self.child.wait().expect("child");
        assert_eq!(
            modes(&self.line),
            modes_of(&self.before),
            "the terminal's modes"
        );
        self.output.wait_for("\x1b[?1049l");
        self.output.wait_for("\x1b[?25h");
        // The harness's last words, so that nothing before them is missed.
        self.output.wait_for("test result");
        (status, self.output.text())
    }
}

/// Reads until the terminal is closed.
fn collect(mut terminal: File, output: Arc<Output>) {
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = terminal.read(&mut bytes) {
            let text = String::from_utf8_lossy(&bytes[..count]);
            output.text.lock().expect("lock").push_str(&text);
            output.more.notify_all();
        }
    });
}

fn modes(line: &OwnedFd) -> [u64; 4] {
    modes_of(&tcgetattr(line).expect("modes"))
}

fn modes_of(termios: &Termios) -> [u64; 4] {
    [
        termios.input_modes.bits().into(),
        termios.output_modes.bits().into(),
        termios.control_modes.bits().into(),
        termios.local_modes.bits().into(),
    ]
}

#[test]
fn quitting_restores_the_terminal() {
    let mut desk = Desk::open("quit");
    desk.type_keys("3sq");
    let (status, output) = desk.close();
    assert!(status.success(), "{output}");
    assert!(output.contains("left by quitting"), "{output}");
}

#[test]
fn quitting_a_running_machine_restores_the_terminal() {
    let mut desk = Desk::open("run");
    desk.type_keys("c");
    desk.output.wait_for("RUNNING");
    desk.type_keys("q");
    let (status, output) = desk.close();
    assert!(status.success(), "{output}");
    assert!(output.contains("left by quitting"), "{output}");
}

#[test]
fn signals_restore_the_terminal() {
    for (signal, number) in [(Signal::TERM, 15), (Signal::INT, 2), (Signal::HUP, 1)] {
        let desk = Desk::open("signal");
        kill_process(Pid::from_child(&desk.child), signal).expect("signal");
        let (_, output) = desk.close();
        assert!(
            output.contains(&format!("left by error: ended by signal {number}")),
            "{output}"
        );
    }
}

#[test]
fn a_panic_restores_the_terminal_before_it_is_reported() {
    let mut desk = Desk::open("bug");
    desk.type_keys("c");
    let (status, output) = desk.close();
    assert!(!status.success(), "{output}");
    let restored = output
        .find("\x1b[?1049l")
        .expect("left the alternate screen");
    let reported = output.find("a bug of ours").expect("the panic's message");
    assert!(restored < reported, "{output}");
}

#[test]
fn a_terminal_that_goes_away_ends_the_ui() {
    let Started {
        mut terminal,
        line,
        mut child,
        ..
    } = start("hangup");
    let mut seen = Vec::new();
    let mut bytes = [0; 4096];
    while !String::from_utf8_lossy(&seen).contains("registers") {
        let count = terminal.read(&mut bytes).expect("the UI draws");
        seen.extend_from_slice(&bytes[..count]);
    }
    let pid = Pid::from_child(&child);
    drop((terminal, line));
    let (ended, end) = std::sync::mpsc::channel();
    std::thread::spawn(move || ended.send(child.wait()));
    // The time limit only turns a hang into a failure.
    let hang = Duration::from_secs(120);
    let Ok(status) = end.recv_timeout(hang) else {
        let _ = kill_process(pid, Signal::KILL);
        panic!("the UI runs on without a terminal");
    };
    assert_eq!(status.expect("reaped").code(), Some(LEFT));
}

#[test]
fn a_pipe_is_refused() {
    use std::io::IsTerminal;
    if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
        eprintln!("skipped: this test runs on a terminal");
        return;
    }
    let mut machine = Fake::new();
    let error = tui::run(&mut machine, &symbols(), tui::Options::default()).expect_err("refused");
    assert!(matches!(error, tui::TuiError::NotATerminal), "{error}");
}
