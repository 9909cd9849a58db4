//! Exit statistics, to read.
//!
//! Purpose: [`ExitCounts`] as a table in the manner of `perf kvm stat`, and as values for JSON: per reason, and within it per
//! port, MMIO page or MSR: how often, which share, time in the guest before, time in the monitor after.
//! Invariants: most frequent first; what is equally frequent stays in the order of reasons and sites, so that equal counts give
//! equal text. Times are the host's and differ from run to run.
//! Elsewhere: counting ([`machine::exit_counts`]); drawing (`tui`).

use machine::exit_counts::{ExitCounts, ExitSite, Tally};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;
use x86::{ExitReason, msr};

/// The exits of a run.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct ExitReport {
    /// All of them.
    pub total: Figures,
    /// By reason, most frequent first.
    pub reasons: Vec<ReasonReport>,
}

/// The exits of one reason.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct ReasonReport {
    /// The reason's name (`IO_INSTRUCTION`).
    pub reason: &'static str,
    /// The Intel SDM's basic exit reason, where there is one.
    pub sdm_number: Option<u16>,
    /// Count and times.
    #[serde(flatten)]
    pub figures: Figures,
    /// By site, most frequent first; empty where the reason has none.
    pub sites: Vec<SiteReport>,
}

/// The exits of one reason at one port, page or MSR.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct SiteReport {
    /// Where.
    #[serde(flatten)]
    pub site: Site,
    /// What is customarily found there (`COM1`), if anything is.
    pub name: Option<&'static str>,
    /// Count and times.
    #[serde(flatten)]
    pub figures: Figures,
}

/// A place that exits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// IN, or an MMIO read.
    Read,
    /// OUT, or an MMIO write.
    Write,
}

/// Where exits of a reason come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "site", rename_all = "snake_case")]
pub enum Site {
    /// A port.
    Port {
        /// Its number.
        port: u16,
        /// IN or OUT.
        direction: Direction,
    },
    /// A 4 KiB page of guest-physical addresses.
    MmioPage {
        /// The page's first address.
        address: u64,
        /// Read or write.
        direction: Direction,
    },
    /// An MSR.
    Msr {
        /// Its number.
        msr: u32,
    },
}

/// How often and how long.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub struct Figures {
    /// Exits.
    pub count: u64,
    /// Their share of all exits, 0..=1.
    pub share: f64,
    /// Time in the guest that ended with them, in nanoseconds.
    pub guest_ns: u64,
    /// Time in the monitor handling them, in nanoseconds.
    pub monitor_ns: u64,
    /// `monitor_ns / count`, in nanoseconds.
    pub mean_monitor_ns: u64,
}

impl Figures {
    fn new(tally: Tally, all: u64) -> Self {
        let monitor_ns = nanos(tally.monitor);
        Self {
            count: tally.count,
            share: if all == 0 {
                0.0
            } else {
                tally.count as f64 / all as f64
            },
            guest_ns: nanos(tally.guest),
            monitor_ns,
            mean_monitor_ns: monitor_ns.checked_div(tally.count).unwrap_or(0),
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl ExitReport {
    /// The report on `counts`.
    pub fn of(counts: &ExitCounts) -> Self {
        let total = counts.total();
        let mut by_reason: BTreeMap<ExitReason, (Tally, Vec<SiteReport>)> = BTreeMap::new();
        for (reason, site, tally) in counts.iter() {
            let (sum, sites) = by_reason.entry(reason).or_default();
            sum.count += tally.count;
            sum.guest += tally.guest;
            sum.monitor += tally.monitor;
            if let Some(site) = Site::of(site) {
                let figures = Figures::new(tally, total.count);
                sites.push(SiteReport {
                    site,
                    name: site.customary_name(),
                    figures,
                });
            }
        }
        let mut reasons: Vec<_> = by_reason
            .into_iter()
            .map(|(reason, (tally, mut sites))| {
                sites.sort_by_key(|site| std::cmp::Reverse(site.figures.count));
                ReasonReport {
                    reason: reason.name(),
                    sdm_number: reason.sdm_number(),
                    figures: Figures::new(tally, total.count),
                    sites,
                }
            })
            .collect();
        reasons.sort_by_key(|reason| std::cmp::Reverse(reason.figures.count));
        Self {
            total: Figures::new(total, total.count),
            reasons,
        }
    }

    /// The table's lines without its heading, for a caller with columns of its own: indent, name, figures.
    pub fn lines(&self) -> impl Iterator<Item = (bool, String, Figures)> + '_ {
        self.reasons.iter().flat_map(|reason| {
            let own = (false, reason.reason.to_owned(), reason.figures);
            let sites = reason
                .sites
                .iter()
                .map(|site| (true, site.to_string(), site.figures));
            std::iter::once(own).chain(sites)
        })
    }
}

impl fmt::Display for ExitReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self
            .lines()
            .map(|(site, name, _)| name.chars().count() + if site { 2 } else { 0 })
            .max()
            .unwrap_or(0)
            .max(20);
        writeln!(
            f,
            "{:width$} {:>12} {:>7} {:>10} {:>10} {:>10}",
            "EXIT", "COUNT", "SHARE", "IN GUEST", "IN MONITOR", "MEAN"
        )?;
        let total = (false, "total".to_owned(), self.total);
        for (site, name, figures) in self.lines().chain(std::iter::once(total)) {
            let name = if site { format!("  {name}") } else { name };
            writeln!(f, "{name:width$} {figures}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Figures {
    /// The columns count, share, in guest, in monitor, mean.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:>12} {:>6.2}% {:>10} {:>10} {:>10}",
            grouped(self.count),
            self.share * 100.0,
            duration(self.guest_ns),
            duration(self.monitor_ns),
            duration(self.mean_monitor_ns)
        )
    }
}

impl fmt::Display for SiteReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.site {
            Site::Port {
                port,
                direction: Direction::Read,
            } => write!(f, "in  {port:#06x}"),
            Site::Port {
                port,
                direction: Direction::Write,
            } => write!(f, "out {port:#06x}"),
            Site::MmioPage {
                address,
                direction: Direction::Read,
            } => {
                write!(f, "read  {address:#x}")
            }
            Site::MmioPage {
                address,
                direction: Direction::Write,
            } => {
                write!(f, "write {address:#x}")
            }
            Site::Msr { msr } => write!(f, "{msr:#x}"),
        }?;
        match self.name {
            Some(name) => write!(f, " {name}"),
            None => Ok(()),
        }
    }
}

impl Site {
    fn of(site: ExitSite) -> Option<Self> {
        let direction = |write| {
            if write {
                Direction::Write
            } else {
                Direction::Read
            }
        };
        Some(match site {
            ExitSite::None => return None,
            ExitSite::Port(port, write) => Self::Port {
                port,
                direction: direction(write),
            },
            ExitSite::MmioPage(page, write) => Self::MmioPage {
                address: page.base().get(),
                direction: direction(write),
            },
            ExitSite::Msr(msr) => Self::Msr { msr },
        })
    }

    /// What a PC has there.
    fn customary_name(self) -> Option<&'static str> {
        match self {
            Self::Port { port, .. } => port_name(port),
            Self::MmioPage {
                address: 0xfec0_0000,
                ..
            } => Some("I/O APIC"),
            Self::MmioPage {
                address: 0xfee0_0000,
                ..
            } => Some("local APIC"),
            Self::MmioPage { .. } => None,
            Self::Msr { msr } => msr_name(msr),
        }
    }
}

/// What a PC has at a port (the ISA I/O map; E9h and F4h as QEMU and Bochs have them).
pub const fn port_name(port: u16) -> Option<&'static str> {
    Some(match port {
        0x00..=0x0f | 0xc0..=0xdf => "DMA",
        0x20..=0x21 => "PIC 1",
        0xa0..=0xa1 => "PIC 2",
        0x40..=0x43 => "PIT",
        0x60 | 0x64 => "i8042",
        0x61 => "port B",
        0x70..=0x71 => "RTC",
        0x80 => "POST",
        0x92 => "port A",
        0xe9 => "debug console",
        0xf4 => "debug exit",
        0x1f0..=0x1f7 | 0x3f6 => "IDE 1",
        0x170..=0x177 | 0x376 => "IDE 2",
        0x2f8..=0x2ff => "COM2",
        0x3f8..=0x3ff => "COM1",
        0x3b0..=0x3df => "VGA",
        0x505 => "pvpanic",
        0xcf8..=0xcff => "PCI",
        _ => return None,
    })
}

/// An MSR's name in the Intel SDM, volume 4.
pub const fn msr_name(msr: u32) -> Option<&'static str> {
    Some(match msr {
        msr::index::IA32_TIME_STAMP_COUNTER => "IA32_TIME_STAMP_COUNTER",
        msr::index::IA32_APIC_BASE => "IA32_APIC_BASE",
        msr::index::IA32_BIOS_SIGN_ID => "IA32_BIOS_SIGN_ID",
        msr::index::IA32_MTRRCAP => "IA32_MTRRCAP",
        msr::index::IA32_SYSENTER_CS => "IA32_SYSENTER_CS",
        msr::index::IA32_SYSENTER_ESP => "IA32_SYSENTER_ESP",
        msr::index::IA32_SYSENTER_EIP => "IA32_SYSENTER_EIP",
        msr::index::IA32_MISC_ENABLE => "IA32_MISC_ENABLE",
        msr::index::IA32_PAT => "IA32_PAT",
        msr::index::IA32_EFER => "IA32_EFER",
        msr::index::IA32_STAR => "IA32_STAR",
        msr::index::IA32_LSTAR => "IA32_LSTAR",
        msr::index::IA32_CSTAR => "IA32_CSTAR",
        msr::index::IA32_FMASK => "IA32_FMASK",
        msr::index::IA32_FS_BASE => "IA32_FS_BASE",
        msr::index::IA32_GS_BASE => "IA32_GS_BASE",
        msr::index::IA32_KERNEL_GS_BASE => "IA32_KERNEL_GS_BASE",
        msr::index::IA32_TSC_AUX => "IA32_TSC_AUX",
        _ => return None,
    })
}

/// `1234567` as `1,234,567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Nanoseconds with a fitting unit and three significant digits or more: `950 ns`, `1.23 us`, `45.60 ms`, `12.34 s`.
pub fn duration(ns: u64) -> String {
    let scaled = |unit: u64| ns as f64 / unit as f64;
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{:.2} us", scaled(1_000)),
        1_000_000..1_000_000_000 => format!("{:.2} ms", scaled(1_000_000)),
        _ => format!("{:.2} s", scaled(1_000_000_000)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86::exit::AccessData;
    use x86::{Exit, GuestPhysAddr};

    fn counts() -> ExitCounts {
        let mut counts = ExitCounts::default();
        let us = Duration::from_micros;
        for _ in 0..1500 {
            let data = AccessData {
                value: 0x41,
                size: 1,
            };
            counts.add(&Exit::IoOut { port: 0x3f8, data }, us(2), us(1));
        }
        for _ in 0..400 {
            counts.add(
                &Exit::IoIn {
                    port: 0x3fd,
                    size: 1,
                },
                us(1),
                us(3),
            );
        }
        for _ in 0..99 {
            let data = AccessData { value: 0, size: 4 };
            let addr = GuestPhysAddr::new(0xfee0_00b0);
            counts.add(&Exit::MmioWrite { addr, data }, us(50), us(4));
        }
        counts.add(
            &Exit::Hlt,
            Duration::from_millis(12),
            Duration::from_secs(2),
        );
        counts
    }

    #[test]
    fn the_table_reads_like_perf_kvm_stat() {
        let text = ExitReport::of(&counts()).to_string();
        let expected = "\
EXIT                                 COUNT   SHARE   IN GUEST IN MONITOR       MEAN
IO_INSTRUCTION                       1,900  95.00%    3.40 ms    2.70 ms    1.42 us
  out 0x03f8 COM1                    1,500  75.00%    3.00 ms    1.50 ms    1.00 us
  in  0x03fd COM1                      400  20.00%  400.00 us    1.20 ms    3.00 us
MMIO                                    99   4.95%    4.95 ms  396.00 us    4.00 us
  write 0xfee00000 local APIC           99   4.95%    4.95 ms  396.00 us    4.00 us
HLT                                      1   0.05%   12.00 ms     2.00 s     2.00 s
total                                2,000 100.00%   20.35 ms     2.00 s    1.00 ms
";
        assert_eq!(text, expected);
    }

    #[test]
    fn json_has_one_object_per_reason_with_its_sites() {
        let json = serde_json::to_value(ExitReport::of(&counts())).expect("serialises");
        assert_eq!(json["total"]["count"], 2000);
        let io = &json["reasons"][0];
        assert_eq!(
            (&io["reason"], &io["sdm_number"]),
            (&"IO_INSTRUCTION".into(), &30.into())
        );
        let out = serde_json::json!({
            "site": "port", "port": 0x3f8, "direction": "write", "name": "COM1", "count": 1500,
            "share": 0.75, "guest_ns": 3_000_000, "monitor_ns": 1_500_000, "mean_monitor_ns": 1000,
        });
        assert_eq!(io["sites"][0], out);
        assert_eq!(
            json["reasons"][1]["sdm_number"],
            serde_json::Value::Null,
            "MMIO is KVM's name"
        );
    }

    #[test]
    fn nothing_counted_is_a_table_too() {
        let report = ExitReport::of(&ExitCounts::default());
        assert_eq!(report.total, Figures::default(), "no division by zero");
        assert_eq!(report.to_string().lines().count(), 2);
    }

    #[test]
    fn units_and_groups() {
        for (ns, text) in [
            (0, "0 ns"),
            (999, "999 ns"),
            (1_234, "1.23 us"),
            (45_600_000, "45.60 ms"),
            (u64::MAX, "18446744073.71 s"),
        ] {
            assert_eq!(duration(ns), text);
        }
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(123), "123");
        assert_eq!(grouped(1_234_567), "1,234,567");
    }
}
