//! What leaves the guest: ports, device memory, MSRs, halts, interceptions; and that instructions finish exactly once.

mod guest;

use guest::{CODE, DATA, Guest, TSS};
use iced_x86::code_asm::*;
use machine::engine::Answer;
use soft::Step;
use x86::exit::AccessData;
use x86::msr::index;
use x86::regs::rflags;
use x86::{Exit, ExitControls, Gpr, GuestPhysAddr, GuestVirtAddr, Vector};

/// Linear and physical address of device memory.
const DEVICE: u64 = 1 << 30;
const DEVICE_PHYSICAL: u64 = 0xf000_0000;

fn read(offset: u64, size: u8) -> Exit {
    Exit::MmioRead {
        addr: GuestPhysAddr::new(DEVICE_PHYSICAL + offset),
        size,
    }
}

fn write(offset: u64, size: u8, value: u64) -> Exit {
    let addr = GuestPhysAddr::new(DEVICE_PHYSICAL + offset);
    Exit::MmioWrite {
        addr,
        data: AccessData { value, size },
    }
}

fn out(port: u16, size: u8, value: u64) -> Exit {
    Exit::IoOut {
        port,
        data: AccessData { value, size },
    }
}

#[test]
fn in_and_out_of_every_size() {
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rax, 0x1111_2222_3333_4444)
        .set(Gpr::Rdx, 0x3f8);
    guest.code(64, |a| {
        a.in_(al, 0x60)?;
        a.in_(ax, dx)?;
        a.in_(eax, dx)?;
        a.out(0x80, al)?;
        a.out(dx, eax)
    });
    guest
        .exits(
            &Exit::IoIn {
                port: 0x60,
                size: 1,
            },
            Answer::Data(0xabcd),
        )
        .retire(1);
    assert_eq!(guest.gpr(Gpr::Rax), 0x1111_2222_3333_44cd);
    guest
        .exits(
            &Exit::IoIn {
                port: 0x3f8,
                size: 2,
            },
            Answer::Data(0x5566),
        )
        .retire(1);
    assert_eq!(guest.gpr(Gpr::Rax), 0x1111_2222_3333_5566);
    guest
        .exits(
            &Exit::IoIn {
                port: 0x3f8,
                size: 4,
            },
            Answer::Data(0xffff_ffff),
        )
        .retire(1);
    assert_eq!(guest.gpr(Gpr::Rax), 0xffff_ffff);
    let rip = guest.cpu.regs.rip;
    guest.exits(&out(0x80, 1, 0xff), Answer::None);
    assert_eq!(guest.cpu.regs.rip, rip, "finished by the next step");
    guest.retire(1);
    guest
        .exits(&out(0x3f8, 4, 0xffff_ffff), Answer::None)
        .retire(1);
}

#[test]
fn a_read_modify_write_of_device_memory_reads_once_and_writes_once() {
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rbx, DEVICE)
        .code(64, |a| a.add(dword_ptr(rbx + 8), 5));
    guest.exits(&read(8, 4), Answer::Data(0xffff_fffe));
    guest.exits(&write(8, 4, 3), Answer::None).retire(1);
    assert_eq!(guest.flags(rflags::CF | rflags::ZF), rflags::CF);
}

#[test]
fn an_unfinished_store_has_changed_no_register() {
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rbx, DEVICE)
        .set(Gpr::Rax, 7)
        .code(64, |a| a.xadd(qword_ptr(rbx), rax));
    guest.exits(&read(0, 8), Answer::Data(100));
    let before = guest.cpu.clone();
    guest.exits(&write(0, 8, 107), Answer::None);
    assert_eq!(guest.cpu, before);
    guest.retire(1);
    assert_eq!(guest.gpr(Gpr::Rax), 100);
}

#[test]
fn sixteen_bytes_are_two_accesses() {
    let mut guest = Guest::long();
    guest.set(Gpr::Rbx, DEVICE);
    guest.code(64, |a| {
        a.movups(xmm1, xmmword_ptr(rbx))?;
        a.movups(xmmword_ptr(rbx + 16), xmm1)
    });
    guest
        .exits(&read(0, 8), Answer::Data(1))
        .exits(&read(8, 8), Answer::Data(2))
        .retire(1);
    assert_eq!(guest.cpu.fpu.xmm[1], 2 << 64 | 1);
    guest
        .exits(&write(16, 8, 1), Answer::None)
        .exits(&write(24, 8, 2), Answer::None)
        .retire(1);
}

#[test]
fn an_access_half_in_ram_asks_only_for_the_device_half() {
    let mut guest = Guest::long();
    guest.map(DATA + 0x1000, 0xf000_0000 | 7);
    guest.put(DATA + 0xffe, &[0x34, 0x12]);
    guest.set(Gpr::Rbx, DATA + 0xffe);
    guest.code(64, |a| {
        a.mov(eax, dword_ptr(rbx))?;
        a.mov(dword_ptr(rbx), ecx)
    });
    guest.exits(&read(0, 2), Answer::Data(0x5678)).retire(1);
    assert_eq!(guest.gpr(Gpr::Rax), 0x5678_1234);
    guest.set(Gpr::Rcx, 0xaabb_ccdd);
    guest.exits(&write(0, 2, 0xaabb), Answer::None);
    assert_eq!(
        guest.bytes(DATA + 0xffe, 2),
        [0x34, 0x12],
        "not before the device has its half"
    );
    guest.retire(1);
    assert_eq!(guest.bytes(DATA + 0xffe, 2), [0xdd, 0xcc]);
}

#[test]
fn strings_to_devices_exit_once_per_element() {
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rdi, DEVICE)
        .set(Gpr::Rcx, 2)
        .set(Gpr::Rax, 0x41);
    guest.raw(&[0xf3, 0xaa]);
    guest.exits(&write(0, 1, 0x41), Answer::None);
    assert_eq!(guest.step(), Step::Within);
    guest.exits(&write(1, 1, 0x41), Answer::None).retire(1);
    guest.put(DATA, b"hi");
    guest
        .set(Gpr::Rsi, DATA)
        .set(Gpr::Rcx, 2)
        .set(Gpr::Rdx, 0xe9)
        .raw(&[0xf3, 0x6e]); // rep outsb
    guest.exits(&out(0xe9, 1, u64::from(b'h')), Answer::None);
    assert_eq!(guest.step(), Step::Within);
    guest
        .exits(&out(0xe9, 1, u64::from(b'i')), Answer::None)
        .retire(1);
    guest
        .set(Gpr::Rdi, DATA + 8)
        .set(Gpr::Rcx, 1)
        .raw(&[0xf3, 0x6d]); // rep insd
    guest
        .exits(
            &Exit::IoIn {
                port: 0xe9,
                size: 4,
            },
            Answer::Data(0x1234_5678),
        )
        .retire(1);
    assert_eq!(guest.get32(DATA + 8), 0x1234_5678);
}

#[test]
fn ins_does_not_read_the_port_before_its_destination_is_known_to_be_writable() {
    let mut guest = Guest::long();
    guest.map(DATA, 0);
    guest
        .set(Gpr::Rdi, DATA)
        .set(Gpr::Rdx, 0x60)
        .raw(&[0x6c])
        .faults(Vector::PF);
}

#[test]
fn user_mode_needs_the_permission_bitmap() {
    let mut guest = Guest::long().user();
    guest
        .set(Gpr::Rdx, 0x60)
        .code(64, |a| a.in_(al, dx))
        .faults(Vector::GP);
    let mut guest = Guest::long().user();
    guest.cpu.tr.limit = 0x68 + 16 + 1;
    guest.put(TSS + 0x68, &[0xff; 17]);
    guest.put(TSS + 0x68 + 0x60 / 8, &[0xfe]);
    guest.set(Gpr::Rdx, 0x60).code(64, |a| {
        a.in_(al, dx)?;
        a.in_(ax, dx)
    });
    guest
        .exits(
            &Exit::IoIn {
                port: 0x60,
                size: 1,
            },
            Answer::Data(0),
        )
        .retire(1);
    guest.faults(Vector::GP); // port 61h is not allowed
    let mut guest = Guest::long().user();
    guest.set_flags(rflags::IOPL).code(64, |a| a.in_(al, dx));
    guest
        .exits(&Exit::IoIn { port: 0, size: 1 }, Answer::Data(0))
        .retire(1);
}

#[test]
fn msrs_of_the_state_are_answered_here_and_others_are_asked_for() {
    let mut guest = Guest::long();
    let lstar = 0xffff_8000_1234_5678u64;
    guest.set(Gpr::Rcx, u64::from(index::IA32_LSTAR));
    guest
        .set(Gpr::Rax, lstar & 0xffff_ffff)
        .set(Gpr::Rdx, lstar >> 32);
    guest.code(64, |a| {
        a.wrmsr()?;
        a.rdmsr()
    });
    guest.retire(1);
    assert_eq!(guest.cpu.msrs.lstar, lstar);
    guest
        .set(Gpr::Rcx, 0x8b)
        .exits(&Exit::Rdmsr { msr: 0x8b }, Answer::MsrValue(5 << 32 | 6));
    guest.retire(1);
    assert_eq!((guest.gpr(Gpr::Rax), guest.gpr(Gpr::Rdx)), (6, 5));
    guest.code(64, |a| a.wrmsr());
    guest.exits(
        &Exit::Wrmsr {
            msr: 0x8b,
            value: 5 << 32 | 6,
        },
        Answer::MsrRefused,
    );
    guest.faults(Vector::GP);
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rcx, u64::from(index::IA32_LSTAR))
        .set(Gpr::Rdx, 0x8000);
    guest.code(64, |a| a.wrmsr()).faults(Vector::GP); // not canonical
    let mut guest = Guest::long().user();
    guest.code(64, |a| a.rdmsr()).faults(Vector::GP);
}

#[test]
fn halt_and_vmcall_exit_after_they_retired() {
    let mut guest = Guest::long();
    guest.raw(&[0x0f, 0x01, 0xc1, 0xf4]);
    assert_eq!(guest.step(), Step::RetiredExit(Exit::Vmcall));
    assert_eq!(guest.cpu.regs.rip, CODE + 3);
    assert_eq!(guest.step(), Step::RetiredExit(Exit::Hlt));
    assert_eq!(guest.cpu.regs.rip, CODE + 4);
    let mut guest = Guest::long().user();
    guest.raw(&[0xf4]).faults(Vector::GP);
}

#[test]
fn interceptions_are_reported_once_and_executed_by_the_next_step() {
    let mut guest = Guest::long();
    guest.stepper.set_controls(&ExitControls {
        cr3_load_exiting: true,
        cpuid_exiting: true,
        rdtsc_exiting: true,
        invlpg_exiting: true,
        pause_exiting: true,
        exception_bitmap: 1 << 6 | 1 << 3,
        ..ExitControls::default()
    });
    guest.set(Gpr::Rax, guest::PML4).set(Gpr::Rbx, DATA);
    guest.code(64, |a| {
        a.mov(cr3, rax)?;
        a.invlpg(byte_ptr(rbx))?;
        a.cpuid()?;
        a.rdtsc()?;
        a.pause()?;
        a.int3()?;
        a.nop()
    });
    let value = guest::PML4;
    assert_eq!(
        guest.step(),
        Step::Exit(Exit::CrAccess {
            register: 3,
            write: true,
            value
        })
    );
    assert!(!guest.pending.incomplete());
    guest.retire(1);
    assert_eq!(
        guest.step(),
        Step::Exit(Exit::Invlpg(GuestVirtAddr::new(DATA)))
    );
    guest.retire(1);
    let leaf = guest::PML4 as u32;
    assert_eq!(guest.step(), Step::Exit(Exit::Cpuid { leaf, subleaf: 0 }));
    guest.retire(1);
    assert_eq!(guest.step(), Step::Exit(Exit::Rdtsc));
    guest.retire(1);
    assert_eq!(guest.step(), Step::RetiredExit(Exit::Pause));
    let breakpoint = x86::Exception::plain(Vector::BP);
    assert_eq!(guest.step(), Step::Exit(Exit::ExceptionOrNmi(breakpoint)));
    guest.retire(1);
    assert_eq!(guest.cpu.regs.rip, guest::HANDLERS + 16 * 3);
    guest.raw(&[0x0f, 0x0b]);
    let undefined = x86::Exception::ud();
    assert_eq!(guest.step(), Step::Exit(Exit::ExceptionOrNmi(undefined)));
    guest.faults(Vector::UD);
}

#[test]
fn a_fault_after_a_device_read_leaves_nothing_owed() {
    let mut guest = Guest::long();
    guest
        .set(Gpr::Rbx, DEVICE)
        .code(64, |a| a.call(qword_ptr(rbx)));
    guest.exits(&read(0, 8), Answer::Data(1 << 50));
    guest.faults(Vector::GP);
    assert!(!guest.pending.incomplete());
}
