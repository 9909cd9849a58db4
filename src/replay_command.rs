//! `chronovisor replay`: a recording, executed again.

use crate::arguments::{Place, ReplayArguments};
use crate::failure::{Doing, FAILED, Failure};
use crate::progress::Progress;
use crate::trace_command::INCOMPLETE_NOTE;
use crate::{engines, failure, gdb, statistics};
use introspect::exits::grouped;
use machine::debuggable::{Debuggable, Stop};
use replay::timeline::{Outcome, Report, Timeline};
use std::io::Write;
use std::path::Path;
use std::time::Duration;
use x86::Position;

/// How long a replay runs between two looks at what it printed.
const SLICE: Duration = Duration::from_millis(50);

/// Runs the command.
pub fn run(arguments: &ReplayArguments) -> Result<u8, Failure> {
    let listener = gdb::bind(&arguments.gdb)?;
    let mut timeline = open(&arguments.file)?;
    let Some(listener) = listener else {
        return verify(arguments, &mut timeline);
    };
    go_to(
        &mut timeline,
        arguments.at.unwrap_or(Place::At(Position::START)),
    )?;
    let symbols = match timeline.images().first() {
        Some(image) if fixtures::by_name(&image.name).is_some() => format!("{}.elf", image.name),
        Some(image) => image.name.clone(),
        None => String::new(),
    };
    let status = gdb::serve_machine(
        &mut timeline,
        listener,
        gdb_bridge::Mode::Timeline,
        &symbols,
    )?;
    statistics::print(&arguments.stats, timeline.exits())?;
    Ok(status)
}

/// Opens a trace on the engine that counts.
pub fn open(file: &Path) -> Result<Timeline, Failure> {
    Ok(Timeline::open(file, &engines::soft)?)
}

/// Moves to a place that was asked for; the end, if that comes first.
pub fn go_to(timeline: &mut Timeline, place: Place) -> Result<(), Failure> {
    let target = match place {
        Place::At(position) => position,
        Place::End => Position::NEVER,
    };
    let mut progress = Progress::new("going there");
    loop {
        let stop = timeline.seek(target, SLICE)?;
        if stop != Stop::Slice {
            return Ok(());
        }
        let (passed, of) = timeline.progress();
        progress.show(passed, of);
    }
}

/// Replays to the end with the console going to `out`.
pub fn replay(timeline: &mut Timeline, out: &mut dyn Write) -> Result<Report, Failure> {
    let mut printed = 0;
    let mut progress = Progress::new("replaying");
    loop {
        let stop = timeline.seek(Position::NEVER, SLICE)?;
        let console = timeline.console();
        let doing = || "cannot print the guest's console".into();
        out.write_all(console.get(printed..).unwrap_or_default())
            .doing(doing)?;
        out.flush().doing(doing)?;
        printed = console.len();
        if stop != Stop::Slice {
            return Ok(timeline.report());
        }
        let (passed, of) = timeline.progress();
        progress.show(passed, of);
    }
}

fn verify(arguments: &ReplayArguments, timeline: &mut Timeline) -> Result<u8, Failure> {
    let report = if arguments.quiet {
        replay(timeline, &mut std::io::sink())
    } else {
        replay(timeline, &mut std::io::stdout().lock())
    }?;
    statistics::print(&arguments.stats, timeline.exits())?;
    let file = arguments.file.display();
    Ok(match &report.outcome {
        Outcome::Verified => {
            eprintln!("chronovisor: {}", summary(&report));
            report.end.map_or(0, machine::End::status)
        }
        Outcome::Incomplete { reason } => {
            let reason = reason.as_deref().unwrap_or(INCOMPLETE_NOTE);
            eprintln!(
                "chronovisor: {file}: {reason}\nchronovisor: up to there: {}",
                summary(&report)
            );
            failure::INCOMPLETE
        }
        Outcome::Diverged(divergence) => {
            eprintln!("chronovisor: error: {file}: {divergence}");
            FAILED
        }
        Outcome::Unfinished => {
            return Err(Failure::new(format!(
                "the replay of {file} stopped before its end"
            )));
        }
    })
}

/// What a replay verified, in one line.
pub fn summary(report: &Report) -> String {
    format!(
        "verified: {} instructions, {} exits, {} arrivals, {} digests, in {:.2?}",
        grouped(report.instructions),
        grouped(report.exits),
        grouped(report.arrivals),
        grouped(report.verified),
        report.duration
    )
}
