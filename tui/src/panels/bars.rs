//! The line at the top and the line at the bottom.
//!
//! Purpose: what machine this is, where it stands and whether it runs; what the user is asked, told, or may type.
//! Elsewhere: keys ([`crate::keys`]).

use crate::app::{App, Message, Mode};
use crate::jobs::Job;
use crate::prompts::Prompt;
use introspect::exits::grouped;
use introspect::registers::mode_text;
use machine::debuggable::Debuggable;
use ratatui::Frame;
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;
use x86::{Activity, Position};

/// The title bar: the machine at the left, what it does at the right.
pub(super) fn title(app: &App<'_>, machine: &dyn Debuggable, width: u16) -> Paragraph<'static> {
    let doing = doing(app, machine);
    let room = usize::from(width).saturating_sub(doing.chars().count() + 2);
    let mut left = format!(
        " {} | {}",
        one_line(&machine.describe()),
        machine.engine().name()
    );
    let mut parts = vec![match machine.position() {
        Some(position) => format!("position {}", position_text(position)),
        None => "position not counted".to_owned(),
    }];
    if machine.branched() {
        parts.push("branched off the recording".to_owned());
    }
    if let Ok(cpu) = &app.view.cpu {
        let halted = if cpu.activity == Activity::Halted {
            ", halted"
        } else {
            ""
        };
        parts.push(format!(
            "{}, CPL {}{halted}",
            mode_text(cpu.mode()),
            cpu.cpl()
        ));
    }
    // What does not fit is left out whole.
    for part in parts {
        if left.chars().count() + 3 + part.chars().count() <= room {
            left = format!("{left} | {part}");
        }
    }
    let left: String = left.chars().take(room).collect();
    let line = format!("{left:<room$} {doing} ");
    Paragraph::new(line).style(app.theme.bar())
}

/// What the machine does: running, stopped, ended.
fn doing(app: &App<'_>, machine: &dyn Debuggable) -> String {
    match (&app.job, &app.failed, machine.end()) {
        (Some(Job::Seek(_) | Job::SeekEvent(_)), _, _) => "TRAVELLING".to_owned(),
        (Some(job), _, _) if job.needs_past() => "GOING BACK".to_owned(),
        (Some(_), _, _) => "RUNNING".to_owned(),
        (None, Some(_), _) => "FAILED".to_owned(),
        (None, None, Some(end)) => format!("ENDED: {end}"),
        (None, None, None) => "STOPPED".to_owned(),
    }
}

/// `1,234,567`, or `1,234,567+2` inside an instruction.
pub(super) fn position_text(position: Position) -> String {
    let retired = grouped(position.retired.get());
    match position.within {
        0 => retired,
        within => format!("{retired}+{within}"),
    }
}

/// Text for one line of the screen.
pub(super) fn one_line(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// The status line: a question, a message, or the keys.
pub(super) fn draw_status(frame: &mut Frame<'_>, app: &App<'_>) {
    let area = app.screen.status;
    let line = match (&app.mode, &app.message, app.count) {
        (Mode::Prompt(prompt), _, _) => {
            let room = usize::from(area.width).saturating_sub(1);
            let (line, column) = question(app, prompt, room);
            if area.width > 0 && area.height > 0 {
                let column = area.x.saturating_add(u16::try_from(column).unwrap_or(0));
                frame.set_cursor_position((column.min(area.right() - 1), area.y));
            }
            line
        }
        (Mode::Overlay(_), _, _) => {
            Line::from(" arrows, PgUp, PgDn scroll | any other key closes this")
        }
        (Mode::Panels, _, Some(count)) => Line::from(format!(
            " {count} times: s step, n next, Tab panel, arrows ..."
        )),
        (Mode::Panels, Some(Message { text, error }), None) => {
            let text = format!(" {}", one_line(text));
            let style = if *error {
                app.theme.error()
            } else {
                app.theme.name()
            };
            Line::from(Span::styled(text, style))
        }
        (Mode::Panels, None, None) => hints(app),
    };
    frame.render_widget(Paragraph::new(line), area);
}

/// A question, what was answered so far, and where the cursor is. The end of a long answer matters more than the question.
fn question(app: &App<'_>, prompt: &Prompt, room: usize) -> (Line<'static>, usize) {
    let whole = format!(" {}{}", prompt.question.text(), prompt.answer);
    let count = whole.chars().count();
    let shown: String = whole.chars().skip(count.saturating_sub(room)).collect();
    let column = shown.chars().count();
    let note = if prompt.note.is_empty() {
        String::new()
    } else {
        format!("   {}", prompt.note)
    };
    let note = Span::styled(note, app.theme.faint());
    (Line::from(vec![Span::raw(shown), note]), column)
}

fn hints(app: &App<'_>) -> Line<'static> {
    if app.job.is_some() {
        return Line::from(Span::styled(
            " running; any key pauses",
            app.theme.running(),
        ));
    }
    let back = [("S C", "back"), ("t", "travel")];
    let back = if app.can_reverse { &back[..] } else { &[] };
    let moving = [
        ("s", "step"),
        ("n", "next"),
        ("c", "continue"),
        ("G", "end"),
    ];
    let looking = [
        ("b", "break"),
        ("Tab", "panel"),
        ("g", "go to"),
        ("z", "zoom"),
    ];
    let always = [("?", "help"), ("q", "quit")];
    let length = |(key, what): (&str, &str)| key.chars().count() + what.chars().count() + 3;
    // What does not fit is left out, but not how to find it and how to leave.
    let mut room = usize::from(app.screen.status.width)
        .saturating_sub(1 + always.iter().copied().map(length).sum::<usize>());
    let mut keys = Vec::new();
    for hint in moving.iter().chain(back).chain(&looking) {
        if let Some(left) = room.checked_sub(length(*hint)) {
            room = left;
            keys.push(*hint);
        }
    }
    keys.extend(always);
    let mut spans = vec![Span::raw(" ")];
    for (key, what) in keys {
        spans.push(Span::styled(key, app.theme.name()));
        spans.push(Span::raw(format!(" {what}  ")));
    }
    Line::from(spans)
}
