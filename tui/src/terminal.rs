//! The terminal, taken and given back.
//!
//! Purpose: raw mode and the alternate screen for as long as the UI runs; the loop of frames, keys and slices of the machine's work.
//! Invariants: on every way out (return, error, panic in any thread, SIGINT, SIGTERM, SIGHUP) the terminal's modes, screen and cursor are as they were.
//! A first signal ends the loop at the next slice; a second one does not wait for it, nor does the first for a loop that is stuck.
//! A terminal that goes away ends the UI.
//! Elsewhere: everything that is on the screen.
//! Source: termios(3); ECMA-48 and xterm's control sequences, by crossterm.

use crate::TuiError;
use crate::app::App;
use crate::keys::Command;
use crate::panels;
use crossterm::event::{self, Event};
use crossterm::terminal::{EnterAlternateScreen, LeaveAlternateScreen};
use crossterm::{cursor, execute, terminal};
use machine::debuggable::Debuggable;
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGTSTP};
use signal_hook::iterator::Signals;
use std::io::{self, IsTerminal, Stdout};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

/// The machine runs this long between two frames.
const SLICE: Duration = Duration::from_millis(40);
/// Without a key, signals are looked for this often. Less than a second.
const IDLE: Duration = Duration::from_millis(100);
/// A loop that has not ended so long after a signal is stuck, and the process ends without it.
const GRACE: Duration = Duration::from_secs(3);

/// Whether the terminal is in the UI's hands.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Whether the user wants no colour (see no-color.org).
pub(crate) fn no_color_wanted() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

/// Whether the locale's characters are UTF-8, by the first of the variables that decide it.
pub(crate) fn locale_is_utf8() -> bool {
    let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let locale = set("LC_ALL")
        .or_else(|| set("LC_CTYPE"))
        .or_else(|| set("LANG"));
    locale.is_some_and(|locale| {
        let locale = locale.to_ascii_lowercase();
        locale.contains("utf-8") || locale.contains("utf8")
    })
}

/// Runs the UI until the user quits.
pub(crate) fn run(machine: &mut dyn Debuggable, mut app: App<'_>) -> Result<(), TuiError> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return Err(TuiError::NotATerminal);
    }
    let signals = SignalWatch::start()?;
    let guard = Guard::take()?;
    let mut screen = Terminal::new(CrosstermBackend::new(io::stdout()))
        .map_err(failed("setting up the screen"))?;
    let result = frames(machine, &mut app, &mut screen, &signals);
    // Its destructor would show the cursor, as the guard does, and panic where the terminal has gone away.
    std::mem::forget(screen);
    drop(guard);
    result
}

type Screen = Terminal<CrosstermBackend<Stdout>>;

fn failed(what: &'static str) -> impl Fn(io::Error) -> TuiError {
    move |source| TuiError::Terminal { what, source }
}

fn frames(
    machine: &mut dyn Debuggable,
    app: &mut App<'_>,
    screen: &mut Screen,
    signals: &SignalWatch,
) -> Result<(), TuiError> {
    let mut redraw = true;
    while !app.quit {
        if let Some(signal) = signals.seen() {
            return Err(TuiError::Signal(signal));
        }
        if redraw {
            draw(machine, app, screen)?;
        }
        let wait = if app.job.is_some() {
            Duration::ZERO
        } else {
            IDLE
        };
        redraw = app.job.is_some();
        await_input(wait).map_err(failed("waiting for a key"))?;
        // A burst of keys (a paste, a key held down) is taken in before the next frame.
        while !app.quit && event::poll(Duration::ZERO).map_err(failed("waiting for a key"))? {
            redraw = true;
            if let Event::Key(key) = event::read().map_err(failed("reading a key"))? {
                match app.key(key) {
                    Some(Command::Suspend) => suspend(screen)?,
                    Some(command) => app.command(machine, command),
                    None => {}
                }
            }
            if app.job.is_some() {
                break;
            }
        }
        if app.job.is_some() {
            app.slice(machine, SLICE);
            redraw = true;
        }
    }
    Ok(())
}

/// Waits until a key may have been pressed, `wait` at most. A terminal that has gone away is an error: crossterm would read its end
/// of file over and over and never come back.
fn await_input(wait: Duration) -> io::Result<()> {
    let stdin = io::stdin();
    let mut input = [PollFd::new(&stdin, PollFlags::IN)];
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: wait.subsec_nanos().into(),
    };
    match poll(&mut input, Some(&timeout)) {
        // A signal; the loop looks at them next.
        Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(_)
            if input[0]
                .revents()
                .intersects(PollFlags::HUP | PollFlags::ERR) =>
        {
            Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the terminal has gone away",
            ))
        }
        Ok(_) => Ok(()),
    }
}

fn draw(
    machine: &mut dyn Debuggable,
    app: &mut App<'_>,
    screen: &mut Screen,
) -> Result<(), TuiError> {
    let drawing = failed("drawing");
    screen.autoresize().map_err(&drawing)?;
    let area = screen.get_frame().area();
    app.prepare(machine, area);
    screen
        .draw(|frame| panels::draw(frame, app, machine))
        .map_err(&drawing)?;
    Ok(())
}

/// Gives the terminal back, stops the process as Ctrl-Z does, and takes the terminal again when it is continued.
fn suspend(screen: &mut Screen) -> Result<(), TuiError> {
    restore();
    let stopped = signal_hook::low_level::emulate_default_handler(SIGTSTP);
    enter()?;
    stopped.map_err(failed("stopping the process"))?;
    screen.clear().map_err(failed("drawing"))
}

/// The terminal in the UI's hands; dropping it gives the terminal back.
struct Guard;

impl Guard {
    fn take() -> Result<Self, TuiError> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let report = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                // First, so that the report can be read.
                restore();
                report(info);
            }));
        });
        enter()?;
        Ok(Self)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        restore();
    }
}

fn enter() -> Result<(), TuiError> {
    TAKEN.store(true, Ordering::SeqCst);
    let entered = terminal::enable_raw_mode()
        .and_then(|()| execute!(io::stdout(), EnterAlternateScreen, cursor::Hide));
    entered.map_err(|source| {
        restore();
        TuiError::Terminal {
            what: "taking over the screen",
            source,
        }
    })
}

/// Gives the terminal back; once, however often it is called.
fn restore() {
    if TAKEN.swap(false, Ordering::SeqCst) {
        // A terminal that is gone cannot be restored, and there is nobody to tell.
        let _ = execute!(io::stdout(), LeaveAlternateScreen, cursor::Show);
        let _ = terminal::disable_raw_mode();
    }
}

/// Whether the loop is there to see [`FIRST_SIGNAL`].
static RUNNING: AtomicBool = AtomicBool::new(false);
/// The signal that came first, 0 before.
static FIRST_SIGNAL: AtomicI32 = AtomicI32::new(0);

/// The time in which signals end the loop instead of the process.
struct SignalWatch;

impl SignalWatch {
    fn start() -> Result<Self, TuiError> {
        static WATCHING: Mutex<bool> = Mutex::new(false);
        let watching = failed("setting up signal handling");
        FIRST_SIGNAL.store(0, Ordering::SeqCst);
        let mut started = WATCHING.lock().unwrap_or_else(PoisonError::into_inner);
        if !*started {
            let signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(&watching)?;
            std::thread::Builder::new()
                .name("signals".to_owned())
                .spawn(move || watch(signals))
                .map_err(&watching)?;
            *started = true;
        }
        RUNNING.store(true, Ordering::SeqCst);
        Ok(Self)
    }

    /// The signal that came first.
    fn seen(&self) -> Option<i32> {
        match FIRST_SIGNAL.load(Ordering::SeqCst) {
            0 => None,
            signal => Some(signal),
        }
    }
}

impl Drop for SignalWatch {
    fn drop(&mut self) {
        RUNNING.store(false, Ordering::SeqCst);
    }
}

/// The watching thread. It stays for good, since a handler once installed cannot be taken away again.
fn watch(mut signals: Signals) {
    for signal in signals.forever() {
        let first = FIRST_SIGNAL.swap(signal, Ordering::SeqCst) == 0;
        if first && RUNNING.load(Ordering::SeqCst) {
            std::thread::spawn(move || end_if_stuck(signal));
        } else {
            end_now(signal);
        }
    }
}

/// Ends the process if the loop does not end after `signal`.
fn end_if_stuck(signal: i32) {
    let since = Instant::now();
    while RUNNING.load(Ordering::SeqCst) {
        if since.elapsed() > GRACE {
            end_now(signal);
            return;
        }
        std::thread::sleep(IDLE);
    }
}

/// Ends the process as the signal would have without us.
fn end_now(signal: i32) {
    restore();
    let _ = signal_hook::low_level::emulate_default_handler(signal);
}
