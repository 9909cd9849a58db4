//! String instructions, iteration by iteration.

mod guest;

use guest::{CODE, DATA, Guest};
use soft::Step;
use x86::regs::rflags;
use x86::{Gpr, Vector};

#[test]
fn each_iteration_of_rep_is_a_step() {
    let mut guest = Guest::long();
    guest.put(DATA, b"abc");
    guest
        .set(Gpr::Rsi, DATA)
        .set(Gpr::Rdi, DATA + 0x100)
        .set(Gpr::Rcx, 3);
    guest.raw(&[0xf3, 0xa4]); // rep movsb
    for left in [2, 1] {
        assert_eq!(guest.step(), Step::Within);
        assert_eq!((guest.cpu.regs.rip, guest.gpr(Gpr::Rcx)), (CODE, left));
        assert_eq!(
            guest.flags(rflags::RF),
            rflags::RF,
            "as hardware shows it inside a REP"
        );
    }
    guest.retire(1);
    assert_eq!(guest.bytes(DATA + 0x100, 3), b"abc");
    assert_eq!((guest.cpu.regs.rip, guest.gpr(Gpr::Rcx)), (CODE + 2, 0));
    assert_eq!(
        (guest.gpr(Gpr::Rsi), guest.gpr(Gpr::Rdi)),
        (DATA + 3, DATA + 0x103)
    );
    assert_eq!(guest.flags(rflags::RF), 0);
}

#[test]
fn a_count_of_zero_touches_nothing() {
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rcx, 0)
        .set(Gpr::Rdi, 1 << 50)
        .raw(&[0xf3, 0xab]);
    guest.retire(1);
    assert_eq!(guest.gpr(Gpr::Rdi), 1 << 50);
}

#[test]
fn a_fault_in_the_middle_shows_the_iterations_done() {
    let mut guest = Guest::long();
    guest.map(DATA + 0x1000, 0);
    guest
        .set(Gpr::Rdi, DATA + 0x1000 - 16)
        .set(Gpr::Rcx, 4)
        .set(Gpr::Rax, u64::MAX);
    guest.raw(&[0xf3, 0x48, 0xab]); // rep stosq
    assert_eq!(guest.step(), Step::Within);
    assert_eq!(guest.step(), Step::Within);
    guest.faults(Vector::PF);
    assert_eq!(guest.cpu.cr2, DATA + 0x1000);
    assert_eq!(
        (guest.gpr(Gpr::Rcx), guest.gpr(Gpr::Rdi)),
        (2, DATA + 0x1000)
    );
    assert_eq!(guest.stack(1), CODE, "the instruction is to be restarted");
}

#[test]
fn comparisons_end_at_the_first_difference() {
    let mut guest = Guest::long();
    guest.put(DATA, b"same!");
    guest.put(DATA + 0x100, b"same?");
    guest
        .set(Gpr::Rsi, DATA)
        .set(Gpr::Rdi, DATA + 0x100)
        .set(Gpr::Rcx, 10);
    guest.raw(&[0xf3, 0xa6]); // repe cmpsb
    for _ in 0..4 {
        assert_eq!(guest.step(), Step::Within);
    }
    guest.retire(1);
    assert_eq!((guest.gpr(Gpr::Rcx), guest.gpr(Gpr::Rsi)), (5, DATA + 5));
    assert_eq!(
        guest.flags(rflags::ZF | rflags::CF),
        rflags::CF,
        "'!' is below '?'"
    );
}

#[test]
fn repne_scas_finds_its_byte_backwards() {
    let mut guest = Guest::long();
    guest.put(DATA, b"x..");
    guest
        .set(Gpr::Rdi, DATA + 2)
        .set(Gpr::Rcx, 100)
        .set(Gpr::Rax, u64::from(b'x'));
    guest.set_flags(rflags::DF).raw(&[0xf2, 0xae]);
    assert_eq!(guest.step(), Step::Within);
    assert_eq!(guest.step(), Step::Within);
    guest.retire(1);
    assert_eq!((guest.gpr(Gpr::Rdi), guest.gpr(Gpr::Rcx)), (DATA - 1, 97));
    assert_eq!(guest.flags(rflags::ZF), rflags::ZF);
}

#[test]
fn the_address_size_limits_the_index_registers() {
    let mut guest = Guest::real();
    guest
        .set(Gpr::Rsi, 0xaaaa_ffff)
        .set(Gpr::Rdi, 0xbbbb_0010)
        .set(Gpr::Rcx, 0xcccc_0001);
    guest.put(DATA + 0xffff, &[0x5a]);
    guest.raw(&[0xf3, 0xa4]).retire(1);
    assert_eq!(guest.gpr(Gpr::Rsi), 0xaaaa_0000);
    assert_eq!(guest.gpr(Gpr::Rdi), 0xbbbb_0011);
    assert_eq!(guest.gpr(Gpr::Rcx), 0xcccc_0000);
    assert_eq!(guest.bytes(DATA + 0x10, 1), [0x5a]);
}

#[test]
fn the_source_segment_can_be_overridden_and_lods_extends_nothing() {
    let mut guest = Guest::long();
    guest.cpu.segment_mut(x86::SegmentRegister::Gs).base = DATA;
    guest.put(DATA + 8, &[0x80]);
    guest
        .set(Gpr::Rsi, 8)
        .set(Gpr::Rax, 0x1111_1111_1111_1111)
        .raw(&[0x65, 0xac]); // gs lodsb
    guest.retire(1);
    assert_eq!(guest.gpr(Gpr::Rax), 0x1111_1111_1111_1180);
    assert_eq!(guest.gpr(Gpr::Rsi), 9);
}

#[test]
fn single_steps_fall_between_iterations() {
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rdi, DATA)
        .set(Gpr::Rcx, 2)
        .set_flags(rflags::TF);
    guest.raw(&[0xf3, 0xaa]);
    assert_eq!(guest.step(), Step::Within);
    guest.faults(Vector::DB);
    assert_eq!(guest.stack(0), CODE);
    assert_eq!(guest.stack(2) & rflags::RF, rflags::RF);
    assert_eq!(guest.cpu.dr6 & 1 << 14, 1 << 14);
}

/// The same instruction in one step and in steps of one iteration.
#[test]
fn many_iterations_in_one_step_are_many_steps() {
    let cases: [(&[u8], u64, u64, u64); 8] = [
        (&[0xf3, 0xa4], DATA, DATA + 0x1000, 300),       // movsb
        (&[0xf3, 0x48, 0xa5], DATA, DATA + 0x1ff0, 300), // movsq across pages
        (&[0xf3, 0xa4], DATA, DATA + 3, 300),            // repeats a pattern
        (&[0xf3, 0xa4], DATA + 3, DATA, 300),
        (&[0xf3, 0x66, 0xa5], DATA + 0xfff, DATA + 0x2001, 900), // elements across pages
        (&[0xf3, 0xab], 0, DATA + 0x800, 3000),                  // stosd
        (&[0xf3, 0xaa], 0, CODE - 20, 200),                      // over its own code
        (&[0xf3, 0xaa], 0, DATA + 0x4f00, 1000),                 // into a page that is not there
    ];
    for (bytes, source, destination, count) in cases {
        let mut guests: Vec<Guest> = [1, 7, 4096]
            .into_iter()
            .map(|iterations| {
                let mut guest = Guest::long();
                guest.stepper.allow_iterations(iterations);
                let data: Vec<u8> = (0..0x3000u32).map(|n| (n * 7 + n / 256) as u8).collect();
                guest.put(DATA, &data);
                guest.map(DATA + 0x5000, 0);
                guest
                    .set(Gpr::Rsi, source)
                    .set(Gpr::Rdi, destination)
                    .set(Gpr::Rcx, count);
                guest.set(Gpr::Rax, 0x9090_9090_9090_9090).raw(bytes);
                let mut made = 0;
                while let Step::Within = guest.step() {
                    made += guest.stepper.iterations();
                }
                assert!(made < count, "{bytes:02x?}");
                guest
            })
            .collect();
        let one = guests.remove(0);
        for other in guests {
            assert_eq!(one.cpu, other.cpu, "{bytes:02x?}");
            assert_eq!(one.memory.digest(), other.memory.digest(), "{bytes:02x?}");
        }
    }
}
