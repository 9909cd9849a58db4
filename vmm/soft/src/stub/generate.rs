//! Generating the stub of one instruction.
//!
//! Purpose: check the conditions under which an instruction may run as a stub, rename what it must not touch, and lay code
//! around it that moves the guest's state in and out.
//! Invariants: the list in [`crate::stub`]'s documentation; anything else is refused with [`NoStub::NotPlain`].
//! Guest registers keep their numbers, except RSP, which becomes a register the instruction does not name.

use super::emit::{Emitter, at};
use super::{Frame, NoStub, SCRATCH};
use iced_x86::{
    Code, CpuidFeature, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpKind, Register, RflagsBits,
};
use std::mem::offset_of;
use x86::Registers;

/// What a stub does with its memory operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum MemoryUse {
    /// It has none.
    None,
    /// Reads it.
    Read,
    /// Overwrites all of it.
    Write,
    /// Reads it and writes it, or may leave parts as they were.
    ReadWrite,
}

/// What the caller of a stub must know about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Traits {
    /// Memory operand.
    pub(crate) memory: MemoryUse,
    /// Its bytes.
    pub(crate) memory_len: u8,
    /// The status flags it returns count.
    pub(crate) writes_flags: bool,
    /// It works on [`Frame::image`].
    pub(crate) x87: bool,
    /// It works under [`Frame::mxcsr`].
    pub(crate) mxcsr: bool,
}

impl Default for Traits {
    fn default() -> Self {
        Self {
            memory: MemoryUse::None,
            memory_len: 0,
            writes_flags: false,
            x87: false,
            mxcsr: false,
        }
    }
}

/// Generates stubs.
#[derive(Debug)]
pub(crate) struct Factory {
    emitter: Emitter,
    info: InstructionInfoFactory,
}

impl Default for Factory {
    fn default() -> Self {
        Self {
            emitter: Emitter::new(),
            info: InstructionInfoFactory::new(),
        }
    }
}

const RAX: u32 = 0;
const RDX: u32 = 2;
const RSP: u32 = 4;
const RSI: u32 = 6;
const RDI: u32 = 7;
/// RBX, RBP, R12..R15: what a function must preserve in the System V ABI.
const CALLEE_SAVED: u16 = 1 << 3 | 1 << 5 | 0xf000;
const STATUS: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

fn gpr(number: u32) -> Register {
    Register::RAX + number
}

/// Offset of a general register in [`Registers`].
fn gpr_at(number: u32) -> usize {
    offset_of!(Registers, gpr) + 8 * number as usize
}

/// The registers an instruction uses, by number.
#[derive(Clone, Copy, Default, Debug)]
struct Usage {
    gprs: u16,
    gprs_written: u16,
    xmms: u16,
    xmms_written: u16,
    high_byte: bool,
    mmx: bool,
    /// The register that holds a bit offset into memory; it comes masked from [`Frame::bit`].
    bit_offset: Option<u32>,
}

/// The host registers a stub uses for itself.
#[derive(Clone, Copy, Debug)]
struct Assignment {
    frame: u32,
    registers: u32,
    stack: u32,
}

impl Factory {
    /// The stub's code and traits.
    pub(crate) fn generate(&mut self, original: &Instruction) -> Result<(Vec<u8>, Traits), NoStub> {
        let mut instruction = normalise(original)?;
        let memory_operand = operand_kinds(&instruction).any(|kind| kind == OpKind::Memory);
        let mut traits = self.memory_traits(&instruction, memory_operand)?;
        let usage = self.usage(&instruction)?;
        let features = instruction.cpuid_features();
        traits.x87 = usage.mmx
            || [
                CpuidFeature::FPU,
                CpuidFeature::FPU287,
                CpuidFeature::FPU387,
                CpuidFeature::MMX,
            ]
            .iter()
            .any(|feature| features.contains(feature));
        if traits.x87 && traits.memory == MemoryUse::Write {
            // With an unmasked exception the store does not happen.
            traits.memory = MemoryUse::ReadWrite;
        }
        traits.mxcsr = uses_mxcsr(instruction.mnemonic());
        traits.writes_flags =
            instruction.rflags_modified() & STATUS != 0 || is_shift(instruction.mnemonic());
        let assigned = assign(&usage)?;
        if memory_operand {
            instruction.set_memory_base(gpr(assigned.frame));
        }
        rename_stack_pointer(&mut instruction, assigned.stack);
        let code = self.emit(&instruction, &usage, &traits, assigned);
        code.map(|code| (code, traits))
            .ok_or(NoStub::NotPlain("it has no 64-bit encoding"))
    }

    fn memory_traits(
        &mut self,
        instruction: &Instruction,
        memory_operand: bool,
    ) -> Result<Traits, NoStub> {
        let mut traits = Traits::default();
        let info = self.info.info(instruction);
        let [memory] = info.used_memory() else {
            let none = info.used_memory().is_empty() && !memory_operand;
            return if none {
                Ok(traits)
            } else {
                Err(NoStub::NotPlain("implicit memory"))
            };
        };
        let explicit = memory_operand
            && memory.base() == Register::None
            && memory.index() == Register::None
            && memory.displacement() == 0;
        let len = instruction.memory_size().size();
        if !explicit || len == 0 || len > SCRATCH {
            return Err(NoStub::NotPlain("its memory operand"));
        }
        traits.memory_len = len as u8;
        traits.memory = match memory.access() {
            OpAccess::Read | OpAccess::CondRead => MemoryUse::Read,
            OpAccess::Write => MemoryUse::Write,
            OpAccess::ReadWrite | OpAccess::ReadCondWrite | OpAccess::CondWrite => {
                MemoryUse::ReadWrite
            }
            _ => return Err(NoStub::NotPlain("its memory operand")),
        };
        Ok(traits)
    }

    fn usage(&mut self, instruction: &Instruction) -> Result<Usage, NoStub> {
        let mut usage = Usage {
            bit_offset: bit_offset(instruction).map(|r| r.full_register().number() as u32),
            ..Usage::default()
        };
        for used in self.info.info(instruction).used_registers() {
            let register = used.register();
            let written = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead);
            if register.is_gpr() {
                let bit = 1 << register.full_register().number();
                usage.gprs |= bit;
                usage.gprs_written |= if written { bit } else { 0 };
            } else if register.is_xmm() && register.number() < 16 {
                let bit = 1 << register.number();
                usage.xmms |= bit;
                usage.xmms_written |= if written { bit } else { 0 };
            } else if register.is_mm() {
                usage.mmx = true;
            } else if !register.is_st() && !is_flat_segment(register) {
                return Err(NoStub::NotPlain("a register it names"));
            }
        }
        for n in 0..instruction.op_count() {
            if instruction.op_kind(n) == OpKind::Register {
                let register = instruction.op_register(n);
                usage.high_byte |= matches!(
                    register,
                    Register::AH | Register::CH | Register::DH | Register::BH
                );
                usage.mmx |= register.is_mm();
            }
        }
        Ok(usage)
    }

    fn emit(
        &mut self,
        instruction: &Instruction,
        usage: &Usage,
        traits: &Traits,
        assigned: Assignment,
    ) -> Option<Vec<u8>> {
        let mut clobbered = usage.gprs | 1 << assigned.frame | 1 << assigned.registers;
        if usage.gprs & 1 << RSP != 0 {
            clobbered |= 1 << assigned.stack;
        }
        let saved = clobbered & CALLEE_SAVED;
        self.prologue(instruction, usage, traits, assigned, saved);
        self.emitter.push(instruction);
        self.epilogue(usage, traits, assigned, saved);
        self.emitter.finish()
    }

    fn prologue(
        &mut self,
        instruction: &Instruction,
        usage: &Usage,
        traits: &Traits,
        assigned: Assignment,
        saved: u16,
    ) {
        let emit = &mut self.emitter;
        for n in bits(saved) {
            emit.register(Code::Push_r64, gpr(n));
        }
        if traits.x87 {
            // Before the XMM registers are loaded: it overwrites them.
            emit.memory(
                Code::Fxrstor64_m512byte,
                at(gpr(RDI), offset_of!(Frame, image)),
            );
        }
        for n in bits(usage.xmms) {
            let from = at(gpr(RDX), 16 * n as usize);
            emit.load(Code::Movups_xmm_xmmm128, Register::XMM0 + n, from);
        }
        if usage.xmms_written != 0 {
            emit.register(Code::Push_r64, gpr(RDX));
        }
        if traits.mxcsr {
            emit.memory(
                Code::Stmxcsr_m32,
                at(gpr(RDI), offset_of!(Frame, host_mxcsr)),
            );
            emit.memory(Code::Ldmxcsr_m32, at(gpr(RDI), offset_of!(Frame, mxcsr)));
        }
        // `frame` is never RSI and `registers` never RDI, so neither move destroys the other's source.
        if assigned.frame != RDI {
            emit.copy(gpr(assigned.frame), gpr(RDI));
        }
        if assigned.registers != RSI {
            emit.copy(gpr(assigned.registers), gpr(RSI));
        }
        let registers = gpr(assigned.registers);
        if loads_flags(instruction) {
            // OF comes from adding 80h to a byte whose top bit is the guest's OF, the others by SAHF.
            let flags = at(registers, offset_of!(Registers, rflags));
            emit.load(Code::Movzx_r32_rm16, Register::EAX, flags);
            emit.immediate(Code::Rol_rm16_imm8, Register::AX, 8);
            emit.immediate(Code::Shl_rm8_imm8, Register::AL, 4);
            emit.immediate(Code::Add_AL_imm8, Register::AL, 0x80);
            emit.bare(Code::Sahf);
        }
        for n in bits(usage.gprs) {
            let to = if n == RSP { assigned.stack } else { n };
            let from = if usage.bit_offset == Some(n) {
                at(gpr(assigned.frame), offset_of!(Frame, bit))
            } else {
                at(registers, gpr_at(n))
            };
            emit.load(Code::Mov_r64_rm64, gpr(to), from);
        }
    }

    fn epilogue(&mut self, usage: &Usage, traits: &Traits, assigned: Assignment, saved: u16) {
        let emit = &mut self.emitter;
        let registers = gpr(assigned.registers);
        let frame = gpr(assigned.frame);
        for n in bits(usage.gprs_written) {
            let from = if n == RSP { assigned.stack } else { n };
            emit.store(Code::Mov_rm64_r64, at(registers, gpr_at(n)), gpr(from));
        }
        if traits.writes_flags {
            emit.bare(Code::Lahf);
            emit.register(Code::Seto_rm8, Register::AL);
        }
        if traits.mxcsr {
            emit.memory(Code::Stmxcsr_m32, at(frame, offset_of!(Frame, mxcsr)));
            emit.memory(Code::Ldmxcsr_m32, at(frame, offset_of!(Frame, host_mxcsr)));
        }
        if traits.x87 {
            emit.memory(Code::Fxsave64_m512byte, at(frame, offset_of!(Frame, image)));
            emit.bare(Code::Fninit);
        }
        if usage.xmms_written != 0 {
            emit.register(Code::Pop_r64, gpr(RDX));
        }
        for n in bits(usage.xmms_written) {
            let to = at(gpr(RDX), 16 * n as usize);
            emit.store(Code::Movups_xmmm128_xmm, to, Register::XMM0 + n);
        }
        for n in bits(saved).rev() {
            emit.register(Code::Pop_r64, gpr(n));
        }
        emit.bare(Code::Retnq);
    }
}

/// The numbers of the bits set.
fn bits(set: u16) -> impl DoubleEndedIterator<Item = u32> {
    (0..16).filter(move |n| set & 1 << n != 0)
}

fn operand_kinds(instruction: &Instruction) -> impl Iterator<Item = OpKind> + '_ {
    (0..instruction.op_count()).map(|n| instruction.op_kind(n))
}

/// Segment registers that addressing "uses"; in the stub they are flat.
fn is_flat_segment(register: Register) -> bool {
    matches!(
        register,
        Register::DS | Register::SS | Register::ES | Register::CS
    )
}

/// The form that exists in 64-bit mode, with the memory operand reduced to an absolute zero and prefixes dropped.
fn normalise(original: &Instruction) -> Result<Instruction, NoStub> {
    let mut instruction = *original;
    if instruction.flow_control() != FlowControl::Next
        || instruction.is_privileged()
        || instruction.is_stack_instruction()
        || instruction.is_string_instruction()
        || instruction.is_save_restore_instruction() && !is_x87_save(instruction.mnemonic())
    {
        return Err(NoStub::NotPlain("what it does"));
    }
    instruction.set_code(long_mode_code(instruction.code()));
    // The scratch slot is this CPU's alone: LOCK would only cost time.
    instruction.set_has_lock_prefix(false);
    instruction.set_has_xacquire_prefix(false);
    instruction.set_has_xrelease_prefix(false);
    instruction.set_has_rep_prefix(false);
    instruction.set_has_repne_prefix(false);
    if operand_kinds(&instruction).any(|kind| kind == OpKind::Memory) {
        // Only then: a 64-bit immediate is kept in the same place as the displacement.
        instruction.set_segment_prefix(Register::None);
        instruction.set_memory_base(Register::None);
        instruction.set_memory_index(Register::None);
        instruction.set_memory_index_scale(1);
        instruction.set_memory_displacement64(0);
        instruction.set_memory_displ_size(0);
    }
    Ok(instruction)
}

fn is_x87_save(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Fnsave | Mnemonic::Frstor | Mnemonic::Fnstenv | Mnemonic::Fldenv
    )
}

/// Encodings that 64-bit mode gave up, as the ones that do the same there.
fn long_mode_code(code: Code) -> Code {
    match code {
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
        Code::Add_rm8_imm8_82 => Code::Add_rm8_imm8,
        Code::Or_rm8_imm8_82 => Code::Or_rm8_imm8,
        Code::Adc_rm8_imm8_82 => Code::Adc_rm8_imm8,
        Code::Sbb_rm8_imm8_82 => Code::Sbb_rm8_imm8,
        Code::And_rm8_imm8_82 => Code::And_rm8_imm8,
        Code::Sub_rm8_imm8_82 => Code::Sub_rm8_imm8,
        Code::Xor_rm8_imm8_82 => Code::Xor_rm8_imm8,
        Code::Cmp_rm8_imm8_82 => Code::Cmp_rm8_imm8,
        other => other,
    }
}

/// Host registers for the stub's own use that the instruction does not name.
fn assign(usage: &Usage) -> Result<Assignment, NoStub> {
    // An instruction that names AH, CH, DH or BH cannot name a register that needs a REX prefix.
    const ANY: &[u32] = &[RDI, 8, 9, 10, 11];
    const LOW: &[u32] = &[RDI, 3, 5, 1, 2];
    let pool = if usage.high_byte { LOW } else { ANY };
    let mut taken = usage.gprs | 1 << RAX;
    let mut take = |pool: &[u32]| {
        let free = pool.iter().copied().find(|n| taken & 1 << n == 0);
        let register = free.ok_or(NoStub::NotPlain("too many registers"))?;
        taken |= 1 << register;
        Ok(register)
    };
    let frame = take(pool)?;
    let registers = take(&[RSI, 8, 9, 10, 11])?;
    let pool = if usage.high_byte { LOW } else { &ANY[1..] };
    let stack = if usage.gprs & 1 << RSP != 0 {
        take(pool)?
    } else {
        RSP
    };
    Ok(Assignment {
        frame,
        registers,
        stack,
    })
}

fn operand_register(register: Register, assigned: Assignment) -> Register {
    if register.is_gpr() && register.full_register() == Register::RSP {
        let base = match register.size() {
            1 => Register::AL,
            2 => Register::AX,
            4 => Register::EAX,
            _ => Register::RAX,
        };
        let skip_high_bytes = if register.size() == 1 && assigned.stack >= 4 {
            4
        } else {
            0
        };
        base + assigned.stack + skip_high_bytes
    } else {
        register
    }
}

fn rename_stack_pointer(instruction: &mut Instruction, stack: u32) {
    let assigned = Assignment {
        frame: 0,
        registers: 0,
        stack,
    };
    for n in 0..instruction.op_count() {
        if instruction.op_kind(n) == OpKind::Register {
            let register = operand_register(instruction.op_register(n), assigned);
            match n {
                0 => instruction.set_op0_register(register),
                1 => instruction.set_op1_register(register),
                2 => instruction.set_op2_register(register),
                _ => {}
            }
        }
    }
}

/// A register with a bit offset that may select memory beyond the operand.
pub(crate) fn bit_offset(instruction: &Instruction) -> Option<Register> {
    let tests = matches!(
        instruction.mnemonic(),
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
    );
    let in_memory = instruction.op0_kind() == OpKind::Memory;
    if tests && in_memory && instruction.op1_kind() == OpKind::Register {
        Some(instruction.op1_register())
    } else {
        None
    }
}

/// Whether the flags before matter: they are read, or some may stay as they were.
fn loads_flags(instruction: &Instruction) -> bool {
    let modified = instruction.rflags_modified() & STATUS;
    let defined =
        instruction.rflags_written() | instruction.rflags_cleared() | instruction.rflags_set();
    instruction.rflags_read() & STATUS != 0
        || is_shift(instruction.mnemonic())
        || modified != 0 && defined & STATUS != STATUS
}

/// Shifts and rotates: which flags they write, if any, depends on the count.
fn is_shift(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Shl
            | Mnemonic::Sal
            | Mnemonic::Shr
            | Mnemonic::Sar
            | Mnemonic::Rol
            | Mnemonic::Ror
            | Mnemonic::Rcl
            | Mnemonic::Rcr
            | Mnemonic::Shld
            | Mnemonic::Shrd
    )
}

/// Whether MXCSR's rounding and exception bits have a part in it.
#[rustfmt::skip]
fn uses_mxcsr(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Addpd | M::Addps | M::Addsd | M::Addss | M::Addsubpd | M::Addsubps
            | M::Cmppd | M::Cmpps | M::Cmpsd | M::Cmpss
            | M::Comisd | M::Comiss | M::Ucomisd | M::Ucomiss
            | M::Cvtdq2pd | M::Cvtdq2ps | M::Cvtpd2dq | M::Cvtpd2pi | M::Cvtpd2ps
            | M::Cvtpi2pd | M::Cvtpi2ps | M::Cvtps2dq | M::Cvtps2pd | M::Cvtps2pi
            | M::Cvtsd2si | M::Cvtsd2ss | M::Cvtsi2sd | M::Cvtsi2ss | M::Cvtss2sd | M::Cvtss2si
            | M::Cvttpd2dq | M::Cvttpd2pi | M::Cvttps2dq | M::Cvttps2pi | M::Cvttsd2si | M::Cvttss2si
            | M::Divpd | M::Divps | M::Divsd | M::Divss | M::Dppd | M::Dpps
            | M::Haddpd | M::Haddps | M::Hsubpd | M::Hsubps
            | M::Maxpd | M::Maxps | M::Maxsd | M::Maxss | M::Minpd | M::Minps | M::Minsd | M::Minss
            | M::Mulpd | M::Mulps | M::Mulsd | M::Mulss
            | M::Rcpps | M::Rcpss | M::Rsqrtps | M::Rsqrtss
            | M::Roundpd | M::Roundps | M::Roundsd | M::Roundss
            | M::Sqrtpd | M::Sqrtps | M::Sqrtsd | M::Sqrtss
            | M::Subpd | M::Subps | M::Subsd | M::Subss
    )
}
