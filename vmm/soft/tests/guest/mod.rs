//! Tiny guests for tests: a CPU in some mode, a megabyte of memory, a few instructions.
#![allow(dead_code, unreachable_pub)] // Every test file uses a part of it.

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use machine::GuestMemory;
use machine::engine::{Answer, EngineError};
use soft::{Pending, Step, Stepper};
use x86::regs::{Cr0, Cr4, Efer, rflags};
use x86::segment::SegmentAttributes;
use x86::{
    CpuModel, CpuState, DescriptorTable, Exit, Gpr, GuestPhysAddr, Segment, SegmentRegister, Vector,
};

pub const RAM: u64 = 4 << 20;
pub const CODE: u64 = 0x1_0000;
pub const DATA: u64 = 0x2_0000;
pub const STACK: u64 = 0x3_0000;
pub const GDT: u64 = 0x4000;
pub const IDT: u64 = 0x5000;
pub const TSS: u64 = 0x6000;
pub const KERNEL_STACK: u64 = 0x4_0000;
pub const IST_STACK: u64 = 0x4_8000;
/// Handlers are HLTs, sixteen bytes apart, indexed by vector.
pub const HANDLERS: u64 = 0x5_0000;
pub const PML4: u64 = 0x8000;
/// Maps the first 2 MiB in 4 KiB pages.
pub const PAGE_TABLE: u64 = 0xb000;

pub const KERNEL_CODE: u16 = 0x08;
pub const KERNEL_DATA: u16 = 0x10;
pub const USER_CODE32: u16 = 0x1b;
pub const USER_DATA: u16 = 0x23;
pub const USER_CODE64: u16 = 0x2b;
pub const TSS_SELECTOR: u16 = 0x30;
/// Free for tests; two slots.
pub const SPARE: u16 = 0x40;

pub struct Guest {
    pub memory: GuestMemory,
    pub cpu: CpuState,
    pub pending: Pending,
    pub stepper: Stepper,
}

type Program = fn(&mut CodeAssembler) -> Result<(), IcedError>;

pub fn assemble(bits: u32, at: u64, program: Program) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(bits).expect("assembler");
    program(&mut assembler).expect("assembles");
    assembler.assemble(at).expect("encodes")
}

impl Guest {
    fn new(cpu: CpuState) -> Self {
        let memory = GuestMemory::new(RAM).expect("memory");
        let stepper = Stepper::new(memory.clone(), CpuModel::V2).expect("a stepper");
        Self {
            memory,
            cpu,
            pending: Pending::new(),
            stepper,
        }
    }

    /// 64-bit mode at CPL 0: the first 2 MiB are mapped in 4 KiB pages for user and supervisor, device memory at 1 GiB.
    pub fn long() -> Self {
        let mut guest = Self::new(CpuState::default());
        guest.tables();
        let present = 7;
        guest.put(PML4, &(0x9000u64 | present).to_le_bytes());
        guest.put(0x9000, &(0xa000u64 | present).to_le_bytes());
        guest.put(0xa000, &(PAGE_TABLE | present).to_le_bytes());
        for page in 0..512u64 {
            guest.put(PAGE_TABLE + 8 * page, &(page << 12 | present).to_le_bytes());
        }
        // 1 GiB: device memory.
        guest.put(0x9008, &(0xc000u64 | present).to_le_bytes());
        guest.put(0xc000, &(0xf000_0000u64 | 0x80 | present).to_le_bytes());
        for vector in 0..64 {
            guest.gate_long(vector, HANDLERS + 16 * u64::from(vector), 0x8e, 0);
        }
        let cpu = &mut guest.cpu;
        cpu.cr0 = Cr0::PE | Cr0::PG | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::MP;
        cpu.cr3 = PML4;
        cpu.cr4 = Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT;
        cpu.efer = Efer::LME | Efer::LMA | Efer::NXE | Efer::SCE;
        guest.flat(0xa09b);
        guest.load_tss();
        guest
    }

    /// 32-bit protected mode at CPL 0, flat, without paging.
    pub fn protected() -> Self {
        let mut guest = Self::new(CpuState::default());
        guest.tables();
        guest.descriptor(KERNEL_CODE, 0x00cf_9b00_0000_ffff);
        for vector in 0..64 {
            guest.gate(vector, HANDLERS + 16 * u64::from(vector), 0x8e);
        }
        guest.cpu.cr0 = Cr0::PE | Cr0::ET | Cr0::NE;
        guest.cpu.cr4 = Cr4::OSFXSR | Cr4::OSXMMEXCPT;
        guest.flat(0xc09b);
        guest.load_tss();
        // SS0:ESP0 of the 32-bit TSS.
        guest.put(TSS + 4, &(KERNEL_STACK as u32).to_le_bytes());
        guest.put(TSS + 8, &u32::from(KERNEL_DATA).to_le_bytes());
        guest
    }

    /// Real mode at 0000:`CODE` as far as that goes: CS base is CODE.
    pub fn real() -> Self {
        let mut guest = Self::new(CpuState::default());
        for vector in 0..64u64 {
            let entry = ((HANDLERS >> 4) << 16) | (16 * vector);
            guest.put(4 * vector, &(entry as u32).to_le_bytes());
        }
        guest.halts();
        *guest.cpu.segment_mut(SegmentRegister::Cs) = Segment::real_mode((CODE >> 4) as u16, true);
        *guest.cpu.segment_mut(SegmentRegister::Ds) = Segment::real_mode((DATA >> 4) as u16, false);
        *guest.cpu.segment_mut(SegmentRegister::Es) = Segment::real_mode((DATA >> 4) as u16, false);
        *guest.cpu.segment_mut(SegmentRegister::Ss) =
            Segment::real_mode((STACK >> 4) as u16, false);
        guest.cpu.regs.rip = 0;
        guest.cpu.regs[Gpr::Rsp] = 0x1000;
        guest.cpu.idtr = DescriptorTable {
            base: 0,
            limit: 0x3ff,
        };
        guest
    }

    fn halts(&mut self) {
        for vector in 0..64 {
            self.put(HANDLERS + 16 * vector, &[0xf4]);
        }
    }

    fn tables(&mut self) {
        self.halts();
        self.descriptor(KERNEL_CODE, 0x00af_9b00_0000_ffff);
        self.descriptor(KERNEL_DATA, 0x00cf_9300_0000_ffff);
        self.descriptor(USER_CODE32, 0x00cf_fb00_0000_ffff);
        self.descriptor(USER_DATA, 0x00cf_f300_0000_ffff);
        self.descriptor(USER_CODE64, 0x00af_fb00_0000_ffff);
        self.descriptor(TSS_SELECTOR, 0x0000_8b00_0000_0000 | TSS << 16 | 0x67);
        self.cpu.gdtr = DescriptorTable {
            base: GDT,
            limit: 0x6f,
        };
        self.cpu.idtr = DescriptorTable {
            base: IDT,
            limit: 0x3ff,
        };
    }

    fn load_tss(&mut self) {
        self.cpu.tr = Segment {
            selector: TSS_SELECTOR,
            base: TSS,
            limit: 0x67,
            attributes: SegmentAttributes::from_bits(0x8b),
        };
        self.put(TSS + 4, &KERNEL_STACK.to_le_bytes());
        self.put(TSS + 0x24, &IST_STACK.to_le_bytes());
        // No I/O map.
        self.put(TSS + 0x66, &0x68u16.to_le_bytes());
    }

    fn flat(&mut self, code: u32) {
        for which in SegmentRegister::ALL {
            *self.cpu.segment_mut(which) = Segment::flat(KERNEL_DATA, 0xc093);
        }
        *self.cpu.segment_mut(SegmentRegister::Cs) = Segment::flat(KERNEL_CODE, code);
        self.cpu.ldtr.attributes = SegmentAttributes::UNUSABLE;
        self.cpu.regs.rip = CODE;
        self.cpu.regs[Gpr::Rsp] = STACK;
        self.cpu.regs.rflags = rflags::FIXED;
    }

    /// Goes to CPL 3, 64-bit.
    pub fn user(mut self) -> Self {
        *self.cpu.segment_mut(SegmentRegister::Cs) = Segment::flat(USER_CODE64, 0xa0fb);
        for which in SegmentRegister::ALL {
            if which != SegmentRegister::Cs {
                *self.cpu.segment_mut(which) = Segment::flat(USER_DATA, 0xc0f3);
            }
        }
        self
    }

    /// Goes to CPL 3, 32-bit.
    pub fn user32(mut self) -> Self {
        self = self.user();
        *self.cpu.segment_mut(SegmentRegister::Cs) = Segment::flat(USER_CODE32, 0xc0fb);
        self
    }

    pub fn descriptor(&mut self, selector: u16, value: u64) {
        self.put(GDT + u64::from(selector & !7), &value.to_le_bytes());
    }

    pub fn gate(&mut self, vector: u8, offset: u64, kind: u64) {
        let low = offset & 0xffff | u64::from(KERNEL_CODE) << 16 | kind << 40;
        self.put(
            IDT + 8 * u64::from(vector),
            &(low | (offset >> 16 & 0xffff) << 48).to_le_bytes(),
        );
    }

    pub fn gate_long(&mut self, vector: u8, offset: u64, kind: u64, ist: u64) {
        let at = IDT + 16 * u64::from(vector);
        let low = offset & 0xffff
            | u64::from(KERNEL_CODE) << 16
            | ist << 32
            | kind << 40
            | (offset >> 16 & 0xffff) << 48;
        self.put(at, &low.to_le_bytes());
        self.put(at + 8, &(offset >> 32).to_le_bytes());
    }

    /// Changes the page-table entry of a page in the first 2 MiB, as if the guest had.
    pub fn map(&mut self, linear: u64, entry: u64) {
        self.put(PAGE_TABLE + 8 * (linear >> 12), &entry.to_le_bytes());
    }

    pub fn entry(&self, linear: u64) -> u64 {
        self.get(PAGE_TABLE + 8 * (linear >> 12))
    }

    /// Writes physical memory.
    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.memory
            .write(GuestPhysAddr::new(at), bytes)
            .expect("in RAM");
        self.stepper
            .memory_written(GuestPhysAddr::new(at), bytes.len());
    }

    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read(GuestPhysAddr::new(at), &mut bytes)
            .expect("in RAM");
        bytes
    }

    pub fn get(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.bytes(at, 8).try_into().expect("eight"))
    }

    pub fn get32(&self, at: u64) -> u32 {
        self.get(at) as u32
    }

    pub fn get16(&self, at: u64) -> u16 {
        self.get(at) as u16
    }

    /// Puts code where the CPU stands.
    pub fn code(&mut self, bits: u32, program: Program) -> &mut Self {
        let at = self.cpu.rip_linear().get();
        let bytes = assemble(bits, self.cpu.regs.rip, program);
        self.put(at, &bytes);
        self
    }

    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        let at = self.cpu.rip_linear().get();
        self.put(at, bytes);
        self
    }

    pub fn try_step(&mut self) -> Result<Step, EngineError> {
        self.stepper.step(&mut self.cpu, &mut self.pending)
    }

    pub fn step(&mut self) -> Step {
        self.try_step().expect("the engine can do this")
    }

    /// Steps that must retire.
    #[track_caller]
    pub fn retire(&mut self, count: usize) -> &mut Self {
        for n in 0..count {
            let rip = self.cpu.regs.rip;
            assert_eq!(self.step(), Step::Retired, "step {n} at {rip:#x}");
        }
        self
    }

    /// A step that must deliver this vector.
    #[track_caller]
    pub fn faults(&mut self, vector: Vector) -> &mut Self {
        let rip = self.cpu.regs.rip;
        assert_eq!(self.step(), Step::Delivered(vector), "at {rip:#x}");
        self
    }

    /// A step that must exit, and the answer to it.
    #[track_caller]
    pub fn exits(&mut self, exit: &Exit, answer: Answer) -> &mut Self {
        assert_eq!(self.step(), Step::Exit(exit.clone()));
        self.pending.answer(answer);
        self
    }

    pub fn gpr(&self, gpr: Gpr) -> u64 {
        self.cpu.regs[gpr]
    }

    pub fn set(&mut self, gpr: Gpr, value: u64) -> &mut Self {
        self.cpu.regs[gpr] = value;
        self
    }

    pub fn flags(&self, mask: u64) -> u64 {
        self.cpu.regs.rflags & mask
    }

    pub fn set_flags(&mut self, mask: u64) -> &mut Self {
        self.cpu.regs.rflags |= mask;
        self
    }

    /// The quadwords on top of the stack.
    pub fn stack(&self, n: u64) -> u64 {
        self.get(self.gpr(Gpr::Rsp) + 8 * n)
    }

    /// The doublewords on top of the stack.
    pub fn stack32(&self, n: u64) -> u32 {
        self.get32(self.gpr(Gpr::Rsp) + 4 * n)
    }

    pub fn selector(&self, which: SegmentRegister) -> u16 {
        self.cpu.segment(which).selector
    }
}
