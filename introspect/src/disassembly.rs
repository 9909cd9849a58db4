//! Disassembly of guest code.
//!
//! Purpose: instructions at a guest's virtual addresses, with symbols, forwards from an address and backwards to it.
//! Invariants: bytes come through the guest's page tables and are read only. Whatever stands there gives lines: undecodable bytes and
//! unreadable memory are marked as such, one line for each. Work is bounded by the number of lines asked for.
//! Elsewhere: executing instructions (`vmm/soft`); reading memory ([`crate::virtual_memory`]).
//! Source: Capstone decodes; Intel SDM vol. 2A, 2.3.11 (an instruction has at most 15 bytes).

use crate::symbols::{Location, Symbols};
use crate::virtual_memory::{ReadVirtualError, read_available, translate};
use capstone::arch::x86::{ArchMode, ArchSyntax, X86InsnGroup, X86OperandType, X86Reg};
use capstone::arch::{ArchOperand, BuildsCapstone, BuildsCapstoneSyntax};
use capstone::{Capstone, Insn, RegId};
use machine::GuestMemory;
use std::collections::VecDeque;
use std::fmt;
use x86::{CpuMode, CpuState, GuestVirtAddr, SegmentRegister};

/// The longest instruction, in bytes.
pub const MAX_INSTRUCTION: usize = 15;

/// More lines than this are not made at once.
pub const MAX_LINES: usize = 4096;

/// How far back from an address its symbol may start for decoding to begin there, in bytes.
const MAX_FUNCTION_PREFIX: u64 = 16 << 10;

/// How instructions are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Syntax {
    /// As in the Intel SDM: `mov eax, 1`.
    #[default]
    Intel,
    /// As in the GNU assembler: `movl $1, %eax`.
    Att,
}

/// The disassembler could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up the disassembler: {0}")]
pub struct SetUpError(#[from] capstone::Error);

/// What stands at an address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Content {
    /// An instruction.
    Instruction {
        /// `mov`, with its prefixes.
        mnemonic: String,
        /// `rax, qword ptr [rbx]`; may be empty.
        operands: String,
    },
    /// A byte that starts no instruction.
    Undecodable,
    /// Nothing that can be read, from here to the end of the page.
    Unreadable(ReadVirtualError),
}

/// An address that an instruction names: where it jumps, or the memory operand whose address is in the instruction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// The linear address.
    pub address: GuestVirtAddr,
    /// Its symbol, if it has one.
    pub symbol: Option<Location>,
}

/// One line of a disassembly.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Line {
    /// The linear address of the first byte.
    pub address: GuestVirtAddr,
    /// The bytes, at most [`MAX_INSTRUCTION`]; none where they cannot be read.
    pub bytes: Vec<u8>,
    /// What they mean.
    pub content: Content,
    /// The symbol the address lies in.
    pub symbol: Option<Location>,
    /// The address the instruction names.
    pub target: Option<Target>,
    /// A call, to be stepped over as one.
    pub is_call: bool,
    /// Where the next line starts; `None` at the end of the address space.
    pub next: Option<GuestVirtAddr>,
}

impl Line {
    /// The instruction or what stands in its place, without address and bytes.
    pub fn text(&self) -> String {
        match &self.content {
            Content::Instruction { mnemonic, operands } if operands.is_empty() => mnemonic.clone(),
            Content::Instruction { mnemonic, operands } => format!("{mnemonic} {operands}"),
            Content::Undecodable => "(bad)".to_owned(),
            Content::Unreadable(error) => format!("({})", error.why),
        }
    }

    /// The bytes in hexadecimal.
    pub fn bytes_text(&self) -> String {
        let bytes: Vec<_> = self
            .bytes
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        bytes.join(" ")
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x}", self.address)?;
        if let Some(symbol) = &self.symbol {
            write!(f, " <{symbol}>")?;
        }
        write!(f, "  {:<30}  {}", self.bytes_text(), self.text())?;
        if let Some(Target {
            symbol: Some(symbol),
            ..
        }) = &self.target
        {
            write!(f, "  ; {symbol}")?;
        }
        Ok(())
    }
}

/// What a disassembly looks at.
#[derive(Clone, Copy)]
pub struct Code<'a> {
    /// Whose mode and page tables count.
    pub cpu: &'a CpuState,
    /// Where the bytes are.
    pub memory: &'a GuestMemory,
    /// Names.
    pub symbols: &'a Symbols,
}

/// Decodes x86 in all its widths.
pub struct Disassembler {
    bits16: Capstone,
    bits32: Capstone,
    bits64: Capstone,
}

impl fmt::Debug for Disassembler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Disassembler")
    }
}

impl Disassembler {
    /// A disassembler that writes instructions in `syntax`.
    pub fn new(syntax: Syntax) -> Result<Self, SetUpError> {
        let syntax = match syntax {
            Syntax::Intel => ArchSyntax::Intel,
            Syntax::Att => ArchSyntax::Att,
        };
        let build = |mode| {
            Capstone::new()
                .x86()
                .mode(mode)
                .syntax(syntax)
                .detail(true)
                .build()
        };
        Ok(Self {
            bits16: build(ArchMode::Mode16)?,
            bits32: build(ArchMode::Mode32)?,
            bits64: build(ArchMode::Mode64)?,
        })
    }

    fn decoder(&self, mode: CpuMode) -> &Capstone {
        match mode {
            CpuMode::Real | CpuMode::Virtual8086 | CpuMode::Protected16 => &self.bits16,
            CpuMode::Protected32 | CpuMode::Compatibility => &self.bits32,
            CpuMode::Long64 => &self.bits64,
        }
    }

    /// `count` lines (at most [`MAX_LINES`]) from linear address `from` on, decoded as the code segment in `code` would be.
    pub fn disassemble(&self, code: &Code<'_>, from: GuestVirtAddr, count: usize) -> Vec<Line> {
        let mut lines = Vec::new();
        let mut at = Some(from);
        while let (Some(address), true) = (at, lines.len() < count.min(MAX_LINES)) {
            let line = self.line(code, address);
            at = line.next;
            lines.push(line);
        }
        lines
    }

    /// The line at linear address `address`.
    pub fn line(&self, code: &Code<'_>, address: GuestVirtAddr) -> Line {
        let mut line = Line {
            address,
            bytes: Vec::new(),
            content: Content::Undecodable,
            symbol: code.symbols.lookup(address),
            target: None,
            is_call: false,
            next: None,
        };
        let bytes = read_available(code.cpu, code.memory, address, MAX_INSTRUCTION);
        let Some(&first) = bytes.first() else {
            return unreadable(code, line);
        };
        let base = code_base(code.cpu);
        let offset = address.get().wrapping_sub(base);
        let decoder = self.decoder(code.cpu.mode());
        let decoded = decoder.disasm_count(&bytes, offset, 1).ok();
        match decoded
            .as_ref()
            .and_then(|instructions| instructions.first())
        {
            Some(instruction) if !instruction.bytes().is_empty() => {
                line.bytes = instruction.bytes().to_vec();
                line.content = Content::Instruction {
                    mnemonic: instruction.mnemonic().unwrap_or_default().to_owned(),
                    operands: instruction.op_str().unwrap_or_default().to_owned(),
                };
                self.look_inside(code, decoder, instruction, base, &mut line);
            }
            _ => line.bytes = vec![first],
        }
        line.next = next_address(code.cpu, address, line.bytes.len() as u64);
        line
    }

    /// Fills in what the instruction refers to.
    fn look_inside(
        &self,
        code: &Code<'_>,
        decoder: &Capstone,
        instruction: &Insn<'_>,
        base: u64,
        line: &mut Line,
    ) {
        let Ok(detail) = decoder.insn_detail(instruction) else {
            return;
        };
        let in_group = |group: u32| detail.groups().iter().any(|id| u32::from(id.0) == group);
        line.is_call = in_group(X86InsnGroup::X86_GRP_CALL);
        let branches = line.is_call || in_group(X86InsnGroup::X86_GRP_JUMP);
        let arch = detail.arch_detail();
        let operands = arch.operands();
        let after = instruction.address().wrapping_add(instruction.len() as u64);
        let offset = operands.iter().find_map(|operand| {
            let ArchOperand::X86Operand(operand) = operand;
            match &operand.op_type {
                // A far branch has two immediates, and its segment is not this one.
                X86OperandType::Imm(to) if branches && operands.len() == 1 => {
                    Some(base.wrapping_add(*to as u64))
                }
                X86OperandType::Mem(memory) => {
                    let none = RegId(X86Reg::X86_REG_INVALID as _);
                    let segment = u32::from(memory.segment().0);
                    if matches!(segment, X86Reg::X86_REG_FS | X86Reg::X86_REG_GS)
                        || memory.index() != none
                    {
                        None
                    } else if u32::from(memory.base().0) == X86Reg::X86_REG_RIP {
                        Some(after.wrapping_add(memory.disp() as u64))
                    } else {
                        (memory.base() == none && memory.disp() != 0)
                            .then_some(memory.disp() as u64)
                    }
                }
                _ => None,
            }
        });
        line.target = offset.map(|address| {
            let address = GuestVirtAddr::new(address & address_mask(code.cpu));
            Target {
                address,
                symbol: code.symbols.lookup(address),
            }
        });
    }

    /// Up to `count` lines that end right before linear address `at`, in order.
    ///
    /// Instructions cannot be decoded backwards. Decoding starts at the symbol that holds `at`; without one, or where that does
    /// not arrive at `at`, at the earliest byte before it from which whole instructions lead to it. What cannot be
    /// found that way is left out.
    pub fn before(&self, code: &Code<'_>, at: GuestVirtAddr, count: usize) -> Vec<Line> {
        let count = count.min(MAX_LINES);
        let mut lines = VecDeque::new();
        let mut to = at;
        while lines.len() < count {
            let missing = count - lines.len();
            let Some(found) = self
                .lead_from_symbol(code, to)
                .or_else(|| self.resynchronise(code, to, missing))
            else {
                break;
            };
            for line in found.into_iter().rev().take(missing) {
                to = line.address;
                lines.push_front(line);
            }
        }
        lines.into()
    }

    fn lead_from_symbol(&self, code: &Code<'_>, at: GuestVirtAddr) -> Option<Vec<Line>> {
        // The byte before, so that the start of a function is led to by the function before it.
        let previous = GuestVirtAddr::new(at.get().checked_sub(1)?);
        let start = code.symbols.lookup(previous)?.symbol.start;
        let distance = at.offset_from(start)?;
        if distance > MAX_FUNCTION_PREFIX {
            return None;
        }
        self.lead(code, start, at).filter(|lines| !lines.is_empty())
    }

    fn resynchronise(&self, code: &Code<'_>, at: GuestVirtAddr, count: usize) -> Option<Vec<Line>> {
        let count = count.min(16);
        let farthest = ((count + 1) * MAX_INSTRUCTION) as u64;
        (1..=farthest.min(at.get()))
            .rev()
            .filter_map(|back| self.lead(code, GuestVirtAddr::new(at.get() - back), at))
            .find(|lines| {
                lines
                    .iter()
                    .all(|line| matches!(line.content, Content::Instruction { .. }))
            })
    }

    /// The lines from `from` to exactly `to`; `None` if they overshoot.
    fn lead(&self, code: &Code<'_>, from: GuestVirtAddr, to: GuestVirtAddr) -> Option<Vec<Line>> {
        let mut lines = Vec::new();
        let mut at = from;
        while at < to {
            let line = self.line(code, at);
            at = line.next?;
            lines.push(line);
        }
        (at == to).then_some(lines)
    }
}

fn unreadable(code: &Code<'_>, mut line: Line) -> Line {
    if let Err(error) = translate(code.cpu, code.memory, line.address) {
        line.content = Content::Unreadable(error);
    }
    line.next = next_address(code.cpu, line.address, line.address.bytes_left_in_page());
    line
}

/// What is added to an offset in the code segment, in modes that have such a thing.
fn code_base(cpu: &CpuState) -> u64 {
    match cpu.mode() {
        CpuMode::Long64 => 0,
        _ => cpu.segment(SegmentRegister::Cs).base,
    }
}

fn address_mask(cpu: &CpuState) -> u64 {
    match cpu.mode() {
        CpuMode::Long64 => u64::MAX,
        _ => 0xffff_ffff,
    }
}

fn next_address(cpu: &CpuState, addr: GuestVirtAddr, len: u64) -> Option<GuestVirtAddr> {
    addr.checked_add(len)
        .filter(|next| next.get() <= address_mask(cpu))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TEXT, code_machine, real_mode_machine, symbols};
    use crate::virtual_memory::Inaccessible;
    use proptest::prelude::*;
    use x86::GuestPhysAddr;

    /// push rbp; mov rbp, rsp; call TEXT+0x20; mov rax, [rip+0x100]; je TEXT; (bad); ret
    const CODE: &[u8] = &[
        0x55, 0x48, 0x89, 0xe5, 0xe8, 0x17, 0, 0, 0, 0x48, 0x8b, 0x05, 0, 1, 0, 0, 0x74, 0xee,
        0x06, 0xc3,
    ];

    fn at(offset: u64) -> GuestVirtAddr {
        GuestVirtAddr::new(TEXT + offset)
    }

    fn intel() -> Disassembler {
        Disassembler::new(Syntax::Intel).expect("capstone")
    }

    #[test]
    fn lines_carry_instruction_symbol_and_target() {
        let (cpu, memory) = code_machine(CODE);
        let symbols = symbols();
        let code = Code {
            cpu: &cpu,
            memory: &memory,
            symbols: &symbols,
        };
        let lines: Vec<_> = intel()
            .disassemble(&code, at(0), 7)
            .iter()
            .map(Line::to_string)
            .collect();
        let expected = "\
0x0000000000400000 <main>  55                              push rbp
0x0000000000400001 <main+0x1>  48 89 e5                        mov rbp, rsp
0x0000000000400004 <main+0x4>  e8 17 00 00 00                  call 0x400020  ; callee
0x0000000000400009 <main+0x9>  48 8b 05 00 01 00 00            mov rax, qword ptr [rip + 0x100]  ; TABLE+0x10
0x0000000000400010 <main+0x10>  74 ee                           je 0x400000  ; main
0x0000000000400012 <main+0x12>  06                              (bad)
0x0000000000400013 <main+0x13>  c3                              ret";
        assert_eq!(lines.join("\n"), expected);
    }

    #[test]
    fn att_syntax_on_demand() {
        let (cpu, memory) = code_machine(CODE);
        let symbols = Symbols::default();
        let code = Code {
            cpu: &cpu,
            memory: &memory,
            symbols: &symbols,
        };
        let att = Disassembler::new(Syntax::Att).expect("capstone");
        assert_eq!(att.line(&code, at(1)).text(), "movq %rsp, %rbp");
    }

    #[test]
    fn unmapped_pages_are_one_line_each() {
        let (cpu, memory) = code_machine(CODE);
        let symbols = Symbols::default();
        let code = Code {
            cpu: &cpu,
            memory: &memory,
            symbols: &symbols,
        };
        let lines = intel().disassemble(&code, at(0x1ffe), 4);
        // add byte ptr [rax], al (two zero bytes), then two pages without a mapping.
        assert_eq!(lines[0].bytes, [0, 0]);
        let Content::Unreadable(error) = lines[1].content else {
            panic!("{:?}", lines[1])
        };
        assert_eq!(error.why, Inaccessible::NotPresent { level: 1 });
        assert_eq!(lines[1].text(), "(not mapped (the PTE is not present))");
        assert_eq!(lines[2].address, at(0x3000));
    }

    #[test]
    fn real_mode_counts_from_the_segment() {
        // At 1000:0000, jmp to offset 0x10 of the segment: linear 0x10010.
        let (cpu, memory) = real_mode_machine(0x1000, &[0xeb, 0x0e]);
        let symbols = Symbols::default();
        let code = Code {
            cpu: &cpu,
            memory: &memory,
            symbols: &symbols,
        };
        let line = intel().line(&code, GuestVirtAddr::new(0x10000));
        assert_eq!(line.text(), "jmp 0x10");
        assert_eq!(line.target.map(|t| t.address.get()), Some(0x10010));
        let end = intel().disassemble(&code, GuestVirtAddr::new(0xffff_f000), 5);
        assert_eq!(end.len(), 1, "no line past 4 GiB");
    }

    #[test]
    fn context_before_an_address_starts_at_its_function() {
        let (cpu, memory) = code_machine(CODE);
        let symbols = symbols();
        let code = Code {
            cpu: &cpu,
            memory: &memory,
            symbols: &symbols,
        };
        let starts = |lines: Vec<Line>| -> Vec<u64> {
            lines.iter().map(|line| line.address.get() - TEXT).collect()
        };
        assert_eq!(starts(intel().before(&code, at(0x10), 2)), [0x4, 0x9]);
        let no_symbols = Symbols::default();
        let blind = Code {
            symbols: &no_symbols,
            ..code
        };
        assert_eq!(
            starts(intel().before(&blind, at(0x10), 3)),
            [0x1, 0x4, 0x9],
            "resynchronised"
        );
        assert!(intel().before(&blind, GuestVirtAddr::new(0), 3).is_empty());
    }

    #[test]
    fn context_of_a_function_start_is_the_function_before() {
        let (cpu, memory) = code_machine(CODE);
        memory
            .write(GuestPhysAddr::new(0x8014), &[0x90; 12])
            .expect("pad with nop");
        let symbols = symbols();
        let code = Code {
            cpu: &cpu,
            memory: &memory,
            symbols: &symbols,
        };
        let lines = intel().before(&code, at(0x20), 14);
        let last = lines.last().expect("some");
        assert_eq!((last.address, last.text()), (at(0x1f), "nop".to_owned()));
        assert_eq!(
            lines.first().map(|line| line.text()).as_deref(),
            Some("(bad)")
        );
    }

    proptest! {
        #[test]
        fn any_code_gives_lines(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            offset in 0u64..0x2100,
        ) {
            let (cpu, memory) = code_machine(&bytes);
            let symbols = symbols();
            let code = Code { cpu: &cpu, memory: &memory, symbols: &symbols };
            let lines = intel().disassemble(&code, at(offset), 40);
            prop_assert_eq!(lines.len(), 40);
            let back = intel().before(&code, at(offset), 5);
            prop_assert!(back.len() <= 5);
            if let Some(last) = back.last() {
                prop_assert_eq!(last.next, Some(at(offset)));
            }
        }
    }
}
