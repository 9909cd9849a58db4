//! `chronovisor run`: a guest, here and now.

use crate::arguments::RunArguments;
use crate::failure::Failure;
use crate::guest::{self, Guest};
use crate::interrupt::on_interrupt;
use crate::live::{self, Live};
use crate::{console, engines, gdb, statistics};
use machine::End;
use machine::debuggable::Debuggable;
use machine::engine::EngineKind;
use machine::live::LiveMachine;
use machine::session::Session;

/// Runs the command.
pub fn run(arguments: &RunArguments) -> Result<u8, Failure> {
    let guest = guest::find(&arguments.guest)?;
    let listener = gdb::bind(&arguments.gdb)?;
    let kind = engines::settle(arguments.guest.engine)?;
    match listener {
        Some(listener) => serve(arguments, &guest, kind, listener),
        None => run_to_end(arguments, &guest, kind),
    }
}

fn run_to_end(arguments: &RunArguments, guest: &Guest, kind: EngineKind) -> Result<u8, Failure> {
    let clock = live::clock(&arguments.guest, kind)?;
    let Live {
        memory,
        board,
        engine,
        environment,
    } = live::start(&guest.config, kind, clock, console::output())?;
    let stop = environment.stop_handle();
    let _signals = on_interrupt(move || stop.stop())?;
    console::connect_input(arguments.guest.input.as_deref(), environment.input_handle())?;
    let mut session = Session::new(memory, board, engine, Box::new(environment));
    let ran = session.run_to_end();
    let flushed = session.environment().flush();
    statistics::print(&arguments.stats, session.counts())?;
    let end = ran?;
    flushed?;
    say_end(end);
    Ok(end.status())
}

/// Says how a guest ended, unless it ended as guests do.
pub fn say_end(end: End) {
    if !matches!(end, End::DebugExit(_)) {
        eprintln!("chronovisor: the guest ended: {end}");
    }
}

fn serve(
    arguments: &RunArguments,
    guest: &Guest,
    kind: EngineKind,
    listener: gdb_bridge::Listener,
) -> Result<u8, Failure> {
    let clock = live::clock(&arguments.guest, kind)?;
    let Live {
        memory,
        board,
        engine,
        environment,
    } = live::start(&guest.config, kind, clock, console::output())?;
    console::connect_input(arguments.guest.input.as_deref(), environment.input_handle())?;
    let control = environment.run_control();
    let mut machine = LiveMachine::new(memory, board, engine, Box::new(environment), control);
    let symbols = gdb::symbols_of(&arguments.guest);
    let status = gdb::serve_machine(&mut machine, listener, gdb_bridge::Mode::Live, &symbols)?;
    statistics::print(&arguments.stats, machine.exits())?;
    Ok(status)
}
