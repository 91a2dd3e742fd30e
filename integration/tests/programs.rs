//! Every guest program in every configuration, with 1 and 4 vCPUs or some of these, through the library.
//!
//! Needs KVM. A case is named `program/configuration/vcpus`. At most two run at once, unless
//! `--test-threads` says otherwise: their vCPUs are many more than most hosts have CPUs.

use std::process::ExitCode;
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};
use sha2::{Digest, Sha256};

use flukevm::config::{Configuration, GuestFile, MEMORY_DEFAULT, MEMORY_MIN, Preempt, VmConfig};
use flukevm::inspect::View;
use flukevm::stop::StopReason;
use flukevm::vm::{Outcome, Vm};

/// The fewest, and more than most hosts have.
const VCPUS: &[u32] = &[1, 4];
const THREADS: usize = 2;
/// A case that runs for longer hangs, and is looked into.
const PATIENCE: Duration = Duration::from_secs(150);
/// And once more so much later.
const LATER: Duration = Duration::from_secs(5);
/// A program that never ends runs for so long: enough to say so first, on a busy host too.
const SPIN: Duration = Duration::from_secs(2);
/// What `sha256tree` hashes: a size that is no whole number of its chunks, and of pages.
const FILE_SIZE: usize = (256 << 10) + 77;
const LARGE_FILE_SIZE: usize = (8 << 20) + 77;
/// Bytes of a chunk of `sha256tree`.
const CHUNK: usize = 1 << 20;

/// How a run must end.
#[derive(Clone, Copy)]
enum End {
    Exited(u32),
    Timeout,
}

/// A program to run in every configuration.
#[derive(Clone)]
struct Case {
    name: &'static str,
    /// With each of these numbers of vCPUs.
    vcpus: &'static [u32],
    program: &'static str,
    args: Vec<String>,
    files: Vec<GuestFile>,
    memory: u64,
    timeout: Option<Duration>,
    end: End,
    /// Each must be in what the guest prints; `{cpus}` stands for the number of vCPUs.
    lines: Vec<String>,
    check: fn(&str) -> Result<(), String>,
}

impl Case {
    fn new(name: &'static str, end: End, lines: &[&str]) -> Self {
        let (program, argument) = name.split_once('-').unwrap_or((name, ""));
        Self {
            name,
            vcpus: VCPUS,
            program,
            args: [argument]
                .into_iter()
                .filter(|a| !a.is_empty())
                .map(String::from)
                .collect(),
            files: Vec::new(),
            memory: MEMORY_DEFAULT,
            timeout: None,
            end,
            lines: lines.iter().map(ToString::to_string).collect(),
            check: |_| Ok(()),
        }
    }

    fn on(mut self, vcpus: &'static [u32]) -> Self {
        self.vcpus = vcpus;
        self
    }

    fn small(mut self) -> Self {
        self.memory = MEMORY_MIN;
        self
    }
}

fn cases() -> Vec<Case> {
    let mut hello = Case::new(
        "hello",
        End::Exited(3),
        &[
            "arg 0: hello\narg 1: 3\narg 2: a b\narg 3: \n",
            "file data: 5 bytes\nfile empty: 0 bytes\n",
        ],
    );
    hello.args = ["3", "a b", ""].map(String::from).into();
    hello.files = vec![file("data", vec![1; 5]), file("empty", Vec::new())];

    let mut spin = Case::new("spin", End::Timeout, &["spinning\n"]);
    spin.timeout = Some(SPIN);

    let mut exhaust = Case::new("exhaust", End::Exited(0), &["Threads until", "Tasks until"]);
    exhaust.check = |text| match text.matches(": ok\n").count() {
        2 => Ok(()),
        n => Err(format!("{n} kinds of object are ok, not 2")),
    };

    let mut tour = Case::new(
        "tour",
        End::Exited(0),
        &[
            "A tour of the Fluke kernel, on {cpus} CPUs.",
            " checks, 0 failed\n",
        ],
    );
    tour.check = |text| match text.matches("  ok      ").count() {
        0..10 => Err("fewer than 10 checks".into()),
        _ if text.contains("FAILED") => Err("a check failed".into()),
        _ => Ok(()),
    };

    vec![
        hello,
        spin,
        tour,
        Case::new(
            "wild",
            End::Exited(0),
            &[
                "entry points came back",
                " pairs of an entry point and how a call of it ends were seen\n",
                "calls that sleep were stopped and destroyed\n",
            ],
        ),
        exhaust.small(),
        Case::new(
            "exhaust-memory",
            End::Exited(125),
            &["root: out of memory: exhaust wants more than the "],
        )
        .small(),
        Case::new("exhaust-objects", End::Exited(0), &["Refs, then 1 of 1"])
            .small()
            .on(&[1]),
        Case::new("calls", End::Exited(0), &["calls: done\n"]),
        Case::new(
            "stress",
            End::Exited(0),
            &[
                "8 threads on {cpus} CPUs: counter 120, token passed 120 times, sum 1440, \
                 0 errors\n",
            ],
        ),
        Case::new(
            "badptr",
            End::Exited(126),
            &[
                "badptr: page fault writing 0x10 at rip 0x",
                ": no memory there\n",
            ],
        ),
        Case::new(
            "badptr-call",
            End::Exited(126),
            &["badptr: misuse of an entry point at rip 0x"],
        ),
        Case::new(
            "badptr-jump",
            End::Exited(126),
            &["badptr: page fault executing 0x10 at rip 0x10: no memory there\n"],
        ),
        Case::new(
            "badptr-stack",
            End::Exited(126),
            &["badptr: page fault writing 0x", ": no memory there\n"],
        ),
        Case::new(
            "badptr-kernel",
            End::Exited(126),
            &["badptr: page fault reading 0xffffffff80200000 at rip 0x"],
        ),
        Case::new(
            "badptr-enter",
            End::Exited(126),
            &["badptr: page fault executing 0xffffffff80200000 at rip 0xffffffff80200000"],
        ),
        Case::new(
            "badptr-supervisor",
            End::Exited(126),
            &["badptr: misuse of an entry point at rip 0x4000000: insanity NotKernel\n"],
        ),
        console(),
        Case::new(
            "panics",
            End::Exited(101),
            &[
                "panics: panicked at ",
                "a panic as ordered, with 3\n  at 0x",
            ],
        ),
        Case::new(
            "chello",
            End::Exited(0),
            &[
                "C: hello from the first thread\nC: hello from the second thread\n\
                 C: both threads have run\n",
            ],
        ),
        Case::new("preempt", End::Exited(0), &[" messages, 0 errors\n"]),
        Case::new("schedulers", End::Exited(0), &["schedulers: ok\n"]),
        Case::new("unmake", End::Exited(0), &["unmake: 48 checks, 0 failed\n"]),
        Case::new(
            "faults",
            End::Exited(0),
            &["faults: 499 checks, 0 failed\n"],
        ),
        Case::new(
            "faults-soft",
            End::Exited(0),
            &["faults: 119 checks, 0 failed\n"],
        ),
        Case::new(
            "faults-hard",
            End::Exited(0),
            &["faults: 119 checks, 0 failed\n"],
        ),
        Case::new(
            "faults-orphan",
            End::Exited(0),
            &["faults: 119 checks, 0 failed\n"],
        ),
        Case::new(
            "faults-waits",
            End::Exited(0),
            &["faults: 353 checks, 0 failed\n"],
        ),
        // In all configurations more than 20,000 calls.
        Case::new(
            "fuzz",
            End::Exited(0),
            &["fuzz: seed 1: 1700 calls by 8 threads", "fuzz: ok\n"],
        ),
        sha256tree("sha256tree", FILE_SIZE),
        // Two levels; what they do not know of works below them too.
        nest(
            "nest",
            "chello",
            "--times 3 2 4M",
            End::Exited(0),
            &[
                "C: both threads have run\nnest 1: ",
                "nest 2: nothing is left behind: ",
            ],
        ),
        nest(
            "nest-limit",
            "preempt",
            "--times 3 2 512K",
            End::Exited(125),
            &[
                // What the inner level uses comes out of what the outer one has.
                "nest 2: nest wants more than its 512 KiB\n",
                "nest 2: nothing is left behind: ",
            ],
        ),
        nest(
            "nest-exception",
            "badptr",
            "2 1M",
            End::Exited(126),
            &["nest 1: p: page fault writing "],
        ),
    ]
}

/// Lines of threads that are destroyed and made again while they print: each once, whole, in order.
fn console() -> Case {
    let mut case = Case::new(
        "console",
        End::Exited(0),
        &[
            "cut off\nabc\ncut off\n",
            "console: inside a connection\n",
            "console: ok\n",
        ],
    );
    case.check = |text| {
        for printer in 0..3 {
            let end = format!(" of {printer}");
            let lines = text.lines().filter(|line| line.ends_with(&end));
            let expected = (0..8).map(|n| format!("line {n}{end}"));
            if !lines.eq(expected) {
                return Err(format!("not each line once and in order: {end}"));
            }
        }
        Ok(())
    };
    case
}

/// Runs a built-in program below levels of `nest`, as the file `p`.
fn nest(name: &'static str, program: &str, args: &str, end: End, lines: &[&str]) -> Case {
    let mut case = Case::new("nest", end, lines);
    case.name = name;
    case.args = args.split(' ').chain(["p"]).map(String::from).collect();
    let image = flukevm::image::program(program).expect("the program is built in");
    case.files.push(file("p", image));
    case
}

/// On one CPU nobody sees the middle of a message, unless there are preemption points; nor that of an
/// idempotent request, unless the kernel can be preempted everywhere.
fn preempt(configuration: Configuration) -> Case {
    fn seen(text: &str, what: &str) -> bool {
        text.lines()
            .filter(|line| line.contains(what))
            .any(|line| !line.contains(": 0 in the middle of "))
    }
    fn expect(text: &str, expected: [bool; 2]) -> Result<(), String> {
        let seen = [" messages, ", " idempotent requests, "].map(|what| seen(text, what));
        match seen == expected {
            true => Ok(()),
            false => Err(format!(
                "seen the middle of messages and requests: {seen:?} and not {expected:?}"
            )),
        }
    }
    let mut case = Case::new("preempt", End::Exited(0), &[" messages, 0 errors\n"]);
    case.name = "preempt-points";
    case.check = match configuration.preempt() {
        Preempt::None => |text| expect(text, [false, false]),
        Preempt::Partial => |text| expect(text, [true, false]),
        Preempt::Full => |text| expect(text, [true, true]),
    };
    case
}

fn file(name: &str, data: Vec<u8>) -> GuestFile {
    GuestFile {
        name: name.into(),
        data,
    }
}

/// Bytes without a pattern that a wrong page or offset would keep.
fn noise(size: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..size).map(|_| next()).collect()
}

fn hex(hash: impl AsRef<[u8]>) -> String {
    hash.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

/// Hashes a file of noise and an empty one; the digests must be those computed here.
fn sha256tree(name: &'static str, size: usize) -> Case {
    let mut case = Case::new("sha256tree", End::Exited(0), &[]);
    case.name = name;
    for (name, data) in [("noise", noise(size)), ("empty", Vec::new())] {
        let digest = hex(Sha256::digest(&data));
        let mut tree = Sha256::new();
        for chunk in data.chunks(CHUNK) {
            tree.update(Sha256::digest(chunk));
        }
        let chunks = data.len().div_ceil(CHUNK);
        let tree = hex(tree.finalize());
        case.lines
            .push(format!("tree {tree}  {name} ({chunks} chunks)\n"));
        case.lines.push(format!("{digest}  {name}\n"));
        case.args.extend(["--expect".into(), digest]);
        case.files.push(file(name, data));
    }
    case
}

fn run(case: &Case, configuration: Configuration, vcpus: u32) -> Result<(), Failed> {
    let mut config = VmConfig::fluke(configuration, case.program, &case.args)?
        .vcpus(vcpus)
        .memory(case.memory);
    if let Some(timeout) = case.timeout {
        config = config.timeout(timeout);
    }
    for GuestFile { name, data } in &case.files {
        config = config.file(name, data.clone());
    }
    let mut vm = Vm::new(config)?;
    vm.resume();
    let Some(stop) = vm.wait(PATIENCE) else {
        return Err(hung(vm).into());
    };
    let outcome = vm.finish(stop);
    check(case, vcpus, &outcome)
        .map_err(|why| format!("{why}\nthe guest printed:\n{}", outcome.console_text()).into())
}

/// What there is to see of a machine that hangs, or is slow: now, and a little later.
fn hung(mut vm: Vm) -> String {
    let mut seen = format!("it still ran after {} s", PATIENCE.as_secs());
    let mut stop = None;
    for (when, after) in [("Now", Duration::ZERO), ("Later", LATER)] {
        stop = stop.or_else(|| vm.wait(after));
        stop = stop.or_else(|| vm.pause().err());
        seen += &format!("\n\n{when}:");
        let stacks = (0..vm.status().vcpus).map(|cpu| View::Stack { cpu });
        for view in [View::Cpus, View::Queues, View::Threads]
            .into_iter()
            .chain(stacks)
        {
            let text = vm.inspect(&view).map_or_else(|e| e.to_string(), |r| r.text);
            seen += &format!("\n{view:?}:\n{text}");
        }
        vm.resume();
    }
    let outcome = vm.finish(stop.unwrap_or(StopReason::Timeout(PATIENCE)));
    for (vcpu, stats) in outcome.stats.iter().enumerate() {
        seen += &format!("\nvCPU {vcpu}: {:?}", stats.kernel);
    }
    format!(
        "{seen}\n{}, having printed:\n{}",
        outcome.stop,
        outcome.console_text()
    )
}

fn check(case: &Case, vcpus: u32, outcome: &Outcome) -> Result<(), String> {
    let ended = match (case.end, &outcome.stop) {
        (End::Exited(expected), StopReason::Exited(status)) => *status == expected,
        (End::Timeout, StopReason::Timeout(_)) => true,
        _ => false,
    };
    let text = outcome.console_text();
    if !ended {
        return Err(match case.end {
            End::Exited(status) => format!("expected status {status}, but {}", outcome.stop),
            End::Timeout => format!("expected a timeout, but {}", outcome.stop),
        });
    }
    if outcome.time_to_first_user.is_none() {
        return Err("no user instruction was seen".into());
    }
    for line in &case.lines {
        let line = line.replace("{cpus}", &vcpus.to_string());
        if !text.contains(&line) {
            return Err(format!("not printed: {line:?}"));
        }
    }
    (case.check)(&text)
}

fn trial(case: &Case, configuration: Configuration, vcpus: u32) -> Trial {
    let name = format!("{}/{configuration}/{vcpus}", case.name);
    let case = case.clone();
    Trial::test(name, move || run(&case, configuration, vcpus))
}

fn main() -> ExitCode {
    let mut args = Arguments::from_args();
    args.test_threads.get_or_insert(THREADS);
    let mut trials = Vec::new();
    for (number, case) in cases().iter().enumerate() {
        for (kernel, configuration) in Configuration::ALL.into_iter().enumerate() {
            for (nth, &vcpus) in case.vcpus.iter().enumerate() {
                // All of them take long: two kernels, and one of the numbers, are what is not left to
                // `--include-ignored`.
                let many = case.vcpus.len() > 1 && (number + kernel + nth) % 2 == 1;
                let left = many || (number + kernel) % Configuration::ALL.len() > 1;
                trials.push(trial(case, configuration, vcpus).with_ignored_flag(left));
            }
        }
    }
    for configuration in Configuration::ALL {
        trials.push(trial(&preempt(configuration), configuration, 1));
    }
    let large = sha256tree("sha256tree-large", LARGE_FILE_SIZE);
    for (configuration, vcpus) in Configuration::ALL.into_iter().zip([2, 4, 2, 1, 4]) {
        trials.push(trial(&large, configuration, vcpus));
    }
    libtest_mimic::run(&args, trials).exit_code()
}
