//! Exceptions during delivery: the double-fault rules.
//!
//! Purpose: deliver an event; when that faults, deliver the fault, a double fault, or shut down.
//! Invariants: registers and segments are those from before for each attempt; only CR2 keeps what a page fault put there.
//! Source: Intel SDM vol. 3A, 6.15 (interrupt 8), tables 6-4 and 6-5.

use crate::delivery::Event;
use crate::guest::Guest;
use crate::stop::Stop;
use x86::{Activity, Exception, Vector};

/// What delivering an event came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Delivery {
    /// The CPU stands at the handler of this vector (the event's, or that of an exception met on the way).
    Delivered(Vector),
    /// No handler could be reached: the CPU is in shutdown.
    TripleFault,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(event: Event) -> Class {
    match event {
        Event::Exception(exception) => match exception.vector {
            Vector::DE | Vector::TS | Vector::NP | Vector::SS | Vector::GP => Class::Contributory,
            Vector::PF => Class::PageFault,
            Vector::DF => Class::DoubleFault,
            _ => Class::Benign,
        },
        _ => Class::Benign,
    }
}

/// What to deliver after `first` met `second` on the way; `None` for a triple fault.
fn next_event(first: Event, second: Exception) -> Option<Event> {
    let met = class(Event::Exception(second));
    let double = Exception::with_code(Vector::DF, 0);
    match (class(first), met) {
        (Class::DoubleFault, _) => None,
        (Class::Contributory, Class::Contributory)
        | (Class::PageFault, Class::Contributory | Class::PageFault) => {
            Some(Event::Exception(double))
        }
        _ => Some(Event::Exception(second)),
    }
}

impl Guest<'_> {
    /// Delivers an event that returns to `back`, and sets RIP to the handler.
    pub(crate) fn raise(&mut self, event: Event, back: u64) -> Result<Delivery, Stop> {
        let mut event = event;
        let mut back = back;
        loop {
            let registers = self.cpu.regs.clone();
            let segments = self.cpu.segments;
            self.mem.stores.clear();
            let stop = match self.deliver_event(event, back) {
                Ok(()) => match self.mem.commit(self.pending) {
                    Ok(()) => {
                        self.cpu.regs.rip = self.next;
                        return Ok(Delivery::Delivered(event.vector()));
                    }
                    Err(stop) => stop,
                },
                Err(stop) => stop,
            };
            self.mem.stores.clear();
            self.cpu.regs = registers;
            self.cpu.segments = segments;
            self.mode_changed();
            let Stop::Fault(second) = stop else {
                return Err(match stop {
                    Stop::Exit(_) => Stop::Unimplemented("event delivery through device memory"),
                    other => other,
                });
            };
            // A fault on the way of a software interrupt is a fault of that instruction.
            back = self.cpu.regs.rip;
            match next_event(event, second) {
                Some(next) => event = next,
                None => {
                    self.cpu.activity = Activity::Shutdown;
                    return Ok(Delivery::TripleFault);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_double_faults() {
        let pf = Exception::with_code(Vector::PF, 0);
        let gp = Exception::gp(0);
        let ud = Exception::ud();
        let df = Event::Exception(Exception::with_code(Vector::DF, 0));
        let event = Event::Exception;
        assert_eq!(next_event(event(ud), gp), Some(event(gp)), "benign first");
        assert_eq!(
            next_event(event(gp), pf),
            Some(event(pf)),
            "contributory, then #PF"
        );
        assert_eq!(next_event(event(gp), gp), Some(df));
        assert_eq!(next_event(event(pf), pf), Some(df));
        assert_eq!(next_event(event(pf), gp), Some(df));
        assert_eq!(next_event(event(pf), ud), Some(event(ud)), "benign second");
        assert_eq!(next_event(df, ud), None, "shutdown");
        assert_eq!(next_event(Event::External(Vector(32)), gp), Some(event(gp)));
    }
}
