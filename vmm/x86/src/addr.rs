//! Typed guest addresses.
//!
//! Purpose: keep the address spaces apart; a linear address cannot be passed where a physical one is meant.
//! Invariants: no arithmetic operators; offsets are added by name, and the name says whether it wraps.
//! Elsewhere: translation from one to the other needs a root and lives in [`crate::paging`].
//! Source: Intel SDM vol. 3A, 3.3 (physical) and 3.3.7.1 / 4.1 (linear addresses, canonicality).

use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes in the smallest page.
pub const PAGE_SIZE: u64 = 4096;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(u64);

        impl $name {
            /// The address with this numeric value.
            pub const fn new(value: u64) -> Self {
                Self(value)
            }

            /// The numeric value, for arithmetic and printing at the edges.
            pub const fn get(self) -> u64 {
                self.0
            }

            /// `self + bytes`, wrapping at 2^64 as the processor's adders do.
            #[must_use]
            pub const fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }

            /// `self + bytes`, or `None` past the end of the address space.
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(value) => Some(Self(value)),
                    None => None,
                }
            }

            /// The first byte of the 4 KiB page that holds this address.
            #[must_use]
            pub const fn page_base(self) -> Self {
                Self(self.0 & !(PAGE_SIZE - 1))
            }

            /// The offset inside the 4 KiB page, 0..4096.
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }

            /// Bytes from here to the end of the 4 KiB page, 1..=4096.
            pub const fn bytes_left_in_page(self) -> u64 {
                PAGE_SIZE - self.page_offset()
            }

            /// How far `self` lies above `base`, in bytes; `None` when it lies below.
            pub const fn offset_from(self, base: Self) -> Option<u64> {
                self.0.checked_sub(base.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({:#x})", stringify!($name), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

address! {
    /// A guest linear address: what segmentation yields and paging translates. gdb's and the kernel's "virtual address".
    GuestVirtAddr
}
address! {
    /// A guest physical address: what paging yields; RAM or a device answers it.
    GuestPhysAddr
}

impl GuestVirtAddr {
    /// Whether bits 63..47 are all equal, as 4-level paging demands.
    pub const fn is_canonical(self) -> bool {
        let top = (self.0 as i64) >> 47;
        top == 0 || top == -1
    }
}

/// The number of a 4 KiB guest physical page ("gfn" in KVM): a physical address divided by 4096.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct PageFrame(u64);

impl PageFrame {
    /// The page with this number.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The page that holds `addr`.
    pub const fn containing(addr: GuestPhysAddr) -> Self {
        Self(addr.get() / PAGE_SIZE)
    }

    /// The page's number.
    pub const fn number(self) -> u64 {
        self.0
    }

    /// The first byte of the page; wraps for numbers past 2^52, which no machine has.
    pub const fn base(self) -> GuestPhysAddr {
        GuestPhysAddr::new(self.0.wrapping_mul(PAGE_SIZE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_is_sign_extension_of_bit_47() {
        for (value, canonical) in [
            (0, true),
            (0x7fff_ffff_ffff, true),
            (0x8000_0000_0000, false),
            (0xffff_7fff_ffff_ffff, false),
            (0xffff_8000_0000_0000, true),
            (u64::MAX, true),
        ] {
            assert_eq!(
                GuestVirtAddr::new(value).is_canonical(),
                canonical,
                "{value:#x}"
            );
        }
    }

    #[test]
    fn page_parts_put_together_give_the_address() {
        let addr = GuestPhysAddr::new(0x1234_5678);
        assert_eq!(
            addr.page_base().wrapping_add(addr.page_offset()),
            addr,
            "base + offset"
        );
        assert_eq!(addr.bytes_left_in_page(), 0x1000 - 0x678);
        assert_eq!(PageFrame::containing(addr).base(), addr.page_base());
    }
}
