//! Snapshots of machines in memory: what is put back, and that it then goes as it went before.

use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant};

use fluke_abi::layout::DIRECT_MAP;
use flukevm::boot::FLAT_BASE;
use flukevm::config::{Configuration, ConsoleSink, Guest, MEMORY_MIN, VmConfig};
use flukevm::point::Point;
use flukevm::snapshot::{Snapshot, disk};
use flukevm::stop::StopReason;
use flukevm::vcpu::Registers;
use flukevm::vm::Vm;
use flukevm::{doctor, image};
use object::{Object, ObjectSymbol};

/// Long enough for a busy machine, short enough to notice a hang.
const PATIENCE: Duration = Duration::from_secs(20);

#[macro_use]
mod guest;

fn flat(code: Vec<u8>) -> VmConfig {
    let config = VmConfig::new(Guest::Flat(code)).timeout(PATIENCE);
    config.memory(MEMORY_MIN)
}

/// A machine, and what its console prints.
fn machine(config: VmConfig) -> (Vm, Arc<Mutex<Vec<u8>>>) {
    let ConsoleSink::Buffer(console) = config.console.clone() else {
        panic!("the console is not in a buffer");
    };
    (Vm::new(config).unwrap(), console)
}

fn printed(console: &Mutex<Vec<u8>>) -> String {
    String::from_utf8(std::mem::take(&mut *console.lock().unwrap())).unwrap()
}

fn contents(vm: &Vm) -> Vec<u8> {
    let mut bytes = vec![0; vm.memory().size() as usize];
    vm.memory().read(0, &mut bytes).unwrap();
    bytes
}

/// The addresses of the pages that differ.
fn differences(a: &[u8], b: &[u8]) -> Vec<usize> {
    let pages = (0..).step_by(4096).zip(a.chunks(4096).zip(b.chunks(4096)));
    pages
        .filter(|(_, (a, b))| a != b)
        .map(|(at, _)| at)
        .collect()
}

fn status(vm: &mut Vm) -> u8 {
    vm.resume();
    vm.wait(PATIENCE).expect("it must end").status()
}

/// Runs `turns` steps of a vCPU.
fn step(vm: &mut Vm, steps: u32) -> Registers {
    assert!(vm.run_to(0, Point::Steps(steps), PATIENCE).unwrap());
    vm.registers(0).unwrap()
}

/// Prints, works with registers, memory, the stack and vector registers, in circles.
fn worker() -> Vec<u8> {
    guest!(worker:
        "mov ecx, 0x8000" "mov dx, 0x3f8" "mov rbx, 1"
        "2: imul rbx, rbx, 3" "add rbx, rcx" "mov [rcx], rbx" "push rbx"
        "add rcx, 0x1008" "and rcx, 0x3ffff" "or rcx, 0x8000"
        "movups xmm1, [rcx]" "movups [rcx + 16], xmm1"
        "mov al, bl" "and al, 15" "add al, 65" "out dx, al"
        "test bl, 7" "jnz 2b" "mov al, 10" "out dx, al" "jmp 2b")
}

#[test]
fn a_stepped_machine_goes_as_it_went_before() {
    let (mut vm, console) = machine(flat(worker()));
    step(&mut vm, 40);
    let (memory, at) = (contents(&vm), vm.registers(0).unwrap());
    let snapshot = vm.snapshot().unwrap();
    let mut first = None;
    for turn in 0..50 {
        let seen = (step(&mut vm, 90), step(&mut vm, 170), printed(&console));
        let memory_then = contents(&vm);
        assert!(differences(&memory, &memory_then).len() > 3);
        let first = first.get_or_insert_with(|| (seen.clone(), memory_then.clone()));
        assert_eq!(seen, first.0, "turn {turn}");
        assert_eq!(differences(&memory_then, &first.1), [0; 0], "turn {turn}");
        vm.reset(&snapshot).unwrap();
        assert_eq!(vm.registers(0).unwrap(), at);
        assert_eq!(differences(&contents(&vm), &memory), [0; 0], "turn {turn}");
    }
}

/// The configurations; none with `FLUKEVM_GUESTS=skip`.
fn kernels() -> Vec<Configuration> {
    match image::embedded().0.is_empty() {
        true => Vec::new(),
        false => Configuration::ALL.into(),
    }
}

/// Vectors from here on are interrupts.
const FIRST_INTERRUPT: u64 = 32;

/// The kernel's entry for traps, where a vector is on top of the stack.
fn trap_entry(config: &VmConfig) -> u64 {
    let Guest::Fluke { kernel, .. } = &config.guest else {
        panic!("no kernel");
    };
    let file = object::File::parse(&**kernel).unwrap();
    let named = |s: &object::Symbol<'_, '_>| {
        let name = s
            .name()
            .map(|name| format!("{:#}", rustc_demangle::demangle(name)));
        name.is_ok_and(|name| name == "fluke_kernel::arch::entry::trap")
    };
    file.symbols().find(named).unwrap().address()
}

#[test]
fn a_kernel_and_its_programs_go_as_they_went_before() {
    for kernel in kernels() {
        let config = VmConfig::fluke(kernel, "hello", &["a".into()]).unwrap();
        let trap = trap_entry(&config);
        let (mut vm, console) = machine(config.timeout(PATIENCE).memory(MEMORY_MIN));
        assert!(vm.run_to(0, Point::FirstUser, PATIENCE).unwrap());
        let memory = contents(&vm);
        let snapshot = vm.snapshot().unwrap();
        let mut first = None;
        for turn in 0..10 {
            // The eighth call or fault of the programs. The timer comes when it comes.
            let mut own = 0;
            while own < 8 {
                assert!(vm.run_to(0, Point::Address(trap), PATIENCE).unwrap());
                let stack = vm.registers(0).unwrap().general.rsp;
                // A trap of the kernel's own is on a stack elsewhere, and an interrupt.
                let vector = vm.memory().get::<u64>(stack.wrapping_sub(DIRECT_MAP));
                own += u32::from(vector.is_ok_and(|vector| vector < FIRST_INTERRUPT));
            }
            let registers = vm.registers(0).unwrap();
            assert_eq!(registers.general.rip, trap);
            let status = status(&mut vm);
            let seen = (registers, status, printed(&console));
            assert!(seen.2.contains("arg 1: a"), "{}", seen.2);
            let first = first.get_or_insert_with(|| seen.clone());
            assert_eq!(seen, *first, "{kernel}, turn {turn}");
            vm.reset(&snapshot).unwrap();
            assert_eq!(differences(&contents(&vm), &memory), [0; 0], "{kernel}");
        }
    }
}

#[test]
fn copies_of_a_machine_neither_see_each_other_nor_change_the_snapshot() {
    let (mut vm, _) = machine(flat(worker()));
    step(&mut vm, 40);
    let snapshot = vm.snapshot().unwrap();
    let start = contents(&vm);
    let end = step(&mut vm, 200);
    let memory = contents(&vm);
    let mut copies: Vec<Vm> = (0..3)
        .map(|_| Vm::new(VmConfig::snapshot(snapshot.clone())).unwrap())
        .collect();
    for copy in &mut copies {
        assert_eq!(differences(&contents(copy), &start), [0; 0]);
        assert_eq!(step(copy, 200), end);
        assert_eq!(differences(&contents(copy), &memory), [0; 0]);
    }
    // A copy is a machine like others: it can be saved, and put back to either.
    let copy = &mut copies[0];
    let later = copy.snapshot().unwrap();
    step(copy, 100);
    copy.reset(&snapshot).unwrap();
    assert_eq!(differences(&contents(copy), &start), [0; 0]);
    step(copy, 10);
    copy.reset(&later).unwrap();
    assert_eq!(differences(&contents(copy), &memory), [0; 0]);
    assert_eq!(copy.registers(0).unwrap(), end);
    vm.reset(&later).unwrap();
    assert_eq!(differences(&contents(&vm), &memory), [0; 0]);
}

#[test]
fn what_the_host_writes_is_put_back_too() {
    let (mut vm, _) = machine(flat(worker()));
    let snapshot = vm.snapshot().unwrap();
    let start = contents(&vm);
    for at in [0x5000, 0x20_0ffc, vm.memory().size() - 8] {
        vm.memory().put(at, &0x1234_5678_9abc_def0u64).unwrap();
    }
    assert_eq!(differences(&start, &contents(&vm)).len(), 4);
    vm.reset(&snapshot).unwrap();
    assert_eq!(differences(&start, &contents(&vm)), [0; 0]);
}

#[test]
fn a_machine_that_has_ended_runs_again() {
    // Ends with the number of the turn, which it keeps in memory.
    let code = guest!(turns:
        "inc dword ptr [0x8000]" "mov eax, [0x8000]" "mov dx, 0xf4" "out dx, eax" "ud2");
    let (mut vm, _) = machine(flat(code).vcpus(2));
    let start = vm.snapshot().unwrap();
    for _ in 0..20 {
        let status = status(&mut vm);
        assert!((1..=2).contains(&status), "{status}");
        assert!(vm.snapshot().is_err(), "it has ended");
        vm.reset(&start).unwrap();
    }
    assert!(vm.registers(1).is_some());
    let crash = guest!(crash: "ud2");
    let (mut vm, _) = machine(flat(crash));
    let start = vm.snapshot().unwrap();
    for _ in 0..5 {
        assert_eq!(status(&mut vm), 129);
        vm.reset(&start).unwrap();
    }
}

#[test]
fn half_a_line_comes_back() {
    let code = guest!(half: "mov dx, 0x3f8" "mov al, 0x61" "out dx, al" "inc al" "out dx, al"
        "nop" "mov al, 10" "out dx, al" "mov dx, 0xf4" "xor eax, eax" "out dx, eax");
    let (mut vm, console) = machine(flat(code));
    step(&mut vm, 5);
    let snapshot = vm.snapshot().unwrap();
    assert_eq!(status(&mut vm), 0);
    assert_eq!(printed(&console), "ab\n");
    let (mut copy, console) = machine(VmConfig::snapshot(snapshot));
    assert_eq!(status(&mut copy), 0);
    assert_eq!(printed(&console), "ab\n");
}

/// Reads the time-stamp counter into memory, for ever.
fn clock() -> Vec<u8> {
    guest!(clock: "2: rdtsc" "shl rdx, 32" "or rax, rdx" "mov [0x8000 + rdi * 8], rax" "jmp 2b")
}

fn run_for(vm: &mut Vm, time: Duration) {
    vm.resume();
    assert!(vm.wait(time).is_none());
    vm.pause().unwrap();
}

#[test]
fn the_time_stamp_counter_goes_on_from_where_it_stood_or_never_stands() {
    // Long enough to tell the time of a run from that of the host.
    const PAUSE: Duration = Duration::from_secs(2);
    let (mut vm, _) = machine(flat(clock()).vcpus(2));
    let times = |vm: &Vm| [0, 8].map(|n| vm.memory().get::<u64>(0x8000 + n).unwrap());
    run_for(&mut vm, Duration::from_millis(20));
    let snapshot = vm.snapshot().unwrap();
    let saved = *times(&vm).iter().max().unwrap();
    sleep(PAUSE);
    for long in [false, true] {
        let mut copy = Vm::new(VmConfig::snapshot(snapshot.clone())).unwrap();
        let vm = if long { &mut vm } else { &mut copy };
        vm.reset(&snapshot).unwrap();
        let start = Instant::now();
        run_for(vm, Duration::from_millis(50));
        let most = start.elapsed().as_secs_f64();
        for time in times(vm) {
            let seconds = time.wrapping_sub(saved) as f64 / 1e3 / f64::from(vm.tsc_khz());
            // From below: a busy host may not let the guest run at all.
            match doctor::probe().unwrap().settable_tsc {
                true => assert!(
                    (0.0..=most + 0.1).contains(&seconds),
                    "{seconds} s of {most} s"
                ),
                false => assert!(seconds >= PAUSE.as_secs_f64(), "{seconds} s"),
            }
        }
    }
}

#[test]
fn a_timer_that_was_running_fires_once() {
    // Counts timer interrupts at 0x8000: one shot of 100 ms, then sleeps for ever.
    let code = guest!(timer:
        "lea rax, [rip + 3f]" "mov ebx, 0x9000"
        "mov [rbx + 0x200], ax" "mov word ptr [rbx + 0x202], 8"
        "mov word ptr [rbx + 0x204], 0x8e00" "shr rax, 16" "mov [rbx + 0x206], ax"
        "mov dword ptr [rbx + 0x208], 0"
        "mov rax, 0x00af9b000000ffff" "mov [0xa008], rax"
        "mov rax, 0x00cf93000000ffff" "mov [0xa010], rax"
        "sub rsp, 16" "mov word ptr [rsp], 0x17" "mov qword ptr [rsp + 2], 0xa000" "lgdt [rsp]"
        "mov word ptr [rsp], 0xfff" "mov qword ptr [rsp + 2], 0x9000" "lidt [rsp]"
        "mov ecx, 0x1b" "rdmsr" "or eax, 0xc00" "wrmsr"
        "mov ecx, 0x80f" "mov eax, 0x1ff" "xor edx, edx" "wrmsr"
        "mov ecx, 0x83e" "mov eax, 0xb" "wrmsr"
        "mov ecx, 0x832" "mov eax, 0x20" "wrmsr"
        "mov ecx, 0x838" "mov eax, 100000000" "wrmsr"
        "sti" "2: hlt" "jmp 2b"
        ".balign 8" "3: inc dword ptr [0x8000]"
        "mov ecx, 0x80b" "xor eax, eax" "xor edx, edx" "wrmsr" "iretq");
    let (mut vm, _) = machine(flat(code));
    let ticks = |vm: &Vm| vm.memory().get::<u32>(0x8000).unwrap();
    run_for(&mut vm, Duration::from_millis(30));
    assert_eq!(ticks(&vm), 0, "too early, or the host is very busy");
    let snapshot = vm.snapshot().unwrap();
    for _ in 0..3 {
        run_for(&mut vm, Duration::from_millis(400));
        assert_eq!(ticks(&vm), 1);
        vm.reset(&snapshot).unwrap();
        assert_eq!(ticks(&vm), 0);
    }
    let mut copy = Vm::new(VmConfig::snapshot(snapshot)).unwrap();
    run_for(&mut copy, Duration::from_millis(400));
    assert_eq!(ticks(&copy), 1);
}

#[test]
fn all_vcpus_come_back_in_whatever_they_did() {
    // vCPU 0 counts, 1 writes to a port, 2 sleeps, 3 reads a port.
    let code = guest!(four:
        "cmp edi, 1" "je 3f" "cmp edi, 2" "je 4f" "cmp edi, 3" "je 5f"
        "2: inc rbx" "jmp 2b"
        "3: mov dx, 0x3ff" "6: inc rbx" "mov al, bl" "out dx, al" "inc r15" "jmp 6b"
        "4: cli" "hlt" "jmp 4b"
        "5: mov dx, 0x3fd" "7: inc rbx" "in al, dx" "inc r15" "jmp 7b");
    let (mut vm, _) = machine(flat(code).vcpus(4));
    let registers = |vm: &mut Vm| [0, 1, 2, 3].map(|id| vm.registers(id).unwrap());
    for _ in 0..20 {
        run_for(&mut vm, Duration::from_millis(3));
        let snapshot = vm.snapshot().unwrap();
        let saved = registers(&mut vm);
        run_for(&mut vm, Duration::from_millis(3));
        vm.reset(&snapshot).unwrap();
        assert_eq!(registers(&mut vm), saved);
        let mut copy = Vm::new(VmConfig::snapshot(snapshot)).unwrap();
        assert_eq!(registers(&mut copy), saved);
    }
}

#[test]
fn a_snapshot_goes_through_a_directory() {
    let directory = tempfile::tempdir().unwrap();
    let (mut vm, _) = machine(flat(worker()));
    step(&mut vm, 40);
    let snapshot = vm.snapshot().unwrap();
    let (end, memory) = (step(&mut vm, 200), contents(&vm));
    disk::save(&snapshot, directory.path()).unwrap();
    let loaded = disk::load(directory.path()).unwrap();
    // Nothing of the directory is needed from here on.
    drop(directory);
    let mut copy = Vm::new(VmConfig::snapshot(loaded.clone())).unwrap();
    assert_eq!(step(&mut copy, 200), end);
    assert_eq!(differences(&contents(&copy), &memory), [0; 0]);
    vm.reset(&loaded).unwrap();
    assert_eq!(step(&mut vm, 200), end);
}

#[test]
fn machines_that_differ_are_refused() {
    let (mut vm, _) = machine(flat(worker()));
    let snapshot: Snapshot = vm.snapshot().unwrap();
    let (mut other, _) = machine(flat(worker()).vcpus(2));
    let why = |result: Result<(), flukevm::error::Error>| result.unwrap_err().to_string();
    assert!(why(other.reset(&snapshot)).contains("other vCPUs or memory"));
    let config = VmConfig::snapshot(snapshot).vcpus(2);
    assert!(why(Vm::new(config).map(drop)).contains("that it had"));
}

#[test]
fn points_are_come_to() {
    let (mut vm, _) = machine(flat(worker()));
    let third = FLAT_BASE + 5 + 4;
    assert!(vm.run_to(0, Point::Address(third), PATIENCE).unwrap());
    assert_eq!(vm.registers(0).unwrap().general.rip, third);
    // It never comes there again.
    let limit = Duration::from_millis(50);
    assert!(!vm.run_to(0, Point::Address(third), limit).unwrap());
    let ended = guest!(ended: "mov dx, 0xf4" "mov eax, 3" "out dx, eax" "hlt");
    let (mut vm, _) = machine(flat(ended));
    let stop = vm.run_to(0, Point::Steps(100), PATIENCE);
    assert!(matches!(stop, Err(StopReason::Exited(3))));
}
