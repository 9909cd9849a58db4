//! `chronovisor trace`: look into a trace file.

use crate::arguments::TraceCommand;
use crate::failure::{Doing, Failure, INCOMPLETE};
use introspect::exits::grouped;
use replay::trace::{Info, Trace, check, dump, info};
use serde_json::Value;
use std::io::Write;
use std::path::Path;

/// What is said of a trace that ends without an end.
pub const INCOMPLETE_NOTE: &str = "the recording was cut short; what there is of it is intact";

/// Runs the command.
pub fn run(command: &TraceCommand, out: &mut dyn Write) -> Result<u8, Failure> {
    match command {
        TraceCommand::Info { file, json } => print_info(file, *json, out),
        TraceCommand::Check { file } => print_check(file, out),
        TraceCommand::Dump { file, json } => print_dump(file, *json, out),
    }
}

/// Says on standard error that the end is missing, and gives the status for that.
pub fn status_of(trace: &Trace, file: &Path) -> u8 {
    match (&trace.damage, trace.complete()) {
        (Some(damage), _) => {
            eprintln!(
                "chronovisor: {}: {damage}; what lies before it is intact",
                file.display()
            );
            INCOMPLETE
        }
        (None, false) => {
            eprintln!("chronovisor: {}: {INCOMPLETE_NOTE}", file.display());
            INCOMPLETE
        }
        (None, true) => 0,
    }
}

fn print_info(file: &Path, json: bool, out: &mut dyn Write) -> Result<u8, Failure> {
    let trace = Trace::open(file)?;
    let info = info(&trace);
    if json {
        let text = serde_json::to_string_pretty(&info).doing(|| "cannot write as JSON".into())?;
        writeln!(out, "{text}")?;
    } else {
        write_info(&info, out)?;
    }
    Ok(status_of(&trace, file))
}

fn write_info(info: &Info, out: &mut dyn Write) -> std::io::Result<()> {
    let mut row = |name: &str, value: String| writeln!(out, "{name:<14} {value}");
    row(
        "format",
        format!(
            "version {}, by chronovisor {}",
            info.version, info.chronovisor
        ),
    )?;
    for (name, size) in &info.images {
        row("image", format!("{name}, {} bytes", grouped(*size)))?;
    }
    if !info.cmdline.is_empty() {
        row("command line", info.cmdline.clone())?;
    }
    row(
        "machine",
        format!("{} MiB, CPU model {}", info.memory >> 20, info.cpu),
    )?;
    row(
        "recorded on",
        format!(
            "{}, {} ({})",
            info.engine, info.host.model, info.host.vendor
        ),
    )?;
    row("sync points", grouped(info.sync_points))?;
    if let Some(count) = info.instructions {
        row("instructions", grouped(count))?;
    }
    row(
        "records",
        format!(
            "{}, of them {} arrivals",
            grouped(info.records),
            grouped(info.arrivals)
        ),
    )?;
    if let Some(totals) = &info.totals {
        row("landmarks", grouped(totals.landmarks))?;
        row("digests", grouped(totals.digests))?;
        row("exits", grouped(totals.exits))?;
        row("guest time", totals.last_time.to_string())?;
        row(
            "console",
            format!("{} bytes", grouped(totals.console_bytes)),
        )?;
    }
    let stored: u64 = info.chunks.iter().map(|chunk| chunk.stored).sum();
    row("size", format!("{} bytes in chunks", grouped(stored)))?;
    for chunk in &info.chunks {
        row(
            "",
            format!(
                "{:<8} {:>6} chunks {:>12} bytes, {:>12} uncompressed",
                chunk.kind,
                grouped(chunk.chunks),
                grouped(chunk.stored),
                grouped(chunk.raw)
            ),
        )?;
    }
    let end = match (&info.end, &info.damage) {
        (_, Some(damage)) => format!("damaged: {damage}"),
        (Some(end), None) => end.clone(),
        (None, None) => "none: the recording was cut short".to_owned(),
    };
    row("end", end)
}

fn print_check(file: &Path, out: &mut dyn Write) -> Result<u8, Failure> {
    let mut trace = Trace::open(file)?;
    for record in dump(&mut trace) {
        record.doing(|| file.display().to_string())?;
    }
    let found = check(&trace);
    if found.intact {
        writeln!(
            out,
            "{}: intact: {} chunks, {} records",
            file.display(),
            found.chunks,
            found.records
        )?;
    }
    Ok(status_of(&trace, file))
}

fn print_dump(file: &Path, json: bool, out: &mut dyn Write) -> Result<u8, Failure> {
    let mut trace = Trace::open(file)?;
    for record in dump(&mut trace) {
        let record = record.doing(|| file.display().to_string())?;
        let value = serde_json::to_value(&record).doing(|| "cannot write as JSON".into())?;
        if json {
            writeln!(out, "{value}")?;
        } else {
            writeln!(out, "{}", line(&value))?;
        }
    }
    Ok(status_of(&trace, file))
}

/// A record as a line for people: its number, its sync point, its kind, and the rest as it is.
fn line(record: &Value) -> String {
    let mut text = format!(
        "{:>6} after {:>8} {:<10}",
        record["index"].to_string(),
        record["after"].to_string(),
        record["record"].as_str().unwrap_or_default()
    );
    for (name, value) in record.as_object().into_iter().flatten() {
        if matches!(name.as_str(), "index" | "after" | "record" | "vcpu") {
            continue;
        }
        match value {
            Value::Null => {}
            Value::Array(items) => text += &format!(" {} {name}", items.len()),
            Value::Object(fields) if fields.len() > 2 => text += &inner(value),
            Value::Object(fields) => {
                for (kind, value) in fields {
                    text += &format!(" {name}: {kind}{}", inner(value));
                }
            }
            Value::String(value) => text += &format!(" {name}: {value}"),
            value => text += &format!(" {name}: {value}"),
        }
    }
    text
}

/// The parts of an event worth a place on its line.
fn inner(value: &Value) -> String {
    let Some(fields) = value.as_object() else {
        return format!(" {value}");
    };
    fields
        .iter()
        .map(|(name, value)| match value {
            Value::Array(items) => format!(" {} {name}", items.len()),
            Value::Object(registers) => match registers.get("rip") {
                Some(rip) => format!(" rip {}", rip.as_str().unwrap_or_default()),
                None => String::new(),
            },
            Value::String(value) => format!(" {name} {value}"),
            value => format!(" {name} {value}"),
        })
        .collect()
}
