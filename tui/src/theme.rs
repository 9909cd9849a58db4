//! Colours and marks.
//!
//! Purpose: every style in one place, by meaning.
//! Invariants: only the terminal's own foreground and background, bold, dim, reverse and underline, and the basic ANSI colours that can
//! be read on light and on dark; without colour nothing is lost, for each coloured thing is marked by a sign or weight as well.
//! Elsewhere: whether colour is wanted ([`crate::terminal`]).

use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::border;

/// How things look.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Theme {
    no_color: bool,
    ascii: bool,
}

const ASCII: border::Set<'static> = border::Set {
    top_left: "+",
    top_right: "+",
    bottom_left: "+",
    bottom_right: "+",
    vertical_left: "|",
    vertical_right: "|",
    horizontal_top: "-",
    horizontal_bottom: "-",
};

impl Theme {
    pub(crate) const fn new(no_color: bool, ascii: bool) -> Self {
        Self { no_color, ascii }
    }

    fn color(self, color: Color) -> Style {
        if self.no_color {
            Style::new()
        } else {
            Style::new().fg(color)
        }
    }

    /// A panel's frame.
    pub(crate) const fn border(self) -> border::Set<'static> {
        if self.ascii { ASCII } else { border::PLAIN }
    }

    /// The frame and title of the panel that has the keys.
    pub(crate) fn focused(self) -> Style {
        self.color(Color::Cyan).add_modifier(Modifier::BOLD)
    }

    /// The other frames and titles.
    pub(crate) const fn unfocused(self) -> Style {
        Style::new().add_modifier(Modifier::DIM)
    }

    /// Where the machine stands.
    pub(crate) const fn current(self) -> Style {
        Style::new().add_modifier(Modifier::REVERSED)
    }

    /// Where the cursor is.
    pub(crate) const fn cursor(self) -> Style {
        Style::new().add_modifier(Modifier::UNDERLINED)
    }

    /// Changed since the last stop.
    pub(crate) fn changed(self) -> Style {
        self.color(Color::Red).add_modifier(Modifier::BOLD)
    }

    /// A breakpoint's mark.
    pub(crate) fn breakpoint(self) -> Style {
        self.color(Color::Red).add_modifier(Modifier::BOLD)
    }

    /// Names: symbols, headings, keys.
    pub(crate) const fn name(self) -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    /// What matters less: bytes, what cannot be read, the future.
    pub(crate) const fn faint(self) -> Style {
        Style::new().add_modifier(Modifier::DIM)
    }

    /// Something went wrong.
    pub(crate) fn error(self) -> Style {
        self.color(Color::Red).add_modifier(Modifier::BOLD)
    }

    /// The machine is running.
    pub(crate) fn running(self) -> Style {
        self.color(Color::Green).add_modifier(Modifier::BOLD)
    }

    /// The bars at the top and the bottom.
    pub(crate) const fn bar(self) -> Style {
        Style::new().add_modifier(Modifier::REVERSED)
    }
}
