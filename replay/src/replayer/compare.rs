//! Comparing a machine with what was recorded of it.
//!
//! Purpose: name everything that differs between a machine and a digest record, or the end of a recording.
//! Invariants: reading only.
//! Elsewhere: when to compare ([`super`]); digests themselves ([`crate::digest`]).

use super::Cursor;
use super::search::page_differs;
use crate::digest::{CpuDigest, board_digest, canonical_registers};
use crate::divergence::{StateDifference, register_differences};
use crate::finish::FinalState;
use crate::trace::{DigestRecord, EndRecord};
use machine::engine::EngineError;
use machine::environment::Boundary;
use x86::Position;

/// Compares the machine with a digest.
pub(super) fn compare(
    recorded: &DigestRecord,
    at: &mut Boundary<'_>,
    cursor: &Cursor,
) -> Result<StateDifference, EngineError> {
    let cpu = at.engine.state(at.vcpu)?;
    let mut difference = StateDifference {
        positions: differing_positions(recorded.position, at.engine.position()),
        registers: register_differences(&recorded.registers, &canonical_registers(&cpu.regs)),
        cpu: differing_parts(&recorded.cpu, &CpuDigest::of(&cpu)),
        board: recorded.board != board_digest(at.board),
        exits: recorded.exits != cursor.exits.digest(),
        console: recorded.console != cursor.console.digest(),
        ..StateDifference::default()
    };
    difference.compare_pages(&recorded.pages, |page| page_differs(at.memory, page));
    Ok(difference)
}

/// Both, when both are known and they differ.
fn differing_positions(
    recorded: Option<Position>,
    replayed: Option<Position>,
) -> Option<(Position, Position)> {
    recorded
        .zip(replayed)
        .filter(|(recorded, replayed)| recorded != replayed)
}

/// The parts of a CPU, the registers aside, whose digests differ.
fn differing_parts(recorded: &CpuDigest, replayed: &CpuDigest) -> Vec<&'static str> {
    [
        (recorded.segments, replayed.segments, "segment registers"),
        (
            recorded.system,
            replayed.system,
            "control registers or interrupt state",
        ),
        (recorded.fpu, replayed.fpu, "floating-point registers"),
        (recorded.msrs, replayed.msrs, "model-specific registers"),
    ]
    .into_iter()
    .filter_map(|(recorded, replayed, name)| (recorded != replayed).then_some(name))
    .collect()
}

/// Compares a machine that has ended with the end of the recording.
pub(super) fn compare_end(
    recorded: &EndRecord,
    state: &FinalState,
    cursor: &Cursor,
) -> StateDifference {
    let mut difference = StateDifference {
        positions: differing_positions(recorded.position, state.position),
        memory: recorded.memory != state.memory,
        board: recorded.board != state.board,
        exits: recorded.exits != cursor.exits.digest(),
        console: recorded.console != cursor.console.digest(),
        ..StateDifference::default()
    };
    match (&recorded.cpu, &state.cpu) {
        (Some((registers, cpu)), Some((registers_now, cpu_now))) => {
            difference.registers = register_differences(registers, registers_now);
            difference.cpu = differing_parts(cpu, cpu_now);
        }
        (None, None) => {}
        _ => difference.cpu = vec!["instructions in progress"],
    }
    difference
}
