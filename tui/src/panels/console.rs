//! The guest's console.
//!
//! Purpose: the last lines the guest wrote, wrapped to the panel's width.
//! Elsewhere: making its bytes harmless ([`crate::console_text`]).

use crate::app::App;
use ratatui::text::{Line, Span};
use std::ops::Range;

/// How many rows the console takes at this width.
pub(super) fn total(app: &App<'_>, width: usize) -> usize {
    (0..app.console.len())
        .filter_map(|index| app.console.line(index))
        .map(|line| rows_of(&line, width))
        .sum()
}

/// The rows in `range`, counted from the oldest line kept.
pub(super) fn lines(app: &App<'_>, width: usize, range: Range<usize>) -> Vec<Line<'static>> {
    let mut rows = Vec::new();
    let mut at = 0;
    for index in 0..app.console.len() {
        let Some(line) = app.console.line(index) else {
            break;
        };
        let count = rows_of(&line, width);
        if at + count > range.start {
            let first = range.start.saturating_sub(at);
            rows.extend(
                wrapped(&line, width)
                    .into_iter()
                    .skip(first)
                    .map(Line::from),
            );
        }
        at += count;
        if at >= range.end {
            break;
        }
    }
    rows.truncate(range.len());
    rows
}

fn rows_of(line: &str, width: usize) -> usize {
    if line.is_ascii() {
        line.len().div_ceil(width.max(1)).max(1)
    } else {
        wrapped(line, width).len()
    }
}

fn wrapped(line: &str, width: usize) -> Vec<String> {
    let mut rows = vec![String::new()];
    let mut column = 0;
    let mut buffer = [0; 4];
    for c in line.chars() {
        let columns = if c.is_ascii() {
            1
        } else {
            Span::raw(&*c.encode_utf8(&mut buffer)).width()
        };
        if column + columns > width.max(1) && column > 0 {
            rows.push(String::new());
            column = 0;
        }
        if let Some(row) = rows.last_mut() {
            row.push(c);
        }
        column += columns;
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_wrap_at_the_width() {
        assert_eq!(wrapped("abcdef", 4), ["abcd", "ef"]);
        assert_eq!(wrapped("", 4), [""]);
        assert_eq!(
            wrapped("ab", 0),
            ["a", "b"],
            "no width is treated as one column"
        );
        assert_eq!(
            wrapped("a\u{4e2d}\u{6587}b", 3),
            ["a\u{4e2d}", "\u{6587}b"],
            "wide characters"
        );
        for line in ["", "abcd", "abcde", "\u{4e2d}\u{6587}"] {
            assert_eq!(rows_of(line, 4), wrapped(line, 4).len(), "{line}");
        }
    }
}
