//! The call chain.
//!
//! Purpose: who called whom, and why the list ends.
//! Elsewhere: following frame pointers ([`introspect::backtrace`]).

use crate::app::App;
use introspect::backtrace::BacktraceEnd;
use ratatui::text::{Line, Span};

/// Every line of the panel.
pub(super) fn lines(app: &App<'_>) -> Vec<Line<'static>> {
    let Some(trace) = &app.view.backtrace else {
        return Vec::new();
    };
    let mut lines: Vec<_> = trace
        .frames
        .iter()
        .enumerate()
        .map(|(number, frame)| {
            let mut spans = vec![Span::styled(format!("#{number:<3}"), app.theme.faint())];
            match &frame.location {
                Some(location) => {
                    spans.push(Span::styled(location.to_string(), app.theme.name()));
                    spans.push(Span::styled(
                        format!("  {:#x}", frame.address),
                        app.theme.faint(),
                    ));
                }
                None => spans.push(Span::raw(format!("{:#x}", frame.address))),
            }
            Line::from(spans)
        })
        .collect();
    if trace.end != BacktraceEnd::Outermost {
        lines.push(Line::from(Span::styled(
            format!("({})", trace.end),
            app.theme.faint(),
        )));
    }
    lines
}
