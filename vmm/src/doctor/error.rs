//! What can keep the doctor from looking at all.

use kvm_ioctls::Error as Errno;

/// Why the host could not be probed. The text is one line for people.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device file does not exist.
    #[error(
        "{path} does not exist: load the module kvm_intel or kvm_amd (and switch virtualisation \
         on in the firmware), or hand the device to this container or virtual machine"
    )]
    NoDevice {
        /// The device file.
        path: String,
    },
    /// The device file may not be opened by this user.
    #[error(
        "{path}: permission denied: join the group that owns it (`ls -l {path}`) or run as root"
    )]
    Denied {
        /// The device file.
        path: String,
    },
    /// The device file cannot be opened for another reason.
    #[error("cannot open {path}: {source}")]
    Open {
        /// The device file.
        path: String,
        /// What the system says.
        source: Errno,
    },
    /// The file is something else.
    #[error("{path} is not a KVM device")]
    NotKvm {
        /// The device file.
        path: String,
    },
    /// KVM of another age.
    #[error("{path} speaks KVM API version {found}, flukevm needs version 12: use a current Linux")]
    ApiVersion {
        /// The device file.
        path: String,
        /// Its version.
        found: i32,
    },
    /// KVM makes no virtual machine.
    #[error(
        "KVM cannot create a virtual machine: {0}; is virtualisation on in the firmware, and not \
         taken by another hypervisor?"
    )]
    CreateVm(Errno),
}
