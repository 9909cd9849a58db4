//! Connections coming and going, with a scripted client.

mod harness;
#[allow(dead_code)]
#[path = "../src/testing.rs"]
mod testing;

use gdb_bridge::{Mode, Notice, Outcome};
use harness::Served;
use machine::End;
use machine::debuggable::Debuggable;
use std::io::{Read, Write};
use std::net::TcpStream;
use testing::{CODE, FakeMachine};

/// INC RAX, OUT.
const PROGRAM: &[u8] = &[0x48, 0xff, 0xc0, 0xe6, 0xf4];
/// JMP to itself.
const FOREVER: &[u8] = &[0xeb, 0xfe];

fn connect<M>(served: &Served<M>) -> TcpStream {
    let client = TcpStream::connect(served.address.to_string()).expect("connected");
    client
        .set_read_timeout(Some(std::time::Duration::from_secs(30)))
        .expect("set");
    client
}

fn send(client: &mut TcpStream, body: &str) {
    let sum = body.bytes().fold(0u8, |sum, byte| sum.wrapping_add(byte));
    client
        .write_all(format!("${body}#{sum:02x}").as_bytes())
        .expect("sent");
}

/// Reads up to the end of the next packet.
fn receive(client: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    while client.read(&mut byte).expect("in time") == 1 {
        text.push(byte[0]);
        if text.len() > 2 && text[text.len() - 3] == b'#' {
            break;
        }
    }
    String::from_utf8(text).expect("text")
}

#[test]
fn a_broken_connection_leaves_the_machine_stopped_without_breakpoints() {
    let served = Served::new(FakeMachine::new(FOREVER), Mode::Live);
    let mut first = connect(&served);
    send(&mut first, &format!("Z0,{:x},1", CODE + 0x100));
    assert_eq!(receive(&mut first), "+$OK#9a");
    send(&mut first, "vCont;c");
    drop(first);
    assert!(matches!(served.notices.recv(), Ok(Notice::Connected(_))));
    assert_eq!(served.notices.recv(), Ok(Notice::Lost));
    let mut second = connect(&served);
    send(&mut second, "qRcmd,7768656e"); // when
    let when = receive(&mut second);
    let again = receive(&mut second);
    send(&mut second, "qRcmd,7768656e");
    assert_eq!(
        (receive(&mut second), receive(&mut second)),
        (when, again),
        "it stands still"
    );
    let (outcome, machine) = served.stop();
    assert_eq!(outcome, Outcome::Stopped);
    assert!(machine.breakpoints.is_empty());
}

#[test]
fn a_detached_live_guest_runs_on_to_its_end() {
    let served = Served::new(FakeMachine::new(PROGRAM), Mode::Live);
    let mut client = connect(&served);
    send(&mut client, &format!("Z0,{:x},1", CODE + 3));
    receive(&mut client);
    send(&mut client, "D");
    assert_eq!(receive(&mut client), "+$OK#9a");
    let (outcome, machine) = served.ended();
    assert_eq!(
        outcome,
        Outcome::Ended(End::DebugExit(1)),
        "not stopped at the breakpoint"
    );
    assert_eq!(machine.end(), Some(End::DebugExit(1)));
}

#[test]
fn a_detached_live_guest_is_stopped_by_the_next_client() {
    let served = Served::new(FakeMachine::new(FOREVER), Mode::Live);
    let mut first = connect(&served);
    send(&mut first, "D");
    receive(&mut first);
    let mut second = connect(&served);
    send(&mut second, "?");
    assert_eq!(receive(&mut second), "+$T05thread:01;#07");
    assert_eq!(served.stop().0, Outcome::Stopped);
}

#[test]
fn ctrl_c_reaches_a_running_machine() {
    let served = Served::new(FakeMachine::new(FOREVER), Mode::Live);
    let mut client = connect(&served);
    send(&mut client, "vCont;c");
    client.write_all(b"\x03").expect("sent");
    let stop = receive(&mut client);
    assert_eq!(stop, "+$T02thread:01;#04");
    assert_eq!(served.stop().0, Outcome::Stopped);
}

#[test]
fn a_second_client_is_refused_while_the_machine_runs() {
    let served = Served::new(FakeMachine::new(FOREVER), Mode::Live);
    let mut first = connect(&served);
    send(&mut first, "vCont;c");
    assert_eq!(first.read(&mut [0]).expect("acknowledged"), 1);
    let mut second = connect(&served);
    let mut said = String::new();
    second.read_to_string(&mut said).expect("closed");
    assert!(said.contains("another gdb is connected"), "{said}");
    assert_eq!(served.stop().0, Outcome::Stopped);
}

#[test]
fn packets_may_come_in_any_pieces() {
    let served = Served::new(FakeMachine::new(PROGRAM), Mode::Live);
    let mut client = connect(&served);
    for byte in b"$?#3f" {
        client.write_all(&[*byte]).expect("sent");
    }
    assert_eq!(receive(&mut client), "+$T05thread:01;#07");
    client.write_all(b"$k#6b").expect("sent");
    assert_eq!(served.ended().0, Outcome::Killed);
}
