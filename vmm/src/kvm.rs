//! Opening KVM, making a VM, and the registers that a vCPU starts with.

use std::ffi::CString;
use std::io;
use std::ops::Range;

use kvm_bindings::{
    CpuId, KVM_CAP_X2APIC_API, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
    KVM_MP_STATE_RUNNABLE, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    kvm_cpuid_entry2, kvm_enable_cap, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use fluke_abi::boot::{KERNEL_CS, KERNEL_SS};
use fluke_abi::layout::PAGE_SIZE;

use crate::boot::Entrance;
use crate::config::MEMORY_MAX;
use crate::error::Error;
use crate::memory::Memory;

/// Environment variable with the path of the KVM device, for tests and unusual hosts.
pub const DEVICE_VARIABLE: &str = "FLUKEVM_KVM";
const DEVICE: &str = "/dev/kvm";

/// Frequency of the local APIC's timer at divide by 1, kHz: KVM emulates a bus of 1 GHz.
pub const APIC_TIMER_KHZ: u64 = 1_000_000;

/// Where KVM may put three pages of its own, above all memory and below the controllers.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// APIC ids from here on need the wide format.
const WIDE_APIC_IDS: u32 = 255;

/// CPUID leaf with the hypervisor's frequencies, and its number's base.
const TIMING_LEAF: u32 = 0x4000_0010;
const HYPERVISOR_LEAF: u32 = 0x4000_0000;

pub(crate) const CR0: u64 = 0x8005_0033; // PG AM WP NE ET MP PE
const CR3_WRITE_THROUGH: u64 = 1 << 3;
pub(crate) const CR4: u64 = 0x620; // OSXMMEXCPT OSFXSR PAE
pub(crate) const CR4_SMEP: u64 = 1 << 20;
pub(crate) const CR4_SMAP: u64 = 1 << 21;
pub(crate) const EFER: u64 = 0xd00; // NXE LMA LME
pub(crate) const EFER_LMA: u64 = 1 << 10;

/// Opens the KVM device.
///
/// # Errors
/// If there is none or it cannot be used; the text says what to do.
pub fn open() -> Result<Kvm, Error> {
    let path = std::env::var(DEVICE_VARIABLE).unwrap_or_else(|_| DEVICE.into());
    let fail = |why: String| Error::NoKvm {
        path: path.clone(),
        why,
    };
    let name = CString::new(path.as_str()).map_err(|_| fail("not a path".into()))?;
    let kvm = Kvm::new_with_path(name).map_err(|e| {
        let error = io::Error::from(e);
        fail(match error.kind() {
            io::ErrorKind::NotFound => "there is no such device; enable virtualization in the \
                firmware, load kvm_intel or kvm_amd, or pass the device into the container"
                .into(),
            io::ErrorKind::PermissionDenied => "permission denied; add yourself to the device's \
                group, usually `kvm`, and log in again"
                .into(),
            _ => format!("{error}; give the path of a KVM device in {DEVICE_VARIABLE}"),
        })
    })?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        -1 => Err(fail(format!(
            "this is not a KVM device; give the path of one in {DEVICE_VARIABLE}"
        ))),
        version => Err(fail(format!(
            "it has version {version} of the KVM API, and 12 is needed; use another host kernel"
        ))),
    }
}

/// Makes a VM with that memory, an interrupt controller, and room for `vcpus` vCPUs. Writes to the
/// memory are logged if that is wanted, see [`take_dirty_log`].
///
/// # Errors
/// If KVM refuses.
pub fn create_vm(kvm: &Kvm, memory: &Memory, vcpus: u32, logged: bool) -> Result<VmFd, Error> {
    let vm = kvm.create_vm().map_err(Error::kvm("creating a VM"))?;
    vm.set_tss_address(TSS_ADDRESS)
        .map_err(Error::kvm("setting the TSS address"))?;
    vm.create_irq_chip()
        .map_err(Error::kvm("creating the interrupt controllers"))?;
    if vcpus > WIDE_APIC_IDS {
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_X2APIC_API,
            ..Default::default()
        };
        cap.args[0] =
            u64::from(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK);
        vm.enable_cap(&cap)
            .map_err(Error::kvm("enabling more than 255 vCPUs"))?;
    }
    set_memory(&vm, memory, logged)?;
    Ok(vm)
}

/// The one slot of memory that a VM has.
const SLOT: u32 = 0;

/// Gives a VM its memory, or another flag to the memory it has: whether to log writes to it.
///
/// # Errors
/// If KVM refuses.
pub fn set_memory(vm: &VmFd, memory: &Memory, logged: bool) -> Result<(), Error> {
    set_slot(vm, memory, SLOT, 0..memory.size(), log_flag(logged))
}

const fn log_flag(logged: bool) -> u32 {
    if logged { KVM_MEM_LOG_DIRTY_PAGES } else { 0 }
}

/// Gives a VM a range of its memory in a slot; an empty range takes it back.
fn set_slot(
    vm: &VmFd,
    memory: &Memory,
    slot: u32,
    range: Range<u64>,
    flags: u32,
) -> Result<(), Error> {
    let region = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: range.start,
        memory_size: range.end - range.start,
        userspace_addr: memory.host_address()? + range.start,
    };
    // SAFETY: the range lies in the mapping of `memory`, a clone of which lives as long as any vCPU of
    // this VM, and is used by this process only through `vm-memory`.
    unsafe { vm.set_user_memory_region(region) }.map_err(Error::kvm("giving the VM its memory"))
}

/// A part of the memory: its range, and whether the guest's writes to it leave the guest.
pub type Part = (Range<u64>, bool);

/// Gives a VM its memory in parts, instead of as a whole. No vCPU may run.
///
/// # Errors
/// If KVM refuses.
pub fn split_memory(vm: &VmFd, memory: &Memory, parts: &[Part], logged: bool) -> Result<(), Error> {
    set_slot(vm, memory, SLOT, 0..0, 0)?;
    for (slot, (range, watched)) in (SLOT + 1..).zip(parts) {
        let flags = if *watched {
            KVM_MEM_READONLY
        } else {
            log_flag(logged)
        };
        set_slot(vm, memory, slot, range.clone(), flags)?;
    }
    Ok(())
}

/// Gives it back as a whole. What was logged of the guest's writes to the parts is noted as this process's.
/// No vCPU may run.
///
/// # Errors
/// If KVM refuses.
pub fn join_memory(vm: &VmFd, memory: &Memory, parts: &[Part], logged: bool) -> Result<(), Error> {
    for (slot, (range, watched)) in (SLOT + 1..).zip(parts) {
        if logged && !watched {
            let bytes = (range.end - range.start) as usize;
            let log = vm.get_dirty_log(slot, bytes);
            memory.note_written(
                range.start,
                &log.map_err(Error::kvm("reading the dirty log"))?,
            );
        }
        set_slot(vm, memory, slot, range.start..range.start, 0)?;
    }
    set_memory(vm, memory, logged)
}

/// Makes a vCPU forget all translations of addresses, as far as it may.
///
/// # Errors
/// If KVM refuses.
pub fn flush_translations(fd: &VcpuFd) -> Result<(), Error> {
    let sregs = fd
        .get_sregs()
        .map_err(Error::kvm("reading segment registers"))?;
    set_and_flush(fd, &sregs)
}

/// Sets the segment and control registers of a vCPU, which forgets all translations: KVM only lets
/// it do so when a register of paging changes, so one is given another value first.
///
/// # Errors
/// If KVM refuses.
pub fn set_and_flush(fd: &VcpuFd, sregs: &kvm_sregs) -> Result<(), Error> {
    let other = kvm_sregs {
        cr3: sregs.cr3 ^ CR3_WRITE_THROUGH,
        ..*sregs
    };
    for sregs in [&other, sregs] {
        fd.set_sregs(sregs)
            .map_err(Error::kvm("setting segment registers"))?;
    }
    Ok(())
}

/// Makes KVM forget what it knows of the guest's page tables. Where it shadows them, it sees what
/// the guest writes to them, but not what this process does. No vCPU may run.
///
/// # Errors
/// If KVM refuses.
pub fn forget_page_tables(vm: &VmFd, memory: &Memory) -> Result<(), Error> {
    // Whatever memory a VM loses, KVM drops all shadows.
    let mut region = kvm_userspace_memory_region {
        slot: SLOT + 1,
        flags: 0,
        guest_phys_addr: MEMORY_MAX,
        memory_size: PAGE_SIZE,
        userspace_addr: memory.host_address()?,
    };
    for size in [PAGE_SIZE, 0] {
        region.memory_size = size;
        // SAFETY: the page is the first of `memory`, and is taken back before any vCPU runs.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(Error::kvm("making KVM forget page tables"))?;
    }
    Ok(())
}

/// Takes the log of the writes of the guest and of KVM: a bit for each page written to since the
/// last time.
///
/// # Errors
/// If KVM refuses.
pub fn take_dirty_log(vm: &VmFd, memory: &Memory) -> Result<Vec<u64>, Error> {
    vm.get_dirty_log(SLOT, memory.size() as usize)
        .map_err(Error::kvm("reading the dirty log"))
}

/// What all vCPUs of a machine can do.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Processor {
    cpuid: Vec<kvm_cpuid_entry2>,
}

/// CPUID leaves whose bits are features: number, index, and the registers EAX to EDX.
const FEATURES: [(u32, u32, [bool; 4]); 7] = [
    (0x1, 0, [false, false, true, true]),
    (0x7, 0, [false, true, true, true]),
    (0x7, 1, [true, false, false, true]),
    (0xd, 0, [true, false, false, true]),
    (0xd, 1, [true, false, false, false]),
    (0x8000_0001, 0, [false, false, true, true]),
    (0x8000_0008, 0, [false, true, false, false]),
];

impl Processor {
    /// All that KVM supports on this host.
    ///
    /// # Errors
    /// If KVM does not tell.
    pub fn new(kvm: &Kvm) -> Result<Self, Error> {
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::kvm("reading the supported CPUID"))?;
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
        })
    }

    /// The first CPUID leaf with something that `other` has and this one lacks: another vendor, or
    /// a feature.
    pub fn lacks(&self, other: &Self) -> Option<u32> {
        if self.leaf(0, 0)[1..] != other.leaf(0, 0)[1..] {
            return Some(0);
        }
        let lacks = |&(function, index, registers): &(u32, u32, [bool; 4])| {
            let (own, needed) = (self.leaf(function, index), other.leaf(function, index));
            (0..4).any(|r| registers[r] && needed[r] & !own[r] != 0)
        };
        let missing = FEATURES.iter().find(|leaf| lacks(leaf));
        missing.map(|(function, ..)| *function)
    }

    /// Registers EAX to EDX of a leaf; zero if there is none.
    fn leaf(&self, function: u32, index: u32) -> [u32; 4] {
        let mut leaves = self.cpuid.iter();
        leaves
            .find(|e| (e.function, e.index) == (function, index))
            .map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
    }

    /// Gives a new vCPU its features.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn set_up(&self, fd: &VcpuFd, id: u32, cpus: u32) -> Result<(), Error> {
        let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
        fd.set_cpuid2(&self.cpuid_of(id, cpus, tsc_khz)?)
            .map_err(Error::kvm("setting CPUID"))
    }

    /// Gives a new vCPU the registers to enter the guest with.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn start(&self, fd: &VcpuFd, id: u32, at: &Entrance) -> Result<(), Error> {
        let mut sregs = fd
            .get_sregs()
            .map_err(Error::kvm("reading segment registers"))?;
        sregs.cr0 = CR0;
        sregs.cr3 = at.page_table;
        sregs.cr4 = CR4 | self.protections();
        sregs.efer = EFER;
        sregs.cs = segment(KERNEL_CS, true);
        let data = segment(KERNEL_SS, false);
        (sregs.ds, sregs.es, sregs.fs) = (data, data, data);
        (sregs.gs, sregs.ss) = (data, data);
        (sregs.gdt.limit, sregs.idt.limit) = (0, 0);
        fd.set_sregs(&sregs)
            .map_err(Error::kvm("setting segment registers"))?;
        let stack = at.stack_step.wrapping_mul(u64::from(id));
        fd.set_regs(&kvm_regs {
            rip: at.rip,
            rsp: at.stack.wrapping_add(stack),
            rdi: u64::from(id),
            rsi: at.rsi,
            rflags: 2,
            ..Default::default()
        })
        .map_err(Error::kvm("setting registers"))?;
        fd.set_mp_state(kvm_mp_state {
            mp_state: KVM_MP_STATE_RUNNABLE,
        })
        .map_err(Error::kvm("making a vCPU runnable"))
    }

    /// CR4 bits for the protections of kernel mode that the CPU has.
    fn protections(&self) -> u64 {
        let [_, ebx, ..] = self.leaf(7, 0);
        let smep = if ebx & 1 << 7 != 0 { CR4_SMEP } else { 0 };
        let smap = if ebx & 1 << 20 != 0 { CR4_SMAP } else { 0 };
        smep | smap
    }

    fn cpuid_of(&self, id: u32, cpus: u32, tsc_khz: u32) -> Result<CpuId, Error> {
        let mut entries: Vec<kvm_cpuid_entry2> = self
            .cpuid
            .iter()
            .filter(|e| e.function != TIMING_LEAF)
            .copied()
            .collect();
        for e in &mut entries {
            match e.function {
                1 => e.ebx = e.ebx & 0xffff | cpus.min(255) << 16 | (id & 0xff) << 24,
                0xb | 0x1f => e.edx = id,
                HYPERVISOR_LEAF => e.eax = e.eax.max(TIMING_LEAF),
                _ => {}
            }
        }
        entries.push(kvm_cpuid_entry2 {
            function: TIMING_LEAF,
            eax: tsc_khz,
            ebx: APIC_TIMER_KHZ as u32,
            ..Default::default()
        });
        CpuId::from_entries(&entries).map_err(|e| Error::Host {
            what: "making a CPUID table",
            source: io::Error::other(format!("{e:?}")),
        })
    }
}

/// A flat segment of kernel mode.
fn segment(selector: u16, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: if code { 11 } else { 3 },
        present: 1,
        dpl: 0,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}
