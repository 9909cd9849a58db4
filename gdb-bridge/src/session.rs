//! One client's session: its bytes in, our bytes out.
//!
//! Purpose: gdbstub's state machine, fed with whole packets, and around it what gdbstub leaves out: QEMU's physical-memory packets, an
//! answer to `vKill`, retransmission, and life after a packet it does not accept.
//! Invariants:
//! - No socket and no clock: [`Session::receive`] and [`Session::advance`] put what is to be sent into a buffer.
//! - Any bytes are taken. A packet that gdbstub gives up on is answered with an error number, and a new state machine goes on from
//!   where the old one was ([`Session::recover`]).
//! - A reading of memory is cut to what one reply holds before gdbstub sees it: it would otherwise read on behind a gap.
//!
//! Elsewhere: sockets and time (`server.rs`), the machine (`bridge.rs`).
//! Source: "Debugging with gdb", E.2 and E.4; QEMU's docs/system/gdb.rst (`qqemu.PhyMemMode`).

use crate::bridge::{Bridge, errno};
use crate::framing::{Framer, Item, MAX_PACKET, console_packets, packet};
use crate::resume::Action;
use crate::stops::StopReason;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub};
use std::cell::RefCell;
use std::convert::Infallible;
use std::rc::Rc;
use std::time::Duration;

type Machine<'m> = GdbStubStateMachine<'static, Bridge<'m>, Outgoing>;

/// How a session ended by what was said in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Farewell {
    /// gdb detached.
    Detached,
    /// gdb killed the machine.
    Killed,
    /// The guest's exit was reported.
    Exited,
}

/// The longest memory reading one reply holds, in bytes.
const MAX_READ: usize = MAX_PACKET / 2 - 16;

/// Where gdbstub writes.
#[derive(Clone, Default)]
struct Outgoing(Rc<RefCell<Vec<u8>>>);

impl Connection for Outgoing {
    type Error = Infallible;

    fn write(&mut self, byte: u8) -> Result<(), Infallible> {
        self.0.borrow_mut().push(byte);
        Ok(())
    }

    fn write_all(&mut self, bytes: &[u8]) -> Result<(), Infallible> {
        self.0.borrow_mut().extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// One client's session.
pub(crate) struct Session<'m> {
    /// `None` once the session has ended, and within a call.
    machine: Option<Machine<'m>>,
    out: Outgoing,
    framer: Framer,
    acknowledges: bool,
    /// The last reply, for a client that asks for it again.
    reply: Vec<u8>,
    /// The packets that made gdbstub's state machine what it is: of each kind the last.
    context: Vec<(&'static [u8], Vec<u8>)>,
}

/// Kinds of packets that gdbstub remembers something of.
const REMEMBERED: [&[u8]; 4] = [b"qSupported", b"QStartNoAckMode", b"Hg", b"Hc"];

impl<'m> Session<'m> {
    /// A session about to hear from its client; `None` if gdbstub refuses its own settings, which it does not.
    pub(crate) fn new(bridge: &mut Bridge<'m>) -> Option<Self> {
        let out = Outgoing::default();
        let machine = Some(start(&out, bridge)?);
        Some(Self {
            machine,
            out,
            framer: Framer::new(),
            acknowledges: true,
            reply: Vec::new(),
            context: Vec::new(),
        })
    }

    /// The client waits for the machine to stop.
    pub(crate) fn running(&self) -> bool {
        matches!(self.machine, Some(GdbStubStateMachine::Running(_)))
    }

    /// What is to be sent, which is forgotten.
    pub(crate) fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut *self.out.0.borrow_mut())
    }

    /// Takes bytes from the client.
    pub(crate) fn receive(&mut self, bridge: &mut Bridge<'m>, bytes: &[u8]) -> Option<Farewell> {
        for byte in bytes {
            let Some(item) = self.framer.push(*byte) else {
                continue;
            };
            if let Some(farewell) = self.item(bridge, item) {
                return Some(farewell);
            }
        }
        None
    }

    /// Lets the machine run for about `slice`, and tells the client if it stopped.
    pub(crate) fn advance(&mut self, bridge: &mut Bridge<'m>, slice: Duration) -> Option<Farewell> {
        if !self.running() {
            return None;
        }
        let reason = bridge.advance(slice)?;
        self.report(bridge, reason)
    }

    fn item(&mut self, bridge: &mut Bridge<'m>, item: Item) -> Option<Farewell> {
        match item {
            Item::Ack => None,
            Item::Nack => {
                if self.acknowledges {
                    let reply = self.reply.clone();
                    self.send(&reply);
                }
                None
            }
            // One that comes when the machine has stopped already has been overtaken by the stop.
            Item::Interrupt if self.running() => {
                let reason = bridge.interrupted();
                self.report(bridge, reason)
            }
            Item::Interrupt => None,
            Item::Damaged if self.acknowledges => {
                self.send(b"-");
                None
            }
            Item::Damaged => self.answer(&error(errno::EINVAL)),
            Item::TooLong => {
                self.acknowledge();
                self.answer(&error(errno::E2BIG))
            }
            Item::Packet(body) => self.packet(bridge, body),
        }
    }

    fn packet(&mut self, bridge: &mut Bridge<'m>, body: Vec<u8>) -> Option<Farewell> {
        let own = match body.as_slice() {
            b"qqemu.PhyMemMode" => Some(if bridge.physical {
                b"1".to_vec()
            } else {
                b"0".to_vec()
            }),
            b"Qqemu.PhyMemMode:0" | b"Qqemu.PhyMemMode:1" => {
                bridge.physical = body.ends_with(b"1");
                Some(b"OK".to_vec())
            }
            body if body.starts_with(b"Qqemu.PhyMemMode") => Some(error(errno::EINVAL)),
            body if body.starts_with(b"vKill;") => Some(b"OK".to_vec()),
            _ => None,
        };
        if let Some(reply) = own {
            self.acknowledge();
            self.answer(&reply);
            return body.starts_with(b"vKill;").then_some(Farewell::Killed);
        }
        self.remember(&body);
        let was_running = self.running();
        let before = self.out.0.borrow().len();
        let body = shortened_read(&body).unwrap_or(body);
        match self.feed(bridge, &packet(&body)) {
            Ok(farewell) => {
                self.keep_reply(before);
                if body == b"QStartNoAckMode" {
                    self.acknowledges = false;
                }
                if self.running() && !was_running {
                    self.tell_notes(bridge);
                }
                farewell
            }
            Err(Broken) => {
                self.out.0.borrow_mut().truncate(before);
                self.recover(bridge, was_running);
                self.acknowledge();
                // A client that waits for a stop gets no answer but that.
                if was_running {
                    None
                } else {
                    self.answer(&error(errno::EINVAL))
                }
            }
        }
    }

    /// Gives gdbstub bytes.
    fn feed(&mut self, bridge: &mut Bridge<'m>, bytes: &[u8]) -> Result<Option<Farewell>, Broken> {
        for byte in bytes {
            let next = match self.machine.take() {
                Some(GdbStubStateMachine::Idle(idle)) => idle.incoming_data(bridge, *byte),
                Some(GdbStubStateMachine::Running(running)) => running.incoming_data(bridge, *byte),
                Some(GdbStubStateMachine::CtrlCInterrupt(interrupt)) => {
                    interrupt.interrupt_handled(bridge, None::<StopReason>)
                }
                Some(GdbStubStateMachine::Disconnected(gone)) => {
                    return Ok(Some(farewell(gone.get_reason())));
                }
                None => return Ok(None),
            };
            self.machine = Some(next.map_err(|_| Broken)?);
        }
        Ok(match &self.machine {
            Some(GdbStubStateMachine::Disconnected(gone)) => Some(farewell(gone.get_reason())),
            _ => None,
        })
    }

    /// Tells a waiting client why the machine stopped.
    fn report(&mut self, bridge: &mut Bridge<'m>, reason: StopReason) -> Option<Farewell> {
        self.tell_notes(bridge);
        let before = self.out.0.borrow().len();
        let next = match self.machine.take() {
            Some(GdbStubStateMachine::Running(running)) => running.report_stop(bridge, reason),
            other => {
                self.machine = other;
                return None;
            }
        };
        match next {
            Ok(machine) => {
                let farewell = match &machine {
                    GdbStubStateMachine::Disconnected(gone) => Some(farewell(gone.get_reason())),
                    _ => None,
                };
                self.machine = Some(machine);
                self.keep_reply(before);
                farewell
            }
            Err(_) => {
                self.out.0.borrow_mut().truncate(before);
                self.recover(bridge, false);
                self.answer(b"S05")
            }
        }
    }

    /// Shows a waiting client what it is to know.
    fn tell_notes(&mut self, bridge: &mut Bridge<'m>) {
        for note in bridge.notes.drain(..) {
            self.send(&console_packets(&format!("[{note}]\n")));
        }
    }

    /// Puts a new state machine where the broken one was.
    fn recover(&mut self, bridge: &mut Bridge<'m>, running: bool) {
        let action = std::mem::replace(&mut bridge.action, Action::Continue);
        let kept = self.take_output();
        self.machine = start(&self.out, bridge);
        let mut script: Vec<_> = self.context.iter().map(|(_, body)| body.clone()).collect();
        if running {
            script.push(b"vCont;c".to_vec());
        }
        for body in script {
            // These were accepted before.
            if self.feed(bridge, &packet(&body)).is_err() {
                self.machine = start(&self.out, bridge);
            }
        }
        *self.out.0.borrow_mut() = kept;
        bridge.action = action;
    }

    /// Keeps `body` for [`Session::recover`] if gdbstub remembers something of it.
    fn remember(&mut self, body: &[u8]) {
        let Some(kind) = REMEMBERED.into_iter().find(|kind| body.starts_with(kind)) else {
            return;
        };
        self.context.retain(|(of, _)| *of != kind);
        self.context.push((kind, body.to_vec()));
    }

    fn acknowledge(&mut self) {
        if self.acknowledges {
            self.send(b"+");
        }
    }

    /// Sends a reply of our own; never a farewell, but fits where one may be.
    fn answer(&mut self, body: &[u8]) -> Option<Farewell> {
        let before = self.out.0.borrow().len();
        self.send(&packet(body));
        self.keep_reply(before);
        None
    }

    fn send(&mut self, bytes: &[u8]) {
        self.out.0.borrow_mut().extend_from_slice(bytes);
    }

    /// Keeps what was sent from `before` on, to be sent again if the client asks.
    fn keep_reply(&mut self, before: usize) {
        let out = self.out.0.borrow();
        let sent = out.get(before..).unwrap_or_default();
        self.reply = sent.strip_prefix(b"+").unwrap_or(sent).to_vec();
    }
}

/// gdbstub gave up on a packet.
struct Broken;

fn start<'m>(out: &Outgoing, bridge: &mut Bridge<'m>) -> Option<Machine<'m>> {
    let stub = GdbStub::builder(out.clone())
        .packet_buffer_size(MAX_PACKET)
        .build()
        .ok()?;
    stub.run_state_machine(bridge).ok()
}

fn farewell(reason: DisconnectReason) -> Farewell {
    match reason {
        DisconnectReason::Disconnect => Farewell::Detached,
        DisconnectReason::Kill => Farewell::Killed,
        DisconnectReason::TargetExited(_) | DisconnectReason::TargetTerminated(_) => {
            Farewell::Exited
        }
    }
}

fn error(number: u8) -> Vec<u8> {
    format!("E{number:02x}").into_bytes()
}

/// `m ADDR,LEN` with the length cut to [`MAX_READ`]; `None` if it need not be.
fn shortened_read(body: &[u8]) -> Option<Vec<u8>> {
    let (addr, len) = std::str::from_utf8(body.strip_prefix(b"m")?)
        .ok()?
        .split_once(',')?;
    let fits = usize::from_str_radix(len, 16).is_ok_and(|len| len <= MAX_READ);
    (!fits).then(|| format!("m{addr},{MAX_READ:x}").into_bytes())
}

#[cfg(test)]
mod tests;
