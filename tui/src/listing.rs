//! The part of the guest's code that is on the screen.
//!
//! Purpose: which lines of disassembly are shown, and the cursor among them.
//! Invariants: after [`Listing::build`] the cursor's line is visible if there is room for a line at all. Code is moved as little as possible from one frame to the
//! next, so that stepping does not make it jump.
//! Elsewhere: decoding ([`introspect::disassembly`]); drawing ([`crate::panels::disassembly`]).

use introspect::disassembly::{Code, Disassembler, Line};
use x86::GuestVirtAddr;

/// A row of the disassembly panel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Row {
    /// The name of the symbol that starts on the next row.
    Name(String),
    /// An instruction, or what stands in place of one.
    Code(Line),
}

/// What the disassembly panel shows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Listing {
    top: GuestVirtAddr,
    cursor: GuestVirtAddr,
    /// The cursor went somewhere else: show what is around it.
    jumped: bool,
    rows: Vec<Row>,
}

impl Listing {
    /// The address of the line with the cursor.
    pub(crate) fn cursor(&self) -> GuestVirtAddr {
        self.cursor
    }

    /// The rows to draw.
    pub(crate) fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Puts the cursor on `addr`.
    pub(crate) fn show(&mut self, addr: GuestVirtAddr) {
        self.cursor = addr;
        self.jumped = true;
    }

    /// Fills `height` rows.
    pub(crate) fn build(&mut self, disassembler: &Disassembler, code: &Code<'_>, height: usize) {
        if height == 0 {
            self.rows.clear();
            return;
        }
        self.rows = rows(disassembler, code, self.top, height);
        if self.shows_cursor() {
            self.jumped = false;
            return;
        }
        let above = if self.jumped { height / 3 } else { height - 1 };
        let nearby = self.cursor > self.top || self.jumped;
        // Names take rows too; fewer instructions above the cursor then.
        for above in (1..=above).rev().filter(|_| nearby) {
            let mut before = disassembler.before(code, self.cursor, above);
            if let (Some(symbol), true) = (code.symbols.lookup(self.cursor), self.jumped) {
                // Not what lies before the function: often padding, or no code at all.
                before.retain(|line| line.address >= symbol.symbol.start);
            }
            let Some(first) = before.first() else { break };
            self.top = first.address;
            self.rows = rows(disassembler, code, self.top, height);
            if self.shows_cursor() {
                self.jumped = false;
                return;
            }
        }
        self.jumped = false;
        self.top = self.cursor;
        self.rows = rows(disassembler, code, self.top, height);
    }

    /// Moves the cursor down by `by` lines, up if negative.
    pub(crate) fn move_cursor(&mut self, disassembler: &Disassembler, code: &Code<'_>, by: isize) {
        let count = by.unsigned_abs();
        let lines = if by < 0 {
            disassembler.before(code, self.cursor, count)
        } else {
            let mut lines = disassembler.disassemble(code, self.cursor, count + 1);
            lines.reverse();
            lines
        };
        if let Some(line) = lines.first() {
            self.cursor = line.address;
        }
    }

    fn shows_cursor(&self) -> bool {
        self.rows
            .iter()
            .any(|row| matches!(row, Row::Code(line) if line.address == self.cursor))
    }
}

fn rows(
    disassembler: &Disassembler,
    code: &Code<'_>,
    top: GuestVirtAddr,
    height: usize,
) -> Vec<Row> {
    let mut rows = Vec::new();
    for line in disassembler.disassemble(code, top, height) {
        if let (Some(symbol), true) = (&line.symbol, height > 3)
            && symbol.offset == 0
        {
            rows.push(Row::Name(symbol.symbol.name.clone()));
        }
        rows.push(Row::Code(line));
    }
    rows.truncate(height);
    rows
}
