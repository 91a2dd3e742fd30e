//! Every script of `scenarios/` in every configuration, and that each entry point that can sleep has one.
//!
//! Needs KVM. A case is named `script/configuration/vcpus`. At most two run at once, unless `--test-threads`
//! says otherwise.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use fluke_abi::entry::{Class, TABLE};
use libtest_mimic::{Arguments, Failed, Trial};

use flukevm::config::Configuration;
use flukevm::script::{self, Script, Settings};

const THREADS: usize = 2;
/// A script that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(150);

fn scripts() -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let files = fs::read_dir(directory).expect("the scenarios are there");
    let files = files.map(|file| file.expect("the directory can be read").path());
    let mut scripts: Vec<_> = files
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "rhai")
        })
        .collect();
    scripts.sort();
    scripts
}

fn name(script: &Path) -> String {
    let name = script.file_stem().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

fn play(path: &Path, configuration: Configuration, vcpus: u32) -> Result<(), Failed> {
    let script = Script::read(path)?;
    let settings = Settings {
        vcpus: Some(vcpus),
        patience: Some(PATIENCE),
        ..Settings::of(configuration)
    };
    match script::run(&script, settings).failure {
        None => Ok(()),
        Some(failure) => Err(failure.into()),
    }
}

/// Long and multi-stage entry points are those that have something to show.
fn each_has_one(scripts: &[PathBuf]) -> Result<(), Failed> {
    let names: BTreeSet<_> = scripts.iter().map(|path| name(path)).collect();
    let rows = TABLE
        .iter()
        .filter(|row| matches!(row.class, Class::Long | Class::MultiStage));
    let without: Vec<_> = rows
        .filter(|row| !names.contains(row.name))
        .map(|row| row.name)
        .collect();
    match without.is_empty() {
        true => Ok(()),
        false => Err(format!("no scenario for: {}", without.join(", ")).into()),
    }
}

fn main() -> ExitCode {
    let mut args = Arguments::from_args();
    args.test_threads.get_or_insert(THREADS);
    let scripts = scripts();
    let mut trials = Vec::new();
    for path in &scripts {
        for (n, configuration) in Configuration::ALL.into_iter().enumerate() {
            // One CPU, and two in turn: what one CPU does in any order, two may do at once.
            let vcpus = 1 + n as u32 % 2;
            let path = path.clone();
            let name = format!("{}/{configuration}/{vcpus}", name(&path));
            trials.push(Trial::test(name, move || play(&path, configuration, vcpus)));
        }
    }
    trials.push(Trial::test(
        "each entry point that can sleep has one",
        move || each_has_one(&scripts),
    ));
    libtest_mimic::run(&args, trials).exit_code()
}
