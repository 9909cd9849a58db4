//! Decoding: from bytes to an [`Op`].
//!
//! Purpose: decide once how an instruction is executed, and which instructions the CPU model has at all.
//! Invariants: what is not known to be plain, and has no code of its own, is #UD; nothing runs natively by default.
//! Instructions of extensions that the model does not report in CPUID are #UD, or what their encoding meant before the
//! extension (LZCNT is BSR, TZCNT is BSF, ENDBR is NOP).
//! Elsewhere: the conditions for a stub ([`crate::stub`]).
//! Source: Intel SDM vol. 2; the feature lists are iced-x86's.

use crate::op::{Address, BASE_RIP, FpuChecks, Kind, NO_REGISTER, Op, Special};
use crate::stub::{MemoryUse, NoStub, Stub, Stubs, Traits, generate};
use iced_x86::{
    Code, ConditionCode, CpuidFeature, Decoder, DecoderError, DecoderOptions, Instruction,
    Mnemonic, OpKind, Register,
};

/// Longest instruction.
pub(crate) const MAX_LEN: usize = 15;

const OPTIONS: u32 =
    DecoderOptions::NO_MPFX_0FBC | DecoderOptions::NO_MPFX_0FBD | DecoderOptions::NO_WBNOINVD;

/// What decoding came to.
#[derive(Debug)]
pub(crate) enum Decoded {
    /// An instruction.
    Op(Box<Op>),
    /// The bytes end before the instruction does.
    Short,
    /// The stub memory is full.
    Full,
}

/// Decodes the instruction at the start of `bytes`, which lie at `ip`.
pub(crate) fn decode(stubs: &mut Stubs, bits: u32, bytes: &[u8], ip: u64) -> Decoded {
    let bytes = &bytes[..bytes.len().min(MAX_LEN)];
    let mut decoder = Decoder::with_ip(bits, bytes, ip, OPTIONS);
    let instruction = decoder.decode();
    let mut op = Op {
        kind: Kind::Undefined,
        len: instruction.len() as u8,
        size: 0,
        register: 0,
        checks: FpuChecks::None,
        special: Special::None,
        aligned: false,
        traits: Traits::default(),
        stub: Stub::NONE,
        address: address(&instruction),
        branch: 0,
        branch_mask: u64::MAX,
        instruction,
    };
    if instruction.is_invalid() {
        if decoder.last_error() == DecoderError::NoMoreBytes {
            return Decoded::Short;
        }
        if instruction.len() == MAX_LEN {
            // The decoder gave up at the fifteenth byte.
            op.kind = Kind::TooLong;
        }
        return Decoded::Op(Box::new(op));
    }
    if !is_offered(&instruction) {
        return Decoded::Op(Box::new(op));
    }
    op.checks = fpu_checks(&instruction);
    op.kind = own_kind(&mut op);
    if op.kind == Kind::Plain {
        match stubs.get(&instruction) {
            Ok((stub, traits)) => set_plain(&mut op, stub, traits),
            Err(NoStub::Full) => return Decoded::Full,
            Err(NoStub::NotPlain(_)) => op.kind = Kind::Refused,
        }
    }
    Decoded::Op(Box::new(op))
}

fn set_plain(op: &mut Op, stub: Stub, traits: Traits) {
    let instruction = &op.instruction;
    op.stub = stub;
    op.traits = traits;
    op.special = match instruction.mnemonic() {
        Mnemonic::Div => Special::Divide,
        Mnemonic::Idiv => Special::DivideSigned,
        _ => match generate::bit_offset(instruction) {
            Some(register) => {
                op.size = register.size() as u8;
                Special::BitOffset(register.full_register().number() as u8)
            }
            None => Special::None,
        },
    };
    let may_be_unaligned = matches!(
        instruction.mnemonic(),
        Mnemonic::Movups
            | Mnemonic::Movupd
            | Mnemonic::Movdqu
            | Mnemonic::Lddqu
            | Mnemonic::Pcmpestri
            | Mnemonic::Pcmpestrm
            | Mnemonic::Pcmpistri
            | Mnemonic::Pcmpistrm
    );
    op.aligned = traits.memory != MemoryUse::None && traits.memory_len == 16 && !may_be_unaligned;
}

/// The kind, for all that is not left to a stub; fills in what that kind needs.
fn own_kind(op: &mut Op) -> Kind {
    let instruction = op.instruction;
    let near = |kind| match kind {
        OpKind::NearBranch16 => Some(0xffff),
        OpKind::NearBranch32 => Some(0xffff_ffff),
        OpKind::NearBranch64 => Some(u64::MAX),
        _ => None,
    };
    if let Some(mask) = near(instruction.op0_kind()) {
        op.branch_mask = mask;
        op.branch = instruction
            .near_branch_target()
            .wrapping_sub(instruction.next_ip());
    }
    op.size = instruction.stack_pointer_increment().unsigned_abs().min(8) as u8;
    let condition = instruction.condition_code();
    let register0 = instruction.op0_register();
    match instruction.mnemonic() {
        Mnemonic::Lea => {
            op.size = register0.size() as u8;
            op.register = register0.full_register().number() as u8;
            Kind::Lea
        }
        _ if is_nop(&instruction) => Kind::Nop,
        _ if instruction.is_jcc_short_or_near() && condition != ConditionCode::None => {
            op.register = condition as u8 - 1;
            Kind::Jcc
        }
        Mnemonic::Jmp if near(instruction.op0_kind()).is_some() => Kind::Jmp,
        Mnemonic::Call if near(instruction.op0_kind()).is_some() => Kind::Call,
        Mnemonic::Ret => {
            op.size = match instruction.code() {
                Code::Retnq | Code::Retnq_imm16 => 8,
                Code::Retnd | Code::Retnd_imm16 => 4,
                _ => 2,
            };
            Kind::Ret
        }
        Mnemonic::Push if register0.is_gpr() => {
            op.register = register0.full_register().number() as u8;
            Kind::PushRegister
        }
        Mnemonic::Pop if register0.is_gpr() => {
            op.register = register0.full_register().number() as u8;
            Kind::PopRegister
        }
        _ if is_plain(&instruction) => Kind::Plain,
        _ => Kind::Own,
    }
}

/// Instructions that do nothing here, not even access their operand.
fn is_nop(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Nop
            | M::Reservednop
            | M::Endbr32
            | M::Endbr64
            | M::Rdsspd
            | M::Rdsspq
            | M::Cldemote
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetch
            | M::Prefetchw
            | M::Prefetchwt1
            | M::Prefetchit0
            | M::Prefetchit1
            | M::Lfence
            | M::Sfence
            | M::Mfence
    )
}

/// Integer instructions left to the host. SSE, MMX and x87 are, unless they have code of their own.
fn is_plain(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let mnemonic = instruction.mnemonic();
    let system_operand = (0..instruction.op_count()).any(|n| {
        let register = instruction.op_register(n);
        instruction.op_kind(n) == OpKind::Register
            && (register.is_segment_register()
                || register.is_cr()
                || register.is_dr()
                || register.is_tr())
    });
    if system_operand || instruction.is_string_instruction() {
        return false;
    }
    let base = matches!(
        mnemonic,
        M::Add
            | M::Or
            | M::Adc
            | M::Sbb
            | M::And
            | M::Sub
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Mul
            | M::Imul
            | M::Div
            | M::Idiv
            | M::Shl
            | M::Sal
            | M::Shr
            | M::Sar
            | M::Rol
            | M::Ror
            | M::Rcl
            | M::Rcr
            | M::Shld
            | M::Shrd
            | M::Bt
            | M::Bts
            | M::Btr
            | M::Btc
            | M::Bsf
            | M::Bsr
            | M::Bswap
            | M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Xchg
            | M::Xadd
            | M::Cmpxchg
            | M::Cmpxchg8b
            | M::Cmpxchg16b
            | M::Cbw
            | M::Cwde
            | M::Cdqe
            | M::Cwd
            | M::Cdq
            | M::Cqo
            | M::Lahf
            | M::Sahf
            | M::Clc
            | M::Stc
            | M::Cmc
            | M::Cmova
            | M::Cmovae
            | M::Cmovb
            | M::Cmovbe
            | M::Cmove
            | M::Cmovg
            | M::Cmovge
            | M::Cmovl
            | M::Cmovle
            | M::Cmovne
            | M::Cmovno
            | M::Cmovnp
            | M::Cmovns
            | M::Cmovo
            | M::Cmovp
            | M::Cmovs
            | M::Seta
            | M::Setae
            | M::Setb
            | M::Setbe
            | M::Sete
            | M::Setg
            | M::Setge
            | M::Setl
            | M::Setle
            | M::Setne
            | M::Setno
            | M::Setnp
            | M::Setns
            | M::Seto
            | M::Setp
            | M::Sets
            | M::Crc32
            | M::Popcnt
            | M::Movnti
    );
    base || is_vector_or_x87(instruction)
        && !matches!(
            mnemonic,
            M::Wait
                | M::Ldmxcsr
                | M::Stmxcsr
                | M::Maskmovq
                | M::Maskmovdqu
                | M::Fxsave
                | M::Fxsave64
                | M::Fxrstor
                | M::Fxrstor64
                | M::Clflush
                | M::Pause
        )
}

fn has_feature(instruction: &Instruction, features: &[CpuidFeature]) -> bool {
    instruction
        .cpuid_features()
        .iter()
        .any(|feature| features.contains(feature))
}

const X87: [CpuidFeature; 3] = [
    CpuidFeature::FPU,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
];
const SSE: [CpuidFeature; 6] = [
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::SSE3,
    CpuidFeature::SSSE3,
    CpuidFeature::SSE4_1,
    CpuidFeature::SSE4_2,
];

fn is_vector_or_x87(instruction: &Instruction) -> bool {
    has_feature(instruction, &X87)
        || has_feature(instruction, &SSE)
        || has_feature(instruction, &[CpuidFeature::MMX])
}

/// Whether the CPU model (x86-64-v2) has this instruction.
fn is_offered(instruction: &Instruction) -> bool {
    use CpuidFeature as F;
    let offered = |feature: &CpuidFeature| {
        matches!(
            feature,
            F::INTEL8086
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486
                | F::X64
                | F::CMOV
                | F::CMPXCHG16B
                | F::CPUID
                | F::CX8
                | F::FPU
                | F::FPU287
                | F::FPU387
                | F::FXSR
                | F::MMX
                | F::MSR
                | F::MULTIBYTENOP
                | F::PAUSE
                | F::POPCNT
                | F::PREFETCHW
                | F::PREFETCHWT1
                | F::PREFETCHITI
                | F::CLDEMOTE
                | F::CET_IBT
                | F::RDPMC
                | F::SEP
                | F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::SYSCALL
                | F::TSC
                | F::CLFSH
        )
    };
    match instruction.mnemonic() {
        Mnemonic::Vmcall | Mnemonic::Rdsspd | Mnemonic::Rdsspq => true,
        _ => instruction.cpuid_features().iter().all(offered),
    }
}

fn fpu_checks(instruction: &Instruction) -> FpuChecks {
    use Mnemonic as M;
    let mnemonic = instruction.mnemonic();
    let names = |is: fn(Register) -> bool| {
        (0..instruction.op_count())
            .any(|n| instruction.op_kind(n) == OpKind::Register && is(instruction.op_register(n)))
    };
    let (xmm, mm) = (names(Register::is_xmm), names(Register::is_mm));
    match mnemonic {
        M::Wait => FpuChecks::None, // its own rule
        M::Ldmxcsr | M::Stmxcsr => FpuChecks::Sse,
        M::Fninit | M::Fnclex | M::Fnstsw | M::Fnstcw | M::Fnstenv | M::Fnsave => {
            FpuChecks::X87Control
        }
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 => FpuChecks::X87Control,
        M::Emms => FpuChecks::Mmx,
        _ if has_feature(instruction, &X87) => FpuChecks::X87,
        _ if xmm && mm => FpuChecks::SseMmx,
        _ if xmm => FpuChecks::Sse,
        _ if mm => FpuChecks::Mmx,
        _ => FpuChecks::None,
    }
}

fn address(instruction: &Instruction) -> Address {
    let base = instruction.memory_base();
    let index = instruction.memory_index();
    let mut displacement = instruction.memory_displacement64();
    let size = match (base, index) {
        (Register::None, Register::None) => instruction.memory_displ_size() as usize,
        (Register::None, index) => index.size(),
        (base, _) => base.size(),
    };
    let number = |register: Register| match register {
        Register::None => NO_REGISTER,
        Register::RIP | Register::EIP => BASE_RIP,
        register => register.full_register().number() as u8,
    };
    if number(base) == BASE_RIP {
        displacement = displacement.wrapping_sub(instruction.next_ip());
    }
    Address {
        segment: instruction.memory_segment().number() as u8,
        base: number(base),
        index: number(index),
        shift: instruction.memory_index_scale().trailing_zeros() as u8,
        displacement,
        mask: match size {
            2 => 0xffff,
            4 => 0xffff_ffff,
            _ => u64::MAX,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Every prefix, opcode and ModRM byte, in every code size.
    #[test]
    fn every_plain_instruction_has_a_stub() {
        let mut stubs = Stubs::new().expect("stub memory");
        let mut refused = BTreeSet::new();
        let mut seen = BTreeSet::new();
        let prefixes: [&[u8]; 6] = [&[], &[0x66], &[0xf2], &[0xf3], &[0x67], &[0x48]];
        let maps: [&[u8]; 4] = [&[], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]];
        for bits in [16, 32, 64] {
            for (prefix, map) in prefixes
                .iter()
                .flat_map(|p| maps.iter().map(move |m| (p, m)))
            {
                for (opcode, modrm) in (0..=255u8).flat_map(|o| (0..=255u8).map(move |m| (o, m))) {
                    let mut bytes = [prefix, *map].concat();
                    bytes.extend([opcode, modrm, 0x24, 1, 2, 3, 4, 5, 6, 7, 8]);
                    match decode(&mut stubs, bits, &bytes, 0x1000) {
                        Decoded::Op(op) if op.kind == Kind::Refused => {
                            refused.insert(format!("{bits}: {:?}", op.instruction.code()));
                        }
                        Decoded::Op(op) if op.kind == Kind::Plain => {
                            seen.insert(op.instruction.code());
                        }
                        Decoded::Full => stubs.flush(),
                        _ => {}
                    }
                }
            }
        }
        assert!(refused.is_empty(), "{refused:?}");
        assert!(seen.len() > 700, "{}", seen.len());
    }
}
