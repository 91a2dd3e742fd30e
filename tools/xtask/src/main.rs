//! `cargo xtask`: tasks of the project that are not the product.
//!
//! The lab: [`lab`] runs a flukevm command inside QEMU on a Linux with `kvm_amd`, which is the only
//! hardware-like `/dev/kvm` there is on the development machines. [`peers`] measures flukevm beside other VMMs.

mod command;
mod cpio;
mod debian;
mod initramfs;
mod lab;
mod modules;
mod peers;
mod qemu;

use std::process::ExitCode;

use clap::Parser;

/// Tasks of the project that are not the product.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    /// Run a flukevm command in QEMU on a Linux with kvm_amd
    Lab(lab::Options),
    /// Measure how long flukevm and other VMMs take to boot the same guest
    Peers(peers::Options),
}

fn main() -> ExitCode {
    let (name, result) = match Task::parse() {
        Task::Lab(options) => ("lab", lab::run(&options)),
        Task::Peers(options) => ("peers", peers::run(&options)),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::from(lab::STATUS_BROKEN)
        }
    }
}
