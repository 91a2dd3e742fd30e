//! What it costs to find where the guest's page tables map an address, as every view of a machine does.

use std::hint::black_box;

use criterion::Criterion;

use benches::saved;
use flukevm::paging::{read_virtual, translate};

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let (mut vm, _) = saved(1);
    let registers = vm.registers(0).expect("a paused vCPU has registers");
    let (root, rip) = (registers.special.cr3, registers.general.rip);
    let mut group = criterion.benchmark_group("walker");
    group.bench_function("translate", |bencher| {
        bencher.iter(|| translate(vm.memory(), root, black_box(rip)));
    });
    group.bench_function("read a page", |bencher| {
        bencher.iter(|| read_virtual(vm.memory(), root, black_box(rip & !0xfff), 4096));
    });
    group.finish();
    criterion.final_summary();
}
