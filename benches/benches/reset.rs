//! What it costs to put a machine back to a snapshot, and to make a new one from it.
//!
//! The machine is that of `hello`, saved at its first user-mode instruction; before each reset it
//! runs for some instructions of the kernel, or to its end. Of the times of single resets, the
//! median and the 99th percentile are printed.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};

use benches::{PATIENCE, saved};
use flukevm::config::VmConfig;
use flukevm::point::Point;
use flukevm::stop::StopReason;
use flukevm::vm::Vm;

/// What a machine does before a reset.
type Run = fn(&mut Vm);

fn some_steps(vm: &mut Vm) {
    let there = vm.run_to(0, Point::Steps(20), PATIENCE);
    assert!(matches!(there, Ok(true)), "{there:?}");
}

fn to_the_end(vm: &mut Vm) {
    vm.resume();
    let stop = vm.wait(PATIENCE);
    assert!(matches!(stop, Some(StopReason::Exited(0))), "{stop:?}");
}

fn reset(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("reset");
    let runs: [(&str, Run); 2] = [("some-steps", some_steps), ("to-the-end", to_the_end)];
    for ((name, run), vcpus) in runs.into_iter().flat_map(|run| [(run, 1), (run, 4)]) {
        let (mut vm, snapshot) = saved(vcpus);
        let mut times = Vec::new();
        group.bench_function(BenchmarkId::new(name, vcpus), |bencher| {
            bencher.iter_custom(|turns| {
                let mut total = Duration::ZERO;
                for _ in 0..turns {
                    run(&mut vm);
                    let start = Instant::now();
                    vm.reset(&snapshot)
                        .unwrap_or_else(|error| panic!("{error}"));
                    times.push(start.elapsed());
                    total += start.elapsed();
                }
                total
            });
        });
        times.sort_unstable();
        if let (Some(median), Some(most)) = (
            times.get(times.len() / 2),
            times.get(times.len() * 99 / 100),
        ) {
            println!(
                "reset/{name}/{vcpus}: {} resets, median {median:.1?}, 99th percentile {most:.1?}",
                times.len()
            );
        }
    }
    group.finish();
}

fn new(criterion: &mut Criterion) {
    let (_, snapshot) = saved(1);
    criterion.bench_function("new-from-snapshot", |bencher| {
        bencher.iter_with_large_drop(|| {
            Vm::new(VmConfig::snapshot(snapshot.clone())).unwrap_or_else(|error| panic!("{error}"))
        });
    });
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(5))
        .configure_from_args();
    reset(&mut criterion);
    new(&mut criterion);
    criterion.final_summary();
}
