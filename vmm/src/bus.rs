//! The port I/O bus: which device answers at which port.
//!
//! Ranges never overlap. A device sees offsets within its range, and sees a string instruction as
//! one access with many elements. An access that no device covers wholly belongs to nobody.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use fluke_abi::port::Event;

/// An access to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Number of the vCPU.
    pub vcpu: u32,
    /// Port, counted from the device's first.
    pub offset: u16,
    /// Bytes in each element.
    pub size: u8,
}

/// What a write makes the machine do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// End with this status.
    Exit(u32),
    /// The kernel reports something.
    Event(Event),
}

/// A device with ports.
pub trait PioDevice: Send {
    /// Fills `data`, one element after the other. All ones, as from an empty bus, unless the
    /// device says otherwise.
    fn read(&mut self, _access: Access, data: &mut [u8]) {
        data.fill(0xff);
    }

    /// Takes the elements in `data`.
    fn write(&mut self, access: Access, data: &[u8]) -> Option<Signal>;
}

/// A range of ports is taken already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("ports {first:#x} to {last:#x} overlap a device or do not exist")]
pub struct Overlap {
    /// First port of the range.
    pub first: u16,
    /// Last port of the range.
    pub last: u16,
}

/// Nobody answers at a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoDevice;

/// A device on the bus.
pub type Shared = Arc<Mutex<dyn PioDevice>>;

/// The bus.
#[derive(Default)]
pub struct Bus {
    /// Devices by first port, with the last port.
    devices: BTreeMap<u16, (u16, Shared)>,
}

impl Bus {
    /// Puts a device at `count` ports from `first`.
    ///
    /// # Errors
    /// If one of the ports has a device, or does not exist.
    pub fn insert(&mut self, first: u16, count: u16, device: Shared) -> Result<(), Overlap> {
        let Some(last) = count.checked_sub(1).and_then(|n| first.checked_add(n)) else {
            return Err(Overlap { first, last: first });
        };
        let before = self.devices.range(..=last).next_back();
        if before.is_some_and(|(_, (end, _))| *end >= first) {
            return Err(Overlap { first, last });
        }
        self.devices.insert(first, (last, device));
        Ok(())
    }

    /// Reads elements of `size` bytes from a port.
    ///
    /// # Errors
    /// If no device answers; `data` is all ones then.
    pub fn read(&self, vcpu: u32, port: u16, size: u8, data: &mut [u8]) -> Result<(), NoDevice> {
        let Some((offset, device)) = self.find(port, size) else {
            data.fill(0xff);
            return Err(NoDevice);
        };
        let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
        device.read(Access { vcpu, offset, size }, data);
        Ok(())
    }

    /// Writes elements of `size` bytes to a port.
    ///
    /// # Errors
    /// If no device answers.
    pub fn write(
        &self,
        vcpu: u32,
        port: u16,
        size: u8,
        data: &[u8],
    ) -> Result<Option<Signal>, NoDevice> {
        let (offset, device) = self.find(port, size).ok_or(NoDevice)?;
        let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(device.write(Access { vcpu, offset, size }, data))
    }

    fn find(&self, port: u16, size: u8) -> Option<(u16, &Shared)> {
        let (first, (last, device)) = self.devices.range(..=port).next_back()?;
        let end = u32::from(port) + u32::from(size.max(1)) - 1;
        (end <= u32::from(*last)).then_some((port - first, device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Default)]
    struct Recorder(Vec<(Access, Vec<u8>)>);

    impl PioDevice for Recorder {
        fn write(&mut self, access: Access, data: &[u8]) -> Option<Signal> {
            self.0.push((access, data.to_vec()));
            None
        }
    }

    fn recorder() -> Arc<Mutex<Recorder>> {
        Arc::default()
    }

    #[test]
    fn devices_see_offsets_and_whole_strings() {
        let mut bus = Bus::default();
        let device = recorder();
        bus.insert(0x3f8, 8, device.clone()).unwrap();
        bus.write(3, 0x3f9, 2, b"abcd").unwrap();
        let access = Access {
            vcpu: 3,
            offset: 1,
            size: 2,
        };
        assert_eq!(device.lock().unwrap().0, [(access, b"abcd".to_vec())]);
    }

    #[test]
    fn accesses_outside_or_across_an_end_are_nobodys() {
        let mut bus = Bus::default();
        bus.insert(0x10, 4, recorder()).unwrap();
        assert_eq!(bus.write(0, 0x0f, 1, &[0]), Err(NoDevice));
        assert_eq!(bus.write(0, 0x0f, 2, &[0; 2]), Err(NoDevice));
        assert_eq!(bus.write(0, 0x12, 4, &[0; 4]), Err(NoDevice));
        assert_eq!(bus.write(0, 0x14, 1, &[0]), Err(NoDevice));
        assert_eq!(bus.write(0, 0x10, 4, &[0; 4]), Ok(None));
        let mut data = [0; 2];
        assert_eq!(bus.read(0, 0xffff, 2, &mut data), Err(NoDevice));
        assert_eq!(data, [0xff; 2]);
    }

    #[test]
    fn ranges_that_do_not_exist_are_refused() {
        let mut bus = Bus::default();
        assert!(bus.insert(0xffff, 2, recorder()).is_err());
        assert!(bus.insert(5, 0, recorder()).is_err());
        assert!(bus.insert(0xffff, 1, recorder()).is_ok());
    }

    proptest! {
        #[test]
        fn inserted_ranges_never_overlap(ranges in prop::collection::vec((0u16..100, 1u16..20), 1..20)) {
            let mut bus = Bus::default();
            let mut taken = std::collections::HashSet::new();
            for (first, count) in ranges {
                let ports: Vec<_> = (first..first + count).collect();
                let free = ports.iter().all(|p| !taken.contains(p));
                prop_assert_eq!(bus.insert(first, count, recorder()).is_ok(), free);
                if free {
                    taken.extend(ports);
                }
            }
        }
    }
}
