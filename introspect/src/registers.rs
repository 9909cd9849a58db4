//! Registers, bit by bit.
//!
//! Purpose: every register of a CPU as name, value and meaning: flags and control bits by their names, segments with what their hidden
//! parts say, the state behind the registers (halted, interrupt shadow, pending exception).
//! Invariants: the items of a CPU come in a fixed order and their number depends on its mode only, so that two stops can be compared item by
//! item. Bits set without a name are shown by number, never dropped.
//! Elsewhere: changing registers (`gdb-bridge`); which ones changed (`tui`).
//! Source: Intel SDM vol. 1, 3.4.3 (RFLAGS); vol. 3A, 2.5 (control registers), 3.4.5.1 (segment types), 2.2.1 (EFER), 17.2 (debug registers).

use bitflags::Flags;
use serde::Serialize;
use std::fmt;
use x86::regs::{Cr4, rflags};
use x86::segment::SegmentAttributes;
use x86::{Activity, CpuMode, CpuState, Gpr, InterruptShadow, Segment, SegmentRegister};

/// What belongs together on a screen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// General registers and the instruction pointer.
    General,
    /// RFLAGS, mode and what the CPU is doing.
    State,
    /// Control registers and EFER.
    Control,
    /// Segment registers, TR and LDTR, GDTR and IDTR.
    Segments,
    /// Debug registers.
    Debug,
    /// Model-specific registers.
    Msrs,
}

/// One register.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Item {
    /// Where it belongs.
    pub group: Group,
    /// Its name, in lower case (`rax`, `cr0`).
    pub name: &'static str,
    /// Its value in hexadecimal, at the register's width; empty for state that is no register.
    pub value: String,
    /// What the value means; empty where it is just a number.
    pub meaning: String,
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = format!("{:<6} {} {}", self.name, self.value, self.meaning);
        f.write_str(line.trim_end())
    }
}

/// Every register of `cpu`.
pub fn items(cpu: &CpuState) -> Vec<Item> {
    let mut items = general(cpu);
    items.extend(state(cpu));
    items.extend(control(cpu));
    items.extend(segments(cpu));
    items.extend(debug(cpu));
    items.extend(msrs(cpu));
    items
}

/// General registers and the instruction pointer, under the names of the current mode.
fn general(cpu: &CpuState) -> Vec<Item> {
    let item = |name, value| Item {
        group: Group::General,
        name,
        value,
        meaning: String::new(),
    };
    let regs = &cpu.regs;
    if cpu.mode() == CpuMode::Long64 {
        let gprs = Gpr::ALL
            .iter()
            .map(|&gpr| item(gpr.name(), hex64(regs[gpr])));
        gprs.chain(std::iter::once(item("rip", hex64(regs.rip))))
            .collect()
    } else {
        const NAMES: [&str; 8] = ["eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi"];
        let gprs = Gpr::ALL
            .iter()
            .zip(NAMES)
            .map(|(&gpr, name)| item(name, hex32(regs[gpr])));
        gprs.chain(std::iter::once(item("eip", hex32(regs.rip))))
            .collect()
    }
}

fn state(cpu: &CpuState) -> Vec<Item> {
    let item = |name, value, meaning: String| Item {
        group: Group::State,
        name,
        value,
        meaning,
    };
    vec![
        item("flags", hex32(cpu.regs.rflags), flags_text(cpu.regs.rflags)),
        item(
            "mode",
            String::new(),
            format!("{}, CPL {}", mode_text(cpu.mode()), cpu.cpl()),
        ),
        item("cpu", String::new(), activity_text(cpu)),
    ]
}

/// RFLAGS by name, the lowest bit last as on paper: `ID IF ZF PF IOPL 3`; `-` for none.
pub fn flags_text(value: u64) -> String {
    const NAMED: [(u64, &str); 16] = [
        (rflags::ID, "ID"),
        (rflags::VIP, "VIP"),
        (rflags::VIF, "VIF"),
        (rflags::AC, "AC"),
        (rflags::VM, "VM"),
        (rflags::RF, "RF"),
        (rflags::NT, "NT"),
        (rflags::OF, "OF"),
        (rflags::DF, "DF"),
        (rflags::IF, "IF"),
        (rflags::TF, "TF"),
        (rflags::SF, "SF"),
        (rflags::ZF, "ZF"),
        (rflags::AF, "AF"),
        (rflags::PF, "PF"),
        (rflags::CF, "CF"),
    ];
    let mut names: Vec<String> = NAMED
        .iter()
        .filter(|(bit, _)| value & bit != 0)
        .map(|(_, name)| (*name).to_owned())
        .collect();
    if value & rflags::IOPL != 0 {
        names.push(format!("IOPL {}", (value & rflags::IOPL) >> 12));
    }
    let known = NAMED
        .iter()
        .fold(rflags::IOPL | rflags::FIXED, |bits, (bit, _)| bits | bit);
    names.extend(unnamed(value & !known));
    or_dash(names)
}

/// The mode in words.
pub const fn mode_text(mode: CpuMode) -> &'static str {
    match mode {
        CpuMode::Real => "real mode",
        CpuMode::Virtual8086 => "virtual-8086 mode",
        CpuMode::Protected16 => "16-bit protected mode",
        CpuMode::Protected32 => "32-bit protected mode",
        CpuMode::Compatibility => "compatibility mode",
        CpuMode::Long64 => "64-bit mode",
    }
}

fn activity_text(cpu: &CpuState) -> String {
    let mut text = match cpu.activity {
        Activity::Active => "executing",
        Activity::Halted => "halted",
        Activity::Shutdown => "shut down",
    }
    .to_owned();
    match cpu.shadow {
        InterruptShadow::None => {}
        InterruptShadow::Sti => text.push_str(", interrupts held off by STI"),
        InterruptShadow::MovSs => text.push_str(", interrupts held off by MOV SS"),
    }
    if cpu.nmi_blocked {
        text.push_str(", in an NMI handler");
    }
    if let Some(pending) = cpu.pending {
        text.push_str(&format!(", {pending} pending"));
    }
    text
}

fn control(cpu: &CpuState) -> Vec<Item> {
    let item = |name, value, meaning| Item {
        group: Group::Control,
        name,
        value,
        meaning,
    };
    vec![
        item("cr0", hex32(cpu.cr0.bits()), bit_names(&cpu.cr0)),
        item("cr2", hex64(cpu.cr2), String::new()),
        item("cr3", hex64(cpu.cr3), cr3_text(cpu)),
        item("cr4", hex32(cpu.cr4.bits()), bit_names(&cpu.cr4)),
        item("cr8", hex32(u64::from(cpu.cr8)), String::new()),
        item("efer", hex32(cpu.efer.bits()), bit_names(&cpu.efer)),
    ]
}

fn cr3_text(cpu: &CpuState) -> String {
    let low = cpu.cr3 & 0xfff;
    if cpu.cr4.contains(Cr4::PCIDE) {
        return format!("PCID {low}");
    }
    let mut names = Vec::new();
    for (bit, name) in [(1 << 4, "PCD"), (1 << 3, "PWT")] {
        if low & bit != 0 {
            names.push(name);
        }
    }
    names.join(" ")
}

/// The names of the set bits, highest first, nameless ones as `bit 12`.
fn bit_names<F: Flags<Bits = u64> + Copy>(value: &F) -> String {
    let mut names: Vec<String> = value
        .iter_names()
        .map(|(name, _)| name.to_owned())
        .collect();
    names.reverse();
    let known = F::FLAGS
        .iter()
        .fold(0, |bits, flag| bits | flag.value().bits());
    names.extend(unnamed(value.bits() & !known));
    or_dash(names)
}

fn unnamed(bits: u64) -> impl Iterator<Item = String> {
    (0..64)
        .filter(move |bit| bits >> bit & 1 != 0)
        .map(|bit| format!("bit {bit}"))
}

fn or_dash(names: Vec<String>) -> String {
    if names.is_empty() {
        "-".to_owned()
    } else {
        names.join(" ")
    }
}

fn segments(cpu: &CpuState) -> Vec<Item> {
    let item = |name, value, meaning| Item {
        group: Group::Segments,
        name,
        value,
        meaning,
    };
    const NAMES: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];
    const SHOWN: [SegmentRegister; 6] = [
        SegmentRegister::Cs,
        SegmentRegister::Ss,
        SegmentRegister::Ds,
        SegmentRegister::Es,
        SegmentRegister::Fs,
        SegmentRegister::Gs,
    ];
    let mut items: Vec<_> = SHOWN
        .iter()
        .map(|&register| {
            let segment = cpu.segment(register);
            item(
                NAMES[register as usize],
                hex16(segment.selector),
                segment_text(segment),
            )
        })
        .collect();
    for (name, segment) in [("tr", &cpu.tr), ("ldtr", &cpu.ldtr)] {
        items.push(item(name, hex16(segment.selector), segment_text(segment)));
    }
    for (name, table) in [("gdtr", cpu.gdtr), ("idtr", cpu.idtr)] {
        items.push(item(
            name,
            hex64(table.base),
            format!("limit {:#x}", table.limit),
        ));
    }
    items
}

/// What a segment register's hidden part says: `64-bit code r-x DPL 0`.
pub fn segment_text(segment: &Segment) -> String {
    let attributes = segment.attributes;
    if attributes.unusable() {
        return match segment.base {
            0 => "null".to_owned(),
            base => format!("null, base {base:#x}"),
        };
    }
    let mut text = segment_kind(attributes);
    text.push_str(&format!(" DPL {}", attributes.dpl()));
    if segment.base != 0 {
        text.push_str(&format!(" base {:#x}", segment.base));
    }
    if segment.limit != u32::MAX {
        text.push_str(&format!(" limit {:#x}", segment.limit));
    }
    if !attributes.present() {
        text.push_str(" not present");
    }
    text
}

fn segment_kind(attributes: SegmentAttributes) -> String {
    let kind = attributes.kind();
    if !attributes.is_code_or_data() {
        return match kind {
            1 => "16-bit TSS",
            2 => "LDT",
            3 => "busy 16-bit TSS",
            9 => "TSS",
            11 => "busy TSS",
            other => return format!("system type {other}"),
        }
        .to_owned();
    }
    let width = match (attributes.is_code() && attributes.long(), attributes.db()) {
        (true, _) => "64-bit",
        (false, true) => "32-bit",
        (false, false) => "16-bit",
    };
    let (what, rights) = match (attributes.is_code(), kind & 2 != 0) {
        (true, true) => ("code", "r-x"),
        (true, false) => ("code", "--x"),
        (false, true) => ("data", "rw-"),
        (false, false) => ("data", "r--"),
    };
    let extra = match (attributes.is_code(), kind & 4 != 0) {
        (true, true) => " conforming",
        (false, true) => " expand-down",
        _ => "",
    };
    format!("{width} {what} {rights}{extra}")
}

fn debug(cpu: &CpuState) -> Vec<Item> {
    let item = |name, value, meaning| Item {
        group: Group::Debug,
        name,
        value,
        meaning,
    };
    const NAMES: [&str; 4] = ["dr0", "dr1", "dr2", "dr3"];
    let mut items: Vec<_> = NAMES
        .iter()
        .zip(cpu.dr)
        .map(|(name, value)| item(*name, hex64(value), String::new()))
        .collect();
    items.push(item("dr6", hex32(cpu.dr6), dr6_text(cpu.dr6)));
    items.push(item("dr7", hex32(cpu.dr7), dr7_text(cpu.dr7)));
    items
}

fn dr6_text(value: u64) -> String {
    let named = [
        (15, "BT"),
        (14, "BS"),
        (13, "BD"),
        (3, "B3"),
        (2, "B2"),
        (1, "B1"),
        (0, "B0"),
    ];
    let set = named.iter().filter(|(bit, _)| value >> bit & 1 != 0);
    or_dash(set.map(|(_, name)| (*name).to_owned()).collect())
}

fn dr7_text(value: u64) -> String {
    let mut names = Vec::new();
    for n in 0..4 {
        for (bit, name) in [(2 * n, 'L'), (2 * n + 1, 'G')] {
            if value >> bit & 1 != 0 {
                names.push(format!("{name}{n}"));
            }
        }
    }
    if value >> 13 & 1 != 0 {
        names.push("GD".to_owned());
    }
    or_dash(names)
}

fn msrs(cpu: &CpuState) -> Vec<Item> {
    let item = |name, value| Item {
        group: Group::Msrs,
        name,
        value: hex64(value),
        meaning: String::new(),
    };
    let msrs = &cpu.msrs;
    vec![
        item("star", msrs.star),
        item("lstar", msrs.lstar),
        item("cstar", msrs.cstar),
        item("fmask", msrs.fmask),
        item("kernel_gs_base", msrs.kernel_gs_base),
        item("sysenter_cs", msrs.sysenter_cs),
        item("sysenter_esp", msrs.sysenter_esp),
        item("sysenter_eip", msrs.sysenter_eip),
        item("pat", msrs.pat),
        item("apic_base", cpu.apic_base),
        item("tsc_aux", msrs.tsc_aux),
    ]
}

fn hex64(value: u64) -> String {
    format!("{value:016x}")
}

/// Eight digits, more if the value has them.
fn hex32(value: u64) -> String {
    format!("{value:08x}")
}

fn hex16(value: u16) -> String {
    format!("{value:04x}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::code_machine;
    use x86::Exception;
    use x86::regs::{Cr0, Efer};

    fn shown(cpu: &CpuState, name: &str) -> String {
        items(cpu)
            .iter()
            .find(|item| item.name == name)
            .expect("known name")
            .to_string()
    }

    #[test]
    fn power_on_state_in_words() {
        let cpu = CpuState::default();
        assert_eq!(shown(&cpu, "eip"), "eip    0000fff0");
        assert_eq!(shown(&cpu, "flags"), "flags  00000002 -");
        assert_eq!(shown(&cpu, "cr0"), "cr0    60000010 CD NW ET");
        assert_eq!(shown(&cpu, "mode"), "mode    real mode, CPL 0");
        assert_eq!(
            shown(&cpu, "cs"),
            "cs     f000 16-bit code r-x DPL 0 base 0xffff0000 limit 0xffff"
        );
        assert_eq!(shown(&cpu, "tr"), "tr     0000 busy TSS DPL 0 limit 0xffff");
        assert_eq!(shown(&cpu, "dr6"), "dr6    ffff0ff0 -");
    }

    #[test]
    fn long_mode_state_in_words() {
        let (mut cpu, _) = code_machine(&[]);
        cpu.regs.rflags |= rflags::IF | rflags::ZF | rflags::IOPL | 1 << 40;
        cpu.cr0 |= Cr0::from_bits_retain(1 << 8);
        cpu.efer |= Efer::SCE;
        cpu.cr3 |= 0x18;
        cpu.dr7 |= 0b1001;
        cpu.pending = Some(Exception::gp(0x18));
        cpu.activity = Activity::Halted;
        assert_eq!(shown(&cpu, "rip"), "rip    0000000000400000");
        assert_eq!(
            shown(&cpu, "flags"),
            "flags  10000003242 IF ZF IOPL 3 bit 40"
        );
        assert_eq!(shown(&cpu, "cr0"), "cr0    80010131 PG WP NE ET PE bit 8");
        assert_eq!(shown(&cpu, "cr3"), "cr3    0000000000001018 PCD PWT");
        assert_eq!(shown(&cpu, "efer"), "efer   00000d01 NXE LMA LME SCE");
        assert_eq!(shown(&cpu, "cs"), "cs     0008 64-bit code r-x DPL 0");
        assert_eq!(shown(&cpu, "dr7"), "dr7    00000409 L0 G1");
        assert_eq!(
            shown(&cpu, "cpu"),
            "cpu     halted, #GP (error code 0x18) pending"
        );
    }

    #[test]
    fn the_number_of_items_depends_on_the_mode_only() {
        let (long, _) = code_machine(&[]);
        let mut other = long.clone();
        other.regs.gpr = [u64::MAX; 16];
        other.regs.rflags = u64::MAX;
        other.dr7 = u64::MAX;
        let names = |cpu: &CpuState| items(cpu).iter().map(|i| i.name).collect::<Vec<_>>();
        assert_eq!(names(&long), names(&other));
    }
}
