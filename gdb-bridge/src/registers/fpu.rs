//! x87 registers in gdb's form.
//!
//! Purpose: FXSAVE's abridged tag word and 64-bit pointers, and gdb's full tag word and 32-bit parts, made out of each other.
//! Invariants: reading and writing back changes nothing.
//! Elsewhere: the state itself ([`x86::FpuState`]).
//! Source: Intel SDM vol. 1, 8.1.7 (tag word), 10.5.1.1 and table 10-1 (FXSAVE's abridged tags); vol. 2A, FXSAVE (FIP and FDP in 64-bit form).

use super::{Refused, within};
use x86::FpuState;

/// The registers gdb groups as x87 control registers, in its order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FpuControl {
    Fctrl,
    Fstat,
    Ftag,
    /// Upper half of the 64-bit instruction pointer.
    Fiseg,
    /// Lower half.
    Fioff,
    /// Upper half of the 64-bit data pointer.
    Foseg,
    /// Lower half.
    Fooff,
    Fop,
}

impl FpuControl {
    pub(crate) const ALL: [Self; 8] = [
        Self::Fctrl,
        Self::Fstat,
        Self::Ftag,
        Self::Fiseg,
        Self::Fioff,
        Self::Foseg,
        Self::Fooff,
        Self::Fop,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Fctrl => "fctrl",
            Self::Fstat => "fstat",
            Self::Ftag => "ftag",
            Self::Fiseg => "fiseg",
            Self::Fioff => "fioff",
            Self::Foseg => "foseg",
            Self::Fooff => "fooff",
            Self::Fop => "fop",
        }
    }

    pub(crate) fn get(self, fpu: &FpuState) -> u32 {
        match self {
            Self::Fctrl => u32::from(fpu.fcw),
            Self::Fstat => u32::from(fpu.fsw),
            Self::Ftag => u32::from(full_tags(fpu)),
            Self::Fiseg => (fpu.fip >> 32) as u32,
            Self::Fioff => fpu.fip as u32,
            Self::Foseg => (fpu.fdp >> 32) as u32,
            Self::Fooff => fpu.fdp as u32,
            Self::Fop => u32::from(fpu.fop),
        }
    }

    pub(crate) fn set(self, fpu: &mut FpuState, value: u32) -> Result<(), Refused> {
        let short = |mask: u64| within(u64::from(value), mask).map(|value| value as u16);
        match self {
            Self::Fctrl => fpu.fcw = short(0xffff)?,
            Self::Fstat => fpu.fsw = short(0xffff)?,
            Self::Ftag => fpu.ftw = abridged_tags(short(0xffff)?),
            Self::Fiseg => set_half(&mut fpu.fip, value, 32),
            Self::Fioff => set_half(&mut fpu.fip, value, 0),
            Self::Foseg => set_half(&mut fpu.fdp, value, 32),
            Self::Fooff => set_half(&mut fpu.fdp, value, 0),
            Self::Fop => fpu.fop = short(0x7ff)?,
        }
        Ok(())
    }
}

fn set_half(pointer: &mut u64, value: u32, shift: u32) {
    *pointer = *pointer & !(0xffff_ffff << shift) | u64::from(value) << shift;
}

/// ST(`n`), in the low ten bytes.
pub(crate) fn st(fpu: &FpuState, n: u8) -> u128 {
    fpu.st
        .get(usize::from(n))
        .and_then(|bytes| super::from_le_bytes(bytes))
        .unwrap_or(0)
}

/// Sets ST(`n`) to the low ten bytes.
pub(crate) fn set_st(fpu: &mut FpuState, n: u8, value: u128) {
    if let Some(st) = fpu.st.get_mut(usize::from(n)) {
        for (byte, new) in st.iter_mut().zip(value.to_le_bytes()) {
            *byte = new;
        }
    }
}

/// Tag of an empty register; 0 is a valid number, 1 zero, 2 special.
const EMPTY: u16 = 3;

/// Two bits for each physical register, from the abridged tags and the registers' contents.
fn full_tags(fpu: &FpuState) -> u16 {
    let top = (fpu.fsw >> 11 & 7) as u8;
    (0..8u8).fold(0, |tags, physical| {
        let tag = if fpu.ftw >> physical & 1 == 0 {
            EMPTY
        } else {
            tag(st(fpu, physical.wrapping_sub(top) & 7))
        };
        tags | tag << (2 * physical)
    })
}

fn tag(value: u128) -> u16 {
    let exponent = (value >> 64) as u16 & 0x7fff;
    let mantissa = value as u64;
    match (exponent, mantissa) {
        (0, 0) => 1,
        (0 | 0x7fff, _) => 2,
        (_, mantissa) if mantissa >> 63 == 0 => 2,
        _ => 0,
    }
}

fn abridged_tags(full: u16) -> u8 {
    (0..8).fold(0, |tags, physical| {
        tags | u8::from(full >> (2 * physical) & 3 != EMPTY) << physical
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_describe_the_physical_registers() {
        let mut fpu = FpuState {
            fsw: 6 << 11,
            ftw: 0b1100_0001,
            ..FpuState::default()
        };
        set_st(&mut fpu, 0, 0x3fff_8000_0000_0000_0000); // 1.0, physical 6
        set_st(&mut fpu, 1, 0); // physical 7
        set_st(&mut fpu, 2, 0x7fff_8000_0000_0000_0000); // infinity, physical 0
        assert_eq!(FpuControl::Ftag.get(&fpu), 0b01_00_11_11_11_11_11_10);
    }

    #[test]
    fn writing_back_what_was_read_changes_nothing() {
        let mut fpu = FpuState {
            fcw: 0x37f,
            fsw: 0x3800,
            ftw: 0x81,
            fop: 0x1d9,
            fip: 0x1234_5678_9abc_def0,
            fdp: 0xfedc_ba98_7654_3210,
            ..FpuState::default()
        };
        let before = fpu.clone();
        for control in FpuControl::ALL {
            let value = control.get(&fpu);
            assert_eq!(control.set(&mut fpu, value), Ok(()), "{control:?}");
        }
        assert_eq!(fpu, before);
        assert_eq!(
            FpuControl::Fop.set(&mut fpu, 0x800),
            Err(Refused),
            "eleven bits"
        );
    }
}
