//! Benchmarks of the host side: `cargo bench -p benches`. What they measure most is in common here.

use std::time::Duration;

use flukevm::config::{Configuration, Model, Preempt, VmConfig};
use flukevm::point::Point;
use flukevm::snapshot::Snapshot;
use flukevm::vm::Vm;

/// Longer than anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A machine with `hello` at its first user-mode instruction, and the snapshot of it.
///
/// # Panics
/// If the host cannot run it.
pub fn saved(vcpus: u32) -> (Vm, Snapshot) {
    let configuration = Configuration::new(Model::Interrupt, Preempt::None);
    let config = configuration
        .and_then(|configuration| VmConfig::fluke(configuration, "hello", &[]))
        .expect("the guests are built in")
        .vcpus(vcpus);
    let mut vm = Vm::new(config).unwrap_or_else(|error| panic!("{error}"));
    let there = vm.run_to(0, Point::FirstUser, PATIENCE);
    assert!(matches!(there, Ok(true)), "{there:?}");
    let snapshot = vm.snapshot().unwrap_or_else(|error| panic!("{error}"));
    (vm, snapshot)
}
