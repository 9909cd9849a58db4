//! Looking for a landmark.
//!
//! Purpose: decide at a boundary whether it is the one a landmark describes, and remember how near the search came for the report if none is.
//! Invariants: a match is exact: registers, the rest of the CPU, interrupts delivered and every page named. Nothing here changes the machine.
//! Elsewhere: running from candidate to candidate (the engine, by [`machine::engine::Until::Registers`]).

use crate::digest::{CpuDigest, Digest, canonical_registers};
use crate::divergence::{Nearest, differing_pages};
use crate::trace::{Landmark, PageDigest};
use machine::GuestMemory;
use machine::engine::{Engine, EngineError};
use x86::{CpuState, Position, VcpuId};

/// A search under way.
#[derive(Clone, Debug)]
pub(super) struct Search {
    /// Number of the record with the landmark.
    pub(super) record: u64,
    pub(super) candidates: u64,
    pub(super) nearest: Option<Nearest>,
    /// The page that told the last candidate off: most likely to tell off the next.
    telling: usize,
}

impl Search {
    /// A search for the landmark of record `record`.
    pub(super) fn new(record: u64) -> Self {
        Self {
            record,
            candidates: 0,
            nearest: None,
            telling: 0,
        }
    }

    /// Whether the CPU stands at the landmark.
    pub(super) fn matches(
        &mut self,
        landmark: &Landmark,
        delivered: u64,
        vcpu: VcpuId,
        engine: &mut dyn Engine,
        memory: &GuestMemory,
    ) -> Result<bool, EngineError> {
        let cpu = engine.state(vcpu)?;
        if canonical_registers(&cpu.regs) != landmark.registers {
            return Ok(false);
        }
        self.candidates += 1;
        let differs = |page: &PageDigest| page_differs(memory, page);
        // Cheap tests first; a page digest costs a fraction of a microsecond, and a loop may offer millions of candidates.
        let likely = delivered == landmark.deliveries
            && !landmark.pages.get(self.telling).is_some_and(differs)
            && CpuDigest::of(&cpu).rest() == landmark.rest;
        if likely {
            match landmark.pages.iter().position(differs) {
                Some(page) => self.telling = page,
                None => return Ok(true),
            }
        }
        // A full comparison only serves the report.
        if self.nearest.is_none() || self.candidates.is_multiple_of(1024) {
            self.note(landmark, delivered, &cpu, engine.position(), memory);
        }
        Ok(false)
    }

    /// Keeps how this candidate differs, if it comes nearer than those before.
    fn note(
        &mut self,
        landmark: &Landmark,
        delivered: u64,
        cpu: &CpuState,
        position: Option<Position>,
        memory: &GuestMemory,
    ) {
        let (pages, pages_differing) =
            differing_pages(&landmark.pages, |page| page_differs(memory, page));
        let this = Nearest {
            position,
            cpu: CpuDigest::of(cpu).rest() != landmark.rest,
            deliveries: (delivered != landmark.deliveries)
                .then_some((landmark.deliveries, delivered)),
            pages,
            pages_differing,
        };
        let score = |n: &Nearest| (n.cpu, n.deliveries.is_some(), n.pages_differing);
        if self
            .nearest
            .as_ref()
            .is_none_or(|best| score(&this) < score(best))
        {
            self.nearest = Some(this);
        }
    }
}

/// Whether a page holds something else than recorded.
pub(super) fn page_differs(memory: &GuestMemory, page: &PageDigest) -> bool {
    memory.page_digest(page.page).map(Digest) != Some(page.digest)
}
