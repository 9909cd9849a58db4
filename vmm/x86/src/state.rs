//! The complete architectural state of one CPU.
//!
//! Purpose: what a checkpoint holds, what two engines must agree on, what a debugger shows.
//! Invariants: nothing an engine needs in order to continue lies outside this struct; two equal states with equal
//! memory and devices have the same future. It is only taken at an instruction boundary (or between two iterations of a REP
//! instruction, which is one too), with no I/O half done.
//! Elsewhere: translations to KVM's structs (`vmm/kvm`); the machine's devices (`vmm/machine`).
//! Source: Intel SDM vol. 3A, table 9-1 (reset values); vol. 3C, 24.4 (guest-state area).

use crate::msr::Msrs;
use crate::regs::{Cr0, Cr4, Efer, rflags};
use crate::segment::SegmentAttributes;
use crate::{DescriptorTable, Exception, GuestVirtAddr, Registers, Segment, SegmentRegister};
use serde::{Deserialize, Serialize};

/// Which virtual CPU of a machine.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct VcpuId(pub u8);

impl VcpuId {
    /// The CPU that starts the machine.
    pub const BOOT: Self = Self(0);
}

/// What the CPU is doing (SDM vol. 3C, 24.4.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Activity {
    /// Executing instructions.
    #[default]
    Active,
    /// HLT was executed; RIP is after it. An interrupt, NMI or reset wakes it.
    Halted,
    /// Triple fault; only a reset helps.
    Shutdown,
}

/// Why interrupts are held off for one instruction (SDM vol. 3C, 24.4.2, "blocking by").
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum InterruptShadow {
    /// They are not.
    #[default]
    None,
    /// The last instruction was an STI that set IF.
    Sti,
    /// The last instruction loaded SS by MOV or POP.
    MovSs,
}

/// x87, MMX and SSE registers, as FXSAVE64 lays them out, with the upper halves of the YMM registers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FpuState {
    /// Control word.
    pub fcw: u16,
    /// Status word.
    pub fsw: u16,
    /// Abridged tag word: bit n set means physical register n is not empty.
    pub ftw: u8,
    /// Last opcode.
    pub fop: u16,
    /// Last instruction pointer.
    pub fip: u64,
    /// Last data pointer.
    pub fdp: u64,
    /// SSE control and status.
    pub mxcsr: u32,
    /// ST0..ST7, 80 bits each.
    pub st: [[u8; 10]; 8],
    /// XMM0..XMM15.
    pub xmm: [u128; 16],
    /// Bits 255:128 of YMM0..YMM15; zero under CPU models without AVX.
    pub ymm_high: [u128; 16],
}

impl Default for FpuState {
    /// The state after reset and FNINIT, with MXCSR 1F80h.
    fn default() -> Self {
        Self {
            fcw: 0x37f,
            fsw: 0,
            ftw: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            mxcsr: 0x1f80,
            st: [[0; 10]; 8],
            xmm: [0; 16],
            ymm_high: [0; 16],
        }
    }
}

impl FpuState {
    /// The 512-byte image FXSAVE64 would store (bytes 416..512 zero).
    pub fn to_fxsave(&self) -> [u8; 512] {
        let mut image = [0; 512];
        image[0..2].copy_from_slice(&self.fcw.to_le_bytes());
        image[2..4].copy_from_slice(&self.fsw.to_le_bytes());
        image[4] = self.ftw;
        image[6..8].copy_from_slice(&self.fop.to_le_bytes());
        image[8..16].copy_from_slice(&self.fip.to_le_bytes());
        image[16..24].copy_from_slice(&self.fdp.to_le_bytes());
        image[24..28].copy_from_slice(&self.mxcsr.to_le_bytes());
        image[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
        for (i, st) in self.st.iter().enumerate() {
            image[32 + 16 * i..42 + 16 * i].copy_from_slice(st);
        }
        for (i, xmm) in self.xmm.iter().enumerate() {
            image[160 + 16 * i..176 + 16 * i].copy_from_slice(&xmm.to_le_bytes());
        }
        image
    }

    /// The state in an FXSAVE64 image; the upper YMM halves are those of `self`.
    pub fn set_fxsave(&mut self, image: &[u8; 512]) {
        let u16_at = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
        let array = |at: usize| -> [u8; 8] { std::array::from_fn(|i| image[at + i]) };
        self.fcw = u16_at(0);
        self.fsw = u16_at(2);
        self.ftw = image[4];
        self.fop = u16_at(6);
        self.fip = u64::from_le_bytes(array(8));
        self.fdp = u64::from_le_bytes(array(16));
        self.mxcsr = u32::from_le_bytes(std::array::from_fn(|i| image[24 + i]));
        self.st = std::array::from_fn(|n| std::array::from_fn(|i| image[32 + 16 * n + i]));
        self.xmm = std::array::from_fn(|n| {
            u128::from_le_bytes(std::array::from_fn(|i| image[160 + 16 * n + i]))
        });
    }
}

/// The MXCSR bits every CPU model here implements (no misaligned-exception mask).
pub const MXCSR_MASK: u32 = 0xffff;

/// How wide addresses and operands are by default (SDM vol. 3A, 2.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum CpuMode {
    /// CR0.PE clear.
    Real,
    /// RFLAGS.VM set.
    Virtual8086,
    /// Protected or compatibility mode with a 16-bit code segment.
    Protected16,
    /// Protected mode with a 32-bit code segment.
    Protected32,
    /// EFER.LMA with a 32-bit code segment.
    Compatibility,
    /// EFER.LMA with a 64-bit code segment.
    Long64,
}

/// Everything architectural about one CPU at an instruction boundary.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CpuState {
    /// General registers, RIP, RFLAGS.
    pub regs: Registers,
    /// Indexed by [`SegmentRegister`].
    pub segments: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table register.
    pub idtr: DescriptorTable,
    /// CR0.
    pub cr0: Cr0,
    /// CR2: linear address of the last page fault.
    pub cr2: u64,
    /// CR3, with its PCID or PWT/PCD bits.
    pub cr3: u64,
    /// CR4.
    pub cr4: Cr4,
    /// CR8: task priority, 0..=15.
    pub cr8: u8,
    /// XCR0.
    pub xcr0: u64,
    /// IA32_EFER.
    pub efer: Efer,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// DR0..DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// x87 and SSE.
    pub fpu: FpuState,
    /// MSRs without a place above.
    pub msrs: Msrs,
    /// Running, halted or shut down.
    pub activity: Activity,
    /// Interrupts held off by STI or MOV SS.
    pub shadow: InterruptShadow,
    /// An NMI handler has not returned yet.
    pub nmi_blocked: bool,
    /// An exception that was raised and will be delivered before the next instruction.
    pub pending: Option<Exception>,
}

impl Default for CpuState {
    /// The state after power-on: real mode, first fetch at FFFF_FFF0h (SDM vol. 3A, table 9-1).
    fn default() -> Self {
        let data = Segment::real_mode(0, false);
        let mut code = Segment::real_mode(0xf000, true);
        code.base = 0xffff_0000;
        let system = |kind| Segment {
            selector: 0,
            base: 0,
            limit: 0xffff,
            attributes: SegmentAttributes::from_bits(kind),
        };
        Self {
            regs: Registers {
                gpr: [0; 16],
                rip: 0xfff0,
                rflags: rflags::FIXED,
            },
            segments: [data, code, data, data, data, data],
            ldtr: system(0x82),
            tr: system(0x8b),
            gdtr: DescriptorTable {
                base: 0,
                limit: 0xffff,
            },
            idtr: DescriptorTable {
                base: 0,
                limit: 0xffff,
            },
            cr0: Cr0::ET | Cr0::NW | Cr0::CD,
            cr2: 0,
            cr3: 0,
            cr4: Cr4::empty(),
            cr8: 0,
            xcr0: 1,
            efer: Efer::empty(),
            apic_base: 0xfee0_0000 | 1 << 11 | 1 << 8,
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            fpu: FpuState::default(),
            msrs: Msrs::default(),
            activity: Activity::Active,
            shadow: InterruptShadow::None,
            nmi_blocked: false,
            pending: None,
        }
    }
}

impl CpuState {
    /// The segment register `which`.
    pub fn segment(&self, which: SegmentRegister) -> &Segment {
        &self.segments[which as usize]
    }

    /// The segment register `which`, to be changed.
    pub fn segment_mut(&mut self, which: SegmentRegister) -> &mut Segment {
        &mut self.segments[which as usize]
    }

    /// Current privilege level, 0..=3 (the DPL of SS, as VT-x has it; 0 in real mode, 3 in virtual-8086 mode).
    pub fn cpl(&self) -> u8 {
        match self.mode() {
            CpuMode::Real => 0,
            CpuMode::Virtual8086 => 3,
            _ => self.segment(SegmentRegister::Ss).attributes.dpl(),
        }
    }

    /// Operating mode, from CR0.PE, RFLAGS.VM, EFER.LMA and the code segment.
    pub fn mode(&self) -> CpuMode {
        let code = self.segment(SegmentRegister::Cs).attributes;
        if !self.cr0.contains(Cr0::PE) {
            CpuMode::Real
        } else if self.efer.contains(Efer::LMA) {
            match (code.long(), code.db()) {
                (true, _) => CpuMode::Long64,
                (false, true) => CpuMode::Compatibility,
                (false, false) => CpuMode::Protected16,
            }
        } else if self.regs.rflags & rflags::VM != 0 {
            CpuMode::Virtual8086
        } else if code.db() {
            CpuMode::Protected32
        } else {
            CpuMode::Protected16
        }
    }

    /// Linear address of the next instruction.
    pub fn rip_linear(&self) -> GuestVirtAddr {
        match self.mode() {
            CpuMode::Long64 => GuestVirtAddr::new(self.regs.rip),
            _ => {
                let base = self.segment(SegmentRegister::Cs).base;
                GuestVirtAddr::new(base.wrapping_add(self.regs.rip) & 0xffff_ffff)
            }
        }
    }

    /// Whether an external interrupt would be taken before the next instruction (SDM vol. 3A, 6.8).
    pub fn interruptible(&self) -> bool {
        self.regs.rflags & rflags::IF != 0
            && self.shadow == InterruptShadow::None
            && self.pending.is_none()
            && self.activity != Activity::Shutdown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fxsave_image_round_trips() {
        let mut fpu = FpuState {
            fsw: 0x3800,
            ftw: 0x81,
            fop: 0x1d9,
            ..FpuState::default()
        };
        fpu.st[3] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10];
        fpu.xmm[15] = 0x0123_4567_89ab_cdef_0011_2233_4455_6677;
        let mut back = FpuState::default();
        back.set_fxsave(&fpu.to_fxsave());
        assert_eq!(back, fpu);
    }

    #[test]
    fn reset_state_fetches_from_the_reset_vector() {
        let cpu = CpuState::default();
        assert_eq!(cpu.mode(), CpuMode::Real);
        assert_eq!(cpu.rip_linear(), GuestVirtAddr::new(0xffff_fff0));
        assert!(!cpu.interruptible(), "IF is clear after reset");
    }

    #[test]
    fn state_survives_serialisation() {
        let cpu = CpuState {
            pending: Some(Exception::gp(0x18)),
            activity: Activity::Halted,
            ..CpuState::default()
        };
        let bytes = postcard::to_stdvec(&cpu).expect("serialise");
        let back: CpuState = postcard::from_bytes(&bytes).expect("deserialise");
        assert_eq!(back, cpu);
    }
}
