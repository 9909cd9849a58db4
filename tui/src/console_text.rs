//! The guest's console as lines of plain text.
//!
//! Purpose: turn what the guest wrote into lines that can be put on the user's terminal without doing anything to it.
//! Invariants: no control character and no escape sequence comes out; what is left out is either formatting (CSI and OSC sequences) or shown as U+FFFD. An
//! unfinished sequence swallows at most [`LONGEST_SEQUENCE`] characters, so that a panic message cannot be hidden behind one. Memory is
//! bounded by [`MAX_LINES`] lines of [`MAX_COLUMNS`] characters.
//! Elsewhere: wrapping and drawing ([`crate::panels::console`]).
//! Source: ECMA-48, 5.3, 5.4 and 8.3 (control functions); Unicode 16, 23.2 and 23.3 (invisible format controls).

use std::collections::VecDeque;

/// Older lines are dropped.
pub(crate) const MAX_LINES: usize = 10_000;
/// Longer lines continue on the next.
pub(crate) const MAX_COLUMNS: usize = 1_000;
/// An escape sequence longer than this many characters is none.
const LONGEST_SEQUENCE: usize = 256;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum State {
    #[default]
    Ground,
    /// After ESC.
    Escape,
    /// In a control sequence: parameters up to a final byte.
    Csi(usize),
    /// In a control string (OSC, DCS, APC, PM, SOS): up to BEL or ST.
    Text(usize),
    /// After an ESC in a control string.
    TextEscape(usize),
}

/// Lines made of a growing stream of bytes.
#[derive(Clone, Debug, Default)]
pub(crate) struct ConsoleText {
    lines: VecDeque<String>,
    /// The line being written, one character a column.
    current: Vec<char>,
    column: usize,
    state: State,
    /// Bytes taken so far.
    taken: usize,
    /// The beginning of a UTF-8 character whose rest has not come yet.
    partial: Vec<u8>,
}

impl ConsoleText {
    /// Takes in what is new in `all`, the whole output so far. Shorter output than before (time went back) starts over.
    pub(crate) fn update(&mut self, all: &[u8]) {
        if all.len() < self.taken {
            *self = Self::default();
        }
        let new = all.get(self.taken..).unwrap_or_default();
        self.taken = all.len();
        self.feed(new);
    }

    /// Starts over at the next update: what was shown may not have been this output's beginning.
    pub(crate) fn forget(&mut self) {
        *self = Self::default();
    }

    /// How many lines there are, an unfinished last one included.
    pub(crate) fn len(&self) -> usize {
        self.lines.len() + usize::from(!self.current.is_empty())
    }

    /// Line `index`, from the oldest kept.
    pub(crate) fn line(&self, index: usize) -> Option<String> {
        match self.lines.get(index) {
            Some(line) => Some(line.clone()),
            None => (index == self.lines.len()).then(|| self.current.iter().collect()),
        }
    }

    fn feed(&mut self, new: &[u8]) {
        let mut bytes = std::mem::take(&mut self.partial);
        bytes.extend_from_slice(new);
        let mut rest = bytes.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    text.chars().for_each(|c| self.character(c));
                    return;
                }
                Err(error) => {
                    let (valid, bad) = rest.split_at(error.valid_up_to());
                    let valid = String::from_utf8_lossy(valid);
                    valid.chars().for_each(|c| self.character(c));
                    let Some(len) = error.error_len() else {
                        self.partial = bad.to_vec();
                        return;
                    };
                    self.character(char::REPLACEMENT_CHARACTER);
                    rest = bad.get(len..).unwrap_or_default();
                }
            }
        }
    }

    fn character(&mut self, c: char) {
        self.state = match (self.state, c) {
            // A line end ends everything.
            (_, '\n') => {
                self.end_line();
                State::Ground
            }
            (State::Ground, '\x1b') => State::Escape,
            (State::Ground, '\u{9b}') => State::Csi(0),
            (State::Ground, _) => {
                self.print(c);
                State::Ground
            }
            (State::Escape, '[') => State::Csi(0),
            (State::Escape, ']' | 'P' | 'X' | '^' | '_') => State::Text(0),
            // Intermediate bytes of a sequence of two or three characters.
            (State::Escape, ' '..='/' | '\x1b') => State::Escape,
            (State::Escape, _) => State::Ground,
            (State::Csi(_), '\x1b') => State::Escape,
            (State::Csi(n), ' '..='?') if n < LONGEST_SEQUENCE => State::Csi(n + 1),
            (State::Csi(_), _) => State::Ground,
            (State::Text(_), '\x07' | '\u{9c}') => State::Ground,
            (State::Text(n) | State::TextEscape(n), '\x1b') => State::TextEscape(n),
            (State::TextEscape(_), '\\') => State::Ground,
            (State::Text(n) | State::TextEscape(n), _) if n < LONGEST_SEQUENCE => {
                State::Text(n + 1)
            }
            (State::Text(_) | State::TextEscape(_), _) => State::Ground,
        };
    }

    fn print(&mut self, c: char) {
        match c {
            '\r' => self.column = 0,
            '\x08' => self.column = self.column.saturating_sub(1),
            '\t' => {
                for _ in self.column % 8..8 {
                    self.put(' ');
                }
            }
            '\0' | '\x07' | '\x7f' => {}
            c if c.is_control() || is_invisible(c) => self.put(char::REPLACEMENT_CHARACTER),
            c => self.put(c),
        }
    }

    fn put(&mut self, c: char) {
        if self.column >= MAX_COLUMNS {
            self.end_line();
        }
        match self.current.get_mut(self.column) {
            Some(place) => *place = c,
            None => self.current.push(c),
        }
        self.column += 1;
    }

    fn end_line(&mut self) {
        let line: String = self.current.drain(..).collect();
        self.lines.push_back(line);
        if self.lines.len() > MAX_LINES {
            self.lines.pop_front();
        }
        self.column = 0;
    }
}

/// Characters that reorder or hide their neighbours.
fn is_invisible(c: char) -> bool {
    matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
        | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines(bytes: &[u8]) -> Vec<String> {
        let mut text = ConsoleText::default();
        text.update(bytes);
        (0..text.len())
            .filter_map(|index| text.line(index))
            .collect()
    }

    #[test]
    fn plain_lines_stay_as_they_are() {
        assert_eq!(lines(b"hello\r\nworld\n"), ["hello", "world"]);
        assert_eq!(lines(b"a\n\nb"), ["a", "", "b"]);
        assert_eq!(
            lines("gr\u{fc}n \u{2713}\n".as_bytes()),
            ["gr\u{fc}n \u{2713}"]
        );
    }

    #[test]
    fn carriage_return_backspace_and_tab_move() {
        assert_eq!(lines(b" 10%\r 20%\n"), [" 20%"]);
        assert_eq!(lines(b"ab\x08c\n"), ["ac"]);
        assert_eq!(lines(b"a\tb\n"), ["a       b"]);
    }

    #[test]
    fn escape_sequences_do_nothing() {
        assert_eq!(lines(b"\x1b[31mred\x1b[0m\n"), ["red"]);
        assert_eq!(lines(b"\x1b]0;title\x07x\x1b]52;c;aGk=\x1b\\y\n"), ["xy"]);
        assert_eq!(lines(b"\x1b(Ba\x1bcb\x1b[?1049hc\n"), ["abc"]);
        assert_eq!(lines("\u{9b}31mred\n".as_bytes()), ["red"]);
        assert_eq!(lines(b"bell\x07 nul\0 \x01\n"), ["bell nul \u{fffd}"]);
        assert_eq!(lines("\u{202e}evil\n".as_bytes()), ["\u{fffd}evil"]);
    }

    #[test]
    fn an_unfinished_sequence_hides_nothing_for_long() {
        let mut bytes = b"\x1b]never ends\npanic!\n".to_vec();
        assert_eq!(lines(&bytes), ["", "panic!"]);
        bytes = b"\x1bP".to_vec();
        bytes.extend([b'x'; 1000]);
        assert_eq!(lines(&bytes)[0].len(), 1000 - LONGEST_SEQUENCE - 1);
    }

    #[test]
    fn going_back_in_time_shortens_it() {
        let mut text = ConsoleText::default();
        text.update(b"one\ntwo\n");
        text.update(b"one\n");
        assert_eq!((text.len(), text.line(0)), (1, Some("one".to_owned())));
    }

    #[test]
    fn memory_is_bounded() {
        let mut text = ConsoleText::default();
        text.update(&[b'\n'; MAX_LINES + 50]);
        assert_eq!(text.len(), MAX_LINES);
        assert_eq!(lines(&[b'x'; 2 * MAX_COLUMNS + 1]).len(), 3);
    }

    proptest! {
        #[test]
        fn nothing_harmful_comes_out_however_it_comes_in(
            bytes in proptest::collection::vec(any::<u8>(), 0..400),
            cut in any::<prop::sample::Index>(),
        ) {
            let whole = lines(&bytes);
            prop_assert!(whole.iter().flat_map(|line| line.chars()).all(|c| !c.is_control()));
            let mut text = ConsoleText::default();
            text.update(&bytes[..cut.index(bytes.len() + 1)]);
            text.update(&bytes);
            let parts: Vec<_> = (0..text.len()).filter_map(|index| text.line(index)).collect();
            prop_assert_eq!(whole, parts);
        }
    }
}
