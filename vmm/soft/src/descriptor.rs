//! Descriptors: reading them from the GDT and LDT, and what their bits say.
//!
//! Invariants: an index is checked against the table's limit before memory is read. Accessed and busy bits are staged with the
//! instruction's other stores, and only when they change.
//! Elsewhere: loading segment registers from them ([`crate::segments`]).
//! Source: Intel SDM vol. 3A, 3.4.5, 3.5, 5.8.3 (gates); 7.2.3 (TSS descriptors).

use crate::guest::Guest;
use crate::stop::Exec;
use x86::Segment;
use x86::segment::SegmentAttributes;

/// Eight bytes of a descriptor table; the upper eight of a long-mode system descriptor apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Descriptor {
    pub(crate) low: u64,
    pub(crate) high: u64,
    /// Linear address of its first byte.
    pub(crate) at: u64,
}

impl Descriptor {
    pub(crate) fn attributes(&self) -> SegmentAttributes {
        SegmentAttributes::from_descriptor(self.low)
    }

    /// Base address; 64 bits for system descriptors in long mode.
    pub(crate) fn base(&self) -> u64 {
        let low = self.low >> 16 & 0xff_ffff | self.low >> 32 & 0xff00_0000;
        low | self.high << 32
    }

    /// Limit in bytes.
    pub(crate) fn limit(&self) -> u32 {
        let limit = (self.low & 0xffff) as u32 | (self.low >> 32) as u32 & 0xf_0000;
        if self.attributes().granularity() {
            limit << 12 | 0xfff
        } else {
            limit
        }
    }

    /// The segment register this loads.
    pub(crate) fn segment(&self, selector: u16) -> Segment {
        Segment {
            selector,
            base: self.base(),
            limit: self.limit(),
            attributes: self.attributes(),
        }
    }

    /// Type field of a system descriptor.
    pub(crate) fn kind(&self) -> u8 {
        self.attributes().kind()
    }

    /// The selector in a gate.
    pub(crate) fn gate_selector(&self) -> u16 {
        (self.low >> 16) as u16
    }

    /// The offset in a gate; 16 bits, 32 bits, or 64 with the upper half.
    pub(crate) fn gate_offset(&self) -> u64 {
        self.low & 0xffff | self.low >> 32 & 0xffff_0000 | self.high << 32
    }
}

/// Whether a selector is null.
pub(crate) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// The error code that names a selector.
pub(crate) fn selector_code(selector: u16) -> u32 {
    u32::from(selector & !3)
}

impl Guest<'_> {
    /// The descriptor a selector names; `None` outside its table.
    pub(crate) fn descriptor(&mut self, selector: u16) -> Exec<Option<Descriptor>> {
        let Some(at) = self.descriptor_address(selector, 8) else {
            return Ok(None);
        };
        let low = self.read_system(at, 8)?;
        Ok(Some(Descriptor { low, high: 0, at }))
    }

    /// A system descriptor, sixteen bytes in long mode.
    pub(crate) fn system_descriptor(&mut self, selector: u16) -> Exec<Option<Descriptor>> {
        let size = if self.mode.lma { 16 } else { 8 };
        let Some(at) = self.descriptor_address(selector, size) else {
            return Ok(None);
        };
        let low = self.read_system(at, 8)?;
        let high = if size == 16 {
            self.read_system(at.wrapping_add(8), 8)?
        } else {
            0
        };
        Ok(Some(Descriptor { low, high, at }))
    }

    fn descriptor_address(&self, selector: u16, size: u64) -> Option<u64> {
        let (base, limit) = if selector & 4 == 0 {
            (self.cpu.gdtr.base, u64::from(self.cpu.gdtr.limit))
        } else if self.cpu.ldtr.attributes.unusable() || is_null(self.cpu.ldtr.selector) {
            return None;
        } else {
            (self.cpu.ldtr.base, u64::from(self.cpu.ldtr.limit))
        };
        let offset = u64::from(selector & !7);
        (offset + size - 1 <= limit).then(|| base.wrapping_add(offset))
    }

    /// Stages the change of a descriptor's type field, if it is one.
    pub(crate) fn set_kind(&mut self, descriptor: &Descriptor, kind: u8) -> Exec {
        if descriptor.kind() == kind {
            return Ok(());
        }
        let byte = (descriptor.low >> 40) as u8 & 0xf0 | kind;
        self.write_system(descriptor.at.wrapping_add(5), 1, u64::from(byte))
    }

    /// Marks a code or data descriptor accessed, in memory and in the copy.
    pub(crate) fn set_accessed(&mut self, descriptor: &mut Descriptor) -> Exec {
        let kind = descriptor.kind() | 1;
        self.set_kind(descriptor, kind)?;
        descriptor.low |= 1 << 40;
        Ok(())
    }
}
