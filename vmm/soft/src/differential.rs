//! Plain instructions against the host CPU.
//!
//! What is checked: random plain instructions, and those of the others that user mode may execute in a straight line, on
//! random registers, flags, memory, x87 and SSE state, once by [`crate::Stepper`] and once natively in this process, must leave
//! the same state: every register, every flag (the undefined ones too), every byte.
//! The guest's data lies at the same linear address as the host's copy of it, in scattered physical pages.
//!
//! Exceptions may be unmasked: x87 then shows them as pending, and SSE raises SIGFPE here where the guest has #XM.

mod native;

use crate::decode::{Decoded, decode};
use crate::op::{Kind, Op, Special};
use crate::stub::Stubs;
use crate::{Pending, Step, Stepper};
use iced_x86::{Code, Encoder, Instruction, Mnemonic, OpKind, Register};
use machine::GuestMemory;
use native::{Host, Native, catch_sigfpe};
use std::collections::BTreeMap;
use x86::regs::{Cr0, Cr4, Efer, rflags};
use x86::{
    CpuModel, CpuState, Exception, Exit, ExitControls, FpuState, GuestPhysAddr, Segment,
    SegmentRegister, Vector,
};

/// Where the data is, for guest and host.
const DATA: u64 = 0x10_0000_0000;
const DATA_LEN: usize = 4 * 4096;
/// Guest-linear and guest-physical address of the code.
const CODE: u64 = 0x5000;
/// Guest-physical pages of the data, in linear order.
const FRAMES: [u64; 4] = [0x2_3000, 0x2_1000, 0x2_7000, 0x2_2000];

/// Flags of MXCSR.
const OVERFLOW: u32 = 1 << 3;
const UNDERFLOW: u32 = 1 << 4;
const INEXACT: u32 = 1 << 5;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 33) % n
    }

    /// Values that instructions treat specially more often than chance has them.
    fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => self.below(4),
            1 => u64::MAX.wrapping_sub(self.below(4)),
            2 => 1 << self.below(64),
            3 => (1 << self.below(64)) - 1,
            4 => self.next() as u32 as u64,
            5 => self.next() as i8 as i64 as u64,
            _ => self.next(),
        }
    }
}

/// A guest in long mode at CPL 0 whose data pages are mapped at [`DATA`].
fn guest() -> (GuestMemory, CpuState) {
    let memory = GuestMemory::new(1 << 20).expect("memory");
    let entry = |at: u64, value: u64| {
        memory
            .write(GuestPhysAddr::new(at), &value.to_le_bytes())
            .expect("in RAM");
    };
    entry(0x1000, 0x2003); // PML4
    entry(0x2000, 0x3003); // 0..1 GiB
    entry(0x3000, 0x4003);
    for page in 0..256 {
        entry(0x4000 + 8 * page, page << 12 | 3);
    }
    entry(0x2000 + 8 * (DATA >> 30), 0x6003);
    entry(0x6000, 0x7003);
    for (n, frame) in FRAMES.iter().enumerate() {
        entry(0x7000 + 8 * n as u64, frame | 3);
    }
    let mut cpu = CpuState {
        cr0: Cr0::PE | Cr0::PG | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::MP,
        cr3: 0x1000,
        cr4: Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT,
        efer: Efer::LME | Efer::LMA,
        ..CpuState::default()
    };
    for which in SegmentRegister::ALL {
        *cpu.segment_mut(which) = Segment::flat(0x10, 0xc093);
    }
    *cpu.segment_mut(SegmentRegister::Cs) = Segment::flat(8, 0xa09b);
    (memory, cpu)
}

/// Random bytes that look like an instruction.
fn random_bytes(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    for prefix in [0x66, 0xf2, 0xf3] {
        if random.below(6) == 0 {
            bytes.push(prefix);
        }
    }
    if random.below(2) == 0 {
        bytes.push(0x40 | random.below(16) as u8);
    }
    match random.below(10) {
        0..=3 => {}
        4..=6 => bytes.push(0x0f),
        7 => bytes.extend([0x0f, 0x38]),
        8 => bytes.extend([0x0f, 0x3a]),
        // x87
        _ => {
            bytes.push(0xd8 | random.below(8) as u8);
        }
    }
    bytes.extend((0..12).map(|_| random.next() as u8));
    bytes
}

/// One instruction and the address of its memory operand.
struct Case {
    bytes: Vec<u8>,
    op: Op,
    gpr: [u64; 16],
}

/// Makes a case from a random instruction, with registers such that a memory operand lies in the data.
fn plain_case(stubs: &mut Stubs, random: &mut Random) -> Option<Case> {
    let Decoded::Op(op) = decode(stubs, 64, &random_bytes(random), CODE) else {
        return None;
    };
    if op.kind != Kind::Plain {
        return None;
    }
    let mut instruction = op.instruction;
    if instruction.has_lock_prefix() && random.below(2) == 0 {
        instruction.set_has_lock_prefix(false);
    }
    if matches!(instruction.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr) {
        // The host may have TZCNT and LZCNT, which the guest has not.
        instruction.set_has_rep_prefix(false);
    }
    let mut gpr: [u64; 16] = std::array::from_fn(|_| random.value());
    let memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
    if memory && is_moffs(instruction.code()) {
        return None;
    }
    if memory {
        address(&mut instruction, &op, &mut gpr, random)?;
    }
    let mut encoder = Encoder::new(64);
    encoder.encode(&instruction, CODE).ok()?;
    let bytes = encoder.take_buffer();
    let Decoded::Op(op) = decode(stubs, 64, &bytes, CODE) else {
        return None;
    };
    (op.kind == Kind::Plain).then_some(Case {
        bytes,
        op: *op,
        gpr,
    })
}

fn is_moffs(code: Code) -> bool {
    matches!(
        code,
        Code::Mov_AL_moffs8
            | Code::Mov_AX_moffs16
            | Code::Mov_EAX_moffs32
            | Code::Mov_RAX_moffs64
            | Code::Mov_moffs8_AL
            | Code::Mov_moffs16_AX
            | Code::Mov_moffs32_EAX
            | Code::Mov_moffs64_RAX
    )
}

/// Gives the instruction a memory operand inside the data.
fn address(
    instruction: &mut Instruction,
    op: &Op,
    gpr: &mut [u64; 16],
    random: &mut Random,
) -> Option<()> {
    let bit_register = match op.special {
        Special::BitOffset(register) => Some(register),
        _ => None,
    };
    let pick = |random: &mut Random| {
        (0..8)
            .map(|_| random.below(16) as u8)
            .find(|n| Some(*n) != bit_register)
    };
    let base = pick(random)?;
    let index = pick(random).filter(|&n| n != base && n != 4 && random.below(2) == 0);
    let scale = 1 << random.below(4);
    // Around the middle, across its page boundary too.
    let mut target = DATA + 0x2000 - 512 + random.below(1024);
    if op.aligned {
        target &= !15;
    }
    let displacement = match random.below(3) {
        0 => 0,
        1 => random.below(256) as i64 - 128,
        _ => random.below(1 << 20) as i64 - (1 << 19),
    };
    if let Some(register) = bit_register {
        // The operand may lie up to half of the data away.
        let bits = random.below(1 << 15) as i64 - (1 << 14);
        gpr[usize::from(register)] = bits as u64;
        if op.size == 2 {
            gpr[usize::from(register)] |= random.next() << 16;
        } else if op.size == 4 {
            gpr[usize::from(register)] = bits as u32 as u64 | random.next() << 32;
        }
    }
    let mut left = target.wrapping_sub(displacement as u64);
    if let Some(index) = index {
        left = left.wrapping_sub(gpr[usize::from(index)].wrapping_mul(scale));
    }
    gpr[usize::from(base)] = left;
    instruction.set_segment_prefix(Register::None);
    instruction.set_memory_base(Register::RAX + u32::from(base));
    instruction.set_memory_index(index.map_or(Register::None, |n| Register::RAX + u32::from(n)));
    instruction.set_memory_index_scale(scale as u32);
    instruction.set_memory_displacement64(displacement as u64);
    instruction.set_memory_displ_size(if displacement == 0 { 0 } else { 8 });
    Some(())
}

fn random_fpu(random: &mut Random) -> FpuState {
    let unmasked = if random.below(2) == 0 {
        random.next() as u16 & 0x3f
    } else {
        0
    };
    let mut fpu = FpuState {
        fcw: 0x7f & !unmasked | (random.below(16) as u16) << 8,
        fsw: (random.below(8) as u16) << 11 | (random.next() as u16 & 0x4700),
        ftw: random.next() as u8,
        mxcsr: 0x1f80 & !(u32::from(unmasked) << 7) | random.next() as u32 & 0xe07f,
        ..FpuState::default()
    };
    for xmm in &mut fpu.xmm {
        *xmm = match random.below(4) {
            0 => u128::from((random.value() as f64).to_bits()),
            1 => {
                let part = u128::from((random.below(1000) as f32 / 7.0).to_bits());
                part | part << 32 | part << 64 | part << 96
            }
            _ => u128::from(random.next()) << 64 | u128::from(random.value()),
        };
    }
    for st in &mut fpu.st {
        let bytes = u128::from(random.next()) << 64 | u128::from(random.next());
        st.copy_from_slice(&bytes.to_le_bytes()[..10]);
        if random.below(2) == 0 {
            // A normal number of moderate size.
            st[7] |= 0x80;
            st[8] = random.next() as u8;
            st[9] = st[9] & 0x80 | (0x3f + random.below(2) as u8);
        }
    }
    fpu
}

/// Instructions with code of their own that user mode can execute natively without leaving the trampoline.
fn is_own_but_native(op: &Op) -> bool {
    use Mnemonic as M;
    let system = op.instruction.op0_register().is_segment_register()
        || op.instruction.op1_register().is_segment_register();
    let address_is_64_bit = !(0..op.instruction.op_count()).any(|n| {
        use OpKind as K;
        let kind = op.instruction.op_kind(n);
        matches!(
            kind,
            K::MemorySegESI | K::MemoryESEDI | K::MemorySegSI | K::MemoryESDI
        )
    });
    match op.kind {
        Kind::Lea | Kind::PushRegister | Kind::PopRegister => true,
        Kind::Own => {
            let stack = matches!(
                op.instruction.mnemonic(),
                M::Push | M::Pop | M::Enter | M::Leave
            );
            let flags = matches!(op.instruction.mnemonic(), M::Cld | M::Std);
            let port = matches!(
                op.instruction.mnemonic(),
                M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd
            );
            let string = op.instruction.is_string_instruction() && !port;
            let table = op.instruction.mnemonic() == M::Xlatb && op.address.mask == u64::MAX;
            (stack || flags || string || table) && !system && address_is_64_bit
        }
        _ => false,
    }
}

/// The same for an instruction with code of its own.
fn own_case(stubs: &mut Stubs, random: &mut Random) -> Option<Case> {
    let Decoded::Op(op) = decode(stubs, 64, &random_bytes(random), CODE) else {
        return None;
    };
    let relative = matches!(op.instruction.memory_base(), Register::RIP | Register::EIP);
    if !is_own_but_native(&op) || relative {
        return None;
    }
    let mut instruction = op.instruction;
    let mut gpr: [u64; 16] = std::array::from_fn(|_| random.value());
    // RSP, RBP, RSI, RDI and RBX point into the data.
    for n in [3usize, 4, 5, 6, 7] {
        gpr[n] = DATA + 0x2000 - 256 + random.below(512);
    }
    let string = instruction.is_string_instruction();
    if string {
        gpr[1] = random.below(30);
    }
    if instruction.mnemonic() == Mnemonic::Enter && instruction.immediate16() > 0x1000 {
        return None;
    }
    let memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
    if memory && !matches!(instruction.mnemonic(), Mnemonic::Xlatb | Mnemonic::Lea) {
        let stack = gpr[4];
        address(&mut instruction, &op, &mut gpr, random)?;
        if gpr[4] != stack {
            // RSP is the operand's base as well as the stack: only if that is in the data too.
            return None;
        }
    }
    instruction.set_segment_prefix(Register::None);
    let mut encoder = Encoder::new(64);
    encoder.encode(&instruction, CODE).ok()?;
    let bytes = encoder.take_buffer();
    let Decoded::Op(op) = decode(stubs, 64, &bytes, CODE) else {
        return None;
    };
    is_own_but_native(&op).then_some(Case {
        bytes,
        op: *op,
        gpr,
    })
}

struct Rig {
    host: Host,
    memory: GuestMemory,
    start: CpuState,
    stepper: Stepper,
    seen: BTreeMap<String, u32>,
    faults: u32,
    raised: u32,
}

impl Rig {
    fn run(&mut self, case: &Case, random: &mut Random) {
        let mut cpu = self.start.clone();
        cpu.regs.gpr = case.gpr;
        cpu.regs.rip = CODE;
        cpu.regs.rflags = rflags::FIXED | random.next() & (rflags::STATUS | rflags::DF);
        cpu.fpu = random_fpu(random);
        let before = cpu.clone();
        let mut data: Vec<u8> = (0..DATA_LEN / 8)
            .flat_map(|_| random.value().to_le_bytes())
            .collect();
        let mut native = Native::new(&cpu);
        for (n, frame) in FRAMES.iter().enumerate() {
            let page = &data[n * 4096..(n + 1) * 4096];
            self.memory
                .write(GuestPhysAddr::new(*frame), page)
                .expect("in RAM");
        }
        self.memory
            .write(GuestPhysAddr::new(CODE), &case.bytes)
            .expect("in RAM");
        self.stepper
            .memory_written(GuestPhysAddr::new(CODE), case.bytes.len());
        let mut pending = Pending::new();
        self.stepper.forget_intercept();
        let mut step = self.stepper.step(&mut cpu, &mut pending);
        while matches!(step, Ok(Step::Within)) {
            step = self.stepper.step(&mut cpu, &mut pending);
        }
        let context = || format!("{:?} {:02x?}", case.op.instruction, case.bytes);
        let step = step.unwrap_or_else(|error| panic!("{error}: {}", context()));
        let exception = Exception::plain(Vector::DE);
        if step == Step::Exit(Exit::ExceptionOrNmi(exception)) {
            assert_ne!(case.op.special, Special::None, "#DE: {}", context());
            self.faults += 1;
            return;
        }
        let raised = self.host.run(&case.bytes, &mut native, &mut data);
        self.raised += u32::from(raised);
        let expected = if raised {
            Step::Exit(Exit::ExceptionOrNmi(Exception::plain(Vector::XM)))
        } else {
            Step::Retired
        };
        assert_eq!(step, expected, "{}\nbefore: {before:x?}", context());
        let mut after = FpuState::default();
        after.set_fxsave(&native.fx);
        (after.fop, after.fip, after.fdp) = (0, 0, 0);
        if raised && after.mxcsr & !after.mxcsr >> 7 & (OVERFLOW | UNDERFLOW) != 0 {
            // The deviations that `plain` documents.
            after.mxcsr |= cpu.fpu.mxcsr & INEXACT;
        }
        if raised
            && matches!(
                case.op.instruction.mnemonic(),
                Mnemonic::Dpps | Mnemonic::Dppd
            )
        {
            after.mxcsr |= cpu.fpu.mxcsr & (INEXACT | OVERFLOW | UNDERFLOW);
        }
        let say = || format!("{}\nbefore: {before:x?}", context());
        assert_eq!(cpu.regs.gpr, native.gpr, "registers: {}", say());
        let flags = rflags::STATUS | rflags::DF;
        assert_eq!(
            cpu.regs.rflags & flags,
            native.rflags & flags,
            "flags: {}",
            say()
        );
        assert_eq!(cpu.fpu, after, "x87 and SSE: {}", say());
        let len = if raised { 0 } else { case.bytes.len() as u64 };
        assert_eq!(cpu.regs.rip, CODE + len);
        let mut guest = vec![0; DATA_LEN];
        for (n, frame) in FRAMES.iter().enumerate() {
            let page = &mut guest[n * 4096..(n + 1) * 4096];
            self.memory
                .read(GuestPhysAddr::new(*frame), page)
                .expect("in RAM");
        }
        let differs = guest.iter().zip(&data).position(|(a, b)| a != b);
        assert_eq!(differs, None, "memory: {}", say());
        *self
            .seen
            .entry(format!("{:?}", case.op.instruction.mnemonic()))
            .or_default() += 1;
    }
}

fn rig() -> Rig {
    let (memory, start) = guest();
    let mut stepper = Stepper::new(memory.clone(), CpuModel::V2).expect("a stepper");
    let exception_bitmap = u32::MAX;
    stepper.set_controls(&ExitControls {
        exception_bitmap,
        ..ExitControls::default()
    });
    let host = Host::new();
    catch_sigfpe();
    Rig {
        host,
        memory,
        start,
        stepper,
        seen: BTreeMap::new(),
        faults: 0,
        raised: 0,
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|value| value.parse().ok())
        .unwrap_or(default)
}

/// One test for both kinds: they share the address of the data.
#[test]
fn instructions_do_what_the_host_does() {
    let mut rig = rig();
    let mut stubs = Stubs::new().expect("stub memory");
    let mut random = Random(setting("SEED", 0x9e37_79b9_7f4a_7c15));
    let cases = setting("CASES", 40_000);
    let mut done = 0;
    while done < cases {
        let own = done % 10 == 0;
        let make = if own { own_case } else { plain_case };
        let Some(case) = make(&mut stubs, &mut random) else {
            continue;
        };
        rig.run(&case, &mut random);
        done += 1;
    }
    eprintln!(
        "{} mnemonics, {} #DE, {} #XM",
        rig.seen.len(),
        rig.faults,
        rig.raised
    );
    assert!(
        rig.seen.len() > 350,
        "too few kinds of instructions: {:?}",
        rig.seen.keys()
    );
    assert!(rig.faults > 10, "some divisions must fail");
    assert!(rig.raised > 100, "some exceptions must be raised");
    for name in [
        "Idiv", "Cmpsb", "Scasq", "Enter", "Leave", "Pop", "Xlatb", "Lea",
    ] {
        assert!(rig.seen.contains_key(name), "{name} was not tried");
    }
}
