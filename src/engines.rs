//! Choosing and making an engine.

use crate::arguments::EngineChoice;
use crate::failure::Failure;
use kvm::KvmEngine;
use machine::GuestMemory;
use machine::engine::{Engine, EngineError, EngineKind};
use soft::SoftEngine;
use x86::{CpuModel, CpuState, VcpuId};

/// Settles which engine a choice means on this host. Where `auto` has to do without KVM, says why on standard error.
pub fn settle(choice: EngineChoice) -> Result<EngineKind, Failure> {
    match choice {
        EngineChoice::Soft => Ok(EngineKind::Soft),
        EngineChoice::Kvm => {
            kvm::host::open()?;
            Ok(EngineKind::Kvm)
        }
        EngineChoice::Auto => Ok(match kvm::host::open() {
            Ok(_) => EngineKind::Kvm,
            Err(error) => {
                eprintln!("chronovisor: running on the soft engine: {error}");
                EngineKind::Soft
            }
        }),
    }
}

/// Makes an engine over `memory` whose CPU stands at `cpu`.
pub fn make(
    kind: EngineKind,
    memory: &GuestMemory,
    cpu: &CpuState,
    model: CpuModel,
) -> Result<Box<dyn Engine>, Failure> {
    Ok(match kind {
        EngineKind::Kvm => {
            let mut engine = KvmEngine::new(memory.clone(), model)?;
            engine.set_state(VcpuId::BOOT, cpu)?;
            Box::new(engine)
        }
        EngineKind::Soft => soft(memory, cpu, model)?,
    })
}

/// The counting engine, for replays.
pub fn soft(
    memory: &GuestMemory,
    cpu: &CpuState,
    model: CpuModel,
) -> Result<Box<dyn Engine>, EngineError> {
    let mut engine = SoftEngine::new(memory.clone(), model)?;
    engine.set_state(VcpuId::BOOT, cpu)?;
    Ok(Box::new(engine))
}
