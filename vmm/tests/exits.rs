//! Hand-written guests that drive every exit of the VMM on real KVM, without any kernel.

use std::thread::sleep;
use std::time::{Duration, Instant};

use flukevm::config::{Guest, VmConfig};
use flukevm::stop::StopReason;
use flukevm::vm::{Outcome, Vm};

#[macro_use]
mod guest;

/// Long enough for a busy machine, short enough to notice a hang.
const PATIENCE: Duration = Duration::from_secs(20);

fn config(code: Vec<u8>) -> VmConfig {
    VmConfig::new(Guest::Flat(code)).timeout(PATIENCE)
}

fn run(config: VmConfig) -> Outcome {
    Vm::new(config).unwrap().run().unwrap()
}

#[test]
fn the_exit_port_passes_the_status() {
    let code = guest!(exit: "mov dx, 0xf4" "mov eax, 42" "out dx, eax" "hlt");
    let outcome = run(config(code));
    assert!(
        matches!(outcome.stop, StopReason::Exited(42)),
        "{}",
        outcome.stop
    );
    assert_eq!(outcome.stop.status(), 42);
    assert_eq!(outcome.stats[0].exits.pio_write, 1);
}

#[test]
fn the_console_prints_bytes_and_strings() {
    let code = guest!(console:
        "mov dx, 0x3f8" "mov al, 0x61" "out dx, al"
        "lea rsi, [rip + 2f]" "mov ecx, 5" "cld" "rep outsb"
        "mov dx, 0xf4" "xor eax, eax" "out dx, eax"
        "2: .ascii \"bcde\\n\"");
    let outcome = run(config(code));
    assert_eq!(outcome.stop.status(), 0, "{}", outcome.stop);
    assert_eq!(outcome.console_text(), "abcde\n");
}

#[test]
fn strings_of_wider_elements_reach_the_device_whole() {
    // Two 32-bit elements to the event port: the first names no event, and only it is looked at.
    let code = guest!(wide_string:
        "mov dx, 0xf8" "lea rsi, [rip + 2f]" "mov ecx, 2" "cld" "rep outsd"
        "mov eax, ecx" "mov dx, 0xf4" "out dx, eax"
        "2: .long 99, 98");
    let outcome = run(config(code));
    assert_eq!(outcome.stop.status(), 0, "{}", outcome.stop);
}

#[test]
fn unknown_ports_read_as_ones_and_swallow_writes() {
    let code = guest!(unknown_port:
        "mov dx, 0x1234" "out dx, al" "xor eax, eax" "in al, dx"
        "sub al, 0xf0" "mov dx, 0xf4" "out dx, eax");
    let outcome = run(config(code));
    assert_eq!(outcome.stop.status(), 0x0f, "{}", outcome.stop);
    assert_eq!(outcome.stats[0].exits.unknown_port, 2);
}

#[test]
fn a_triple_fault_ends_the_machine() {
    let code = guest!(triple: "ud2");
    let outcome = run(config(code));
    assert!(
        matches!(outcome.stop, StopReason::TripleFault(_)),
        "{}",
        outcome.stop
    );
    assert_eq!(outcome.stop.status(), 129);
}

#[test]
fn an_instruction_that_kvm_cannot_emulate_is_shown() {
    // Real hardware executes this; where KVM emulates CPL 0 it cannot.
    let code = guest!(sse: "xorps xmm0, xmm0" "mov dx, 0xf4" "xor eax, eax" "out dx, eax");
    let outcome = run(config(code));
    match &outcome.stop {
        StopReason::Exited(0) => {}
        StopReason::EmulationFailure { crash, .. } => {
            assert_eq!(
                crash.instruction.as_deref(),
                Some("0f 57 c0 `xorps xmm0,xmm0`")
            );
            assert_eq!(crash.rip, flukevm::boot::FLAT_BASE);
            assert_eq!(outcome.stop.status(), 131);
        }
        other => panic!("{other}"),
    }
}

#[test]
fn memory_that_is_not_there_fails_the_vcpu() {
    // One page table entry leads out of memory: the flat guest maps itself, so make one.
    let code = guest!(mmio:
        "mov rax, cr3" "mov rax, [rax]" "and rax, -4096" // third-level table
        "mov rax, [rax]" "and rax, -4096" // directory
        "mov rcx, 0xd0000083" "mov [rax + 8 * 511], rcx"
        "mov rcx, 0x3fe00000" "mov byte ptr [rcx], 1" "hlt");
    let outcome = run(config(code));
    assert!(
        matches!(outcome.stop, StopReason::VcpuFailed { .. }),
        "{}",
        outcome.stop
    );
    assert!(
        outcome.stop.to_string().contains("0xd0000000"),
        "{}",
        outcome.stop
    );
    assert_eq!(outcome.stop.status(), 132);
}

#[test]
fn a_kernel_panic_carries_its_message() {
    let code = guest!(panic:
        "mov dx, 0xe9" "lea rsi, [rip + 2f]" "mov ecx, 12" "cld" "rep outsb"
        "mov dx, 0xf8" "mov eax, 2" "out dx, eax" "hlt"
        "2: .ascii \"panic: oops\\n\"");
    let outcome = run(config(code));
    assert_eq!(outcome.stop.status(), 128, "{}", outcome.stop);
    assert_eq!(outcome.stop.to_string(), "kernel panic on vCPU 0: oops");
}

#[test]
fn the_kernel_can_report_a_deadlock() {
    let code = guest!(deadlock: "mov dx, 0xf8" "mov eax, 3" "out dx, eax" "hlt");
    assert_eq!(run(config(code)).stop.status(), 133);
}

#[test]
fn loops_and_halts_run_into_the_timeout() {
    let limit = Duration::from_millis(100);
    for code in [
        guest!(looping: "2: jmp 2b"),
        guest!(halted: "cli" "2: hlt" "jmp 2b"),
    ] {
        let start = Instant::now();
        let outcome = run(config(code).vcpus(2).timeout(limit));
        assert_eq!(outcome.stop.status(), 124, "{}", outcome.stop);
        assert!(start.elapsed() >= limit);
        assert!(start.elapsed() < PATIENCE);
    }
}

#[test]
fn every_vcpu_runs_with_a_stack_and_number_of_its_own() {
    // Each pushes, and adds its number + 1 to a shared sum; the last one reports the sum.
    let code = guest!(smp:
        "lea eax, [rdi + 1]" "push rax" "pop rbx"
        "mov ecx, 0x8000" "lock add [rcx], ebx"
        "mov eax, 1" "lock xadd [rcx + 8], eax"
        "cmp eax, 3" "jne 2f"
        "mov eax, [rcx]" "mov dx, 0xf4" "out dx, eax"
        "2: hlt" "jmp 2b");
    let outcome = run(config(code).vcpus(4));
    assert_eq!(outcome.stop.status(), 1 + 2 + 3 + 4, "{}", outcome.stop);
}

#[test]
fn apic_ids_are_the_numbers_of_vcpus() {
    // vCPU 2 compares CPUID's initial APIC id with its number; x2APIC must be there too.
    let code = guest!(apic_id:
        "cmp edi, 2" "jne 2f"
        "mov eax, 1" "cpuid" "shr ebx, 24"
        "mov eax, 99" "bt ecx, 21" "cmovc eax, ebx"
        "mov dx, 0xf4" "out dx, eax"
        "2: hlt" "jmp 2b");
    assert_eq!(run(config(code).vcpus(3)).stop.status(), 2);
}

/// Counts in memory, writing to a port between steps so that accesses are pending often.
fn counter() -> Vec<u8> {
    guest!(counter:
        "mov ecx, 0x8000" "mov dx, 0x3ff"
        "2: inc rbx" "mov [rcx + rdi * 8], rbx" "mov eax, ebx" "out dx, al"
        "inc r15" "jmp 2b")
}

#[test]
fn nothing_moves_while_paused() {
    let mut vm = Vm::new(config(counter()).vcpus(2)).unwrap();
    let count = |vm: &Vm, id: u64| vm.memory().get::<u64>(0x8000 + id * 8).unwrap();
    assert_eq!(count(&vm, 0), 0, "a machine starts paused");
    vm.resume();
    for _ in 0..20 {
        sleep(Duration::from_millis(5));
        vm.pause().unwrap();
        let before: Vec<_> = (0..2).map(|id| vm.registers(id).unwrap()).collect();
        let counts = [count(&vm, 0), count(&vm, 1)];
        sleep(Duration::from_millis(5));
        for id in 0..2 {
            let now = vm.registers(id).unwrap();
            assert_eq!(now, before[id as usize]);
            // The access before `inc r15` is complete or not begun, never half done.
            let r = now.general;
            assert!(r.rbx - r.r15 <= 1, "{} {}", r.rbx, r.r15);
        }
        assert_eq!(counts, [count(&vm, 0), count(&vm, 1)]);
        vm.resume();
    }
    sleep(Duration::from_millis(20));
    vm.pause().unwrap();
    assert!(count(&vm, 0) > 0 && count(&vm, 1) > 0);
}

#[test]
fn pausing_twice_is_fine_and_running_vcpus_keep_their_registers() {
    let mut vm = Vm::new(config(counter())).unwrap();
    vm.pause().unwrap();
    vm.pause().unwrap();
    assert!(vm.registers(0).is_some());
    assert!(vm.registers(1).is_none(), "there is no such vCPU");
    vm.resume();
    assert!(vm.registers(0).is_none(), "not while it runs");
    vm.pause().unwrap();
    assert!(vm.registers(0).is_some());
}

#[test]
fn a_read_is_complete_when_paused() {
    // The status register of the console reads as 0x60; a pause right after the exit must see it.
    let code = guest!(reader:
        "mov dx, 0x3fd" "2: xor eax, eax" "in al, dx" "mov rbx, rax" "inc rcx" "jmp 2b");
    let mut vm = Vm::new(config(code)).unwrap();
    vm.resume();
    for _ in 0..50 {
        sleep(Duration::from_millis(1));
        vm.pause().unwrap();
        let r = vm.registers(0).unwrap().general;
        // After `in` (offset 4 + 2 + 1) the value is there.
        let after_in = flukevm::boot::FLAT_BASE + 7;
        if r.rip == after_in {
            assert_eq!(r.rax, 0x60);
        }
        vm.resume();
    }
}

#[test]
fn a_machine_that_stops_refuses_to_pause_with_the_reason() {
    let code = guest!(quick: "mov dx, 0xf4" "mov eax, 3" "out dx, eax" "hlt");
    let mut vm = Vm::new(config(code)).unwrap();
    vm.resume();
    assert!(matches!(vm.wait(PATIENCE), Some(StopReason::Exited(3))));
    assert!(matches!(vm.pause(), Err(StopReason::Exited(3))));
    assert!(vm.registers(0).is_none());
    assert_eq!(vm.finish(StopReason::Exited(3)).stop.status(), 3);
}

#[test]
fn waiting_ends_at_its_limit_while_the_guest_goes_on() {
    let mut vm = Vm::new(config(counter())).unwrap();
    vm.resume();
    assert!(vm.wait(Duration::from_millis(20)).is_none());
    assert!(vm.wait(Duration::from_millis(20)).is_none());
}

#[test]
fn samples_tell_kernel_mode_from_idleness() {
    let sampled = |code| {
        let mut config = config(code).timeout(Duration::from_millis(200));
        config.sampling = Some(Duration::from_millis(2));
        run(config).stats[0].samples
    };
    let busy = sampled(guest!(busy: "2: jmp 2b"));
    assert!(
        busy.kernel > 5 && busy.idle == 0 && busy.user == 0,
        "{busy:?}"
    );
    let idle = sampled(guest!(idle: "2: cli" "hlt" "jmp 2b"));
    assert!(idle.idle > idle.kernel && idle.user == 0, "{idle:?}");
}

#[test]
fn sizes_out_of_range_are_refused_before_anything_is_built() {
    let refuse = |config: VmConfig| match Vm::new(config) {
        Ok(_) => panic!("accepted"),
        Err(error) => {
            assert_eq!(error.status(), 2, "{error}");
            error.to_string()
        }
    };
    let base = || config(Vec::new());
    assert!(refuse(base().vcpus(0)).contains("--vcpus 1"));
    assert!(refuse(base().vcpus(1 << 20)).contains("KVM on this host"));
    assert!(refuse(base().memory(1024)).contains("16 MiB or more"));
    assert!(refuse(base().memory(4 << 30)).contains("3 GiB or less"));
    assert!(refuse(base().memory((64 << 20) + 1)).contains("4 KiB"));
}
