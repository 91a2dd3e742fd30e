//! `flukevm test`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::{Ended, Script, Settings, run};
use crate::config::{Configuration, Model, Preempt};
use crate::error::{Error, STATUS_FAILURE};

/// Arguments of `flukevm test`.
#[derive(Debug, Args)]
pub struct TestArgs {
    /// Scripts, or directories of scripts.
    #[arg(required = true, value_name = "SCRIPT")]
    scripts: Vec<PathBuf>,
    /// Only those with this in their names.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Execution model of the kernel, whatever the scripts say.
    #[arg(long, value_enum)]
    model: Option<Model>,
    /// Preemption level, whatever the scripts say.
    #[arg(long, value_enum, value_name = "LEVEL")]
    preempt: Option<Preempt>,
    /// Number of vCPUs, whatever the scripts say.
    #[arg(long, value_name = "N")]
    vcpus: Option<u32>,
    /// Run each script in all configurations of the kernel.
    #[arg(long, conflicts_with_all = ["model", "preempt"])]
    all: bool,
    /// How long a script may take, such as 30s.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
    /// Print one JSON array.
    #[arg(long)]
    json: bool,
}

/// A line of what `flukevm test` prints.
#[derive(Serialize)]
struct Line<'s> {
    script: &'s str,
    passed: bool,
    #[serde(flatten)]
    ended: Ended,
}

/// Runs scripts; returns the exit status.
///
/// # Errors
/// If a script cannot be read, or there is none.
pub fn main(args: &TestArgs) -> Result<u8, Error> {
    let mut scripts = Vec::new();
    for path in files(&args.scripts)? {
        let name = path.display().to_string();
        if args.filter.as_ref().is_none_or(|text| name.contains(text)) {
            scripts.push(Script::read(&path)?);
        }
    }
    if scripts.is_empty() {
        return Err(Error::Config(
            "no script of that name; scripts are files that end with .rhai".into(),
        ));
    }
    let own = Settings {
        model: args.model,
        preempt: args.preempt,
        vcpus: args.vcpus,
        patience: args.timeout,
    };
    if let (Some(model), Some(preempt)) = (own.model, own.preempt) {
        Configuration::new(model, preempt)?;
    }
    let settings = match args.all {
        false => vec![own],
        true => {
            let of = |configuration| Settings {
                model: Settings::of(configuration).model,
                preempt: Settings::of(configuration).preempt,
                ..own
            };
            Configuration::ALL.map(of).into()
        }
    };
    let mut lines = Vec::new();
    for script in &scripts {
        for settings in &settings {
            let ended = run(script, *settings);
            if !args.json {
                print(script.name(), &ended);
            }
            lines.push(Line {
                script: script.name(),
                passed: ended.failure.is_none(),
                ended,
            });
        }
    }
    if args.json {
        let text = serde_json::to_string_pretty(&lines).unwrap_or_default();
        // A reader that has gone does not want it.
        let _ = writeln!(io::stdout(), "{text}");
    }
    match lines.iter().all(|line| line.passed) {
        true => Ok(0),
        false => Ok(STATUS_FAILURE),
    }
}

fn print(name: &str, ended: &Ended) {
    let verdict = if ended.failure.is_some() {
        "FAILED"
    } else {
        "ok"
    };
    let kernel = ended.configuration.as_deref().unwrap_or("no machine");
    let vcpus = ended.vcpus.unwrap_or(0);
    let seconds = ended.elapsed_ms / 1e3;
    let mut out = io::stdout().lock();
    let _ = writeln!(
        out,
        "{verdict:6}  {name}  {kernel}, {vcpus} vCPUs  {seconds:.1} s"
    );
    if let Some(failure) = &ended.failure {
        let _ = writeln!(out, "{failure}");
    }
}

/// The scripts that paths stand for: a directory for those in it, by name.
fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>, Error> {
    let mut files = Vec::new();
    for path in paths {
        match path.is_dir() {
            true => files.extend(inside(path)?),
            false => files.push(path.clone()),
        }
    }
    Ok(files)
}

fn inside(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let fail = |source| Error::File {
        path: directory.into(),
        source,
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "rhai")
        {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
