//! Exit statistics.
//!
//! Purpose: count exits by reason and by port or MMIO page, with the time spent in the guest before each and in the monitor after it.
//! Invariants: recording one exit neither locks nor formats; allocation happens only for a site seen the first time.
//! Elsewhere: presentation (`introspect`); who measures ([`crate::session`]).

use std::collections::BTreeMap;
use std::time::Duration;
use x86::{Exit, ExitReason, PageFrame};

/// Where an exit belongs within its reason.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ExitSite {
    /// The reason has no sites.
    None,
    /// A port, and whether it was written.
    Port(u16, bool),
    /// A page of MMIO, and whether it was written.
    MmioPage(PageFrame, bool),
    /// An MSR.
    Msr(u32),
}

impl ExitSite {
    /// The site of `exit`.
    pub fn of(exit: &Exit) -> Self {
        match *exit {
            Exit::IoIn { port, .. } => Self::Port(port, false),
            Exit::IoOut { port, .. } => Self::Port(port, true),
            Exit::MmioRead { addr, .. } => Self::MmioPage(PageFrame::containing(addr), false),
            Exit::MmioWrite { addr, .. } => Self::MmioPage(PageFrame::containing(addr), true),
            Exit::Rdmsr { msr } | Exit::Wrmsr { msr, .. } => Self::Msr(msr),
            _ => Self::None,
        }
    }
}

/// How often, and how long.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Tally {
    /// Exits.
    pub count: u64,
    /// Host time in the guest that ended with them.
    pub guest: Duration,
    /// Host time in the monitor handling them.
    pub monitor: Duration,
}

/// Exits of a run, by reason and site.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct ExitCounts {
    by_site: BTreeMap<(ExitReason, ExitSite), Tally>,
}

impl ExitCounts {
    /// Counts one exit.
    pub fn add(&mut self, exit: &Exit, guest: Duration, monitor: Duration) {
        let tally = self
            .by_site
            .entry((exit.reason(), ExitSite::of(exit)))
            .or_default();
        tally.count += 1;
        tally.guest += guest;
        tally.monitor += monitor;
    }

    /// Every reason and site seen, in order.
    pub fn iter(&self) -> impl Iterator<Item = (ExitReason, ExitSite, Tally)> + '_ {
        self.by_site
            .iter()
            .map(|(&(reason, site), &tally)| (reason, site, tally))
    }

    /// All together.
    pub fn total(&self) -> Tally {
        self.by_site
            .values()
            .fold(Tally::default(), |sum, tally| Tally {
                count: sum.count + tally.count,
                guest: sum.guest + tally.guest,
                monitor: sum.monitor + tally.monitor,
            })
    }
}
