//! How long a machine takes from being built to its first user-mode instruction, and to its end.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion};

use flukevm::config::{Configuration, Model, Preempt, VmConfig};
use flukevm::stop::StopReason;
use flukevm::vm::{Outcome, Vm};

/// Runs `hello` once.
fn hello(vcpus: u32) -> Outcome {
    let config = Configuration::new(Model::Interrupt, Preempt::None)
        .and_then(|configuration| VmConfig::fluke(configuration, "hello", &[]))
        .expect("the guests are built in")
        .vcpus(vcpus)
        .timeout(Duration::from_secs(60));
    let outcome = Vm::new(config)
        .and_then(Vm::run)
        .unwrap_or_else(|error| panic!("{error}"));
    assert!(
        matches!(outcome.stop, StopReason::Exited(0)),
        "{}",
        outcome.stop
    );
    outcome
}

/// Measures one time of a run for several numbers of vCPUs.
fn measure(criterion: &mut Criterion, name: &str, time: fn(&Outcome) -> Duration) {
    let mut group = criterion.benchmark_group(name);
    for vcpus in [1, 4] {
        group.bench_function(BenchmarkId::new("vcpus", vcpus), |bencher| {
            bencher.iter_custom(|runs| (0..runs).map(|_| time(&hello(vcpus))).sum());
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    measure(&mut criterion, "first-user-instruction", |outcome| {
        outcome.time_to_first_user.expect("hello is user code")
    });
    measure(&mut criterion, "exit", |outcome| outcome.elapsed);
    criterion.final_summary();
}
