//! Questions in the status line, and texts over the panels.
//!
//! Purpose: the line being typed and what it is for; a titled text that covers the panels until a key closes it.
//! Invariants: what is typed is bounded; a text is made once and scrolls within its length.
//! Elsewhere: keys ([`crate::keys`]); what an answer does ([`crate::jobs`]).

/// What is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Question {
    /// Where to show code.
    Goto,
    /// Where to set or clear a breakpoint.
    Breakpoint,
    /// Whose translation to explain.
    Walk,
    /// Where to show memory.
    Memory,
    /// Where on the timeline to go.
    Position,
}

impl Question {
    pub(crate) const fn text(self) -> &'static str {
        match self {
            Self::Goto => "show code at (symbol or address): ",
            Self::Breakpoint => "breakpoint at (symbol or address): ",
            Self::Walk => "explain the translation of (symbol or address): ",
            Self::Memory => "show memory at (symbol or address): ",
            Self::Position => "go to position (12345) or event (#7): ",
        }
    }
}

/// More than this is not taken.
const LONGEST_ANSWER: usize = 256;

/// A question and the answer typed so far.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Prompt {
    pub(crate) question: Question,
    pub(crate) answer: String,
    /// What Tab found.
    pub(crate) note: String,
}

impl Prompt {
    pub(crate) const fn new(question: Question) -> Self {
        Self {
            question,
            answer: String::new(),
            note: String::new(),
        }
    }

    /// Completes the answer as far as all of `names` agree, and shows them when they are several.
    pub(crate) fn complete(&mut self, names: &[String]) {
        let Some(first) = names.first() else {
            self.note = "no such symbol".to_owned();
            return;
        };
        let common = names
            .iter()
            .fold(first.as_str(), |common, name| common_start(common, name));
        if common.starts_with(&self.answer) || names.len() == 1 {
            self.answer = common.to_owned();
        }
        self.note = if names.len() == 1 {
            String::new()
        } else {
            names.join(" ")
        };
    }

    pub(crate) fn type_char(&mut self, c: char) {
        if self.answer.chars().count() < LONGEST_ANSWER && !c.is_control() {
            self.answer.push(c);
        }
    }
}

fn common_start<'a>(one: &'a str, other: &str) -> &'a str {
    let same = one.chars().zip(other.chars()).take_while(|(a, b)| a == b);
    let len = same.map(|(a, _)| a.len_utf8()).sum();
    one.get(..len).unwrap_or_default()
}

/// A text over the panels.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Overlay {
    pub(crate) title: String,
    pub(crate) lines: Vec<String>,
    /// The first line shown.
    pub(crate) top: usize,
}

impl Overlay {
    pub(crate) fn new(title: impl Into<String>, lines: Vec<String>) -> Self {
        Self {
            title: title.into(),
            lines,
            top: 0,
        }
    }

    /// The keys.
    pub(crate) fn help(can_reverse: bool) -> Self {
        let back = if can_reverse {
            ""
        } else {
            " (this machine keeps no past)"
        };
        let text = format!(
            "\
Moving the machine
  s  F7         step one instruction; 100s steps a hundred
  n  F8         step over a call
  f             run until this function returns
  c  F5         continue to the next breakpoint
  G             run to the end, past breakpoints
  p  any key    pause
Through time{back}
  S  Shift-F7   step back
  C  Shift-F5   continue back to the last breakpoint
  t             go to a position or a recorded event, back or forward
Breakpoints
  b             set or clear one at the cursor in the disassembly
  B             set or clear one at a symbol or an address
Looking
  Tab Shift-Tab the next or last panel; 2 Tab skips one
  arrows PgUp PgDn Home End
                move in the panel
  z             the panel alone, or all of them again
  g             show the code at a symbol or an address (Tab completes)
  .             show the next instruction again
  w             explain how an address is translated
  x             show memory
  ?             this text
  q  Ctrl-C     quit

Marks: * breakpoint, > next instruction, ! changed since the last stop;
events: sync 7 at the seventh sync point, sync 7+ later than that.
Press any key to go on."
        );
        Self::new("help", text.lines().map(str::to_owned).collect())
    }
}
