//! A machine for tests: a processor of a few instructions, over real guest memory and real page tables.
//!
//! Purpose: everything the bridge can meet (breakpoints, slices, ends, branches, a past to go back to) without an engine.
//! Invariants: no clock; a slice is a number of instructions. Code starts at [`CODE`], 64-bit mode, mapped as [`FakeMachine::new`] says.
//! Elsewhere: the tests with real engines (`tests/`).

use machine::End;
use machine::debuggable::{DebugError, Debuggable, EventView, Resume, Reverse, Stop};
use machine::engine::EngineKind;
use machine::environment::{Arrival, SyncOrdinal};
use machine::exit_counts::ExitCounts;
use machine::memory::GuestMemory;
use std::collections::BTreeSet;
use std::sync::mpsc::Sender;
use std::time::Duration;
use x86::regs::{Cr0, Cr4, Efer};
use x86::segment::SegmentAttributes;
use x86::{
    CpuState, Exit, Gpr, GuestPhysAddr, GuestVirtAddr, Nanos, Position, SegmentRegister, VcpuId,
};

/// Virtual address of the first instruction.
pub(crate) const CODE: u64 = 0xffff_ffff_8000_0000;

/// Physical address of the code's first page; the second is at [`SECOND_PAGE`].
pub(crate) const FIRST_PAGE: u64 = 0x9000;

/// Where the virtual page after the first is.
pub(crate) const SECOND_PAGE: u64 = 0x7000;

/// Instructions in a slice.
const SLICE: usize = 1000;

/// A fake machine.
pub(crate) struct FakeMachine {
    pub(crate) cpu: CpuState,
    pub(crate) memory: GuestMemory,
    pub(crate) breakpoints: BTreeSet<GuestVirtAddr>,
    /// How often the set of breakpoints was replaced.
    pub(crate) breakpoint_changes: usize,
    /// States before each instruction, if there is a past.
    past: Option<Vec<CpuState>>,
    end: Option<End>,
    branched: bool,
    retired: u64,
    exits: ExitCounts,
    events: Vec<EventView>,
    /// The next resume fails with this.
    pub(crate) fail: Option<String>,
    /// Told when a slice is over.
    pub(crate) slices: Option<Sender<()>>,
}

impl FakeMachine {
    /// A machine about to run `code`, with a stack below it on the same page and one unmapped page above.
    pub(crate) fn new(code: &[u8]) -> Self {
        let memory = GuestMemory::new(1 << 20).expect("1 MiB");
        let put = |at: u64, value: u64| {
            memory
                .write(GuestPhysAddr::new(at), &value.to_le_bytes())
                .expect("in RAM");
        };
        put(0x1000 + 8 * 511, 0x2003);
        put(0x2000 + 8 * 510, 0x3003);
        put(0x3000, 0x4003);
        put(0x4000, FIRST_PAGE | 3);
        put(0x4008, SECOND_PAGE | 3);
        put(0x4010, 0xfee0_0000 | 3); // a device
        memory
            .write(GuestPhysAddr::new(FIRST_PAGE), code)
            .expect("in RAM");
        let mut exits = ExitCounts::default();
        exits.add(
            &Exit::Hlt,
            Duration::from_micros(3),
            Duration::from_micros(1),
        );
        Self {
            cpu: long_mode(),
            memory,
            breakpoints: BTreeSet::new(),
            breakpoint_changes: 0,
            past: None,
            end: None,
            branched: false,
            retired: 0,
            exits,
            events: Vec::new(),
            fail: None,
            slices: None,
        }
    }

    /// The same as a timeline that goes back in time.
    pub(crate) fn timeline(code: &[u8]) -> Self {
        let event = |index, at| EventView {
            index,
            after: SyncOrdinal(index),
            position: Some(Position::at(at)),
            arrival: Arrival::Time {
                now: Nanos::new(at * 1000),
            },
            landmark: false,
        };
        let events = vec![event(0, 0), event(1, 2)];
        Self {
            past: Some(Vec::new()),
            events,
            ..Self::new(code)
        }
    }

    fn code(&self) -> [u8; 8] {
        let mut bytes = [0; 8];
        let rip = GuestVirtAddr::new(self.cpu.regs.rip);
        // What is unreadable executes as zeros, which end the machine.
        let _ = introspect::virtual_memory::read_virtual(&self.cpu, &self.memory, rip, &mut bytes);
        bytes
    }

    /// Executes one instruction.
    fn execute(&mut self) {
        if let Some(past) = &mut self.past {
            past.push(self.cpu.clone());
        }
        self.retired += 1;
        let code = self.code();
        let regs = &mut self.cpu.regs;
        let len = match code {
            [0x90, ..] => 1, // NOP
            [0x48, 0xff, 0xc0, ..] => {
                regs[Gpr::Rax] = regs[Gpr::Rax].wrapping_add(1); // INC RAX
                3
            }
            [0xeb, offset, ..] => 2u64.wrapping_add(offset as i8 as u64), // JMP
            [0xe6, _, ..] => {
                self.end = Some(End::DebugExit(regs[Gpr::Rax] as u8)); // OUT
                2
            }
            _ => {
                self.end = Some(End::TripleFault);
                0
            }
        };
        regs.rip = regs.rip.wrapping_add(len);
    }

    fn at_breakpoint(&self) -> Option<Stop> {
        let rip = self.cpu.rip_linear();
        self.breakpoints
            .contains(&rip)
            .then_some(Stop::Breakpoint(VcpuId::BOOT, rip))
    }
}

fn long_mode() -> CpuState {
    let mut cpu = CpuState {
        cr0: Cr0::PE | Cr0::PG | Cr0::WP | Cr0::NE | Cr0::ET,
        cr3: 0x1000,
        cr4: Cr4::PAE,
        efer: Efer::LME | Efer::LMA | Efer::NXE,
        ..CpuState::default()
    };
    cpu.regs.rip = CODE;
    cpu.regs[Gpr::Rsp] = CODE + 0x1000;
    let code = cpu.segment_mut(SegmentRegister::Cs);
    code.selector = 8;
    code.base = 0;
    code.attributes = SegmentAttributes::from_bits(0xa09b);
    cpu
}

impl Debuggable for FakeMachine {
    fn engine(&self) -> EngineKind {
        EngineKind::Soft
    }

    fn describe(&self) -> String {
        "a fake machine".to_owned()
    }

    fn vcpus(&self) -> Vec<VcpuId> {
        vec![VcpuId::BOOT]
    }

    fn cpu(&mut self, _: VcpuId) -> Result<CpuState, DebugError> {
        Ok(self.cpu.clone())
    }

    fn set_cpu(&mut self, _: VcpuId, state: &CpuState) -> Result<(), DebugError> {
        self.cpu = state.clone();
        self.branched = self.past.is_some();
        Ok(())
    }

    fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn write_memory(&mut self, addr: GuestPhysAddr, data: &[u8]) -> Result<(), DebugError> {
        self.branched = self.past.is_some();
        Ok(self.memory.write(addr, data)?)
    }

    fn set_breakpoints(&mut self, at: &BTreeSet<GuestVirtAddr>) -> Result<(), DebugError> {
        self.breakpoint_changes += 1;
        self.breakpoints = at.clone();
        Ok(())
    }

    fn resume(&mut self, how: Resume, _slice: Duration) -> Result<Stop, DebugError> {
        if let Some(why) = self.fail.take() {
            return Err(DebugError::Refused(why));
        }
        let steps = if let Resume::Step(_) = how { 1 } else { SLICE };
        for _ in 0..steps {
            if let Some(end) = self.end {
                return Ok(Stop::Ended(end));
            }
            self.execute();
            if how == Resume::Continue
                && let Some(stop) = self.at_breakpoint()
            {
                return Ok(stop);
            }
        }
        match (how, self.end) {
            (_, Some(end)) => Ok(Stop::Ended(end)),
            (Resume::Step(_), None) => Ok(Stop::Stepped),
            (Resume::Continue, None) => {
                if let Some(slices) = &self.slices {
                    // A test that has heard enough no longer listens.
                    let _ = slices.send(());
                }
                Ok(Stop::Slice)
            }
        }
    }

    fn position(&self) -> Option<Position> {
        Some(Position::at(self.retired))
    }

    fn end(&self) -> Option<End> {
        self.end
    }

    fn console(&self) -> &[u8] {
        b"first line\nlast words\n"
    }

    fn exits(&self) -> &ExitCounts {
        &self.exits
    }

    fn events(&self) -> &[EventView] {
        &self.events
    }

    fn branched(&self) -> bool {
        self.branched
    }

    fn reverse(&mut self) -> Option<&mut dyn Reverse> {
        if self.past.is_some() {
            Some(self)
        } else {
            None
        }
    }
}

impl Reverse for FakeMachine {
    fn step_back(&mut self, _: VcpuId, _: Duration) -> Result<Stop, DebugError> {
        let Some(before) = self.past.as_mut().and_then(Vec::pop) else {
            return Ok(Stop::StartOfHistory);
        };
        self.cpu = before;
        self.end = None;
        self.retired -= 1;
        Ok(Stop::Stepped)
    }

    fn continue_back(&mut self, slice: Duration) -> Result<Stop, DebugError> {
        loop {
            if self.step_back(VcpuId::BOOT, slice)? == Stop::StartOfHistory {
                return Ok(Stop::StartOfHistory);
            }
            if let Some(stop) = self.at_breakpoint() {
                return Ok(stop);
            }
        }
    }
}
