use super::*;
use crate::testing::{FUNC, NOTYPE, OBJECT, elf, sym};
use proptest::prelude::*;

const TEXT: u64 = 0x10_0000;
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
fn beginnings_complete_to_names() {
    let symbols = sample();
    assert_eq!(
        symbols.complete("ti", 9),
        ["crash::sched::tick"],
        "a path's last part"
    );
    assert_eq!(symbols.complete("crash::sc", 9), ["crash::sched::tick"]);
    assert_eq!(symbols.complete("alias", 9), ["alias_code", "alias_data"]);
    assert_eq!(
        symbols.complete("alias", 1),
        ["alias_code"],
        "no more than asked for"
    );
    assert!(symbols.complete("ick", 9).is_empty());
    assert_eq!(symbols.complete("", 99).len(), symbols.len(), "all of them");
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
