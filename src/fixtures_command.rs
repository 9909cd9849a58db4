//! `chronovisor fixtures`: the guests that come along.

use crate::arguments::FixturesCommand;
use crate::failure::{Doing, Failure};
use fixtures::Fixture;
use std::io::Write;

/// Runs the command.
pub fn run(command: &FixturesCommand, out: &mut dyn Write) -> Result<u8, Failure> {
    match command {
        FixturesCommand::List { json } => list(*json, out)?,
        FixturesCommand::Extract { name, output } => {
            let fixture = by_name(name)?;
            std::fs::write(output, fixture.elf)
                .doing(|| format!("cannot write {}", output.display()))?;
        }
    }
    Ok(0)
}

/// The fixture of this name, or a failure that lists them.
pub fn by_name(name: &str) -> Result<&'static Fixture, Failure> {
    fixtures::by_name(name).ok_or_else(|| {
        let names: Vec<_> = fixtures::ALL.iter().map(|fixture| fixture.name).collect();
        Failure::new(format!(
            "there is no fixture {name:?}; there are {} (to run a kernel of your own, use --kernel FILE)",
            names.join(", ")
        ))
    })
}

fn list(json: bool, out: &mut dyn Write) -> Result<(), Failure> {
    if json {
        let rows: Vec<_> = fixtures::ALL
            .iter()
            .map(|fixture| serde_json::json!({ "name": fixture.name, "about": fixture.about }))
            .collect();
        writeln!(out, "{}", serde_json::Value::from(rows))?;
    } else {
        for fixture in fixtures::ALL {
            writeln!(out, "{:<14} {}", fixture.name, fixture.about)?;
        }
    }
    Ok(())
}
