//! Checkpoints: the colony is written to a file in every configuration, and goes on from there in every
//! configuration, with another number of vCPUs; it must come out each time as if nothing had happened.
//!
//! Needs KVM. A case is named `taken/configuration/vcpus` or `restored/from-to/vcpus`.

use std::fs;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};

use flukevm::checkpoint::{self, Checkpoints};
use flukevm::config::{Configuration, VmConfig};
use flukevm::stop::StopReason;
use flukevm::vm::{Outcome, Vm};

const PROGRAM: &str = "colony";
/// vCPUs where a checkpoint is taken, by configuration; and where it is restored, by its configuration.
const TAKEN_ON: [u32; 5] = [1, 4, 2, 1, 4];
const RESTORED_ON: [u32; 5] = [4, 1, 4, 2, 1];
const PATIENCE: Duration = Duration::from_secs(300);
const THREADS: usize = 2;

/// A checkpoint of each configuration, or why there is none.
static TAKEN: [OnceLock<Result<Vec<u8>, String>>; 5] = [const { OnceLock::new() }; 5];

/// What the colony says of itself, which must be well.
fn says(outcome: &Outcome) -> Result<Vec<String>, String> {
    let text = outcome.console_text();
    let lines: Vec<_> = text
        .lines()
        .filter(|line| line.starts_with("colony: "))
        .map(String::from)
        .collect();
    let well = lines
        .last()
        .is_some_and(|line| line == "colony: all is well");
    match &outcome.stop {
        StopReason::Exited(0) if well => Ok(lines),
        stop => Err(format!("not well, {stop}; the guest printed:\n{text}")),
    }
}

fn run(config: VmConfig, vcpus: u32) -> Result<Outcome, String> {
    let config = config.vcpus(vcpus).timeout(PATIENCE);
    let vm = Vm::new(config).map_err(|error| error.to_string())?;
    vm.run().map_err(|error| error.to_string())
}

/// What the colony says when nothing happens to it, behind its first line.
fn undisturbed() -> Result<&'static [String], String> {
    static LINES: OnceLock<Result<Vec<String>, String>> = OnceLock::new();
    let lines = LINES.get_or_init(|| {
        let config = VmConfig::fluke(Configuration::ALL[0], PROGRAM, &[]);
        says(&run(config.map_err(|error| error.to_string())?, 1)?)
    });
    let lines = lines.as_ref().map_err(String::clone)?;
    let (first, lines) = lines.split_first().ok_or("it says nothing")?;
    match first.ends_with(" threads are asleep") {
        true => Ok(lines),
        false => Err(format!("it begins with {first:?}")),
    }
}

/// Takes a checkpoint, after which the colony goes on.
fn take(from: usize) -> Result<Vec<u8>, String> {
    let directory = tempfile::tempdir().map_err(|error| error.to_string())?;
    let to = directory.path().join("checkpoint");
    let checkpoints = Checkpoints {
        to: &to,
        after: None,
    };
    let configuration = Configuration::ALL[from];
    let config = checkpoint::run(configuration, PROGRAM, &[], Vec::new(), &checkpoints);
    let config = config.map_err(|error| error.to_string())?;
    let outcome = run(config, TAKEN_ON[from])?;
    let lines = says(&outcome)?;
    if outcome.commits != 1 {
        return Err(format!("the file was written {} times", outcome.commits));
    }
    if &lines[1..] != undisturbed()? {
        return Err(format!("it comes out otherwise: {lines:#?}"));
    }
    fs::read(&to).map_err(|error| error.to_string())
}

fn taken(from: usize) -> Result<&'static [u8], String> {
    let file = TAKEN[from].get_or_init(|| take(from)).as_ref();
    file.map(Vec::as_slice).map_err(String::clone)
}

fn restored(from: usize, to: usize) -> Result<(), Failed> {
    let file = taken(from)?.to_vec();
    let config = checkpoint::restore(Configuration::ALL[to], "file", file, None)?;
    let outcome = run(config, RESTORED_ON[to])?;
    match says(&outcome)? == undisturbed()? {
        true => Ok(()),
        false => Err(format!("it comes out otherwise:\n{}", outcome.console_text()).into()),
    }
}

fn main() -> ExitCode {
    let mut args = Arguments::from_args();
    args.test_threads.get_or_insert(THREADS);
    let mut trials = Vec::new();
    for (from, configuration) in Configuration::ALL.iter().enumerate() {
        let name = format!("taken/{configuration}/{}", TAKEN_ON[from]);
        trials.push(Trial::test(name, move || Ok(taken(from).map(|_| ())?)));
    }
    for (from, taken) in Configuration::ALL.iter().enumerate() {
        for (to, configuration) in Configuration::ALL.iter().enumerate() {
            let name = format!("restored/{taken}-{configuration}/{}", RESTORED_ON[to]);
            // The rest takes long, and is left to `--include-ignored`.
            let left = (to + 5 - from) % 5 != 1;
            let trial = Trial::test(name, move || restored(from, to));
            trials.push(trial.with_ignored_flag(left));
        }
    }
    libtest_mimic::run(&args, trials).exit_code()
}
