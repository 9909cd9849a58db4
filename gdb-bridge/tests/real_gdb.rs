//! The real gdb against a fake machine: whether gdb takes what we say as we mean it.

mod harness;
#[allow(dead_code)]
#[path = "../src/testing.rs"]
mod testing;

use gdb_bridge::{Mode, Notice, Outcome};
use harness::{Served, expect_in_order, gdb, have_gdb};
use machine::End;
use std::io::Write;
use std::process::{Command, Stdio};
use testing::{CODE, FakeMachine};

/// NOP, INC RAX, NOP, INC RAX, OUT: ends with debug exit 2.
const PROGRAM: &[u8] = &[0x90, 0x48, 0xff, 0xc0, 0x90, 0x48, 0xff, 0xc0, 0xe6, 0xf4];
/// JMP to itself.
const FOREVER: &[u8] = &[0xeb, 0xfe];

#[test]
fn gdb_knows_every_register_by_name_and_type() {
    if !have_gdb("gdb_knows_every_register_by_name_and_type") {
        return;
    }
    let mut machine = FakeMachine::new(PROGRAM);
    machine.cpu.fpu.xmm[3] = 0x4000_0000_3f80_0000;
    machine.cpu.fpu.st[0] = [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f];
    machine.cpu.fpu.ftw = 1;
    machine.cpu.msrs.kernel_gs_base = 0x1234;
    let served = Served::new(machine, Mode::Live);
    let said = served.gdb(&[
        "info registers",
        "p $xmm3.v4_float",
        "p $st0",
        "p/x $ftag",
        "p $cr0",
        "p/x $k_gs_base",
        "p $efer",
        "p $eflags",
        "set $xmm3.v4_float[0] = 3",
        "p $xmm3.v4_float",
        "set $cr3 = 0x5000",
        "p/x $cr3",
        "set $cr0 = 0x80000000L",
        "set $cr0 |= 0x2",
        "p $cr0",
        "set $eflags = 0x246",
        "p $eflags",
        "set $fs_base = 0x7000",
        "p/x $fs_base",
        "info threads",
        "kill",
    ]);
    expect_in_order(
        &said,
        &[
            "rax ",
            "rip            0xffffffff80000000",
            "gs_base ",
            "cr0            0x80010031          [ PE ET NE WP PG ]",
            "efer           0xd00               [ LME LMA NXE ]",
            "{1, 2, 0, 0}",
            "= 1\n",
            "= 0xfffc",
            "[ PE ET NE WP PG ]",
            "0x1234",
            "[ LME LMA NXE ]",
            "[ ]",
            "{3, 2, 0, 0}",
            "0x5000",
            "remote failure reply 'E16'",
            "[ PE MP ET NE WP PG ]",
            "[ PF ZF IF ]",
            "0x7000",
            "CPU 0 (soft)",
        ],
    );
    let (outcome, machine) = served.ended();
    assert_eq!(outcome, Outcome::Killed);
    assert_eq!(machine.cpu.cr3, 0x5000);
}

#[test]
fn gdb_sets_breakpoints_steps_and_changes_memory() {
    if !have_gdb("gdb_sets_breakpoints_steps_and_changes_memory") {
        return;
    }
    let served = Served::new(FakeMachine::new(PROGRAM), Mode::Live);
    let said = served.gdb(&[
        "x/2i $rip",
        "break *0xffffffff80000001",
        "hbreak *0xffffffff80000005",
        "continue",
        "stepi",
        "p $rax",
        "continue",
        "info breakpoints",
        "x/10xb 0xffffffff80000000",
        "set {char}0xffffffff80000800 = 0x5a",
        "x/xb 0xffffffff80000800",
        "x/xb 0xffffffff80002000",
        "continue",
        "p $rax",
        "continue",
    ]);
    expect_in_order(
        &said,
        &[
            "nop",
            "inc    %rax",
            "Breakpoint 1, 0xffffffff80000001",
            "0xffffffff80000004",
            "$1 = 1",
            "Breakpoint 2, 0xffffffff80000005",
            "breakpoint already hit 1 time",
            "0x90\t0x48\t0xff\t0xc0\t0x90\t0x48\t0xff\t0xc0",
            "0x5a",
            "[the guest ended: debug exit with 2;",
            "SIGTERM",
            "$2 = 2",
            "exited with code 02",
        ],
    );
    assert!(
        said.contains("Cannot access memory at address 0xffffffff80002000"),
        "{said}"
    );
    let (outcome, _) = served.ended();
    assert_eq!(outcome, Outcome::Ended(End::DebugExit(2)));
}

#[test]
fn gdb_goes_back_in_time() {
    if !have_gdb("gdb_goes_back_in_time") {
        return;
    }
    let served = Served::new(FakeMachine::timeline(PROGRAM), Mode::Timeline);
    let said = served.gdb(&[
        "break *0xffffffff80000001",
        "continue",
        "continue",
        "p $rax",
        "reverse-stepi",
        "p/x $rip",
        "reverse-continue",
        "p $rax",
        "reverse-continue",
        "p/x $rip",
        "monitor when",
        "set $rax = 9",
        "stepi",
        "detach",
    ]);
    expect_in_order(
        &said,
        &[
            "Breakpoint 1, 0xffffffff80000001",
            "[the guest ended here: debug exit with 2]",
            "No more reverse-execution history",
            "$1 = 2",
            "$2 = 0xffffffff80000008",
            "Breakpoint 1, 0xffffffff80000001",
            "$3 = 0",
            "No more reverse-execution history",
            "$4 = 0xffffffff80000000",
            "0\n",
            "[this change has left the recording",
        ],
    );
    // A timeline waits for the next one.
    let said = served.gdb(&["p $rax", "kill"]);
    expect_in_order(&said, &["$1 = 9"]);
    assert_eq!(served.ended().0, Outcome::Killed);
}

#[test]
fn a_second_gdb_is_told_that_there_is_one() {
    if !have_gdb("a_second_gdb_is_told_that_there_is_one") {
        return;
    }
    let served = Served::new(FakeMachine::new(FOREVER), Mode::Live);
    let first = std::net::TcpStream::connect(served.address.to_string()).expect("connected");
    assert!(matches!(served.notices.recv(), Ok(Notice::Connected(_))));
    let said = served.gdb(&["p $rax"]);
    expect_in_order(
        &said,
        &["another gdb is connected", "Remote connection closed"],
    );
    assert!(matches!(served.notices.recv(), Ok(Notice::Refused(_))));
    drop(first);
    assert_eq!(served.notices.recv(), Ok(Notice::Lost));
    let said = served.gdb(&["p $rip", "kill"]);
    assert!(said.contains(&format!("{CODE:#x}")), "{said}");
    served.ended();
}

#[test]
fn gdb_attaches_over_a_unix_socket() {
    if !have_gdb("gdb_attaches_over_a_unix_socket") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let address = gdb_bridge::Address::Unix(folder.path().join("guest.sock"));
    let served = Served::made(&address, Mode::Live, || FakeMachine::new(PROGRAM), drop);
    let said = served.gdb(&["stepi", "p/x $rip", "kill"]);
    expect_in_order(&said, &["$1 = 0xffffffff80000001"]);
    served.ended();
}

#[test]
fn ctrl_c_in_gdb_stops_a_running_machine() {
    if !have_gdb("ctrl_c_in_gdb_stops_a_running_machine") {
        return;
    }
    let (sender, slices) = std::sync::mpsc::channel();
    let mut machine = FakeMachine::new(FOREVER);
    machine.slices = Some(sender);
    let served = Served::new(machine, Mode::Live);
    let mut gdb = Command::new("gdb")
        .args(["-nx", "-q", "-ex", "set confirm off"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("gdb runs");
    let mut stdin = gdb.stdin.take().expect("a pipe");
    writeln!(stdin, "target remote {}\ncontinue", served.address).expect("sent");
    slices.recv().expect("it runs");
    let interrupt = Command::new("kill")
        .args(["-INT", &gdb.id().to_string()])
        .status();
    assert!(interrupt.expect("kill runs").success());
    writeln!(stdin, "print $rip\nkill\nquit").expect("sent");
    let said = gdb.wait_with_output().expect("gdb ends").stdout;
    expect_in_order(
        &String::from_utf8_lossy(&said),
        &["SIGINT", "0xffffffff80000000"],
    );
    assert_eq!(served.ended().0, Outcome::Killed);
}

#[test]
fn gdb_without_a_server_says_so() {
    // Holds the harness to account: what a failed connection looks like.
    if !have_gdb("gdb_without_a_server_says_so") {
        return;
    }
    let said = gdb(&["target remote /nonexistent/socket"]);
    assert!(said.contains("No such file"), "{said}");
}
