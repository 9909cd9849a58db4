//! The last state of a machine.
//!
//! Purpose: take it in the same way when a recording ends and when its replay does, so that the two can be compared.
//! Invariants: the machine has ended and is not run again; the instruction that ended it is brought to its end first.
//! Elsewhere: what is compared ([`crate::replayer`]).

use crate::digest::{CpuDigest, Digest, board_digest, canonical_registers};
use machine::engine::{EngineError, Entry, Until};
use machine::environment::Environment;
use machine::session::Session;
use x86::{Exit, Position, Registers, VcpuId};

/// What is left when a machine has ended.
pub(crate) struct FinalState {
    /// Where, on an engine that counts.
    pub(crate) position: Option<Position>,
    /// `None` when the last instruction goes on exiting (a REP OUTS that ended the machine with its first byte).
    pub(crate) cpu: Option<(Registers, CpuDigest)>,
    pub(crate) memory: Digest,
    pub(crate) board: Digest,
}

impl FinalState {
    /// Completes the last instruction and looks.
    pub(crate) fn of<E: Environment + ?Sized>(
        session: &mut Session<E>,
    ) -> Result<Self, EngineError> {
        let vcpu = VcpuId::BOOT;
        let clean = !session.incomplete() || {
            // What ends a machine (a port write, a stop) is owed no answer.
            let exit = session
                .engine()
                .run(vcpu, Entry::default(), Until::Completed)?;
            matches!(exit, Exit::BoundReached | Exit::Kicked)
        };
        let cpu = if clean {
            let state = session.engine().state(vcpu)?;
            Some((canonical_registers(&state.regs), CpuDigest::of(&state)))
        } else {
            None
        };
        Ok(Self {
            position: session.engine().position(),
            cpu,
            memory: Digest(session.memory().digest()),
            board: board_digest(session.board()),
        })
    }
}
