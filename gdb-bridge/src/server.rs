//! The server: connections, and time for the machine between them.
//!
//! Purpose: [`serve`], the loop that gives a machine to one gdb after the other.
//! Invariants:
//! - One thread. With the machine stopped it sleeps in poll(2); with the machine running it polls between slices of
//!   [`SLICE`], so that Ctrl-C is answered within one.
//! - One client at a time; a second one is told why and closed, at once and whatever the first is doing.
//! - A connection that breaks leaves the machine stopped where it is, without its client's breakpoints.
//!
//! Elsewhere: what is said over a connection (`session.rs`).

use crate::bridge::Bridge;
use crate::framing::packet;
use crate::listen::{Connection, Listener};
use crate::session::{Farewell, Session};
use machine::End;
use machine::debuggable::Debuggable;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How long the machine runs between two looks at the connection.
const SLICE: Duration = Duration::from_millis(25);

/// How often a sleeping server looks at [`Options::stop`], in nanoseconds. A signal wakes it at once.
const STOP_CHECK: i64 = 250_000_000;

/// Refused clients whose connection is kept until they have read why.
const REFUSED_KEPT: usize = 8;

/// What kind of machine is served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// A running guest: `detach` lets it run on, and its end ends the session.
    Live,
    /// A recording: `detach` leaves it for the next client, and its end is a place like any other.
    Timeline,
}

/// What happened to the server, for the user to read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Notice {
    /// A client connected.
    Connected(String),
    /// A second client was turned away.
    Refused(String),
    /// The client detached; with [`Mode::Live`] the guest runs on.
    Detached,
    /// The connection broke; the machine is stopped.
    Lost,
}

impl std::fmt::Display for Notice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Connected(peer) => write!(f, "gdb connected from {peer}"),
            Self::Refused(peer) => write!(f, "refused {peer}: a gdb is connected already"),
            Self::Detached => f.write_str("gdb detached"),
            Self::Lost => f.write_str("the connection to gdb was lost; the machine is stopped"),
        }
    }
}

/// How to serve.
pub struct Options<'a> {
    /// What kind of machine it is.
    pub mode: Mode,
    /// Ends serving when it becomes true (from a signal handler, say).
    pub stop: Option<&'a AtomicBool>,
    /// Told of clients coming and going.
    pub notify: &'a mut dyn FnMut(Notice),
}

/// How serving ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// A client killed the machine.
    Killed,
    /// A live guest ended, and its client has heard so or has detached.
    Ended(End),
    /// [`Options::stop`] was set.
    Stopped,
}

/// Why serving could not go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The listening socket failed.
    #[error("cannot wait for gdb on {address}: {source}")]
    Listen {
        /// The address.
        address: String,
        /// The operating system's error.
        source: io::Error,
    },
    /// The machine failed while no client was connected.
    #[error("the machine cannot go on: {0}")]
    Machine(String),
    /// gdbstub could not be set up.
    #[error("cannot start a gdb session")]
    Session,
}

/// Serves `machine` to one gdb after the other. It is stopped until the first one lets it run.
pub fn serve(
    machine: &mut dyn Debuggable,
    listener: Listener,
    options: Options<'_>,
) -> Result<Outcome, ServeError> {
    let bridge = Bridge::new(machine, options.mode);
    Server {
        bridge,
        listener,
        options,
        refused: VecDeque::new(),
    }
    .run()
}

struct Server<'m, 'o> {
    bridge: Bridge<'m>,
    listener: Listener,
    options: Options<'o>,
    refused: VecDeque<Connection>,
}

/// How one client's connection ended.
enum Parted {
    Said(Farewell),
    Lost,
    Stopped,
}

/// What poll(2) saw.
#[derive(Clone, Copy, Default)]
struct Ready {
    listener: bool,
    client: bool,
}

impl Server<'_, '_> {
    fn run(mut self) -> Result<Outcome, ServeError> {
        let mut runs_alone = false;
        loop {
            let client = if runs_alone {
                self.run_alone()?
            } else {
                self.wait()?
            };
            let mut client = match client {
                Arrived::Client(client) => client,
                Arrived::Nobody(outcome) => return Ok(outcome),
            };
            (self.options.notify)(Notice::Connected(client.peer()));
            let parted = self.attend(&mut client)?;
            self.bridge.forget_client();
            runs_alone = false;
            match parted {
                Parted::Stopped => return Ok(Outcome::Stopped),
                Parted::Said(Farewell::Killed) => return Ok(Outcome::Killed),
                Parted::Said(Farewell::Detached) => {
                    (self.options.notify)(Notice::Detached);
                    runs_alone = self.bridge.mode == Mode::Live;
                }
                Parted::Lost => (self.options.notify)(Notice::Lost),
                Parted::Said(Farewell::Exited) => {
                    if let Some(end) = self.bridge.machine.end() {
                        return Ok(Outcome::Ended(end));
                    }
                }
            }
        }
    }

    /// Waits for a client with the machine stopped.
    fn wait(&mut self) -> Result<Arrived, ServeError> {
        loop {
            if self.stop_asked() {
                return Ok(Arrived::Nobody(Outcome::Stopped));
            }
            if self.poll(None, true)?.listener
                && let Some(client) = self.accept()?
            {
                return Ok(Arrived::Client(client));
            }
        }
    }

    /// Lets a live guest run without a client, until one comes or it ends.
    fn run_alone(&mut self) -> Result<Arrived, ServeError> {
        self.bridge.action = crate::resume::Action::Continue;
        loop {
            if let Some(why) = self.bridge.failed.take() {
                return Err(ServeError::Machine(why));
            }
            if let Some(end) = self.bridge.machine.end() {
                return Ok(Arrived::Nobody(Outcome::Ended(end)));
            }
            if self.stop_asked() {
                return Ok(Arrived::Nobody(Outcome::Stopped));
            }
            if self.poll(None, false)?.listener
                && let Some(client) = self.accept()?
            {
                return Ok(Arrived::Client(client));
            }
            // Without breakpoints nothing stops it but its end and its failure, which are seen above.
            self.bridge.advance(SLICE);
        }
    }

    /// Serves one client until it goes.
    fn attend(&mut self, client: &mut Connection) -> Result<Parted, ServeError> {
        let mut session = Session::new(&mut self.bridge).ok_or(ServeError::Session)?;
        let mut buffer = [0; 4096];
        loop {
            let farewell = session.advance(&mut self.bridge, SLICE);
            if let Some(parted) = parted(&mut session, client, farewell) {
                return Ok(parted);
            }
            if self.stop_asked() {
                return Ok(Parted::Stopped);
            }
            let ready = self.poll(Some(client), !session.running())?;
            if ready.listener {
                self.refuse()?;
            }
            if ready.client {
                let bytes = match client.read(&mut buffer) {
                    Ok(0) => return Ok(Parted::Lost),
                    Ok(len) => buffer.get(..len).unwrap_or_default(),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => return Ok(Parted::Lost),
                };
                let farewell = session.receive(&mut self.bridge, bytes);
                if let Some(parted) = parted(&mut session, client, farewell) {
                    return Ok(parted);
                }
            }
        }
    }

    fn accept(&self) -> Result<Option<Connection>, ServeError> {
        match self.listener.accept() {
            Ok(client) => Ok(Some(client)),
            // Whoever it was has gone again.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::Interrupted
                        | io::ErrorKind::ConnectionAborted
                ) =>
            {
                Ok(None)
            }
            Err(source) => Err(self.listen_error(source)),
        }
    }

    /// Turns a second client away. gdb shows the error packet as a warning, then that the connection was closed.
    fn refuse(&mut self) -> Result<(), ServeError> {
        let Some(mut second) = self.accept()? else {
            return Ok(());
        };
        (self.options.notify)(Notice::Refused(second.peer()));
        // It may be gone; then it need not be told.
        let _ = second.send(b"+").and_then(|()| {
            second.send(&packet(
                b"E.another gdb is connected to this machine already",
            ))
        });
        second.finish();
        // Closing with unread bytes would take away what was just sent.
        self.refused.push_back(second);
        if self.refused.len() > REFUSED_KEPT {
            self.refused.pop_front();
        }
        Ok(())
    }

    /// Looks at the sockets; sleeps until there is something to see, if `sleep`.
    fn poll(&self, client: Option<&Connection>, sleep: bool) -> Result<Ready, ServeError> {
        let mut fds = vec![PollFd::new(&self.listener, PollFlags::IN)];
        fds.extend(client.map(|client| PollFd::new(client, PollFlags::IN)));
        let nanoseconds = if sleep { STOP_CHECK } else { 0 };
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: nanoseconds,
        };
        let timeout = (!sleep || self.options.stop.is_some()).then_some(&timeout);
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Ready::default()),
            Err(error) => return Err(self.listen_error(error.into())),
        }
        let ready = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
        Ok(Ready {
            listener: ready(0),
            client: ready(1),
        })
    }

    fn stop_asked(&self) -> bool {
        self.options
            .stop
            .is_some_and(|stop| stop.load(Ordering::Relaxed))
    }

    fn listen_error(&self, source: io::Error) -> ServeError {
        ServeError::Listen {
            address: self.listener.address().to_string(),
            source,
        }
    }
}

/// Who came.
enum Arrived {
    Client(Connection),
    /// Nobody, and nobody will.
    Nobody(Outcome),
}

/// Sends what the session has to say; how the connection ended, if it did.
fn parted(
    session: &mut Session<'_>,
    client: &mut Connection,
    farewell: Option<Farewell>,
) -> Option<Parted> {
    let output = session.take_output();
    let sent = if output.is_empty() {
        Ok(())
    } else {
        client.send(&output)
    };
    match (farewell, sent) {
        (Some(farewell), _) => Some(Parted::Said(farewell)),
        (None, Err(_)) => Some(Parted::Lost),
        (None, Ok(())) => None,
    }
}
