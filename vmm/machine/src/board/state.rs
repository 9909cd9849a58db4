//! Saving a board and putting it back.
//!
//! Purpose: each device as kind, version and bytes, so that a trace or checkpoint can say what it cannot read.
//! Invariants: bytes come from outside: they are decoded and checked, all of them, before anything is assigned; what was
//! saved is put back exactly (saving again gives the same bytes). A device's struct is its state: it has no field that is not
//! saved, and [`Device::check`] names every field, so that a new one cannot be forgotten.
//! Elsewhere: CPU and memory (`replay`'s checkpoints).
//! Source: the postcard wire format.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// A device that can be saved.
pub(super) trait Device: Serialize + DeserializeOwned {
    /// Its name in saved boards.
    const KIND: &'static str;
    /// The version of its state.
    const VERSION: u16;

    /// Whether this is a state the device can be in; what is wrong if not.
    fn check(&self) -> Result<(), &'static str>;
}

/// One device of a saved board.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DeviceState {
    /// Which device.
    pub kind: String,
    /// The format of `bytes`.
    pub version: u16,
    /// Its registers (postcard).
    pub bytes: Vec<u8>,
}

/// A saved board.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BoardState {
    /// Every device, in the board's order.
    pub devices: Vec<DeviceState>,
}

/// Why a saved board cannot be put back.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RestoreError {
    /// Another number of devices.
    #[error("the saved board has {found} devices, this machine has {expected}")]
    DeviceCount {
        /// Devices in the saved board.
        found: usize,
        /// Devices of this machine.
        expected: usize,
    },
    /// Another device in this place.
    #[error("the saved board has the device {found:?} where this machine has {expected}")]
    Kind {
        /// What the saved board says, cut to a few characters.
        found: String,
        /// What belongs there.
        expected: &'static str,
    },
    /// A format this version does not know.
    #[error("the saved state of {kind} has version {found}; this program reads version {expected}")]
    Version {
        /// Which device.
        kind: &'static str,
        /// What the saved board says.
        found: u16,
        /// What this program reads.
        expected: u16,
    },
    /// Bytes that are no state of the device.
    #[error("the saved state of {kind} is damaged: {reason}")]
    Damaged {
        /// Which device.
        kind: &'static str,
        /// What is wrong.
        reason: String,
    },
}

/// Saves one device.
pub(super) fn save<D: Device>(device: &D) -> DeviceState {
    DeviceState {
        kind: D::KIND.to_owned(),
        version: D::VERSION,
        // Writing plain structs to a growing buffer cannot fail; an empty state would be refused when read back.
        bytes: postcard::to_stdvec(device).unwrap_or_default(),
    }
}

/// Decodes and checks one device.
pub(super) fn load<D: Device>(state: &DeviceState) -> Result<D, RestoreError> {
    if state.kind != D::KIND {
        return Err(RestoreError::Kind {
            found: state.kind.chars().take(32).collect(),
            expected: D::KIND,
        });
    }
    if state.version != D::VERSION {
        return Err(RestoreError::Version {
            kind: D::KIND,
            found: state.version,
            expected: D::VERSION,
        });
    }
    let damaged = |reason: String| RestoreError::Damaged {
        kind: D::KIND,
        reason,
    };
    let (device, rest) =
        postcard::take_from_bytes::<D>(&state.bytes).map_err(|e| damaged(e.to_string()))?;
    if !rest.is_empty() {
        return Err(damaged(format!("{} bytes too many", rest.len())));
    }
    device
        .check()
        .map_err(|reason| damaged(reason.to_owned()))?;
    Ok(device)
}
