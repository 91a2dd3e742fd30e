//! `cargo xtask`: tasks of the project that are not the product.
//!
//! One task so far, the lab: [`lab`] runs a flukevm command inside QEMU on a Linux with
//! `kvm_amd`, which is the only hardware-like `/dev/kvm` there is on the development machines.

mod command;
mod cpio;
mod debian;
mod initramfs;
mod lab;
mod modules;
mod qemu;

use std::process::ExitCode;

use clap::Parser;

/// Tasks of the project that are not the product.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    /// Run a flukevm command in QEMU on a Linux with kvm_amd
    Lab(lab::Options),
}

fn main() -> ExitCode {
    let Task::Lab(options) = Task::parse();
    match lab::run(&options) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::from(lab::STATUS_BROKEN)
        }
    }
}
