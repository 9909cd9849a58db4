//! Snapshots along a timeline, to go back from.
//!
//! Purpose: the whole machine as it was at some boundaries, so that any earlier one is reached by restoring and running forward.
//! Invariants:
//! - A snapshot holds at least the pages that differ from the snapshot before it; the first holds every page that was not zero at the start.
//! - A page that was never reported dirty is as it was at the start, in every snapshot.
//! - Their number and the memory they take are bounded: when there are too many, the one whose absence lengthens the way least goes, and its
//!   pages pass to its successor.
//!
//! Elsewhere: deciding when to take one ([`super`]).

use super::tape::{Tape, TapeState};
use machine::debuggable::DebugError;
use machine::session::{Progress, Session};
use machine::{BoardState, PageSet};
use std::collections::{BTreeMap, HashMap};
use x86::{CpuState, PAGE_SIZE, PageFrame, Position, VcpuId};

/// The most snapshots kept.
const MOST: usize = 64;
/// Instructions between two of them, unless told otherwise.
const SPACING: u64 = 4 << 20;

/// The most pages all of them may hold together: 512 MiB. Two are kept in any case.
const MOST_PAGES: usize = 128 << 10;
/// Instructions between two snapshots for each page copied, so that copying stays a small part of the work.
const SPACING_PER_PAGE: u64 = 128;

type Page = Box<[u8; PAGE_SIZE as usize]>;

/// A machine as it was.
struct Snapshot {
    position: Position,
    cpu: CpuState,
    board: BoardState,
    progress: Progress,
    tape: TapeState,
    pages: BTreeMap<PageFrame, Page>,
}

/// All snapshots, by ascending position.
pub(super) struct Snapshots {
    list: Vec<Snapshot>,
    /// Instructions between two of them, at least.
    pub(super) spacing: u64,
    /// Every page that was ever reported dirty.
    touched: PageSet,
}

impl Default for Snapshots {
    fn default() -> Self {
        Self {
            list: Vec::new(),
            spacing: SPACING,
            touched: PageSet::new(),
        }
    }
}

impl Snapshots {
    /// Where the last one is that is not after `position`.
    pub(super) fn position_before(&self, position: Position) -> Option<Position> {
        let count = self
            .list
            .partition_point(|snapshot| snapshot.position <= position);
        self.list
            .get(count.checked_sub(1)?)
            .map(|snapshot| snapshot.position)
    }

    /// Where the next one is due for a machine that runs forward past the last.
    pub(super) fn next_due(&self) -> Position {
        let Some(last) = self.list.last() else {
            return Position::START;
        };
        let copied = last.pages.len() as u64 * SPACING_PER_PAGE;
        let last = last.position;
        // A long way has its snapshots further apart from the start on, instead of losing most again.
        let spacing = self
            .spacing
            .max(last.retired.get() / MOST as u64)
            .max(copied);
        Position {
            retired: last.retired.saturating_add(spacing),
            within: 0,
        }
    }

    /// Takes one. The machine stands at a clean boundary. Dirty pages have been asked for by nobody else.
    pub(super) fn take(&mut self, session: &mut Session<Tape>) -> Result<(), DebugError> {
        let Some(position) = session.engine().position() else {
            return Ok(());
        };
        let cpu = session.engine().state(VcpuId::BOOT)?;
        let dirty = session.engine().take_dirty()?;
        let mut pages = BTreeMap::new();
        for &frame in &dirty {
            let mut page: Page = Box::new([0; PAGE_SIZE as usize]);
            if session
                .memory()
                .read(frame.base(), page.as_mut_slice())
                .is_ok()
            {
                pages.insert(frame, page);
            }
        }
        self.touched.extend(dirty);
        let snapshot = Snapshot {
            position,
            cpu,
            board: session.board().save(),
            progress: session.progress().clone(),
            tape: session.environment_ref().save(),
            pages,
        };
        let at = self
            .list
            .partition_point(|snapshot| snapshot.position <= position);
        self.list.insert(at, snapshot);
        while self.list.len() > MOST || (self.list.len() > 2 && self.pages() > MOST_PAGES) {
            self.thin();
        }
        Ok(())
    }

    /// Pages held by all of them.
    fn pages(&self) -> usize {
        self.list.iter().map(|snapshot| snapshot.pages.len()).sum()
    }

    /// Forgets those after `position`: another future begins.
    pub(super) fn truncate(&mut self, position: Position) {
        let keep = self
            .list
            .partition_point(|snapshot| snapshot.position <= position);
        self.list.truncate(keep);
    }

    /// Lets the one go whose neighbours are closest to each other.
    fn thin(&mut self) {
        let gap = |window: &[Snapshot]| match window {
            [before, _, after] => after.position.retired.since(before.position.retired),
            _ => u64::MAX,
        };
        let closest = self
            .list
            .windows(3)
            .enumerate()
            .min_by_key(|(_, window)| gap(window));
        let Some((at, _)) = closest else { return };
        let gone = self.list.remove(at + 1);
        if let Some(next) = self.list.get_mut(at + 1) {
            for (frame, page) in gone.pages {
                next.pages.entry(frame).or_insert(page);
            }
        }
    }

    /// Makes the machine what it was at the last snapshot that is not after `position`; true if there is one.
    pub(super) fn restore(
        &mut self,
        position: Position,
        session: &mut Session<Tape>,
    ) -> Result<bool, DebugError> {
        let count = self
            .list
            .partition_point(|snapshot| snapshot.position <= position);
        let Some(snapshot) = count.checked_sub(1).and_then(|at| self.list.get(at)) else {
            return Ok(false);
        };
        self.touched.extend(session.engine().take_dirty()?);
        let mut wanted: HashMap<PageFrame, &Page> = HashMap::new();
        for earlier in self.list.iter().take(count) {
            wanted.extend(earlier.pages.iter().map(|(&frame, page)| (frame, page)));
        }
        let zero = [0; PAGE_SIZE as usize];
        let mut now = [0; PAGE_SIZE as usize];
        for &frame in &self.touched {
            let page = wanted.get(&frame).map_or(&zero, |page| page.as_ref());
            if session.memory().read(frame.base(), &mut now).is_ok() && now != *page {
                session.memory().write(frame.base(), page)?;
                session.engine().memory_written(frame.base(), page.len());
            }
        }
        session
            .board_mut()
            .restore(&snapshot.board)
            .map_err(|e| DebugError::Refused(format!("cannot go back: {e}")))?;
        session.engine().set_state(VcpuId::BOOT, &snapshot.cpu)?;
        session.engine().set_position(snapshot.position);
        session.set_progress(snapshot.progress.clone());
        session
            .environment()
            .restore(&snapshot.tape, snapshot.position);
        Ok(true)
    }
}
