//! gdb's remote protocol over a live machine or a timeline.
//!
//! Purpose: `gdb vmlinux -ex 'target remote :1234'` works on anything that is a [`machine::debuggable::Debuggable`]. [`serve`]
//! is the whole of it: it takes a [`Listener`], gives every gdb that connects the machine as it stands, and returns when the
//! machine is killed or its guest has ended.
//!
//! Invariants:
//! - Nothing is advertised that is not real: reverse execution only on a machine that keeps its past, no watchpoints, no memory
//!   map (gdb's memory map is of virtual addresses, and a guest's change with CR3).
//! - A debugger never reaches a device: addresses that are not RAM are errors, never wrong bytes and never MMIO.
//! - While the machine is stopped the server sleeps; while it runs, it looks at the connection between time slices.
//! - Whatever a client sends, the server neither panics nor stops serving. Packets that gdbstub gives up on are answered with an error.
//!
//! Elsewhere: how gdb sees a CPU (`registers.rs`, `description.rs`); what a stop looks like to gdb (`stops.rs`); the packets that
//! gdbstub does not know (`session.rs`); `monitor` commands (`monitor.rs`). Recording and replaying are other crates' business.
//!
//! # What a user of gdb should know
//!
//! - `$rip` is the linear address of the next instruction: CS.base + RIP outside 64-bit mode, so that `x/i $rip` and breakpoints
//!   mean the same in real mode. `$rsp` is the register itself.
//! - Addresses are the guest's virtual ones, seen under the stopped CPU's page tables with supervisor rights.
//!   `monitor phys on` (or QEMU's packet `Qqemu.PhyMemMode:1`) makes them physical.
//! - Breakpoints, software and hardware alike, leave no trace in the guest's memory or debug registers. They may be set before the code is
//!   loaded and before paging is on.
//! - When a live guest ends, gdb stops with SIGTERM and a line that says how it ended: registers and memory can be looked at.
//!   The next `continue` reports the exit with the guest's status ([`machine::End::status`]), and the session is over.
//! - A timeline does not exit: at the end of the recording gdb says that there is no more history, and the machine stands at its last
//!   instruction.
//! - Writing registers or memory of a timeline leaves the recording; gdb is told so when it next resumes.
//! - `detach` lets a live guest run on and a timeline wait for the next connection; `kill` ends either. A connection that breaks leaves
//!   the machine stopped, without breakpoints, for the next one.
//!
//! Source: "Debugging with gdb", appendices E (remote protocol) and G (target descriptions); QEMU's gdbstub for the packets it added.

mod bridge;
mod description;
mod framing;
mod listen;
mod monitor;
mod registers;
mod resume;
mod server;
mod session;
mod stops;
#[cfg(test)]
mod testing;

pub use listen::{Address, ListenError, Listener, ParseAddressError};
pub use server::{Mode, Notice, Options, Outcome, ServeError, serve};
