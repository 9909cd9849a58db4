//! Guests of a few instructions for the engine's tests: 64-bit code on one-to-one page tables.

#![allow(dead_code)] // Each test file uses its own part.

use kvm::KvmEngine;
use machine::GuestMemory;
use machine::engine::{Answer, Engine, Entry, Until};
use x86::regs::{Cr0, Cr4, Efer, rflags};
use x86::segment::SegmentAttributes;
use x86::{
    CpuModel, CpuState, DescriptorTable, Exit, Gpr, GuestPhysAddr, Segment, SegmentRegister, VcpuId,
};

pub(crate) const CPU: VcpuId = VcpuId::BOOT;
pub(crate) const RAM: u64 = 4 << 20;
pub(crate) const PML4: u64 = 0x1000;
pub(crate) const PT: u64 = 0x4000;
pub(crate) const GDT: u64 = 0x5000;
pub(crate) const TSS: u64 = 0x5800;
pub(crate) const IDT: u64 = 0x6000;
/// One HLT and one NOP per vector.
pub(crate) const STUBS: u64 = 0x7000;
pub(crate) const CODE: u64 = 0x8000;
pub(crate) const USER_CODE: u64 = 0x9000;
pub(crate) const SYSCALL_ENTRY: u64 = 0xa000;
pub(crate) const STACK: u64 = 0xc000;
pub(crate) const USER_STACK: u64 = 0xd000;
pub(crate) const DATA: u64 = 0xe000;
/// Mapped, and no RAM.
pub(crate) const DEVICE: u64 = 0x1f_f000;
/// Where [`DEVICE`] leads to.
pub(crate) const DEVICE_ADDR: u64 = 0xfee0_0000;

pub(crate) const KERNEL_CS: u16 = 0x10;
pub(crate) const KERNEL_DS: u16 = 0x18;
pub(crate) const USER_CS: u16 = 0x33;
pub(crate) const USER_DS: u16 = 0x2b;
const TSS_SELECTOR: u16 = 0x40;

/// Linux's layout: 10h and 18h for ring 0, 23h (32-bit), 2Bh and 33h for ring 3.
const DESCRIPTORS: [u64; 10] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0,
    0x0000_8b00_0000_0067 | TSS << 16,
    0,
];

/// Says that a test cannot run here. Fails it where the environment variable `CHRONOVISOR_REQUIRE` lists `kvm`.
pub(crate) fn skipped(error: &kvm::OpenError) {
    eprintln!("skipped: {error}");
    let required = std::env::var("CHRONOVISOR_REQUIRE").unwrap_or_default();
    assert!(
        !required.split(',').any(|what| what == "kvm"),
        "KVM is required: {error}"
    );
}

/// An engine, or `None` after saying why there is none.
pub(crate) fn engine(memory: &GuestMemory) -> Option<KvmEngine> {
    match KvmEngine::new(memory.clone(), CpuModel::default()) {
        Ok(engine) => Some(engine),
        Err(error) => {
            skipped(&error);
            None
        }
    }
}

pub(crate) fn put(memory: &GuestMemory, addr: u64, bytes: &[u8]) {
    memory
        .write(GuestPhysAddr::new(addr), bytes)
        .expect("in RAM");
}

pub(crate) fn get_u64(memory: &GuestMemory, addr: u64) -> u64 {
    let mut bytes = [0; 8];
    memory
        .read(GuestPhysAddr::new(addr), &mut bytes)
        .expect("in RAM");
    u64::from_le_bytes(bytes)
}

/// Memory with page tables, descriptor tables, a TSS and a HLT for every vector.
pub(crate) fn memory() -> GuestMemory {
    let memory = GuestMemory::new(RAM).expect("memory");
    let put_u64 = |addr: u64, value: u64| put(&memory, addr, &value.to_le_bytes());
    for (table, next) in [(PML4, 0x2000), (0x2000, 0x3000), (0x3000, PT)] {
        put_u64(table, next | 0x27);
    }
    for page in 0..512 {
        put_u64(PT + 8 * page, page << 12 | 0x67);
    }
    put_u64(PT + 8 * (DEVICE >> 12), DEVICE_ADDR | 0x67);
    for (i, descriptor) in DESCRIPTORS.into_iter().enumerate() {
        put_u64(GDT + 8 * i as u64, descriptor);
    }
    put_u64(TSS + 4, STACK);
    put_u64(TSS + 0x66, 0x68);
    for vector in 0..256 {
        let stub = STUBS + 2 * vector;
        put_u64(
            IDT + 16 * vector,
            stub & 0xffff | u64::from(KERNEL_CS) << 16 | 0xee00 << 32,
        );
        put(&memory, stub, &[0xf4, 0x90]);
    }
    put(&memory, SYSCALL_ENTRY, &[0xf4]);
    memory
}

/// 64-bit ring 0 at [`CODE`], interrupts off.
pub(crate) fn kernel() -> CpuState {
    let mut cpu = CpuState {
        cr0: Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::PG,
        cr3: PML4,
        cr4: Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT,
        efer: Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE,
        ..CpuState::default()
    };
    cpu.regs.rip = CODE;
    cpu.regs[Gpr::Rsp] = STACK - 256;
    cpu.segments = [Segment::flat(KERNEL_DS, 0xc093); 6];
    *cpu.segment_mut(SegmentRegister::Cs) = Segment::flat(KERNEL_CS, 0xa09b);
    cpu.gdtr = DescriptorTable {
        base: GDT,
        limit: 79,
    };
    cpu.idtr = DescriptorTable {
        base: IDT,
        limit: 4095,
    };
    cpu.tr = Segment {
        selector: TSS_SELECTOR,
        base: TSS,
        limit: 0x67,
        attributes: SegmentAttributes::from_bits(0x8b),
    };
    cpu.ldtr = Segment {
        attributes: SegmentAttributes::UNUSABLE,
        ..Segment::default()
    };
    cpu.msrs.star = u64::from(USER_CS - 16) << 48 | u64::from(KERNEL_CS) << 32;
    cpu.msrs.lstar = SYSCALL_ENTRY;
    cpu
}

/// 64-bit ring 3 at [`USER_CODE`], interrupts on.
pub(crate) fn user() -> CpuState {
    let mut cpu = kernel();
    cpu.regs.rip = USER_CODE;
    cpu.regs[Gpr::Rsp] = USER_STACK;
    cpu.regs.rflags |= rflags::IF;
    cpu.segments = [Segment::flat(USER_DS, 0xc0f3); 6];
    *cpu.segment_mut(SegmentRegister::Cs) = Segment::flat(USER_CS, 0xa0fb);
    cpu
}

/// Machine code from iced's assembler, placed at `at`.
pub(crate) fn assemble(
    at: u64,
    write: impl FnOnce(&mut iced_x86::code_asm::CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> Vec<u8> {
    let mut code = iced_x86::code_asm::CodeAssembler::new(64).expect("64-bit");
    write(&mut code).expect("instructions");
    code.assemble(at).expect("encodable")
}

pub(crate) fn run(engine: &mut dyn Engine, answer: Answer) -> Exit {
    let entry = Entry {
        answer,
        ..Entry::default()
    };
    engine.run(CPU, entry, Until::Exit).expect("run")
}

pub(crate) fn complete(engine: &mut dyn Engine, answer: Answer) -> Exit {
    let entry = Entry {
        answer,
        ..Entry::default()
    };
    engine.run(CPU, entry, Until::Completed).expect("complete")
}
