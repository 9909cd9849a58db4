//! Executing one instruction natively, in this process.
//!
//! One page of code below 2 GiB loads everything from a structure beside it, RSP last, executes the instruction and stores
//! everything back. SIGFPE is caught on a stack of its own.
#![allow(unsafe_code)] // Maps memory and jumps into code assembled here.

use super::{DATA, DATA_LEN};
use iced_x86::code_asm::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use x86::CpuState;

/// What the native side loads and stores.
#[repr(C, align(64))]
#[derive(Clone)]
pub(super) struct Native {
    pub(super) fx: [u8; 512],
    pub(super) gpr: [u64; 16],
    pub(super) rflags: u64,
    host_rsp: u64,
    host_fx: [u8; 512],
}

/// Where the native code goes on after SIGFPE, and whether there was one.
static AFTER: AtomicU64 = AtomicU64::new(0);
static RAISED: AtomicBool = AtomicBool::new(false);

/// #XM of the native instruction: goes on behind it. MXCSR comes back from the frame with its flags.
extern "C" fn on_sigfpe(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: installed with SA_SIGINFO, so the kernel passes a valid ucontext_t that is this handler's alone while it runs.
    unsafe {
        let registers = &mut (*context).uc_mcontext.gregs;
        registers[libc::REG_RIP as usize] = AFTER.load(Ordering::SeqCst) as i64;
    }
    RAISED.store(true, Ordering::SeqCst);
}

/// Handles SIGFPE of this thread on a stack of its own: the guest's RSP is no stack.
pub(super) fn catch_sigfpe() {
    // SAFETY: both structures are plain data for which zero is valid; the stack is leaked, so it outlives the thread's use of it; the
    // handler has the signature SA_SIGINFO wants and touches only atomics and its context.
    unsafe {
        let mut stack: libc::stack_t = std::mem::zeroed();
        stack.ss_size = 1 << 16;
        stack.ss_sp = Box::leak(vec![0u8; 1 << 16].into_boxed_slice())
            .as_mut_ptr()
            .cast();
        assert_eq!(libc::sigaltstack(&stack, std::ptr::null_mut()), 0);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigfpe as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        assert_eq!(
            libc::sigaction(libc::SIGFPE, &action, std::ptr::null_mut()),
            0
        );
    }
}

/// One page of code and the data.
pub(super) struct Host {
    page: *mut u8,
    data: *mut u8,
}

const CODE_ROOM: usize = 4096;

fn low_pages(len: usize) -> *mut u8 {
    // SAFETY: a new anonymous mapping at an address the kernel chooses replaces nothing.
    unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
            -1,
            0,
        );
        assert_ne!(at, libc::MAP_FAILED);
        at.cast()
    }
}

impl Native {
    pub(super) fn new(cpu: &CpuState) -> Self {
        Self {
            fx: cpu.fpu.to_fxsave(),
            gpr: cpu.regs.gpr,
            rflags: cpu.regs.rflags,
            host_rsp: 0,
            host_fx: [0; 512],
        }
    }
}

impl Host {
    pub(super) fn new() -> Self {
        let page = low_pages(CODE_ROOM + 4096);
        // SAFETY: MAP_FIXED_NOREPLACE fails rather than replace a mapping that is there.
        let data = unsafe {
            libc::mmap(
                DATA as *mut _,
                DATA_LEN,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        assert_eq!(data as u64, DATA, "the data's address is free");
        Self {
            page,
            data: data.cast(),
        }
    }

    fn native(&self) -> *mut Native {
        // SAFETY: the mapping is CODE_ROOM + 4096 bytes long.
        unsafe { self.page.add(CODE_ROOM).cast() }
    }

    /// Executes `bytes` natively on the state; true if that raised #XM.
    pub(super) fn run(&self, bytes: &[u8], state: &mut Native, data: &mut [u8]) -> bool {
        let base = self.native() as u64;
        let at = |offset: usize| ptr(base + offset as u64);
        let gpr_at = |n: usize| at(std::mem::offset_of!(Native, gpr) + 8 * n);
        let gprs = [
            rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15,
        ];
        let mut a = CodeAssembler::new(64).expect("assembler");
        let saved = [rbx, rbp, r12, r13, r14, r15];
        for register in saved {
            a.push(register).unwrap();
        }
        a.mov(
            qword_ptr(base + std::mem::offset_of!(Native, host_rsp) as u64),
            rsp,
        )
        .unwrap();
        a.fxsave64(at(std::mem::offset_of!(Native, host_fx)))
            .unwrap();
        a.fxrstor64(at(std::mem::offset_of!(Native, fx))).unwrap();
        a.push(qword_ptr(
            base + std::mem::offset_of!(Native, rflags) as u64,
        ))
        .unwrap();
        a.popfq().unwrap();
        for (n, register) in gprs.into_iter().enumerate() {
            a.mov(register, gpr_at(n)).unwrap();
        }
        let before = a.assemble(self.page as u64).expect("assembles").len();
        AFTER.store(
            self.page as u64 + (before + bytes.len()) as u64,
            Ordering::SeqCst,
        );
        RAISED.store(false, Ordering::SeqCst);
        a.db(bytes).unwrap();
        for (n, register) in gprs.into_iter().enumerate() {
            a.mov(gpr_at(n), register).unwrap();
        }
        a.mov(
            rsp,
            qword_ptr(base + std::mem::offset_of!(Native, host_rsp) as u64),
        )
        .unwrap();
        a.pushfq().unwrap();
        a.pop(qword_ptr(
            base + std::mem::offset_of!(Native, rflags) as u64,
        ))
        .unwrap();
        a.fxsave64(at(std::mem::offset_of!(Native, fx))).unwrap();
        a.fxrstor64(at(std::mem::offset_of!(Native, host_fx)))
            .unwrap();
        for register in saved.into_iter().rev() {
            a.pop(register).unwrap();
        }
        a.cld().unwrap();
        a.ret().unwrap();
        let code = a.assemble(self.page as u64).expect("assembles");
        assert!(code.len() <= CODE_ROOM && data.len() <= DATA_LEN);
        // SAFETY: code and data fit their mappings, as just checked, and overlap nothing of Rust's; the structure lies page-aligned behind the code;
        // the function keeps the registers the ABI wants kept, and the instruction under test addresses only the data (see `differential`).
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.page, code.len());
            std::ptr::copy_nonoverlapping(data.as_ptr(), self.data, data.len());
            self.native().write(state.clone());
            let function: extern "sysv64" fn() = std::mem::transmute(self.page);
            function();
            *state = self.native().read();
            std::ptr::copy_nonoverlapping(self.data, data.as_mut_ptr(), data.len());
        }
        RAISED.load(Ordering::SeqCst)
    }
}
