//! What an exit costs: from the guest's `out` through KVM and the bus to a device, and back.

use std::time::{Duration, Instant};

use criterion::Criterion;

use benches::PATIENCE;
use flukevm::config::{Guest, VmConfig};
use flukevm::stop::StopReason;
use flukevm::vm::Vm;

/// A guest that writes so often to the port of events one that there is not, and ends.
fn guest(turns: u32) -> Vec<u8> {
    let [a, b, c, d] = turns.to_le_bytes();
    vec![
        0xb9, a, b, c, d, // mov ecx, turns
        0xba, 0xf8, 0, 0, 0, // mov edx, the port of events
        0xb8, 0x63, 0, 0, 0,    // mov eax, 99
        0xef, // out dx, eax
        0xff, 0xc9, // dec ecx
        0x75, 0xfb, // jnz to the out
        0xba, 0xf4, 0, 0, 0, // mov edx, the port that ends the machine
        0x31, 0xc0, // xor eax, eax
        0xef, // out dx, eax
        0xf4, // hlt
    ]
}

fn run(turns: u64) -> Duration {
    let turns = u32::try_from(turns).expect("few enough turns");
    let config = VmConfig::new(Guest::Flat(guest(turns))).timeout(PATIENCE);
    let vm = Vm::new(config).unwrap_or_else(|error| panic!("{error}"));
    let start = Instant::now();
    let outcome = vm.run().unwrap_or_else(|error| panic!("{error}"));
    let time = start.elapsed();
    assert!(
        matches!(outcome.stop, StopReason::Exited(0)),
        "{}",
        outcome.stop
    );
    assert_eq!(outcome.stats[0].exits.pio_write, u64::from(turns) + 1);
    time
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .measurement_time(Duration::from_secs(5))
        .configure_from_args();
    criterion.bench_function("exit/out", |bencher| bencher.iter_custom(run));
    criterion.final_summary();
}
