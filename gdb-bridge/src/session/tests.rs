//! The protocol against a fake machine, without sockets.

use super::*;
use crate::server::Mode;
use crate::testing::{CODE, FIRST_PAGE, FakeMachine, SECOND_PAGE};
use proptest::prelude::*;
use x86::{Gpr, GuestPhysAddr};

/// NOP, INC RAX, NOP, INC RAX, OUT: ends with debug exit 2.
const PROGRAM: &[u8] = &[0x90, 0x48, 0xff, 0xc0, 0x90, 0x48, 0xff, 0xc0, 0xe6, 0xf4];
/// JMP to itself.
const FOREVER: &[u8] = &[0xeb, 0xfe];

/// A client in no-acknowledgement mode, and what it says.
struct Client<'m> {
    bridge: Bridge<'m>,
    session: Session<'m>,
}

impl<'m> Client<'m> {
    fn new(machine: &'m mut FakeMachine, mode: Mode) -> Self {
        let mut bridge = Bridge::new(machine, mode);
        let session = Session::new(&mut bridge).expect("a session");
        let mut client = Self { bridge, session };
        assert_eq!(client.raw(&packet(b"QStartNoAckMode")), "+$OK#9a");
        client
    }

    fn raw(&mut self, bytes: &[u8]) -> String {
        self.session.receive(&mut self.bridge, bytes);
        String::from_utf8(self.session.take_output()).expect("text")
    }

    /// Sends a packet; the contents of what comes back, run-length encoding undone.
    fn ask(&mut self, body: &str) -> String {
        let reply = self.raw(&packet(body.as_bytes()));
        contents(&reply).join("|")
    }

    /// Sends a packet that resumes, and runs until the machine stops. Console output is in parentheses.
    fn run(&mut self, body: &str) -> (String, Option<Farewell>) {
        let mut output = self.raw(&packet(body.as_bytes()));
        let mut farewell = None;
        for _ in 0..100 {
            if !self.session.running() {
                break;
            }
            farewell = self.session.advance(&mut self.bridge, Duration::ZERO);
            output += &String::from_utf8(self.session.take_output()).expect("text");
        }
        (contents(&output).join("|"), farewell)
    }
}

/// The packets in `text`, decoded.
fn contents(text: &str) -> Vec<String> {
    let mut packets = Vec::new();
    for packet in text.split('$').skip(1) {
        let body = packet.split('#').next().expect("a body");
        let mut plain = String::new();
        let mut characters = body.chars();
        while let Some(character) = characters.next() {
            if character == '*' {
                let count = characters.next().expect("a count") as u32 - 29;
                let last = plain.chars().last().expect("something to repeat");
                plain.extend((0..count).map(|_| last));
            } else {
                plain.push(character);
            }
        }
        packets.push(match plain.strip_prefix('O').filter(|rest| *rest != "K") {
            Some(hex) => format!("({})", String::from_utf8_lossy(&unhex(hex)).trim_end()),
            None => plain,
        });
    }
    packets
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2)
        .map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).expect("hex"))
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn monitor(client: &mut Client<'_>, command: &str) -> String {
    client.ask(&format!("qRcmd,{}", hex(command.as_bytes())))
}

#[test]
fn only_what_is_real_is_advertised() {
    let mut live = FakeMachine::new(PROGRAM);
    let features = Client::new(&mut live, Mode::Live).ask("qSupported:multiprocess+;swbreak+");
    for real in [
        "PacketSize=4000",
        "qXfer:features:read+",
        "swbreak+",
        "hwbreak+",
    ] {
        assert!(features.contains(real), "{real} in {features}");
    }
    for unreal in ["Reverse", "memory-map", "fork", "exec-file", "auxv"] {
        assert!(!features.contains(unreal), "{unreal} in {features}");
    }
    let mut timeline = FakeMachine::timeline(PROGRAM);
    let mut client = Client::new(&mut timeline, Mode::Timeline);
    let features = client.ask("qSupported:multiprocess+");
    assert!(features.contains("ReverseStep+") && features.contains("ReverseContinue+"));
    assert_eq!(client.ask("vCont?"), "vCont;c;C;s;S;r");
    assert_eq!(client.ask("Z2,0,8"), "", "no watchpoints");
}

#[test]
fn registers_are_read_and_written_alone_and_together() {
    let mut machine = FakeMachine::new(PROGRAM);
    machine.cpu.regs[Gpr::Rax] = 0x0123_4567_89ab_cdef;
    let mut client = Client::new(&mut machine, Mode::Live);
    assert_eq!(client.ask("p0"), "efcdab8967452301");
    assert_eq!(client.ask("P0=0807060504030201"), "OK");
    let all = client.ask("g");
    assert!(all.starts_with("0807060504030201"));
    let others = &all[16..];
    assert_eq!(client.ask(&format!("Gffffffffffffffff{others}")), "OK");
    assert_eq!(client.ask("p0"), "f".repeat(16));
    assert_eq!(
        client.ask("p41"),
        "0005000000000000".replace("0005", "000d"),
        "EFER"
    );
    assert_eq!(client.ask("P3f=10"), "E16", "too short for CR4");
    assert_eq!(client.ask("P3d=ff00000000000000"), "OK", "CR2");
    assert_eq!(client.ask("P3c=0000008000000000"), "E16", "CR0 without PE");
    assert_eq!(client.ask("p42"), "", "no such register");
    drop(client);
    assert_eq!(machine.cpu.cr2, 0xff);
    assert_eq!(machine.cpu.regs[Gpr::Rax], u64::MAX);
}

#[test]
fn memory_is_read_page_by_page_up_to_the_first_hole() {
    let mut machine = FakeMachine::new(PROGRAM);
    machine
        .memory
        .write(GuestPhysAddr::new(FIRST_PAGE + 0xffe), b"ab")
        .expect("write");
    machine
        .memory
        .write(GuestPhysAddr::new(SECOND_PAGE), b"cd")
        .expect("write");
    machine
        .memory
        .write(GuestPhysAddr::new(SECOND_PAGE + 0xffe), b"yz")
        .expect("write");
    let mut client = Client::new(&mut machine, Mode::Live);
    let at = |offset: u64| CODE + offset;
    assert_eq!(client.ask(&format!("m{:x},4", at(0xffe))), hex(b"abcd"));
    assert_eq!(
        client.ask(&format!("m{:x},10", at(0x1ffe))),
        hex(b"yz"),
        "then a device"
    );
    assert_eq!(
        client.ask(&format!("m{:x},1", at(0x2000))),
        "E0e",
        "a device"
    );
    assert_eq!(client.ask("m0,1"), "E0e", "not mapped");
    assert_eq!(client.ask("mffffffffffffffff,10"), "E0e");
    let whole = client.ask(&format!("m{:x},ffffffff", at(0)));
    assert_eq!(
        whole.len(),
        2 * MAX_READ.min(0x2000),
        "cut to what a reply holds"
    );
    assert!(whole.starts_with(&hex(PROGRAM)));
}

#[test]
fn a_write_is_whole_or_not_done() {
    let mut machine = FakeMachine::new(PROGRAM);
    let mut client = Client::new(&mut machine, Mode::Live);
    assert_eq!(client.ask(&format!("M{:x},4:61626364", CODE + 0xffe)), "OK");
    assert_eq!(client.ask(&format!("m{:x},4", CODE + 0xffe)), hex(b"abcd"));
    assert_eq!(client.ask(&format!("M{:x},2:7878", CODE + 0x1fff)), "E0e");
    assert_eq!(
        client.ask(&format!("m{:x},1", CODE + 0x1fff)),
        "00",
        "untouched"
    );
    assert_eq!(
        client.ask(&format!("X{CODE:x},0:")),
        "OK",
        "gdb's probe for X"
    );
    drop(client);
    let mut bytes = [0; 2];
    machine
        .memory
        .read(GuestPhysAddr::new(SECOND_PAGE), &mut bytes)
        .expect("read");
    assert_eq!(&bytes, b"cd");
}

#[test]
fn physical_addresses_can_be_asked_for_as_in_qemu() {
    let mut machine = FakeMachine::new(PROGRAM);
    let mut client = Client::new(&mut machine, Mode::Live);
    let first = format!("m{FIRST_PAGE:x},4");
    assert_eq!(client.ask(&first), "E0e");
    assert_eq!(client.ask("qqemu.PhyMemMode"), "0");
    assert_eq!(client.ask("Qqemu.PhyMemMode:1"), "OK");
    assert_eq!(client.ask("qqemu.PhyMemMode"), "1");
    assert_eq!(client.ask(&first), hex(&PROGRAM[..4]));
    assert_eq!(client.ask("mffffe,10"), "0000", "RAM ends there");
    assert_eq!(client.ask("Mffffe,3:616161"), "E0e");
    assert_eq!(client.ask("mfee00000,4"), "E0e");
    assert_eq!(client.ask("Qqemu.PhyMemMode:2"), "E16");
    assert!(monitor(&mut client, "phys off").contains("virtual"));
    assert_eq!(client.ask(&first), "E0e");
}

#[test]
fn breakpoints_stop_and_say_which_kind_they_are() {
    let mut machine = FakeMachine::new(PROGRAM);
    let mut client = Client::new(&mut machine, Mode::Live);
    client.ask("qSupported:multiprocess+");
    assert_eq!(client.ask(&format!("Z0,{:x},1", CODE + 1)), "OK");
    assert_eq!(client.ask(&format!("Z1,{:x},1", CODE + 4)), "OK");
    assert_eq!(client.run("vCont;c").0, "T05thread:p01.01;swbreak:;");
    assert_eq!(client.run("vCont;c").0, "T05thread:p01.01;hwbreak:;");
    assert_eq!(
        client.ask(&format!("m{CODE:x},a")),
        hex(PROGRAM),
        "no trace in memory"
    );
    drop(client);
    assert_eq!(machine.breakpoint_changes, 1, "told once");
}

#[test]
fn steps_and_steps_within_a_range() {
    let mut machine = FakeMachine::new(PROGRAM);
    let mut client = Client::new(&mut machine, Mode::Live);
    assert_eq!(client.run("vCont;s:1").0, "T05thread:01;");
    assert_eq!(
        client
            .bridge
            .machine
            .position()
            .expect("counted")
            .retired
            .get(),
        1
    );
    client.run(&format!("vCont;r{:x},{:x}:1", CODE, CODE + 5));
    assert_eq!(
        client
            .bridge
            .machine
            .position()
            .expect("counted")
            .retired
            .get(),
        3
    );
    drop(client);
    assert_eq!(
        machine.cpu.regs.rip,
        CODE + 5,
        "the first instruction outside"
    );
}

#[test]
fn a_range_step_stops_at_a_breakpoint_inside() {
    let mut machine = FakeMachine::new(PROGRAM);
    let mut client = Client::new(&mut machine, Mode::Live);
    client.ask(&format!("Z0,{:x},1", CODE + 4));
    let stop = client.run(&format!("vCont;r{:x},{:x}:1", CODE, CODE + 8)).0;
    assert_eq!(stop, "T05thread:01;swbreak:;");
}

#[test]
fn ctrl_c_stops_a_running_machine_and_is_nothing_to_a_stopped_one() {
    let mut machine = FakeMachine::new(FOREVER);
    let mut client = Client::new(&mut machine, Mode::Live);
    assert_eq!(client.raw(b"\x03"), "");
    assert_eq!(client.raw(&packet(b"vCont;c")), "");
    for _ in 0..3 {
        assert_eq!(
            client.session.advance(&mut client.bridge, Duration::ZERO),
            None
        );
        assert!(client.session.running());
    }
    assert_eq!(contents(&client.raw(b"\x03")), ["T02thread:01;"]);
    assert!(!client.session.running());
}

#[test]
fn a_live_guest_that_ended_can_be_looked_at_before_its_exit_is_reported() {
    let mut machine = FakeMachine::new(PROGRAM);
    let mut client = Client::new(&mut machine, Mode::Live);
    let (stop, farewell) = client.run("vCont;c");
    assert!(
        stop.starts_with("([the guest ended: debug exit with 2;"),
        "{stop}"
    );
    assert!(stop.ends_with("|T0fthread:01;"), "{stop}");
    assert_eq!(farewell, None);
    assert_eq!(client.ask("p0"), "0200000000000000");
    assert_eq!(
        client.run("vCont;C0f"),
        ("W02".to_owned(), Some(Farewell::Exited))
    );
}

#[test]
fn a_timeline_stands_at_its_end_and_goes_back() {
    let mut machine = FakeMachine::timeline(PROGRAM);
    let mut client = Client::new(&mut machine, Mode::Timeline);
    let end = "([the guest ended here: debug exit with 2])|T05thread:01;replaylog:end;";
    assert_eq!(client.run("vCont;c"), (end.to_owned(), None));
    assert_eq!(client.run("vCont;c").0, end, "again");
    client.ask("Hc1");
    assert_eq!(client.run("bs").0, "T05thread:01;");
    assert_eq!(client.ask("p0"), "0200000000000000");
    client.ask(&format!("Z0,{:x},1", CODE + 1));
    assert_eq!(client.run("bc").0, "T05thread:01;swbreak:;");
    assert_eq!(client.ask("p0"), "0000000000000000");
    let start = "([the recording starts here])|T05thread:01;replaylog:begin;";
    assert_eq!(client.run("bc").0, start);
}

#[test]
fn leaving_the_recording_is_said_once_and_only_for_real_changes() {
    let mut machine = FakeMachine::timeline(PROGRAM);
    let mut client = Client::new(&mut machine, Mode::Timeline);
    assert_eq!(client.ask("P0=0000000000000000"), "OK", "as it was");
    assert_eq!(client.ask(&format!("M{CODE:x},1:90")), "OK", "as it was");
    assert!(!client.bridge.machine.branched());
    assert_eq!(client.run("vCont;s:1").0, "T05thread:01;");
    assert_eq!(client.ask("P0=0500000000000000"), "OK");
    assert_eq!(client.ask("P0=0600000000000000"), "OK");
    let (stop, _) = client.run("vCont;s:1");
    assert!(
        stop.starts_with("([this change has left the recording"),
        "{stop}"
    );
    assert_eq!(client.run("vCont;s:1").0, "T05thread:01;");
}

#[test]
fn a_machine_that_fails_is_not_resumed_again() {
    let mut machine = FakeMachine::new(FOREVER);
    machine.fail = Some("no more host memory".to_owned());
    let mut client = Client::new(&mut machine, Mode::Live);
    let why = "([the machine cannot go on: no more host memory])|T06thread:01;";
    assert_eq!(client.run("vCont;c").0, why);
    assert_eq!(client.run("vCont;s:1").0, why);
    assert_eq!(client.ask("p0"), "0000000000000000", "it can be looked at");
}

#[test]
fn going_back_is_refused_where_there_is_no_past() {
    let mut machine = FakeMachine::new(PROGRAM);
    let mut client = Client::new(&mut machine, Mode::Live);
    assert_eq!(client.ask("bc"), "");
    assert_eq!(client.ask("bs"), "");
}

#[test]
fn parting_is_told_apart() {
    let mut machine = FakeMachine::new(FOREVER);
    let mut bridge = Bridge::new(&mut machine, Mode::Live);
    for (said, expected, reply) in [
        (&b"D"[..], Farewell::Detached, "+$OK#9a"),
        (b"D;1", Farewell::Detached, "+$OK#9a"),
        (b"k", Farewell::Killed, "+"),
        (b"vKill;1", Farewell::Killed, "+$OK#9a"),
    ] {
        let mut session = Session::new(&mut bridge).expect("a session");
        assert_eq!(session.receive(&mut bridge, &packet(said)), Some(expected));
        assert_eq!(session.take_output(), reply.as_bytes());
    }
}

#[test]
fn a_bad_packet_is_answered_and_changes_nothing() {
    let mut machine = FakeMachine::new(FOREVER);
    let mut client = Client::new(&mut machine, Mode::Live);
    client.ask("qSupported:multiprocess+");
    for bad in [
        "Hx", "vCont;q", "vCont;t", "P0", "Z0,zz,1", "m", "G00", "T-1", "qRcmd,zz",
    ] {
        let reply = client.ask(bad);
        assert!(reply.starts_with('E') || reply.is_empty(), "{bad}: {reply}");
        assert!(!client.session.running(), "{bad}");
    }
    assert_eq!(client.ask(&"p".repeat(MAX_PACKET + 1)), "E07");
    assert_eq!(client.raw(b"$g#00"), "$E16#ac", "damaged");
    client.raw(&packet(b"vCont;c"));
    assert_eq!(client.raw(&packet(b"vCont;t")), "", "waits for a stop");
    assert!(client.session.running());
    assert_eq!(
        contents(&client.raw(b"\x03")),
        ["T02thread:p01.01;"],
        "still multiprocess"
    );
}

#[test]
fn damaged_packets_and_lost_replies_are_sent_again() {
    let mut machine = FakeMachine::new(PROGRAM);
    let mut bridge = Bridge::new(&mut machine, Mode::Live);
    let mut session = Session::new(&mut bridge).expect("a session");
    let mut say = |bytes: &[u8]| {
        session.receive(&mut bridge, bytes);
        String::from_utf8(session.take_output()).expect("text")
    };
    assert_eq!(say(b"$qqemu.PhyMemMode#00"), "-");
    let asked = packet(b"qqemu.PhyMemMode");
    assert_eq!(say(&asked), "+$0#30");
    assert_eq!(say(b"-"), "$0#30");
    let threads = say(&packet(b"qfThreadInfo"));
    assert_eq!(threads, "+$m01#ce");
    assert_eq!(say(b"-"), threads[1..]);
}

#[test]
fn monitor_commands_tell_what_gdb_does_not() {
    let mut machine = FakeMachine::timeline(PROGRAM);
    let mut client = Client::new(&mut machine, Mode::Timeline);
    client.run("vCont;s:1");
    for (command, expected) in [
        ("help", "walk ADDRESS [CPU]"),
        ("when", "(1)|OK"),
        ("info", "a fake machine"),
        ("exits", "HLT"),
        ("events", "> #1"),
        ("console", "(first line\nlast words)|OK"),
        ("console 1", "(last words)|OK"),
        ("regs", "PG"),
        ("walk $rip", "physical 0x9001"),
        ("walk 0x1000", "not mapped"),
        ("walk", "which address"),
        ("regs 7x", "not a number"),
        ("reset", "not a command"),
    ] {
        let answer = monitor(&mut client, command);
        assert!(answer.contains(expected), "{command}: {answer}");
    }
    assert!(!client.bridge.machine.branched(), "they only look");
}

/// Packets as a client might garble them: real beginnings, hostile ends.
fn garbled() -> impl Strategy<Value = Vec<u8>> {
    const BEGINNINGS: &[&str] = &[
        "qSupported:",
        "?",
        "g",
        "G",
        "p",
        "P",
        "m",
        "M",
        "X",
        "Z0,",
        "z1,",
        "Z4,",
        "vCont;",
        "vCont?",
        "c",
        "s",
        "Hg",
        "Hc",
        "T",
        "D;x",
        "vKill",
        "bc",
        "bs",
        "qRcmd,",
        "qXfer:features:read:target.xml:",
        "qXfer:",
        "qfThreadInfo",
        "qsThreadInfo",
        "qThreadExtraInfo,",
        "QStartNoAckMode",
        "Qqemu.PhyMemMode:",
        "qAttached:",
        "vMustReplyEmpty",
        "\u{3}",
        "!",
        "R",
        "qC",
        "qOffsets",
    ];
    let ends = prop_oneof![
        "[0-9a-fx,;:=.p-]{0,40}",
        "(-1|0|1|p1.1|ffffffffffffffff|10000000000000000)(,|;|:|=)[0-9a-f]{0,20}",
        "\\PC{0,12}",
    ];
    (proptest::sample::select(BEGINNINGS), ends)
        .prop_map(|(beginning, end)| format!("{beginning}{end}").into_bytes())
}

proptest! {
    #[test]
    fn no_packet_panics_or_ends_the_session(bodies in prop::collection::vec(garbled(), 1..30)) {
        let mut machine = FakeMachine::timeline(FOREVER);
        let mut client = Client::new(&mut machine, Mode::Timeline);
        for body in bodies {
            // A detach or kill that is well formed may end it.
            if body.starts_with(b"D") || body.starts_with(b"vKill") || body == b"k" {
                continue;
            }
            client.session.receive(&mut client.bridge, &packet(&body));
            client.session.advance(&mut client.bridge, Duration::ZERO);
            client.session.take_output();
        }
        client.session.receive(&mut client.bridge, b"\x03");
        client.session.take_output();
        let threads = client.ask("qfThreadInfo");
        prop_assert!(["m01", "mp01.01"].contains(&threads.as_str()), "{}", threads);
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut machine = FakeMachine::new(PROGRAM);
        let mut client = Client::new(&mut machine, Mode::Live);
        client.session.receive(&mut client.bridge, &bytes);
        client.session.advance(&mut client.bridge, Duration::ZERO);
    }
}
