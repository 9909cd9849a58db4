//! Symbols of a guest program.
//!
//! Purpose: addresses become `name+0x12`, and names become addresses, from an ELF file's symbol tables.
//! Invariants: the file is hostile. Memory used is bounded by a small multiple of the file's size (string tables may overlap
//! themselves without end), nothing panics, and demangled names are cut to [`MAX_NAME`] characters.
//! Elsewhere: loading the program (`vmm/machine`); types and lines of source, which gdb reads from the same file.
//! Source: System V ABI, chapter 4 (symbol table); Rust RFC 2603 and the Itanium-like legacy form (mangling).

use object::read::elf::{ElfFile, FileHeader};
use object::{Object, ObjectSection, ObjectSymbol, SectionIndex, SymbolKind, SymbolSection};
use std::collections::{BTreeSet, HashMap};
use std::fmt::{self, Write};
use x86::GuestVirtAddr;

/// Longer names are cut here, in bytes.
pub const MAX_NAME: usize = 512;

/// How many symbols before an address are tried until one whose size covers it is found.
const NESTING: usize = 16;

/// Why a file gave no symbols.
#[derive(Debug, thiserror::Error)]
pub enum SymbolsError {
    /// Not a readable ELF file.
    #[error("cannot read the ELF file's symbols: {0}")]
    Malformed(#[from] object::read::Error),
    /// Neither 32- nor 64-bit ELF.
    #[error("this is not an ELF file: it starts with {0:02x?}")]
    NotElf(Vec<u8>),
    /// For another processor.
    #[error("the ELF file is for machine {0}, not for x86 (3) or x86-64 (62)")]
    NotX86(u16),
    /// More bytes of names than an honest file can hold.
    #[error(
        "the ELF file's symbol names overlap without end: more than {limit} bytes of names \
         by symbol {symbol}"
    )]
    NamesTooLong {
        /// The bound, in bytes.
        limit: usize,
        /// The index of the symbol that passed it.
        symbol: usize,
    },
}

/// Text that is neither an address nor a known name.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ParseLocationError {
    /// No symbol of that name.
    #[error("no symbol is called {0:?}; write a symbol, symbol+0x12, or an address as 0x1234")]
    Unknown(String),
    /// What follows the plus sign is no number.
    #[error("{0:?} is not an offset; write symbol+0x12")]
    Offset(String),
}

/// What a symbol stands for; later ones win where several stand at one address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Rank {
    Label,
    Data,
    LocalCode,
    Code,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Entry {
    start: u64,
    /// First address behind it; equal to `start` for a symbol that only names a number.
    end: u64,
    rank: Rank,
    sized: bool,
    /// The mangled name, in `Symbols::names`.
    name: std::ops::Range<usize>,
}

/// The symbols of one program, by address.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Symbols {
    /// Sorted by address, then rank.
    entries: Vec<Entry>,
    names: String,
}

/// A symbol found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Symbol {
    /// The demangled name.
    pub name: String,
    /// Its first address.
    pub start: GuestVirtAddr,
    /// The address behind its last byte, as far as is known.
    pub end: GuestVirtAddr,
    /// A function (true) or data or a bare label.
    pub is_code: bool,
}

/// An address as symbol and offset. Displayed as `name+0x12`, or `name` at its start.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Location {
    /// The symbol.
    pub symbol: Symbol,
    /// Bytes past its start.
    pub offset: u64,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.symbol.name)?;
        if self.offset != 0 {
            write!(f, "+{:#x}", self.offset)?;
        }
        Ok(())
    }
}

impl Symbols {
    /// The symbols in the tables `.symtab` and `.dynsym` of an ELF file, both of them when there are both. A stripped file has none, which is no error.
    pub fn from_elf(file: &[u8]) -> Result<Self, SymbolsError> {
        match object::FileKind::parse(file) {
            Ok(object::FileKind::Elf32) => Self::read(
                &ElfFile::<object::elf::FileHeader32<object::Endianness>>::parse(file)?,
                file.len(),
            ),
            Ok(object::FileKind::Elf64) => Self::read(
                &ElfFile::<object::elf::FileHeader64<object::Endianness>>::parse(file)?,
                file.len(),
            ),
            _ => Err(SymbolsError::NotElf(file.iter().take(4).copied().collect())),
        }
    }

    fn read<'data, H: FileHeader<Endian = object::Endianness>>(
        elf: &ElfFile<'data, H>,
        file_len: usize,
    ) -> Result<Self, SymbolsError> {
        let machine = elf.elf_header().e_machine(elf.endian());
        if !matches!(machine, object::elf::EM_386 | object::elf::EM_X86_64) {
            return Err(SymbolsError::NotX86(machine.0));
        }
        let section_ends: HashMap<SectionIndex, u64> = elf
            .sections()
            .map(|section| {
                (
                    section.index(),
                    section.address().saturating_add(section.size()),
                )
            })
            .collect();
        // Honest files share at most suffixes, so names take less than the file itself.
        let limit = file_len.saturating_mul(2);
        let mut symbols = Self::default();
        for (index, symbol) in elf.symbols().chain(elf.dynamic_symbols()).enumerate() {
            let Some(rank) = rank(&symbol) else { continue };
            // An error ends it: a name without an end costs a search of the whole table each time.
            let name = symbol.name_bytes()?;
            if name.is_empty() {
                continue;
            }
            if symbols.names.len() + name.len() > limit {
                return Err(SymbolsError::NamesTooLong {
                    limit,
                    symbol: index,
                });
            }
            let from = symbols.names.len();
            symbols.names.push_str(&String::from_utf8_lossy(name));
            let start = symbol.address();
            let section_end = match symbol.section() {
                SymbolSection::Section(section) => section_ends.get(&section).copied(),
                _ => None,
            };
            symbols.entries.push(Entry {
                start,
                end: match symbol.size() {
                    0 => section_end.unwrap_or(start).max(start),
                    size => start.saturating_add(size),
                },
                rank,
                sized: symbol.size() != 0,
                name: from..symbols.names.len(),
            });
        }
        symbols.settle();
        Ok(symbols)
    }

    /// Sorts, and lets symbols without a size end where the next one starts.
    fn settle(&mut self) {
        let names = &self.names;
        self.entries.sort_by(|a, b| {
            (a.start, a.rank, a.sized)
                .cmp(&(b.start, b.rank, b.sized))
                .then_with(|| {
                    // Shorter and less mangled names last, which is where the lookup starts.
                    let name = |entry: &Entry| names.get(entry.name.clone()).map(str::len);
                    name(b).cmp(&name(a))
                })
        });
        self.entries.dedup_by(|a, b| {
            a.start == b.start
                && a.end == b.end
                && names.get(a.name.clone()) == names.get(b.name.clone())
        });
        let mut next_start = None;
        let mut current = None;
        for entry in self.entries.iter_mut().rev() {
            if current != Some(entry.start) {
                next_start = current;
                current = Some(entry.start);
            }
            if let (false, Some(next)) = (entry.sized, next_start) {
                entry.end = entry.end.min(next);
            }
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Every symbol, by address. Demangles each.
    pub fn iter(&self) -> impl Iterator<Item = Symbol> + '_ {
        self.entries.iter().map(|entry| self.symbol(entry))
    }

    /// The symbol that `addr` lies in.
    pub fn lookup(&self, addr: GuestVirtAddr) -> Option<Location> {
        let addr = addr.get();
        let after = self.entries.partition_point(|entry| entry.start <= addr);
        let entry = self
            .entries
            .get(..after)?
            .iter()
            .rev()
            .take(NESTING)
            .find(|entry| addr < entry.end)?;
        Some(Location {
            symbol: self.symbol(entry),
            offset: addr.checked_sub(entry.start)?,
        })
    }

    /// The address of the symbol called `name`: exactly so, mangled or demangled, or else the only function whose demangled
    /// path ends in `::name`.
    pub fn find(&self, name: &str) -> Option<GuestVirtAddr> {
        let exact = |entry: &&Entry| {
            self.mangled(entry) == name || self.may_be(entry, name) && self.demangled(entry) == name
        };
        let best = self
            .entries
            .iter()
            .filter(exact)
            .max_by_key(|entry| entry.rank);
        if let Some(entry) = best {
            return Some(GuestVirtAddr::new(entry.start));
        }
        let mut starts = self
            .entries
            .iter()
            .filter(|entry| entry.rank >= Rank::LocalCode && self.may_be(entry, name))
            .filter(|entry| {
                let path = self.demangled(entry);
                path.strip_suffix(name)
                    .is_some_and(|prefix| prefix.ends_with("::"))
            })
            .map(|entry| entry.start);
        let first = starts.next()?;
        starts
            .all(|start| start == first)
            .then(|| GuestVirtAddr::new(first))
    }

    /// Up to `most` names, in order and each once, that begin with `text`, or have a last part (after `::`) that does.
    pub fn complete(&self, text: &str, most: usize) -> Vec<String> {
        let mut names = BTreeSet::new();
        for entry in self.entries.iter().filter(|entry| self.may_be(entry, text)) {
            let name = self.demangled(entry);
            let part = name.match_indices("::").any(|(at, colons)| {
                name.get(at + colons.len()..)
                    .is_some_and(|part| part.starts_with(text) && !part.contains("::"))
            });
            if part || name.starts_with(text) {
                names.insert(name);
            }
            if names.len() > most {
                names.pop_last();
            }
        }
        names.into_iter().collect()
    }

    /// The address that text means: `name`, `name+0x12`, `0x1234` or `1234` (hexadecimal is never guessed).
    pub fn parse(&self, text: &str) -> Result<GuestVirtAddr, ParseLocationError> {
        let text = text.trim();
        if let Some(addr) = parse_number(text) {
            return Ok(GuestVirtAddr::new(addr));
        }
        if let Some(addr) = self.find(text) {
            return Ok(addr);
        }
        let unknown = || ParseLocationError::Unknown(text.to_owned());
        let (name, offset) = text.rsplit_once('+').ok_or_else(unknown)?;
        let base = self.find(name.trim()).ok_or_else(unknown)?;
        let offset = parse_number(offset.trim())
            .ok_or_else(|| ParseLocationError::Offset(offset.to_owned()))?;
        Ok(base.wrapping_add(offset))
    }

    fn symbol(&self, entry: &Entry) -> Symbol {
        Symbol {
            name: self.demangled(entry),
            start: GuestVirtAddr::new(entry.start),
            end: GuestVirtAddr::new(entry.end),
            is_code: entry.rank >= Rank::LocalCode,
        }
    }

    fn mangled(&self, entry: &Entry) -> &str {
        self.names.get(entry.name.clone()).unwrap_or_default()
    }

    /// A cheap test that spares demangling: the last part of a path stands in the mangled form as it is.
    fn may_be(&self, entry: &Entry, name: &str) -> bool {
        let last = name.rsplit("::").next().unwrap_or(name);
        let word: String = last
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
            .collect();
        self.mangled(entry).contains(&word)
    }

    fn demangled(&self, entry: &Entry) -> String {
        let mangled = self.mangled(entry);
        let mut name = Bounded::default();
        let demangled = match rustc_demangle::try_demangle(mangled) {
            Ok(demangled) => write!(name, "{demangled:#}").is_ok(),
            Err(_) => false,
        };
        if demangled {
            return name.0;
        }
        let mut name = Bounded::default();
        // A name too long keeps its beginning.
        let _ = name.write_str(mangled);
        name.0
    }
}

fn rank<'data>(symbol: &impl ObjectSymbol<'data>) -> Option<Rank> {
    if symbol.is_undefined() {
        return None;
    }
    match symbol.kind() {
        SymbolKind::Text if symbol.is_global() => Some(Rank::Code),
        SymbolKind::Text => Some(Rank::LocalCode),
        SymbolKind::Data => Some(Rank::Data),
        SymbolKind::Label | SymbolKind::Unknown => Some(Rank::Label),
        _ => None,
    }
}

/// A decimal or `0x` number, underscores allowed.
fn parse_number(text: &str) -> Option<u64> {
    let digits = text.replace('_', "");
    match digits
        .strip_prefix("0x")
        .or_else(|| digits.strip_prefix("0X"))
    {
        Some(hex) if !hex.starts_with('+') => u64::from_str_radix(hex, 16).ok(),
        None if digits.starts_with(|c: char| c.is_ascii_digit()) => digits.parse().ok(),
        _ => None,
    }
}

/// Text of at most [`MAX_NAME`] bytes without control characters; writing more fails.
#[derive(Default)]
struct Bounded(String);

impl Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            if self.0.len() + c.len_utf8() > MAX_NAME {
                return Err(fmt::Error);
            }
            self.0.push(if c.is_control() { '?' } else { c });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
