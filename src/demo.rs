//! `chronovisor demo`: the main job from end to end, on a guest that crashes by chance.
//!
//! Records the fixture `crash` until its race hits, replays the trace twice, compares the two, and says what to type next.

use crate::arguments::DemoArguments;
use crate::engines;
use crate::failure::{Doing, Failure};
use crate::fixtures_command::by_name;
use crate::guest::{Guest, fixture_config};
use crate::record::Recording;
use crate::replay_command::{open, replay, summary};
use introspect::exits::grouped;
use machine::End;
use machine::engine::EngineKind;
use machine::host_environment::Clock;
use replay::timeline::{Outcome, Report};
use replay::trace::EndRecord;
use std::io::Write;
use std::path::Path;

/// The guest that crashes by chance, and what it writes to its debug-exit port when it has.
const GUEST: &str = "crash";
const PANICKED: End = End::DebugExit(1);

/// Recordings made before the demo gives up. The race hits about every other time.
const ATTEMPTS: usize = 50;

/// Lines of the guest's console shown as its last words.
const LAST_WORDS: usize = 24;

/// Runs the command.
pub fn run(arguments: &DemoArguments) -> Result<u8, Failure> {
    let mut out = std::io::stdout().lock();
    let kind = engines::settle(arguments.engine)?;
    let guest = Guest {
        name: GUEST.to_owned(),
        config: fixture_config(by_name(GUEST)?.elf.to_vec()),
    };
    record_until_it_panics(&guest, kind, &arguments.output, &mut out)?;
    let console = replay_twice(&arguments.output, &mut out)?;
    writeln!(out, "\n3. The guest's last words:\n")?;
    let console = String::from_utf8_lossy(&console);
    let lines: Vec<_> = console.lines().collect();
    for line in lines.iter().skip(lines.len().saturating_sub(LAST_WORDS)) {
        writeln!(out, "   | {line}")?;
    }
    what_next(arguments, &mut out)?;
    out.flush()?;
    Ok(0)
}

fn record_until_it_panics(
    guest: &Guest,
    kind: EngineKind,
    output: &Path,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    writeln!(
        out,
        "1. Recording `{GUEST}` on {}: a small kernel whose timer interrupt races with its main loop.\n\
         \x20  Whether it panics, and when, depends on interrupt timing alone.",
        kind.name()
    )?;
    // The host's clock on either engine: on the instruction clock every attempt would be the same.
    let recording = Recording {
        guest,
        kind,
        clock: Clock::Host,
        output,
    };
    for attempt in 1..=ATTEMPTS {
        let (end, _) = recording.make(true, Box::new(std::io::sink()), |_| {})?;
        let outcome = match end.end {
            PANICKED => "it panicked",
            End::Stopped => return Err(Failure::new("stopped; the demo was not finished")),
            _ => "it survived",
        };
        writeln!(out, "   attempt {attempt}: {}, {outcome}", length(&end))?;
        out.flush()?;
        if end.end == PANICKED {
            let size = std::fs::metadata(output)
                .doing(|| format!("cannot read {}", output.display()))?
                .len();
            writeln!(
                out,
                "   The trace is {}: {} bytes, the kernel included.",
                output.display(),
                grouped(size)
            )?;
            return Ok(());
        }
    }
    Err(Failure::new(format!(
        "`{GUEST}` survived {ATTEMPTS} recordings; run the demo again, or with --engine soft"
    )))
}

fn length(end: &EndRecord) -> String {
    format!(
        "{:.3} s, {} exits",
        end.totals.host_nanos as f64 / 1e9,
        grouped(end.totals.exits)
    )
}

/// Replays the trace twice, wants both verified and equal, and gives back the console.
fn replay_twice(file: &Path, out: &mut dyn Write) -> Result<Vec<u8>, Failure> {
    writeln!(
        out,
        "\n2. Replaying it twice on soft, instruction for instruction."
    )?;
    let mut runs = Vec::new();
    for name in ["first", "second"] {
        let mut console = Vec::new();
        let mut timeline = open(file)?;
        let report = replay(&mut timeline, &mut console)?;
        if let Outcome::Diverged(divergence) = &report.outcome {
            return Err(Failure::new(format!(
                "the {name} replay diverged: {divergence}"
            )));
        }
        writeln!(out, "   {name:<7} {}", summary(&report))?;
        out.flush()?;
        runs.push((report, console));
    }
    let [(first, console), (second, again)] = &runs[..] else {
        return Err(Failure::new("the demo made no two replays"));
    };
    if !same(first, second) || console != again {
        return Err(Failure::new(
            "the two replays differ, though both were verified",
        ));
    }
    writeln!(
        out,
        "   Identical: the same {} instructions, the same console, the same last state of CPU, memory and devices,\n\
         \x20  each compared with what was recorded.",
        grouped(first.instructions)
    )?;
    Ok(console.clone())
}

/// Whether two replays agree in everything but how long they took.
fn same(first: &Report, second: &Report) -> bool {
    let timeless = |report: &Report| Report {
        duration: std::time::Duration::ZERO,
        ..report.clone()
    };
    timeless(first) == timeless(second)
}

fn what_next(arguments: &DemoArguments, out: &mut dyn Write) -> Result<(), Failure> {
    let this = std::env::args()
        .next()
        .unwrap_or_else(|| "chronovisor".into());
    let file = arguments.output.display();
    let elf = arguments.output.with_extension("elf");
    let elf = elf.display();
    writeln!(
        out,
        "\n4. Type next:\n\n\
         \x20  {this} debug {file} --at end          # the terminal UI, standing at the panic; ? for help\n\
         \x20  {this} replay {file}                  # the whole run again, verified\n\
         \x20  {this} trace dump {file}              # when each timer interrupt arrived\n\n\
         \x20  {this} fixtures extract {GUEST} -o {elf}\n\
         \x20  {this} replay {file} --at end --gdb   # and in another terminal:\n\
         \x20  gdb {elf} -ex 'target remote :1234' -ex backtrace\n\n\
         \x20  {this} run timer --stats              # what made a guest exit, and what it cost"
    )?;
    Ok(())
}
