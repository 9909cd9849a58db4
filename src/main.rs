//! The `chronovisor` command: parses arguments and calls the crates.
//!
//! Purpose: turn what was typed into calls, and what came back into text and an exit status. Nothing is decided here
//! about machines, traces or protocols.
//! Elsewhere: everything that does work (see ARCHITECTURE.md).

#![allow(unreachable_pub)] // A binary has no public interface; `pub` says what a module offers the others.

mod arguments;
mod console;
mod debug;
mod demo;
mod engines;
mod failure;
mod fixtures_command;
mod gdb;
mod guest;
mod interrupt;
mod live;
mod progress;
mod record;
mod replay_command;
mod run;
mod statistics;
mod trace_command;

use arguments::{Arguments, Command};
use clap::{CommandFactory, Parser};
use failure::{FAILED, Failure};
use std::io::{self, Write};
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match dispatch(&arguments.command) {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            failure.print();
            ExitCode::from(FAILED)
        }
    }
}

/// Runs one command; its exit status, or why it failed.
fn dispatch(command: &Command) -> Result<u8, Failure> {
    let mut out = io::stdout().lock();
    let status = match command {
        Command::Run(arguments) => {
            drop(out);
            return run::run(arguments);
        }
        Command::Record(arguments) => {
            drop(out);
            return record::run(arguments);
        }
        Command::Replay(arguments) => {
            drop(out);
            return replay_command::run(arguments);
        }
        Command::Debug(arguments) => debug::run(arguments, &mut out)?,
        Command::Trace(command) => trace_command::run(command, &mut out)?,
        Command::Demo(arguments) => {
            drop(out);
            return demo::run(arguments);
        }
        Command::Fixtures(command) => fixtures_command::run(command, &mut out)?,
        Command::Completions { shell } => completions(*shell, &mut out)?,
    };
    out.flush()?;
    Ok(status)
}

fn completions(shell: clap_complete::Shell, out: &mut dyn Write) -> Result<u8, Failure> {
    let mut script = Vec::new();
    let mut command = Arguments::command();
    clap_complete::generate(shell, &mut command, "chronovisor", &mut script);
    out.write_all(&script)?;
    Ok(0)
}
