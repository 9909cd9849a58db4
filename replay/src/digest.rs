//! Digests: what recording and replay are compared by.
//!
//! Purpose: one canonical digest of a CPU's state, and rolling ones of exits and output.
//! Invariants: equal states have equal digests on every engine and host. Every field of [`CpuState`] is either hashed or left out
//! here, by name, with the reason: the destructuring is exhaustive, so that a new field cannot be forgotten.
//! Nothing on the path of an exit or of output allocates.
//! Elsewhere: digests of memory ([`machine::GuestMemory`]).
//! Source: Intel SDM vol. 3A, 3.4.4 (segments in 64-bit mode); vol. 1, 8.1.8 (x87 pointers); AMD APM vol. 2, 15.21.5 (one interrupt shadow).

use machine::Board;
use machine::environment::Channel;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use x86::regs::rflags;
use x86::{
    Activity, CpuMode, CpuState, DescriptorTable, Exception, Exit, FpuState, InterruptShadow,
    Registers, Segment, SegmentRegister, Vector,
};
use xxhash_rust::xxh3::Xxh3;

/// A 64-bit hash. Printed as 16 hexadecimal digits; eight little-endian bytes in a file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Digest(pub u64);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.0.to_le_bytes().serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
            u64::from_str_radix(&text, 16)
                .map(Self)
                .map_err(serde::de::Error::custom)
        } else {
            <[u8; 8]>::deserialize(deserializer).map(|bytes| Self(u64::from_le_bytes(bytes)))
        }
    }
}

/// Digest of a CPU's state, in parts, so that a difference can be placed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CpuDigest {
    /// General registers, RIP, RFLAGS.
    pub registers: Digest,
    /// Segment registers, LDTR, TR.
    pub segments: Digest,
    /// Control and debug registers, EFER, GDTR, IDTR, APIC base, and whether interrupts are held off or pending.
    pub system: Digest,
    /// x87 and SSE.
    pub fpu: Digest,
    /// The other MSRs.
    pub msrs: Digest,
}

impl CpuDigest {
    /// The digest of `cpu`.
    pub fn of(cpu: &CpuState) -> Self {
        let CpuState {
            regs,
            segments,
            ldtr,
            tr,
            gdtr,
            idtr,
            cr0,
            cr2,
            cr3,
            cr4,
            cr8,
            xcr0,
            efer,
            apic_base,
            dr,
            dr6,
            dr7,
            fpu,
            msrs,
            activity,
            shadow,
            nmi_blocked,
            pending,
        } = cpu;

        let mut segment_words = Words::default();
        let long = cpu.mode() == CpuMode::Long64;
        for which in SegmentRegister::ALL {
            segment_words.segment(Some(which), &segments[which as usize], long);
        }
        segment_words.segment(None, ldtr, long);
        segment_words.segment(None, tr, long);

        let mut system = Words::default();
        for DescriptorTable { base, limit } in [gdtr, idtr] {
            system.add(*base);
            system.add(u64::from(*limit));
        }
        for word in [
            cr0.bits(),
            *cr2,
            *cr3,
            cr4.bits(),
            u64::from(*cr8),
            *xcr0,
            efer.bits(),
        ] {
            system.add(word);
        }
        for word in dr.iter().chain([apic_base, dr6, dr7]) {
            system.add(*word);
        }
        system.add(match activity {
            Activity::Active => 0,
            Activity::Halted => 1,
            Activity::Shutdown => 2,
        });
        // AMD's processors, and so KVM on them, do not tell the shadow of STI from that of MOV SS.
        system.add(u64::from(*shadow != InterruptShadow::None));
        system.add(u64::from(*nmi_blocked));
        if let Some(Exception {
            vector: Vector(vector),
            error_code,
            cr2,
        }) = pending
        {
            system.add(1);
            system.add(u64::from(*vector));
            system.add(error_code.map_or(u64::MAX, u64::from));
            system.add(cr2.map_or(0, x86::GuestVirtAddr::get));
        }

        let mut msr_words = Words::default();
        let x86::msr::Msrs {
            star,
            lstar,
            cstar,
            fmask,
            kernel_gs_base,
            tsc_aux,
            sysenter_cs,
            sysenter_esp,
            sysenter_eip,
            pat,
            misc_enable,
        } = msrs;
        for word in [star, lstar, cstar, fmask, kernel_gs_base, tsc_aux] {
            msr_words.add(*word);
        }
        for word in [sysenter_cs, sysenter_esp, sysenter_eip, pat, misc_enable] {
            msr_words.add(*word);
        }

        Self {
            registers: registers_digest(regs),
            segments: segment_words.digest(),
            system: system.digest(),
            fpu: fpu_digest(fpu),
            msrs: msr_words.digest(),
        }
    }

    /// Everything but the general registers, RIP and RFLAGS.
    pub fn rest(&self) -> Digest {
        let Self {
            registers: _,
            segments,
            system,
            fpu,
            msrs,
        } = self;
        let mut words = Words::default();
        for part in [segments, system, fpu, msrs] {
            words.add(part.0);
        }
        words.digest()
    }
}

/// The registers with RFLAGS.RF cleared.
///
/// A host leaves RF set when it is interrupted inside a REP, and the next retired instruction clears it: at a boundary it means nothing
/// but that an instruction breakpoint there is not to be reported twice, and DR7's breakpoints are not what moments are told by.
pub fn canonical_registers(registers: &Registers) -> Registers {
    Registers {
        rflags: registers.rflags & !rflags::RF,
        ..registers.clone()
    }
}

fn registers_digest(registers: &Registers) -> Digest {
    let Registers { gpr, rip, rflags } = canonical_registers(registers);
    let mut words = Words::default();
    for word in gpr.into_iter().chain([rip, rflags]) {
        words.add(word);
    }
    words.digest()
}

fn fpu_digest(fpu: &FpuState) -> Digest {
    let FpuState {
        fcw,
        fsw,
        ftw,
        // The last x87 opcode and pointers: AMD keeps them only while an exception is pending, Intel deprecates
        // them, and an engine that executes x87 instructions elsewhere than at the guest's address never has them.
        fop: _,
        fip: _,
        fdp: _,
        mxcsr,
        st,
        xmm,
        ymm_high,
    } = fpu;
    let mut words = Words::default();
    words.add(u64::from(*fcw) | u64::from(*fsw) << 16 | u64::from(*ftw) << 32);
    words.add(u64::from(*mxcsr));
    for register in st {
        words.0.update(register);
    }
    for register in xmm.iter().chain(ymm_high) {
        words.0.update(&register.to_le_bytes());
    }
    words.digest()
}

/// A hash of 64-bit words.
#[derive(Default)]
struct Words(Xxh3);

impl Words {
    fn add(&mut self, word: u64) {
        self.0.update(&word.to_le_bytes());
    }

    fn digest(&self) -> Digest {
        Digest(self.0.digest())
    }

    /// `which` is `None` for LDTR and TR; `long` says that the CPU executes 64-bit code.
    fn segment(&mut self, which: Option<SegmentRegister>, segment: &Segment, long: bool) {
        let Segment {
            selector,
            base,
            limit,
            attributes,
        } = *segment;
        self.add(u64::from(selector));
        let thread_base = matches!(which, Some(SegmentRegister::Fs | SegmentRegister::Gs));
        let unusable = attributes.unusable();
        // 64-bit code: ES, CS, SS and DS have base 0, no limit, and of their attributes only CS's and SS's privilege count
        // (vol. 3A, 3.4.4); what is left in the hidden part is not preserved alike by every host.
        // Unusable: the hidden part means nothing, but that FS and GS keep a base and SS the privilege level.
        let flat = which.is_some() && long;
        if thread_base || !(unusable || flat) {
            self.add(base);
        }
        if unusable || (flat && which != Some(SegmentRegister::Cs)) {
            let privilege = which == Some(SegmentRegister::Ss);
            self.add(if privilege {
                u64::from(attributes.dpl())
            } else {
                0
            });
            return;
        }
        self.add(u64::from(attributes.bits()));
        if !flat {
            self.add(u64::from(limit));
        }
    }
}

/// Digest of the devices.
pub fn board_digest(board: &Board) -> Digest {
    let state = board.save();
    let mut hash = Xxh3::new();
    for device in &state.devices {
        hash.update(&(device.kind.len() as u64).to_le_bytes());
        hash.update(device.kind.as_bytes());
        hash.update(&u64::from(device.version).to_le_bytes());
        hash.update(&(device.bytes.len() as u64).to_le_bytes());
        hash.update(&device.bytes);
    }
    Digest(hash.digest())
}

/// Rolling digest of the exits that are sync points, in order.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct ExitDigest(u64);

impl ExitDigest {
    /// Takes one exit in; no effect if it is no sync point.
    pub fn add(&mut self, exit: &Exit) {
        let (code, what, value) = match *exit {
            Exit::IoIn { port, size } => (1, u64::from(port), u64::from(size)),
            Exit::IoOut { port, data } => {
                (2, u64::from(port) | u64::from(data.size) << 16, data.value)
            }
            Exit::MmioRead { addr, size } => (3, addr.get(), u64::from(size)),
            Exit::MmioWrite { addr, data } => (
                4,
                addr.get(),
                data.value.rotate_left(8) ^ u64::from(data.size),
            ),
            Exit::Rdmsr { msr } => (5, u64::from(msr), 0),
            Exit::Wrmsr { msr, value } => (6, u64::from(msr), value),
            Exit::Hlt => (7, 0, 0),
            Exit::TripleFault => (8, 0, 0),
            _ => return,
        };
        for word in [code, what, value] {
            self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }

    /// The digest of all taken in.
    pub fn digest(self) -> Digest {
        Digest(self.0)
    }
}

/// Rolling digest of what the guest sent on each channel. How the bytes were cut into calls does not matter.
#[derive(Clone, Default)]
pub struct ConsoleDigest {
    com1: Xxh3,
    debug: Xxh3,
    /// Bytes of both.
    len: u64,
}

impl ConsoleDigest {
    /// Takes bytes in.
    pub fn add(&mut self, channel: Channel, bytes: &[u8]) {
        self.len += bytes.len() as u64;
        match channel {
            Channel::Com1 => self.com1.update(bytes),
            Channel::DebugConsole => self.debug.update(bytes),
        }
    }

    /// Bytes taken in.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing was taken in.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The digest of all taken in.
    pub fn digest(&self) -> Digest {
        let mut words = Words::default();
        words.add(self.com1.digest());
        words.add(self.debug.digest());
        words.digest()
    }
}

impl fmt::Debug for ConsoleDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConsoleDigest({} bytes, {})", self.len, self.digest())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86::exit::AccessData;
    use x86::segment::SegmentAttributes;

    fn long_mode() -> CpuState {
        let mut cpu = CpuState::default();
        cpu.cr0 |= x86::regs::Cr0::PE | x86::regs::Cr0::PG;
        cpu.efer |= x86::regs::Efer::LME | x86::regs::Efer::LMA;
        cpu.segments = [Segment::flat(0x10, 0xc093); 6];
        *cpu.segment_mut(SegmentRegister::Cs) = Segment::flat(8, 0xa09b);
        cpu
    }

    type Change = (&'static str, fn(&mut CpuState));

    /// Every change of `list` to `cpu` must, or must not, change its digest.
    fn changes(cpu: &CpuState, list: &[Change], differs: bool) {
        let before = CpuDigest::of(cpu);
        for (name, change) in list {
            let mut changed = cpu.clone();
            change(&mut changed);
            assert_ne!(changed, *cpu, "{name}: nothing changed");
            assert_eq!(CpuDigest::of(&changed) != before, differs, "{name}");
        }
    }

    #[test]
    fn what_the_guest_can_tell_apart_differs() {
        let list: &[Change] = &[
            ("rax", |c| c.regs.gpr[0] ^= 1),
            ("r15", |c| c.regs.gpr[15] ^= 1),
            ("rip", |c| c.regs.rip ^= 1),
            ("rflags", |c| c.regs.rflags ^= rflags::CF),
            ("selector", |c| c.segments[3].selector ^= 8),
            ("fs base", |c| c.segments[4].base ^= 8),
            ("privilege", |c| {
                c.segments[2].attributes = c.segments[2].attributes.with_dpl(3);
            }),
            ("tr", |c| c.tr.base ^= 8),
            ("ldtr limit", |c| c.ldtr.limit ^= 8),
            ("gdtr", |c| c.gdtr.limit ^= 8),
            ("cr2", |c| c.cr2 ^= 8),
            ("cr3", |c| c.cr3 ^= 8),
            ("dr3", |c| c.dr[3] ^= 8),
            ("halted", |c| c.activity = Activity::Halted),
            ("shadow", |c| c.shadow = InterruptShadow::Sti),
            ("pending", |c| c.pending = Some(Exception::gp(0))),
            ("st7", |c| c.fpu.st[7][9] ^= 1),
            ("xmm15", |c| c.fpu.xmm[15] ^= 1),
            ("mxcsr", |c| c.fpu.mxcsr ^= 1),
            ("star", |c| c.msrs.star ^= 1),
            ("pat", |c| c.msrs.pat ^= 1),
        ];
        changes(&long_mode(), list, true);
    }

    #[test]
    fn what_hosts_hold_differently_is_left_out() {
        let list: &[Change] = &[
            ("rf", |c| c.regs.rflags ^= rflags::RF),
            ("ds limit in 64-bit mode", |c| c.segments[3].limit = 0),
            ("ss base in 64-bit mode", |c| c.segments[2].base = 5),
            ("null ss", |c| {
                c.segments[2].attributes = SegmentAttributes::UNUSABLE
            }),
            ("cs base in 64-bit mode", |c| c.segments[1].base = 5),
            ("fip", |c| c.fpu.fip = 5),
            ("fdp", |c| c.fpu.fdp = 5),
            ("fop", |c| c.fpu.fop = 5),
        ];
        changes(&long_mode(), list, false);
        let mut shadowed = long_mode();
        shadowed.shadow = InterruptShadow::Sti;
        changes(
            &shadowed,
            &[("which shadow", |c| c.shadow = InterruptShadow::MovSs)],
            false,
        );
        let null = CpuState {
            ldtr: Segment::default(),
            ..CpuState::default()
        };
        let hidden: &[Change] = &[
            ("limit", |c| c.ldtr.limit = 5),
            ("base", |c| c.ldtr.base = 5),
        ];
        changes(&null, hidden, false);
        changes(
            &CpuState::default(),
            &[("limit in real mode", |c| c.segments[3].limit = 5)],
            true,
        );
    }

    #[test]
    fn exits_roll_in_their_order_and_only_sync_points_count() {
        let data = AccessData { value: 1, size: 1 };
        let out = Exit::IoOut { port: 0x3f8, data };
        let read = Exit::IoIn {
            port: 0x3f8,
            size: 1,
        };
        let roll = |exits: &[&Exit]| {
            let mut digest = ExitDigest::default();
            exits.iter().for_each(|exit| digest.add(exit));
            digest.digest()
        };
        assert_ne!(roll(&[&out, &read]), roll(&[&read, &out]));
        assert_ne!(roll(&[&out]), roll(&[&out, &out]));
        let noise = [
            &Exit::Kicked,
            &out,
            &Exit::BoundReached,
            &Exit::InterruptWindow,
        ];
        assert_eq!(roll(&noise), roll(&[&out]));
        // One step of it by hand: the format's documentation gives the formula.
        let prime = 0x9e37_79b9_7f4a_7c15u64;
        let one = 7u64.wrapping_mul(prime);
        let two = one.rotate_left(5).wrapping_mul(prime);
        let three = two.rotate_left(5).wrapping_mul(prime);
        assert_eq!(roll(&[&Exit::Hlt]), Digest(three));
    }

    #[test]
    fn how_output_is_cut_into_calls_does_not_matter() {
        let mut whole = ConsoleDigest::default();
        whole.add(Channel::Com1, b"hello");
        whole.add(Channel::DebugConsole, b"x");
        let mut cut = ConsoleDigest::default();
        cut.add(Channel::Com1, b"he");
        cut.add(Channel::DebugConsole, b"x");
        cut.add(Channel::Com1, b"llo");
        assert_eq!((whole.digest(), whole.len()), (cut.digest(), cut.len()));
        cut.add(Channel::DebugConsole, b"!");
        assert_ne!(whole.digest(), cut.digest());
    }
}
