//! Registers.
//!
//! Purpose: all of them, two columns of general registers where there is room; what changed since the last stop is marked.
//! Elsewhere: what their bits mean ([`introspect::registers`]).

use crate::app::App;
use introspect::registers::{Group, Item};
use ratatui::style::Style;
use ratatui::text::{Line, Span};

/// Every line of the panel.
pub(super) fn lines(app: &App<'_>, width: usize) -> Vec<Line<'static>> {
    let view = &app.view;
    if let Err(error) = &view.cpu {
        return vec![Line::from(Span::styled(error.clone(), app.theme.error()))];
    }
    let items: Vec<_> = view
        .items
        .iter()
        .zip(view.changed.iter().copied())
        .collect();
    let mut lines = Vec::new();
    for group in [
        Group::General,
        Group::State,
        Group::Control,
        Group::Segments,
        Group::Debug,
        Group::Msrs,
    ] {
        let members: Vec<_> = items
            .iter()
            .copied()
            .filter(|(item, _)| item.group == group)
            .collect();
        if group == Group::General {
            lines.extend(general(app, &members, width));
        } else {
            lines.push(Line::from(Span::styled(heading(group), app.theme.faint())));
            for (item, changed) in members {
                lines.extend(described(app, item, changed, width));
            }
        }
    }
    lines
}

const fn heading(group: Group) -> &'static str {
    match group {
        Group::General => "general",
        Group::State => "state",
        Group::Control => "control",
        Group::Segments => "segments",
        Group::Debug => "debug",
        Group::Msrs => "model-specific",
    }
}

/// General registers in as many columns as fit, the instruction pointer first.
fn general(app: &App<'_>, members: &[(&Item, bool)], width: usize) -> Vec<Line<'static>> {
    let mut members = members.to_vec();
    members.rotate_right(1);
    let cell = members
        .iter()
        .map(|(item, _)| 5 + item.value.len())
        .max()
        .unwrap_or(1);
    let columns = ((width + 1) / (cell + 1)).clamp(1, 2);
    let (first, rest) = members.split_at(members.len().min(1));
    let rows = rest.len().div_ceil(columns).max(1);
    let mut lines: Vec<_> = first
        .iter()
        .map(|(item, changed)| Line::from(short(app, item, *changed)))
        .collect();
    for row in 0..rows.min(rest.len()) {
        let mut spans = Vec::new();
        for column in 0..columns {
            if let Some((item, changed)) = rest.get(row + column * rows) {
                if column > 0 {
                    spans.push(Span::raw(" "));
                }
                spans.extend(short(app, item, *changed));
            }
        }
        lines.push(Line::from(spans));
    }
    lines
}

/// Mark, name and value in a fixed width.
fn short(app: &App<'_>, item: &Item, changed: bool) -> Vec<Span<'static>> {
    let (mark, style) = mark(app, changed);
    vec![
        Span::styled(mark, style),
        Span::styled(format!("{:<3} ", item.name), app.theme.name()),
        Span::styled(item.value.clone(), style),
    ]
}

fn mark(app: &App<'_>, changed: bool) -> (&'static str, Style) {
    if changed {
        ("!", app.theme.changed())
    } else {
        (" ", Style::new())
    }
}

/// Name, value and meaning; the meaning continues on indented lines if it must.
fn described(app: &App<'_>, item: &Item, changed: bool, width: usize) -> Vec<Line<'static>> {
    let (mark, style) = mark(app, changed);
    let mut name = format!("{:<5}", item.name);
    if !item.value.is_empty() {
        name.push(' ');
    }
    let mut used = 1 + name.chars().count() + item.value.len();
    let mut lines = Vec::new();
    let mut spans = vec![
        Span::styled(mark, style),
        Span::styled(name, app.theme.name()),
        Span::styled(item.value.clone(), style),
    ];
    for word in item.meaning.split(' ').filter(|word| !word.is_empty()) {
        if used + 1 + word.chars().count() > width && used > 4 {
            lines.push(Line::from(std::mem::take(&mut spans)));
            spans.push(Span::raw("   "));
            used = 3;
        }
        used += 1 + word.chars().count();
        spans.push(Span::styled(format!(" {word}"), style));
    }
    lines.push(Line::from(spans));
    lines
}
