//! From a decoded instruction to the code that executes it.
//!
//! Purpose: one place that knows which method executes what, and that makes an instruction whole: what stops half way leaves
//! registers and segments as they were and stores nothing.
//! Invariants: [`Guest::execute`] either finishes the instruction (or one iteration) or changes nothing but accessed and dirty
//! bits.
//! Elsewhere: fetching ([`crate::code`]); what follows an instruction ([`crate::stepper`]).

use crate::delivery::Event;
use crate::guest::Guest;
use crate::op::{Kind, Op};
use crate::stop::{Exec, Stop, gp, ud};
use iced_x86::{Mnemonic, OpKind};
use x86::regs::rflags;
use x86::{Activity, CpuMode, Exception, Exit, Vector};

/// How an instruction ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Done {
    /// It retired.
    Retired,
    /// It retired and loaded RF.
    RetiredWithRf,
    /// An iteration was made.
    Within,
    /// It retired and exits.
    Exit(Exit),
}

impl Guest<'_> {
    /// Executes one instruction, or one iteration of it.
    #[inline]
    pub(crate) fn execute(&mut self, op: &Op) -> Exec<Done> {
        match op.kind {
            Kind::Plain => self.plain(op)?,
            Kind::Nop => {}
            Kind::Jcc => self.jcc(op)?,
            Kind::Jmp => self.jmp(op)?,
            Kind::Lea => {
                let offset = self.offset(op);
                self.set_gpr(op.register, usize::from(op.size), offset);
            }
            Kind::PushRegister => self.push_register(op)?,
            Kind::PopRegister => self.pop_register(op)?,
            Kind::Call => self.call(op)?,
            Kind::Ret => self.ret(op)?,
            Kind::Own => return self.own(op),
            Kind::Undefined => return Err(ud()),
            Kind::Refused => return Err(Stop::Unimplemented("it cannot run as a stub")),
            Kind::TooLong => return Err(gp(0)),
        }
        Ok(Done::Retired)
    }

    /// The rest, with registers and segments put back if it stops.
    fn own(&mut self, op: &Op) -> Exec<Done> {
        if is_string(op) {
            return self.string(op);
        }
        let registers = self.cpu.regs.clone();
        let segments = self.cpu.segments;
        let shadow = self.cpu.shadow;
        let result = self.by_mnemonic(op).and_then(|done| {
            self.mem.commit(self.pending)?;
            Ok(done)
        });
        if result.is_err() {
            self.mem.stores.clear();
            self.cpu.regs = registers;
            self.cpu.segments = segments;
            self.cpu.shadow = shadow;
            self.mode_changed();
        }
        result
    }

    fn by_mnemonic(&mut self, op: &Op) -> Exec<Done> {
        use Mnemonic as M;
        match op.instruction.mnemonic() {
            M::Hlt => {
                self.require_cpl0()?;
                self.cpu.activity = Activity::Halted;
                return Ok(Done::Exit(Exit::Hlt));
            }
            M::Vmcall => return Ok(Done::Exit(Exit::Vmcall)),
            M::Pause if self.rules.controls.pause_exiting => return Ok(Done::Exit(Exit::Pause)),
            M::Pause => {}
            M::Iret | M::Iretd | M::Iretq => {
                self.iret(op)?;
                return Ok(Done::RetiredWithRf);
            }
            M::Sysret | M::Sysretq => {
                self.sysret(op)?;
                return Ok(Done::RetiredWithRf);
            }
            _ => self.by_subject(op)?,
        }
        Ok(Done::Retired)
    }

    fn by_subject(&mut self, op: &Op) -> Exec {
        use Mnemonic as M;
        match op.instruction.mnemonic() {
            M::Push => self.push_other(op),
            M::Pop => self.pop_other(op),
            M::Pusha | M::Pushad => self.push_all(op),
            M::Popa | M::Popad => self.pop_all(op),
            M::Pushf | M::Pushfd | M::Pushfq => self.push_flags(op),
            M::Popf | M::Popfd | M::Popfq => self.pop_flags(op),
            M::Enter => self.enter(op),
            M::Leave => self.leave(op),
            M::Jmp if is_far(op) => self.far_jump(op),
            M::Call if is_far(op) => self.far_call(op),
            M::Jmp | M::Call => self.indirect(op),
            M::Retf => self.far_return(op),
            M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz => self.loops(op),
            M::Int | M::Int3 | M::Int1 | M::Into => self.interrupt_instruction(op),
            M::Syscall => self.syscall(),
            M::Sysenter => self.sysenter(),
            M::Sysexit | M::Sysexitq => self.sysexit(op),
            M::Swapgs => self.swapgs(),
            M::In => self.port_in(op),
            M::Out => self.port_out(op),
            M::Cli => self.interrupt_flag(false),
            M::Sti => self.interrupt_flag(true),
            M::Cld | M::Std => {
                self.set_flags(rflags::DF, op.instruction.mnemonic() == M::Std);
                Ok(())
            }
            M::Mov => self.mov_system(op),
            M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => self.load_far_pointer(op),
            _ => self.by_rarer_subject(op),
        }
    }

    fn by_rarer_subject(&mut self, op: &Op) -> Exec {
        use Mnemonic as M;
        match op.instruction.mnemonic() {
            M::Lldt => self.lldt(op),
            M::Ltr => self.ltr(op),
            M::Lgdt | M::Lidt => self.load_table(op),
            M::Sgdt | M::Sidt => self.store_table(op),
            M::Sldt | M::Str | M::Smsw => self.store_word(op),
            M::Lmsw => self.lmsw(op),
            M::Clts => self.clts(),
            M::Invlpg => self.invlpg(op),
            M::Invd | M::Wbinvd => self.require_cpl0(),
            M::Cpuid => self.cpuid(),
            M::Rdtsc => self.rdtsc(),
            // There are no performance counters: any number is out of range.
            M::Rdpmc => Err(gp(0)),
            M::Rdmsr => self.rdmsr(),
            M::Wrmsr => self.wrmsr(),
            M::Lar | M::Lsl => self.load_rights_or_limit(op),
            M::Verr | M::Verw => self.verify(op),
            M::Arpl => self.arpl(op),
            M::Bound => self.bound(op),
            M::Xlatb => self.xlat(op),
            M::Salc => {
                self.salc();
                Ok(())
            }
            M::Aaa | M::Aas | M::Aam | M::Aad | M::Daa | M::Das => self.decimal(op),
            M::Wait => self.wait(),
            M::Clflush => self.clflush(op),
            _ => self.by_state_subject(op),
        }
    }

    fn by_state_subject(&mut self, op: &Op) -> Exec {
        use Mnemonic as M;
        self.check_state_instruction(op)?;
        match op.instruction.mnemonic() {
            M::Fxsave | M::Fxsave64 => self.fxsave(op),
            M::Fxrstor | M::Fxrstor64 => self.fxrstor(op),
            M::Ldmxcsr => self.ldmxcsr(op),
            M::Stmxcsr => self.stmxcsr(op),
            M::Maskmovq | M::Maskmovdqu => self.masked_move(op),
            _ => Err(ud()),
        }
    }

    fn mov_system(&mut self, op: &Op) -> Exec {
        let (to, from) = (op.instruction.op0_register(), op.instruction.op1_register());
        let register = |n| op.instruction.op_kind(n) == OpKind::Register;
        let is = |test: fn(iced_x86::Register) -> bool| {
            (register(0) && test(to), register(1) && test(from))
        };
        match is(iced_x86::Register::is_cr) {
            (true, _) => return self.mov_to_control(op),
            (_, true) => return self.mov_from_control(op),
            _ => {}
        }
        let (to_debug, from_debug) = is(iced_x86::Register::is_dr);
        if to_debug || from_debug {
            self.mov_debug(op)
        } else {
            self.mov_segment(op)
        }
    }

    /// INT n, INT3, INT1, INTO.
    fn interrupt_instruction(&mut self, op: &Op) -> Exec {
        let event = match op.instruction.mnemonic() {
            Mnemonic::Int3 => Event::SoftwareException(Vector::BP),
            Mnemonic::Int1 => Event::PrivilegedException(Vector::DB),
            Mnemonic::Into if !self.flag(rflags::OF) => return Ok(()),
            Mnemonic::Into => Event::SoftwareException(Vector::OF),
            _ => Event::Software(Vector(op.instruction.immediate8())),
        };
        let virtual_8086 = self.mode.cpu == CpuMode::Virtual8086;
        if virtual_8086
            && matches!(event, Event::Software(_))
            && !self.mode.io_allowed(self.cpu.regs.rflags)
        {
            return Err(gp(0));
        }
        let vector = event.vector();
        let intercepted = !matches!(event, Event::Software(_))
            && self.rules.controls.exception_bitmap & 1 << (vector.0 & 31) != 0;
        self.intercept(intercepted, Exit::ExceptionOrNmi(Exception::plain(vector)))?;
        self.deliver_event(event, self.next)
    }
}

fn is_far(op: &Op) -> bool {
    use iced_x86::Code as C;
    matches!(
        op.instruction.op0_kind(),
        OpKind::FarBranch16 | OpKind::FarBranch32
    ) || matches!(
        op.instruction.code(),
        C::Jmp_m1616 | C::Jmp_m1632 | C::Jmp_m1664 | C::Call_m1616 | C::Call_m1632 | C::Call_m1664
    )
}

/// A string instruction (and not the SSE2 instructions that share their mnemonics).
fn is_string(op: &Op) -> bool {
    op.instruction.is_string_instruction()
}
