//! Who called whom, by frame pointers.
//!
//! Purpose: a quick backtrace that needs no unwind tables: the chain of saved frame pointers, with symbols.
//! Invariants: the stack is the guest's and hostile: the chain is followed only upwards, so that it ends, and at most
//! [`MAX_FRAMES`] far. Why it ended is part of the answer.
//! Elsewhere: backtraces by unwind tables and through interrupt frames, which gdb makes from the same ELF file.
//! Source: System V ABI AMD64, 3.2.2 (frame pointer); i386, 3 (the same with 4-byte words).

use crate::symbols::{Location, Symbols};
use crate::virtual_memory::{ReadVirtualError, read_available, read_u32, read_u64};
use machine::GuestMemory;
use std::fmt;
use x86::{CpuMode, CpuState, Gpr, GuestVirtAddr};

/// Longer chains are cut here.
pub const MAX_FRAMES: usize = 128;

/// One function on the stack.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    /// Where it executes, or will once what it called returns.
    pub address: GuestVirtAddr,
    /// That address as symbol and offset.
    pub location: Option<Location>,
    /// Where its caller's frame pointer is saved.
    pub frame_pointer: u64,
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x}", self.address)?;
        match &self.location {
            Some(location) => write!(f, " {location}"),
            None => Ok(()),
        }
    }
}

/// Why a backtrace ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BacktraceEnd {
    /// A null frame pointer or return address: the outermost function.
    #[error("outermost frame")]
    Outermost,
    /// The next frame pointer is not above the last one.
    #[error("the frame pointer {0:#x} is not above the last one")]
    NotAscending(u64),
    /// The stack cannot be read.
    #[error("{0}")]
    Unreadable(ReadVirtualError),
    /// [`MAX_FRAMES`] reached.
    #[error("more than {MAX_FRAMES} frames")]
    TooMany,
    /// 16-bit code has no frame-pointer convention.
    #[error("no backtrace in 16-bit code")]
    Unsupported,
}

/// The functions on the stack, innermost first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Backtrace {
    /// At least one.
    pub frames: Vec<Frame>,
    /// Why there are no more.
    pub end: BacktraceEnd,
}

/// The backtrace of a stopped CPU.
pub fn backtrace(cpu: &CpuState, memory: &GuestMemory, symbols: &Symbols) -> Backtrace {
    let mut frame_pointer = cpu.regs[Gpr::Rbp];
    let here = cpu.rip_linear();
    let mut frames = vec![Frame {
        address: here,
        location: symbols.lookup(here),
        frame_pointer,
    }];
    let Some(stack) = Stack::of(cpu, memory) else {
        return Backtrace {
            frames,
            end: BacktraceEnd::Unsupported,
        };
    };
    frame_pointer = stack.truncate(frame_pointer);
    if let Some(slot) = stack.frameless_return_slot(symbols) {
        match stack.word(slot) {
            Ok(caller) => frames.push(caller_frame(caller, frame_pointer, symbols)),
            Err(error) => {
                return Backtrace {
                    frames,
                    end: BacktraceEnd::Unreadable(error),
                };
            }
        }
    }
    let end = loop {
        if frames.len() >= MAX_FRAMES {
            break BacktraceEnd::TooMany;
        }
        match stack.caller(frame_pointer) {
            Ok(None) => break BacktraceEnd::Outermost,
            Ok(Some((saved, caller))) => {
                frames.push(caller_frame(caller, saved, symbols));
                if saved != 0 && saved <= frame_pointer {
                    break BacktraceEnd::NotAscending(saved);
                }
                frame_pointer = saved;
            }
            Err(error) => break BacktraceEnd::Unreadable(error),
        }
    };
    Backtrace { frames, end }
}

fn caller_frame(address: u64, frame_pointer: u64, symbols: &Symbols) -> Frame {
    let address = GuestVirtAddr::new(address);
    // The call lies before the return address, which may already belong to the next function if the call never returns.
    let call = GuestVirtAddr::new(address.get().wrapping_sub(1));
    let location = symbols.lookup(call).map(|location| Location {
        offset: location.offset.saturating_add(1),
        ..location
    });
    Frame {
        address,
        location,
        frame_pointer,
    }
}

/// A stack with words of the mode's size.
struct Stack<'a> {
    cpu: &'a CpuState,
    memory: &'a GuestMemory,
    word_size: u64,
}

impl<'a> Stack<'a> {
    fn of(cpu: &'a CpuState, memory: &'a GuestMemory) -> Option<Self> {
        let word_size = match cpu.mode() {
            CpuMode::Long64 => 8,
            CpuMode::Protected32 | CpuMode::Compatibility => 4,
            CpuMode::Real | CpuMode::Virtual8086 | CpuMode::Protected16 => return None,
        };
        Some(Self {
            cpu,
            memory,
            word_size,
        })
    }

    fn truncate(&self, value: u64) -> u64 {
        if self.word_size == 8 {
            value
        } else {
            value & 0xffff_ffff
        }
    }

    fn word(&self, addr: u64) -> Result<u64, ReadVirtualError> {
        let addr = GuestVirtAddr::new(addr);
        match self.word_size {
            8 => read_u64(self.cpu, self.memory, addr),
            _ => read_u32(self.cpu, self.memory, addr).map(u64::from),
        }
    }

    /// The saved frame pointer and the return address of the frame at `frame_pointer`; `None` at the outermost one.
    fn caller(&self, frame_pointer: u64) -> Result<Option<(u64, u64)>, ReadVirtualError> {
        if frame_pointer == 0 {
            return Ok(None);
        }
        let saved = self.word(frame_pointer)?;
        let caller = self.word(frame_pointer.wrapping_add(self.word_size))?;
        Ok((caller != 0).then_some((saved, caller)))
    }

    /// Where the return address lies while the current function has no frame of its own: before its `push rbp`, between that and
    /// `mov rbp, rsp`, and at its `ret`.
    fn frameless_return_slot(&self, symbols: &Symbols) -> Option<u64> {
        const PUSH_RBP: u8 = 0x55;
        let top = self.truncate(self.cpu.regs[Gpr::Rsp]);
        let here = self.cpu.rip_linear();
        let now = read_available(self.cpu, self.memory, here, 1);
        if matches!(now.first(), Some(0xc2 | 0xc3)) {
            return Some(top);
        }
        let location = symbols
            .lookup(here)
            .filter(|location| location.symbol.is_code)?;
        let start = read_available(self.cpu, self.memory, location.symbol.start, 8);
        let endbr = if start.starts_with(&[0xf3, 0x0f, 0x1e, 0xfa]) {
            4
        } else {
            0
        };
        let push = start.get(endbr) == Some(&PUSH_RBP);
        let endbr = endbr as u64;
        match location.offset {
            offset if push && (offset == 0 || offset == endbr) => Some(top),
            offset if push && offset == endbr + 1 => Some(top.wrapping_add(self.word_size)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TEXT, code_machine, symbols};
    use proptest::prelude::*;
    use x86::GuestPhysAddr;

    /// The second mapped page is the stack; its physical page is 0x9000.
    const STACK: u64 = TEXT + 0x1000;

    fn machine(words: &[(u64, u64)]) -> (CpuState, GuestMemory) {
        let mut code = [0x90; 0x40];
        code[..4].copy_from_slice(&[0x55, 0x48, 0x89, 0xe5]);
        code[0x20..0x24].copy_from_slice(&[0x55, 0x48, 0x89, 0xe5]);
        code[0x2f] = 0xc3;
        let (mut cpu, memory) = code_machine(&code);
        for (offset, word) in words {
            memory
                .write(GuestPhysAddr::new(0x9000 + offset), &word.to_le_bytes())
                .expect("stack");
        }
        cpu.regs.rip = TEXT + 0x28;
        cpu.regs[Gpr::Rbp] = STACK + 0x100;
        cpu.regs[Gpr::Rsp] = STACK + 0x80;
        (cpu, memory)
    }

    fn names(backtrace: &Backtrace) -> Vec<String> {
        let name = |frame: &Frame| frame.location.as_ref().map(Location::to_string);
        backtrace
            .frames
            .iter()
            .map(|frame| name(frame).unwrap_or_default())
            .collect()
    }

    #[test]
    fn the_chain_of_frame_pointers_gives_the_callers() {
        let (cpu, memory) = machine(&[
            (0x100, STACK + 0x200),
            (0x108, TEXT + 0x20),
            (0x200, 0),
            (0x208, 0),
        ]);
        let backtrace = backtrace(&cpu, &memory, &symbols());
        // The return address is the first of `callee`, but the call was the last instruction of `main`.
        assert_eq!(names(&backtrace), ["callee+0x8", "main+0x20"]);
        assert_eq!(backtrace.end, BacktraceEnd::Outermost);
    }

    #[test]
    fn a_function_without_its_frame_yet_or_any_more_has_a_caller() {
        let stack = [
            (0x80, TEXT + 0x10),
            (0x88, TEXT + 0x18),
            (0x100, 0),
            (0x108, 0),
        ];
        let (mut cpu, memory) = machine(&stack);
        for (offset, caller) in [
            (0x20, "main+0x10"),
            (0x21, "main+0x18"),
            (0x2f, "main+0x10"),
        ] {
            cpu.regs.rip = TEXT + offset;
            let backtrace = backtrace(&cpu, &memory, &symbols());
            assert_eq!(
                names(&backtrace).get(1).map(String::as_str),
                Some(caller),
                "{offset:#x}"
            );
        }
    }

    #[test]
    fn chains_that_lead_nowhere_end_and_say_so() {
        let ends = |words: &[(u64, u64)]| {
            let (cpu, memory) = machine(words);
            backtrace(&cpu, &memory, &symbols()).end
        };
        let own = STACK + 0x100;
        assert_eq!(
            ends(&[(0x100, own), (0x108, TEXT)]),
            BacktraceEnd::NotAscending(own)
        );
        assert!(matches!(
            ends(&[(0x100, STACK + 0x1000), (0x108, TEXT)]),
            BacktraceEnd::Unreadable(_)
        ));
        let chain: Vec<_> = (0..200u64)
            .flat_map(|n| {
                let at = 0x100 + 16 * n;
                [(at, STACK + at + 16), (at + 8, TEXT + 4)]
            })
            .collect();
        assert_eq!(ends(&chain), BacktraceEnd::TooMany);
        let real = CpuState::default();
        let (_, memory) = machine(&[]);
        assert_eq!(
            backtrace(&real, &memory, &symbols()).end,
            BacktraceEnd::Unsupported
        );
    }

    proptest! {
        #[test]
        fn any_stack_is_survived(
            words in proptest::collection::vec((0u64..0xff8, any::<u64>()), 0..40),
            rip in any::<u64>(), rsp in any::<u64>(), rbp in any::<u64>(),
        ) {
            let (mut cpu, memory) = machine(&words);
            cpu.regs.rip = rip;
            cpu.regs[Gpr::Rsp] = rsp;
            cpu.regs[Gpr::Rbp] = rbp;
            let backtrace = backtrace(&cpu, &memory, &symbols());
            prop_assert!((1..=MAX_FRAMES).contains(&backtrace.frames.len()));
        }
    }
}
