//! A guest about to run on this host.
//!
//! Purpose: what `run`, `record` and `demo` have in common: the machine, its engine and the host as its environment.

use crate::arguments::{ClockChoice, GuestArguments};
use crate::engines;
use crate::failure::{Doing, Failure};
use machine::engine::{Engine, EngineKind};
use machine::host_environment::{Clock, HostEnvironment};
use machine::{Board, GuestMemory, MachineConfig};
use std::io::Write;
use std::num::NonZeroU64;
use x86::VcpuId;

/// Instructions in a second of virtual time on the instruction clock. Near what the software engine executes in a second, so that timers keep their
/// proportion to what a person sees.
const INSTRUCTIONS_PER_SECOND: NonZeroU64 = NonZeroU64::new(50_000_000).unwrap();

/// Everything a session is made of.
pub struct Live {
    /// Guest memory, with the kernel in it.
    pub memory: GuestMemory,
    /// The devices.
    pub board: Board,
    /// The engine, its CPU at the kernel's entry.
    pub engine: Box<dyn Engine>,
    /// The host.
    pub environment: HostEnvironment,
}

/// Builds the machine of `config` on `kind`, its console going to `sink`.
pub fn start(
    config: &MachineConfig,
    kind: EngineKind,
    clock: Clock,
    sink: Box<dyn Write + Send>,
) -> Result<Live, Failure> {
    let (memory, board, cpu) = config.build().doing(|| "cannot build the machine".into())?;
    let engine = engines::make(kind, &memory, &cpu, config.cpu_model)?;
    let environment = HostEnvironment::new(engine.kicker(VcpuId::BOOT)?, clock, sink)?;
    Ok(Live {
        memory,
        board,
        engine,
        environment,
    })
}

/// The clock asked for, or the one that suits the engine: instructions where they are counted, the host's elsewhere.
pub fn clock(arguments: &GuestArguments, kind: EngineKind) -> Result<Clock, Failure> {
    match (arguments.clock, kind) {
        (Some(ClockChoice::Host), _) | (None, EngineKind::Kvm) => Ok(Clock::Host),
        (Some(ClockChoice::Instructions), EngineKind::Kvm) => Err(Failure::new(
            "KVM does not count instructions; use --clock host, or --engine soft",
        )),
        (_, EngineKind::Soft) => Ok(Clock::Instructions {
            per_second: INSTRUCTIONS_PER_SECOND,
        }),
    }
}
