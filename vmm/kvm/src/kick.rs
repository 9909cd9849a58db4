//! Waking a virtual CPU.
//!
//! Purpose: a [`Kick`] that ends the present KVM_RUN, or the next one, from any thread.
//! Invariants: a kick is never lost. It first raises [`Shared::requested`], then sets `kvm_run.immediate_exit`, then signals the
//! thread that runs the CPU. Whoever is about to enter the guest clears `immediate_exit` before it looks at the request; so either it
//! sees the request, or the kernel sees `immediate_exit`, or the signal interrupts KVM_RUN.
//! The signal is `SIGRTMIN`; its handler does nothing, it only makes system calls return.
//! Elsewhere: what a kick means to the loop (`machine::session`).
//! Source: KVM API, section 5 (`immediate_exit`); signal(7).

// Maps the CPU's `kvm_run` page for a handle that may outlive the engine, and installs and sends a signal.
#![allow(unsafe_code)]

use crate::vcpu::host_errno;
use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use machine::engine::{EngineError, Kick};
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, Ordering};

/// Bytes of `kvm_run` that are mapped: the first page holds all of the struct.
const PAGE: usize = 4096;

/// What the engine and its kickers share.
#[derive(Debug)]
pub(crate) struct Shared {
    requested: AtomicBool,
    /// The thread inside KVM_RUN, 0 when there is none.
    runner: AtomicI32,
    run_page: NonNull<u8>,
}

// SAFETY: the page is only accessed through `AtomicU8`, and stays mapped as long as this value lives.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Maps the CPU's `kvm_run` page once more, and sees to it that the signal is harmless.
    pub(crate) fn new(vcpu: &VcpuFd) -> Result<Self, EngineError> {
        install_handler()?;
        // SAFETY: a new mapping of a file descriptor we hold, at an address the kernel chooses.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(host_errno("mmap of kvm_run"));
        }
        let Some(run_page) = NonNull::new(page.cast::<u8>()) else {
            return Err(host_errno("mmap of kvm_run"));
        };
        Ok(Self {
            requested: AtomicBool::new(false),
            runner: AtomicI32::new(0),
            run_page,
        })
    }

    /// Makes the next KVM_RUN return at once, once pending input and output are finished (true), or lets it run (false).
    pub(crate) fn set_immediate_exit(&self, on: bool) {
        self.immediate_exit().store(u8::from(on), Ordering::SeqCst);
    }

    /// Whether somebody asked; forgets it.
    pub(crate) fn take_request(&self) -> bool {
        self.requested.swap(false, Ordering::SeqCst)
    }

    /// Asks, on the CPU's own thread.
    pub(crate) fn request(&self) {
        self.requested.store(true, Ordering::SeqCst);
    }

    /// Whether somebody asked.
    pub(crate) fn is_requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }

    /// To be called right before and after KVM_RUN, on the thread that makes it.
    pub(crate) fn set_running(&self, running: bool) {
        // SAFETY: gettid has no preconditions.
        let this_thread = unsafe { libc::gettid() };
        let thread = if running { this_thread } else { 0 };
        self.runner.store(thread, Ordering::SeqCst);
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        let at = std::mem::offset_of!(kvm_run, immediate_exit);
        // SAFETY: inside the mapped page; the kernel and we access this byte only as a whole.
        unsafe { AtomicU8::from_ptr(self.run_page.as_ptr().add(at)) }
    }
}

impl Kick for Shared {
    fn kick(&self) {
        self.requested.store(true, Ordering::SeqCst);
        self.set_immediate_exit(true);
        let thread = self.runner.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: no memory is involved; a thread that is gone makes this fail, which is as good. The handler is installed.
            unsafe {
                libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGRTMIN());
            }
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, with this length, and nobody else has the address.
        unsafe {
            libc::munmap(self.run_page.as_ptr().cast(), PAGE);
        }
    }
}

extern "C" fn ignore(_signal: libc::c_int) {}

/// Installs the handler, once per process.
fn install_handler() -> Result<(), EngineError> {
    static INSTALLED: OnceLock<i32> = OnceLock::new();
    let code = *INSTALLED.get_or_init(|| {
        let handler: extern "C" fn(libc::c_int) = ignore;
        // SAFETY: all-zero is a valid sigaction; the handler touches nothing.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as libc::sighandler_t;
            libc::sigaction(libc::SIGRTMIN(), &action, std::ptr::null_mut())
        };
        match result {
            0 => 0,
            _ => std::io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EINVAL),
        }
    });
    match code {
        0 => Ok(()),
        code => Err(EngineError::Host {
            operation: "sigaction",
            source: std::io::Error::from_raw_os_error(code),
        }),
    }
}
