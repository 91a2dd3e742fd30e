//! Getting a vCPU out of the guest.
//!
//! A kick is a real-time signal that vCPU threads block except within KVM_RUN. One that arrives
//! at any other time stays pending and makes the next KVM_RUN return at once, so none is lost,
//! and nobody but the vCPU's own thread ever touches its `kvm_run` page.

use std::io;
use std::mem::MaybeUninit;
use std::os::unix::thread::JoinHandleExt;
use std::sync::OnceLock;
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;
use vmm_sys_util::signal::{SIGRTMIN, clear_signal, register_signal_handler};

/// The kernel's signal set: one bit for each of 64 signals.
const KERNEL_SIGSET_BYTES: u32 = 8;

/// `struct kvm_signal_mask` with the set that follows it.
#[repr(C, packed)]
struct SignalMask {
    len: u32,
    set: u64,
}

/// The request's number holds the size without the set.
#[repr(C)]
struct SignalMaskHeader {
    len: u32,
}

ioctl_iow_nr!(
    KVM_SET_SIGNAL_MASK,
    kvm_bindings::KVMIO,
    0x8b,
    SignalMaskHeader
);

extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the handler, once for the process. Without one the signal would end the process.
///
/// # Errors
/// If the host refuses.
pub fn prepare() -> io::Result<()> {
    static DONE: OnceLock<Result<(), i32>> = OnceLock::new();
    DONE.get_or_init(|| register_signal_handler(SIGRTMIN(), ignore).map_err(|e| e.errno()))
        .map_err(io::Error::from_raw_os_error)
}

/// Makes the calling thread a vCPU thread: it blocks all signals, and only kicks get through
/// while it is in the guest.
///
/// # Errors
/// If the host refuses.
pub fn arm(fd: &VcpuFd) -> io::Result<()> {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: both calls get valid pointers, and the first initialises the set.
    let result = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), std::ptr::null_mut())
    };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(result));
    }
    let mask = SignalMask {
        len: KERNEL_SIGSET_BYTES,
        set: !(1 << (SIGRTMIN() - 1)),
    };
    // SAFETY: KVM reads the header and as many bytes of set as it says, which `mask` has.
    match unsafe { ioctl_with_ref(fd, KVM_SET_SIGNAL_MASK(), &mask) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes back the kicks that are pending for the calling thread.
pub fn drain() {
    if let Err(error) = clear_signal(SIGRTMIN()) {
        tracing::warn!("taking back a kick: {error:?}");
    }
}

/// Kicks a vCPU thread. One that has ended does not mind.
pub fn kick(thread: &JoinHandle<()>) {
    // SAFETY: the handle has not been joined, so the thread's id is still its own.
    unsafe { libc::pthread_kill(thread.as_pthread_t() as libc::pthread_t, SIGRTMIN()) };
}
