//! Loading well-formed, odd and hostile images.

use super::*;
use proptest::prelude::*;
use x86::regs::{Cr0, Efer};
use x86::{CpuMode, Gpr, GuestVirtAddr, SegmentRegister};

const MEMORY: u64 = 4 << 20;

fn memory() -> GuestMemory {
    GuestMemory::new(MEMORY).expect("4 MiB")
}

fn read<const N: usize>(memory: &GuestMemory, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    memory
        .read(GuestPhysAddr::new(at), &mut bytes)
        .expect("RAM");
    bytes
}

fn word(memory: &GuestMemory, at: u64) -> u64 {
    u64::from_le_bytes(read(memory, at))
}

/// A program header to put into a file.
#[derive(Clone, Copy)]
struct Program {
    kind: u32,
    offset: u64,
    linear: u64,
    addr: u64,
    in_file: u64,
    size: u64,
}

const HEADER_64: u64 = 64;
const PROGRAM_64: u64 = 56;

fn elf64(entry: u64, programs: &[Program], body: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend(2u16.to_le_bytes());
    file.extend(62u16.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    for value in [entry, HEADER_64, 0] {
        file.extend(value.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    for value in [64, 56, programs.len() as u16, 64, 0, 0] {
        file.extend(value.to_le_bytes());
    }
    for program in programs {
        file.extend(program.kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        let Program {
            offset,
            linear,
            addr,
            in_file,
            size,
            ..
        } = *program;
        for value in [offset, linear, addr, in_file, size, 4] {
            file.extend(value.to_le_bytes());
        }
    }
    file.extend(body);
    file
}

fn elf32(entry: u32, addr: u32, body: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend(2u16.to_le_bytes());
    file.extend(3u16.to_le_bytes());
    for value in [1u32, entry, 52, 0, 0] {
        file.extend(value.to_le_bytes());
    }
    for value in [52u16, 32, 1, 40, 0, 0] {
        file.extend(value.to_le_bytes());
    }
    let len = body.len() as u32;
    for value in [1u32, 84, addr, addr, len, len, 7, 4] {
        file.extend(value.to_le_bytes());
    }
    file.extend(body);
    file
}

fn pvh_note(entry: u32) -> Vec<u8> {
    let mut note = Vec::new();
    for value in [4u32, 4, 18] {
        note.extend(value.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(entry.to_le_bytes());
    note
}

/// One loadable segment of 16 bytes at 1 MiB with 4 KiB of zeroes behind it, and no note.
fn long_kernel() -> Vec<u8> {
    let load = Program {
        kind: 1,
        offset: HEADER_64 + PROGRAM_64,
        linear: 0xffff_8000_0010_0000,
        addr: 0x10_0000,
        in_file: 16,
        size: 0x1010,
    };
    elf64(0xffff_8000_0010_0004, &[load], &[0x90; 16])
}

/// The same with a PVH note.
fn pvh_kernel() -> Vec<u8> {
    let at = HEADER_64 + 2 * PROGRAM_64;
    let load = Program {
        kind: 1,
        offset: at,
        linear: 0x10_0000,
        addr: 0x10_0000,
        in_file: 16,
        size: 0x1010,
    };
    let note = Program {
        kind: 4,
        offset: at + 16,
        in_file: 20,
        size: 20,
        ..load
    };
    let mut body = vec![0x90; 16];
    body.extend(pvh_note(0x10_0008));
    elf64(0x10_0000, &[load, note], &body)
}

#[test]
fn pvh_enters_protected_mode_with_a_start_info() {
    let memory = memory();
    memory
        .write(GuestPhysAddr::new(0x10_0800), &[1; 4])
        .expect("stale bytes");
    let cpu = load(&pvh_kernel(), "console=ttyS0 panic=-1", &memory).expect("loads");
    assert_eq!(cpu.mode(), CpuMode::Protected32);
    assert_eq!(cpu.rip_linear(), GuestVirtAddr::new(0x10_0008));
    assert_eq!(cpu.cr0, Cr0::PE | Cr0::ET);
    assert_eq!(cpu.cpl(), 0);
    assert_eq!(read(&memory, 0x10_0000), [0x90; 16]);
    assert_eq!(
        read(&memory, 0x10_0800),
        [0; 4],
        "what the file leaves open is zero"
    );

    let info = cpu.regs[Gpr::Rbx];
    assert_eq!(read(&memory, info), 0x336e_c578u32.to_le_bytes());
    let cmdline = word(&memory, info + 24);
    assert_eq!(&read(&memory, cmdline), b"console=ttyS0 panic=-1\0");
    let map = word(&memory, info + 40);
    assert_eq!(word(&memory, info + 48), 3);
    let entries = [0, 1, 2].map(|n| {
        let at = map + 24 * n;
        (
            word(&memory, at),
            word(&memory, at + 8),
            word(&memory, at + 16),
        )
    });
    assert_eq!(
        entries,
        [
            (0, 0xa_0000, 1),
            (0xa_0000, 0x6_0000, 2),
            (0x10_0000, MEMORY - 0x10_0000, 1)
        ]
    );
    assert_eq!(word(&memory, cpu.gdtr.base + 8), 0x00cf_9b00_0000_ffff);
}

#[test]
fn elf64_without_note_enters_long_mode_with_4_gib_mapped() {
    let memory = memory();
    let cpu = load(&long_kernel(), "", &memory).expect("loads");
    assert_eq!(cpu.mode(), CpuMode::Long64);
    assert_eq!(
        cpu.regs.rip, 0x10_0004,
        "the linear entry, where it was loaded"
    );
    assert!(cpu.efer.contains(Efer::LME | Efer::LMA));
    let context = x86::paging::PagingContext::of(&cpu);
    for linear in [0, 0x10_0004, 0x3fff_ffff, 0x4000_0000, 0xffff_ffff] {
        let pml4 = word(&memory, context.cr3) & !0xfff;
        let directory = word(&memory, pml4 + 8 * (linear >> 30)) & !0xfff;
        let leaf = word(&memory, directory + 8 * (linear >> 21 & 511));
        assert_eq!(leaf, linear & !0x1f_ffff | 0x83);
    }
    assert_eq!(word(&memory, context.cr3 + 8), 0);
    let stack = cpu.regs[Gpr::Rsp];
    assert_eq!(stack % 16, 8);
    assert!(memory.contains(GuestPhysAddr::new(stack), 8));
    assert_eq!(cpu.regs[Gpr::Rdi], cpu.regs[Gpr::Rbx]);
}

#[test]
fn elf32_without_note_enters_flat_protected_mode() {
    let memory = memory();
    let cpu = load(&elf32(0x20_0001, 0x20_0000, &[0xf4; 8]), "", &memory).expect("loads");
    assert_eq!(cpu.mode(), CpuMode::Protected32);
    assert_eq!(cpu.regs.rip, 0x20_0001);
    assert_eq!(read(&memory, 0x20_0000), [0xf4; 8]);
}

#[test]
fn the_boot_information_keeps_out_of_the_kernels_way() {
    let memory = memory();
    let body = vec![0xcc; 0x9_e000];
    let cpu = load(&elf32(0x1000, 0x1000, &body), "", &memory).expect("loads");
    assert!(cpu.regs[Gpr::Rbx] >= 0x10_0000);
    let mut loaded = vec![0; body.len()];
    memory
        .read(GuestPhysAddr::new(0x1000), &mut loaded)
        .expect("RAM");
    assert!(loaded == body);
    let everything = elf32(0, 0, &vec![0xcc; MEMORY as usize]);
    assert!(matches!(
        load(&everything, "", &memory),
        Err(BootError::NoRoom { .. })
    ));
}

#[test]
fn flat_images_start_in_real_mode() {
    let memory = memory();
    let cpu = load_flat(&[0xf4], GuestPhysAddr::new(0x7c00), &memory).expect("loads");
    assert_eq!(cpu.mode(), CpuMode::Real);
    assert_eq!(cpu.rip_linear(), GuestVirtAddr::new(0x7c00));
    assert_eq!(cpu.segment(SegmentRegister::Ss).base, 0x7c00);
    for addr in [0x7c01, 0x10_0000, 0xffff_ffff_ffff_fff0] {
        let addr = GuestPhysAddr::new(addr);
        assert_eq!(
            load_flat(&[0], addr, &memory),
            Err(BootError::FlatAddress(addr))
        );
    }
    let long = vec![0; MEMORY as usize];
    let end = GuestPhysAddr::new(0xf_fff0);
    assert!(matches!(
        load_flat(&long, end, &memory),
        Err(BootError::Memory(_))
    ));
}

#[test]
fn other_formats_are_refused_by_name() {
    let memory = memory();
    let mut bzimage = vec![0; 0x400];
    bzimage[0x1fe..0x206].copy_from_slice(b"\x55\xaa\xeb\x66HdrS");
    assert_eq!(
        load(&bzimage, "", &memory),
        Err(BootError::NotSupportedYet("bzImage"))
    );

    let mut multiboot = vec![0; 64];
    for (n, word) in [0x1bad_b002u32, 3, 0u32.wrapping_sub(0x1bad_b002 + 3)]
        .iter()
        .enumerate()
    {
        multiboot[16 + 4 * n..][..4].copy_from_slice(&word.to_le_bytes());
    }
    let refused = Err(BootError::NotSupportedYet("Multiboot"));
    assert_eq!(load(&multiboot, "", &memory), refused);
    assert_eq!(
        load(&elf32(0x20_0000, 0x20_0000, &multiboot), "", &memory),
        refused
    );

    assert_eq!(
        load(b"", "", &memory),
        Err(BootError::NotAKernel { len: 0 })
    );
    assert_eq!(
        load(b"#!/bin/sh", "", &memory),
        Err(BootError::NotAKernel { len: 9 })
    );
    let error = load(&bzimage, "", &memory)
        .expect_err("refused")
        .to_string();
    assert!(
        error.starts_with("bzImage boot is not supported yet"),
        "{error}"
    );
}

#[test]
fn unusable_command_lines_are_refused() {
    let memory = memory();
    let longest = "x".repeat(MAX_COMMAND_LINE);
    assert!(load(&pvh_kernel(), &longest, &memory).is_ok());
    for cmdline in [format!("{longest}x"), "a\0b".to_owned()] {
        let error = load(&pvh_kernel(), &cmdline, &memory);
        assert!(matches!(error, Err(BootError::CommandLine(_))));
    }
}

/// The error's offset and text for an image of these program headers.
fn refused(entry: u64, programs: &[Program]) -> (u64, String) {
    let memory = memory();
    match load(&elf64(entry, programs, &[0; 64]), "", &memory) {
        Err(BootError::Elf { offset, reason }) => {
            assert!(memory.take_dirty().is_empty(), "nothing was written");
            (offset, reason)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn wrong_segments_are_refused_with_their_headers_offset() {
    let good = Program {
        kind: 1,
        offset: 64,
        linear: 0x10_0000,
        addr: 0x10_0000,
        in_file: 16,
        size: 32,
    };
    let second = HEADER_64 + PROGRAM_64;
    let cases = [
        (
            Program {
                in_file: 33,
                ..good
            },
            "only 0x20 in memory",
        ),
        (
            Program {
                offset: 1 << 40,
                ..good
            },
            "outside the file",
        ),
        (
            Program {
                offset: u64::MAX,
                ..good
            },
            "outside the file",
        ),
        (
            Program {
                addr: MEMORY - 31,
                ..good
            },
            "does not fit",
        ),
        (
            Program {
                addr: u64::MAX - 8,
                ..good
            },
            "does not fit",
        ),
        (
            Program {
                size: u64::MAX,
                ..good
            },
            "does not fit",
        ),
        (
            Program {
                addr: 0x10_001f,
                ..good
            },
            "overlaps",
        ),
    ];
    for (wrong, text) in cases {
        let (offset, reason) = refused(0x10_0000, &[good, wrong]);
        assert_eq!(offset, second, "{reason}");
        assert!(reason.contains(text), "{reason}");
    }
    let (offset, reason) = refused(0x10_0020, &[good]);
    assert_eq!(
        (offset, reason.as_str()),
        (24, "the entry 0x100020 is outside every segment")
    );
    let (_, reason) = refused(
        0x10_0000,
        &[Program {
            size: 0,
            in_file: 0,
            ..good
        }],
    );
    assert!(reason.contains("nothing to load"), "{reason}");
    let (offset, reason) = refused(0x10_0000, &[good; 1025]);
    assert_eq!(offset, HEADER_64, "{reason}");
}

#[test]
fn wrong_headers_are_refused_with_their_offset() {
    for (at, value, text) in [
        (4, 3, "class"),
        (5, 2, "big-endian"),
        (16, 3, "position-independent"),
        (16, 1, "not an executable"),
        (18, 0xb7, "another processor"),
        (18, 3, "64-bit image"),
    ] {
        let mut file = long_kernel();
        file[at] = value;
        if at == 5 {
            file[17] = 2; // e_type, now big-endian
        }
        match load(&file, "", &memory()) {
            Err(BootError::Elf { offset, reason }) => {
                assert_eq!(offset, at as u64, "{reason}");
                assert!(reason.contains(text), "{reason}");
            }
            other => panic!("{text}: {other:?}"),
        }
    }
}

#[test]
fn every_truncation_is_an_error() {
    for file in [
        pvh_kernel(),
        long_kernel(),
        elf32(0x10_0000, 0x10_0000, &[0; 8]),
    ] {
        for len in 0..file.len() {
            let memory = memory();
            let error = load(&file[..len], "", &memory).expect_err("cut off");
            assert!(error.to_string().contains("offset"), "{error}");
            assert!(memory.take_dirty().is_empty());
        }
    }
}

#[test]
fn an_absurd_count_in_section_0_is_refused_without_allocating() {
    let mut file = long_kernel();
    file[56..58].copy_from_slice(&0xffffu16.to_le_bytes()); // e_phnum = PN_XNUM
    let shoff = file.len() as u64;
    file[40..48].copy_from_slice(&shoff.to_le_bytes());
    let mut section = [0; 64];
    section[44..48].copy_from_slice(&u32::MAX.to_le_bytes());
    file.extend(section);
    let error = load(&file, "", &memory()).expect_err("refused").to_string();
    assert!(error.contains("4294967295 program headers"), "{error}");
}

proptest! {
    #[test]
    fn any_change_is_an_error_or_harmless(
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..8),
        which in 0usize..3,
    ) {
        let mut file = match which {
            0 => pvh_kernel(),
            1 => long_kernel(),
            _ => elf32(0x10_0000, 0x10_0000, &[0; 32]),
        };
        for (at, value) in changes {
            let at = at.index(file.len());
            file[at] = value;
        }
        let _ = load(&file, "x", &memory());
    }

    #[test]
    fn any_numbers_in_a_program_header_are_an_error_or_harmless(
        numbers in proptest::array::uniform5(prop_oneof![
            any::<u64>(),
            0u64..0x200,
            0u64..MEMORY + 0x1000,
            u64::MAX - 0x100..=u64::MAX,
        ]),
        kind in prop_oneof![Just(1u32), Just(4u32)],
        entry in 0..MEMORY,
    ) {
        let [offset, linear, addr, in_file, size] = numbers;
        let program = Program { kind, offset, linear, addr, in_file, size };
        let _ = load(&elf64(entry, &[program], &pvh_note(entry as u32)), "", &memory());
    }

    #[test]
    fn arbitrary_bytes_behind_the_magic_are_an_error_or_harmless(
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut file = b"\x7fELF".to_vec();
        file.extend(bytes);
        let _ = load(&file, "", &memory());
    }
}
