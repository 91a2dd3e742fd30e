//! What can go wrong before a machine runs. Once it runs, see [`crate::stop::StopReason`].
//!
//! Every message says what and where, and what to do about it; the command prints it after
//! `error: `. Guest-made trouble never ends up here, only the user's and the host's.

use std::io;
use std::path::PathBuf;

/// Exit status for a command line, file or size that cannot be used.
pub const STATUS_MISUSE: u8 = 2;
/// Exit status for a host that does not do what it should.
pub const STATUS_FAILURE: u8 = 1;

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The user asked for something that cannot be had.
    #[error("{0}")]
    Config(String),
    /// A program or kernel image that is none.
    #[error("`{name}`: {why}")]
    Image {
        /// Name or path as the user gave it.
        name: String,
        /// What is wrong and what to do.
        why: String,
    },
    /// A file of the user's that cannot be read.
    #[error("cannot read `{path}`: {source}; give the path of a readable file")]
    File {
        /// The path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file of the user's that cannot be written.
    #[error(
        "cannot write `{path}`: {source}; give the path of a file in a directory that you may write to"
    )]
    Write {
        /// The path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A directory that holds no snapshot that can be resumed, or cannot hold one.
    #[error("snapshot `{path}`: {why}")]
    Snapshot {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A snapshot cannot be written.
    #[error("cannot save a snapshot in `{path}`: {source}")]
    Saving {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The KVM device cannot be used.
    #[error("{path}: {why}")]
    NoKvm {
        /// Path of the device.
        path: String,
        /// What is wrong and what to do.
        why: String,
    },
    /// KVM refused a request.
    #[error("KVM: {what}: {source}; `flukevm doctor` shows what this host can do")]
    Kvm {
        /// What was asked for.
        what: &'static str,
        /// The answer.
        source: kvm_ioctls::Error,
    },
    /// The host refused something else.
    #[error("{what}: {source}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// The answer.
        source: io::Error,
    },
    /// Guest memory could not be reached where the host itself had laid it out.
    #[error("guest memory: {0}; this is a bug in flukevm")]
    Memory(String),
    /// A machine in another process cannot be reached, or this one cannot be made so.
    #[error("{0}")]
    Control(String),
    /// The host could not be probed.
    #[error(transparent)]
    Probe(#[from] crate::doctor::Error),
}

impl Error {
    /// Exit status of a command that ends with this error.
    pub fn status(&self) -> u8 {
        match self {
            Self::Config(_)
            | Self::Image { .. }
            | Self::File { .. }
            | Self::Write { .. }
            | Self::Snapshot { .. } => STATUS_MISUSE,
            _ => STATUS_FAILURE,
        }
    }

    /// For `map_err`: KVM refused `what`.
    pub(crate) fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { what, source }
    }

    /// For `map_err`: the host refused `what`.
    pub(crate) fn host(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}
