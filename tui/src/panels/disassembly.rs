//! Disassembly around the next instruction.
//!
//! Purpose: addresses, bytes where there is room, instructions, and the symbols they name; marks for breakpoints, the next instruction and the cursor.
//! Elsewhere: which lines ([`crate::listing`]); decoding ([`introspect::disassembly`]).

use crate::app::{App, Panel};
use crate::listing::Row;
use introspect::disassembly::{Content, Line as Code, Target};
use ratatui::style::Style;
use ratatui::text::{Line, Span};

/// The function the cursor is in, for the frame's heading.
pub(super) fn function(app: &App<'_>) -> Option<String> {
    app.symbols
        .lookup(app.listing.cursor())
        .map(|location| location.symbol.name)
}

/// The rows of the panel.
pub(super) fn lines(app: &App<'_>, width: usize) -> Vec<Line<'static>> {
    let rows = app.listing.rows();
    if let (Err(error), true) = (&app.view.cpu, rows.is_empty()) {
        return vec![Line::from(Span::styled(error.clone(), app.theme.error()))];
    }
    let codes = || {
        rows.iter().filter_map(|row| match row {
            Row::Code(code) => Some(code),
            Row::Name(_) => None,
        })
    };
    let digits = codes()
        .map(|code| format!("{:x}", code.address.get()).len())
        .max()
        .unwrap_or(0);
    let most = codes().map(|code| code.bytes.len()).max().unwrap_or(0);
    let columns = Columns {
        digits,
        // Bytes only where instructions keep most of the room.
        bytes: if width >= 72 + digits {
            3 * most.clamp(7, 10)
        } else {
            0
        },
        width,
    };
    rows.iter()
        .map(|row| match row {
            Row::Name(name) => Line::from(Span::styled(format!("{name}:"), app.theme.name())),
            Row::Code(code) => line(app, code, columns),
        })
        .collect()
}

/// Widths of the columns.
#[derive(Clone, Copy)]
struct Columns {
    digits: usize,
    bytes: usize,
    width: usize,
}

fn line(app: &App<'_>, code: &Code, columns: Columns) -> Line<'static> {
    let theme = app.theme;
    let current = app
        .view
        .cpu
        .as_ref()
        .is_ok_and(|cpu| cpu.rip_linear() == code.address);
    let cursor = app.listing.cursor() == code.address && app.focus == Panel::Disassembly;
    let breakpoint = app.breakpoints.contains(&code.address);
    let mut base = Style::new();
    if current {
        base = base.patch(theme.current());
    }
    if cursor {
        base = base.patch(theme.cursor());
    }
    let text = match &code.content {
        Content::Instruction { mnemonic, operands } => format!("{mnemonic:<7} {operands}"),
        _ => code.text(),
    };
    let text_style = match code.content {
        Content::Instruction { .. } => base,
        _ => base.patch(theme.faint()),
    };
    let mut bytes = code.bytes_text();
    if bytes.len() >= columns.bytes && columns.bytes > 3 {
        bytes.truncate(columns.bytes - 3);
        bytes.push('+');
    }
    let mut spans = vec![
        Span::styled(
            if breakpoint { "*" } else { " " },
            base.patch(theme.breakpoint()),
        ),
        Span::styled(if current { ">" } else { " " }, base),
        Span::styled(
            format!("{:0w$x}  ", code.address.get(), w = columns.digits),
            base.patch(theme.faint()),
        ),
    ];
    if columns.bytes > 0 {
        let bytes = format!("{bytes:<w$} ", w = columns.bytes);
        spans.push(Span::styled(bytes, base.patch(theme.faint())));
    }
    spans.push(Span::styled(text.trim_end().to_owned(), text_style));
    if let Some(Target {
        symbol: Some(symbol),
        ..
    }) = &code.target
    {
        spans.push(Span::styled(
            format!("  <{symbol}>"),
            base.patch(theme.name()),
        ));
    }
    let used: usize = spans.iter().map(Span::width).sum();
    // The mark of the next instruction goes to the panel's edge.
    spans.push(Span::styled(
        " ".repeat(columns.width.saturating_sub(used)),
        base,
    ));
    Line::from(spans)
}
