//! Guests of a few instructions that find out what a KVM does.
//!
//! Purpose: measure each field of [`Quirks`] by running the instruction in question and comparing with the SDM.
//! Invariants: a probe guest ends by HLT at a known address, or by an exit that is itself the finding; none of them
//! loops. Every IDT vector leads to a HLT of its own, so RIP tells what happened.
//! Elsewhere: what is done about a finding ([`crate::hybrid`]).
//! Source: Intel SDM vol. 2 for what each instruction ought to do.

use crate::quirks::{ProbeError, Quirks};
use crate::slots::Slots;
use crate::vcpu::{KvmExit, Vcpu};
use crate::vm;
use kvm_ioctls::{Kvm, VmFd};
use machine::engine::EngineError;
use machine::{GuestMemory, PageSet};
use x86::regs::{Cr0, Cr4, Efer, rflags};
use x86::segment::SegmentAttributes;
use x86::{
    CpuModel, CpuState, DescriptorTable, FpuState, Gpr, GuestPhysAddr, Segment, SegmentRegister,
};

const RAM: u64 = 1 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const PT: u64 = 0x4000;
const GDT: u64 = 0x5000;
const TSS: u64 = 0x5800;
const IDT: u64 = 0x6000;
/// One HLT and one NOP per vector.
const STUBS: u64 = 0x7000;
const CODE0: u64 = 0x8000;
const CODE3: u64 = 0x9000;
const SYSCALL_ENTRY: u64 = 0xa000;
const STACK0: u64 = 0xc000;
const STACK3: u64 = 0xd000;
const DATA: u64 = 0xe000;
const PD32: u64 = 0xf000;

const KERNEL_CS: u16 = 0x08;
const KERNEL_DS: u16 = 0x10;
const USER_DS: u16 = 0x23;
const USER_CS: u16 = 0x2b;
const TSS_SELECTOR: u16 = 0x30;
/// Null, ring-0 code and data, ring-3 32-bit code, data, 64-bit code, TSS.
const DESCRIPTORS: [u64; 8] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0x0000_8b00_0000_0067 | TSS << 16,
    0,
];

/// `ud2`: ends a ring-3 guest through vector 6.
const UD2: [u8; 2] = [0x0f, 0x0b];
const UD: u64 = 6;
const NM: u64 = 7;
const GP: u64 = 13;

/// A machine to probe with.
pub(crate) struct Probe {
    vm: VmFd,
    vcpu: Vcpu,
    memory: GuestMemory,
    slots: Slots,
}

impl Probe {
    pub(crate) fn new(kvm: &Kvm) -> Result<Self, ProbeError> {
        let memory = GuestMemory::new(RAM)?;
        let (vm, vcpu) = vm::create(kvm, CpuModel::default(), false)?;
        let slots = Slots::new(&vm, &memory, PageSet::new(), kvm.get_nr_memslots())?;
        Ok(Self {
            vm,
            vcpu,
            memory,
            slots,
        })
    }

    /// Finds every quirk.
    pub(crate) fn measure(mut self) -> Result<Quirks, ProbeError> {
        Ok(Quirks {
            kernel_emulated: self.kernel_emulated()?,
            syscall_broken: self.syscall_broken()?,
            int_n_broken: self.int_n_broken()?,
            ring3_selectors: self.ring3_selectors()?,
            cpuid_forced: self.cpuid_forced()?,
            tsd_ignored: self.tsd_ignored()?,
            fpu_traps_ignored: self.fpu_traps_ignored()?,
            fxsave_differs: self.fxsave_differs()?,
            iret_keeps_selectors: self.iret_keeps_selectors()?,
            windows_unreliable: self.windows_unreliable()?,
            legacy_paging_broken: self.legacy_paging_broken()?,
            shadows_stale: self.shadows_stale()?,
            ring3_breakpoints_broken: self.ring3_breakpoints_broken()?,
        })
    }

    /// POPCNT is in every processor and in no emulator.
    fn kernel_emulated(&mut self) -> Result<bool, EngineError> {
        let (exit, _) = self.ring0(&[0xf3, 0x0f, 0xb8, 0xc3, 0xf4])?; // popcnt eax, ebx; hlt
        Ok(exit == KvmExit::Unemulated)
    }

    fn syscall_broken(&mut self) -> Result<bool, EngineError> {
        let (exit, cpu) = self.ring3(&[0x0f, 0x05])?; // syscall
        Ok(exit != KvmExit::Hlt || cpu.regs.rip != SYSCALL_ENTRY + 1 || cpu.cpl() != 0)
    }

    fn int_n_broken(&mut self) -> Result<bool, EngineError> {
        let (exit, cpu) = self.ring3(&[0xcd, 0x80])?; // int 80h
        Ok(exit != KvmExit::Hlt || cpu.regs.rip != after_stub(0x80))
    }

    fn ring3_selectors(&mut self) -> Result<Option<(u16, u16)>, EngineError> {
        let (_, cpu) = self.ring3(&[0x8c, 0xc8, 0x8c, 0xd3, UD2[0], UD2[1]])?; // mov eax, cs; mov ebx, ss
        let seen = (cpu.regs[Gpr::Rax] as u16, cpu.regs[Gpr::Rbx] as u16);
        Ok((seen != (USER_CS, USER_DS)).then_some(seen))
    }

    fn cpuid_forced(&mut self) -> Result<bool, EngineError> {
        let model = CpuModel::default().cpuid(1, 0);
        let code = [0xb8, 1, 0, 0, 0, 0x31, 0xc9, 0x0f, 0xa2]; // mov eax, 1; xor ecx, ecx; cpuid
        let differs = |cpu: &CpuState| {
            (cpu.regs[Gpr::Rcx] as u32, cpu.regs[Gpr::Rdx] as u32) != (model.ecx, model.edx)
        };
        let (_, ring0) = self.ring0(&[&code[..], &[0xf4]].concat())?;
        let (_, ring3) = self.ring3(&[&code[..], &UD2].concat())?;
        Ok(differs(&ring0) || differs(&ring3))
    }

    fn tsd_ignored(&mut self) -> Result<bool, EngineError> {
        let mut cpu = self.user_state(&[0x0f, 0x31, UD2[0], UD2[1]])?; // rdtsc
        cpu.cr4 |= Cr4::TSD;
        let (_, cpu) = self.run(cpu)?;
        Ok(cpu.regs.rip != after_stub(GP))
    }

    fn fpu_traps_ignored(&mut self) -> Result<bool, EngineError> {
        let mut cpu = self.user_state(&[0x0f, 0x28, 0xc1, UD2[0], UD2[1]])?; // movaps xmm0, xmm1
        cpu.cr0 |= Cr0::TS;
        let (_, cpu) = self.run(cpu)?;
        Ok(cpu.regs.rip != after_stub(NM))
    }

    fn fxsave_differs(&mut self) -> Result<bool, EngineError> {
        let code = [
            &[0xdb, 0xe3, 0xd9, 0xe8, 0x0f, 0xae, 0x04, 0x25][..],
            &(DATA as u32).to_le_bytes(),
            &UD2,
        ];
        self.ring3(&code.concat())?; // fninit; fld1; fxsave [DATA]
        let (mut image, mut fpu) = ([0; 512], FpuState::default());
        self.memory
            .read(GuestPhysAddr::new(DATA), &mut image)
            .map_err(probe_error)?;
        fpu.set_fxsave(&image);
        let portable = FpuState {
            fop: 0,
            fip: 0,
            fdp: 0,
            ..fpu.clone()
        };
        let mask = portable.to_fxsave();
        Ok(fpu != portable || image[28..32] != mask[28..32])
    }

    fn iret_keeps_selectors(&mut self) -> Result<bool, EngineError> {
        let mut cpu = self.kernel_state(&[0x48, 0xcf])?; // iretq
        let frame = [
            CODE3,
            u64::from(USER_CS),
            rflags::FIXED,
            STACK3,
            u64::from(USER_DS),
        ];
        self.put(CODE3, &UD2)?;
        cpu.regs[Gpr::Rsp] = STACK0 - 64;
        for (i, value) in frame.into_iter().enumerate() {
            self.put_u64(STACK0 - 64 + 8 * i as u64, value)?;
        }
        let (_, cpu) = self.run(cpu)?;
        let loaded = cpu.segment(SegmentRegister::Ds).selector & !3 != 0;
        Ok(cpu.regs.rip != after_stub(UD) || loaded)
    }

    /// OUT, then STI: the window opens after the instruction behind STI.
    fn windows_unreliable(&mut self) -> Result<bool, EngineError> {
        let (exit, _) = self.ring0(&[0xe6, 0x80, 0xfb, 0x90, 0x90, 0xf4])?; // out 80h, al; sti; nop; nop; hlt
        if !matches!(exit, KvmExit::Io { .. }) {
            return Ok(true);
        }
        let exit = self.vcpu.enter(true)?;
        let mut cpu = CpuState::default();
        self.vcpu.core(&mut cpu);
        Ok(exit != KvmExit::InterruptWindow || cpu.regs.rip != CODE0 + 4)
    }

    fn legacy_paging_broken(&mut self) -> Result<bool, EngineError> {
        let mut cpu = self.kernel_state(&[0xf4])?; // hlt
        self.put_u64(PD32, 0x83)?; // one present, writable 4 MiB page
        cpu.cr3 = PD32;
        cpu.cr4 = Cr4::PSE;
        cpu.efer = Efer::empty();
        *cpu.segment_mut(SegmentRegister::Cs) = Segment::flat(KERNEL_CS, 0xc09b);
        let (exit, _) = self.run(cpu)?;
        Ok(exit != KvmExit::Hlt)
    }

    /// Reads a page in ring 3, maps another one there by writing the entry ourselves, flushes, and reads again.
    fn shadows_stale(&mut self) -> Result<bool, EngineError> {
        let code = [
            &[0x48, 0x8b, 0x1c, 0x25][..],
            &(DATA as u32).to_le_bytes(),
            &UD2,
        ]
        .concat(); // mov rbx, [DATA]
        let cpu = self.user_state(&code)?;
        self.put_u64(DATA, 0x1111)?;
        self.put_u64(STACK3, 0x2222)?;
        self.run(cpu.clone())?;
        self.put_u64(PT + 8 * (DATA >> 12), STACK3 | 0x67)?;
        let mut flush = cpu.clone();
        flush.cr4 ^= Cr4::PGE;
        self.vcpu.put_core(&flush, &flush.idtr);
        self.vcpu.finish()?;
        let (_, cpu) = self.run(cpu)?;
        let stale = cpu.regs[Gpr::Rbx] != 0x2222;
        self.put_u64(PT + 8 * (DATA >> 12), DATA | 0x67)?;
        self.slots.drop_shadows(&self.vm)?;
        Ok(stale)
    }

    fn ring3_breakpoints_broken(&mut self) -> Result<bool, EngineError> {
        let cpu = self.user_state(&[0x90, UD2[0], UD2[1]])?; // nop
        self.vcpu.set_breakpoints(&[CODE3 + 1])?;
        let (exit, _) = self.run(cpu)?;
        self.vcpu.set_breakpoints(&[])?;
        Ok(!matches!(exit, KvmExit::Debug { .. }))
    }

    fn ring0(&mut self, code: &[u8]) -> Result<(KvmExit, CpuState), EngineError> {
        let cpu = self.kernel_state(code)?;
        self.run(cpu)
    }

    fn ring3(&mut self, code: &[u8]) -> Result<(KvmExit, CpuState), EngineError> {
        let cpu = self.user_state(code)?;
        self.run(cpu)
    }

    /// Runs from `cpu` to the first exit.
    fn run(&mut self, cpu: CpuState) -> Result<(KvmExit, CpuState), EngineError> {
        self.vcpu.finish()?;
        self.vcpu.put_core(&cpu, &cpu.idtr);
        self.vcpu.put_extra(&cpu)?;
        let exit = self.vcpu.enter(false)?;
        let mut cpu = cpu;
        self.vcpu.core(&mut cpu);
        Ok((exit, cpu))
    }

    fn kernel_state(&mut self, code: &[u8]) -> Result<CpuState, EngineError> {
        self.lay_out()?;
        self.put(CODE0, code)?;
        Ok(long_mode())
    }

    fn user_state(&mut self, code: &[u8]) -> Result<CpuState, EngineError> {
        self.lay_out()?;
        self.put(CODE3, code)?;
        let mut cpu = long_mode();
        cpu.regs.rip = CODE3;
        cpu.regs[Gpr::Rsp] = STACK3;
        cpu.regs.rflags |= rflags::IF;
        cpu.segments = [Segment::flat(USER_DS, 0xc0f3); 6];
        *cpu.segment_mut(SegmentRegister::Cs) = Segment::flat(USER_CS, 0xa0fb);
        Ok(cpu)
    }

    /// Page tables (one to one, for both rings), descriptor tables, TSS and stubs.
    fn lay_out(&mut self) -> Result<(), EngineError> {
        for (table, next) in [(PML4, PDPT), (PDPT, PD), (PD, PT)] {
            self.put_u64(table, next | 0x27)?;
        }
        for page in 0..512 {
            self.put_u64(PT + 8 * page, page << 12 | 0x67)?;
        }
        for (i, descriptor) in DESCRIPTORS.into_iter().enumerate() {
            self.put_u64(GDT + 8 * i as u64, descriptor)?;
        }
        self.put_u64(TSS + 4, STACK0)?;
        for vector in 0..256 {
            let stub = STUBS + 2 * vector;
            self.put_u64(
                IDT + 16 * vector,
                stub & 0xffff | u64::from(KERNEL_CS) << 16 | 0xee00 << 32,
            )?;
            self.put_u64(IDT + 16 * vector + 8, 0)?;
            self.put(stub, &[0xf4, 0x90])?;
        }
        self.put(SYSCALL_ENTRY, &[0xf4])
    }

    fn put(&self, addr: u64, bytes: &[u8]) -> Result<(), EngineError> {
        self.memory
            .write(GuestPhysAddr::new(addr), bytes)
            .map_err(probe_error)
    }

    fn put_u64(&self, addr: u64, value: u64) -> Result<(), EngineError> {
        self.put(addr, &value.to_le_bytes())
    }
}

fn probe_error(error: machine::memory::NoMemoryError) -> EngineError {
    EngineError::Host {
        operation: "examining KVM",
        source: std::io::Error::other(error),
    }
}

/// RIP once the stub of `vector` has halted.
const fn after_stub(vector: u64) -> u64 {
    STUBS + 2 * vector + 1
}

/// 64-bit ring 0 at [`CODE0`].
fn long_mode() -> CpuState {
    let mut cpu = CpuState {
        cr0: Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::PG,
        cr3: PML4,
        cr4: Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT,
        efer: Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE,
        ..CpuState::default()
    };
    cpu.regs.rip = CODE0;
    cpu.regs[Gpr::Rsp] = STACK0 - 256;
    cpu.segments = [Segment::flat(KERNEL_DS, 0xc093); 6];
    *cpu.segment_mut(SegmentRegister::Cs) = Segment::flat(KERNEL_CS, 0xa09b);
    cpu.gdtr = DescriptorTable {
        base: GDT,
        limit: 63,
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
