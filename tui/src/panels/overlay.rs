//! A text over the panels.
//!
//! Purpose: help, a page walk, memory, the report of a divergence.
//! Elsewhere: the texts ([`crate::prompts`], [`crate::jobs`]).

use crate::app::App;
use crate::prompts::Overlay;
use ratatui::Frame;
use ratatui::layout::{Alignment, Rect};
use ratatui::text::Line;
use ratatui::widgets::{Block, Borders, Clear, Paragraph};

/// Draws `overlay` in the middle of the screen.
pub(super) fn draw(frame: &mut Frame<'_>, app: &App<'_>, overlay: &Overlay) {
    let screen = frame.area();
    let longest = overlay
        .lines
        .iter()
        .map(|line| line.chars().count())
        .max()
        .unwrap_or(0);
    let longest = longest.max(overlay.title.chars().count() + 2);
    let width = size(longest + 4).min(screen.width);
    let height = size(overlay.lines.len() + 2).min(screen.height.saturating_sub(2));
    let area = Rect {
        x: screen.x + (screen.width - width) / 2,
        y: screen.y + (screen.height - height) / 2,
        width,
        height,
    };
    let inner = usize::from(height.saturating_sub(2));
    let top = overlay.top.min(overlay.lines.len().saturating_sub(inner));
    let lines: Vec<_> = overlay
        .lines
        .iter()
        .skip(top)
        .take(inner)
        .map(|line| Line::from(format!(" {}", super::bars::one_line(line))))
        .collect();
    let mut block = Block::new()
        .borders(Borders::ALL)
        .border_set(app.theme.border())
        .border_style(app.theme.focused())
        .title(format!(" {} ", super::bars::one_line(&overlay.title)));
    if overlay.lines.len() > inner {
        let range = top..(top + inner).min(overlay.lines.len());
        let more = format!(" {} ", super::extent(&range, overlay.lines.len()));
        block = block.title_bottom(Line::from(more).alignment(Alignment::Right));
    }
    frame.render_widget(Clear, area);
    frame.render_widget(Paragraph::new(lines).block(block), area);
}

fn size(columns: usize) -> u16 {
    u16::try_from(columns).unwrap_or(u16::MAX)
}
