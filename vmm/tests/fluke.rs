//! The real kernel through the library: the plain way, and kernels broken on purpose, whose end
//! must name the place. What programs do is `integration`'s to test.

use std::time::Duration;

use flukevm::config::{Configuration, Guest, VmConfig};
use flukevm::image;
use flukevm::stop::StopReason;
use flukevm::vm::{Outcome, Vm};

/// The configurations; none with `FLUKEVM_GUESTS=skip`.
fn kernels() -> Vec<Configuration> {
    match image::embedded().0.is_empty() {
        true => Vec::new(),
        false => Configuration::ALL.into(),
    }
}

fn config(kernel: Configuration, program: &str, args: &[String]) -> VmConfig {
    let config = VmConfig::fluke(kernel, program, args).unwrap();
    config.timeout(Duration::from_secs(60))
}

fn run(config: VmConfig) -> Outcome {
    Vm::new(config).unwrap().run().unwrap()
}

/// Runs a kernel whose first instructions are replaced.
fn run_broken(kernel: Configuration, code: &[u8]) -> StopReason {
    let mut config = config(kernel, "hello", &[]);
    if let Guest::Fluke { kernel, .. } = &mut config.guest {
        let (elf, _) = image::check_kernel("kernel", kernel).unwrap();
        let inside = |s: &&image::LoadSegment| (s.va..s.va + s.size).contains(&elf.entry);
        let text = elf.segments.iter().find(inside).unwrap();
        let at = text.file.start + (elf.entry - text.va) as usize;
        kernel[at..at + code.len()].copy_from_slice(code);
    }
    run(config).stop
}

#[test]
fn a_program_sees_its_arguments_and_ends_with_its_status() {
    for kernel in kernels() {
        let outcome = run(config(kernel, "hello", &["a b".into()]));
        assert_eq!(outcome.stop.status(), 0, "{kernel}: {}", outcome.stop);
        let text = outcome.console_text();
        assert!(text.contains("hello") && text.contains("a b"), "{text}");
        assert!(
            outcome
                .time_to_first_user
                .is_some_and(|t| t < outcome.elapsed)
        );
        assert!(outcome.stats[0].kernel.calls > 0);
    }
}

#[test]
fn the_kernels_instructions_are_counted_by_entry_point() {
    for kernel in kernels() {
        let mut config = config(kernel, "calls", &[]);
        config.count = true;
        let outcome = run(config);
        assert_eq!(outcome.stop.status(), 0, "{kernel}: {}", outcome.stop);
        let row = |name| outcome.counts.iter().find(|row| row.entry == name);
        let null = row("thread_self").expect("the program calls it");
        assert_eq!(null.visits, 64);
        assert!((20..60).contains(&null.median), "{null:?}");
        assert!(row("mutex_lock").is_some_and(|lock| lock.median > null.median));
    }
}

#[test]
fn instructions_are_counted_on_one_vcpu_only() {
    for kernel in kernels() {
        let mut config = config(kernel, "calls", &[]);
        (config.count, config.vcpus) = (true, 2);
        let refused = Vm::new(config).err().map(|error| error.to_string());
        assert!(refused.is_some_and(|text| text.contains("one vCPU, not 2")));
    }
}

#[test]
fn a_kernel_panic_has_a_backtrace_with_lines() {
    for kernel in kernels() {
        // mov edx, 0xf8; mov eax, 2; out dx, eax
        let stop = run_broken(kernel, b"\xba\xf8\x00\x00\x00\xb8\x02\x00\x00\x00\xef");
        assert_eq!(stop.status(), 128, "{stop}");
        let crash = stop.crash().unwrap();
        assert!(crash.backtrace[0].contains("_start"), "{crash:?}");
    }
}

#[test]
fn a_triple_fault_in_the_kernel_ends_the_machine() {
    for kernel in kernels() {
        let stop = run_broken(kernel, b"\x0f\x0b");
        assert!(matches!(stop, StopReason::TripleFault(_)), "{stop}");
    }
}

#[test]
fn many_more_vcpus_than_cores_boot() {
    for kernel in kernels() {
        let outcome = run(config(kernel, "hello", &[]).vcpus(32));
        assert_eq!(outcome.stop.status(), 0, "{kernel}: {}", outcome.stop);
    }
}

#[test]
fn memory_from_the_least_to_a_lot_works() {
    for memory in [16 << 20, (33 << 20) + 4096, 3 << 30] {
        for kernel in kernels() {
            let outcome = run(config(kernel, "hello", &[]).memory(memory));
            assert_eq!(outcome.stop.status(), 0, "{kernel}: {}", outcome.stop);
        }
    }
}

#[test]
fn a_program_that_is_none_is_refused() {
    for kernel in kernels() {
        let mut config = config(kernel, "hello", &[]);
        if let Guest::Fluke { program, .. } = &mut config.guest {
            program.data.truncate(100);
        }
        let error = Vm::new(config).err().unwrap();
        assert_eq!(error.status(), 2);
        assert!(
            error.to_string().contains("`hello`: an ELF file cut short"),
            "{error}"
        );
    }
}
