//! Drawing.
//!
//! Purpose: the prepared state becomes a frame: bars at the top and the bottom, panels between them, a text over them.
//! Invariants: drawing changes nothing. Each panel says how many lines it has and makes only those that are visible, so that a long
//! recording costs no more than a short one.
//! Elsewhere: what is known about the machine ([`crate::app`]); where panels are ([`crate::layout`]).

mod backtrace;
mod bars;
mod console;
mod disassembly;
mod events;
mod exits;
mod overlay;
mod registers;

use crate::app::{App, Mode, Panel};
use crate::layout::Place;
use machine::debuggable::Debuggable;
use ratatui::Frame;
use ratatui::layout::Alignment;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Paragraph};
use std::ops::Range;

/// Draws one frame. [`App::prepare`] was called with its size.
pub(crate) fn draw(frame: &mut Frame<'_>, app: &App<'_>, machine: &dyn Debuggable) {
    frame.render_widget(
        bars::title(app, machine, app.screen.title.width),
        app.screen.title,
    );
    for place in &app.screen.places {
        draw_place(frame, app, machine, place);
    }
    bars::draw_status(frame, app);
    if let Mode::Overlay(overlay) = &app.mode {
        overlay::draw(frame, app, overlay);
    }
}

/// How many lines `panel` has when it is `width` columns wide.
pub(crate) fn total(app: &App<'_>, machine: &dyn Debuggable, panel: Panel, width: usize) -> usize {
    match panel {
        // It always fills its place.
        Panel::Disassembly => 0,
        Panel::Registers => registers::lines(app, width).len(),
        Panel::Console => console::total(app, width),
        Panel::Backtrace => backtrace::lines(app).len(),
        Panel::Exits => exits::lines(app, width).len(),
        Panel::Events => events::total(machine),
    }
}

/// Which line of the events panel is the present moment.
pub(crate) fn present_row(machine: &dyn Debuggable) -> usize {
    events::present_row(machine)
}

fn draw_place(frame: &mut Frame<'_>, app: &App<'_>, machine: &dyn Debuggable, place: &Place) {
    let panel = place.shown;
    let (width, height) = app.screen.inner_size(panel);
    let (width, height) = (usize::from(width), usize::from(height));
    let total = total(app, machine, panel, width);
    let scroll = app.scroll[panel as usize];
    let range = match panel {
        Panel::Console => total.saturating_sub(height + scroll)..total.saturating_sub(scroll),
        _ => scroll.min(total)..total.min(scroll + height),
    };
    let visible = |lines: Vec<Line<'static>>| -> Vec<Line<'static>> {
        lines
            .into_iter()
            .skip(range.start)
            .take(range.len())
            .collect()
    };
    let lines = match panel {
        Panel::Disassembly => disassembly::lines(app, width),
        Panel::Registers => visible(registers::lines(app, width)),
        Panel::Console => console::lines(app, width, range.clone()),
        Panel::Backtrace => visible(backtrace::lines(app)),
        Panel::Exits => visible(exits::lines(app, width)),
        Panel::Events => events::lines(app, machine, range.clone(), width),
    };
    let mut block = Block::new()
        .borders(Borders::ALL)
        .border_set(app.theme.border())
        .border_style(style_of(app, panel))
        .title(heading(app, place));
    if let (Panel::Disassembly, Some(function)) = (panel, disassembly::function(app)) {
        let function = Line::styled(format!(" {function} "), style_of(app, panel));
        block = block.title(function.alignment(Alignment::Right));
    }
    if total > height && height > 0 {
        let more = format!(" {} ", extent(&range, total));
        block = block.title_bottom(Line::from(more).alignment(Alignment::Right));
    }
    frame.render_widget(Paragraph::new(lines).block(block), place.area);
}

fn extent(range: &Range<usize>, total: usize) -> String {
    format!("{}-{} of {total}", range.start + 1, range.end)
}

fn style_of(app: &App<'_>, panel: Panel) -> ratatui::style::Style {
    if app.focus == panel {
        app.theme.focused()
    } else {
        app.theme.unfocused()
    }
}

/// The panel's name; in a shared place those of all that share it, the visible one in brackets.
fn heading(app: &App<'_>, place: &Place) -> Line<'static> {
    let style = style_of(app, place.shown);
    let mut spans = vec![Span::styled(" ", style)];
    for panel in &place.tabs {
        if place.tabs.len() == 1 {
            spans.push(Span::styled(panel.name(), style));
        } else if *panel == place.shown {
            spans.push(Span::styled(format!("[{}]", panel.name()), style));
        } else {
            spans.push(Span::styled(panel.name(), app.theme.unfocused()));
        }
        spans.push(Span::styled(" ", style));
    }
    Line::from(spans)
}
