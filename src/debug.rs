//! `chronovisor debug`: a recording in the terminal UI.

use crate::arguments::DebugArguments;
use crate::failure::{Doing, Failure};
use crate::replay_command::{go_to, open};
use introspect::symbols::Symbols;
use replay::timeline::Timeline;
use std::io::Write;
use tui::TuiError;

/// Runs the command.
pub fn run(arguments: &DebugArguments, out: &mut dyn Write) -> Result<u8, Failure> {
    let mut timeline = open(&arguments.file)?;
    let symbols = symbols(arguments, &timeline)?;
    go_to(&mut timeline, arguments.at)?;
    if let Some((columns, rows)) = arguments.once {
        let text = tui::render_text(&mut timeline, &symbols, columns, rows)?;
        out.write_all(text.as_bytes())?;
    } else {
        match tui::run(&mut timeline, &symbols, tui::Options::default()) {
            // The status of a process that a signal ended, as shells have it.
            Err(TuiError::Signal(number)) => {
                return Ok(u8::try_from(128 + number).unwrap_or(u8::MAX));
            }
            result => result?,
        }
    }
    Ok(0)
}

/// The symbols of the file named, else of the recorded kernel; none if that has none.
fn symbols(arguments: &DebugArguments, timeline: &Timeline) -> Result<Symbols, Failure> {
    if let Some(path) = &arguments.symbols {
        let doing = || format!("cannot read symbols from {}", path.display());
        let file = std::fs::read(path).doing(doing)?;
        return Symbols::from_elf(&file).doing(doing);
    }
    let Some(kernel) = timeline.images().first() else {
        return Ok(Symbols::default());
    };
    Ok(Symbols::from_elf(&kernel.bytes).unwrap_or_else(|error| {
        eprintln!("chronovisor: no symbols in {}: {error}", kernel.name);
        Symbols::default()
    }))
}
