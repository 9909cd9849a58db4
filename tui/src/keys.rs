//! What keys do.
//!
//! Purpose: a key press changes the UI's state, or becomes a [`Command`] for the machine.
//! Invariants: the machine is neither needed nor touched here; every key in every state does something defined.
//! Elsewhere: carrying commands out ([`crate::jobs`]); what the keys are called in the help text ([`crate::prompts`]).

use crate::app::{App, Mode, Panel};
use crate::prompts::{Overlay, Prompt, Question};
use crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

/// What a key asks of the machine, or needs the machine for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Command {
    Step(u64),
    Next(u64),
    Finish,
    Continue,
    RunToEnd,
    StepBack(u64),
    ContinueBack,
    Pause,
    /// Set or clear a breakpoint at the cursor.
    ToggleBreakpoint,
    /// Move the cursor in the disassembly by so many lines.
    MoveCursor(isize),
    /// A question was answered.
    Answer(Question, String),
    /// Stop the process, as Ctrl-Z does.
    Suspend,
}

/// More names are not shown for one to choose from.
const MOST_NAMES: usize = 40;

/// A longer number before a key is not taken.
const LARGEST_COUNT: u64 = 1_000_000_000_000;

impl App<'_> {
    /// Takes in one key.
    pub(crate) fn key(&mut self, key: KeyEvent) -> Option<Command> {
        if key.kind == KeyEventKind::Release {
            return None;
        }
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c') if control => {
                self.quit = true;
                return None;
            }
            KeyCode::Char('z') if control => return Some(Command::Suspend),
            _ => {}
        }
        if self.job.is_some() {
            self.quit = key.code == KeyCode::Char('q');
            return Some(Command::Pause);
        }
        match &mut self.mode {
            Mode::Overlay(_) => {
                self.overlay_key(key);
                None
            }
            Mode::Prompt(_) => self.prompt_key(key),
            Mode::Panels => {
                self.message = None;
                self.panel_key(key)
            }
        }
    }

    fn overlay_key(&mut self, key: KeyEvent) {
        let page = usize::from(self.screen.status.y).saturating_sub(6).max(1);
        let Mode::Overlay(overlay) = &mut self.mode else {
            return;
        };
        let last = overlay.lines.len().saturating_sub(1);
        overlay.top = match key.code {
            KeyCode::Up => overlay.top.saturating_sub(1),
            KeyCode::Down => overlay.top + 1,
            KeyCode::PageUp => overlay.top.saturating_sub(page),
            KeyCode::PageDown => overlay.top + page,
            KeyCode::Home => 0,
            KeyCode::End => last,
            _ => {
                self.mode = Mode::Panels;
                return;
            }
        }
        .min(last);
    }

    fn prompt_key(&mut self, key: KeyEvent) -> Option<Command> {
        let Mode::Prompt(prompt) = &mut self.mode else {
            return None;
        };
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        prompt.note.clear();
        match key.code {
            KeyCode::Tab if prompt.question != Question::Position => {
                prompt.complete(&self.symbols.complete(&prompt.answer, MOST_NAMES));
            }
            KeyCode::Enter => {
                let (question, answer) = (prompt.question, std::mem::take(&mut prompt.answer));
                self.mode = Mode::Panels;
                return (!answer.trim().is_empty()).then_some(Command::Answer(question, answer));
            }
            KeyCode::Esc => self.mode = Mode::Panels,
            KeyCode::Backspace => {
                prompt.answer.pop();
            }
            KeyCode::Char('u') if control => prompt.answer.clear(),
            KeyCode::Char(c) if !control => prompt.type_char(c),
            _ => {}
        }
        None
    }

    fn panel_key(&mut self, key: KeyEvent) -> Option<Command> {
        let shift = key.modifiers.contains(KeyModifiers::SHIFT);
        if let KeyCode::Char(digit @ '0'..='9') = key.code {
            let digit = u64::from(digit) - u64::from('0');
            let count = self
                .count
                .unwrap_or(0)
                .saturating_mul(10)
                .saturating_add(digit);
            self.count = Some(count.min(LARGEST_COUNT));
            return None;
        }
        let count = self.count.take().unwrap_or(1).max(1);
        match key.code {
            KeyCode::Char('s') => Some(Command::Step(count)),
            KeyCode::F(7) if !shift => Some(Command::Step(count)),
            KeyCode::Char('S') | KeyCode::F(7 | 19) => Some(Command::StepBack(count)),
            KeyCode::Char('n') | KeyCode::F(8) => Some(Command::Next(count)),
            KeyCode::Char('f') => Some(Command::Finish),
            KeyCode::Char('c') => Some(Command::Continue),
            KeyCode::F(5) if !shift => Some(Command::Continue),
            KeyCode::Char('C') | KeyCode::F(5 | 17) => Some(Command::ContinueBack),
            KeyCode::Char('G') => Some(Command::RunToEnd),
            KeyCode::Char('b') => Some(Command::ToggleBreakpoint),
            KeyCode::Char('B') => self.ask(Question::Breakpoint),
            KeyCode::Char('g') => self.ask(Question::Goto),
            KeyCode::Char('t') => self.ask(Question::Position),
            KeyCode::Char('w') => self.ask(Question::Walk),
            KeyCode::Char('x') => self.ask(Question::Memory),
            _ => self.looking_key(key.code, count),
        }
    }

    /// Keys that change only what is looked at.
    fn looking_key(&mut self, code: KeyCode, count: u64) -> Option<Command> {
        let panels = Panel::ALL.len();
        let by = (count % panels as u64) as usize;
        match code {
            KeyCode::Char('q') => self.quit = true,
            KeyCode::Char('?') | KeyCode::F(1) => {
                self.mode = Mode::Overlay(Overlay::help(self.can_reverse));
            }
            KeyCode::Char('z') => self.zoom = !self.zoom,
            KeyCode::Char('.') => self.show_rip(),
            KeyCode::Tab => self.set_focus(self.focus.next(by)),
            KeyCode::BackTab => self.set_focus(self.focus.next(panels - by)),
            _ => return self.scroll_key(code, count),
        }
        None
    }

    fn ask(&mut self, question: Question) -> Option<Command> {
        self.mode = Mode::Prompt(Prompt::new(question));
        None
    }

    fn scroll_key(&mut self, code: KeyCode, count: u64) -> Option<Command> {
        // More lines than this no panel has.
        const FAR: isize = 1 << 30;
        let (_, height) = self.screen.inner_size(self.focus);
        let page = (height as isize - 1).max(1);
        let count = isize::try_from(count.min(4096)).unwrap_or(1);
        let down = match code {
            KeyCode::Up | KeyCode::Char('k') => -count,
            KeyCode::Down | KeyCode::Char('j') => count,
            KeyCode::PageUp => -page.saturating_mul(count),
            KeyCode::PageDown => page.saturating_mul(count),
            KeyCode::Home => -FAR,
            KeyCode::End => FAR,
            _ => return None,
        };
        if self.focus == Panel::Disassembly {
            return self.code_key(code, down);
        }
        if self.focus == Panel::Events {
            self.follow_events = false;
        }
        // The console counts from its end.
        let down = if self.focus == Panel::Console {
            -down
        } else {
            down
        };
        let scroll = &mut self.scroll[self.focus as usize];
        *scroll = scroll.saturating_add_signed(down);
        None
    }
    /// Code has no first and last line: Home is the start of the function, End the next instruction.
    fn code_key(&mut self, code: KeyCode, down: isize) -> Option<Command> {
        match code {
            KeyCode::Home => {
                if let Some(location) = self.symbols.lookup(self.listing.cursor()) {
                    self.listing.show(location.symbol.start);
                }
                None
            }
            KeyCode::End => {
                self.show_rip();
                None
            }
            _ => Some(Command::MoveCursor(down)),
        }
    }
}
