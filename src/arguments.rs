//! The command line, as data.
//!
//! Purpose: every command, option and help text in one place, for parsing, completions and man pages alike.
//! Invariants: nothing is done here; values are checked as far as their text allows.
//! Elsewhere: what each command does (the module of its name).

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use x86::Position;

/// Record whole virtual machines, replay them instruction for instruction, and look at any moment.
///
/// Try `chronovisor demo` first: it records a small kernel until a race crashes it, then replays the crash.
#[derive(Parser, Debug)]
#[command(
    name = "chronovisor",
    version,
    max_term_width = 110,
    propagate_version = true
)]
#[command(
    after_help = "Exit status: what the guest wrote to its debug-exit port (0xf4); 124 for a triple fault, \
    123 for a reset, 126 for a trace whose end is missing or damaged, 125 for an error of chronovisor's own, 2 for wrong arguments."
)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run a guest, with its console here.
    Run(RunArguments),
    /// Run a guest and write everything a replay needs into one trace file.
    Record(RecordArguments),
    /// Replay a trace, verifying it; or stand in it with gdb.
    Replay(ReplayArguments),
    /// Open a trace in the terminal UI.
    Debug(DebugArguments),
    /// Look into a trace file.
    #[command(subcommand)]
    Trace(TraceCommand),
    /// Record a crash, replay it twice, and show what to type next.
    Demo(DemoArguments),
    /// The guests that come with chronovisor.
    #[command(subcommand)]
    Fixtures(FixturesCommand),
    /// Print a completion script for your shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

/// What to run, and on what.
#[derive(Args, Debug)]
pub struct GuestArguments {
    /// A guest that comes with chronovisor (see `chronovisor fixtures list`).
    #[arg(
        value_name = "FIXTURE",
        required_unless_present = "kernel",
        conflicts_with = "kernel"
    )]
    pub fixture: Option<String>,
    /// A kernel of your own: ELF, entered by its PVH note, or in long mode (ELF64) or protected mode (ELF32).
    #[arg(long, value_name = "ELF")]
    pub kernel: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub cmdline: String,
    /// Guest memory, such as 64M or 1G.
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = parse_size)]
    pub memory: u64,
    /// What executes the guest's instructions. `auto` takes KVM where it is usable and says so where it is not.
    #[arg(long, value_enum, default_value_t = EngineChoice::Auto)]
    pub engine: EngineChoice,
    /// Where the guest's time comes from. By default the host's clock on KVM, and executed instructions on the software engine.
    #[arg(long, value_enum)]
    pub clock: Option<ClockChoice>,
    /// Type this file at the guest's serial port (`-` for standard input). Without it, what is typed at the terminal.
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum ClockChoice {
    /// The host's monotonic clock.
    Host,
    /// Executed instructions; an idle guest skips to its next timer. The same on every run.
    Instructions,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum EngineChoice {
    /// KVM where it is usable, the software engine elsewhere.
    Auto,
    /// KVM: fast; sees only what exits.
    Kvm,
    /// Software: counts every instruction; needs no /dev/kvm.
    Soft,
}

#[derive(Args, Debug)]
pub struct RunArguments {
    #[command(flatten)]
    pub guest: GuestArguments,
    #[command(flatten)]
    pub stats: StatsArguments,
    #[command(flatten)]
    pub gdb: GdbArguments,
}

#[derive(Args, Debug)]
pub struct StatsArguments {
    /// Print exit statistics at the end (on standard error).
    #[arg(long)]
    pub stats: bool,
    /// Print them as JSON.
    #[arg(long, requires = "stats")]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct GdbArguments {
    /// Stay stopped and wait for gdb at this address: HOST:PORT, a port, or unix:PATH [without one: 127.0.0.1:1234].
    #[arg(long, value_name = "ADDR", num_args = 0..=1, default_missing_value = "127.0.0.1:1234")]
    pub gdb: Option<String>,
    /// Let --gdb listen on an address other machines can reach. Whoever connects controls the guest.
    #[arg(long, requires = "gdb")]
    pub gdb_allow_remote: bool,
}

#[derive(Args, Debug)]
pub struct RecordArguments {
    #[command(flatten)]
    pub guest: GuestArguments,
    /// Where to write the trace.
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// Overwrite the file if it exists.
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub stats: StatsArguments,
}

#[derive(Args, Debug)]
pub struct ReplayArguments {
    /// The trace.
    pub file: PathBuf,
    #[command(flatten)]
    pub stats: StatsArguments,
    /// Do not print the guest's console.
    #[arg(short, long)]
    pub quiet: bool,
    /// Stand at this position when gdb attaches: a count of retired instructions, or `end`.
    #[arg(long, value_name = "POSITION", requires = "gdb", value_parser = parse_place)]
    pub at: Option<Place>,
    #[command(flatten)]
    pub gdb: GdbArguments,
}

#[derive(Args, Debug)]
pub struct DebugArguments {
    /// The trace.
    pub file: PathBuf,
    /// Where to stand at first: a count of retired instructions, or `end`.
    #[arg(long, value_name = "POSITION", default_value = "0", value_parser = parse_place)]
    pub at: Place,
    /// An ELF file with symbols, instead of the one in the trace.
    #[arg(long, value_name = "ELF")]
    pub symbols: Option<PathBuf>,
    /// Print one screen of this size as text and end, without a terminal.
    #[arg(long, value_name = "COLUMNSxROWS", value_parser = parse_screen)]
    pub once: Option<(u16, u16)>,
}

#[derive(Subcommand, Debug)]
pub enum TraceCommand {
    /// What was recorded: guest, machine, length, how it ended.
    Info {
        /// The trace.
        file: PathBuf,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Read the whole file and verify every checksum (without replaying it).
    Check {
        /// The trace.
        file: PathBuf,
    },
    /// List the recorded events.
    Dump {
        /// The trace.
        file: PathBuf,
        /// One JSON object per line.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args, Debug)]
pub struct DemoArguments {
    /// Keep the trace here.
    #[arg(short, long, value_name = "FILE", default_value = "crash.cvt")]
    pub output: PathBuf,
    /// What executes the guest's instructions.
    #[arg(long, value_enum, default_value_t = EngineChoice::Auto)]
    pub engine: EngineChoice,
}

#[derive(Subcommand, Debug)]
pub enum FixturesCommand {
    /// Name them.
    List {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Write a guest's ELF file (with symbols), for gdb to read.
    Extract {
        /// Which one.
        name: String,
        /// Where to.
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
}

/// A place on a timeline, as typed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    At(Position),
    End,
}

fn parse_place(text: &str) -> Result<Place, String> {
    match text {
        "end" => Ok(Place::End),
        text => text
            .parse()
            .map(Place::At)
            .map_err(|e: x86::ParsePositionError| e.to_string()),
    }
}

fn parse_screen(text: &str) -> Result<(u16, u16), String> {
    let wrong = || format!("{text:?} is not a size; write COLUMNSxROWS, such as 120x40");
    let (columns, rows) = text.split_once('x').ok_or_else(wrong)?;
    match (columns.parse(), rows.parse()) {
        (Ok(columns @ 20..=1000), Ok(rows @ 5..=1000)) => Ok((columns, rows)),
        _ => Err(wrong()),
    }
}

fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1u64 << 30,
        _ => {
            return Err(format!(
                "{text:?} is not a size; write bytes, or a number with K, M or G"
            ));
        }
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(unit))
        .ok_or_else(|| format!("{text:?} is not a size; write bytes, or a number with K, M or G"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definitions_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn sizes_take_binary_units() {
        assert_eq!(parse_size("64M"), Ok(64 << 20));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        for wrong in [
            "",
            "M",
            "12X",
            "-1",
            "99999999999999999999",
            "18446744073709551615G",
        ] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn places_are_positions_or_the_end() {
        assert_eq!(parse_place("end"), Ok(Place::End));
        assert_eq!(parse_place("12_000"), Ok(Place::At(Position::at(12_000))));
        assert!(parse_place("soon").is_err());
    }

    #[test]
    fn a_guest_is_a_fixture_or_a_kernel_but_not_both() {
        let parse = |words: &[&str]| Arguments::try_parse_from(words);
        assert!(parse(&["chronovisor", "run"]).is_err());
        assert!(parse(&["chronovisor", "run", "hello", "--kernel", "vmlinux"]).is_err());
        assert!(parse(&["chronovisor", "run", "hello"]).is_ok());
        assert!(parse(&["chronovisor", "run", "--kernel", "vmlinux"]).is_ok());
    }
}
