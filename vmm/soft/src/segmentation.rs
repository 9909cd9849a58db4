//! Segmentation: from an offset in a segment to a linear address, and accesses made that way.
//!
//! Purpose: bases, limits and type checks outside 64-bit mode; FS and GS bases and canonical checks in it.
//! Invariants: every data access of an instruction goes through [`Guest::linear`], except those the processor makes by itself to
//! descriptor tables and task state segments ([`Guest::read_system`]).
//! Source: Intel SDM vol. 3A, 5.3 (limits), 5.4-5.5 (types); vol. 1, 3.3.7.1 (canonical addresses); vol. 3A, 6.15 (#AC).

use crate::guest::{Guest, truncate};
use crate::stop::{Exec, Stop, coded};
use x86::paging::AccessKind;
use x86::{Segment, SegmentRegister, Vector};

/// SS's number.
pub(crate) const SS: u8 = SegmentRegister::Ss as u8;
/// ES's number.
pub(crate) const ES: u8 = SegmentRegister::Es as u8;

impl Guest<'_> {
    /// The linear address of `len` bytes at `offset` in a segment, checked against the segment.
    #[inline]
    pub(crate) fn linear(&self, segment: u8, offset: u64, len: usize, write: bool) -> Exec<u64> {
        if self.mode.long {
            let linear = if segment >= SegmentRegister::Fs as u8 {
                let base = self
                    .cpu
                    .segments
                    .get(usize::from(segment))
                    .map_or(0, |s| s.base);
                base.wrapping_add(offset)
            } else {
                offset
            };
            let last = linear.wrapping_add(len as u64 - 1);
            if is_canonical(linear) && is_canonical(last) && !self.mode.alignment_check {
                return Ok(linear);
            }
            return self.linear_checked(segment, linear, len);
        }
        self.linear_in_segment(segment, offset, len, write)
    }

    #[cold]
    fn linear_checked(&self, segment: u8, linear: u64, len: usize) -> Exec<u64> {
        let last = linear.wrapping_add(len as u64 - 1);
        if !is_canonical(linear) || !is_canonical(last) {
            return Err(segment_fault(segment));
        }
        self.check_alignment(linear, len)?;
        Ok(linear)
    }

    fn linear_in_segment(&self, n: u8, offset: u64, len: usize, write: bool) -> Exec<u64> {
        let Some(segment) = self.cpu.segments.get(usize::from(n)) else {
            return Err(segment_fault(n));
        };
        let allowed = !self.mode.protected || type_allows(segment, write);
        if !allowed || !within_limit(segment, offset, len, self.mode.protected) {
            return Err(segment_fault(n));
        }
        let linear = segment.base.wrapping_add(offset) & 0xffff_ffff;
        if self.mode.alignment_check {
            self.check_alignment(linear, len)?;
        }
        Ok(linear)
    }

    fn check_alignment(&self, linear: u64, len: usize) -> Exec {
        let natural = match len {
            2 | 4 | 8 => len as u64,
            10 => 8,
            16 => return Ok(()), // #GP where it matters at all
            _ => 1,
        };
        if self.mode.alignment_check && !linear.is_multiple_of(natural) {
            return Err(coded(Vector::AC, 0));
        }
        Ok(())
    }

    /// Reads up to eight bytes through a segment.
    #[inline]
    pub(crate) fn read(&mut self, segment: u8, offset: u64, size: usize) -> Exec<u64> {
        let linear = self.linear(segment, offset, size, false)?;
        self.read_linear(linear, size, self.mem.user)
    }

    /// Reads up to eight bytes at a linear address with the given privilege.
    #[inline]
    pub(crate) fn read_linear(&mut self, linear: u64, size: usize, user: bool) -> Exec<u64> {
        let (mem, cpu, pending) = (&mut *self.mem, &*self.cpu, &mut *self.pending);
        Ok(match size {
            8 => mem.read::<u64>(cpu, linear, user, pending)?,
            4 => u64::from(mem.read::<u32>(cpu, linear, user, pending)?),
            2 => u64::from(mem.read::<u16>(cpu, linear, user, pending)?),
            1 => u64::from(mem.read::<u8>(cpu, linear, user, pending)?),
            _ => {
                let span = mem.span(cpu, linear, size, AccessKind::Read, user)?;
                let mut bytes = [0; 8];
                let out = bytes.get_mut(..size);
                mem.load(span, out.unwrap_or_default(), pending)?;
                u64::from_le_bytes(bytes)
            }
        })
    }

    /// Stages a store of up to eight bytes through a segment.
    pub(crate) fn write(&mut self, segment: u8, offset: u64, size: usize, value: u64) -> Exec {
        let linear = self.linear(segment, offset, size, true)?;
        self.mem
            .stage(self.cpu, linear, u128::from(value), size, self.mem.user)
    }

    /// Makes the only store of an instruction at once; nothing may fail after it.
    #[inline]
    pub(crate) fn write_last(&mut self, segment: u8, offset: u64, size: usize, value: u64) -> Exec {
        let linear = self.linear(segment, offset, size, true)?;
        let user = self.mem.user;
        let (mem, cpu, pending) = (&mut *self.mem, &*self.cpu, &mut *self.pending);
        match size {
            8 => mem.write::<u64>(cpu, linear, value, user, pending),
            4 => mem.write::<u32>(cpu, linear, value as u32, user, pending),
            2 => mem.write::<u16>(cpu, linear, value as u16, user, pending),
            _ => mem.write::<u8>(cpu, linear, value as u8, user, pending),
        }
    }

    /// Reads a descriptor table or task state segment, as the processor does: with supervisor rights, past segmentation.
    pub(crate) fn read_system(&mut self, linear: u64, size: usize) -> Exec<u64> {
        let linear = if self.mode.lma {
            linear
        } else {
            linear & 0xffff_ffff
        };
        if !is_canonical(linear) {
            return Err(crate::stop::gp(0));
        }
        self.read_linear(linear, size, false)
    }

    /// Stages a store to a descriptor table or task state segment.
    pub(crate) fn write_system(&mut self, linear: u64, size: usize, value: u64) -> Exec {
        let linear = if self.mode.lma {
            linear
        } else {
            linear & 0xffff_ffff
        };
        self.mem.stage(
            self.cpu,
            linear,
            u128::from(truncate(value, size)),
            size,
            false,
        )
    }
}

/// #SS(0) for the stack segment, #GP(0) for the others.
pub(crate) fn segment_fault(segment: u8) -> Stop {
    coded(
        if segment == SS {
            Vector::SS
        } else {
            Vector::GP
        },
        0,
    )
}

/// Whether bits 63..47 are all equal.
#[inline]
pub(crate) fn is_canonical(linear: u64) -> bool {
    ((linear << 16) as i64 >> 16) as u64 == linear
}

fn type_allows(segment: &Segment, write: bool) -> bool {
    let attributes = segment.attributes;
    let writable = attributes.kind() & 2 != 0;
    !attributes.unusable()
        && match (attributes.is_code(), write) {
            (true, true) => false,
            (true, false) => writable, // bit 1 of a code segment: readable
            (false, true) => writable,
            (false, false) => true,
        }
}

/// Whether all of `len` bytes at `offset` lie within a segment's limit.
pub(crate) fn within_limit(segment: &Segment, offset: u64, len: usize, protected: bool) -> bool {
    let last = offset.wrapping_add(len as u64 - 1);
    let attributes = segment.attributes;
    let expands_down = protected && !attributes.is_code() && attributes.kind() & 4 != 0;
    if expands_down {
        let top = if attributes.db() { 0xffff_ffff } else { 0xffff };
        offset > u64::from(segment.limit) && last <= top
    } else {
        last <= u64::from(segment.limit)
    }
}
