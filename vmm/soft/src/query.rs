//! Asking about descriptors: LAR, LSL, VERR, VERW.
//!
//! Invariants: a selector that may not be looked at clears ZF and faults nothing.
//! Source: Intel SDM vol. 2 (LAR, LSL, VERR, VERW).

use crate::descriptor::{Descriptor, is_null};
use crate::guest::Guest;
use crate::op::Op;
use crate::stop::{Exec, ud};
use iced_x86::Mnemonic;
use x86::regs::rflags;

impl Guest<'_> {
    /// LAR and LSL.
    pub(crate) fn load_rights_or_limit(&mut self, op: &Op) -> Exec {
        if !self.mode.protected {
            return Err(ud());
        }
        let rights = op.instruction.mnemonic() == Mnemonic::Lar;
        let selector = self.operand(op, 1, 2)? as u16;
        let found = self.visible(selector)?.filter(|descriptor| {
            descriptor.attributes().is_code_or_data()
                || system_type_shown(descriptor.kind(), rights, self.mode.lma)
        });
        self.set_flags(rflags::ZF, found.is_some());
        if let Some(descriptor) = found {
            let value = if rights {
                descriptor.low >> 32 & 0x00ff_ff00
            } else {
                u64::from(descriptor.limit())
            };
            self.set_register(op.instruction.op0_register(), value);
        }
        Ok(())
    }

    /// VERR and VERW.
    pub(crate) fn verify(&mut self, op: &Op) -> Exec {
        if !self.mode.protected {
            return Err(ud());
        }
        let selector = self.operand(op, 0, 2)? as u16;
        let write = op.instruction.mnemonic() == Mnemonic::Verw;
        let allowed = self.visible(selector)?.is_some_and(|descriptor| {
            let attributes = descriptor.attributes();
            let bit1 = attributes.kind() & 2 != 0;
            attributes.is_code_or_data()
                && if attributes.is_code() {
                    !write && bit1
                } else {
                    !write || bit1
                }
        });
        self.set_flags(rflags::ZF, allowed);
        Ok(())
    }

    /// The descriptor, if the selector and this privilege level may see it.
    fn visible(&mut self, selector: u16) -> Exec<Option<Descriptor>> {
        if is_null(selector) {
            return Ok(None);
        }
        let Some(descriptor) = self.descriptor(selector)? else {
            return Ok(None);
        };
        let attributes = descriptor.attributes();
        let conforming = attributes.is_code() && attributes.kind() & 4 != 0;
        let privilege = self.mode.cpl.max((selector & 3) as u8);
        Ok((conforming || privilege <= attributes.dpl()).then_some(descriptor))
    }
}

/// Whether LAR (or LSL) accepts a system descriptor of this type (SDM vol. 2, tables in LAR and LSL).
fn system_type_shown(kind: u8, rights: bool, lma: bool) -> bool {
    match kind {
        2 | 9 | 0xb => true,
        1 | 3 => !lma,
        0xc => rights,
        4 | 5 => rights && !lma,
        _ => false,
    }
}
