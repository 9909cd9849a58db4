//! Reading a stopped machine: symbols, disassembly, page tables, registers, exit statistics.
//!
//! Purpose: turn the raw state of a guest (a [`x86::CpuState`] and [`machine::GuestMemory`]) into what a person reads: for
//! the terminal UI, for gdb, and for the command line.
//! Invariants: nothing here runs a guest, changes it, or knows which engine executes it. Guest memory, guest page tables and
//! symbol files are hostile: every length and address is checked, every loop bounded, and what cannot be read is said to be so.
//! Elsewhere: page-table formats and the walk itself (`vmm/x86`); drawing (`tui`).

pub mod backtrace;
pub mod disassembly;
pub mod exits;
pub mod page_walk;
pub mod registers;
pub mod symbols;
pub mod virtual_memory;

#[cfg(test)]
mod testing;
