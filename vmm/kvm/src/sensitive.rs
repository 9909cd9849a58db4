//! Instructions that a KVM gets wrong without telling.
//!
//! Purpose: find the pages of guest memory that hold such instructions, so that they can be taken out of the memory slots and
//! executed by [`soft::Stepper`].
//! Invariants: scanning only reads. A byte sequence that only looks like an instruction costs speed, never correctness: the
//! page is executed and accessed exactly all the same.
//! Elsewhere: which KVM needs which ([`crate::quirks`]); taking pages out ([`crate::slots`]).
//! Source: Intel SDM vol. 2 (encodings).

use machine::GuestMemory;
use x86::{PAGE_SIZE, PageFrame};

/// Kinds of instructions to look for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Sensitive {
    /// CPUID, RDTSC, RDTSCP, RDRAND, RDSEED, RDPID, XGETBV: what tells the host's processor from the model.
    pub identity: bool,
    /// LIDT and SIDT: KVM holds another IDTR than the guest's.
    pub idtr: bool,
    /// IRETQ, SYSRET and SYSEXIT: KVM would enter ring 3 without telling.
    pub returns: bool,
    /// FXSAVE: its image holds what only this host's processor has.
    pub fxsave: bool,
    /// VMCALL and VMMCALL: never to be answered by KVM.
    pub hypercalls: bool,
}

/// Bytes of the next page that are looked at, for instructions that cross the boundary.
const OVERLAP: usize = 2;

impl Sensitive {
    /// Whether there is anything to look for.
    pub(crate) fn any(self) -> bool {
        self != Self::default()
    }

    /// Whether `page` holds the start of such an instruction.
    pub(crate) fn is_in(self, memory: &GuestMemory, page: PageFrame) -> bool {
        const LEN: usize = PAGE_SIZE as usize;
        let mut bytes = [0; LEN + OVERLAP];
        let whole = memory.read(page.base(), &mut bytes).is_ok();
        if !whole && memory.read(page.base(), &mut bytes[..LEN]).is_err() {
            return false;
        }
        bytes.windows(1 + OVERLAP).any(|window| self.starts(window))
    }

    fn starts(self, window: &[u8]) -> bool {
        let &[first, second, third] = window else {
            return false;
        };
        match (first, second) {
            (0x0f, 0xa2 | 0x31) => self.identity,
            (0x0f, 0x07 | 0x35) => self.returns,
            (0x0f, 0xae) => self.fxsave && third < 0xc0 && third >> 3 & 7 == 0,
            (0x0f, 0xc7) => self.identity && third >= 0xf0,
            (0x0f, 0x01) => match third {
                0xf9 | 0xd0 => self.identity,
                0xc1 | 0xd9 => self.hypercalls,
                modrm => self.idtr && modrm < 0xc0 && matches!(modrm >> 3 & 7, 1 | 3),
            },
            (0x48, 0xcf) => self.returns,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86::GuestPhysAddr;

    const ALL: Sensitive = Sensitive {
        identity: true,
        idtr: true,
        returns: true,
        fxsave: true,
        hypercalls: true,
    };

    fn memory(at: u64, bytes: &[u8]) -> GuestMemory {
        let memory = GuestMemory::new(1 << 20).expect("memory");
        memory.write(GuestPhysAddr::new(at), bytes).expect("in RAM");
        memory
    }

    #[test]
    fn instructions_are_found_wherever_they_start() {
        let cases: [&[u8]; 8] = [
            &[0x0f, 0xa2],
            &[0x0f, 0x31],
            &[0x0f, 0xc7, 0xf0],
            &[0x0f, 0x01, 0x1e],
            &[0x48, 0xcf],
            &[0x0f, 0x07],
            &[0x0f, 0xae, 0x04],
            &[0x0f, 0x01, 0xc1],
        ];
        for bytes in cases {
            for at in [0x1000, 0x1234, 0x1fff] {
                let memory = memory(at, bytes);
                assert!(
                    ALL.is_in(&memory, PageFrame::new(1)),
                    "{bytes:x?} at {at:#x}"
                );
                assert!(!ALL.is_in(&memory, PageFrame::new(3)));
            }
        }
    }

    #[test]
    fn relatives_are_left_alone() {
        // LGDT, INVLPG, CMPXCHG8B, SYSCALL, FXRSTOR, MFENCE.
        let cases: [&[u8]; 6] = [
            &[0x0f, 0x01, 0x16],
            &[0x0f, 0x01, 0x38],
            &[0x0f, 0xc7, 0x0f],
            &[0x0f, 0x05],
            &[0x0f, 0xae, 0x0c],
            &[0x0f, 0xae, 0xf0],
        ];
        for bytes in cases {
            assert!(
                !ALL.is_in(&memory(0x1000, bytes), PageFrame::new(1)),
                "{bytes:x?}"
            );
        }
        assert!(!Sensitive::default().is_in(&memory(0x1000, &[0x0f, 0xa2]), PageFrame::new(1)));
    }

    #[test]
    fn the_last_page_and_none_at_all() {
        let memory = memory((1 << 20) - 2, &[0x0f, 0xa2]);
        assert!(ALL.is_in(&memory, PageFrame::new(255)));
        assert!(!ALL.is_in(&memory, PageFrame::new(256)));
    }
}
