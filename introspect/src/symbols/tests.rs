use super::*;
use proptest::prelude::*;

const TEXT: u64 = 0x10_0000;
const FUNC: u8 = 2;
const OBJECT: u8 = 1;
const NOTYPE: u8 = 0;

struct Sym {
    name: &'static str,
    kind: u8,
    global: bool,
    value: u64,
    size: u64,
}

const fn sym(name: &'static str, kind: u8, value: u64, size: u64) -> Sym {
    Sym {
        name,
        kind,
        global: true,
        value,
        size,
    }
}

/// A minimal ELF64 file: null, .text (4 KiB at [`TEXT`]), .symtab, .strtab, .shstrtab.
fn elf(symbols: &[Sym]) -> Vec<u8> {
    let mut strings = vec![0];
    let mut table = vec![0u8; 24];
    for symbol in symbols {
        let name = strings.len() as u32;
        strings.extend_from_slice(symbol.name.as_bytes());
        strings.push(0);
        table.extend_from_slice(&name.to_le_bytes());
        table.push(u8::from(symbol.global) << 4 | symbol.kind);
        table.push(0);
        table.extend_from_slice(&1u16.to_le_bytes());
        table.extend_from_slice(&symbol.value.to_le_bytes());
        table.extend_from_slice(&symbol.size.to_le_bytes());
    }
    let names = b"\0.text\0.symtab\0.strtab\0.shstrtab\0";
    let table_at = 64u64;
    let strings_at = table_at + table.len() as u64;
    let names_at = strings_at + strings.len() as u64;
    let sections_at = names_at + names.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend_from_slice(&2u16.to_le_bytes());
    file.extend_from_slice(&62u16.to_le_bytes());
    file.extend_from_slice(&1u32.to_le_bytes());
    for word in [TEXT, 0, sections_at] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(&0u32.to_le_bytes());
    for half in [64u16, 56, 0, 64, 5, 4] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    file.extend_from_slice(&table);
    file.extend_from_slice(&strings);
    file.extend_from_slice(names);
    // name, type, flags, addr, offset, size, link, info, align, entsize
    let sections: [[u64; 10]; 5] = [
        [0; 10],
        [1, 8, 6, TEXT, 0, 0x1000, 0, 0, 16, 0],
        [7, 2, 0, 0, table_at, table.len() as u64, 3, 1, 8, 24],
        [15, 3, 0, 0, strings_at, strings.len() as u64, 0, 0, 1, 0],
        [23, 3, 0, 0, names_at, names.len() as u64, 0, 0, 1, 0],
    ];
    for section in sections {
        for (index, value) in section.into_iter().enumerate() {
            if matches!(index, 0 | 1 | 6 | 7) {
                file.extend_from_slice(&(value as u32).to_le_bytes());
            } else {
                file.extend_from_slice(&value.to_le_bytes());
            }
        }
    }
    file
}

fn sample() -> Symbols {
    Symbols::from_elf(&elf(&[
        sym("_start", NOTYPE, TEXT, 0),
        sym("_RNvNtCs1234_5crash5sched4tick", FUNC, TEXT + 0x100, 0x20),
        sym("inner", NOTYPE, TEXT + 0x108, 0),
        sym("JIFFIES", OBJECT, TEXT + 0x200, 8),
        sym("alias_data", OBJECT, TEXT + 0x300, 16),
        sym("alias_code", FUNC, TEXT + 0x300, 16),
        sym("tail", NOTYPE, TEXT + 0xf00, 0),
    ]))
    .expect("a well-formed file")
}

fn at(symbols: &Symbols, addr: u64) -> Option<String> {
    symbols
        .lookup(GuestVirtAddr::new(addr))
        .map(|location| location.to_string())
}

#[test]
fn addresses_become_symbol_and_offset() {
    let symbols = sample();
    for (addr, expected) in [
        (TEXT - 1, None),
        (TEXT, Some("_start")),
        (TEXT + 0x12, Some("_start+0x12")),
        (TEXT + 0x104, Some("crash::sched::tick+0x4")),
        (TEXT + 0x107, Some("crash::sched::tick+0x7")),
        (TEXT + 0x108, Some("inner")),
        (TEXT + 0x204, Some("JIFFIES+0x4")),
        (TEXT + 0x208, None),
        (TEXT + 0x300, Some("alias_code")),
        (TEXT + 0xfff, Some("tail+0xff")),
        (TEXT + 0x1000, None),
        (u64::MAX, None),
    ] {
        assert_eq!(at(&symbols, addr).as_deref(), expected, "{addr:#x}");
    }
}

#[test]
fn names_become_addresses() {
    let symbols = sample();
    let ok = |text| symbols.parse(text).map(GuestVirtAddr::get);
    assert_eq!(ok("crash::sched::tick"), Ok(TEXT + 0x100));
    assert_eq!(ok("_RNvNtCs1234_5crash5sched4tick"), Ok(TEXT + 0x100));
    assert_eq!(
        ok("sched::tick+0x10"),
        Ok(TEXT + 0x110),
        "a path's end is enough"
    );
    assert_eq!(ok("tick + 16"), Ok(TEXT + 0x110));
    assert_eq!(ok("0xffff_8000"), Ok(0xffff_8000));
    assert_eq!(ok("4096"), Ok(4096));
    assert_eq!(
        ok("nope"),
        Err(ParseLocationError::Unknown("nope".to_owned()))
    );
    assert_eq!(
        ok("tick+x"),
        Err(ParseLocationError::Offset("x".to_owned()))
    );
    assert!(ok("").is_err());
    assert!(ok("ick").is_err(), "half a word is no path's end");
}

#[test]
fn an_ambiguous_path_end_is_not_guessed() {
    let symbols = Symbols::from_elf(&elf(&[
        sym("_RNvNtCs1234_5crash5sched4tick", FUNC, TEXT, 4),
        sym("_RNvNtCs1234_5crash5clock4tick", FUNC, TEXT + 8, 4),
    ]))
    .expect("well-formed");
    assert_eq!(symbols.find("tick"), None);
    assert!(symbols.find("clock::tick").is_some());
}

#[test]
fn files_that_are_no_x86_elf_say_what_they_are() {
    let mut arm = elf(&[]);
    arm[18] = 183;
    assert!(matches!(
        Symbols::from_elf(&arm),
        Err(SymbolsError::NotX86(183))
    ));
    let error = Symbols::from_elf(b"MZ??").expect_err("no ELF").to_string();
    assert!(error.contains("4d, 5a"), "{error}");
    assert!(matches!(
        Symbols::from_elf(b""),
        Err(SymbolsError::NotElf(_))
    ));
}

#[test]
fn overlapping_names_do_not_multiply() {
    // 4,000 symbols whose names are all the suffixes of one long string.
    let long: &'static str = Box::leak("x".repeat(40_000).into_boxed_str());
    let mut symbols = vec![sym(long, FUNC, TEXT, 1)];
    symbols.extend((0..4000).map(|_| sym("", FUNC, TEXT, 1)));
    let mut file = elf(&symbols);
    for index in 1..=4000usize {
        let at = 64 + 24 * (index + 1);
        file[at..at + 4].copy_from_slice(&(index as u32).to_le_bytes());
    }
    assert!(matches!(
        Symbols::from_elf(&file),
        Err(SymbolsError::NamesTooLong { .. })
    ));
}

#[test]
fn names_are_cut_and_cleaned() {
    let long: &'static str = Box::leak("y".repeat(5000).into_boxed_str());
    let symbols = Symbols::from_elf(&elf(&[
        sym(long, FUNC, TEXT, 8),
        sym("bell\x07\x1b[31m", FUNC, TEXT + 8, 8),
    ]))
    .expect("well-formed");
    assert_eq!(at(&symbols, TEXT).map(|name| name.len()), Some(MAX_NAME));
    assert_eq!(at(&symbols, TEXT + 8).as_deref(), Some("bell??[31m"));
}

#[inline(never)]
fn landmark_function() -> u32 {
    std::hint::black_box(7)
}

#[test]
fn a_real_program_knows_its_own_functions() {
    assert_eq!(landmark_function(), 7);
    let file = std::fs::read(std::env::current_exe().expect("own path")).expect("own file");
    let symbols = Symbols::from_elf(&file).expect("own symbols");
    let addr = symbols
        .find("symbols::tests::landmark_function")
        .expect("known by its path");
    let location = symbols.lookup(addr).expect("known by its address");
    assert_eq!(
        location.symbol.name,
        "introspect::symbols::tests::landmark_function"
    );
    assert!(location.symbol.is_code);
}

proptest! {
    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let _ = Symbols::from_elf(&bytes);
    }

    #[test]
    fn a_damaged_file_is_survived(
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
        addr in any::<u64>(),
    ) {
        let mut file = elf(&[
            sym("_start", NOTYPE, TEXT, 0),
            sym("_RNvNtCs1234_5crash5sched4tick", FUNC, TEXT + 0x100, 0x20),
            sym("JIFFIES", OBJECT, TEXT + 0x200, 8),
        ]);
        for (at, value) in &damage {
            let at = at.index(file.len());
            file[at] = *value;
        }
        for file in [&file[..], &file[..cut.index(file.len())]] {
            if let Ok(symbols) = Symbols::from_elf(file) {
                let _ = symbols.lookup(GuestVirtAddr::new(addr));
                let _ = symbols.lookup(GuestVirtAddr::new(TEXT + addr % 0x1000));
                let _ = symbols.find("tick");
                prop_assert!(symbols.iter().count() <= 3 * file.len());
            }
        }
    }
}
