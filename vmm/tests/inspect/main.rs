//! Looking into machines: what the image says of its layouts, what the views say of a machine at any
//! moment, and that a broken machine breaks nothing.

mod broken;
mod layouts;
mod views;

use std::time::Duration;

use flukevm::config::{Configuration, VmConfig};
use flukevm::image;
use flukevm::inspect::{Place, View};
use flukevm::vm::Vm;

/// Names of the kernel images; none with `FLUKEVM_GUESTS=skip`.
fn images() -> Vec<&'static str> {
    image::embedded().0
}

/// One configuration for each image.
fn configurations() -> Vec<Configuration> {
    let wanted = ["process-np", "process-fp", "interrupt-np"];
    let all = Configuration::ALL.into_iter();
    let all = all.filter(|kernel| wanted.contains(&kernel.to_string().as_str()));
    all.filter(|_| !images().is_empty()).collect()
}

/// Name of the image of a configuration.
fn image_of(kernel: Configuration) -> &'static str {
    match kernel.to_string().as_str() {
        "process-fp" => "process-full",
        name if name.starts_with("process") => "process",
        _ => "interrupt",
    }
}

/// A machine that has run a program for a while, paused.
fn paused(kernel: Configuration, vcpus: u32, program: &str, ran: Duration) -> Vm {
    let config = VmConfig::fluke(kernel, program, &[]).unwrap().vcpus(vcpus);
    let mut vm = Vm::new(config.memory(16 << 20)).unwrap();
    vm.resume();
    assert!(vm.wait(ran).is_none(), "{program} ended early");
    vm.pause().unwrap();
    vm
}

/// Every view that needs no object of its own.
fn views() -> Vec<View> {
    vec![
        View::Cpus,
        View::Threads,
        View::Thread { id: 0 },
        View::Spaces { id: None },
        View::Regions,
        View::Ports,
        View::Psets,
        View::Mutexes,
        View::Conds,
        View::Refs,
        View::Objects,
        View::Queues,
        View::Frames,
        View::Stack { cpu: 0 },
        View::Code { at: Place::Cpu(0) },
    ]
}
