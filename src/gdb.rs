//! `--gdb`: serve a machine to gdb.

use crate::arguments::{GdbArguments, GuestArguments};
use crate::failure::{Doing, Failure};
use crate::interrupt::on_interrupt;
use gdb_bridge::{Address, Listener, Mode, Options, Outcome, serve};
use machine::debuggable::Debuggable;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Binds the address that was asked for, before any guest is started.
pub fn bind(arguments: &GdbArguments) -> Result<Option<Listener>, Failure> {
    let Some(text) = &arguments.gdb else {
        return Ok(None);
    };
    let address: Address = text.parse()?;
    let listener = Listener::bind(&address, arguments.gdb_allow_remote)?;
    if arguments.gdb_allow_remote {
        eprintln!(
            "chronovisor: warning: whoever reaches {} controls the guest",
            listener.address()
        );
    }
    Ok(Some(listener))
}

/// What to name on gdb's command line so that it knows the guest's symbols.
pub fn symbols_of(guest: &GuestArguments) -> String {
    match (&guest.kernel, &guest.fixture) {
        (Some(path), _) => path.display().to_string(),
        (None, Some(name)) => format!("{name}.elf"),
        (None, None) => String::new(),
    }
}

/// Serves `machine` until gdb kills it, its guest ends, or a signal says so. `symbols` is what to load into gdb.
pub fn serve_machine(
    machine: &mut dyn Debuggable,
    listener: Listener,
    mode: Mode,
    symbols: &str,
) -> Result<u8, Failure> {
    let address = listener.address().to_string();
    eprintln!(
        "chronovisor: waiting for gdb; connect with:  gdb {symbols} -ex 'target remote {address}'"
    );
    let stop = Arc::new(AtomicBool::new(false));
    let signalled = Arc::clone(&stop);
    let _signals = on_interrupt(move || signalled.store(true, Ordering::Relaxed))?;
    let mut notify = |notice| eprintln!("chronovisor: {notice}");
    let options = Options {
        mode,
        stop: Some(&stop),
        notify: &mut notify,
    };
    let outcome =
        serve(machine, listener, options).doing(|| format!("serving gdb on {address}"))?;
    Ok(match outcome {
        Outcome::Ended(end) => end.status(),
        Outcome::Killed | Outcome::Stopped => 0,
    })
}
