//! The guest that was asked for: a fixture or a kernel file, as a machine's configuration.

use crate::arguments::GuestArguments;
use crate::failure::{Doing, Failure};
use crate::fixtures_command::by_name;
use machine::host_environment::wall_clock;
use machine::{BoardConfig, MachineConfig};
use std::path::Path;
use x86::CpuModel;

/// A guest and what to call it.
pub struct Guest {
    /// The fixture's name or the kernel's file name.
    pub name: String,
    /// Its machine.
    pub config: MachineConfig,
}

/// A kernel file larger than this is not read.
const MAX_KERNEL: u64 = 1 << 30;

/// Finds the guest; reads the kernel's file if it is one.
pub fn find(arguments: &GuestArguments) -> Result<Guest, Failure> {
    let (name, kernel) = match (&arguments.fixture, &arguments.kernel) {
        (Some(name), _) => (name.clone(), by_name(name)?.elf.to_vec()),
        (None, Some(path)) => {
            let name = path
                .file_name()
                .unwrap_or(path.as_os_str())
                .to_string_lossy();
            (name.into_owned(), read_kernel(path)?)
        }
        // clap demands one of them.
        (None, None) => {
            return Err(Failure::new(
                "name a fixture, or a kernel with --kernel FILE",
            ));
        }
    };
    let mut config = fixture_config(kernel);
    config.memory = arguments.memory;
    config.cmdline.clone_from(&arguments.cmdline);
    Ok(Guest { name, config })
}

/// The machine the fixtures were written for, started now.
pub fn fixture_config(kernel: Vec<u8>) -> MachineConfig {
    MachineConfig {
        memory: fixtures::Fixture::RAM,
        cpu_model: CpuModel::default(),
        board: BoardConfig {
            boot_time: wall_clock(),
        },
        kernel,
        cmdline: String::new(),
    }
}

fn read_kernel(path: &Path) -> Result<Vec<u8>, Failure> {
    let doing = || format!("cannot read the kernel {}", path.display());
    let size = std::fs::metadata(path).doing(doing)?.len();
    if size > MAX_KERNEL {
        return Err(Failure::new(format!(
            "{} has {size} bytes; a kernel of more than {MAX_KERNEL} is surely a mistake",
            path.display()
        )));
    }
    std::fs::read(path).doing(doing)
}
