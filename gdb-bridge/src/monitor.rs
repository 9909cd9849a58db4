//! `monitor` commands.
//!
//! Purpose: what gdb has no command for, as text: where the timeline stands, exits, events, the guest's console, registers bit by bit,
//! page walks.
//! Invariants: every command only looks, except `phys`, which changes how this client's addresses are meant. Any text is an answer, never an
//! error: gdb shows no text with an error.
//! Elsewhere: how registers, walks and exits are worded (`introspect`).

use crate::bridge::Bridge;
use crate::registers::Register;
use introspect::exits::ExitReport;
use introspect::page_walk::explain;
use introspect::registers::{Group, items};
use machine::debuggable::{DebugError, EventView};
use machine::environment::Arrival;
use std::fmt::Write;
use x86::{CpuState, GuestVirtAddr, Position, VcpuId};

/// Name, arguments, what it does.
const COMMANDS: [(&str, &str, &str); 9] = [
    ("help", "", "this list"),
    (
        "info",
        "",
        "the machine: what it is, its engine, memory, how it ended",
    ),
    (
        "when",
        "",
        "where the timeline stands, in retired instructions",
    ),
    ("exits", "", "VM exits so far, by reason and place"),
    ("events", "[FROM [COUNT]]", "recorded asynchronous events"),
    (
        "console",
        "[LINES]",
        "the guest's console output so far, or its last lines",
    ),
    ("regs", "[CPU]", "system registers, bit by bit"),
    (
        "walk",
        "ADDRESS [CPU]",
        "the page walk of a virtual address (a number or a register)",
    ),
    (
        "phys",
        "[on|off]",
        "whether this gdb's addresses are physical",
    ),
];

/// What is wrong with a command, for the user.
type Complaint = String;

impl Bridge<'_> {
    /// The answer to `monitor COMMAND`.
    pub(crate) fn monitor(&mut self, command: &str) -> String {
        let mut words = command.split_whitespace();
        let name = words.next().unwrap_or("help");
        let arguments: Vec<&str> = words.collect();
        let answer = match find(name) {
            Some("help") => Ok(help()),
            Some("info") => Ok(self.info()),
            Some("when") => Ok(self.when()),
            Some("exits") => Ok(ExitReport::of(self.machine.exits()).to_string()),
            Some("events") => self.events(&arguments),
            Some("console") => self.console(&arguments),
            Some("regs") => self.regs(&arguments),
            Some("walk") => self.walk(&arguments),
            Some("phys") => self.phys(&arguments),
            _ => Err(format!("{name:?} is not a command here; try: monitor help")),
        };
        let mut text = answer.unwrap_or_else(|complaint| complaint);
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        text
    }

    fn info(&self) -> String {
        let machine = &self.machine;
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = writeln!(text, "machine   {}", machine.describe());
        let _ = writeln!(text, "engine    {}", machine.engine().name());
        let _ = writeln!(text, "CPUs      {}", machine.vcpus().len());
        let _ = writeln!(
            text,
            "memory    {} KiB from physical 0",
            machine.memory().size() >> 10
        );
        let _ = writeln!(text, "position  {}", self.when());
        let end = machine
            .end()
            .map_or_else(|| "not yet".to_owned(), |end| end.to_string());
        let _ = writeln!(text, "end       {end}");
        if machine.branched() {
            text.push_str("the debugger's changes have left the recording\n");
        }
        if let Some(why) = &self.failed {
            let _ = writeln!(text, "it cannot go on: {why}");
        }
        text
    }

    fn when(&self) -> String {
        match self.machine.position() {
            Some(position) => position.to_string(),
            None => {
                format!(
                    "unknown: the {} engine does not count",
                    self.machine.engine().name()
                )
            }
        }
    }

    fn events(&self, arguments: &[&str]) -> Result<String, Complaint> {
        let events = self.machine.events();
        let from = arguments.first().map_or(Ok(0), |text| number(text))?;
        let count = arguments.get(1).map_or(Ok(40), |text| number(text))?;
        let now = self.machine.position();
        let next = events
            .iter()
            .find(|event| is_ahead(event, now))
            .map(|event| event.index);
        let mut text = format!("{} events; > marks the next one\n", events.len());
        for event in events
            .iter()
            .skip_while(|event| event.index < from)
            .take(count as usize)
        {
            let mark = if Some(event.index) == next { '>' } else { ' ' };
            let _ = writeln!(text, "{mark} {}", event_text(event));
        }
        Ok(text)
    }

    fn console(&self, arguments: &[&str]) -> Result<String, Complaint> {
        let text = String::from_utf8_lossy(self.machine.console());
        let Some(count) = arguments.first() else {
            return Ok(text.into_owned());
        };
        let lines: Vec<&str> = text.lines().collect();
        let skip = lines.len().saturating_sub(number(count)? as usize);
        Ok(lines.get(skip..).unwrap_or_default().join("\n"))
    }

    fn regs(&mut self, arguments: &[&str]) -> Result<String, Complaint> {
        let cpu = self.cpu_of(arguments.first())?;
        let mut text = String::new();
        for item in items(&cpu)
            .iter()
            .filter(|item| item.group != Group::General)
        {
            let _ = writeln!(text, "{item}");
        }
        Ok(text)
    }

    fn walk(&mut self, arguments: &[&str]) -> Result<String, Complaint> {
        let addr = arguments
            .first()
            .ok_or("which address? monitor walk ADDRESS [CPU]")?;
        let cpu = self.cpu_of(arguments.get(1))?;
        let register = Register::all().find(|register| {
            register.size() == 8 && register.name() == addr.trim_start_matches('$')
        });
        let addr = match register {
            Some(register) => register.get(&cpu) as u64,
            None => number(addr)?,
        };
        Ok(explain(&cpu, self.machine.memory(), GuestVirtAddr::new(addr)).to_string())
    }

    fn phys(&mut self, arguments: &[&str]) -> Result<String, Complaint> {
        match arguments.first() {
            Some(&"on") => self.physical = true,
            Some(&"off") => self.physical = false,
            Some(other) => return Err(format!("{other:?}? monitor phys [on|off]")),
            None => {}
        }
        let kind = if self.physical { "physical" } else { "virtual" };
        Ok(format!(
            "addresses are {kind}; gdb may remember what it has read (maint flush dcache makes it ask again)"
        ))
    }

    fn cpu_of(&mut self, argument: Option<&&str>) -> Result<CpuState, Complaint> {
        let vcpu = match argument {
            None => self.first_vcpu(),
            Some(text) => VcpuId(u8::try_from(number(text)?).map_err(|_| "no such CPU")?),
        };
        self.machine
            .cpu(vcpu)
            .map_err(|error: DebugError| error.to_string())
    }
}

/// The command a word stands for: its name, or the beginning of one only.
fn find(word: &str) -> Option<&'static str> {
    let mut fitting = COMMANDS
        .iter()
        .map(|(name, ..)| *name)
        .filter(|name| name.starts_with(word));
    let first = fitting.next();
    if first == Some(word) || fitting.next().is_none() {
        first
    } else {
        None
    }
}

fn help() -> String {
    COMMANDS
        .iter()
        .fold(String::new(), |mut text, (name, arguments, does)| {
            let _ = writeln!(text, "{:<24}{does}", format!("{name} {arguments}"));
            text
        })
}

fn number(text: &str) -> Result<u64, Complaint> {
    let digits = text.replace('_', "");
    match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => digits.parse(),
    }
    .map_err(|_| format!("{text:?} is not a number; write 1234 or 0x4d2"))
}

fn is_ahead(event: &EventView, now: Option<Position>) -> bool {
    match (event.position, now) {
        (Some(position), Some(now)) => position >= now,
        (None, _) => true,
        (Some(_), None) => false,
    }
}

fn event_text(event: &EventView) -> String {
    let place = match event.position {
        Some(position) => format!("at {position}"),
        None => "not reached yet".to_owned(),
    };
    let how = if event.landmark { "after" } else { "at" };
    let what = match &event.arrival {
        Arrival::Time { now } => format!("time is {now}"),
        Arrival::Input { channel, bytes } => {
            format!("input to {channel:?}: {:?}", String::from_utf8_lossy(bytes))
        }
        Arrival::Stop => "stop".to_owned(),
    };
    format!(
        "#{:<6} {how} sync point {:<8} {place:<20} {what}",
        event.index, event.after
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unique_beginning_stands_for_its_command() {
        assert_eq!(find("con"), Some("console"));
        assert_eq!(find("e"), None, "exits or events");
        assert_eq!(find("exits"), Some("exits"));
        assert_eq!(find("reset"), None);
    }

    #[test]
    fn numbers_are_read_as_users_write_them() {
        assert_eq!(number("0xffff_8000"), Ok(0xffff_8000));
        assert_eq!(number("12"), Ok(12));
        assert!(number("12g").is_err());
    }
}
