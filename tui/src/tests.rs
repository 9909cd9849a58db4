//! The UI as a whole: keys in, screens out.

mod fake;

use crate::app::{App, Mode, Panel};
use crate::keys::Command;
use crate::theme::Theme;
use crate::{render, render_text, text};
use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use fake::{Fake, TEXT, symbols};
use introspect::disassembly::Syntax;
use introspect::symbols::Symbols;
use machine::debuggable::Debuggable;
use proptest::prelude::*;
use std::time::Duration;
use x86::{CpuState, Gpr};

/// The UI over the fake machine, driven by keys, without a terminal.
struct Desk<'s> {
    machine: Fake,
    app: App<'s>,
    size: (u16, u16),
}

impl<'s> Desk<'s> {
    fn new(symbols: &'s Symbols) -> Self {
        let mut machine = Fake::new();
        let app = App::new(
            &mut machine,
            symbols,
            Syntax::Intel,
            Theme::new(true, false),
        )
        .expect("capstone");
        let mut desk = Self {
            machine,
            app,
            size: (80, 24),
        };
        desk.screen();
        desk
    }

    fn press(&mut self, code: KeyCode, modifiers: KeyModifiers) {
        match self.app.key(KeyEvent::new(code, modifiers)) {
            Some(Command::Suspend) | None => {}
            Some(command) => self.app.command(&mut self.machine, command),
        }
    }

    /// Types `keys`, letting the machine finish after each, and draws.
    fn keys(&mut self, keys: &str) -> &mut Self {
        for key in keys.chars() {
            let code = match key {
                '\n' => KeyCode::Enter,
                '\t' => KeyCode::Tab,
                key => KeyCode::Char(key),
            };
            self.press(code, KeyModifiers::NONE);
            self.settle();
        }
        self.screen();
        self
    }

    fn settle(&mut self) {
        for _ in 0..100 {
            if self.app.job.is_none() {
                return;
            }
            self.app.slice(&mut self.machine, Duration::from_secs(5));
        }
        panic!("still running: {:?}", self.app.job);
    }

    fn screen(&mut self) -> String {
        let (width, height) = self.size;
        text(&render(&mut self.machine, &mut self.app, width, height))
    }

    fn rip(&mut self) -> u64 {
        self.machine.cpu(self.app.vcpu).expect("readable").regs.rip - TEXT
    }

    fn message(&self) -> &str {
        self.app
            .message
            .as_ref()
            .map_or("", |message| &message.text)
    }
}

#[test]
fn screens_of_all_sizes() {
    let symbols = symbols();
    let mut desk = Desk::new(&symbols);
    desk.keys("Bprint\nccs");
    for (width, height) in [(40, 12), (80, 24), (120, 40), (200, 60)] {
        desk.size = (width, height);
        insta::assert_snapshot!(format!("stopped_{width}x{height}"), desk.screen());
    }
}

#[test]
fn the_end_of_the_guest_and_every_shared_panel() {
    let symbols = symbols();
    let mut desk = Desk::new(&symbols);
    desk.keys("G");
    insta::assert_snapshot!("ended_console", desk.screen());
    desk.app.set_focus(Panel::Exits);
    insta::assert_snapshot!("ended_exits", desk.screen());
    desk.app.set_focus(Panel::Events);
    insta::assert_snapshot!("ended_events", desk.screen());
    assert!(desk.screen().contains("ENDED: debug exit with 3"));
}

#[test]
fn texts_over_the_panels() {
    let symbols = symbols();
    let mut desk = Desk::new(&symbols);
    desk.keys("?");
    insta::assert_snapshot!("help", desk.screen());
    desk.keys("q").keys("wmain\n");
    insta::assert_snapshot!("walk", desk.screen());
    desk.keys(" ").keys("x0x100000\n");
    insta::assert_snapshot!("memory", desk.screen());
    desk.keys(" ").keys("g");
    assert!(desk.screen().contains("show code at (symbol or address):"));
}

#[test]
fn ascii_frames_on_demand() {
    let symbols = symbols();
    let mut machine = Fake::new();
    let mut app =
        App::new(&mut machine, &symbols, Syntax::Att, Theme::new(true, true)).expect("capstone");
    let screen = text(&render(&mut machine, &mut app, 80, 24));
    assert!(screen.is_ascii(), "{screen}");
    assert!(screen.contains("callq"), "AT&T syntax");
}

#[test]
fn stepping_goes_into_calls_and_next_over_them() {
    let symbols = symbols();
    let mut desk = Desk::new(&symbols);
    assert_eq!(desk.keys("s").rip(), 0x10, "into main");
    assert_eq!(desk.keys("2s").rip(), 0x14, "a count");
    assert_eq!(desk.keys("n").rip(), 0x19, "over print");
    assert_eq!(desk.machine.position().map(|p| p.retired.get()), Some(10));
    assert_eq!(desk.keys("2n").rip(), 0x23);
    assert_eq!(desk.keys("S").rip(), 0x3a, "back into print");
    assert_eq!(desk.keys("f").rip(), 0x23, "and out of it");
    assert_eq!(
        desk.keys("99s").message(),
        "the guest ended: debug exit with 3"
    );
}

#[test]
fn breakpoints_stop_everything_but_the_run_to_the_end() {
    let symbols = symbols();
    let mut desk = Desk::new(&symbols);
    desk.keys("Bprint\n");
    assert_eq!(desk.message(), "breakpoint set at print (0x100030)");
    assert_eq!(desk.keys("c").rip(), 0x30);
    assert_eq!(desk.message(), "breakpoint at print (0x100030)");
    desk.keys("c");
    assert_eq!(
        desk.machine.position().map(|p| p.retired.get()),
        Some(11),
        "the second call"
    );
    assert_eq!(
        desk.keys("f").rip(),
        0x1e,
        "out of the function the breakpoint is in"
    );
    assert_eq!(
        desk.keys("n").rip(),
        0x30,
        "a breakpoint within what is stepped over"
    );
    desk.keys("CC");
    assert_eq!(
        desk.machine.position().map(|p| p.retired.get()),
        Some(4),
        "back to the first"
    );
    assert_eq!(
        desk.keys("100s").rip(),
        0x30,
        "a counted step stops there too"
    );
    assert_eq!(
        desk.keys("b").message(),
        "breakpoint cleared at print (0x100030)"
    );
    assert_eq!(
        desk.keys("Bmain\nCG").message(),
        "the guest ended: debug exit with 3"
    );
    assert!(desk.app.breakpoints.len() == 1, "kept");
}

#[test]
fn the_past_has_a_start_and_some_machines_have_none() {
    let symbols = symbols();
    let mut desk = Desk::new(&symbols);
    assert_eq!(desk.keys("sS").rip(), 0);
    assert_eq!(desk.keys("S").message(), "the recording starts here");
    desk.app.can_reverse = false;
    assert_eq!(
        desk.keys("S").message(),
        "this machine keeps no past to go back to"
    );
    assert_eq!(
        desk.keys("f").message(),
        "the caller is not known here (see the backtrace)"
    );
}

#[test]
fn travelling_goes_to_positions_and_events() {
    let symbols = symbols();
    let mut desk = Desk::new(&symbols);
    let position = |desk: &Desk<'_>| desk.machine.position().map(|p| p.retired.get());
    desk.keys("t20\n");
    assert_eq!(position(&desk), Some(20));
    desk.keys("t#0\n");
    assert_eq!(position(&desk), Some(7), "back to where event 0 arrived");
    desk.keys("Bprint\nt#2\n");
    assert_eq!(
        position(&desk),
        Some(21),
        "on past breakpoints, then back to where event 2 arrived"
    );
    assert_eq!(desk.app.breakpoints.len(), 1, "which are still there");
    let message = desk.keys("t#3\n").message();
    assert_eq!(
        message, "the guest ended: debug exit with 3",
        "event 3 never arrives"
    );
    assert_eq!(desk.keys("t#44\n").message(), "no event #44; there are 4");
    assert!(desk.keys("tx\n").message().contains("not a position"));
    assert_eq!(
        desk.keys("t1,000\n").message(),
        "the guest ended: debug exit with 3"
    );
}

#[test]
fn a_long_run_goes_on_in_slices_until_a_key_pauses_it() {
    let symbols = symbols();
    let mut desk = Desk::new(&symbols);
    desk.machine.endless = true;
    desk.press(KeyCode::Char('c'), KeyModifiers::NONE);
    let mut last = None;
    for _ in 0..3 {
        desk.app.slice(&mut desk.machine, Duration::from_millis(1));
        assert!(desk.screen().contains("RUNNING"));
        assert!(desk.machine.position() > last, "each slice gets on");
        last = desk.machine.position();
    }
    desk.press(KeyCode::Char('x'), KeyModifiers::NONE);
    assert_eq!(desk.message(), "paused");
    assert!(desk.screen().contains("STOPPED"));
    assert!(
        matches!(desk.app.mode, Mode::Panels),
        "the pausing key does nothing else"
    );
}

#[test]
fn changed_registers_are_marked() {
    let symbols = symbols();
    let mut desk = Desk::new(&symbols);
    let marked = |desk: &mut Desk<'_>| -> Vec<&'static str> {
        let view = &desk.app.view;
        let pairs = view.items.iter().zip(&view.changed);
        pairs
            .filter(|(_, changed)| **changed)
            .map(|(item, _)| item.name)
            .collect()
    };
    desk.keys("s");
    assert_eq!(marked(&mut desk), ["rsp", "rip"]);
    desk.keys("2s");
    assert_eq!(
        marked(&mut desk),
        ["rsp", "rbp", "rip"],
        "compared with the last stop"
    );
}

#[test]
fn a_wrong_answer_says_what_would_be_right() {
    let symbols = symbols();
    let mut desk = Desk::new(&symbols);
    desk.keys("gnowhere\n");
    assert_eq!(
        desk.message(),
        "no symbol is called \"nowhere\"; write a symbol, symbol+0x12, or an address as 0x1234"
    );
    desk.keys("x0xdead0000\n");
    assert!(desk.message().contains("not mapped"), "{}", desk.message());
}

#[test]
fn the_cursor_moves_through_the_code_and_stays_on_the_screen() {
    let symbols = symbols();
    let mut desk = Desk::new(&symbols);
    desk.size = (60, 20);
    for (code, times) in [
        (KeyCode::Down, 30),
        (KeyCode::PageDown, 3),
        (KeyCode::Up, 50),
    ] {
        for _ in 0..times {
            desk.press(code, KeyModifiers::NONE);
            desk.screen();
            let cursor = desk.app.listing.cursor();
            let on_screen = desk.app.listing.rows().iter().any(
                |row| matches!(row, crate::listing::Row::Code(line) if line.address == cursor),
            );
            assert!(on_screen, "{cursor:?} after {code:?}");
        }
    }
    desk.keys(".");
    assert_eq!(desk.app.listing.cursor().get(), TEXT);
}

#[test]
fn tab_completes_symbols() {
    let symbols = symbols();
    let mut desk = Desk::new(&symbols);
    desk.keys("gpr\t");
    assert!(
        desk.screen().contains("address): print"),
        "{}",
        desk.screen()
    );
    desk.keys("\n");
    assert_eq!(desk.app.listing.cursor().get(), TEXT + 0x30);
    desk.keys("g\t");
    assert!(
        desk.screen().contains("_start main print"),
        "{}",
        desk.screen()
    );
    desk.keys("zz\t");
    assert!(
        desk.screen().contains("no such symbol"),
        "{}",
        desk.screen()
    );
}

#[test]
fn the_present_is_visible_among_many_events() {
    let symbols = symbols();
    let mut desk = Desk::new(&symbols);
    let event = desk.machine.events()[0].clone();
    desk.machine.repeat_event(&event, 5000);
    desk.app.set_focus(Panel::Events);
    desk.keys("s");
    assert!(
        desk.screen().contains("here: 2500 arrived, 2500 to come"),
        "{}",
        desk.screen()
    );
    desk.press(KeyCode::Home, KeyModifiers::NONE);
    assert!(desk.screen().contains("#0 "), "{}", desk.screen());
    desk.keys("s");
    assert!(desk.screen().contains("here: "), "moving shows it again");
}

#[test]
fn what_the_guest_writes_does_not_reach_the_terminal() {
    let symbols = symbols();
    let mut desk = Desk::new(&symbols);
    desk.keys("G");
    let screen = desk.screen();
    assert!(screen.contains("cpu 0: timer at 100 Hz"), "{screen}");
    assert!(
        !screen.contains('\x1b') && !screen.contains("owned"),
        "{screen}"
    );
}

#[test]
fn one_screen_as_text() {
    let screen = render_text(&mut Fake::new(), &symbols(), 100, 30).expect("renders");
    assert_eq!(screen.lines().count(), 30);
    assert!(screen.contains("call    0x100010  <main>"), "{screen}");
}

fn any_key() -> impl Strategy<Value = (KeyCode, KeyModifiers)> {
    let code = prop_oneof![
        8 => prop::char::range(' ', '~').prop_map(KeyCode::Char),
        1 => any::<char>().prop_map(KeyCode::Char),
        2 => (1u8..25).prop_map(KeyCode::F),
        6 => prop::sample::select(vec![
            KeyCode::Up, KeyCode::Down, KeyCode::PageUp, KeyCode::PageDown, KeyCode::Home, KeyCode::End,
            KeyCode::Tab, KeyCode::BackTab, KeyCode::Enter, KeyCode::Esc, KeyCode::Backspace,
            KeyCode::Left, KeyCode::Right, KeyCode::Delete, KeyCode::Null,
        ]),
    ];
    let modifiers = prop::sample::select(vec![
        KeyModifiers::NONE,
        KeyModifiers::NONE,
        KeyModifiers::SHIFT,
        KeyModifiers::CONTROL,
        KeyModifiers::ALT,
    ]);
    (code, modifiers)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_sequence_of_keys_and_sizes_panics(
        steps in proptest::collection::vec((any_key(), 0u16..220, 0u16..70), 0..60),
        registers in any::<[u64; 4]>(),
    ) {
        let symbols = symbols();
        let mut desk = Desk::new(&symbols);
        for ((code, modifiers), width, height) in steps {
            desk.press(code, modifiers);
            desk.app.slice(&mut desk.machine, Duration::from_millis(1));
            desk.size = (width, height);
            desk.screen();
        }
        // A CPU in a state no program of ours gets into.
        let mut cpu = CpuState::default();
        cpu.regs.rip = registers[0];
        cpu.regs[Gpr::Rbp] = registers[1];
        cpu.regs.rflags = registers[2];
        cpu.cr3 = registers[3];
        desk.machine.set_cpu(desk.app.vcpu, &cpu).expect("set");
        desk.app.arrived(&mut desk.machine);
        desk.screen();
    }
}
