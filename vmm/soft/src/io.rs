//! Ports: IN, OUT, INS and OUTS (one element each).
//!
//! Invariants: privilege is checked before the port is touched; a destination of INS is checked before the port is read, so that
//! a device is never read twice for one element.
//! Elsewhere: REP around INS and OUTS ([`crate::strings`]).
//! Source: Intel SDM vol. 1, 19.5 (I/O privilege, permission bitmap); vol. 2 (IN, OUT, INS, OUTS).

use crate::guest::{Guest, immediate, truncate};
use crate::op::Op;
use crate::stop::{Exec, data_of, gp};
use iced_x86::OpKind;
use x86::exit::AccessData;
use x86::{CpuMode, Exit, Gpr};

/// Offset of the I/O map base in the 32- and 64-bit TSS.
const IO_MAP_BASE: u64 = 0x66;

impl Guest<'_> {
    /// #GP(0) unless this privilege level may use all of the ports.
    pub(crate) fn check_port(&mut self, port: u16, size: usize) -> Exec {
        let free =
            self.mode.cpu != CpuMode::Virtual8086 && self.mode.io_allowed(self.cpu.regs.rflags);
        if free || self.mode.cpu == CpuMode::Real {
            return Ok(());
        }
        let tr = self.cpu.tr;
        if tr.attributes.kind() & 0xd != 9 || u64::from(tr.limit) < IO_MAP_BASE + 1 {
            return Err(gp(0));
        }
        let map = self.read_system(tr.base.wrapping_add(IO_MAP_BASE), 2)?;
        let at = map + u64::from(port / 8);
        if at + 1 > u64::from(tr.limit) {
            return Err(gp(0));
        }
        let bits = self.read_system(tr.base.wrapping_add(at), 2)? >> (port % 8);
        if bits & ((1 << size) - 1) != 0 {
            Err(gp(0))
        } else {
            Ok(())
        }
    }

    fn port_operand(&self, op: &Op, n: u32) -> Exec<u16> {
        match op.instruction.op_kind(n) {
            OpKind::Register => Ok(self.cpu.regs[Gpr::Rdx] as u16),
            _ => Ok(immediate(op, n)? as u16 & 0xff),
        }
    }

    pub(crate) fn ask_in(&mut self, port: u16, size: usize) -> Exec<u64> {
        let answer = self.pending.ask(Exit::IoIn {
            port,
            size: size as u8,
        })?;
        Ok(data_of(answer, size))
    }

    pub(crate) fn ask_out(&mut self, port: u16, size: usize, value: u64) -> Exec {
        let data = AccessData {
            value: truncate(value, size),
            size: size as u8,
        };
        self.pending.ask(Exit::IoOut { port, data })?;
        Ok(())
    }

    /// IN.
    pub(crate) fn port_in(&mut self, op: &Op) -> Exec {
        let register = op.instruction.op0_register();
        let port = self.port_operand(op, 1)?;
        self.check_port(port, register.size())?;
        let value = self.ask_in(port, register.size())?;
        self.set_register(register, value);
        Ok(())
    }

    /// OUT.
    pub(crate) fn port_out(&mut self, op: &Op) -> Exec {
        let register = op.instruction.op1_register();
        let port = self.port_operand(op, 0)?;
        self.check_port(port, register.size())?;
        self.ask_out(port, register.size(), self.register(register))
    }
}
