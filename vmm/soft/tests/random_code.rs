//! Random bytes as code, in every mode.
//!
//! What is checked: nothing panics, whatever the bytes; and caches never show: a stepper that has cached instructions, stubs and
//! translations goes the same way as one made anew for every step, though the code writes over itself and its page tables.

mod guest;

use guest::{CODE, DATA, Guest, PAGE_TABLE, STACK};
use machine::engine::Answer;
use proptest::collection::vec;
use proptest::prelude::*;
use soft::{Pending, Step, Stepper};
use x86::regs::rflags;
use x86::{Activity, CpuModel, Gpr};

const STEPS: usize = 60;

fn guest(mode: u8) -> Guest {
    match mode {
        0 => Guest::long(),
        1 => Guest::long().user(),
        2 => Guest::long().user32(),
        3 => Guest::protected(),
        4 => Guest::protected().user32(),
        _ => Guest::real(),
    }
}

/// Bytes that are instructions more often than random ones.
fn code() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        4 => vec(any::<u8>(), 1..6),
        // mov/add/xor r, [reg + disp8] and back, with small displacements
        4 => (prop_oneof![Just(0x01u8), Just(0x03), Just(0x89), Just(0x8b), Just(0x31), Just(0x87)], any::<u8>(), any::<u8>())
            .prop_map(|(op, modrm, disp)| vec![op, modrm & 0x3f | 0x40, disp & 0x3f]),
        2 => (any::<u8>(), any::<u8>()).prop_map(|(op, rel)| vec![0x70 | op & 0xf, rel & 0x1f]),
        1 => any::<u8>().prop_map(|n| vec![0x50 | n & 0xf]),
        1 => (0xa4u8..0xb0).prop_map(|op| vec![0xf3, op]),
        1 => any::<u8>().prop_map(|rel| vec![0xe8, rel & 0x1f, 0, 0, 0]),
        1 => (any::<u8>(), any::<u8>()).prop_map(|(op, modrm)| vec![0x0f, op, modrm & 0x3f]),
    ];
    vec(piece, 1..60).prop_map(|pieces| pieces.concat())
}

/// Values that point somewhere, or are small.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        (0u64..0x200).prop_map(|n| CODE + n),
        (0u64..0x1100).prop_map(|n| DATA + n),
        (0u64..512).prop_map(|n| PAGE_TABLE + 8 * n),
        (0u64..0x100).prop_map(|n| STACK - n),
        0u64..16,
        any::<u64>(),
    ]
}

fn prepare(mode: u8, code: &[u8], registers: &[u64], flags: u64) -> Guest {
    let mut guest = guest(mode);
    let at = guest.cpu.rip_linear().get();
    guest.put(at, code);
    for (gpr, value) in Gpr::ALL.into_iter().zip(registers) {
        if gpr != Gpr::Rsp {
            guest.set(gpr, if mode == 5 { *value & 0xffff } else { *value });
        }
    }
    guest.cpu.regs.rflags |= flags & (rflags::STATUS | rflags::DF | rflags::IF | rflags::TF);
    guest
}

/// Steps, answering whatever is asked with `answer`. False when there is nothing more to do.
fn step(guest: &mut Guest, code_len: u64, answer: u64) -> bool {
    let start = CODE;
    match guest.try_step() {
        Err(_) => return false,
        Ok(Step::Exit(x86::Exit::TripleFault)) => return false,
        Ok(Step::Exit(exit)) if guest.pending.incomplete() => {
            guest.pending.answer(match exit.wants() {
                x86::exit::Wants::MsrValue => Answer::MsrValue(answer),
                x86::exit::Wants::MsrAck => Answer::MsrRefused,
                _ => Answer::Data(answer),
            });
        }
        Ok(_) => {}
    }
    if guest.cpu.activity == Activity::Halted {
        // Back into the code, somewhere.
        guest.cpu.activity = Activity::Active;
        if guest.cpu.mode() != x86::CpuMode::Real {
            guest.cpu.regs.rip = start + answer % code_len;
        }
    }
    true
}

proptest! {
    #![proptest_config(ProptestConfig { cases: std::env::var("CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(300), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn caches_never_show(
        mode in 0u8..6,
        code in code(),
        registers in vec(value(), 16),
        flags in any::<u64>(),
        answer in any::<u64>(),
    ) {
        let mut cached = prepare(mode, &code, &registers, flags);
        let mut fresh = prepare(mode, &code, &registers, flags);
        let len = code.len() as u64;
        for n in 0..STEPS {
            let pending = fresh.pending.incomplete();
            if !pending {
                fresh.stepper = Stepper::new(fresh.memory.clone(), CpuModel::V2).expect("a stepper");
                fresh.stepper.set_retired(n as u64);
                fresh.pending = Pending::new();
            }
            cached.stepper.set_retired(n as u64);
            let goes_on = step(&mut cached, len, answer);
            prop_assert_eq!(step(&mut fresh, len, answer), goes_on, "step {}", n);
            if !goes_on {
                break;
            }
            prop_assert_eq!(&cached.cpu, &fresh.cpu, "step {}", n);
        }
        prop_assert_eq!(cached.memory.digest(), fresh.memory.digest());
    }
}
