//! Moving the machine, and asking it things.
//!
//! Purpose: commands become jobs; a job runs in slices between two frames, so that the screen lives and a key can stop it.
//! Invariants: a slice ends by itself. Between jobs the machine has exactly the user's breakpoints. After an error of its engine the machine is
//! looked at but not moved any more.
//! Elsewhere: stopping at instructions, and time ([`machine::debuggable`]).

use crate::app::{App, Mode};
use crate::keys::Command;
use crate::prompts::{Overlay, Question};
use introspect::disassembly::{Code, Line};
use introspect::page_walk::explain;
use introspect::virtual_memory::{read_available, translate};
use machine::debuggable::{DebugError, Debuggable, EventView, Resume, Stop};
use machine::engine::EngineError;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use x86::{CpuState, Gpr, GuestVirtAddr, Position};

/// What the machine is doing for the user.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Job {
    /// So many instructions.
    Step { left: u64 },
    /// So many instructions, calls counting as one.
    Next { left: u64, over: Option<Return> },
    /// Until the function returns.
    Finish(Return),
    /// To a breakpoint.
    Continue,
    /// To the end.
    RunToEnd,
    /// So many instructions back.
    StepBack { left: u64 },
    /// Back to a breakpoint.
    ContinueBack,
    /// To a position, back or forward.
    Seek(Position),
    /// To where an event arrives, which is known once the machine has passed it.
    SeekEvent(u64),
}

impl Job {
    /// Only a machine that keeps its past can do it.
    pub(crate) const fn needs_past(self) -> bool {
        matches!(
            self,
            Self::StepBack { .. } | Self::ContinueBack | Self::Seek(_)
        )
    }
}

/// A return to wait for: this instruction, with the stack pointer above that value, lest a deeper call of the same function be
/// taken for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Return {
    to: GuestVirtAddr,
    above: u64,
}

/// Lines of memory shown at once, of 16 bytes each.
const MEMORY_LINES: u64 = 64;

impl App<'_> {
    /// Carries out what a key asked for.
    pub(crate) fn command(&mut self, machine: &mut dyn Debuggable, command: Command) {
        match command {
            Command::Step(left) => self.start(machine, Job::Step { left }),
            Command::Next(left) => self.start(machine, Job::Next { left, over: None }),
            Command::Finish => self.finish(machine),
            Command::Continue => self.start(machine, Job::Continue),
            Command::RunToEnd => self.start(machine, Job::RunToEnd),
            Command::StepBack(left) => self.start(machine, Job::StepBack { left }),
            Command::ContinueBack => self.start(machine, Job::ContinueBack),
            Command::Pause => {
                self.stop(machine);
                self.say("paused");
            }
            Command::ToggleBreakpoint => self.toggle_breakpoint(machine, self.listing.cursor()),
            Command::MoveCursor(by) => {
                if let Ok(cpu) = &self.view.cpu {
                    let code = Code {
                        cpu,
                        memory: machine.memory(),
                        symbols: self.symbols,
                    };
                    self.listing.move_cursor(&self.disassembler, &code, by);
                }
            }
            Command::Answer(question, answer) => self.answer(machine, question, &answer),
            // The terminal's business.
            Command::Suspend => {}
        }
    }

    /// Runs the present job for about `slice`.
    pub(crate) fn slice(&mut self, machine: &mut dyn Debuggable, slice: Duration) {
        let deadline = Instant::now() + slice;
        self.stale = true;
        loop {
            let Some(job) = self.job else { return };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            if let Err(error) = self.turn(machine, job, left) {
                self.failed(machine, &error);
                return;
            }
        }
    }

    /// One resumption of the machine.
    fn turn(
        &mut self,
        machine: &mut dyn Debuggable,
        job: Job,
        slice: Duration,
    ) -> Result<(), DebugError> {
        let step = Resume::Step(self.vcpu);
        match job {
            Job::Step { left } => {
                let stop = machine.resume(step, slice)?;
                self.stepped(machine, &stop, left, |left| Job::Step { left })
            }
            Job::Next { left, over: None } => match self.call_to_step_over(machine)? {
                Some(over) => {
                    self.set_stops(machine, Some(over.to))?;
                    self.job = Some(Job::Next {
                        left,
                        over: Some(over),
                    });
                    Ok(())
                }
                None => {
                    let stop = machine.resume(step, slice)?;
                    self.stepped(machine, &stop, left, |left| Job::Next { left, over: None })
                }
            },
            Job::Next {
                left,
                over: Some(over),
            } => {
                let stop = machine.resume(Resume::Continue, slice)?;
                if self.returned(machine, &stop, over)? {
                    self.set_stops(machine, None)?;
                    return self.stepped(machine, &Stop::Stepped, left, |left| Job::Next {
                        left,
                        over: None,
                    });
                }
                Ok(())
            }
            Job::Finish(over) => {
                let stop = machine.resume(Resume::Continue, slice)?;
                if self.returned(machine, &stop, over)? {
                    self.stop(machine);
                }
                Ok(())
            }
            Job::Continue | Job::RunToEnd => {
                let stop = machine.resume(Resume::Continue, slice)?;
                self.stopped(machine, &stop);
                Ok(())
            }
            Job::StepBack { left } => {
                let vcpu = self.vcpu;
                let stop = past(machine)?.step_back(vcpu, slice)?;
                self.stepped(machine, &stop, left, |left| Job::StepBack { left })
            }
            Job::Seek(position) => {
                let stop = past(machine)?.seek(position, slice)?;
                self.stopped(machine, &stop);
                Ok(())
            }
            Job::SeekEvent(index) => {
                let position = event(machine, index).and_then(|event| event.position);
                if let Some(position) = position {
                    self.job = Some(Job::Seek(position));
                    return Ok(());
                }
                let stop = machine.resume(Resume::Continue, slice)?;
                let passed = event(machine, index).is_some_and(|event| event.position.is_some());
                if !passed {
                    self.stopped(machine, &stop);
                }
                Ok(())
            }
            Job::ContinueBack => {
                let stop = past(machine)?.continue_back(slice)?;
                self.stopped(machine, &stop);
                Ok(())
            }
        }
    }

    /// Counts a step; `again` makes the job for the rest.
    fn stepped(
        &mut self,
        machine: &mut dyn Debuggable,
        stop: &Stop,
        left: u64,
        again: fn(u64) -> Job,
    ) -> Result<(), DebugError> {
        if *stop != Stop::Stepped {
            self.stopped(machine, stop);
            return Ok(());
        }
        let left = left.saturating_sub(1);
        if left == 0 {
            self.stop(machine);
            return Ok(());
        }
        if !self.breakpoints.is_empty() {
            let here = machine.cpu(self.vcpu)?.rip_linear();
            if self.breakpoints.contains(&here) {
                self.stopped(machine, &Stop::Breakpoint(self.vcpu, here));
                return Ok(());
            }
        }
        self.job = Some(again(left));
        Ok(())
    }

    /// Whether `stop` is the return waited for; stops for good at anything else but an early passage of the same instruction.
    fn returned(
        &mut self,
        machine: &mut dyn Debuggable,
        stop: &Stop,
        over: Return,
    ) -> Result<bool, DebugError> {
        match *stop {
            Stop::Breakpoint(_, at) if at == over.to => {
                let stack = machine.cpu(self.vcpu)?.regs[Gpr::Rsp];
                if stack > over.above {
                    return Ok(true);
                }
                if self.breakpoints.contains(&at) {
                    self.stopped(machine, stop);
                }
                Ok(false)
            }
            _ => {
                self.stopped(machine, stop);
                Ok(false)
            }
        }
    }

    /// The return to wait for when the next instruction is a call.
    fn call_to_step_over(
        &self,
        machine: &mut dyn Debuggable,
    ) -> Result<Option<Return>, DebugError> {
        let cpu = machine.cpu(self.vcpu)?;
        let code = Code {
            cpu: &cpu,
            memory: machine.memory(),
            symbols: self.symbols,
        };
        let line = self.disassembler.line(&code, cpu.rip_linear());
        // The call pushes, the return pops: then the stack pointer is where it is now.
        let above = cpu.regs[Gpr::Rsp].wrapping_sub(1);
        Ok(match line {
            Line {
                is_call: true,
                next: Some(to),
                ..
            } => Some(Return { to, above }),
            _ => None,
        })
    }

    fn finish(&mut self, machine: &mut dyn Debuggable) {
        let caller = self
            .view
            .backtrace
            .as_ref()
            .and_then(|trace| trace.frames.get(1));
        let stack = self.view.cpu.as_ref().map(|cpu| cpu.regs[Gpr::Rsp]);
        match (caller, stack) {
            (Some(caller), Ok(above)) => {
                let over = Return {
                    to: caller.address,
                    above,
                };
                self.start(machine, Job::Finish(over));
            }
            _ => self.complain("the caller is not known here (see the backtrace)"),
        }
    }

    fn start(&mut self, machine: &mut dyn Debuggable, job: Job) {
        if let Some(failed) = &self.failed {
            let text = format!("the machine cannot go on: {failed}");
            return self.complain(text);
        }
        if job.needs_past() && !self.can_reverse {
            return self.complain("this machine keeps no past to go back to");
        }
        self.before.clone_from(&self.view.items);
        let stops = match job {
            Job::RunToEnd | Job::SeekEvent(_) => machine.set_breakpoints(&BTreeSet::new()),
            Job::Finish(over) => self.set_stops(machine, Some(over.to)),
            _ => self.set_stops(machine, None),
        };
        match stops {
            Ok(()) => self.job = Some(job),
            Err(error) => self.complain(error.to_string()),
        }
    }

    /// Puts the user's breakpoints in force, and one more.
    fn set_stops(
        &self,
        machine: &mut dyn Debuggable,
        extra: Option<GuestVirtAddr>,
    ) -> Result<(), DebugError> {
        if extra.is_none_or(|at| self.breakpoints.contains(&at)) {
            return machine.set_breakpoints(&self.breakpoints);
        }
        let mut all = self.breakpoints.clone();
        all.extend(extra);
        machine.set_breakpoints(&all)
    }

    /// Ends the job where the machine stands.
    fn stop(&mut self, machine: &mut dyn Debuggable) {
        let job = self.job.take();
        if let Err(error) = self.set_stops(machine, None) {
            self.complain(error.to_string());
        }
        if job.is_some_and(Job::needs_past) {
            // What was shown need not be the beginning of what is there now.
            self.console.forget();
        }
        self.arrived(machine);
    }

    /// Ends the job for a reason of the machine's, unless it is only a slice that is over.
    fn stopped(&mut self, machine: &mut dyn Debuggable, stop: &Stop) {
        let text = match stop {
            Stop::Slice => return,
            Stop::Stepped => String::new(),
            Stop::Breakpoint(_, at) => format!("breakpoint at {}", self.name(*at)),
            Stop::Ended(end) => format!("the guest ended: {end}"),
            Stop::EndOfHistory => "the recording ends here".to_owned(),
            Stop::StartOfHistory => "the recording starts here".to_owned(),
            Stop::Diverged(text) => format!("the replay left its recording: {text}"),
        };
        self.stop(machine);
        if let Stop::Diverged(reason) = stop {
            self.complain(text);
            self.mode = Mode::Overlay(Overlay::new(
                "the replay left its recording",
                reason.lines().map(str::to_owned).collect(),
            ));
        } else if !text.is_empty() {
            self.say(text);
        }
    }

    fn failed(&mut self, machine: &mut dyn Debuggable, error: &DebugError) {
        self.job = None;
        // What it says about breakpoints now does not matter any more.
        let _ = self.set_stops(machine, None);
        self.arrived(machine);
        let harmless = matches!(
            error,
            DebugError::Refused(_)
                | DebugError::Memory(_)
                | DebugError::Engine(EngineError::Unsupported { .. } | EngineError::CannotCount(_))
        );
        if !harmless {
            self.failed = Some(error.to_string());
        }
        self.complain(error.to_string());
    }

    fn toggle_breakpoint(&mut self, machine: &mut dyn Debuggable, at: GuestVirtAddr) {
        let set = self.breakpoints.insert(at);
        if !set {
            self.breakpoints.remove(&at);
        }
        if let Err(error) = self.set_stops(machine, None) {
            if set {
                self.breakpoints.remove(&at);
            } else {
                self.breakpoints.insert(at);
            }
            return self.complain(error.to_string());
        }
        let name = self.name(at);
        self.say(format!(
            "breakpoint {} at {name}",
            if set { "set" } else { "cleared" }
        ));
    }

    fn name(&self, at: GuestVirtAddr) -> String {
        match self.symbols.lookup(at) {
            Some(location) => format!("{location} ({at:#x})"),
            None => format!("{at:#x}"),
        }
    }

    fn answer(&mut self, machine: &mut dyn Debuggable, question: Question, answer: &str) {
        if question == Question::Position {
            return match place(machine, answer) {
                Ok(job) => self.start(machine, job),
                Err(error) => self.complain(error),
            };
        }
        let at = match self.symbols.parse(answer) {
            Ok(at) => at,
            Err(error) => return self.complain(error.to_string()),
        };
        if question == Question::Breakpoint {
            return self.toggle_breakpoint(machine, at);
        }
        let cpu = match &self.view.cpu {
            Ok(cpu) => cpu,
            Err(error) => {
                let error = error.clone();
                return self.complain(error);
            }
        };
        match question {
            Question::Goto => {
                self.listing.show(at);
                self.set_focus(crate::app::Panel::Disassembly);
            }
            Question::Walk => {
                let lines = explain(cpu, machine.memory(), at).lines();
                self.mode = Mode::Overlay(Overlay::new("page walk", lines));
            }
            Question::Memory => match memory_lines(machine, cpu, at) {
                Ok(lines) => {
                    let title = format!("memory at {}", self.name(at));
                    self.mode = Mode::Overlay(Overlay::new(title, lines));
                }
                Err(error) => self.complain(error),
            },
            Question::Breakpoint | Question::Position => {}
        }
    }
}

fn past(machine: &mut dyn Debuggable) -> Result<&mut dyn machine::debuggable::Reverse, DebugError> {
    machine
        .reverse()
        .ok_or_else(|| DebugError::Refused("this machine keeps no past to go back to".to_owned()))
}

/// The journey that text means: to `12345` or `12,345+2`, or to where event `#7` arrives.
fn place(machine: &dyn Debuggable, text: &str) -> Result<Job, String> {
    let text = text.trim().replace([',', '_'], "");
    let Some(number) = text.strip_prefix('#') else {
        let position = text
            .parse::<Position>()
            .map_err(|error| error.to_string())?;
        return Ok(Job::Seek(position));
    };
    number
        .parse()
        .ok()
        .filter(|&number| event(machine, number).is_some())
        .map(Job::SeekEvent)
        .ok_or_else(|| format!("no event {text}; there are {}", machine.events().len()))
}

fn event(machine: &dyn Debuggable, index: u64) -> Option<&EventView> {
    machine.events().iter().find(|event| event.index == index)
}

/// Memory in hexadecimal and as text, as far as it can be read.
fn memory_lines(
    machine: &dyn Debuggable,
    cpu: &CpuState,
    at: GuestVirtAddr,
) -> Result<Vec<String>, String> {
    translate(cpu, machine.memory(), at).map_err(|error| error.to_string())?;
    let bytes = read_available(cpu, machine.memory(), at, (16 * MEMORY_LINES) as usize);
    let line = |(index, chunk): (usize, &[u8])| {
        let addr = at.wrapping_add(16 * index as u64);
        let mut hex = String::new();
        for (column, byte) in chunk.iter().enumerate() {
            hex.push_str(if column == 8 { "  " } else { " " });
            hex.push_str(&format!("{byte:02x}"));
        }
        let text: String = chunk
            .iter()
            .map(|&byte| {
                if byte.is_ascii_graphic() || byte == b' ' {
                    byte as char
                } else {
                    '.'
                }
            })
            .collect();
        format!("{addr:#x} {hex:<49} {text}")
    };
    Ok(bytes.chunks(16).enumerate().map(line).collect())
}
