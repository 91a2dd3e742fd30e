//! The time-stamp counter, which must go on from where it stood when a machine was saved.
//!
//! A guest's counter is the host's, scaled, plus an offset that KVM keeps for each vCPU. Offsets
//! are what is put back: a value written to the counter itself reaches KVM late, and one within a
//! second of what KVM expects there is taken for an attempt to synchronise vCPUs, and ignored.
//! All vCPUs are moved by the same distance, so what one has seen is never in another's future.

use std::sync::OnceLock;

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Msrs, kvm_device_attr, kvm_msr_entry,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::error::Error;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

const MSR_TSC: u32 = 0x10;

/// A vCPU's time-stamp counter.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Tsc {
    value: u64,
    /// None on a host kernel before 5.16, which does not tell, and on a host whose counter is unstable, where each
    /// call of KVM's changes it.
    offset: Option<u64>,
}

/// The time at which vCPUs are put back together.
#[derive(Debug, Default)]
pub struct Moment {
    /// The host's counter, scaled, when the machine was saved; none if a vCPU has no offset.
    saved: Option<u64>,
    /// The same when the first vCPU was put back.
    now: OnceLock<u64>,
}

impl Moment {
    /// Of vCPUs that were saved together. Each was saved at a time of its own; the last one counts,
    /// so that no timer is early.
    pub fn new(saved: impl IntoIterator<Item = Tsc>) -> Self {
        let times: Option<Vec<u64>> = saved.into_iter().map(|tsc| tsc.host_time()).collect();
        Self {
            saved: times.and_then(|times| times.into_iter().max()),
            now: OnceLock::new(),
        }
    }
}

impl Tsc {
    /// Reads the counter of a vCPU.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn save(fd: &VcpuFd) -> Result<Self, Error> {
        let before = offset(fd);
        let value = read(fd)?;
        Ok(Self {
            value,
            offset: before.filter(|before| offset(fd) == Some(*before)),
        })
    }

    /// The host's counter, scaled.
    fn host_time(self) -> Option<u64> {
        Some(self.value.wrapping_sub(self.offset?))
    }

    /// Lets the counter of a vCPU go on from here. Where KVM accepts and ignores that, as a host may
    /// whose counter is the guest's, the time that has passed since it was saved has passed for the
    /// guest too.
    ///
    /// # Errors
    /// If KVM refuses, or the guest's time would run backwards.
    pub fn restore(self, fd: &VcpuFd, moment: &Moment) -> Result<(), Error> {
        match self.new_offset(fd, moment)? {
            Some(offset) => set_offset(fd, offset)?,
            None => write(fd, self.value)?,
        }
        match read(fd)? >= self.value {
            true => Ok(()),
            false => Err(Error::Config(
                "the machine's time would run backwards, as the time-stamp counter of this host is \
                 behind and cannot be set; resume it on the host it was saved on"
                    .into(),
            )),
        }
    }

    /// The offset to go on with; none if KVM does not know of offsets.
    fn new_offset(self, fd: &VcpuFd, moment: &Moment) -> Result<Option<u64>, Error> {
        let now = match moment.now.get() {
            Some(now) => Some(*now),
            None => Self::save(fd)?
                .host_time()
                .map(|now| *moment.now.get_or_init(|| now)),
        };
        let distance = |(saved, now): (u64, u64)| saved.wrapping_sub(now);
        let distance = moment.saved.zip(now).map(distance);
        let offsets = self.offset.zip(distance);
        Ok(offsets.map(|(offset, distance)| offset.wrapping_add(distance)))
    }
}

/// Whether the counter of a vCPU can be set; it is another then.
///
/// # Errors
/// If KVM refuses.
pub fn can_be_set(fd: &VcpuFd) -> Result<bool, Error> {
    const FAR: u64 = 1 << 40;
    let Some(there) = offset(fd) else {
        return Ok(false);
    };
    let before = read(fd)?;
    set_offset(fd, there.wrapping_sub(FAR))?;
    // Some time has passed, and where that of the host is unstable KVM corrects the offset.
    Ok((FAR / 2..=FAR).contains(&before.wrapping_sub(read(fd)?)))
}

fn read(fd: &VcpuFd) -> Result<u64, Error> {
    let mut msr = entry(0)?;
    match fd
        .get_msrs(&mut msr)
        .map_err(Error::kvm("reading the TSC"))?
    {
        1 => Ok(msr.as_slice()[0].data),
        _ => Err(refused()),
    }
}

fn write(fd: &VcpuFd, value: u64) -> Result<(), Error> {
    match fd
        .set_msrs(&entry(value)?)
        .map_err(Error::kvm("setting the TSC"))?
    {
        1 => Ok(()),
        _ => Err(refused()),
    }
}

fn entry(data: u64) -> Result<Msrs, Error> {
    let msr = kvm_msr_entry {
        index: MSR_TSC,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[msr]).map_err(|_| refused())
}

fn refused() -> Error {
    Error::Config("KVM on this host has no time-stamp counter".into())
}

fn attribute(address: u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: address,
        flags: 0,
    }
}

fn offset(fd: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    let attribute = attribute(&raw mut offset as u64);
    // SAFETY: KVM writes a number of 64 bits to the address in the structure, which `offset` has.
    let result = unsafe { ioctl_with_ref(fd, KVM_GET_DEVICE_ATTR(), &attribute) };
    (result == 0).then_some(offset)
}

fn set_offset(fd: &VcpuFd, offset: u64) -> Result<(), Error> {
    let attribute = attribute(&raw const offset as u64);
    // SAFETY: KVM reads a number of 64 bits from the address in the structure, which `offset` has.
    match unsafe { ioctl_with_ref(fd, KVM_SET_DEVICE_ATTR(), &attribute) } {
        0 => Ok(()),
        _ => Err(Error::kvm("setting the offset of the TSC")(
            kvm_ioctls::Error::last(),
        )),
    }
}
