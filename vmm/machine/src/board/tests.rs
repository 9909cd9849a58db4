//! The whole board under random traffic: no panic, and saving and restoring at any point changes nothing.

use super::*;
use crate::environment::{Boundary, Directive, SyncOrdinal};
use proptest::prelude::*;
use x86::{Exit, Position, VcpuId};

/// Answers `now` from the test and keeps the output.
#[derive(Clone, Default, PartialEq, Debug)]
pub(super) struct TestEnvironment {
    pub(super) now: Nanos,
    pub(super) output: Vec<(Channel, u8)>,
}

impl Environment for TestEnvironment {
    fn now(&mut self) -> Result<Nanos, EnvironmentError> {
        Ok(self.now)
    }

    fn entropy(&mut self, out: &mut [u8]) -> Result<(), EnvironmentError> {
        out.fill(0);
        Ok(())
    }

    fn output(&mut self, channel: Channel, bytes: &[u8]) -> Result<(), EnvironmentError> {
        self.output
            .extend(bytes.iter().map(|&byte| (channel, byte)));
        Ok(())
    }

    fn exited(
        &mut self,
        _: VcpuId,
        _: &Exit,
        _: SyncOrdinal,
        _: Option<Position>,
    ) -> Result<(), EnvironmentError> {
        Ok(())
    }

    fn boundary(&mut self, _: Boundary<'_>) -> Result<Directive, EnvironmentError> {
        Ok(Directive::default())
    }
}

struct Machine {
    board: Board,
    env: TestEnvironment,
}

impl Machine {
    fn new() -> Self {
        let board = Board::new(&BoardConfig::default());
        Self {
            board,
            env: TestEnvironment::default(),
        }
    }

    fn inb(&mut self, port: u16) -> u64 {
        self.board.port_read(port, 1, &mut self.env).expect("read")
    }

    fn outb(&mut self, port: u16, value: u8) {
        let data = AccessData {
            value: value.into(),
            size: 1,
        };
        self.board
            .port_write(port, data, &mut self.env)
            .expect("write");
    }

    /// Vectors 20h and 28h, everything unmasked.
    fn start_interrupts(&mut self) {
        for (port, base, icw3) in [(0x20, 0x20, 4), (0xa0, 0x28, 2)] {
            self.outb(port, 0x11);
            for value in [base, icw3, 1] {
                self.outb(port + 1, value);
            }
        }
    }
}

#[test]
fn nothing_is_all_ones() {
    let mut machine = Machine::new();
    let Machine { board, env } = &mut machine;
    for (size, ones) in [(1, 0xff), (2, 0xffff), (4, 0xffff_ffff)] {
        for port in [0xcf8, 0xcfc, 0x1234, 0xffff] {
            assert_eq!(board.port_read(port, size, env).expect("read"), ones);
        }
        let apic = GuestPhysAddr::new(0xfee0_0030);
        assert_eq!(board.mmio_read(apic, size, env).expect("read"), ones);
    }
    let apic = GuestPhysAddr::new(0xfee0_0030);
    assert_eq!(board.mmio_read(apic, 8, env).expect("read"), u64::MAX);
    assert_eq!(board.msr_read(0x8b), Some(0));
    assert_eq!(board.msr_read(0x1234), None);
}

#[test]
fn wide_accesses_are_made_byte_by_byte() {
    let mut machine = Machine::new();
    machine.outb(0x3ff, 0x5a);
    let Machine { board, env } = &mut machine;
    assert_eq!(board.port_read(0x3fe, 4, env).expect("read"), 0xffff_5ab0);
    let data = AccessData {
        value: 0x6261,
        size: 2,
    };
    board.port_write(0x3f8, data, env).expect("write");
    assert_eq!(
        env.output,
        [(Channel::Com1, b'a')],
        "the other byte went to IER"
    );
    assert_eq!(machine.inb(0x3f9), 2);
}

#[test]
fn the_debug_exit_takes_any_width_and_the_first_cause_stays() {
    for size in [1, 2, 4] {
        let mut machine = Machine::new();
        let data = AccessData {
            value: 0x1122_3344,
            size,
        };
        machine
            .board
            .port_write(0xf4, data, &mut machine.env)
            .expect("write");
        machine.outb(0x64, 0xfe);
        assert_eq!(machine.board.end(), Some(End::DebugExit(0x44)));
    }
    let mut machine = Machine::new();
    machine.outb(0x64, 0xfe);
    assert_eq!(machine.board.end(), Some(End::Reset));
}

#[test]
fn the_debug_console_says_it_is_there() {
    let mut machine = Machine::new();
    assert_eq!(machine.inb(0xe9), 0xe9);
    machine.outb(0xe9, b'!');
    assert_eq!(machine.env.output, [(Channel::DebugConsole, b'!')]);
}

#[test]
fn the_timer_interrupts_at_its_deadlines() {
    let mut machine = Machine::new();
    machine.start_interrupts();
    for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)] {
        machine.outb(port, value); // 1193 ticks
    }
    for _ in 0..100 {
        let due = machine.board.deadline().expect("running");
        machine.board.time(Nanos::new(due.get() - 1));
        assert_eq!(machine.board.acknowledge(), None);
        machine.board.time(due);
        assert_eq!(machine.board.acknowledge(), Some(Vector(0x20)));
        machine.outb(0x20, 0x20);
    }
    let now = machine.board.deadline().expect("running").get();
    assert!(
        (100_000_000..101_500_000).contains(&now),
        "100 ms, not {now} ns"
    );
}

#[test]
fn an_access_that_sees_the_time_lets_due_timers_fire_first() {
    let mut machine = Machine::new();
    machine.start_interrupts();
    for (port, value) in [(0x43, 0x34), (0x40, 0), (0x40, 0x10)] {
        machine.outb(port, value);
    }
    machine.env.now = Nanos::new(10_000_000);
    machine.inb(0x40);
    assert!(machine.board.interrupt_pending());
    assert!(machine.board.deadline() > Some(machine.env.now));
}

#[test]
fn input_interrupts_through_irq_4() {
    let mut machine = Machine::new();
    machine.start_interrupts();
    machine.outb(0x3f9, 1);
    machine.board.input(Channel::Com1, b"hi");
    machine.board.input(Channel::DebugConsole, b"not read");
    assert_eq!(machine.board.acknowledge(), Some(Vector(0x24)));
    assert_eq!([machine.inb(0x3f8), machine.inb(0x3f8)], [0x68, 0x69]);
    assert_eq!(machine.inb(0x3fd) & 1, 0);
}

#[test]
fn damaged_states_are_refused_and_change_nothing() {
    let saved = Board::new(&BoardConfig::default()).save();
    let mut board = Board::new(&BoardConfig { boot_time: 7 });
    let before = board.save();
    let mut refuse = |change: &dyn Fn(&mut BoardState)| {
        let mut state = saved.clone();
        change(&mut state);
        let error = board.restore(&state).expect_err("refused");
        assert_eq!(board.save(), before);
        error
    };
    assert!(matches!(
        refuse(&|state| {
            state.devices.pop();
        }),
        RestoreError::DeviceCount {
            found: 6,
            expected: 7
        }
    ));
    assert!(matches!(
        refuse(&|state| state.devices.swap(0, 1)),
        RestoreError::Kind { .. }
    ));
    for n in 0..saved.devices.len() {
        assert!(matches!(
            refuse(&|state| state.devices[n].version += 1),
            RestoreError::Version { .. }
        ));
        assert!(matches!(
            refuse(&|state| state.devices[n].bytes.push(0)),
            RestoreError::Damaged { .. }
        ));
        for len in 0..saved.devices[n].bytes.len() {
            assert!(matches!(
                refuse(&|state| state.devices[n].bytes.truncate(len)),
                RestoreError::Damaged { .. }
            ));
        }
    }
}

/// Something that happens to a board.
#[derive(Clone, Debug)]
enum Event {
    Read(u16, u8),
    Write(u16, AccessData),
    Mmio(u64, u8),
    Later(u64),
    Time,
    Input(Vec<u8>),
    Acknowledge,
}

fn port() -> impl Strategy<Value = u16> {
    const PORTS: [u16; 34] = [
        0x20, 0x21, 0x40, 0x41, 0x42, 0x43, 0x60, 0x61, 0x64, 0x70, 0x71, 0x80, 0xa0, 0xa1, 0xe9,
        0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff, 0x4d0, 0x4d1, 0x43, 0x43, 0x71,
        0x20, 0xa0, 0x40, 0x61, 0xcf8, 0x3f7,
    ];
    prop_oneof![20 => proptest::sample::select(&PORTS[..]), 1 => any::<u16>()]
}

fn event() -> impl Strategy<Value = Event> {
    let size = proptest::sample::select(&[1u8, 1, 1, 2, 4, 8, 0, 3, 255][..]);
    let data = (any::<u64>(), size.clone()).prop_map(|(value, size)| AccessData { value, size });
    prop_oneof![
        8 => (port(), size.clone()).prop_map(|(port, size)| Event::Read(port, size)),
        16 => (port(), data).prop_map(|(port, data)| Event::Write(port, data)),
        1 => (any::<u64>(), size).prop_map(|(addr, size)| Event::Mmio(addr, size)),
        4 => (0u64..100_000_000).prop_map(Event::Later),
        1 => any::<u64>().prop_map(Event::Later),
        4 => Just(Event::Time),
        2 => proptest::collection::vec(any::<u8>(), 1..40).prop_map(Event::Input),
        4 => Just(Event::Acknowledge),
    ]
}

/// What one event let the guest see.
fn apply(
    board: &mut Board,
    env: &mut TestEnvironment,
    event: &Event,
) -> (u64, bool, Option<Nanos>) {
    let seen = match event {
        Event::Read(port, size) => board.port_read(*port, *size, env).expect("no error"),
        Event::Write(port, data) => {
            board.port_write(*port, *data, env).expect("no error");
            0
        }
        Event::Mmio(addr, size) => board
            .mmio_read(GuestPhysAddr::new(*addr), *size, env)
            .expect("no error"),
        Event::Later(nanos) => {
            env.now = env.now.saturating_add(*nanos);
            0
        }
        Event::Time => {
            board.time(env.now);
            0
        }
        Event::Input(bytes) => {
            board.input(Channel::Com1, bytes);
            0
        }
        Event::Acknowledge => board.acknowledge().map_or(256, |vector| vector.0.into()),
    };
    (seen, board.interrupt_pending(), board.deadline())
}

proptest! {
    #[test]
    fn random_traffic_survives_saving_and_restoring(
        events in proptest::collection::vec(event(), 0..300),
        cut in any::<proptest::sample::Index>(),
    ) {
        let mut board = Board::new(&BoardConfig::default());
        let mut env = TestEnvironment::default();
        let cut = cut.index(events.len() + 1);
        for event in &events[..cut] {
            apply(&mut board, &mut env, event);
        }
        let state = board.save();
        let mut twin = Board::new(&BoardConfig { boot_time: 0 });
        twin.restore(&state).expect("its own state");
        prop_assert_eq!(&twin.save(), &state);
        prop_assert_eq!(&twin, &board);
        let mut twin_env = env.clone();
        for event in &events[cut..] {
            let seen = apply(&mut board, &mut env, event);
            prop_assert_eq!(apply(&mut twin, &mut twin_env, event), seen, "{:?}", event);
        }
        prop_assert_eq!(env, twin_env);
        prop_assert_eq!(twin.save(), board.save());
    }

    #[test]
    fn a_deadline_is_when_something_happens(
        events in proptest::collection::vec(event(), 0..100),
    ) {
        let mut board = Board::new(&BoardConfig::default());
        let mut env = TestEnvironment::default();
        for event in &events {
            apply(&mut board, &mut env, event);
        }
        board.time(env.now);
        let Some(due) = board.deadline() else { return Ok(()) };
        prop_assert!(due > env.now || env.now == Nanos::NEVER);
        // Asking early changes nothing that would not be so anyway.
        let mut asked = board.clone();
        asked.time(Nanos::new(due.get().saturating_sub(1)));
        prop_assert_eq!(asked.interrupt_pending(), board.interrupt_pending());
        asked.time(due);
        board.time(due);
        prop_assert_eq!(asked.save(), board.save());
    }

    #[test]
    fn arbitrary_saved_bytes_are_refused_or_harmless(
        device in 0usize..7,
        at in any::<proptest::sample::Index>(),
        value in any::<u8>(),
        events in proptest::collection::vec(event(), 0..60),
    ) {
        let mut board = Board::new(&BoardConfig::default());
        let mut env = TestEnvironment::default();
        for event in &events {
            apply(&mut board, &mut env, event);
        }
        let mut state = board.save();
        let bytes = &mut state.devices[device].bytes;
        let at = at.index(bytes.len());
        bytes[at] = value;
        if board.restore(&state).is_ok() {
            for event in &events {
                apply(&mut board, &mut env, event);
            }
        }
    }
}
