//! Divergences: where and how a replay left its recording.
//!
//! Purpose: name the first interval known to be bad, the position, and what differs there, for people and as data.
//! Invariants: a divergence is about the replay, never about the file: a damaged file is a [`crate::trace::TraceError`].
//! Elsewhere: who finds them ([`crate::replayer`]).

use crate::trace::{Landmark, PageDigest};
use machine::End;
use machine::environment::SyncOrdinal;
use serde::Serialize;
use std::fmt;
use x86::{Gpr, PageFrame, Position, Registers};

/// A place in a replay.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Mark {
    /// Sync points passed.
    pub after: SyncOrdinal,
    /// Where, on an engine that counts.
    pub position: Option<Position>,
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sync point {}", self.after)?;
        match self.position {
            Some(position) => write!(f, " (position {position})"),
            None => Ok(()),
        }
    }
}

/// A replay left its recording.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Divergence {
    /// The last place where the two were seen to agree.
    pub since: Mark,
    /// Where it was noticed.
    pub at: Mark,
    /// What differs.
    pub what: Difference,
}

impl std::error::Error for Divergence {}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { since, at, what } = self;
        write!(
            f,
            "the replay left the recording between {since} and {at}: {what}"
        )
    }
}

/// What differs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Difference {
    /// The guest went on without what the recording has next.
    Missed {
        /// What the recording has next.
        expected: String,
        /// What happened instead.
        instead: String,
    },
    /// The guest asked for something where the recording has something else.
    Unexpected {
        /// What it asked for.
        asked: String,
        /// What the recording has next.
        expected: String,
    },
    /// No boundary before the next sync point matched a landmark.
    NoLandmark(Box<LandmarkMiss>),
    /// The guest passed the position of an arrival without stopping at it.
    PassedPosition {
        /// The position.
        recorded: Position,
    },
    /// CPU, memory or history differ at a digest.
    State(Box<StateDifference>),
    /// The guest sleeps, and nothing recorded here wakes it.
    Asleep {
        /// What the recording has next.
        expected: String,
    },
    /// The guest ran much longer than the recording took to what it has next.
    Overdue {
        /// What the recording has next.
        expected: String,
        /// Instructions executed in vain.
        instructions: u64,
    },
    /// The guest goes on past the place where the recording ended.
    PastEnd {
        /// How the recording ended.
        recorded: End,
        /// What happened instead.
        instead: String,
    },
    /// The guest ended while the recording goes on.
    EndedEarly {
        /// How it ended.
        replayed: End,
        /// What the recording has next.
        expected: String,
    },
    /// It ended in another way.
    OtherEnd {
        /// How the recording ended.
        recorded: End,
        /// How the replay did.
        replayed: End,
    },
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missed { expected, instead } => {
                write!(
                    f,
                    "the recording has {expected}, but the guest went on to {instead}"
                )
            }
            Self::Unexpected { asked, expected } => {
                write!(f, "the guest {asked}, but the recording has {expected}")
            }
            Self::NoLandmark(miss) => miss.fmt(f),
            Self::PassedPosition { recorded } => {
                write!(
                    f,
                    "the guest passed position {recorded}, where something arrived, without stopping at it"
                )
            }
            Self::State(difference) => difference.fmt(f),
            Self::Asleep { expected } => {
                write!(
                    f,
                    "the guest sleeps and nothing recorded wakes it; the recording has {expected}"
                )
            }
            Self::Overdue {
                expected,
                instructions,
            } => {
                write!(
                    f,
                    "the recording has {expected}, and the guest has not come there in {instructions} instructions"
                )
            }
            Self::PastEnd { recorded, instead } => {
                write!(
                    f,
                    "the recording ended here ({recorded}), but the guest went on to {instead}"
                )
            }
            Self::EndedEarly { replayed, expected } => {
                write!(
                    f,
                    "the guest ended ({replayed}), but the recording has {expected}"
                )
            }
            Self::OtherEnd { recorded, replayed } => {
                write!(
                    f,
                    "the recording ended with {recorded}, the replay with {replayed}"
                )
            }
        }
    }
}

/// A landmark that was not found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct LandmarkMiss {
    /// The recorded registers, by name.
    pub registers: Vec<(&'static str, u64)>,
    /// What ended the search.
    pub ended_by: String,
    /// Boundaries whose registers matched.
    pub candidates: u64,
    /// What else differed at the candidate that came nearest.
    pub nearest: Option<Nearest>,
}

/// How the best candidate for a landmark differed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Nearest {
    /// Where it was.
    pub position: Option<Position>,
    /// The rest of the CPU's state differed.
    pub cpu: bool,
    /// Recorded and replayed number of interrupts delivered since the sync point, where they differed.
    pub deliveries: Option<(u64, u64)>,
    /// Pages whose contents differed, up to [`PAGES_NAMED`].
    pub pages: Vec<PageFrame>,
    /// How many pages differed.
    pub pages_differing: u64,
}

/// How many differing pages a report names.
pub const PAGES_NAMED: usize = 16;

impl LandmarkMiss {
    pub(crate) fn new(
        landmark: &Landmark,
        ended_by: String,
        candidates: u64,
        nearest: Option<Nearest>,
    ) -> Self {
        let registers = named_registers(&landmark.registers).collect();
        Self {
            registers,
            ended_by,
            candidates,
            nearest,
        }
    }
}

impl fmt::Display for LandmarkMiss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rip = self
            .registers
            .iter()
            .find(|(name, _)| *name == "rip")
            .map_or(0, |r| r.1);
        write!(
            f,
            "no boundary matched the landmark with RIP {rip:#x} before {}",
            self.ended_by
        )?;
        let Some(nearest) = &self.nearest else {
            return f.write_str("; none had its registers");
        };
        write!(f, "; registers matched at {} of them", self.candidates)?;
        if let Some(position) = nearest.position {
            write!(f, ", nearest at position {position}")?;
        }
        f.write_str(", where ")?;
        let mut list = List::new(f);
        if nearest.cpu {
            list.item(format_args!("the rest of the CPU's state differed"))?;
        }
        if let Some((recorded, replayed)) = nearest.deliveries {
            list.item(format_args!(
                "{replayed} interrupts had been delivered instead of {recorded}"
            ))?;
        }
        list.pages(&nearest.pages, nearest.pages_differing)
    }
}

/// One register that differs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct RegisterDifference {
    /// Its name.
    pub name: &'static str,
    /// What the recording says.
    pub recorded: u64,
    /// What the replay has.
    pub replayed: u64,
}

/// How states differ.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct StateDifference {
    /// Instruction counts, recorded and replayed, where both are known.
    pub positions: Option<(Position, Position)>,
    /// Registers.
    pub registers: Vec<RegisterDifference>,
    /// Groups of other CPU state.
    pub cpu: Vec<&'static str>,
    /// Pages whose contents differ, up to [`PAGES_NAMED`].
    pub pages: Vec<PageFrame>,
    /// How many pages differ.
    pub pages_differing: u64,
    /// Memory as a whole (known at the end only).
    pub memory: bool,
    /// The devices.
    pub board: bool,
    /// The sequence of exits.
    pub exits: bool,
    /// The output.
    pub console: bool,
}

impl StateDifference {
    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether all that differs is what no digest on the way compares, so that it may have differed since the start.
    pub(crate) fn only_at_end(&self) -> bool {
        let on_the_way = Self {
            memory: false,
            ..self.clone()
        };
        on_the_way.is_empty()
    }

    /// Notes the pages of which `now` says that they differ.
    pub(crate) fn compare_pages(
        &mut self,
        pages: &[PageDigest],
        differs: impl FnMut(&PageDigest) -> bool,
    ) {
        (self.pages, self.pages_differing) = differing_pages(pages, differs);
    }
}

/// The pages that differ: the first few by name, and how many.
pub(crate) fn differing_pages(
    pages: &[PageDigest],
    mut differs: impl FnMut(&PageDigest) -> bool,
) -> (Vec<PageFrame>, u64) {
    let mut named = Vec::new();
    let mut count = 0;
    for page in pages {
        if differs(page) {
            count += 1;
            if named.len() < PAGES_NAMED {
                named.push(page.page);
            }
        }
    }
    (named, count)
}

impl fmt::Display for StateDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            positions,
            registers,
            cpu,
            pages,
            pages_differing,
            memory,
            board,
            exits,
            console,
        } = self;
        let mut list = List::new(f);
        for RegisterDifference {
            name,
            recorded,
            replayed,
        } in registers
        {
            list.item(format_args!(
                "{name} is {replayed:#x} instead of {recorded:#x}"
            ))?;
        }
        for part in cpu {
            list.item(format_args!("{part} differ"))?;
        }
        list.pages(pages, *pages_differing)?;
        if let Some((recorded, replayed)) = positions {
            list.item(format_args!(
                "the position is {replayed} instead of {recorded}"
            ))?;
        }
        let rest = [
            (*memory, "memory differs"),
            (*board, "the devices differ"),
            (*exits, "the sequence of exits differs"),
            (*console, "the output differs"),
        ];
        for (_, text) in rest.into_iter().filter(|(differs, _)| *differs) {
            list.item(format_args!("{text}"))?;
        }
        Ok(())
    }
}

/// Items separated by semicolons.
struct List<'a, 'b> {
    f: &'a mut fmt::Formatter<'b>,
    first: bool,
}

impl<'a, 'b> List<'a, 'b> {
    fn new(f: &'a mut fmt::Formatter<'b>) -> Self {
        Self { f, first: true }
    }

    fn item(&mut self, text: fmt::Arguments<'_>) -> fmt::Result {
        if !std::mem::take(&mut self.first) {
            self.f.write_str("; ")?;
        }
        self.f.write_fmt(text)
    }

    fn pages(&mut self, pages: &[PageFrame], count: u64) -> fmt::Result {
        if count == 0 {
            return Ok(());
        }
        self.item(format_args!("memory differs in the page at"))?;
        for (i, page) in pages.iter().enumerate() {
            write!(self.f, "{} {}", if i == 0 { "" } else { "," }, page.base())?;
        }
        match count - pages.len() as u64 {
            0 => Ok(()),
            more => write!(self.f, " and in {more} more"),
        }
    }
}

/// General registers, RIP and RFLAGS by name.
pub fn named_registers(registers: &Registers) -> impl Iterator<Item = (&'static str, u64)> + '_ {
    let gpr = Gpr::ALL.into_iter().map(|gpr| (gpr.name(), registers[gpr]));
    gpr.chain([("rip", registers.rip), ("rflags", registers.rflags)])
}

/// The registers in which the two differ.
pub(crate) fn register_differences(
    recorded: &Registers,
    replayed: &Registers,
) -> Vec<RegisterDifference> {
    named_registers(recorded)
        .zip(named_registers(replayed))
        .filter(|((_, recorded), (_, replayed))| recorded != replayed)
        .map(|((name, recorded), (_, replayed))| RegisterDifference {
            name,
            recorded,
            replayed,
        })
        .collect()
}
