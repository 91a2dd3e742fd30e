//! `flukevm bench`.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::model::{Report, Settings};
use super::{Job, compare, csv, html, measure, tables, text};
use crate::config::{Configuration, MIB, Model, Preempt, Size};
use crate::doctor::{self, Cpl0};
use crate::error::{Error, STATUS_FAILURE};

/// Arguments of the command.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Tables to measure; all, if left out. `--list` names them.
    tables: Vec<String>,
    /// List the tables.
    #[arg(long)]
    list: bool,
    /// A little of everything, in a few minutes; level partial only if it is asked for.
    #[arg(long)]
    quick: bool,
    /// Count instructions and bytes, and time nothing: what a baseline is made of.
    #[arg(long, conflicts_with_all = ["reps", "batches"])]
    counts: bool,
    /// Only kernels of that execution model.
    #[arg(long, value_enum)]
    model: Option<Model>,
    /// Only kernels of that preemption level.
    #[arg(long, value_enum, value_name = "LEVEL")]
    preempt: Option<Preempt>,
    /// Of the order of configurations, and of all that is drawn.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Machines of each configuration.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    reps: Option<u64>,
    /// Samples that each of them takes of each piece of work.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    batches: Option<u64>,
    /// Memory that memtest touches, such as 16M.
    #[arg(long, value_name = "SIZE")]
    memtest: Option<Size>,
    /// Only pieces of flukeperf whose names begin so, such as ipc_.
    #[arg(long, value_name = "PREFIX", default_value = "")]
    only: String,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Write that object to a file, too.
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Compare with a report that was saved: show only what has changed by more than chance and noise. The exit status is 1 if
    /// something is worse.
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// Write a page with tables and pictures, too.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write all values as comma-separated values, too.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
}

impl BenchArgs {
    fn settings(&self) -> Result<Settings, Error> {
        let emulated = doctor::probe()?.cpl0 == Cpl0::Emulated;
        let (reps, batches, bytes) = match self.quick {
            true => (1, 2, MIB / 4),
            false => (6, 5, 16 * MIB),
        };
        if self.counts && !emulated {
            return Err(Error::Config(
                "instructions are counted where kernels are emulated, and this host runs them on hardware; leave --counts out".into(),
            ));
        }
        let bytes = self.memtest.map_or(bytes, |size| size.0);
        if !(4096..=64 * MIB).contains(&bytes) {
            return Err(Error::Config(
                "memtest touches 4 KiB to 64 MiB; give a --memtest in between".into(),
            ));
        }
        Ok(Settings {
            quick: self.quick,
            seed: self.seed,
            reps: if self.counts {
                0
            } else {
                self.reps.unwrap_or(reps)
            },
            batches: self.batches.unwrap_or(batches),
            scale: if emulated { 1 } else { 32 },
            // As in OSDI '99; where kernel code is emulated that is less than a switch takes.
            period_ns: if emulated { 20_000_000 } else { 1_000_000 },
            memtest_bytes: bytes,
            only: self.only.clone(),
        })
    }

    fn configurations(&self) -> Result<Vec<Configuration>, Error> {
        if let (Some(model), Some(preempt)) = (self.model, self.preempt) {
            return Ok(vec![Configuration::new(model, preempt)?]);
        }
        let wanted = |configuration: &Configuration| {
            let level = configuration.preempt();
            self.model
                .is_none_or(|model| model == configuration.model())
                && match self.preempt {
                    Some(wanted) => level == wanted,
                    // Level partial is level none but for one kind of message.
                    None => !self.quick || level != Preempt::Partial,
                }
        };
        Ok(Configuration::ALL.into_iter().filter(wanted).collect())
    }
}

/// Runs the command; its exit status.
///
/// # Errors
/// If the arguments are wrong, or the host fails.
pub fn command(args: &BenchArgs) -> Result<u8, Error> {
    if args.list {
        for table in tables::ALL {
            println!("{:12} {}", table.id(), table.title());
        }
        return Ok(0);
    }
    let old = match &args.compare {
        Some(path) => {
            let text = fs::read_to_string(path).map_err(|source| Error::File {
                path: path.clone(),
                source,
            })?;
            Some(compare::read(&path.display().to_string(), &text)?)
        }
        None => None,
    };
    let job = Job {
        tables: args.tables.clone(),
        configurations: args.configurations()?,
        settings: args.settings()?,
        mutant: None,
    };
    let progress = Progress::new();
    let report = measure(&job, &|what| progress.tell(what))?;
    progress.end();
    save(args, &report)?;
    let text = match &old {
        Some(old) => {
            let found = compare::compare(old, &report);
            if found.compared == 0 {
                return Err(Error::Config(
                    "the two reports have no value in common; measure the same tables and configurations".into(),
                ));
            }
            print(&found.text());
            return Ok(if found.holds() { 0 } else { STATUS_FAILURE });
        }
        None if args.json => json(&report)? + "\n",
        None => text::render(&report),
    };
    print(&text);
    Ok(0)
}

fn print(text: &str) {
    // Whoever reads no more has seen enough.
    let _ = io::stdout().write_all(text.as_bytes());
}

fn json(report: &Report) -> Result<String, Error> {
    serde_json::to_string_pretty(report).map_err(|error| Error::Config(error.to_string()))
}

fn save(args: &BenchArgs, report: &Report) -> Result<(), Error> {
    if let Some(path) = &args.save {
        write(path, &json(report)?)?;
    }
    if let Some(path) = &args.html {
        write(path, &html::render(report))?;
    }
    if let Some(path) = &args.csv {
        write(path, &csv::render(report))?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    fs::write(path, text).map_err(|error| {
        Error::Config(format!(
            "cannot write `{}`: {error}; give the path of a file in a directory that you may write to",
            path.display()
        ))
    })
}

/// What is being done, on a terminal.
struct Progress(Option<ProgressBar>);

impl Progress {
    fn new() -> Self {
        if !io::stderr().is_terminal() {
            return Self(None);
        }
        let bar = ProgressBar::new_spinner();
        let style = ProgressStyle::with_template("{spinner} {elapsed} {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(Some(bar))
    }

    fn tell(&self, what: &str) {
        match &self.0 {
            Some(bar) => bar.set_message(what.to_string()),
            None => tracing::info!("{what}"),
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
