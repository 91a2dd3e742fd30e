//! The virtual machine that a probe guest runs in: 2 MiB of memory, everything mapped one to
//! one for kernel and user, and the host having done all the set-up.

use std::ffi::CString;
use std::sync::Arc;
use std::time::Duration;

use fluke_abi::boot::{KERNEL_CS, KERNEL_SS, USER_CS, USER_SS};
use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_MAX_CPUID_ENTRIES,
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MP_STATE_RUNNABLE, Msrs, kvm_guest_debug, kvm_guest_debug_arch,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Error as Errno, Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::error::Error;
use super::guests::{self, Label};
use super::watchdog::Stop;
use crate::snapshot::tsc;

/// Environment variable with the path of the KVM device.
const DEVICE_VARIABLE: &str = "FLUKEVM_KVM";
const DEVICE: &str = "/dev/kvm";
const API_VERSION: i32 = 12;

const MEMORY: usize = 2 << 20;
const SLOT: u32 = 0;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const PT: u64 = 0x4000;
/// Virtual address above everything that is mapped one to one.
pub const WINDOW: u64 = 2 << 20;
const GDT: u64 = 0x5000;
const TSS: u64 = 0x6000;
const IDT: u64 = 0x7000;
/// Top of CPU 0's stack at CPL 0; those of the others follow.
const STACK: u64 = 0x5_0000;
const STACK_BYTES: u64 = 0x1_0000;
/// Stack that an interrupt from CPL 3 starts with.
const TRAP_STACK: u64 = 0x4_0000;
/// Where the guest itself takes a debug exception.
const DEBUG_STUB: u64 = guests::CODE + guests::STUB_BYTES;
/// Where KVM may put pages of its own.
const TSS_ADDRESS: usize = 0xfffb_d000;

const CR0: u64 = 0x8005_0033; // PG AM WP NE ET MP PE
const CR4: u64 = 0x620; // OSXMMEXCPT OSFXSR PAE
const EFER: u64 = 0xd01; // NXE LMA LME SCE

const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_FMASK: u32 = 0xc000_0084;

/// Why a probe came to nothing. The text completes "does not work: ...".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    #[error("the guest took exception {0}")]
    Fault(u32),
    #[error("KVM could not emulate an instruction")]
    Emulation,
    #[error("the guest shut down by a triple fault")]
    TripleFault,
    #[error("no answer within {} s", .0.as_secs_f32())]
    Timeout(Duration),
    #[error("{0}")]
    Wrong(String),
    #[error("KVM stopped the guest: {0}")]
    Exit(String),
    #[error("{0}")]
    Host(String),
}

fn host(what: &str) -> impl Fn(Errno) -> Broken {
    move |error| Broken::Host(format!("{what}: {error}"))
}

/// Opens the KVM device and looks at its version.
pub fn open() -> Result<(Kvm, String), Error> {
    let path = std::env::var(DEVICE_VARIABLE).unwrap_or_else(|_| DEVICE.into());
    let kvm = open_at(&path)?;
    Ok((kvm, path))
}

fn open_at(path: &str) -> Result<Kvm, Error> {
    let path = path.to_owned();
    let Ok(name) = CString::new(path.as_str()) else {
        return Err(Error::NoDevice { path });
    };
    let kvm = match Kvm::new_with_path(name) {
        Ok(kvm) => kvm,
        Err(source) => {
            return Err(match source.errno() {
                libc::ENOENT | libc::ENODEV | libc::ENXIO => Error::NoDevice { path },
                libc::EACCES | libc::EPERM => Error::Denied { path },
                _ => Error::Open { path, source },
            });
        }
    };
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        found if found < 0 => Err(Error::NotKvm { path }),
        found => Err(Error::ApiVersion { path, found }),
    }
}

/// A probe machine. Everything in it is known and done before a guest runs.
#[derive(Debug)]
pub struct Machine {
    vm: VmFd,
    memory: GuestMemoryMmap,
}

impl Machine {
    /// Makes one, without an interrupt controller.
    pub fn new(kvm: &Kvm) -> Result<Self, Broken> {
        Self::build(kvm, 0)
    }

    /// Makes one whose memory is watched for writes.
    pub fn with_dirty_log(kvm: &Kvm) -> Result<Self, Broken> {
        Self::build(kvm, KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// Makes one with local APICs.
    pub fn with_apic(kvm: &Kvm) -> Result<Self, Broken> {
        let machine = Self::build(kvm, 0)?;
        let created = machine.vm.create_irq_chip();
        created.map_err(host("creating the interrupt controller"))?;
        Ok(machine)
    }

    fn build(kvm: &Kvm, flags: u32) -> Result<Self, Broken> {
        let vm = kvm.create_vm().map_err(host("creating a VM"))?;
        // Only old Intel processors need it, and only some hosts have it.
        let _ = vm.set_tss_address(TSS_ADDRESS);
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)])
            .map_err(|e| Broken::Host(format!("mapping memory: {e}")))?;
        let base = memory
            .get_host_address(GuestAddress(0))
            .map_err(|e| Broken::Host(format!("mapping memory: {e}")))?;
        let region = kvm_userspace_memory_region {
            slot: SLOT,
            flags,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: base.addr() as u64,
        };
        // SAFETY: the region is a mapping of `MEMORY` bytes, which lives as long as the machine.
        unsafe { vm.set_user_memory_region(region) }.map_err(host("giving memory to the VM"))?;
        let machine = Self { vm, memory };
        machine.fill()?;
        Ok(machine)
    }

    /// Page tables, GDT, TSS, IDT and the guests.
    fn fill(&self) -> Result<(), Broken> {
        const USER_TABLE: u64 = 0x7; // present, writable, user
        const LARGE_PAGE: u64 = 0x80;
        self.write(PML4, PDPT | USER_TABLE)?;
        self.write(PDPT, PD | USER_TABLE)?;
        self.write(PD, USER_TABLE | LARGE_PAGE)?;
        // Kernel code and data, user data and code: the selectors of fluke_abi::boot.
        self.write(GDT + 0x08, 0x00af_9b00_0000_ffff)?;
        self.write(GDT + 0x10, 0x00cf_9300_0000_ffff)?;
        self.write(GDT + 0x18, 0x00cf_f300_0000_ffff)?;
        self.write(GDT + 0x20, 0x00af_fb00_0000_ffff)?;
        self.write(TSS + 4, TRAP_STACK)?;
        self.memory
            .write_slice(guests::image(), GuestAddress(guests::CODE))
            .map_err(|e| Broken::Host(format!("loading the guest: {e}")))?;
        for vector in 0..32 {
            let stub = guests::CODE + u64::from(vector) * guests::STUB_BYTES;
            self.gate(vector, stub, 0)?;
        }
        self.gate(3, Label::UserMark.address(), 3)
    }

    fn gate(&self, vector: u8, handler: u64, privilege: u64) -> Result<(), Broken> {
        let low = (handler & 0xffff)
            | u64::from(KERNEL_CS) << 16
            | (0x8e00 | privilege << 13) << 32
            | (handler >> 16 & 0xffff) << 48;
        self.write(IDT + u64::from(vector) * 16, low)?;
        self.write(IDT + u64::from(vector) * 16 + 8, handler >> 32)
    }

    /// Lets `handler` serve a vector.
    pub fn handle(&self, vector: u8, handler: Label) -> Result<(), Broken> {
        self.gate(vector, handler.address(), 0)
    }

    /// Writes a number to guest memory.
    pub fn write(&self, address: u64, value: u64) -> Result<(), Broken> {
        self.memory
            .write_obj(value.to_le(), GuestAddress(address))
            .map_err(|e| Broken::Host(format!("writing guest memory: {e}")))
    }

    /// Maps the page at [`WINDOW`] to the one at a physical address.
    pub fn map_window(&self, page: u64) -> Result<(), Broken> {
        const USER_PAGE: u64 = 0x7; // present, writable, user
        self.write(PD + 8, PT | USER_PAGE)?;
        self.write(PT, page | USER_PAGE)
    }

    /// Takes the dirty log: a bit for each page written since the last time.
    pub fn take_dirty_log(&self) -> Result<Vec<u64>, Broken> {
        let log = self.vm.get_dirty_log(SLOT, MEMORY);
        log.map_err(host("reading the dirty log"))
    }
}

/// A CPU of a [`Machine`].
#[derive(Debug)]
pub struct Cpu {
    fd: VcpuFd,
    /// The machine, which must outlive the CPU.
    pub machine: Arc<Machine>,
}

/// What a guest said or did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It wrote to [`guests::MARK`].
    Mark(u32),
    /// A step or breakpoint; the instruction at this address comes next.
    Debug(u64),
}

impl Cpu {
    /// Makes CPU `id`, which starts at `entry` in CPL 0; `lstar` is where its `syscall` goes.
    pub fn new(
        kvm: &Kvm,
        machine: &Arc<Machine>,
        id: u8,
        entry: Label,
        lstar: Label,
    ) -> Result<Self, Broken> {
        let fd = machine
            .vm
            .create_vcpu(id.into())
            .map_err(host("creating a vCPU"))?;
        let mut cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(host("reading CPUID"))?;
        for leaf in cpuid.as_mut_slice() {
            match leaf.function {
                1 => leaf.ebx = leaf.ebx & 0x00ff_ffff | u32::from(id) << 24,
                0xb | 0x1f => leaf.edx = id.into(),
                _ => {}
            }
        }
        fd.set_cpuid2(&cpuid).map_err(host("setting CPUID"))?;
        let mut special = fd.get_sregs().map_err(host("reading registers"))?;
        let code = segment(KERNEL_CS, 11, 1, 0);
        let data = segment(KERNEL_SS, 3, 0, 1);
        special.cs = code;
        (special.ds, special.es, special.fs) = (data, data, data);
        (special.gs, special.ss) = (data, data);
        special.tr = kvm_segment {
            base: TSS,
            limit: 0x67,
            selector: 0x28,
            type_: 11,
            present: 1,
            ..Default::default()
        };
        (special.gdt.base, special.gdt.limit) = (GDT, 0x27);
        (special.idt.base, special.idt.limit) = (IDT, 0xfff);
        (special.cr0, special.cr3, special.cr4, special.efer) = (CR0, PML4, CR4, EFER);
        fd.set_sregs(&special).map_err(host("setting registers"))?;
        // sysret takes CS 16 and SS 8 above its selector.
        let selectors = u64::from(USER_SS - 8) << 48 | u64::from(KERNEL_CS) << 32;
        let entries = [
            (MSR_STAR, selectors),
            (MSR_LSTAR, lstar.address()),
            (MSR_FMASK, 0x200),
        ]
        .map(|(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        });
        let msrs = Msrs::from_entries(&entries)
            .map_err(|e| Broken::Host(format!("a list of MSRs: {e:?}")))?;
        let set = fd.set_msrs(&msrs).map_err(host("setting MSRs"))?;
        if set != entries.len() {
            return Err(Broken::Host("KVM refuses the MSRs of syscall".into()));
        }
        let registers = kvm_regs {
            rip: entry.address(),
            rsp: STACK + STACK_BYTES * u64::from(id),
            rflags: 2,
            ..Default::default()
        };
        fd.set_regs(&registers).map_err(host("setting registers"))?;
        Ok(Self {
            fd,
            machine: Arc::clone(machine),
        })
    }

    /// Lets the CPU run though it is not the first one; for machines with an APIC.
    pub fn wake(&self) -> Result<(), Broken> {
        let runnable = kvm_mp_state {
            mp_state: KVM_MP_STATE_RUNNABLE,
        };
        self.fd
            .set_mp_state(runnable)
            .map_err(host("starting a vCPU"))
    }

    /// Lets the CPU start at CPL 3.
    pub fn drop_to_user(&self) -> Result<(), Broken> {
        const USER: u8 = 3;
        let mut special = self.fd.get_sregs().map_err(host("reading registers"))?;
        (special.cs.selector, special.cs.dpl) = (USER_CS, USER);
        for data in [&mut special.ss, &mut special.ds, &mut special.es] {
            (data.selector, data.dpl) = (USER_SS, USER);
        }
        self.fd
            .set_sregs(&special)
            .map_err(host("setting registers"))
    }

    /// Makes the CPU forget all translations of addresses, as far as it may.
    pub fn flush(&self) -> Result<(), Broken> {
        crate::kvm::flush_translations(&self.fd).map_err(|error| Broken::Host(error.to_string()))
    }

    /// Sets the time-stamp counter to something else, and looks whether it is.
    pub fn move_time(&self) -> Result<(), Broken> {
        match tsc::can_be_set(&self.fd) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Broken::Wrong("KVM does not set it".into())),
            Err(error) => Err(Broken::Host(error.to_string())),
        }
    }

    /// Stops after every instruction, or not.
    pub fn single_step(&self, on: bool) -> Result<(), Broken> {
        let control = if on {
            KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP
        } else {
            0
        };
        self.debug(control, kvm_guest_debug_arch::default())
    }

    /// Stops before the instruction at `place`.
    pub fn break_at(&self, place: Label) -> Result<(), Broken> {
        const BREAK_0: u64 = 0x402; // DR7: global, on execution
        let mut arch = kvm_guest_debug_arch::default();
        arch.debugreg[0] = place.address();
        arch.debugreg[7] = BREAK_0;
        self.debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, arch)
    }

    fn debug(&self, control: u32, arch: kvm_guest_debug_arch) -> Result<(), Broken> {
        let debug = kvm_guest_debug {
            control,
            arch,
            ..Default::default()
        };
        self.fd
            .set_guest_debug(&debug)
            .map_err(host("KVM_SET_GUEST_DEBUG"))
    }

    /// Runs until the guest says something.
    pub fn run(&mut self, stop: &Stop) -> Result<Event, Broken> {
        loop {
            if stop.requested() {
                return Err(Broken::Timeout(Duration::ZERO));
            }
            match self.fd.run() {
                Ok(VcpuExit::IoOut(port, data)) => {
                    let mut value = [0; 4];
                    let bytes = data.len().min(value.len());
                    value[..bytes].copy_from_slice(&data[..bytes]);
                    let value = u32::from_le_bytes(value);
                    match port {
                        guests::NOTHING => {}
                        guests::MARK => return Ok(Event::Mark(value)),
                        guests::FAULT => return Err(Broken::Fault(value)),
                        _ => return Err(Broken::Exit(format!("output to port {port:#x}"))),
                    }
                }
                Ok(VcpuExit::Debug(debug)) => return Ok(Event::Debug(debug.pc)),
                Ok(VcpuExit::InternalError) => return Err(Broken::Emulation),
                Ok(VcpuExit::Shutdown) => return Err(Broken::TripleFault),
                Ok(exit) => return Err(Broken::Exit(format!("{exit:?}"))),
                Err(e) if [libc::EINTR, libc::EAGAIN].contains(&e.errno()) => {}
                Err(e) => return Err(Broken::Exit(e.to_string())),
            }
        }
    }

    /// Runs until the guest says or does something, which must be this.
    pub fn expect(&mut self, stop: &Stop, event: Event) -> Result<(), Broken> {
        let seen = self.run(stop)?;
        if seen == event {
            return Ok(());
        }
        Err(Broken::Wrong(match (seen, event) {
            (Event::Debug(at), _) if at.wrapping_sub(DEBUG_STUB) < guests::STUB_BYTES => {
                "the debug exception went to the guest".into()
            }
            (Event::Mark(_), Event::Debug(at)) => format!("the guest did not stop at {at:#x}"),
            (Event::Debug(at), _) => format!("the guest stopped at {at:#x}"),
            (Event::Mark(value), _) => format!("the guest reports {value:#x}"),
        }))
    }
}

fn segment(selector: u16, type_: u8, l: u8, db: u8) -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        l,
        db,
        g: 1,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_none_is_told_in_one_line() {
        let missing = open_at("/nonexistent/kvm").unwrap_err();
        assert!(matches!(missing, Error::NoDevice { .. }), "{missing}");
        let other = open_at("/dev/null").unwrap_err();
        assert!(matches!(other, Error::NotKvm { .. }), "{other}");
        for text in [missing.to_string(), other.to_string()] {
            assert!(!text.contains('\n') && !text.contains("  "), "{text:?}");
        }
    }

    #[test]
    fn the_image_fits_and_labels_lie_in_it() {
        let end = guests::CODE + guests::image().len() as u64;
        assert!(end <= guests::INPUT, "{end:#x}");
        assert!((guests::CODE + 32 * guests::STUB_BYTES..end).contains(&Label::Write.address()));
    }
}
