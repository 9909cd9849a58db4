//! `--stats`: exit statistics at the end of a run.

use crate::arguments::StatsArguments;
use crate::failure::{Doing, Failure};
use introspect::exits::ExitReport;
use machine::exit_counts::ExitCounts;
use std::io::Write;

/// Prints what was asked for on standard error, so that standard output holds the guest's console alone.
pub fn print(arguments: &StatsArguments, counts: &ExitCounts) -> Result<(), Failure> {
    if !arguments.stats {
        return Ok(());
    }
    let report = ExitReport::of(counts);
    let text = if arguments.json {
        serde_json::to_string_pretty(&report).doing(|| "cannot write statistics".into())?
    } else {
        report.to_string()
    };
    writeln!(std::io::stderr(), "{text}").doing(|| "cannot write statistics".into())
}
