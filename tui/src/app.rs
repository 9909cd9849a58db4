//! The state of the UI.
//!
//! Purpose: everything between two frames: which panel has the keys, what is scrolled where, what the machine looked like at the last
//! stop and looks like now.
//! Invariants: reading the machine happens here ([`App::prepare`]) and nowhere while drawing; a machine that cannot be read gives an explanation
//! in place of its registers. Nothing here touches the terminal.
//! Elsewhere: keys ([`crate::keys`]), moving the machine ([`crate::jobs`]), drawing ([`crate::panels`]).

use crate::console_text::ConsoleText;
use crate::jobs::Job;
use crate::layout::{self, Screen, Wish};
use crate::listing::Listing;
use crate::panels;
use crate::prompts::{Overlay, Prompt};
use crate::theme::Theme;
use introspect::backtrace::{Backtrace, backtrace};
use introspect::disassembly::{Code, Disassembler, SetUpError, Syntax};
use introspect::exits::ExitReport;
use introspect::registers::{self, Item};
use introspect::symbols::Symbols;
use machine::debuggable::Debuggable;
use ratatui::layout::Rect;
use std::collections::BTreeSet;
use x86::{CpuState, GuestVirtAddr, VcpuId};

/// A panel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Panel {
    Disassembly,
    Registers,
    Console,
    Backtrace,
    Exits,
    Events,
}

impl Panel {
    /// In the order of Tab.
    pub(crate) const ALL: [Self; 6] = [
        Self::Disassembly,
        Self::Registers,
        Self::Console,
        Self::Backtrace,
        Self::Exits,
        Self::Events,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Disassembly => "disassembly",
            Self::Registers => "registers",
            Self::Console => "console",
            Self::Backtrace => "backtrace",
            Self::Exits => "exits",
            Self::Events => "events",
        }
    }

    /// The panel `by` places further in the order of Tab.
    pub(crate) fn next(self, by: usize) -> Self {
        let all = Self::ALL;
        all.get((self as usize + by) % all.len())
            .copied()
            .unwrap_or(self)
    }
}

/// What has the keys.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    /// The focused panel.
    Panels,
    /// A question in the status line.
    Prompt(Prompt),
    /// A text over the panels.
    Overlay(Overlay),
}

/// What the status line says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Message {
    pub(crate) text: String,
    pub(crate) error: bool,
}

/// The machine as it was read last.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub(crate) cpu: Result<CpuState, String>,
    pub(crate) items: Vec<Item>,
    /// As `items`: whether it differs from the last stop.
    pub(crate) changed: Vec<bool>,
    pub(crate) backtrace: Option<Backtrace>,
    pub(crate) exits: ExitReport,
}

/// The UI's state.
pub(crate) struct App<'s> {
    pub(crate) symbols: &'s Symbols,
    pub(crate) disassembler: Disassembler,
    pub(crate) theme: Theme,
    pub(crate) vcpu: VcpuId,
    /// The machine keeps its past.
    pub(crate) can_reverse: bool,
    pub(crate) focus: Panel,
    pub(crate) last_tab: Panel,
    pub(crate) zoom: bool,
    /// By [`Panel`]; lines from the top, of the console from the bottom.
    pub(crate) scroll: [usize; 6],
    /// The events panel shows the present moment wherever it goes.
    pub(crate) follow_events: bool,
    pub(crate) mode: Mode,
    /// The number typed before a key.
    pub(crate) count: Option<u64>,
    pub(crate) message: Option<Message>,
    pub(crate) job: Option<Job>,
    /// Why the machine must not be moved any more.
    pub(crate) failed: Option<String>,
    pub(crate) breakpoints: BTreeSet<GuestVirtAddr>,
    pub(crate) listing: Listing,
    pub(crate) console: ConsoleText,
    pub(crate) view: View,
    /// The registers at the last stop, to compare with.
    pub(crate) before: Vec<Item>,
    /// The machine moved since it was read.
    pub(crate) stale: bool,
    pub(crate) screen: Screen,
    pub(crate) quit: bool,
}

impl<'s> App<'s> {
    /// The UI's state on opening.
    pub(crate) fn new(
        machine: &mut dyn Debuggable,
        symbols: &'s Symbols,
        syntax: Syntax,
        theme: Theme,
    ) -> Result<Self, SetUpError> {
        let focus = Panel::Disassembly;
        let wish = Wish {
            focus,
            zoom: false,
            last_tab: Panel::Console,
        };
        let mut app = Self {
            symbols,
            disassembler: Disassembler::new(syntax)?,
            theme,
            vcpu: machine.vcpus().first().copied().unwrap_or(VcpuId::BOOT),
            can_reverse: machine.reverse().is_some(),
            focus,
            last_tab: wish.last_tab,
            zoom: false,
            scroll: [0; 6],
            follow_events: true,
            mode: Mode::Panels,
            count: None,
            message: None,
            job: None,
            failed: None,
            breakpoints: BTreeSet::new(),
            listing: Listing::default(),
            console: ConsoleText::default(),
            view: View {
                cpu: Err(String::new()),
                items: Vec::new(),
                changed: Vec::new(),
                backtrace: None,
                exits: ExitReport::of(machine.exits()),
            },
            before: Vec::new(),
            stale: true,
            screen: layout::screen(Rect::default(), wish),
            quit: false,
        };
        app.read(machine);
        app.before.clone_from(&app.view.items);
        app.show_rip();
        Ok(app)
    }

    /// Lays out a screen of size `area` and reads from the machine what it shows.
    pub(crate) fn prepare(&mut self, machine: &mut dyn Debuggable, area: Rect) {
        let wish = Wish {
            focus: self.focus,
            zoom: self.zoom,
            last_tab: self.last_tab,
        };
        self.screen = layout::screen(area, wish);
        if self.stale {
            self.read(machine);
        }
        let (_, rows) = self.screen.inner_size(Panel::Disassembly);
        if let Ok(cpu) = &self.view.cpu {
            let code = Code {
                cpu,
                memory: machine.memory(),
                symbols: self.symbols,
            };
            self.listing
                .build(&self.disassembler, &code, usize::from(rows));
        }
        if self.follow_events {
            let (_, height) = self.screen.inner_size(Panel::Events);
            let above = usize::from(height) / 2;
            self.scroll[Panel::Events as usize] =
                panels::present_row(machine).saturating_sub(above);
        }
        for panel in Panel::ALL {
            let (width, height) = self.screen.inner_size(panel);
            if height != 0 {
                let total = panels::total(self, machine, panel, usize::from(width));
                let most = total.saturating_sub(usize::from(height));
                let scroll = &mut self.scroll[panel as usize];
                *scroll = (*scroll).min(most);
            }
        }
    }

    /// Reads the machine.
    fn read(&mut self, machine: &mut dyn Debuggable) {
        self.stale = false;
        self.console.update(machine.console());
        self.view.exits = ExitReport::of(machine.exits());
        self.view.cpu = machine.cpu(self.vcpu).map_err(|error| error.to_string());
        let Ok(cpu) = &self.view.cpu else {
            self.view.items.clear();
            self.view.changed.clear();
            self.view.backtrace = None;
            return;
        };
        self.view.items = registers::items(cpu);
        self.view.changed = changes(&self.before, &self.view.items);
        self.view.backtrace = Some(backtrace(cpu, machine.memory(), self.symbols));
    }

    /// Reads a machine that has come to a stop, and shows where it stands.
    pub(crate) fn arrived(&mut self, machine: &mut dyn Debuggable) {
        self.read(machine);
        self.show_rip();
        self.follow_events = true;
    }

    /// Moves the disassembly to the next instruction.
    pub(crate) fn show_rip(&mut self) {
        if let Ok(cpu) = &self.view.cpu {
            self.listing.show(cpu.rip_linear());
        }
    }

    /// Gives `panel` the keys.
    pub(crate) fn set_focus(&mut self, panel: Panel) {
        self.focus = panel;
        if !matches!(panel, Panel::Disassembly | Panel::Registers) {
            self.last_tab = panel;
        }
    }

    pub(crate) fn say(&mut self, text: impl Into<String>) {
        self.message = Some(Message {
            text: text.into(),
            error: false,
        });
    }

    pub(crate) fn complain(&mut self, text: impl Into<String>) {
        self.message = Some(Message {
            text: text.into(),
            error: true,
        });
    }
}

/// Which of `items` differ from the one of that name in `before`; not those that another mode has under another name.
fn changes(before: &[Item], items: &[Item]) -> Vec<bool> {
    let differs = |item: &Item| {
        before
            .iter()
            .any(|old| old.name == item.name && old != item)
    };
    items.iter().map(differs).collect()
}
