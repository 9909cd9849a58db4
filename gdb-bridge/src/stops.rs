//! What a stop looks like to gdb.
//!
//! Purpose: a [`Stop`] as one of gdb's stop reasons, with a line of text where the reason alone does not tell.
//! Invariants: gdb stays connected through every stop but one: a live guest's end that it has already been told of, when it continues again.
//! - breakpoint: SIGTRAP, `swbreak` or `hwbreak`; step: SIGTRAP; Ctrl-C: SIGINT.
//! - the end of a live guest: SIGTERM first, the exit with its status on the next resume;
//! - either end of a timeline: `replaylog` where the machine goes back in time, SIGTRAP where it cannot;
//! - a divergence or a failure of the host: SIGABRT.
//!
//! Elsewhere: running (`resume.rs`).
//! Source: "Debugging with gdb", E.3 (stop reply packets).

use crate::bridge::{Bridge, tid};
use crate::server::Mode;
use gdbstub::common::Signal;
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::reverse_exec::ReplayLogPosition;
use machine::End;
use machine::debuggable::Stop;

pub(crate) type StopReason = MultiThreadStopReason<u64>;

impl Bridge<'_> {
    /// The reply to a resume of a machine that cannot go on; `None` if it can.
    pub(crate) fn cannot_run(&mut self) -> Option<StopReason> {
        if let Some(why) = &self.failed {
            self.notes.push(format!("the machine cannot go on: {why}"));
            return Some(self.signal(Signal::SIGABRT));
        }
        match self.machine.end() {
            Some(end) if self.mode == Mode::Live && self.end_told => {
                Some(StopReason::Exited(end.status()))
            }
            _ => None,
        }
    }

    /// What gdb is told of `stop`, which is not [`Stop::Slice`].
    pub(crate) fn stopped(&mut self, stop: Stop) -> StopReason {
        match stop {
            Stop::Stepped | Stop::Slice => self.signal(Signal::SIGTRAP),
            Stop::Breakpoint(vcpu, at) if self.software.contains(&at) => {
                StopReason::SwBreak(tid(vcpu))
            }
            Stop::Breakpoint(vcpu, _) => StopReason::HwBreak(tid(vcpu)),
            Stop::Ended(end) => self.ended(end),
            Stop::EndOfHistory => {
                let line = "the trace ends here, without the guest having ended".to_owned();
                self.end_of_timeline(line, ReplayLogPosition::End)
            }
            Stop::StartOfHistory => self.end_of_timeline(
                "the recording starts here".to_owned(),
                ReplayLogPosition::Begin,
            ),
            Stop::Diverged(how) => {
                self.notes
                    .push(format!("the replay left its recording: {how}"));
                self.signal(Signal::SIGABRT)
            }
        }
    }

    /// The reply to Ctrl-C.
    pub(crate) fn interrupted(&self) -> StopReason {
        self.signal(Signal::SIGINT)
    }

    fn ended(&mut self, end: End) -> StopReason {
        match self.mode {
            Mode::Live => {
                self.end_told = true;
                self.notes.push(format!(
                    "the guest ended: {end}; its registers and memory are as it left them, and the next continue ends the session"
                ));
                self.signal(Signal::SIGTERM)
            }
            Mode::Timeline => self.end_of_timeline(
                format!("the guest ended here: {end}"),
                ReplayLogPosition::End,
            ),
        }
    }

    fn end_of_timeline(&mut self, line: String, pos: ReplayLogPosition) -> StopReason {
        self.notes.push(line);
        if self.machine.reverse().is_some() {
            let tid = Some(tid(self.action.vcpu().unwrap_or_else(|| self.first_vcpu())));
            StopReason::ReplayLog { tid, pos }
        } else {
            self.signal(Signal::SIGTRAP)
        }
    }

    fn signal(&self, signal: Signal) -> StopReason {
        let vcpu = self.action.vcpu().unwrap_or_else(|| self.first_vcpu());
        StopReason::SignalWithThread {
            tid: tid(vcpu),
            signal,
        }
    }
}
