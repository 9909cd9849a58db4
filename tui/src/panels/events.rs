//! Recorded events.
//!
//! Purpose: what reaches the guest from outside and when: time, input, the stop; what has arrived before where the machine stands, what will
//! arrive after.
//! Invariants: only the visible lines are made; a recording may have a great many.
//! Elsewhere: recording them (`replay`).

use super::bars::position_text;
use crate::app::App;
use introspect::exits::grouped;
use machine::debuggable::{Debuggable, EventView};
use machine::environment::{Arrival, Channel};
use ratatui::style::Style;
use ratatui::text::{Line, Span};
use std::ops::Range;

/// Input longer than this is cut, in bytes.
const LONGEST_INPUT: usize = 60;

/// How many lines there are: the events and the present moment among them.
pub(super) fn total(machine: &dyn Debuggable) -> usize {
    machine.events().len() + 1
}

/// The line of the present moment: how many events have arrived.
pub(super) fn present_row(machine: &dyn Debuggable) -> usize {
    machine
        .events()
        .partition_point(|event| is_past(machine, event))
}

/// The lines in `range`.
pub(super) fn lines(
    app: &App<'_>,
    machine: &dyn Debuggable,
    range: Range<usize>,
    width: usize,
) -> Vec<Line<'static>> {
    let events = machine.events();
    if events.is_empty() {
        return vec![Line::from(Span::styled(
            "nothing is recorded",
            app.theme.faint(),
        ))];
    }
    let visible = events
        .get(range.start.saturating_sub(1)..range.end.min(events.len()))
        .unwrap_or_default();
    let columns = Columns::of(visible, width);
    let now = present_row(machine);
    range
        .filter_map(|row| match row.cmp(&now) {
            std::cmp::Ordering::Less => events
                .get(row)
                .map(|event| line(event, columns, Style::new())),
            std::cmp::Ordering::Equal => Some(present(app, now, events.len(), width)),
            std::cmp::Ordering::Greater => events
                .get(row - 1)
                .map(|event| line(event, columns, app.theme.faint())),
        })
        .collect()
}

fn is_past(machine: &dyn Debuggable, event: &EventView) -> bool {
    match (event.position, machine.position()) {
        (Some(at), Some(here)) => at <= here,
        (at, _) => at.is_some(),
    }
}

fn present(app: &App<'_>, past: usize, all: usize, width: usize) -> Line<'static> {
    let text = format!("-- here: {past} arrived, {} to come ", all - past);
    let text = format!("{text:-<width$}");
    Line::from(Span::styled(text, app.theme.name()))
}

/// Number, position, sync point and what arrived. In a narrow panel one moment is enough: the position once it is known.
fn line(event: &EventView, columns: Columns, style: Style) -> Line<'static> {
    let landmark = if event.landmark { "+" } else { "" };
    let sync = format!("sync {}{landmark}", grouped(event.after.0));
    let position = event.position.map(position_text);
    let moment = if columns.both {
        let position = position.unwrap_or_else(|| "-".to_owned());
        format!(
            "{position:>p$}  {sync:<s$}",
            p = columns.position,
            s = columns.sync
        )
    } else {
        let width = columns.position.max(columns.sync);
        format!("{:>width$}", position.unwrap_or(sync))
    };
    let text = format!(
        "#{:<i$} {moment}  {}",
        event.index,
        arrival_text(&event.arrival),
        i = columns.index
    );
    Line::from(Span::styled(text, style))
}

/// Widths of the columns.
#[derive(Clone, Copy)]
struct Columns {
    index: usize,
    position: usize,
    sync: usize,
    both: bool,
}

impl Columns {
    /// As the visible events need.
    fn of(visible: &[EventView], width: usize) -> Self {
        let longest =
            |length: fn(&EventView) -> usize| visible.iter().map(length).max().unwrap_or(1);
        let index = longest(|event| event.index.to_string().len());
        let position = longest(|event| event.position.map_or(1, |at| position_text(at).len()));
        let sync = longest(|event| 6 + grouped(event.after.0).len());
        // A time takes 16 columns; input may take more and be cut.
        let both = 1 + index + 1 + position + 2 + sync + 2 + 16 <= width;
        Self {
            index,
            position,
            sync,
            both,
        }
    }
}

fn arrival_text(arrival: &Arrival) -> String {
    match arrival {
        Arrival::Time { now } => {
            let us = now.get() / 1000;
            format!("time {}.{:06} s", us / 1_000_000, us % 1_000_000)
        }
        Arrival::Input { channel, bytes } => {
            let channel = match channel {
                Channel::Com1 => "COM1",
                Channel::DebugConsole => "debug console",
            };
            let shown = bytes.get(..LONGEST_INPUT).unwrap_or(bytes);
            let more = if shown.len() < bytes.len() { "..." } else { "" };
            format!("input {channel} \"{}\"{more}", shown.escape_ascii())
        }
        Arrival::Stop => "stop".to_owned(),
    }
}
