//! `chronovisor record`: a run, with everything a replay needs in one file.

use crate::arguments::RecordArguments;
use crate::failure::{Doing, Failure};
use crate::guest::{self, Guest};
use crate::interrupt::on_interrupt;
use crate::live::{self, Live};
use crate::run::say_end;
use crate::{console, engines, statistics};
use introspect::exits::grouped;
use machine::engine::EngineKind;
use machine::exit_counts::ExitCounts;
use machine::host_environment::{Clock, InputHandle};
use machine::session::Session;
use replay::recorder::{RecordOptions, Recorder, finish};
use replay::trace::{EndRecord, Image, MachineRecord, TraceWriter};
use std::io::Write;
use std::path::Path;

/// Runs the command.
pub fn run(arguments: &RecordArguments) -> Result<u8, Failure> {
    let guest = guest::find(&arguments.guest)?;
    let kind = engines::settle(arguments.guest.engine)?;
    let clock = live::clock(&arguments.guest, kind)?;
    let recording = Recording {
        guest: &guest,
        kind,
        clock,
        output: &arguments.output,
    };
    let mut connected = Ok(());
    let (end, counts) = recording.make(arguments.force, console::output(), |input| {
        connected = console::connect_input(arguments.guest.input.as_deref(), input);
    })?;
    connected?;
    statistics::print(&arguments.stats, &counts)?;
    say_end(end.end);
    eprintln!(
        "chronovisor: recorded {} sync points and {} arrivals in {}",
        grouped(end.after.0),
        grouped(end.totals.arrivals),
        arguments.output.display()
    );
    Ok(end.end.status())
}

/// A recording to be made.
pub struct Recording<'a> {
    /// Of what.
    pub guest: &'a Guest,
    /// On which engine.
    pub kind: EngineKind,
    /// With which clock.
    pub clock: Clock,
    /// Into which file.
    pub output: &'a Path,
}

impl Recording<'_> {
    /// Makes it. `input` is given the handle that types at the guest before the guest starts.
    pub fn make(
        &self,
        force: bool,
        sink: Box<dyn Write + Send>,
        input: impl FnOnce(InputHandle),
    ) -> Result<(EndRecord, ExitCounts), Failure> {
        let config = &self.guest.config;
        let Live {
            memory,
            board,
            engine,
            environment,
        } = live::start(config, self.kind, self.clock, sink)?;
        let record = MachineRecord::of(config, self.kind);
        let trace = TraceWriter::create(self.output, force, &record, &self.images())?;
        let stop = environment.stop_handle();
        let _signals = on_interrupt(move || stop.stop())?;
        input(environment.input_handle());
        let recorder = Recorder::new(environment, trace, RecordOptions::default());
        let mut session = Session::new(memory, board, engine, Box::new(recorder));
        session
            .run_to_end()
            .doing(|| format!("the recording {} stops here", self.output.display()))?;
        let end = finish(&mut session)?;
        session.environment().inner().flush()?;
        Ok((end, session.counts().clone()))
    }

    fn images(&self) -> [Image; 1] {
        [Image {
            name: self.guest.name.clone(),
            bytes: self.guest.config.kernel.clone(),
        }]
    }
}
