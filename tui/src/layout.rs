//! Where the panels are.
//!
//! Purpose: a screen's size becomes rectangles: all panels side by side on a large one, some sharing a place on a smaller one, the focused
//! one alone where nothing else fits.
//! Invariants: rectangles lie inside the area and do not overlap; the focused panel is always visible. Pure.
//! Elsewhere: what is in them ([`crate::panels`]).

use crate::app::Panel;
use ratatui::layout::Rect;

/// A frame on the screen: the panels that share it, and which of them it shows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Place {
    pub(crate) area: Rect,
    pub(crate) tabs: Vec<Panel>,
    pub(crate) shown: Panel,
}

/// The whole screen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Screen {
    /// One line: what machine, where it stands.
    pub(crate) title: Rect,
    /// The panels.
    pub(crate) places: Vec<Place>,
    /// One line: keys, messages, prompts.
    pub(crate) status: Rect,
}

impl Screen {
    /// The place that shows `panel`.
    pub(crate) fn place(&self, panel: Panel) -> Option<&Place> {
        self.places.iter().find(|place| place.shown == panel)
    }

    /// How many lines of `panel` are visible, and how wide they are; 0 when it is hidden.
    pub(crate) fn inner_size(&self, panel: Panel) -> (u16, u16) {
        self.place(panel).map_or((0, 0), |place| {
            (
                place.area.width.saturating_sub(2),
                place.area.height.saturating_sub(2),
            )
        })
    }
}

/// What decides besides the size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Wish {
    /// The panel that has the keys.
    pub(crate) focus: Panel,
    /// It alone.
    pub(crate) zoom: bool,
    /// The panel last looked at among those that may share a place, when the focus is on none of them.
    pub(crate) last_tab: Panel,
}

/// Lays out a screen of size `area`.
pub(crate) fn screen(area: Rect, wish: Wish) -> Screen {
    let row = |y, height| Rect {
        x: area.x,
        y,
        width: area.width,
        height,
    };
    let title = row(area.y, area.height.min(1));
    let status = row(
        area.bottom().saturating_sub(1).max(area.y),
        u16::from(area.height > 1),
    );
    let body = row(area.y + title.height, area.height.saturating_sub(2));
    let places = if wish.zoom || body.width < 60 || body.height < 12 {
        alone(body, wish)
    } else if body.width < 110 {
        narrow(body, wish)
    } else if body.width < 160 || body.height < 36 {
        medium(body, wish)
    } else {
        wide(body, wish)
    };
    Screen {
        title,
        places,
        status,
    }
}

fn alone(body: Rect, wish: Wish) -> Vec<Place> {
    vec![Place {
        area: body,
        tabs: Panel::ALL.to_vec(),
        shown: wish.focus,
    }]
}

/// 80x24: code and a shared place at the left, one column of registers at the right.
fn narrow(body: Rect, wish: Wish) -> Vec<Place> {
    let (left, right) = columns(body, body.width.saturating_sub(29));
    if body.height >= 36 {
        let (code, below) = rows(left, left.height * 2 / 5);
        let (console, shared) = rows(below, below.height / 2);
        return vec![
            only(code, Panel::Disassembly),
            only(right, Panel::Registers),
            only(console, Panel::Console),
            tabs(
                shared,
                &[Panel::Backtrace, Panel::Exits, Panel::Events],
                wish,
            ),
        ];
    }
    let (code, shared) = rows(left, left.height.div_ceil(2));
    vec![
        only(code, Panel::Disassembly),
        only(right, Panel::Registers),
        tabs(
            shared,
            &[
                Panel::Console,
                Panel::Backtrace,
                Panel::Exits,
                Panel::Events,
            ],
            wish,
        ),
    ]
}

/// 120x40: code over console at the left, registers over a shared place at the right.
fn medium(body: Rect, wish: Wish) -> Vec<Place> {
    let right_width = (body.width * 2 / 5).max(46);
    let (left, right) = columns(body, body.width.saturating_sub(right_width));
    let (code, console) = rows(left, left.height * 11 / 20);
    let (registers, shared) = rows(right, right.height * 11 / 20);
    vec![
        only(code, Panel::Disassembly),
        only(registers, Panel::Registers),
        only(console, Panel::Console),
        tabs(
            shared,
            &[Panel::Backtrace, Panel::Exits, Panel::Events],
            wish,
        ),
    ]
}

/// 200x60: everything.
fn wide(body: Rect, _: Wish) -> Vec<Place> {
    let right_width = (body.width * 3 / 10).max(46);
    let (rest, right) = columns(body, body.width.saturating_sub(right_width));
    let (left, middle) = columns(rest, rest.width.saturating_sub((body.width / 4).max(46)));
    let (code, console) = rows(left, left.height * 11 / 20);
    let (registers, backtrace) = rows(middle, middle.height * 11 / 20);
    let (exits, events) = rows(right, right.height * 9 / 20);
    vec![
        only(code, Panel::Disassembly),
        only(registers, Panel::Registers),
        only(console, Panel::Console),
        only(backtrace, Panel::Backtrace),
        only(exits, Panel::Exits),
        only(events, Panel::Events),
    ]
}

fn only(area: Rect, panel: Panel) -> Place {
    Place {
        area,
        tabs: vec![panel],
        shown: panel,
    }
}

fn tabs(area: Rect, panels: &[Panel], wish: Wish) -> Place {
    let shown = [wish.focus, wish.last_tab]
        .into_iter()
        .find(|panel| panels.contains(panel))
        .or(panels.first().copied())
        .unwrap_or(wish.focus);
    Place {
        area,
        tabs: panels.to_vec(),
        shown,
    }
}

fn columns(area: Rect, left: u16) -> (Rect, Rect) {
    let left = left.min(area.width);
    (
        Rect {
            width: left,
            ..area
        },
        Rect {
            x: area.x + left,
            width: area.width - left,
            ..area
        },
    )
}

fn rows(area: Rect, top: u16) -> (Rect, Rect) {
    let top = top.min(area.height);
    (
        Rect {
            height: top,
            ..area
        },
        Rect {
            y: area.y + top,
            height: area.height - top,
            ..area
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn wish(focus: Panel, zoom: bool) -> Wish {
        Wish {
            focus,
            zoom,
            last_tab: Panel::Exits,
        }
    }

    #[test]
    fn a_large_screen_shows_every_panel() {
        let screen = screen(Rect::new(0, 0, 200, 60), wish(Panel::Console, false));
        for panel in Panel::ALL {
            assert!(screen.place(panel).is_some(), "{panel:?}");
        }
    }

    #[test]
    fn a_shared_place_shows_the_focused_panel_or_the_last_one() {
        let area = Rect::new(0, 0, 80, 24);
        assert!(
            screen(area, wish(Panel::Events, false))
                .place(Panel::Events)
                .is_some()
        );
        assert!(
            screen(area, wish(Panel::Registers, false))
                .place(Panel::Exits)
                .is_some()
        );
        assert_eq!(
            screen(area, wish(Panel::Registers, true)).places.len(),
            1,
            "zoomed"
        );
    }

    proptest! {
        #[test]
        fn places_are_disjoint_and_inside(
            width in 0u16..400, height in 0u16..200, focus in 0usize..6, zoom in any::<bool>(),
        ) {
            let area = Rect::new(0, 0, width, height);
            let focus = Panel::ALL[focus];
            let screen = screen(area, wish(focus, zoom));
            let mut seen = vec![screen.title, screen.status];
            seen.extend(screen.places.iter().map(|place| place.area));
            for (index, rect) in seen.iter().enumerate() {
                prop_assert_eq!(rect.intersection(area), *rect);
                for other in &seen[index + 1..] {
                    prop_assert!(!rect.intersects(*other) || rect.is_empty() || other.is_empty());
                }
            }
            prop_assert!(screen.place(focus).is_some());
        }
    }
}
