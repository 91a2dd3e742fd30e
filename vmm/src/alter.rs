//! Changing a paused machine: registers, memory, interrupts.

use kvm_bindings::{kvm_msi, kvm_regs};

use crate::error::Error;
use crate::inspect::brief;
use crate::paging::{read_virtual, translate};
use crate::vcpu::{Command, Report};
use crate::vm::Vm;

/// Where interrupt messages go (SDM vol. 3, 13.11.1); bits 12 to 19 are the APIC's id.
const MSI_ADDRESS: u32 = 0xfee0_0000;

/// The general registers by their names.
pub fn general(regs: &kvm_regs) -> [(&'static str, u64); 18] {
    let kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    } = *regs;
    [
        ("rax", rax),
        ("rbx", rbx),
        ("rcx", rcx),
        ("rdx", rdx),
        ("rsi", rsi),
        ("rdi", rdi),
        ("rsp", rsp),
        ("rbp", rbp),
        ("r8", r8),
        ("r9", r9),
        ("r10", r10),
        ("r11", r11),
        ("r12", r12),
        ("r13", r13),
        ("r14", r14),
        ("r15", r15),
        ("rip", rip),
        ("rflags", rflags),
    ]
}

fn general_mut<'r>(regs: &'r mut kvm_regs, name: &str) -> Option<&'r mut u64> {
    Some(match name {
        "rax" => &mut regs.rax,
        "rbx" => &mut regs.rbx,
        "rcx" => &mut regs.rcx,
        "rdx" => &mut regs.rdx,
        "rsi" => &mut regs.rsi,
        "rdi" => &mut regs.rdi,
        "rsp" => &mut regs.rsp,
        "rbp" => &mut regs.rbp,
        "r8" => &mut regs.r8,
        "r9" => &mut regs.r9,
        "r10" => &mut regs.r10,
        "r11" => &mut regs.r11,
        "r12" => &mut regs.r12,
        "r13" => &mut regs.r13,
        "r14" => &mut regs.r14,
        "r15" => &mut regs.r15,
        "rip" => &mut regs.rip,
        "rflags" => &mut regs.rflags,
        _ => return None,
    })
}

impl Vm {
    /// Changes a general register of a paused vCPU.
    ///
    /// # Errors
    /// If there is no such vCPU or register, or the vCPU is not paused.
    pub fn set_register(&mut self, vcpu: u32, name: &str, value: u64) -> Result<(), Error> {
        let not = || Error::Config(format!("vCPU {vcpu} does not exist, or is not paused"));
        let mut registers = self.registers(vcpu).ok_or_else(not)?;
        let register = general_mut(&mut registers.general, name);
        *register.ok_or_else(|| no_register(name))? = value;
        let vcpus = &self.vcpus;
        let vcpu = vcpus.get(vcpu as usize).ok_or_else(not)?;
        vcpu.send(Command::SetRegisters(Box::new(registers)));
        loop {
            match self.next_report() {
                Some((_, Report::Registers(_))) => return Ok(()),
                Some((_, Report::Refused)) | None => return Err(not()),
                Some(_) => {}
            }
        }
    }

    /// Changes a register of a thread that is in the kernel, as the kernel has it: what the thread goes on
    /// with.
    ///
    /// # Errors
    /// If there is no such thread or register.
    pub fn set_thread_register(
        &mut self,
        thread: u64,
        name: &str,
        value: u64,
    ) -> Result<(), Error> {
        let at = self.look(|machine| brief::register(machine, thread, name))?;
        self.memory.put(at, &value)
    }

    /// Reads memory that a space has at an address, up to where it has none.
    ///
    /// # Errors
    /// If there is no such space, or so much memory.
    pub fn read_memory(&mut self, space: u64, address: u64, size: u64) -> Result<Vec<u8>, Error> {
        let table = self.page_table(space)?;
        if size > self.memory.size() {
            return Err(Error::Config(format!("{size} bytes are too many")));
        }
        Ok(read_virtual(&self.memory, table, address, size as usize))
    }

    /// Writes memory that a space has at an address.
    ///
    /// # Errors
    /// If there is no such space, or it has not so much memory there in its page table; nothing is written
    /// then.
    pub fn write_memory(&mut self, space: u64, address: u64, data: &[u8]) -> Result<(), Error> {
        let table = self.page_table(space)?;
        let mut pieces = Vec::new();
        let mut rest = data;
        let mut at = address;
        while !rest.is_empty() {
            let there = translate(&self.memory, table, at).ok_or_else(|| {
                Error::Config(format!(
                    "space {space} has no memory at {at:#x}, or not yet"
                ))
            })?;
            let (now, later) = rest.split_at(rest.len().min(there.left as usize));
            pieces.push((there.pa, now));
            (at, rest) = (at + now.len() as u64, later);
        }
        pieces
            .into_iter()
            .try_for_each(|(pa, data)| self.memory.write(pa, data))
    }

    fn page_table(&mut self, space: u64) -> Result<u64, Error> {
        let seen = self.look(brief::brief)?;
        let mut tables = seen.page_tables.into_iter();
        let table = tables.find(|(number, _)| *number == space);
        let none = || Error::Config(format!("there is no space {space}"));
        Ok(table.ok_or_else(none)?.1)
    }

    /// Sends a vCPU an interrupt, which it takes when it runs and lets interrupts in.
    ///
    /// # Errors
    /// If there is no such vCPU, the vector is none, or KVM refuses.
    pub fn inject(&self, vcpu: u32, vector: u8) -> Result<(), Error> {
        if vcpu as usize >= self.vcpus.len() {
            return Err(Error::Config(format!("there is no vCPU {vcpu}")));
        }
        if vector < 16 {
            return Err(Error::Config(format!(
                "{vector} is no vector of interrupts; the first is 16"
            )));
        }
        let message = kvm_msi {
            address_lo: MSI_ADDRESS | (vcpu & 0xff) << 12,
            // In the format for wide ids, the rest of it.
            address_hi: vcpu & !0xff,
            data: vector.into(),
            ..Default::default()
        };
        let sent = self.fd.signal_msi(message);
        sent.map(drop).map_err(Error::kvm("sending an interrupt"))
    }
}

fn no_register(name: &str) -> Error {
    Error::Config(format!("there is no register `{name}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_register_is_known_by_its_name() {
        let mut regs = kvm_regs::default();
        for (value, (name, _)) in (1..).zip(general(&regs)) {
            *general_mut(&mut regs, name).unwrap() = value;
        }
        let values = general(&regs).map(|(_, value)| value);
        assert!(values.into_iter().eq(1..=18));
    }
}
