//! The real gdb against real guests: live on both engines, and on a recording.

#[path = "harness/guest.rs"]
mod guest;
mod harness;

use gdb_bridge::{Address, Mode, Outcome};
use guest::{RATE, fixture, live_on_kvm, live_on_soft, record, record_panic, timeline};
use harness::{Served, expect_in_order, gdb, have_gdb};
use machine::End;
use machine::debuggable::Debuggable;
use machine::live::LiveMachine;
use std::path::{Path, PathBuf};

/// A folder with a fixture's ELF file in it.
struct Files {
    folder: tempfile::TempDir,
}

impl Files {
    fn new(name: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let files = Self { folder };
        std::fs::write(files.elf(), fixture(name).elf).expect("written");
        files
    }

    fn elf(&self) -> PathBuf {
        self.path("guest.elf")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

fn loopback() -> Address {
    ":0".parse().expect("an address")
}

/// Runs gdb with the symbols of `elf` against `address`.
fn with_symbols(elf: &Path, address: &Address, commands: &[&str]) -> String {
    let file = format!("file {}", elf.display());
    let connect = format!("target remote {address}");
    let mut all = vec![file.as_str(), connect.as_str()];
    all.extend(commands);
    gdb(&all)
}

fn serve_live(make: impl FnOnce() -> LiveMachine + Send + 'static) -> Served<Vec<u8>> {
    Served::made(&loopback(), Mode::Live, make, |machine| {
        machine.console().to_vec()
    })
}

/// What every engine must offer on a live guest.
fn debug_hello(served: Served<Vec<u8>>) {
    let files = Files::new("hello");
    let said = with_symbols(
        &files.elf(),
        &served.address,
        &[
            "p $cr0",
            "break sum_of_squares",
            "continue",
            "backtrace",
            "p $efer",
            "p/x $cs",
            "stepi",
            "stepi",
            "x/2i $rip",
            "monitor exits",
            "monitor walk $rip",
            "continue",
            "monitor console",
            "monitor info",
            "continue",
        ],
    );
    expect_in_order(
        &said,
        &[
            "= [ PE",
            "Breakpoint 1, ",
            "#0  hello::sum_of_squares (n=100)",
            "start64 ()",
            "[ LME LMA ]",
            "= 0x10",
            "=> 0x",
            "physical",
            "[the guest ended: debug exit with 0",
            "SIGTERM",
            "exited normally",
        ],
    );
    let (outcome, console) = served.ended();
    assert_eq!(outcome, Outcome::Ended(End::DebugExit(0)));
    fixture("hello")
        .expected
        .check_run(&console, fixtures::End::DebugExit(0))
        .expect("unharmed");
}

#[test]
fn a_live_guest_on_soft() {
    if have_gdb("a_live_guest_on_soft") {
        debug_hello(serve_live(|| live_on_soft(fixture("hello"), RATE)));
    }
}

fn have_kvm(test: &str) -> bool {
    match std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        Ok(_) => true,
        Err(error) => {
            eprintln!("{test}: skipped: /dev/kvm: {error}");
            false
        }
    }
}

#[test]
fn a_live_guest_on_kvm() {
    if have_gdb("a_live_guest_on_kvm") && have_kvm("a_live_guest_on_kvm") {
        debug_hello(serve_live(|| live_on_kvm(fixture("hello"))));
    }
}

/// Every frame from an interrupt's handler to the boot code, through the interrupted main loop.
const THROUGH_THE_INTERRUPT: [&str; 7] = [
    "update_process_times ()",
    "timer_interrupt ()",
    "do_trap",
    "<signal handler called>",
    "rest_init ()",
    "start_kernel ()",
    "start64 ()",
];

#[test]
fn an_interrupt_on_kvm() {
    if !have_gdb("an_interrupt_on_kvm") || !have_kvm("an_interrupt_on_kvm") {
        return;
    }
    let files = Files::new("crash");
    let served = serve_live(|| live_on_kvm(fixture("crash")));
    let commands = [
        "hbreak scheduler_tick",
        "continue",
        "backtrace",
        "delete",
        "detach",
    ];
    let said = with_symbols(&files.elf(), &served.address, &commands);
    expect_in_order(&said, &["#0  crash::sched::scheduler_tick ()"]);
    expect_in_order(&said, &THROUGH_THE_INTERRUPT);
    let (outcome, console) = served.ended();
    let Outcome::Ended(End::DebugExit(status)) = outcome else {
        panic!("{outcome:?}")
    };
    fixture("crash")
        .expected
        .check_run(&console, fixtures::End::DebugExit(status))
        .expect("well");
}

#[test]
fn the_panic_of_a_live_guest() {
    if !have_gdb("the_panic_of_a_live_guest") {
        return;
    }
    let files = Files::new("crash");
    let rate = record_panic(&files.path("crash.cvt"));
    // Time is counted in instructions, so that a second run goes the same way, under a debugger too.
    let served = serve_live(move || live_on_soft(fixture("crash"), rate));
    let commands = [
        "break panic",
        "continue",
        "backtrace",
        "continue",
        "continue",
    ];
    let said = with_symbols(&files.elf(), &served.address, &commands);
    expect_in_order(
        &said,
        &["Breakpoint 1, crash::oops::panic", "#0  crash::oops::panic"],
    );
    expect_in_order(
        &said,
        &[
            "start64 ()",
            "[the guest ended: debug exit with 1",
            "code 01",
        ],
    );
    assert_eq!(served.ended().0, Outcome::Ended(End::DebugExit(1)));
}

#[test]
fn the_panic_of_a_recording() {
    if !have_gdb("the_panic_of_a_recording") {
        return;
    }
    let files = Files::new("crash");
    let trace = files.path("crash.cvt");
    record_panic(&trace);
    let served = Served::made(&loopback(), Mode::Timeline, move || timeline(&trace), drop);
    let said = with_symbols(
        &files.elf(),
        &served.address,
        &[
            "break panic",
            "continue",
            "backtrace",
            "continue",
            "backtrace 3",
            "monitor console 1",
            "reverse-continue",
            "set language c",
            "print *(unsigned long *)&JIFFIES > 0",
            "set var *(unsigned long *)&JIFFIES = 0x77",
            "print/x *(unsigned long *)&JIFFIES",
            "stepi",
            "detach",
        ],
    );
    expect_in_order(
        &said,
        &[
            "Breakpoint 1, crash::oops::panic",
            "#0  crash::oops::panic",
            "crash::start_kernel ()",
            "start64 ()",
            "[the guest ended here: debug exit with 1]",
            "No more reverse-execution history",
            "crash::oops::panic",
            "Kernel panic - not syncing",
            "Breakpoint 1, crash::oops::panic",
            "= 1",
            "= 0x77",
            "[this change has left the recording",
        ],
    );
    // The next one finds it where it was left.
    let commands = [
        "set language c",
        "print/x *(unsigned long *)&JIFFIES",
        "kill",
    ];
    let said = with_symbols(&files.elf(), &served.address, &commands);
    expect_in_order(&said, &["= 0x77"]);
    assert_eq!(served.ended().0, Outcome::Killed);
}

/// The numbers that `monitor when` printed.
fn positions(said: &str) -> Vec<u64> {
    said.lines().filter_map(|line| line.parse().ok()).collect()
}

#[test]
fn steps_forward_and_back_on_a_recording() {
    if !have_gdb("steps_forward_and_back_on_a_recording") {
        return;
    }
    let files = Files::new("hello");
    let trace = files.path("hello.cvt");
    record(fixture("hello"), RATE, &trace);
    let served = Served::made(&loopback(), Mode::Timeline, move || timeline(&trace), drop);
    let said = with_symbols(
        &files.elf(),
        &served.address,
        &[
            "break sum_of_squares",
            "continue",
            "monitor when",
            "stepi 5",
            "monitor when",
            "reverse-stepi 3",
            "monitor when",
            "reverse-continue",
            "monitor when",
            "print n",
            "finish",
            "reverse-continue",
            "reverse-finish",
            "monitor when",
            "reverse-continue",
            "monitor when",
            "kill",
        ],
    );
    expect_in_order(
        &said,
        &[
            "hello::sum_of_squares (n=100)",
            "= 100",
            "Value returned is $2 = 328350",
            "No more reverse-execution history",
        ],
    );
    let when = positions(&said);
    let [at, five_on, three_back, again, called, start] = when[..] else {
        panic!("six positions, not {when:?}, in:\n{said}");
    };
    assert_eq!(five_on, at + 5, "{said}");
    assert_eq!(three_back, at + 2, "{said}");
    assert_eq!(again, at, "{said}");
    assert!(called < at, "reverse-finish goes to the call: {said}");
    assert_eq!(start, 0, "{said}");
    served.ended();
}

#[test]
fn a_breakpoint_in_real_mode_set_before_its_code_is_there() {
    if !have_gdb("a_breakpoint_in_real_mode_set_before_its_code_is_there") {
        return;
    }
    let files = Files::new("modes");
    let served = serve_live(|| live_on_soft(fixture("modes"), RATE));
    let said = with_symbols(
        &files.elf(),
        &served.address,
        &[
            // The guest copies the code from `real_blob` to 8000h and runs it with CS = 800h.
            "set $hello = 0x8000 + (long)&real_hello - (long)&real_blob",
            "break *$hello",
            "continue",
            "print $rip == $hello",
            "print/x $cs",
            "print $cr0 & 1",
            "x/2xb $rip",
            "x/2xb &real_hello",
            "stepi",
            "print (long)$rip - $hello",
            "monitor info",
            "delete",
            "detach",
        ],
    );
    expect_in_order(
        &said,
        &[
            "Breakpoint 1, 0x0000000000008",
            "= 1",
            "= 0x800",
            "= 0",
            "= 3",
        ],
    );
    let bytes: Vec<_> = said
        .lines()
        .filter_map(|line| line.split_once(":\t0x"))
        .collect();
    assert_eq!(
        bytes[0].1, bytes[1].1,
        "the copy, without a trace of the breakpoint: {said}"
    );
    // Time is counted in instructions: left alone, it goes the same way.
    let alone = serve_live(|| live_on_soft(fixture("modes"), RATE));
    with_symbols(&files.elf(), &alone.address, &["detach"]);
    assert_eq!(served.ended(), alone.ended());
}
