//! Reading what KVM_RUN left in the `kvm_run` page. All of its unions are read here.

use kvm_bindings::{KVM_EXIT_IO_OUT, kvm_run};
use kvm_ioctls::VcpuFd;

/// Upper bound of where port data ends in the area that `kvm_run` starts, bytes: KVM maps the
/// structure, a page of port data, and a page for coalesced I/O.
const RUN_BYTES: usize = 3 * 4096;

/// A pending port access.
pub struct Pio<'a> {
    /// Port.
    pub port: u16,
    /// Whether the guest writes.
    pub write: bool,
    /// Bytes in each element.
    pub size: u8,
    /// The elements; to be filled in for a read.
    pub data: &'a mut [u8],
}

/// The port access of a vCPU that has just left the guest for one.
pub fn pio(fd: &mut VcpuFd) -> Pio<'_> {
    let run: *mut kvm_run = fd.get_kvm_run();
    // SAFETY: the caller saw KVM_EXIT_IO, for which this is the union's member in use.
    let io = unsafe { (*run).__bindgen_anon_1.io };
    let offset = io.data_offset as usize;
    let length = (io.size as usize * io.count as usize).min(RUN_BYTES.saturating_sub(offset));
    // SAFETY: KVM keeps the data within the mapped area, at that offset from its start; the
    // borrow of `fd` keeps the mapping, and others from it, as long as the slice lives.
    let data = unsafe { std::slice::from_raw_parts_mut(run.cast::<u8>().add(offset), length) };
    Pio {
        port: io.port,
        write: u32::from(io.direction) == KVM_EXIT_IO_OUT,
        size: io.size,
        data,
    }
}

/// What KVM says of an internal error.
#[derive(Clone, Debug)]
pub struct InternalError {
    /// Suberror number; 1 is an instruction that cannot be emulated.
    pub suberror: u32,
    /// The numbers that come with it.
    pub data: Vec<u64>,
}

/// The internal error of a vCPU that has just left the guest for one.
pub fn internal_error(fd: &mut VcpuFd) -> InternalError {
    // SAFETY: the caller saw KVM_EXIT_INTERNAL_ERROR, for which this is the member in use.
    let error = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal };
    let count = (error.ndata as usize).min(error.data.len());
    InternalError {
        suberror: error.suberror,
        data: error.data[..count].to_vec(),
    }
}
