//! What it costs to take a snapshot, to save it in a directory, and to read it back.

use std::time::Duration;

use criterion::Criterion;

use benches::saved;
use flukevm::snapshot::disk;

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .measurement_time(Duration::from_secs(5))
        .configure_from_args();
    let (mut vm, snapshot) = saved(1);
    let mut group = criterion.benchmark_group("snapshot");
    group.bench_function("take", |bencher| {
        bencher.iter_with_large_drop(|| vm.snapshot().unwrap_or_else(|error| panic!("{error}")));
    });
    let directory = tempfile::tempdir().expect("a directory for temporary files");
    let place = directory.path().join("saved");
    group.bench_function("save", |bencher| {
        bencher.iter(|| disk::save(&snapshot, &place).unwrap_or_else(|error| panic!("{error}")));
    });
    group.bench_function("load", |bencher| {
        bencher
            .iter_with_large_drop(|| disk::load(&place).unwrap_or_else(|error| panic!("{error}")));
    });
    group.finish();
    criterion.final_summary();
}
