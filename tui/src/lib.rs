//! The terminal UI over a live machine or a timeline.
//!
//! Purpose: one full screen from which a stopped guest is looked at and moved: console, registers, disassembly, exits, recorded
//! events, call chain.
//! Invariants: the machine is known only as [`machine::debuggable::Debuggable`]; no engine, no trace file. The terminal is put back as it was on every
//! way out: quitting, errors, panics and signals. What the guest wrote never reaches the terminal as control characters.
//! Elsewhere: what is shown (`introspect`), who executes (`machine` and the engines), gdb (`gdb-bridge`).
//!
//! The parts: `app` holds the state, `keys` changes it, `jobs` moves the machine, `layout` and `panels` draw, `terminal` owns the
//! terminal.

mod app;
mod console_text;
mod jobs;
mod keys;
mod layout;
mod listing;
mod panels;
mod prompts;
mod terminal;
mod theme;

use app::App;
use introspect::disassembly::{SetUpError, Syntax};
use introspect::symbols::Symbols;
use machine::debuggable::Debuggable;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use theme::Theme;

/// How the screen is set up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Options {
    /// How instructions are written.
    pub syntax: Syntax,
    /// No colours; also when the environment variable `NO_COLOR` is set and not empty.
    pub no_color: bool,
    /// Frames of `+`, `-` and `|`; also when the locale is not UTF-8.
    pub ascii: bool,
}

/// Why the UI ended other than by quitting.
#[derive(Debug, thiserror::Error)]
pub enum TuiError {
    /// Standard input or output is something else.
    #[error(
        "the terminal UI needs a terminal as standard input and output; \
         use `replay --gdb` or print one screen as text instead"
    )]
    NotATerminal,
    /// The terminal failed.
    #[error("the terminal failed while {what}: {source}")]
    Terminal {
        /// What was being done.
        what: &'static str,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// No disassembler.
    #[error(transparent)]
    Disassembler(#[from] SetUpError),
    /// A signal asked it to end; the terminal is as it was.
    #[error("ended by signal {0}")]
    Signal(i32),
}

/// Opens the UI on the terminal and returns when the user quits; `machine` then stands where the user left it.
pub fn run(
    machine: &mut dyn Debuggable,
    symbols: &Symbols,
    options: Options,
) -> Result<(), TuiError> {
    let theme = Theme::new(
        options.no_color || terminal::no_color_wanted(),
        options.ascii || !terminal::locale_is_utf8(),
    );
    let app = App::new(machine, symbols, options.syntax, theme)?;
    terminal::run(machine, app)
}

/// One screen of `width` by `height` characters as text, lines without trailing blanks: for documents, and where there is no terminal.
pub fn render_text(
    machine: &mut dyn Debuggable,
    symbols: &Symbols,
    width: u16,
    height: u16,
) -> Result<String, TuiError> {
    let mut app = App::new(machine, symbols, Syntax::Intel, Theme::new(true, false))?;
    Ok(text(&render(machine, &mut app, width, height)))
}

/// One frame in memory.
fn render(machine: &mut dyn Debuggable, app: &mut App<'_>, width: u16, height: u16) -> Buffer {
    let Ok(mut terminal) = Terminal::new(TestBackend::new(width, height));
    app.prepare(machine, terminal.get_frame().area());
    let Ok(_) = terminal.draw(|frame| panels::draw(frame, app, machine));
    terminal.backend().buffer().clone()
}

fn text(buffer: &Buffer) -> String {
    let mut text = String::new();
    for y in 0..buffer.area.height {
        let row: String = (0..buffer.area.width)
            .filter_map(|x| buffer.cell((x, y)))
            .map(ratatui::buffer::Cell::symbol)
            .collect();
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests;
