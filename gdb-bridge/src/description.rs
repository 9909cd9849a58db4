//! The target description: what gdb is told of the registers.
//!
//! Purpose: `target.xml`, made from the list of registers, so that names, sizes and numbers cannot disagree with what is exchanged.
//! Invariants: only registers that can be read and written are described.
//! Elsewhere: their values (`registers.rs`).
//! Source: "Debugging with gdb", appendix G (target descriptions), G.5.6 (i386 features); Intel SDM vol. 3A, 2.3 and 2.5 for flag names.

use crate::registers::Register;
use std::fmt::Write;
use std::sync::LazyLock;

/// The document gdb asks for as `target.xml`.
pub(crate) fn target_xml() -> &'static str {
    static XML: LazyLock<String> = LazyLock::new(|| {
        let mut xml = String::from(
            "<?xml version=\"1.0\"?>\n<!DOCTYPE target SYSTEM \"gdb-target.dtd\">\n\
             <target version=\"1.0\">\n<architecture>i386:x86-64</architecture>\n",
        );
        for feature in [
            Feature::Core,
            Feature::Sse,
            Feature::Segments,
            Feature::System,
        ] {
            // Writing to a string does not fail.
            let _ = feature.describe(&mut xml);
        }
        xml.push_str("</target>\n");
        xml
    });
    &XML
}

/// A group of registers under a name gdb knows, or under ours.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Feature {
    Core,
    Sse,
    Segments,
    System,
}

impl Feature {
    const fn of(register: Register) -> Self {
        match register {
            Register::Gpr(_)
            | Register::Rip
            | Register::Eflags
            | Register::Segment(_)
            | Register::St(_)
            | Register::Fpu(_) => Self::Core,
            Register::Xmm(_) | Register::Mxcsr => Self::Sse,
            Register::FsBase | Register::GsBase => Self::Segments,
            Register::KernelGsBase
            | Register::Cr0
            | Register::Cr2
            | Register::Cr3
            | Register::Cr4
            | Register::Cr8
            | Register::Efer => Self::System,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Core => "org.gnu.gdb.i386.core",
            Self::Sse => "org.gnu.gdb.i386.sse",
            Self::Segments => "org.gnu.gdb.i386.segments",
            Self::System => "org.chronovisor.i386.system",
        }
    }

    fn describe(self, xml: &mut String) -> std::fmt::Result {
        writeln!(xml, "<feature name=\"{}\">", self.name())?;
        xml.push_str(self.types());
        for (number, register) in Register::all().enumerate() {
            if Self::of(register) == self {
                let bits = 8 * register.size();
                let (name, kind) = (register.name(), kind(register));
                write!(
                    xml,
                    "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\" regnum=\"{number}\""
                )?;
                if let Register::Fpu(_) = register {
                    xml.push_str(" group=\"float\"");
                }
                xml.push_str("/>\n");
            }
        }
        xml.push_str("</feature>\n");
        Ok(())
    }

    const fn types(self) -> &'static str {
        match self {
            Self::Core => CORE_TYPES,
            Self::Sse => SSE_TYPES,
            Self::Segments => "",
            Self::System => SYSTEM_TYPES,
        }
    }
}

const fn kind(register: Register) -> &'static str {
    match register {
        Register::Gpr(gpr) => match gpr {
            x86::Gpr::Rbp | x86::Gpr::Rsp => "data_ptr",
            _ => "int64",
        },
        Register::Rip => "code_ptr",
        Register::Eflags => "i386_eflags",
        Register::Segment(_) | Register::Fpu(_) => "int32",
        Register::St(_) => "i387_ext",
        Register::Xmm(_) => "vec128",
        Register::Mxcsr => "i386_mxcsr",
        Register::FsBase | Register::GsBase => "int",
        Register::KernelGsBase | Register::Cr2 | Register::Cr3 | Register::Cr8 => "uint64",
        Register::Cr0 => "cr0_flags",
        Register::Cr4 => "cr4_flags",
        Register::Efer => "efer_flags",
    }
}

macro_rules! flags {
    ($id:literal, $size:literal, $($name:literal $bit:literal)*) => {
        concat!(
            "<flags id=\"", $id, "\" size=\"", $size, "\">\n",
            $("<field name=\"", $name, "\" start=\"", $bit, "\" end=\"", $bit, "\"/>\n",)*
            "</flags>\n"
        )
    };
}

const CORE_TYPES: &str = flags!(
    "i386_eflags", 4,
    "CF" 0 "" 1 "PF" 2 "AF" 4 "ZF" 6 "SF" 7 "TF" 8 "IF" 9 "DF" 10 "OF" 11 "NT" 14 "RF" 16 "VM" 17
    "AC" 18 "VIF" 19 "VIP" 20 "ID" 21
);

const SSE_TYPES: &str = concat!(
    "<vector id=\"v4f\" type=\"ieee_single\" count=\"4\"/>\n",
    "<vector id=\"v2d\" type=\"ieee_double\" count=\"2\"/>\n",
    "<vector id=\"v16i8\" type=\"int8\" count=\"16\"/>\n",
    "<vector id=\"v8i16\" type=\"int16\" count=\"8\"/>\n",
    "<vector id=\"v4i32\" type=\"int32\" count=\"4\"/>\n",
    "<vector id=\"v2i64\" type=\"int64\" count=\"2\"/>\n",
    "<union id=\"vec128\">\n",
    "<field name=\"v4_float\" type=\"v4f\"/>\n",
    "<field name=\"v2_double\" type=\"v2d\"/>\n",
    "<field name=\"v16_int8\" type=\"v16i8\"/>\n",
    "<field name=\"v8_int16\" type=\"v8i16\"/>\n",
    "<field name=\"v4_int32\" type=\"v4i32\"/>\n",
    "<field name=\"v2_int64\" type=\"v2i64\"/>\n",
    "<field name=\"uint128\" type=\"uint128\"/>\n",
    "</union>\n",
    flags!(
        "i386_mxcsr", 4,
        "IE" 0 "DE" 1 "ZE" 2 "OE" 3 "UE" 4 "PE" 5 "DAZ" 6 "IM" 7 "DM" 8 "ZM" 9 "OM" 10 "UM" 11 "PM" 12
        "FZ" 15
    )
);

const SYSTEM_TYPES: &str = concat!(
    flags!(
        "cr0_flags", 8,
        "PE" 0 "MP" 1 "EM" 2 "TS" 3 "ET" 4 "NE" 5 "WP" 16 "AM" 18 "NW" 29 "CD" 30 "PG" 31
    ),
    flags!(
        "cr4_flags", 8,
        "VME" 0 "PVI" 1 "TSD" 2 "DE" 3 "PSE" 4 "PAE" 5 "MCE" 6 "PGE" 7 "PCE" 8 "OSFXSR" 9
        "OSXMMEXCPT" 10 "UMIP" 11 "LA57" 12 "VMXE" 13 "FSGSBASE" 16 "PCIDE" 17 "OSXSAVE" 18 "SMEP" 20
        "SMAP" 21
    ),
    flags!("efer_flags", 8, "SCE" 0 "LME" 8 "LMA" 10 "NXE" 11)
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_is_described_once() {
        let xml = target_xml();
        for register in Register::all() {
            let entry = format!("<reg name=\"{}\" ", register.name());
            assert_eq!(xml.matches(&entry).count(), 1, "{entry}");
        }
        assert_eq!(xml.matches("<reg ").count(), Register::all().count());
    }
}
