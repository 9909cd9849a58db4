//! Exit counts.
//!
//! Purpose: how often the guest left for the monitor, why and where, most frequent first.
//! Elsewhere: counting (`machine`), the whole table as text ([`introspect::exits`]).

use crate::app::App;
use introspect::exits::{Figures, duration, grouped};
use ratatui::text::{Line, Span};

/// Every line of the panel: a heading, one line per reason and site, the total.
pub(super) fn lines(app: &App<'_>, width: usize) -> Vec<Line<'static>> {
    let report = &app.view.exits;
    // Times come in where a name keeps 24 columns; a replay measures none.
    let measured = report.total.guest_ns != 0 || report.total.monitor_ns != 0;
    let times = match width {
        _ if !measured => 0,
        0..56 => 0,
        56..78 => 1,
        _ => 3,
    };
    let name_width = width.saturating_sub(20 + 11 * times).max(8);
    let head = row(
        "exit",
        "count",
        "share",
        &["mean", "in guest", "monitor"][..times],
        name_width,
    );
    let mut lines = vec![Line::from(Span::styled(head, app.theme.faint()))];
    for (site, name, figures) in report.lines() {
        let (indent, style) = if site {
            ("  ", ratatui::style::Style::new())
        } else {
            ("", app.theme.name())
        };
        let text = figures_row(&format!("{indent}{name}"), figures, times, name_width);
        lines.push(Line::from(Span::styled(text, style)));
    }
    let total = figures_row("total", report.total, times, name_width);
    lines.push(Line::from(Span::styled(total, app.theme.faint())));
    lines
}

fn figures_row(name: &str, figures: Figures, times: usize, name_width: usize) -> String {
    let shown = [
        duration(figures.mean_monitor_ns),
        duration(figures.guest_ns),
        duration(figures.monitor_ns),
    ];
    let shown: Vec<_> = shown.iter().take(times).map(String::as_str).collect();
    let share = format!("{:.1}%", figures.share * 100.0);
    row(name, &grouped(figures.count), &share, &shown, name_width)
}

fn row(name: &str, count: &str, share: &str, times: &[&str], name_width: usize) -> String {
    let name: String = name.chars().take(name_width).collect();
    let mut text = format!("{name:<name_width$} {count:>11} {share:>7}");
    for time in times {
        text.push_str(&format!(" {time:>10}"));
    }
    text
}
