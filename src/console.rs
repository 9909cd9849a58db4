//! The guest's console on this process's standard streams.
//!
//! Purpose: output goes to standard output; what is typed there goes to the guest's serial port.
//! Invariants: standard input is read only if it is a terminal, or if `--input` names where to read: a run in a script does not swallow the script's
//! own input.

use crate::failure::{Doing, Failure};
use machine::host_environment::InputHandle;
use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::Path;

/// Where the guest's output goes.
pub fn output() -> Box<dyn Write + Send> {
    Box::new(std::io::stdout())
}

/// Starts typing at the guest: from `source` (`-` is standard input), else from the terminal if there is one.
pub fn connect_input(source: Option<&Path>, guest: InputHandle) -> Result<(), Failure> {
    let from: Box<dyn Read + Send> = match source {
        Some(path) if path != Path::new("-") => {
            Box::new(File::open(path).doing(|| format!("cannot read {}", path.display()))?)
        }
        Some(_) => Box::new(std::io::stdin()),
        None if std::io::stdin().is_terminal() => Box::new(std::io::stdin()),
        None => return Ok(()),
    };
    // It ends with its input or with the process; a thread blocked in read(2) cannot be joined.
    std::thread::spawn(move || type_all(from, &guest));
    Ok(())
}

fn type_all(mut from: Box<dyn Read + Send>, guest: &InputHandle) {
    let mut bytes = [0; 4096];
    loop {
        match from.read(&mut bytes) {
            Ok(0) => return,
            Ok(len) => {
                if guest.push(&bytes[..len]).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => {
                eprintln!("chronovisor: no more input for the guest: {error}");
                return;
            }
        }
    }
}
