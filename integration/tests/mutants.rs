//! Each bug that a kernel can be told to have is found out by `verify`; without any, nothing is.
//!
//! Needs KVM, and the feature `mutants`. A case has the name of the bug.

use std::process::ExitCode;

use fluke_abi::mutant::Mutant;
use libtest_mimic::{Arguments, Failed, Trial};

use flukevm::config::Configuration;
use flukevm::verify::Plan;
use flukevm::verify::mutants::{Hunt, Verdict, hunt};

/// Points to look at in each cell.
const BUDGET: u64 = 128;
/// The same without a bug, where all of them are.
const SANE_BUDGET: u64 = 8;

fn verdict(mutant: Mutant, budget: u64) -> Result<Verdict, Failed> {
    let verdicts = hunt(&Hunt {
        mutants: vec![mutant],
        scenes: Vec::new(),
        configurations: Configuration::ALL.into(),
        plan: Plan {
            stride: 1,
            budget: Some(budget),
            seed: 1,
            delay_stride: 0,
            play_all: false,
            into: None,
        },
        jobs: 1,
    })?;
    verdicts
        .mutants
        .into_iter()
        .next()
        .ok_or_else(|| "nothing was looked for".into())
}

fn killed(mutant: Mutant) -> Result<(), Failed> {
    let verdict = verdict(mutant, BUDGET)?;
    match verdict.killed {
        Some(_) => Ok(()),
        None => Err(format!(
            "not found at {} points of {} cells: {}",
            verdict.points, verdict.cells, verdict.doc
        )
        .into()),
    }
}

/// Otherwise it would be no wonder that all are found.
fn sane() -> Result<(), Failed> {
    let verdict = verdict(Mutant::none, SANE_BUDGET)?;
    match verdict.killed {
        None if verdict.points > 0 => Ok(()),
        killed => Err(format!("{} points, and {killed:?}", verdict.points).into()),
    }
}

fn main() -> ExitCode {
    let mut args = Arguments::from_args();
    args.test_threads.get_or_insert(2);
    let cases = Mutant::ALL
        .iter()
        .map(|&mutant| Trial::test(mutant.name(), move || killed(mutant)));
    let mut trials: Vec<_> = cases.collect();
    trials.push(Trial::test("none", sane));
    libtest_mimic::run(&args, trials).exit_code()
}
