//! Where gdb connects: a TCP port or a Unix socket.
//!
//! Purpose: parse what a user writes, bind it, and say what was bound.
//! Invariants: the protocol has no password, and whoever speaks it owns the guest. So TCP is bound to loopback addresses only
//! unless the caller allows others by name. A Unix socket's file is removed when the listener goes.
//! Elsewhere: accepting and serving (`server.rs`).

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// What a user asked to listen on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Address {
    /// `HOST:PORT`; port 0 lets the system choose.
    Tcp {
        /// A name or an address.
        host: String,
        /// The port.
        port: u16,
    },
    /// A path in the file system.
    Unix(PathBuf),
}

/// The port gdb users expect a machine at.
const DEFAULT_PORT: u16 = 1234;

impl Default for Address {
    /// 127.0.0.1:1234.
    fn default() -> Self {
        Self::Tcp {
            host: "127.0.0.1".to_owned(),
            port: DEFAULT_PORT,
        }
    }
}

/// Text that is not an address.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{0:?} is not an address to listen on; write PORT, HOST:PORT, or unix:PATH (a path with a slash will do)"
)]
pub struct ParseAddressError(String);

impl FromStr for Address {
    type Err = ParseAddressError;

    /// `1234`, `:1234`, `localhost:1234`, `[::1]:1234`, `/run/guest.sock`, `unix:guest.sock`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseAddressError(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() {
                Err(wrong())
            } else {
                Ok(Self::Unix(path.into()))
            };
        }
        if text.contains('/') {
            return Ok(Self::Unix(text.into()));
        }
        let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
        let port = port.parse().map_err(|_| wrong())?;
        let host = match host.strip_prefix('[') {
            Some(bracketed) => bracketed.strip_suffix(']').ok_or_else(wrong)?,
            None if host.contains(':') => return Err(wrong()),
            None => host,
        };
        let host = if host.is_empty() { "127.0.0.1" } else { host };
        Ok(Self::Tcp {
            host: host.to_owned(),
            port,
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// Why nothing could be bound.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Reachable from outside, and nobody allowed that.
    #[error(
        "{address} can be reached from other machines, and gdb's protocol has no password: whoever connects reads and \
         changes everything in the guest. Listen on 127.0.0.1, or allow it with --gdb-allow-remote"
    )]
    NotLoopback {
        /// What was asked for.
        address: SocketAddr,
    },
    /// The name has no address.
    #[error("cannot resolve {address}: {source}")]
    Resolve {
        /// What was asked for.
        address: String,
        /// The resolver's error.
        source: io::Error,
    },
    /// The system refused.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// What was asked for.
        address: String,
        /// The operating system's error.
        source: io::Error,
    },
    /// Something that is not a socket has that name.
    #[error("cannot listen on {0}: a file of that name exists and is not a socket")]
    NotASocket(PathBuf),
}

/// A bound address, not yet served.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: Address,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Binds `address`. Without `allow_remote`, only loopback addresses are bound.
    pub fn bind(address: &Address, allow_remote: bool) -> Result<Self, ListenError> {
        match address {
            Address::Tcp { host, port } => bind_tcp(host, *port, allow_remote),
            Address::Unix(path) => bind_unix(path),
        }
        .map_err(|error| match error {
            BindError::Listen(error) => error,
            BindError::Io(source) => ListenError::Bind {
                address: address.to_string(),
                source,
            },
        })
    }

    /// What is bound: with the port the system chose, where it was asked to.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Takes the next connection.
    pub(crate) fn accept(&self) -> io::Result<Connection> {
        let stream = match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
            Socket::Unix(listener) => Stream::Unix(listener.accept()?.0),
        };
        Connection::new(stream)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(listener) => listener.as_fd(),
            Socket::Unix(listener) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Address::Unix(path) = &self.address {
            // Gone already, or the folder is read-only by now: nothing to be done about either.
            let _ = std::fs::remove_file(path);
        }
    }
}

enum BindError {
    Listen(ListenError),
    Io(io::Error),
}

impl From<io::Error> for BindError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn bind_tcp(host: &str, port: u16, allow_remote: bool) -> Result<Listener, BindError> {
    let resolved: Vec<SocketAddr> = (host, port)
        .to_socket_addrs()
        .map_err(|source| {
            let address = format!("{host}:{port}");
            BindError::Listen(ListenError::Resolve { address, source })
        })?
        .collect();
    if !allow_remote && let Some(&address) = resolved.iter().find(|a| !a.ip().is_loopback()) {
        return Err(BindError::Listen(ListenError::NotLoopback { address }));
    }
    let listener = TcpListener::bind(&resolved[..])?;
    let bound = listener.local_addr()?;
    listener.set_nonblocking(true)?;
    Ok(Listener {
        socket: Socket::Tcp(listener),
        address: Address::Tcp {
            host: bound.ip().to_string(),
            port: bound.port(),
        },
    })
}

fn bind_unix(path: &Path) -> Result<Listener, BindError> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(BindError::Listen(ListenError::NotASocket(path.to_owned())));
        }
        // A socket nobody answers at is left from a process that was killed.
        Ok(_) if UnixStream::connect(path).is_err() => std::fs::remove_file(path)?,
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(Listener {
        socket: Socket::Unix(listener),
        address: Address::Unix(path.to_owned()),
    })
}

/// How long a client may leave what it is sent unread before it counts as gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// One client's connection.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: Stream,
}

impl Connection {
    fn new(stream: Stream) -> io::Result<Self> {
        match &stream {
            Stream::Tcp(stream) => {
                stream.set_nonblocking(false)?;
                stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
            }
            Stream::Unix(stream) => {
                stream.set_nonblocking(false)?;
                stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
            }
        }
        Ok(Self { stream })
    }

    /// Who it is, as far as the socket knows.
    pub(crate) fn peer(&self) -> String {
        match &self.stream {
            Stream::Tcp(stream) => stream
                .peer_addr()
                .map_or_else(|_| "a client".to_owned(), |a| a.to_string()),
            Stream::Unix(_) => "a client on the socket".to_owned(),
        }
    }

    /// Reads what is there; 0 at the end. Blocks if nothing is, so poll first.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.stream {
            Stream::Tcp(stream) => stream.read(buffer),
            Stream::Unix(stream) => stream.read(buffer),
        }
    }

    /// Sends all of `bytes`.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.stream {
            Stream::Tcp(stream) => stream.write_all(bytes),
            Stream::Unix(stream) => stream.write_all(bytes),
        }
    }

    /// Says that nothing more will be sent.
    pub(crate) fn finish(&mut self) {
        // It is being given up either way.
        let _ = match &self.stream {
            Stream::Tcp(stream) => stream.shutdown(std::net::Shutdown::Write),
            Stream::Unix(stream) => stream.shutdown(std::net::Shutdown::Write),
        };
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.stream {
            Stream::Tcp(stream) => stream.as_fd(),
            Stream::Unix(stream) => stream.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp {
            host: host.to_owned(),
            port,
        }
    }

    #[test]
    fn addresses_are_read_as_users_write_them() {
        for (text, expected) in [
            ("1234", tcp("127.0.0.1", 1234)),
            (":0", tcp("127.0.0.1", 0)),
            ("localhost:99", tcp("localhost", 99)),
            ("[::1]:7", tcp("::1", 7)),
            ("unix:guest.sock", Address::Unix("guest.sock".into())),
            ("./guest.sock", Address::Unix("./guest.sock".into())),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        for text in ["", "localhost", "a:b", ":65536", "unix:", "::1:7", "[::1:7"] {
            assert!(text.parse::<Address>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn addresses_print_as_they_are_read() {
        for text in ["127.0.0.1:1234", "[::1]:7", "./guest.sock"] {
            let address: Address = text.parse().expect("an address");
            assert_eq!(address.to_string(), text);
        }
    }

    #[test]
    fn only_loopback_is_bound_unless_more_is_allowed() {
        let error = Listener::bind(&tcp("0.0.0.0", 0), false).expect_err("refused");
        assert!(error.to_string().contains("--gdb-allow-remote"), "{error}");
        let listener = Listener::bind(&tcp("0.0.0.0", 0), true).expect("allowed");
        assert_ne!(
            listener.address(),
            &tcp("0.0.0.0", 0),
            "the chosen port is told"
        );
        Listener::bind(&tcp("127.0.0.1", 0), false).expect("loopback");
    }

    #[test]
    fn a_socket_left_behind_is_taken_over_and_one_in_use_is_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("guest.sock");
        let address = Address::Unix(path.clone());
        drop(UnixListener::bind(&path).expect("bind"));
        assert!(path.exists(), "std leaves the file behind");
        let listener = Listener::bind(&address, false).expect("taken over");
        assert!(matches!(
            Listener::bind(&address, false),
            Err(ListenError::Bind { .. })
        ));
        drop(listener);
        assert!(!path.exists(), "removed with the listener");
        let file = folder.path().join("notes");
        std::fs::write(&file, b"mine").expect("write");
        let error = Listener::bind(&Address::Unix(file), false).expect_err("not a socket");
        assert!(matches!(error, ListenError::NotASocket(_)));
    }
}
