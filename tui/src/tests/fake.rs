//! A machine for tests: a handful of instructions, executed here.
//!
//! Purpose: a [`Debuggable`] that is the same every time, with a past, whose guest calls, loops, prints and ends.
//! Elsewhere: real guests (`fixtures`) on real engines.

use introspect::symbols::Symbols;
use machine::debuggable::{DebugError, Debuggable, EventView, Resume, Reverse, Stop};
use machine::engine::EngineKind;
use machine::environment::{Arrival, Channel, SyncOrdinal};
use machine::exit_counts::ExitCounts;
use machine::{End, GuestMemory};
use std::collections::BTreeSet;
use std::time::Duration;
use x86::exit::AccessData;
use x86::regs::{Cr0, Cr4, Efer};
use x86::segment::SegmentAttributes;
use x86::{
    CpuState, Exit, Gpr, GuestPhysAddr, GuestVirtAddr, Nanos, Position, Segment, SegmentRegister,
    VcpuId,
};

/// Where the guest's code is, virtually and physically.
pub(crate) const TEXT: u64 = 0x10_0000;
const STACK: u64 = 0x18_0000;

/// ```text
/// _start: mov rbp, rsp(0) ; call main ; hlt
/// main:   push rbp ; mov rbp, rsp ; call print (x3) ; pop rbp ; ret
/// print:  push rbp ; mov rbp, rsp ; inc rax ; out 0xe9, al ; pop rbp ; ret
/// ```
const CODE: &[u8] = &[
    0xe8, 0x0b, 0, 0, 0,    // 00 _start: call main (10)
    0xf4, // 05 hlt
    0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, // 06 nop
    0x55, // 10 main: push rbp
    0x48, 0x89, 0xe5, // 11 mov rbp, rsp
    0xe8, 0x17, 0, 0, 0, // 14 call print (30)
    0xe8, 0x12, 0, 0, 0, // 19 call print
    0xe8, 0x0d, 0, 0, 0,    // 1e call print
    0x5d, // 23 pop rbp
    0xc3, // 24 ret
    0x06, 0x06, 0x06, // 25 (bad)
    0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, // 28 nop
    0x55, // 30 print: push rbp
    0x48, 0x89, 0xe5, // 31 mov rbp, rsp
    0x48, 0xff, 0xc0, // 34 inc rax
    0xe6, 0xe9, // 37 out 0xe9, al
    0x5d, // 39 pop rbp
    0xc3, // 3a ret
];

/// What each OUT of the guest sends, one after the other.
const SAYS: [&str; 3] = [
    "booting\r\n",
    "\x1b[31mcpu 0\x1b[0m: timer at 100 Hz\r\n\x1b]0;owned\x07",
    "panic: list corrupted in sched::tick\r\n",
];

/// The machine.
pub(crate) struct Fake {
    memory: GuestMemory,
    cpu: CpuState,
    console: Vec<u8>,
    exits: ExitCounts,
    events: Vec<EventView>,
    breakpoints: BTreeSet<GuestVirtAddr>,
    steps: u64,
    end: Option<End>,
    /// Keeps its past.
    pub(crate) reversible: bool,
    /// Panics at this step, as a bug of ours would.
    pub(crate) bug_at: Option<u64>,
    /// Never ends: the halt is passed over to the start.
    pub(crate) endless: bool,
}

impl Fake {
    /// At its first instruction.
    pub(crate) fn new() -> Self {
        let memory = GuestMemory::new(2 << 20).expect("2 MiB");
        for (table, entry) in [(0x1000u64, 0x2003u64), (0x2000, 0x3003), (0x3000, 0x83)] {
            memory
                .write(GuestPhysAddr::new(table), &entry.to_le_bytes())
                .expect("table");
        }
        memory.write(GuestPhysAddr::new(TEXT), CODE).expect("code");
        let arrivals = [
            Arrival::Time {
                now: Nanos::new(10_000_000),
            },
            Arrival::Input {
                channel: Channel::Com1,
                bytes: b"ls\n\x1b[A".to_vec(),
            },
            Arrival::Time {
                now: Nanos::new(20_000_000),
            },
            Arrival::Stop,
        ];
        let events = arrivals
            .into_iter()
            .zip(0..)
            .map(|(arrival, index)| EventView {
                index,
                after: SyncOrdinal(index),
                position: None,
                arrival,
                landmark: index % 2 == 1,
            })
            .collect();
        Self {
            memory,
            cpu: start_state(),
            console: Vec::new(),
            exits: ExitCounts::default(),
            events,
            breakpoints: BTreeSet::new(),
            steps: 0,
            end: None,
            reversible: true,
            bug_at: None,
            endless: false,
        }
    }

    /// `count` events like `event`, the first half of them in the past.
    #[allow(dead_code)] // Not every test program needs it.
    pub(crate) fn repeat_event(&mut self, event: &EventView, count: u64) {
        let nth = |index| EventView {
            index,
            position: (index < count / 2).then_some(Position::START),
            ..event.clone()
        };
        self.events = (0..count).map(nth).collect();
    }

    fn rewind(&mut self, to: u64) {
        let fresh = Self::new();
        let positions: Vec<_> = self.events.iter().map(|event| event.position).collect();
        (self.memory, self.cpu, self.console) = (fresh.memory, fresh.cpu, fresh.console);
        (self.exits, self.steps, self.end) = (fresh.exits, 0, None);
        while self.steps < to && self.end.is_none() {
            self.step();
        }
        for (event, position) in self.events.iter_mut().zip(positions) {
            event.position = position;
        }
    }

    fn read<const N: usize>(&self, addr: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory
            .read(GuestPhysAddr::new(addr), &mut bytes)
            .expect("identity-mapped RAM");
        bytes
    }

    fn push(&mut self, value: u64) {
        let top = self.cpu.regs[Gpr::Rsp] - 8;
        self.cpu.regs[Gpr::Rsp] = top;
        self.memory
            .write(GuestPhysAddr::new(top), &value.to_le_bytes())
            .expect("stack");
    }

    fn pop(&mut self) -> u64 {
        let top = self.cpu.regs[Gpr::Rsp];
        self.cpu.regs[Gpr::Rsp] = top + 8;
        u64::from_le_bytes(self.read(top))
    }

    fn step(&mut self) {
        assert_ne!(Some(self.steps), self.bug_at, "a bug of ours");
        let rip = self.cpu.regs.rip;
        let bytes: [u8; 5] = self.read(rip);
        let mut next = rip + 1;
        match bytes {
            [0xe8, offset @ ..] => {
                next = (rip + 5).wrapping_add_signed(i32::from_le_bytes(offset).into());
                self.push(rip + 5);
            }
            [0x55, ..] => self.push(self.cpu.regs[Gpr::Rbp]),
            [0x5d, ..] => self.cpu.regs[Gpr::Rbp] = self.pop(),
            [0xc3, ..] => next = self.pop(),
            [0x48, 0x89, 0xe5, ..] => {
                self.cpu.regs[Gpr::Rbp] = self.cpu.regs[Gpr::Rsp];
                next = rip + 3;
            }
            [0x48, 0xff, 0xc0, ..] => {
                self.cpu.regs[Gpr::Rax] += 1;
                next = rip + 3;
            }
            [0xe6, port, ..] => {
                self.out(port.into());
                next = rip + 2;
            }
            [0xf4, ..] if self.endless => next = TEXT,
            [0xf4, ..] => self.end = Some(End::DebugExit(3)),
            _ => {}
        }
        self.cpu.regs.rip = next;
        self.steps += 1;
    }

    fn out(&mut self, port: u16) {
        let value = self.cpu.regs[Gpr::Rax];
        let exit = Exit::IoOut {
            port,
            data: AccessData {
                value: value & 0xff,
                size: 1,
            },
        };
        self.exits
            .add(&exit, Duration::from_micros(3), Duration::from_micros(1));
        let said = SAYS.get(value as usize - 1).copied().unwrap_or("");
        self.console.extend_from_slice(said.as_bytes());
        if let Some(event) = self.events.get_mut(value as usize - 1) {
            event.position = Some(Position::at(self.steps));
        }
    }
}

fn start_state() -> CpuState {
    let mut cpu = CpuState {
        cr0: Cr0::PE | Cr0::PG | Cr0::WP | Cr0::NE | Cr0::ET,
        cr3: 0x1000,
        cr4: Cr4::PAE | Cr4::OSFXSR,
        efer: Efer::LME | Efer::LMA | Efer::NXE,
        ..CpuState::default()
    };
    for register in SegmentRegister::ALL {
        *cpu.segment_mut(register) = Segment::flat(0x10, 0xc093);
    }
    *cpu.segment_mut(SegmentRegister::Cs) = Segment {
        selector: 8,
        base: 0,
        limit: u32::MAX,
        attributes: SegmentAttributes::from_bits(0xa09b),
    };
    cpu.regs.rip = TEXT;
    cpu.regs[Gpr::Rsp] = STACK;
    cpu
}

impl Debuggable for Fake {
    fn engine(&self) -> EngineKind {
        EngineKind::Soft
    }

    fn describe(&self) -> String {
        "fake.cvt".to_owned()
    }

    fn vcpus(&self) -> Vec<VcpuId> {
        vec![VcpuId::BOOT]
    }

    fn cpu(&mut self, _: VcpuId) -> Result<CpuState, DebugError> {
        Ok(self.cpu.clone())
    }

    fn set_cpu(&mut self, _: VcpuId, state: &CpuState) -> Result<(), DebugError> {
        self.cpu = state.clone();
        Ok(())
    }

    fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn write_memory(&mut self, addr: GuestPhysAddr, data: &[u8]) -> Result<(), DebugError> {
        Ok(self.memory.write(addr, data)?)
    }

    fn set_breakpoints(&mut self, at: &BTreeSet<GuestVirtAddr>) -> Result<(), DebugError> {
        self.breakpoints.clone_from(at);
        Ok(())
    }

    fn resume(&mut self, how: Resume, _: Duration) -> Result<Stop, DebugError> {
        // A slice is a number of steps here, so that every run is the same.
        const SLICE: u64 = 1000;
        for passed in 0..SLICE {
            if let Some(end) = self.end {
                return Ok(Stop::Ended(end));
            }
            let here = self.cpu.rip_linear();
            if passed > 0 && self.breakpoints.contains(&here) {
                return Ok(Stop::Breakpoint(VcpuId::BOOT, here));
            }
            self.step();
            if how != Resume::Continue {
                return Ok(self.end.map_or(Stop::Stepped, Stop::Ended));
            }
        }
        Ok(Stop::Slice)
    }

    fn position(&self) -> Option<Position> {
        Some(Position::at(self.steps))
    }

    fn end(&self) -> Option<End> {
        self.end
    }

    fn console(&self) -> &[u8] {
        &self.console
    }

    fn exits(&self) -> &ExitCounts {
        &self.exits
    }

    fn events(&self) -> &[EventView] {
        &self.events
    }

    fn branched(&self) -> bool {
        false
    }

    fn reverse(&mut self) -> Option<&mut dyn Reverse> {
        if self.reversible { Some(self) } else { None }
    }
}

impl Reverse for Fake {
    fn step_back(&mut self, _: VcpuId, _: Duration) -> Result<Stop, DebugError> {
        match self.steps.checked_sub(1) {
            Some(to) => {
                self.rewind(to);
                Ok(Stop::Stepped)
            }
            None => Ok(Stop::StartOfHistory),
        }
    }

    fn continue_back(&mut self, _: Duration) -> Result<Stop, DebugError> {
        while let Some(to) = self.steps.checked_sub(1) {
            self.rewind(to);
            let here = self.cpu.rip_linear();
            if self.breakpoints.contains(&here) {
                return Ok(Stop::Breakpoint(VcpuId::BOOT, here));
            }
        }
        Ok(Stop::StartOfHistory)
    }

    fn seek(&mut self, position: Position, _: Duration) -> Result<Stop, DebugError> {
        let to = position.retired.get();
        if to < self.steps {
            self.rewind(to);
        }
        while self.steps < to {
            match self.end {
                Some(end) => return Ok(Stop::Ended(end)),
                None => self.step(),
            }
        }
        Ok(Stop::Stepped)
    }
}

/// The names in [`CODE`], as an ELF file's symbol table would give them.
pub(crate) fn symbols() -> Symbols {
    let functions: [(&str, u64, u64); 3] = [
        ("_start", TEXT, 6),
        ("main", TEXT + 0x10, 0x15),
        ("print", TEXT + 0x30, 0xb),
    ];
    let mut names = vec![0u8];
    let mut table = vec![0u8; 24];
    for (name, start, size) in functions {
        table.extend((names.len() as u32).to_le_bytes());
        table.extend([0x12, 0, 1, 0]);
        table.extend(start.to_le_bytes());
        table.extend(size.to_le_bytes());
        names.extend(name.as_bytes());
        names.push(0);
    }
    let (table_at, names_at) = (64, 64 + table.len() as u64);
    let sections_at = names_at + names.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    file.extend(
        [TEXT, 0, sections_at]
            .iter()
            .flat_map(|word| word.to_le_bytes()),
    );
    let halves = [0, 0, 64, 56, 0, 64, 4, 3u16];
    file.extend(halves.iter().flat_map(|half| half.to_le_bytes()));
    file.extend(&table);
    file.extend(&names);
    let sections: [[u64; 7]; 4] = [
        [0; 7],
        [1, TEXT, 0, 0x1000, 0, 0, 0],
        [2, 0, table_at, table.len() as u64, 3, 1, 24],
        [3, 0, names_at, names.len() as u64, 0, 0, 0],
    ];
    for [kind, addr, offset, size, link, info, entry_size] in sections {
        file.extend([0u8; 4]);
        file.extend((kind as u32).to_le_bytes());
        file.extend(
            [0, addr, offset, size]
                .iter()
                .flat_map(|word| word.to_le_bytes()),
        );
        file.extend((link as u32).to_le_bytes());
        file.extend((info as u32).to_le_bytes());
        file.extend(
            [8, entry_size]
                .iter()
                .flat_map(|word: &u64| word.to_le_bytes()),
        );
    }
    Symbols::from_elf(&file).expect("a well-formed file")
}
