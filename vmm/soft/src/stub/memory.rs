//! Memory for generated code.
//!
//! Purpose: a bounded region that is written at one address and executed at another.
//! Invariants: W^X: no mapping is ever both writable and executable; the two mappings share one memfd. Code once pushed
//! stays unchanged until [`CodeMemory::clear`].
#![allow(unsafe_code)] // mmap and a copy into the writable mapping, bounds-checked.

use std::io::{Error, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Enough for a hundred thousand stubs; beyond that everything is generated anew.
const SIZE: usize = 16 << 20;

/// See the module.
#[derive(Debug)]
pub(crate) struct CodeMemory {
    write: *mut u8,
    execute: *mut u8,
    used: usize,
}

// SAFETY: the two mappings belong to this value alone; the pointers are not shared.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: the name is a C string; the result is checked before it is owned.
        let fd = unsafe {
            let fd = libc::memfd_create(c"chronovisor-stubs".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        // SAFETY: the descriptor is ours and open.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), SIZE as libc::off_t) } != 0 {
            return Err(Error::last_os_error());
        }
        let write = map(&fd, libc::PROT_READ | libc::PROT_WRITE)?;
        let execute = match map(&fd, libc::PROT_READ | libc::PROT_EXEC) {
            Ok(execute) => execute,
            Err(error) => {
                // SAFETY: `write` was mapped just above with this size and nothing refers to it.
                unsafe { libc::munmap(write.cast(), SIZE) };
                return Err(error);
            }
        };
        Ok(Self {
            write,
            execute,
            used: 0,
        })
    }

    /// Adds code and returns the address to execute it at; `None` when there is no room.
    pub(crate) fn push(&mut self, code: &[u8]) -> Option<usize> {
        let start = self.used.next_multiple_of(16);
        let end = start.checked_add(code.len()).filter(|&end| end <= SIZE)?;
        // SAFETY: start..end lies inside the writable mapping, as just checked; `code` is other memory.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(start), code.len());
        }
        self.used = end;
        Some(self.execute as usize + start)
    }

    /// Forgets all code.
    pub(crate) fn clear(&mut self) {
        self.used = 0;
    }
}

fn map(fd: &OwnedFd, protection: libc::c_int) -> Result<*mut u8> {
    // SAFETY: a fresh shared mapping of our own descriptor at an address the kernel chooses.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            SIZE,
            protection,
            libc::MAP_SHARED,
            fd.as_raw_fd(),
            0,
        )
    };
    if at == libc::MAP_FAILED {
        Err(Error::last_os_error())
    } else {
        Ok(at.cast())
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: both were mapped with this size in `new`, and no code from here runs after the owner is gone.
        unsafe {
            libc::munmap(self.write.cast(), SIZE);
            libc::munmap(self.execute.cast(), SIZE);
        }
    }
}
