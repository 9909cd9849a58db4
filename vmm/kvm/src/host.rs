//! The host: opening `/dev/kvm`, and what it must offer.
//!
//! Purpose: turn every way in which KVM can be missing into an error that says what to do; list what was found, for the
//! command that examines a host.
//! Invariants: nothing is created here besides the file descriptor. A capability is asked for by number and named in errors
//! as the KVM API names it.
//! Elsewhere: how this KVM deviates from the SDM ([`crate::quirks`]).
//! Source: KVM API, section 4.1 (`KVM_GET_API_VERSION`), 4.4 (`KVM_CHECK_EXTENSION`), and each capability's own section.

use crate::quirks::{ProbeError, Quirks};
use kvm_ioctls::{Cap, Kvm};
use machine::engine::EngineError;
use machine::memory::CreateMemoryError;
use std::io;
use std::path::Path;

/// Where the kernel offers KVM.
pub const DEVICE: &str = "/dev/kvm";

/// The version of the KVM API this crate speaks; the only one there has been since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No device file.
    #[error(
        "{DEVICE} does not exist: load the kvm_intel or kvm_amd module (and enable virtualization in the firmware, or \
         nested virtualization if this is itself a virtual machine), or use `--engine soft`, which needs no KVM"
    )]
    NoDevice,
    /// The file is there, but not for this user.
    #[error(
        "no permission to open {DEVICE}: join the group that owns it (`sudo usermod -aG kvm $USER`, then log in again), \
         or use `--engine soft`, which needs no KVM"
    )]
    NoPermission,
    /// Another failure to open it.
    #[error("cannot open {DEVICE}: {0}; `--engine soft` needs no KVM")]
    Open(io::Error),
    /// A KVM of another age.
    #[error(
        "{DEVICE} speaks version {0} of the KVM API, this program version {API_VERSION}; use `--engine soft`"
    )]
    ApiVersion(i32),
    /// A capability is missing.
    #[error(
        "this kernel's KVM lacks {name}, which is needed {purpose} (Linux {since} and later have it); use `--engine soft`"
    )]
    MissingCapability {
        /// The KVM API's name.
        name: &'static str,
        /// What for.
        purpose: &'static str,
        /// The first Linux version with it.
        since: &'static str,
    },
    /// A virtual machine or CPU could not be set up.
    #[error("setting up a KVM virtual machine failed: {0}")]
    Setup(#[from] EngineError),
    /// Memory for the examination of the host could not be had.
    #[error(transparent)]
    Memory(#[from] CreateMemoryError),
}

impl From<ProbeError> for OpenError {
    fn from(error: ProbeError) -> Self {
        match error {
            ProbeError::Engine(error) => Self::Setup(error),
            ProbeError::Memory(error) => Self::Memory(error),
        }
    }
}

/// A capability the engine cannot do without.
struct Needed {
    cap: Cap,
    name: &'static str,
    purpose: &'static str,
    since: &'static str,
}

const NEEDED: [Needed; 7] = [
    Needed {
        cap: Cap::UserMemory,
        name: "KVM_CAP_USER_MEMORY",
        purpose: "to give the guest its memory",
        since: "2.6.25",
    },
    Needed {
        cap: Cap::ImmediateExit,
        name: "KVM_CAP_IMMEDIATE_EXIT",
        purpose: "to stop a virtual CPU without losing a wake-up",
        since: "4.12",
    },
    Needed {
        cap: Cap::SyncRegs,
        name: "KVM_CAP_SYNC_REGS",
        purpose: "to read registers at every exit",
        since: "4.17",
    },
    Needed {
        cap: Cap::VcpuEvents,
        name: "KVM_CAP_VCPU_EVENTS",
        purpose: "to save interrupt shadows and pending exceptions",
        since: "2.6.33",
    },
    Needed {
        cap: Cap::Debugregs,
        name: "KVM_CAP_DEBUGREGS",
        purpose: "to save the debug registers",
        since: "2.6.35",
    },
    Needed {
        cap: Cap::Xsave,
        name: "KVM_CAP_XSAVE",
        purpose: "to save the x87 and SSE registers",
        since: "2.6.36",
    },
    Needed {
        cap: Cap::X86UserSpaceMsr,
        name: "KVM_CAP_X86_USER_SPACE_MSR",
        purpose: "to answer model-specific registers",
        since: "5.10",
    },
];

/// Opens `/dev/kvm` and checks that it offers what the engine needs.
pub fn open() -> Result<Kvm, OpenError> {
    open_at(Path::new(DEVICE))
}

/// [`open`] for another path, so that each error can be tested.
fn open_at(path: &Path) -> Result<Kvm, OpenError> {
    use std::os::unix::ffi::OsStrExt;
    let name = std::ffi::CString::new(path.as_os_str().as_bytes())
        .map_err(|e| OpenError::Open(io::Error::new(io::ErrorKind::InvalidInput, e)))?;
    let kvm = Kvm::new_with_path(&name).map_err(|errno| match errno.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => OpenError::NoDevice,
        libc::EACCES | libc::EPERM => OpenError::NoPermission,
        code => OpenError::Open(io::Error::from_raw_os_error(code)),
    })?;
    check(&kvm)?;
    Ok(kvm)
}

fn check(kvm: &Kvm) -> Result<(), OpenError> {
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(OpenError::ApiVersion(version));
    }
    for needed in &NEEDED {
        if !kvm.check_extension(needed.cap) {
            return Err(OpenError::MissingCapability {
                name: needed.name,
                purpose: needed.purpose,
                since: needed.since,
            });
        }
    }
    Ok(())
}

/// What a host's KVM was found to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// Most memory slots a virtual machine may have.
    pub memory_slots: usize,
    /// Most virtual CPUs of one machine.
    pub max_vcpus: usize,
    /// Where this KVM deviates from the SDM.
    pub quirks: Quirks,
}

/// Examines the host: opens KVM and measures it with guests of a few instructions. Takes some milliseconds, once per process.
pub fn report() -> Result<Report, OpenError> {
    let kvm = open()?;
    Ok(Report {
        memory_slots: kvm.get_nr_memslots(),
        max_vcpus: kvm.get_max_vcpus(),
        quirks: Quirks::of(&kvm)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_says_what_to_do() {
        let error = open_at(Path::new("/nonexistent/kvm")).expect_err("no such file");
        assert!(matches!(error, OpenError::NoDevice));
        let text = error.to_string();
        assert!(
            text.contains("kvm_intel") && text.contains("--engine soft"),
            "{text}"
        );
    }

    #[test]
    fn refused_permission_says_what_to_do() {
        let text = OpenError::NoPermission.to_string();
        assert!(
            text.contains("usermod") && text.contains("--engine soft"),
            "{text}"
        );
    }

    #[test]
    fn a_file_that_is_not_kvm_is_an_error() {
        assert!(open_at(Path::new("/dev/null")).is_err());
    }
}
