//! Registers as the debugger has them.

use std::num::NonZeroUsize;

use gdbstub::arch::{Arch, RegId, Registers as _};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::id::X86_64CoreRegId as Id;
use gdbstub_arch::x86::reg::{X86_64CoreRegs, X86SegmentRegs, X87FpuInternalRegs};
use kvm_bindings::kvm_fpu;

use crate::vcpu::Registers;

/// Tag of an empty register of the FPU.
const EMPTY: u32 = 3;

/// Registers for the debugger.
pub fn to_gdb(registers: &Registers) -> X86_64CoreRegs {
    let Registers {
        general: r,
        special: s,
        float: f,
        ..
    } = registers;
    let tags = (0..8).map(|n| {
        if f.ftwx >> n & 1 == 0 {
            EMPTY << (2 * n)
        } else {
            0
        }
    });
    X86_64CoreRegs {
        regs: [
            r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15,
        ],
        // The upper half is reserved.
        eflags: r.rflags as u32,
        rip: r.rip,
        segments: X86SegmentRegs {
            cs: s.cs.selector.into(),
            ss: s.ss.selector.into(),
            ds: s.ds.selector.into(),
            es: s.es.selector.into(),
            fs: s.fs.selector.into(),
            gs: s.gs.selector.into(),
        },
        st: f.fpr.map(|bytes| {
            let mut register = [0; 10];
            register.copy_from_slice(&bytes[..10]);
            register
        }),
        fpu: X87FpuInternalRegs {
            fctrl: f.fcw.into(),
            fstat: f.fsw.into(),
            ftag: tags.sum(),
            fiseg: (f.last_ip >> 32) as u32,
            fioff: f.last_ip as u32,
            foseg: (f.last_dp >> 32) as u32,
            fooff: f.last_dp as u32,
            fop: f.last_opcode.into(),
        },
        xmm: f.xmm.map(u128::from_le_bytes),
        mxcsr: f.mxcsr,
    }
}

/// What a vCPU has in its registers when the debugger has changed them; none if it wants what cannot be
/// done: a selector alone makes no segment.
pub fn from_gdb(wanted: &X86_64CoreRegs, now: &Registers) -> Option<Registers> {
    if wanted.segments != to_gdb(now).segments {
        return None;
    }
    let mut registers = *now;
    let r = &mut registers.general;
    [
        r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15,
    ] = wanted.regs;
    r.rip = wanted.rip;
    r.rflags = wanted.eflags.into();
    let fpu = &wanted.fpu;
    let offset = |upper: u32, lower: u32| u64::from(upper) << 32 | u64::from(lower);
    let valid = (0..8).filter(|n| fpu.ftag >> (2 * n) & EMPTY != EMPTY);
    registers.float = kvm_fpu {
        fcw: fpu.fctrl as u16,
        fsw: fpu.fstat as u16,
        ftwx: valid.map(|n| 1 << n).sum(),
        last_opcode: fpu.fop as u16,
        last_ip: offset(fpu.fiseg, fpu.fioff),
        last_dp: offset(fpu.foseg, fpu.fooff),
        xmm: wanted.xmm.map(u128::to_le_bytes),
        mxcsr: wanted.mxcsr,
        ..registers.float
    };
    for (register, bytes) in registers.float.fpr.iter_mut().zip(&wanted.st) {
        register[..10].copy_from_slice(bytes);
    }
    Some(registers)
}

/// All registers as the protocol has them, one behind the other.
fn to_bytes(registers: &X86_64CoreRegs) -> Vec<u8> {
    let mut bytes = Vec::new();
    registers.gdb_serialize(|byte| bytes.push(byte.unwrap_or(0)));
    bytes
}

/// Where a register is among them: offset and bytes.
fn place(id: Id) -> Option<(usize, usize)> {
    Some(match id {
        Id::Gpr(n) => (8 * usize::from(n), 8),
        Id::Rip => (128, 8),
        Id::Eflags => (136, 4),
        Id::Segment(segment) => (140 + 4 * segment as usize, 4),
        Id::St(n) => (164 + 10 * usize::from(n), 10),
        Id::Fpu(register) => (244 + 4 * register as usize, 4),
        Id::Xmm(n) => (276 + 16 * usize::from(n), 16),
        Id::Mxcsr => (532, 4),
        _ => return None,
    })
}

/// A register that the debugger asks for alone.
#[derive(Clone, Copy, Debug)]
pub enum Register {
    /// One of those that it can have all at once.
    Core(Id),
    /// Linux's number of a call, which gdb takes for a register.
    LinuxCall,
    /// Base of `fs`.
    FsBase,
    /// Base of `gs`: in the kernel, where the CPU's own structure is.
    GsBase,
}

impl RegId for Register {
    fn from_raw_id(number: usize) -> Option<(Self, Option<NonZeroUsize>)> {
        let other = match number {
            57 => Self::LinuxCall,
            58 => Self::FsBase,
            59 => Self::GsBase,
            _ => return Id::from_raw_id(number).map(|(id, size)| (Self::Core(id), size)),
        };
        Some((other, NonZeroUsize::new(8)))
    }
}

impl Register {
    /// Its bytes; empty if no CPU has it.
    pub fn read(self, registers: &Registers) -> Vec<u8> {
        match self {
            Self::Core(id) => {
                let bytes = to_bytes(&to_gdb(registers));
                let register = place(id).and_then(|(at, size)| bytes.get(at..at + size));
                register.unwrap_or_default().into()
            }
            Self::LinuxCall => Vec::new(),
            Self::FsBase => registers.special.fs.base.to_le_bytes().into(),
            Self::GsBase => registers.special.gs.base.to_le_bytes().into(),
        }
    }

    /// What a vCPU has when the debugger has changed the register; none if it cannot be done.
    pub fn write(self, value: &[u8], now: &Registers) -> Option<Registers> {
        let Self::Core(id) = self else {
            return None;
        };
        let mut registers = to_gdb(now);
        let mut bytes = to_bytes(&registers);
        let (at, size) = place(id).filter(|(_, size)| *size == value.len())?;
        bytes.get_mut(at..at + size)?.copy_from_slice(value);
        registers.gdb_deserialize(&bytes).ok()?;
        from_gdb(&registers, now)
    }
}

/// The architecture as `gdbstub_arch` has it, with the registers of [`Register`].
pub enum X86_64 {}

impl Arch for X86_64 {
    type Usize = u64;
    type Registers = X86_64CoreRegs;
    type BreakpointKind = usize;
    type RegId = Register;

    fn target_description_xml() -> Option<&'static str> {
        X86_64_SSE::target_description_xml()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Registers that are all different.
    fn registers() -> X86_64CoreRegs {
        let mut bytes: Vec<u8> = (0..536_u32).map(|n| (n * 7 + n / 256) as u8).collect();
        // What has 16 bits or fewer in the CPU.
        for offset in (244..276).step_by(4).chain((140..164).step_by(4)) {
            bytes[offset + 2..offset + 4].fill(0);
        }
        let mut registers = X86_64CoreRegs::default();
        registers.gdb_deserialize(&bytes).unwrap();
        registers.fpu.ftag = 0xc3f0;
        registers.fpu.fop &= 0x7ff;
        registers
    }

    fn now() -> Registers {
        Registers {
            general: Default::default(),
            special: Default::default(),
            float: Default::default(),
            halted: false,
        }
    }

    #[test]
    fn registers_come_back_as_they_were_written() {
        let wanted = registers();
        let mut now = now();
        for (segment, selector) in [
            (&mut now.special.cs, wanted.segments.cs),
            (&mut now.special.ss, wanted.segments.ss),
            (&mut now.special.ds, wanted.segments.ds),
            (&mut now.special.es, wanted.segments.es),
            (&mut now.special.fs, wanted.segments.fs),
            (&mut now.special.gs, wanted.segments.gs),
        ] {
            segment.selector = selector as u16;
        }
        let written = from_gdb(&wanted, &now).unwrap();
        assert_eq!(to_gdb(&written), wanted);
        assert_eq!(from_gdb(&wanted, &written), Some(written));
        now.special.cs.selector ^= 8;
        assert_eq!(from_gdb(&wanted, &now), None);
    }

    #[test]
    fn every_register_has_its_place() {
        let mut end = 0;
        for number in 0.. {
            let Some((id, size)) = Id::from_raw_id(number) else {
                break;
            };
            assert_eq!(place(id), Some((end, size.unwrap().get())), "{id:?}");
            end += size.unwrap().get();
        }
        assert_eq!(end, to_bytes(&registers()).len());
    }
}
